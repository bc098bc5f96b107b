"""Requests a second and the slow end of them: the kit's site, through its gateway with TLS and a password, beside the
server that `mlflow server` starts, straight and in the clear. Memory of both when the work is done."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kit import vm
from kit.bench_idle import read_memory
from kit.bench_lab import KIT, BenchError, Lab, Measurement, medians, say
from kit.bench_sides import ADDRESSES, DATABASES, INSTANCE, PEER, PLAIN_UNIT, Sides

# Each call of wrk writes names of its own.
CALLS = itertools.count(1)
SECONDS, WARM, CONNECTIONS, THREADS = 5, 1, 8, 2
SCRIPT = pathlib.Path(__file__).with_name("bench_api.lua")
CASES = ("get run", "search", "UI page", "log-metric", "log-batch")
# What is read stays as it was filled; what is written goes elsewhere, or the faster side would read more.
READ, WRITTEN = 10_000, 4_000
RUNS = {"read": "/root/bench-read.txt", "written": "/root/bench-written.txt"}
SEARCHES: list[dict[str, Any]] = [
    {"max_results": 100, "order_by": ["attributes.start_time DESC"]},
    {"max_results": 50, "filter": "metrics.loss < 0.2", "order_by": ["metrics.loss ASC"]},
    {"max_results": 50, "filter": "params.depth = '7' and tags.team = 'c'"},
]
MEMORY = {
    "kit": rf"/{INSTANCE}",
    "plain": rf"/{re.escape(PLAIN_UNIT)}",
    "nginx": r"/nginx\.service",
    "postgresql": r"/postgresql@[^/]*\.service",
}
# One run is made by the API; the others are its copies under other names, with values of their own, so that whatever
# columns a version has are filled as it fills them.
FILL = """
DO $fill$
DECLARE
  one text;
  columns text;
  selected text;
BEGIN
  FOREACH one IN ARRAY ARRAY['runs', 'metrics', 'latest_metrics', 'params', 'tags'] LOOP
    SELECT string_agg(quote_ident(column_name), ', '), string_agg(
      CASE
        WHEN column_name = 'run_uuid' THEN 'md5(%(salt)s || n)'
        WHEN column_name = 'artifact_uri' THEN 'replace(t.artifact_uri, t.run_uuid, md5(%(salt)s || n))'
        WHEN column_name = 'name' THEN '''run '' || n'
        WHEN column_name = 'start_time' THEN 't.start_time - n * 1000'
        WHEN column_name = 'value' AND one LIKE '%%metrics' THEN
          '(''x'' || substr(md5(n || t.key), 1, 6))::bit(24)::int / 16777216.0'
        WHEN column_name = 'value' AND one = 'params' THEN
          'CASE t.key WHEN ''depth'' THEN (n %% 10)::text ELSE t.value END'
        WHEN column_name = 'value' AND one = 'tags' THEN
          'CASE t.key WHEN ''mlflow.runName'' THEN ''run '' || n WHEN ''team'' THEN chr(97 + n %% 5) ELSE t.value END'
        ELSE 't.' || quote_ident(column_name)
      END, ', ')
    INTO columns, selected
    FROM information_schema.columns WHERE table_schema = 'public' AND table_name = one;
    EXECUTE format('INSERT INTO %%I (%%s) SELECT %%s FROM %%I t CROSS JOIN generate_series(1, %(number)d) AS n '
      'WHERE t.run_uuid = %%L', one, columns, selected, one, '%(template)s');
  END LOOP;
END
$fill$;
"""


def lua(value: Any) -> str:
    """A JSON-like value as a Lua literal."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"[{lua(k)}] = {lua(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "{" + ", ".join(lua(v) for v in value) + "}"
    if isinstance(value, str):
        escaped = "".join(c if c.isascii() and c.isprintable() and c not in '\\"' else f"\\{ord(c):03d}" for c in value)
        return f'"{escaped}"'
    return str(value)


def parse(output: str) -> dict[str, float]:
    """The figures of one call of wrk. Raises BenchError unless every request was answered by a 200."""
    told = re.search(r"^RESULT (\{.*\})$", output, re.MULTILINE)
    if not told:
        raise BenchError(f"wrk failed:\n{output[-2000:]}")
    found: dict[str, float] = json.loads(told[1])
    if found["not200"] or found["broken"] or not found["requests"]:
        first = re.search(r"^FIRST (.*)$", output, re.MULTILINE)
        raise BenchError(f"not every request was answered by a 200: {told[1]} {first[1] if first else ''}")
    return {
        "requests_s": found["requests"] / found["seconds"],
        "p50_ms": found["p50_ms"],
        "p99_ms": found["p99_ms"],
        "worst_ms": found["worst_ms"],
        "mb_s": found["bytes"] / found["seconds"] / 1e6,
    }


def assets(page: str) -> list[str]:
    """The paths of the scripts and styles that the UI's index loads."""
    found = re.findall(r'<(?:script|link)\b[^>]*?\b(?:src|href)="([^":]+\.(?:js|css))"', page)
    return [path if path.startswith("/") else f"/{path.removeprefix('./')}" for path in dict.fromkeys(found)]


def _make(sides: Sides, name: str, number: int, file: str) -> str:
    """Make an experiment with `number` runs on the serving side, whose ids go to `file`; returns its id."""
    answer = sides.ask([("/api/2.0/mlflow/experiments/create", {"name": f"bench {name}"})])[0]
    experiment: str = json.loads(answer["text"])["experiment_id"]
    now = 1_700_000_000_000
    told = {"experiment_id": experiment, "start_time": now, "run_name": "template"}
    run: str = json.loads(sides.ask([("/api/2.0/mlflow/runs/create", told)])[0]["text"])["run"]["info"]["run_id"]
    batch: dict[str, Any] = {
        "run_id": run,
        "metrics": [{"key": k, "value": 0.5, "timestamp": now, "step": 0} for k in ("loss", "accuracy", "f1", "auc")],
        "params": [{"key": k, "value": "3"} for k in ("depth", "width", "rate", "seed", "epochs")],
        "tags": [{"key": k, "value": "a"} for k in ("team", "stage")],
    }
    if name == "read":
        sides.ask([("/api/2.0/mlflow/runs/log-batch", batch)])
    salt = f"''{name}''"
    sql = FILL % {"salt": salt, "number": number, "template": run} + "ANALYZE;\n"
    sql += f"\\copy (SELECT md5('{name}' || n) FROM generate_series(1, {number}) AS n) TO '/var/tmp/bench-ids.txt'\n"
    vm.write(KIT, "/root/bench-fill.sql", sql.encode())
    command = "runuser -u postgres -- psql -qX -v ON_ERROR_STOP=1 -d " + DATABASES[sides.serving]
    vm.execute(KIT, "sh", "-c", f"cd / && {command} < /root/bench-fill.sql && mv /var/tmp/bench-ids.txt {file}")
    return experiment


def fill(sides: Sides) -> dict[str, Any]:
    """Fill the serving side, once; returns what its cases need, with what its searches find."""
    if sides.serving in sides.lab.filled:
        return sides.lab.filled[sides.serving]
    say(f"filling {sides.serving}: {READ} runs to read, {WRITTEN} to write to")
    experiment = _make(sides, "read", READ, RUNS["read"])
    _make(sides, "written", WRITTEN, RUNS["written"])
    searches = [{"experiment_ids": [experiment], **one} for one in SEARCHES]
    answers = sides.ask([("/api/2.0/mlflow/runs/search", one) for one in searches])
    runs = [json.loads(one["text"])["runs"] for one in answers]
    found = [(len(one), one[0]["info"]["run_name"], one[-1]["info"]["run_name"]) for one in runs]
    paths = ["/", *assets(sides.ask(["/"])[0]["text"])]
    answers = sides.ask(list(paths), headers={"Accept-Encoding": "gzip"})
    sides.lab.filled[sides.serving] = {
        "bodies": [json.dumps(one) for one in searches],
        "found": found,
        "paths": paths,
        "page_bytes": sum(one["bytes"] for one in answers),
    }
    return sides.lab.filled[sides.serving]


def wrk(
    sides: Sides,
    case: str,
    filled: Mapping[str, Any],
    seconds: int,
    direct: Sequence[int] = (),
    cores: Sequence[int] = (),
) -> dict[str, float]:
    """Let wrk ask the serving side for `seconds` as `case` says; returns its figures. Raises BenchError.

    Parameters:
        direct: ports of the kit's instances to ask in the clear instead of the gateway, in turn by each thread.
        cores: those that wrk may use; all if none is named.
    """
    address = f"http://127.0.0.1:{direct[0]}" if direct else ADDRESSES[sides.serving]
    headers = {} if direct else sides.headers[sides.serving]
    settings = {
        "case": case,
        "round": str(next(CALLS)),
        "ids": RUNS["written" if case.startswith("log-") else "read"],
        "bodies": filled["bodies"],
        "paths": filled["paths"],
        "ports": [str(port) for port in direct],
        "headers": {**headers, "Accept-Encoding": "gzip" if case == "UI page" else "identity"},
    }
    vm.write(KIT, "/root/bench-api.lua", f"SETTINGS = {lua(settings)}\n{SCRIPT.read_text()}".encode())
    argv = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    argv += [
        "wrk",
        f"-t{THREADS}",
        f"-c{CONNECTIONS}",
        f"-d{seconds}s",
        "--timeout",
        "60s",
        "-s",
        "/root/bench-api.lua",
    ]
    return parse(vm.execute(KIT, *argv, address))


def bench(lab: Lab, rounds: int) -> Iterator[Measurement]:
    """For each case requests/s and p99, then memory: one side serves at a time, who begins changes with the round."""
    sides = Sides(lab)
    vm.execute(KIT, "sh", "-c", "apt-get install -yqq --no-install-recommends wrk >/dev/null 2>&1")
    filled: dict[str, dict[str, Any]] = {}
    seen: dict[str, dict[str, list[dict[str, float]]]] = {side: {case: [] for case in CASES} for side in ADDRESSES}
    memory: dict[str, list[dict[str, float]]] = {side: [] for side in ADDRESSES}
    try:
        for number in range(rounds):
            for side in ("plain", "kit") if number % 2 else ("kit", "plain"):
                cold = sides.serve(side) or side not in filled
                if side not in filled:
                    filled[side] = fill(sides)
                if cold:
                    for case in CASES:
                        wrk(sides, case, filled[side], WARM)
                for case in CASES:
                    seen[side][case].append(wrk(sides, case, filled[side], SECONDS))
                found = read_memory(KIT, MEMORY)
                memory[side].append({"mlflow": found[side][0], "processes": found[side][1]})
                memory[side][-1] |= {name: found[name][0] for name in ("nginx", "postgresql")}
                words = ", ".join(f"{case} {seen[side][case][-1]['requests_s']:.0f}" for case in CASES)
                say(f"api, round {number + 1} of {rounds}: {side} {words} requests/s, {memory[side][-1]['mlflow']} MB")
            if filled["kit"]["found"] != filled["plain"]["found"]:
                raise BenchError(f"the sides find other runs: {filled['kit']['found']} and {filled['plain']['found']}")
    finally:
        sides.serve("kit")
    yield from measurements(seen, memory, {"rounds": rounds, "connections": CONNECTIONS, "seconds": SECONDS}, filled)


def measurements(
    seen: Mapping[str, Mapping[str, Sequence[dict[str, float]]]],
    memory: Mapping[str, Sequence[dict[str, float]]],
    told: Mapping[str, Any],
    filled: Mapping[str, Mapping[str, Any]],
) -> Iterator[Measurement]:
    """The measurements of what the rounds have `seen`, and of the memory after them."""
    for case in CASES:
        kit, peer = medians(seen["kit"][case]), medians(seen["plain"][case])
        detail: dict[str, Any] = {**told, "kit": kit, "peer": peer}
        for side, name in (("kit", "kit_rounds"), ("plain", "peer_rounds")):
            detail[name] = [round(one["requests_s"], 1) for one in seen[side][case]]
        if case == "UI page":
            detail["files"] = len(filled["kit"]["paths"])
            detail |= {"kit_page_bytes": filled["kit"]["page_bytes"], "peer_page_bytes": filled["plain"]["page_bytes"]}
        if case == "search":
            detail |= {"runs": READ, "searches": SEARCHES}
        yield Measurement("api", case, "requests/s", "higher", kit["requests_s"], peer["requests_s"], PEER, detail)
        tails = {**told, "kit_rounds": [round(one["p99_ms"], 1) for one in seen["kit"][case]]}
        tails["peer_rounds"] = [round(one["p99_ms"], 1) for one in seen["plain"][case]]
        yield Measurement("api", f"{case}, p99", "ms", "lower", kit["p99_ms"], peer["p99_ms"], PEER, tails)
    kit, peer = medians(memory["kit"]), medians(memory["plain"])
    detail = {"rounds": told["rounds"], "kit": kit, "peer": peer}
    detail["kit_rounds"] = [one["mlflow"] for one in memory["kit"]]
    detail["peer_rounds"] = [one["mlflow"] for one in memory["plain"]]
    yield Measurement("api", "memory", "MB PSS", "lower", kit["mlflow"], peer["mlflow"], PEER, detail)

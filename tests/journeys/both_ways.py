"""Runs on a machine of a site: sends the same random calls to two servers, and prints where they answer differently.

MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD are the first server's, PLAIN is the address of the second.
"""

from __future__ import annotations

import base64
import concurrent.futures
import json
import os
import pathlib
import random
import re
import ssl
import urllib.error
import urllib.request
from typing import Any

CALLS, RUNS, SEED = 600, 4, 5
KEYS = ["loss", "a", "B", "\u00e4 b", "x/y", "loss ", "", "no*star", "k" * 251, "z\x00"]
VALUES = [0.1, 0, -0.0, 1e-320, 1.7e308, 3, float("nan"), float("inf"), float("-inf"), "NaN", "word", None, True]
WORDS = ["3", "4", "", "\u00e4\n'\"%(run)s", "w" * 6001, "x" * 8001, "nul\x00"]
TIMES, STEPS = [0, 1, 2, 3, 1_700_000_000_000, -1, 2**63 - 1, 2**63], [0, 0, 1, 2, -3, 2**63 - 1]
AT_ONCE = [f"m{number}" for number in range(12)]
CA = pathlib.Path("/root/ca-bundle.crt")
user = f"{os.environ['MLFLOW_TRACKING_USERNAME']}:{os.environ['MLFLOW_TRACKING_PASSWORD']}"
HEADERS: dict[str, dict[str, str]] = {
    os.environ["MLFLOW_TRACKING_URI"]: {"Authorization": "Basic " + base64.b64encode(user.encode()).decode()},
    os.environ["PLAIN"]: {},
}
tls = ssl.create_default_context(cafile=str(CA)) if CA.exists() else None
chance = random.Random(SEED)
Answer = tuple[int, Any]


def ask(base: str, verb: str, told: dict[str, Any] | None = None) -> tuple[int, str]:
    """The status and the text that a server answers to `told`, or to being asked for what is there."""
    # NaN and the infinities go as Python writes them, which MLflow takes.
    body = None if told is None else json.dumps(told).encode()
    headers = {"Content-Type": "application/json", **HEADERS[base]}
    asked = urllib.request.Request(f"{base}/api/2.0/mlflow/{verb}", body, headers)
    try:
        with urllib.request.urlopen(asked, timeout=60, context=tls if base.startswith("https") else None) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def comparable(value: Any) -> Any:
    """A JSON value without what two runs never share, its lists in one order."""
    if isinstance(value, dict):
        left_out = ("start_time", "end_time", "artifact_uri", "last_update_time")
        return {key: comparable(one) for key, one in value.items() if key not in left_out}
    if isinstance(value, list):
        return sorted(map(comparable, value), key=lambda one: json.dumps(one, sort_keys=True))
    return value


def told_of(answer: tuple[int, str], names: dict[str, str]) -> Answer:
    """An answer with the same names for what stands for the same on both servers."""
    status, text = answer
    for name, stands_for in names.items():
        text = text.replace(name, stands_for)
    text = re.sub("(experiment_id['\"]: ?['\"]?)[0-9]+", lambda at: at[1] + "X", text)
    try:
        return status, comparable(json.loads(text))
    except ValueError:
        return status, text


def metric() -> dict[str, Any]:
    """A metric, mostly an allowed one."""
    usual = chance.random() < 0.85
    return {
        "key": chance.choice(KEYS[:5] if usual else KEYS),
        "value": chance.choice(VALUES[:9] if usual else VALUES),
        "timestamp": chance.choice(TIMES[:5] if usual else TIMES),
        "step": chance.choice(STEPS),
    }


def pair() -> dict[str, Any]:
    """A key and a value, mostly allowed ones."""
    usual = chance.random() < 0.9
    return {"key": chance.choice(KEYS[:5] if usual else KEYS), "value": chance.choice(WORDS[:4] if usual else WORDS)}


def param() -> dict[str, Any]:
    """A parameter; one that may have another value already is rare, or each batch would be refused before long."""
    return pair() if chance.random() < 0.2 else {"key": f"p{chance.randrange(40)}", "value": "3"}


def tag() -> dict[str, Any]:
    """A tag, now and then one that means something to MLflow."""
    names = ["mlflow.runName", "mlflow.note.content", "mlflow.user"]
    return {**pair(), **({"key": chance.choice(names)} if chance.random() < 0.1 else {})}


def call() -> tuple[str, dict[str, Any]]:
    """A call to a run: its verb, and what it is told."""
    kinds = {"metric": 20, "param": 12, "tag": 12, "batch": 40, "large": 1, "delete": 2, "restore": 6, "unknown": 1}
    kind = chance.choices([*kinds, "name", "model"], [*kinds.values(), 1, 2])[0]
    if kind == "metric":
        return "runs/log-metric", metric()
    if kind == "param":
        return "runs/log-parameter", pair()
    if kind == "tag":
        return "runs/set-tag", tag()
    if kind == "batch":
        return "runs/log-batch", {
            "metrics": [metric() for _ in range(chance.choice([0, 1, 2, 8]))],
            "params": [param() for _ in range(chance.choice([0, 0, 1, 2, 5]))],
            "tags": [tag() for _ in range(chance.choice([0, 1, 3]))],
        }
    if kind == "large":
        many = [{"key": f"n{number}", "value": "1", "timestamp": 1, "step": 0} for number in range(1001)]
        return "runs/log-batch", {chance.choice(["metrics", "params", "tags"]): many}
    if kind == "unknown":
        return chance.choice(["runs/log-metric", "runs/log-batch", "runs/set-tag"]), {**metric(), "run_id": "0" * 32}
    if kind == "name":
        return "runs/update", {"run_name": chance.choice(["new name", ""])}
    if kind == "model":
        return "runs/log-metric", {**metric(), "model_id": "m-" + "0" * 32}
    return f"runs/{kind}", {}


def create(base: str, experiment: str, number: int) -> str:
    """Make a run and return its id."""
    told = {"experiment_id": experiment, "start_time": number, "run_name": f"run {number}"}
    made: str = json.loads(ask(base, "runs/create", told)[1])["run"]["info"]["run_id"]
    return made


def one_after_the_other(runs: dict[str, list[str]], experiments: dict[str, str]) -> dict[str, Any]:
    """Send the random calls to both, and look at the runs between them."""
    names = {run: f"RUN {number}" for each in runs.values() for number, run in enumerate(each)}
    different, refused = [], 0
    for number in range(CALLS):
        (verb, told), run = call(), chance.randrange(RUNS)
        asked: list[tuple[str, dict[str, Any] | None]] = [(verb, told)]
        if number % 10 == 0:
            asked += [("runs/get?run_id=%s", None)]
            asked += [(f"metrics/get-history?metric_key={chance.choice(KEYS[:3])}&run_id=%s", None)]
        if number % 50 == 0:
            order = ["attributes.start_time DESC", "metrics.loss"]
            asked += [("runs/search", {"max_results": 3, "order_by": order, "run_view_type": "ALL"})]
        for path, body in asked:
            answers = []
            for base in HEADERS:
                where = (
                    {"experiment_ids": [experiments[base]]} if path == "runs/search" else {"run_id": runs[base][run]}
                )
                whole = None if body is None else where | body
                answers.append(told_of(ask(base, path.replace("%s", runs[base][run]), whole), names))
            refused += answers[0][0] != 200
            mine, theirs = (json.dumps(one, sort_keys=True) for one in answers)
            if mine != theirs:
                different.append([number, path, json.dumps(body)[:300], mine[:600], theirs[:600]])
    return {"calls": CALLS, "refused": refused, "different": different[:5]}


def all_at_once(experiment: str) -> dict[str, Any]:
    """Let eight writers write to the same keys of one run of the first server, each in orders of its own."""
    base = next(iter(HEADERS))
    run = create(base, experiment, 9)

    def work(writer: int) -> set[int]:
        mine, statuses = random.Random(writer), set()
        for step in range(15):
            keys = mine.sample(AT_ONCE, len(AT_ONCE))
            told = {
                "run_id": run,
                "metrics": [{"key": k, "value": writer + step / 100, "timestamp": writer, "step": step} for k in keys],
                "params": [{"key": k, "value": "same"} for k in keys],
                "tags": [{"key": k, "value": "same"} for k in keys],
            }
            statuses.add(ask(base, "runs/log-batch", told)[0])
        return statuses

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        statuses = sorted(set().union(*pool.map(work, range(8))))
    data = json.loads(ask(base, f"runs/get?run_id={run}")[1])["run"]["data"]
    history = json.loads(ask(base, f"metrics/get-history?metric_key=m3&run_id={run}")[1])["metrics"]
    latest = sorted({(one["value"], one["step"]) for one in data["metrics"]})
    tags = [one for one in data["tags"] if one["key"] in AT_ONCE]
    kept = [len(data["metrics"]), len(data["params"]), len(tags), len(history)]
    return {"statuses": statuses, "latest": latest, "kept": kept}


def main() -> None:
    """Print what was found, as JSON."""
    stamp, runs, experiments = os.urandom(4).hex(), {}, {}
    for side, base in enumerate(HEADERS):
        told = {"name": f"both ways {stamp} {side}"}
        experiments[base] = json.loads(ask(base, "experiments/create", told)[1])["experiment_id"]
        runs[base] = [create(base, experiments[base], number) for number in range(RUNS)]
    found = one_after_the_other(runs, experiments)
    print(json.dumps(found | all_at_once(next(iter(experiments.values())))))


if __name__ == "__main__":
    main()

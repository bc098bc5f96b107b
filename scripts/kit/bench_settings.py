"""Whether the kit's own defaults pay: the site as it is deployed, beside the same site without one of them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from kit import bench_api, vm
from kit.bench_idle import read_memory
from kit.bench_lab import KIT, BenchError, Lab, Measurement, medians, say
from kit.bench_sides import Sides

REST = "mlflow-rest@1.service"
GATEWAY = "/etc/nginx/mlflow-kit/site.conf"
# What takes time or room by PostgreSQL's settings, not who may connect.
TUNED = "shared_buffers|effective_cache_size|work_mem|maintenance_work_mem|random_page_cost|effective_io_concurrency"
TUNED += "|wal_compression|min_wal_size|max_wal_size|checkpoint_timeout|jit"
# How long the unit takes until it serves, by systemd's own clock, in seconds.
STARTED = """
import re, subprocess
def stamp(name):
    shown = subprocess.run(["systemctl", "show", "-p", name, "--value", UNIT], capture_output=True, text=True).stdout
    return int(shown) / 1e6
subprocess.run(["systemctl", "restart", UNIT], check=True)
print(stamp("ActiveEnterTimestampMonotonic") - stamp("InactiveExitTimestampMonotonic"))
"""
# PostgreSQL breaks an expression into lines.
INDEXES = (
    r"SELECT regexp_replace(indexdef, '\s+', ' ', 'g') FROM pg_indexes WHERE indexname LIKE 'mlflow_kit_%' ORDER BY 1"
)


class Setting(NamedTuple):
    """A default: how it is taken away and brought back, what is measured, and what that is called."""

    name: str
    without: Callable[[], None]
    back: Callable[[], None]
    figure: Callable[[int], float]
    unit: str
    better: str
    peer: str


def sql(text: str) -> str:
    """Run SQL in the site's database as its superuser and return what it prints."""
    vm.write(KIT, "/root/bench-settings.sql", text.encode())
    return vm.execute(KIT, "sh", "-c", "cd / && runuser -u postgres -- psql -qXAt -d mlflow < /root/bench-settings.sql")


def drop_in(unit: str, *lines: str) -> None:
    """Give a unit these lines until the machine is gone; none takes them away again."""
    path = f"/run/systemd/system/{unit}.d/bench.conf"
    vm.execute(KIT, "sh", "-c", f"rm -f {path}; mkdir -p {path.rpartition('/')[0]}")
    if lines:
        vm.write(KIT, path, ("[Service]\n" + "\n".join(lines) + "\n").encode())
    vm.execute(KIT, "systemctl", "daemon-reload")


def edited(path: str, expression: str, then: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """How a file is changed by an expression of sed, and how it is brought back; the command `then` follows both.

    The first raises BenchError when the file has nothing that the expression changes.
    """
    old, quoted = f"{path}.bench", shlex.quote(path)

    def change() -> None:
        script = f"cp -p {quoted} {old} && sed -i -E {shlex.quote(expression)} {quoted} && ! cmp -s {quoted} {old}"
        if vm.execute(KIT, "sh", "-c", f"({script}) && echo changed", check=False) != "changed":
            raise BenchError(f"{path}: nothing there is what {expression} would change")
        vm.execute(KIT, "sh", "-c", then)

    def back() -> None:
        vm.execute(KIT, "sh", "-c", f"if [ -e {old} ]; then mv {old} {quoted}; {then}; fi")

    return change, back


def start_seconds(_round: int) -> float:
    """Seconds from the start of an instance of the fast lane to the moment when it serves."""
    vm.write(KIT, "/root/bench-start.py", f"UNIT = {REST!r}\n{STARTED}".encode())
    return float(vm.execute(KIT, "python3", "/root/bench-start.py"))


def memory_mb(_round: int) -> float:
    """Memory of all instances in MB."""
    return float(read_memory(KIT, {"kit": bench_api.MEMORY["kit"]})["kit"][0])


def bench(lab: Lab, rounds: int) -> Iterator[Measurement]:
    """For each default its figure with and without, in turn, `rounds` rounds."""
    sides = Sides(lab)
    vm.execute(KIT, "sh", "-c", "apt-get install -yqq --no-install-recommends wrk >/dev/null 2>&1")
    filled = bench_api.fill(sides)
    kept = sql(INDEXES).splitlines()
    names = [re.findall(r"INDEX (\S+) ON", line)[0] for line in kept]

    def without_indexes() -> None:
        sql("".join(f"DROP INDEX {name};" for name in names))

    def with_indexes() -> None:
        sql(";".join([*kept, "ANALYZE"]))

    def requests(case: str) -> Callable[[int], float]:
        def figure(number: int) -> float:
            bench_api.wrk(sides, case, number, filled, bench_api.WARM)
            return bench_api.wrk(sides, case, number, filled, bench_api.SECONDS)["requests_s"]

        return figure

    def deployed(**settings: Any) -> Callable[[], None]:
        def deploy() -> None:
            given = json.dumps(settings)
            lab.playbook("playbooks/mlflow.yml", "playbooks/gateway.yml", "-e", given, log="bench-settings")
            sides.wait()

        return deploy

    anew = "systemctl restart 'postgresql@*.service' && systemctl restart 'mlflow@*.service' 'mlflow-rest@*.service'"
    reload = "nginx -t -q && systemctl reload nginx && sleep 2"
    database = vm.execute(KIT, "sh", "-c", "ls /etc/postgresql/*/main/conf.d/50-mlflow-kit.conf")
    tuned = edited(database, f"/^({TUNED}) =/d", anew)
    kept_open = edited("/etc/nginx/mlflow-kit/upstreams.conf", "/^ *keepalive 64;/d", reload)
    static = edited(GATEWAY, "s/proxy_cache static;/proxy_cache off;/", reload)
    line_by_line = r"s#access_log [^ ]*/gateway.log access .*#access_log syslog:server=unix:/dev/log access;#"
    blocks = edited("/etc/nginx/nginx.conf", line_by_line, reload)

    yield from compared(
        [
            Setting(
                "lane of its own for the API, log-metric",
                deployed(mlflow_rest_instances=0),
                deployed(),
                requests("log-metric"),
                "requests/s",
                "higher",
                "all by the instances that serve everything",
            ),
            *(
                Setting(
                    f"shortcuts through MLflow's store, {case}",
                    deployed(mlflow_shortcuts=False),
                    deployed(),
                    requests(case),
                    "requests/s",
                    "higher",
                    "MLflow's own way",
                )
                for case in ("log-metric", "log-batch", "search")
            ),
            Setting(
                "eight threads of an instance of that lane, log-metric",
                deployed(mlflow_rest_threads=2),
                deployed(),
                requests("log-metric"),
                "requests/s",
                "higher",
                "two threads",
            ),
            Setting(
                "two instances of that lane, log-metric",
                deployed(mlflow_rest_instances=1),
                deployed(),
                requests("log-metric"),
                "requests/s",
                "higher",
                "one instance",
            ),
            Setting(
                "as many connections kept to the database as threads, log-metric",
                deployed(mlflow_database_pool_size=1),
                deployed(),
                requests("log-metric"),
                "requests/s",
                "higher",
                "one kept, others opened when they are needed",
            ),
            *(
                Setting(
                    f"PostgreSQL's sizes and costs, {case}",
                    *tuned,
                    requests(case),
                    "requests/s",
                    "higher",
                    "the distribution's",
                )
                for case in ("log-batch", "search")
            ),
            Setting(
                "connections to the instances kept open, log-metric",
                *kept_open,
                requests("log-metric"),
                "requests/s",
                "higher",
                "one for each request",
            ),
            Setting(
                "access log written in blocks, log-metric",
                *blocks,
                requests("log-metric"),
                "requests/s",
                "higher",
                "each line to the journal",
            ),
            Setting(
                "the page's files kept at the gateway, UI page",
                *static,
                requests("UI page"),
                "requests/s",
                "higher",
                "each fetched from an instance, and compressed anew",
            ),
            Setting(
                "indexes for MLflow's searches",
                without_indexes,
                with_indexes,
                requests("search"),
                "requests/s",
                "higher",
                "MLflow's own schema",
            ),
            Setting(
                "indexes for MLflow's searches, log-metric",
                without_indexes,
                with_indexes,
                requests("log-metric"),
                "requests/s",
                "higher",
                "MLflow's own schema",
            ),
            Setting(
                "bytecode made at installation, start of an instance",
                lambda: drop_in(REST, "Environment=PYTHONPYCACHEPREFIX=/nonexistent"),
                lambda: drop_in(REST),
                start_seconds,
                "s",
                "lower",
                "bytecode that cannot be written at the start",
            ),
            Setting(
                "two arenas of malloc, memory after the work",
                deployed(mlflow_environment={"MALLOC_ARENA_MAX": 0}),
                deployed(),
                lambda number: (requests("search")(number), memory_mb(number))[1],
                "MB PSS",
                "lower",
                "malloc's own number of arenas",
            ),
        ],
        rounds,
    )


def compared(settings: Sequence[Setting], rounds: int) -> Iterator[Measurement]:
    """Measure each setting with and without it in turn; whatever happens it is brought back."""
    for one in settings:
        found: dict[str, list[dict[str, float]]] = {"kit": [], "peer": []}
        for number in range(rounds):
            found["kit"].append({"figure": one.figure(2 * number)})
            try:
                one.without()
                found["peer"].append({"figure": one.figure(2 * number + 1)})
            finally:
                one.back()
            say(f"{one.name}: {found['kit'][-1]['figure']:.1f} with, {found['peer'][-1]['figure']:.1f} without")
        kit, peer = medians(found["kit"])["figure"], medians(found["peer"])["figure"]
        detail = {side + "_rounds": [round(r["figure"], 1) for r in each] for side, each in found.items()}
        yield Measurement("settings", one.name, one.unit, one.better, kit, peer, one.peer, {"rounds": rounds, **detail})

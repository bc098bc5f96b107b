"""Whether the kit's own defaults pay: the site as it is deployed, beside the same site without one of them."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kit import bench_api, bench_sides, vm
from kit.bench_idle import read_memory
from kit.bench_lab import KIT, BenchError, Lab, Measurement, say

REST = "mlflow-rest@1.service"
ENVIRONMENT = "/etc/mlflow/mlflow.env"
GATEWAY, UPSTREAMS = "/etc/nginx/mlflow-kit/site.conf", "/etc/nginx/mlflow-kit/upstreams.conf"
PACKAGES = "/opt/mlflow/current/lib/python3*/site-packages"
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


class Figure(NamedTuple):
    """What is measured: what is appended to the setting's name, how, and which way it is better."""

    case: str
    measure: Callable[[], float]
    unit: str = "requests/s"
    better: str = "higher"


class Setting(NamedTuple):
    """A default: how it is taken away and brought back, what that is called, what is measured.

    `turns` is how often it is taken away in a round: often, where that is quickly done.
    """

    name: str
    peer: str
    without: Callable[[], None]
    back: Callable[[], None]
    figures: Sequence[Figure]
    turns: int = 1


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


def edited(path: str, expression: str, then: Callable[[], None]) -> tuple[Callable[[], None], Callable[[], None]]:
    """How a file is changed by an expression of sed, and how it is brought back; `then` follows both.

    The first raises BenchError when the file has nothing that the expression changes.
    """
    old, quoted = f"{path}.bench", shlex.quote(path)

    def change() -> None:
        script = f"cp -p {quoted} {old} && sed -i -E {shlex.quote(expression)} {quoted} && ! cmp -s {quoted} {old}"
        if vm.execute(KIT, "sh", "-c", f"({script}) && echo changed", check=False) != "changed":
            raise BenchError(f"{path}: nothing there is what {expression} would change")
        then()

    def back() -> None:
        if vm.execute(KIT, "sh", "-c", f"[ -e {old} ] && mv {old} {quoted} && echo changed", check=False):
            then()

    return change, back


def start_seconds() -> float:
    """Seconds from the start of an instance of the fast lane to the moment when it serves."""
    vm.write(KIT, "/root/bench-start.py", f"UNIT = {REST!r}\n{STARTED}".encode())
    return float(vm.execute(KIT, "python3", "/root/bench-start.py"))


def memory_mb() -> float:
    """Memory of all instances in MB."""
    return float(read_memory(KIT, {"kit": bench_api.MEMORY["kit"]})["kit"][0])


def reload() -> None:
    """Let NGINX take its files, if they are good."""
    vm.execute(KIT, "sh", "-c", "nginx -t -q && systemctl reload nginx && sleep 2")


def bench(lab: Lab, rounds: int) -> Iterator[Measurement]:
    """For each default its figures with and without, in turn, `rounds` rounds."""
    sides = bench_sides.Sides(lab, plain=False)
    vm.execute(KIT, "sh", "-c", "apt-get install -yqq --no-install-recommends wrk >/dev/null 2>&1")
    filled = bench_api.fill(sides)
    kept = sql(INDEXES).splitlines()
    names = [re.findall(r"INDEX (\S+) ON", line)[0] for line in kept]

    def requests(case: str, seconds: int = bench_api.SECONDS) -> Figure:
        def measure() -> float:
            if seconds == bench_api.SECONDS:
                bench_api.wrk(sides, case, filled, bench_api.WARM)
            return bench_api.wrk(sides, case, filled, seconds)["requests_s"]

        return Figure(case, measure)

    def restarted(*units: str) -> Callable[[], None]:
        def run() -> None:
            vm.execute(KIT, "systemctl", "restart", *units)
            # Its workers have connections open to all instances that are gone at once.
            reload()
            sides.wait()

        return run

    def after_work() -> float:
        requests("search").measure()
        return memory_mb()

    restart = restarted("mlflow@*.service", "mlflow-rest@*.service")
    anew = restarted("postgresql@*.service", "mlflow@*.service", "mlflow-rest@*.service")

    def setting_of(name: str, value: str) -> tuple[Callable[[], None], Callable[[], None]]:
        return edited(ENVIRONMENT, f"s/^{name}=.*/{name}={value}/", restart)

    def packages(*wanted: str) -> tuple[Callable[[], None], Callable[[], None]]:
        def moved(before: str, after: str) -> Callable[[], None]:
            def move() -> None:
                folder = vm.execute(KIT, "sh", "-c", f"echo {PACKAGES}")
                for one in wanted:
                    vm.execute(
                        KIT,
                        "sh",
                        "-c",
                        f"[ ! -e {folder}/{one}{before} ] || mv {folder}/{one}{before} {folder}/{one}{after}",
                    )
                restart()

            return move

        return moved("", ".bench"), moved(".bench", "")

    database = vm.execute(KIT, "sh", "-c", "ls /etc/postgresql/*/main/conf.d/50-mlflow-kit.conf")
    line_by_line = r"s#access_log [^ ]*/gateway.log access .*#access_log syslog:server=unix:/dev/log access;#"
    each_time = (
        's#^    auth_request /-/credentials;#    auth_basic "x"; auth_basic_user_file /etc/nginx/mlflow-kit/users;#'
    )
    writes, batches, searches = (requests(case) for case in ("log-metric", "log-batch", "search"))
    quick = requests("log-metric", 2)

    yield from compared(
        [
            Setting(
                "lane of its own for the API",
                "all by the instances that serve everything",
                *edited(GATEWAY, "s#http://mlflow_rest;#http://mlflow;#", reload),
                [writes, batches, searches],
                turns=2,
            ),
            Setting(
                "shortcuts through MLflow's store",
                "MLflow's own way",
                *setting_of("MLFLOW_KIT_SHORTCUTS", "false"),
                [writes, batches, searches],
                turns=2,
            ),
            *(
                Setting(
                    f"four threads of an instance of that lane, not {words}",
                    f"{words} threads",
                    *setting_of("MLFLOW_KIT_REST_THREADS", str(number)),
                    [writes, searches],
                    turns=3,
                )
                for words, number in (("one", 1), ("eight", 8))
            ),
            Setting(
                "two instances of that lane",
                "one instance",
                *edited(UPSTREAMS, "/# mlflow_rest$/{/:5101 /!d}", reload),
                [writes, searches],
                turns=3,
            ),
            Setting(
                "ten connections kept to the database",
                "one kept, others opened when they are needed",
                *setting_of("MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "1"),
                [writes],
                turns=3,
            ),
            Setting(
                "collecting garbage seldom",
                "Python's own thresholds",
                *edited("/usr/local/lib/mlflow-kit/launcher.py", "/^    _settle\\(\\)$/d", restart),
                [writes, searches],
                turns=3,
            ),
            Setting(
                "head and body of an answer by one packet",
                "by two",
                *edited("/usr/local/lib/mlflow-kit/launcher.py", "/^    server.ConnectionClass = /d", restart),
                [writes, requests("get run")],
                turns=3,
            ),
            Setting(
                "event loop and parser of the instances that serve everything",
                "Python's own event loop, h11",
                *packages("uvloop", "httptools"),
                [requests("server info")],
                turns=3,
            ),
            Setting(
                "PostgreSQL's sizes and costs",
                "the distribution's",
                *edited(database, f"/^({TUNED}) =/d", anew),
                [writes, batches, searches],
                turns=3,
            ),
            Setting(
                "passwords checked once and remembered",
                "checked at each request",
                *edited(GATEWAY, each_time, reload),
                [quick],
                turns=4,
            ),
            Setting(
                "connections to the instances kept open",
                "one for each request",
                *edited(UPSTREAMS, "/^ *keepalive 64;/d", reload),
                [quick],
                turns=8,
            ),
            Setting(
                "access log written in blocks",
                "each line to the journal",
                *edited("/etc/nginx/nginx.conf", line_by_line, reload),
                [quick],
                turns=8,
            ),
            Setting(
                "the page's files kept at the gateway",
                "each fetched from an instance, and compressed anew",
                *edited(GATEWAY, "s/proxy_cache static;/proxy_cache off;/", reload),
                [requests("UI page")],
            ),
            Setting(
                "indexes for MLflow's searches",
                "MLflow's own schema",
                lambda: void(sql("".join(f"DROP INDEX {name};" for name in names))),
                lambda: void(
                    sql(";".join([*(line.replace("INDEX", "INDEX IF NOT EXISTS", 1) for line in kept), "ANALYZE"]))
                ),
                [requests("newest runs", 2), requests("by a metric", 2), quick],
                turns=6,
            ),
            Setting(
                "bytecode made at installation",
                "bytecode that cannot be written at the start",
                lambda: drop_in(REST, "Environment=PYTHONPYCACHEPREFIX=/nonexistent"),
                lambda: drop_in(REST),
                [Figure("start of an instance", start_seconds, "s", "lower")],
                turns=2,
            ),
            Setting(
                "two arenas of malloc",
                "malloc's own number of arenas",
                *setting_of("MALLOC_ARENA_MAX", "0"),
                [Figure("memory after the work", after_work, "MB PSS", "lower"), writes],
                turns=2,
            ),
        ],
        rounds,
    )


def void(_: object) -> None:
    """Nothing, whatever was returned."""


def compared(settings: Sequence[Setting], rounds: int) -> Iterator[Measurement]:
    """Measure each setting with and without it in turn; whatever happens it is brought back."""
    for one in settings:
        found: dict[str, dict[str, list[float]]] = {each.case: {"kit": [], "peer": []} for each in one.figures}
        for _ in range(rounds * one.turns):
            for each in one.figures:
                found[each.case]["kit"].append(each.measure())
            try:
                one.without()
                for each in one.figures:
                    found[each.case]["peer"].append(each.measure())
            finally:
                one.back()
        for each in one.figures:
            both = found[each.case]
            kit, peer = (statistics.median(both[side]) for side in ("kit", "peer"))
            say(f"{one.name}, {each.case}: {kit:.1f} with, {peer:.1f} without")
            detail: dict[str, object] = {"turns": rounds * one.turns}
            detail |= {f"{side}_rounds": [round(value, 1) for value in values] for side, values in both.items()}
            yield Measurement(
                "settings", f"{one.name}, {each.case}", each.unit, each.better, kit, peer, one.peer, detail
            )

"""Memory of a server that nobody uses: the kit's instances beside `mlflow server` as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping

from kit import vm
from kit.bench_lab import KIT, BenchError, Lab, Measurement, medians, say
from kit.bench_sides import INSTANCE, instances, ports

PEER = "mlflow server with its defaults (4 workers, jobs on)"
PEER_UNIT, PEER_PORT = "kit-bench-peer.service", 5080
SETTLE = 20.0
# Which processes count: by the unit that their control group names, children and all.
STACK = {
    "mlflow": rf"/{INSTANCE}",
    "postgresql": r"/postgresql@[^/]*\.service",
    "swift": r"/swift-[^/]*\.service",
    "nginx": r"/nginx\.service",
    "memcached": r"/memcached\.service",
    "peer": rf"/{PEER_UNIT}",
}
READER = """
import json, pathlib, re, sys
wanted = {name: re.compile(pattern) for name, pattern in json.loads(sys.argv[1]).items()}
found = {name: [0, 0] for name in wanted}
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        groups, rollup = (folder / "cgroup").read_text(), (folder / "smaps_rollup").read_text()
    except (OSError, ProcessLookupError):
        continue
    for name, pattern in wanted.items():
        if pattern.search(groups):
            found[name][0] += int(re.search(r"^Pss: +(\\d+)", rollup, re.M)[1])
            found[name][1] += 1
print(json.dumps(found))
"""
# The same questions to both, so that every worker has done the work that it does once.
WARM = """
import concurrent.futures, json, sys, urllib.request
def ask(number):
    body = json.dumps({"max_results": 5}).encode()
    request = urllib.request.Request(
        sys.argv[1 + number % len(sys.argv[1:])] + "/api/2.0/mlflow/experiments/search", body,
        {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=30).status
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert set(pool.map(ask, range(64))) == {200}
"""


def read_memory(machine: str, stack: Mapping[str, str]) -> dict[str, tuple[float, int]]:
    """Proportional memory (MB) and number of processes for each entry of `stack`, read as root."""
    out = vm.execute(machine, "python3", "-c", READER, json.dumps(dict(stack)))
    return {name: (round(kilobytes / 1024, 1), count) for name, (kilobytes, count) in json.loads(out).items()}


def _warm(*ports: int) -> None:
    addresses = [f"http://127.0.0.1:{port}" for port in ports]
    vm.execute(KIT, "python3", "-c", WARM, *addresses)
    time.sleep(SETTLE)


def _start_peer() -> None:
    """Start `mlflow server` of the same environment, on the same database, with nothing set."""
    uri = vm.execute(KIT, "sh", "-c", ". /etc/mlflow/mlflow.env; echo $MLFLOW_BACKEND_STORE_URI")
    argv = ["systemd-run", f"--unit={PEER_UNIT}", "--collect", "--quiet", "-p", "WorkingDirectory=/var/tmp"]
    argv += ["-E", "PGPASSFILE=/etc/mlflow/pgpass", "/opt/mlflow/current/bin/mlflow", "server"]
    vm.execute(KIT, *argv, "--backend-store-uri", uri, "--port", str(PEER_PORT))
    until = time.monotonic() + 180
    check = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{PEER_PORT}/health', timeout=2)"
    while vm.execute(KIT, "sh", "-c", f'python3 -c "{check}" 2>/dev/null && echo yes', check=False) != "yes":
        if time.monotonic() > until:
            raise BenchError(vm.execute(KIT, "journalctl", "-u", PEER_UNIT, "-n", "40", "-o", "cat", "--no-pager"))
        time.sleep(0.5)


def bench(lab: Lab, rounds: int) -> Iterator[Measurement]:
    """Each side alone on the kit's machine, started anew, asked the same, and left alone for a while."""
    if not lab.deployed:
        lab.deploy_kit()
    units = instances()
    kit: list[dict[str, float]] = []
    peer: list[dict[str, float]] = []
    for number in range(rounds):
        vm.execute(KIT, "systemctl", "restart", *units)
        _warm(*ports())
        found = read_memory(KIT, STACK)
        kit.append({name: size for name, (size, _) in found.items() if name != "peer"})
        kit[-1]["mlflow_processes"] = found["mlflow"][1]
        vm.execute(KIT, "systemctl", "stop", *units)
        _start_peer()
        _warm(PEER_PORT)
        found = read_memory(KIT, STACK)
        peer.append({"mlflow": found["peer"][0], "mlflow_processes": found["peer"][1]})
        peer[-1]["postgresql"] = found["postgresql"][0]
        vm.execute(KIT, "systemctl", "stop", PEER_UNIT)
        vm.execute(KIT, "systemctl", "start", *units)
        say(f"idle, round {number + 1} of {rounds}: kit {kit[-1]['mlflow']} MB, peer {peer[-1]['mlflow']} MB")
    ours, theirs = medians(kit), medians(peer)
    whole = round(sum(ours[name] for name in STACK if name != "peer"), 1)
    detail = {
        "kit": ours,
        "peer": theirs,
        "kit_whole_stack": whole,
        "kit_rounds": [one["mlflow"] for one in kit],
        "peer_rounds": [one["mlflow"] for one in peer],
        "settle_seconds": SETTLE,
    }
    yield Measurement("idle", "MLflow's processes", "MB PSS", "lower", ours["mlflow"], theirs["mlflow"], PEER, detail)

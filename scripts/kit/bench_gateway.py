"""What the gateway costs: requests through TLS, credentials and allowlist beside the server itself, and transfers
by presigned URL beside S3 itself. Both sides run on the same machine, over loopback, in turn; requests once with all
on the same cores, and once with the server and its database on one half of them, client and gateway on the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kit import bench_api, bench_sides, vm
from kit.bench_lab import KIT, Lab, Measurement, medians, say

# Short turns: what else the machine does then meets both sides alike.
SECONDS, TURNS, MEGABYTES = 2, 6, 600
# The first is the lightest request that there is.
CASES = ("get experiment", "get run", "log-metric", "log-batch", "search")
# What answers, and what stands before it.
SERVER, BEFORE = "launcher.py|^postgres|postgres:", "^nginx|nginx:|mtail"
FIGURES = (("", "requests_s", "requests/s", "higher"), (", p99", "p99_ms", "ms", "lower"))
# Settings and secrets as the server has them; its own environment's boto3 and MLflow client.
TRANSFER = """
import json, os, sys, time, hashlib
told = json.load(sys.stdin)
os.environ.update(told["environment"])
import logging; logging.disable(logging.WARNING)
size = told["megabytes"] * 1_000_000
path = "/var/tmp/bench.bin"
if not os.path.exists(path) or os.path.getsize(path) != size:
    with open(path, "wb") as file:
        for _ in range(told["megabytes"]):
            file.write(os.urandom(1_000_000))
def best(side):
    began = time.monotonic(); side(); return told["megabytes"] / (time.monotonic() - began)
if told["side"] == "peer":
    import boto3
    s3 = boto3.client("s3", endpoint_url=told["endpoint"])
    up = best(lambda: s3.upload_file(path, told["bucket"], "bench/peer.bin"))
    down = best(lambda: s3.download_file(told["bucket"], "bench/peer.bin", path + ".back"))
    s3.delete_object(Bucket=told["bucket"], Key="bench/peer.bin")
else:
    import mlflow
    from mlflow.artifacts import download_artifacts
    mlflow.set_experiment("bench")
    with mlflow.start_run() as run:
        up = best(lambda: mlflow.log_artifact(path))
    down = best(lambda: download_artifacts(run_id=run.info.run_id, artifact_path="bench.bin", dst_path="/var/tmp/back"))
print(json.dumps({"up": up, "down": down}))
"""


def _transfer(side: str) -> dict[str, float]:
    held = json.loads(vm.execute(KIT, "cat", "/etc/mlflow/secrets.json"))
    environment = {name: held[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    environment |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
    if side == "kit":
        text = vm.execute(KIT, "cat", "/root/client.env")
        environment = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"^[A-Z_]+=", line))
        environment["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    told = {
        "side": side,
        "environment": environment,
        "megabytes": MEGABYTES,
        "endpoint": "http://127.0.0.1:8080",
        "bucket": "mlflow",
    }
    vm.write(KIT, "/root/transfer.py", TRANSFER.encode())
    vm.write(KIT, "/root/told.json", json.dumps(told).encode())
    command = "/opt/mlflow/current/bin/python -W ignore /root/transfer.py < /root/told.json"
    out = vm.execute(KIT, "sh", "-c", command)
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def _confine(pattern: str, cores: Sequence[int]) -> None:
    """Let the processes whose command lines match use these cores alone."""
    each = f"for p in $(pgrep -f '{pattern}'); do taskset -acp {','.join(map(str, cores))} $p >/dev/null"
    # Root in a container may not do this to other users' processes; one that has ended meanwhile needs it no more.
    vm.podman("exec", "--privileged", KIT, "sh", "-c", f"{each} || [ ! -d /proc/$p ] || exit 1; done")


def _requests(
    sides: bench_sides.Sides, filled: Mapping[str, Any], rounds: int, words: str, cores: Sequence[int]
) -> Iterator[Measurement]:
    """Requests per second and their 99th percentile of each case; `words` say on which cores, `cores` are wrk's."""
    direct = bench_sides.ports("mlflow_rest") or bench_sides.ports("mlflow")
    detail: dict[str, Any] = {"rounds": rounds, "turns": TURNS, "connections": bench_api.CONNECTIONS}
    detail["seconds"] = SECONDS
    name = "the same instances without the gateway"
    for case in CASES:
        seen: dict[str, list[dict[str, float]]] = {"kit": [], "peer": []}
        for number in range(rounds):
            for turn in range(TURNS):
                for side, ports in (("peer", direct), ("kit", [])):
                    if not turn:
                        bench_api.wrk(sides, case, filled, bench_api.WARM, ports, cores)
                    seen[side].append(bench_api.wrk(sides, case, filled, SECONDS, ports, cores))
            rates = [medians(seen[side])["requests_s"] for side in ("kit", "peer")]
            say(f"{case}{words}, round {number + 1} of {rounds}: {rates[0]:.0f} requests/s, {rates[1]:.0f} without")
        ours, theirs = medians(seen["kit"]), medians(seen["peer"])
        for title, figure, unit, better in FIGURES:
            told = {f"{side}_rounds": [round(one[figure], 1) for one in each] for side, each in seen.items()}
            ratio = (ours[figure], theirs[figure])
            yield Measurement("gateway", f"{case}{words}{title}", unit, better, *ratio, name, detail | told)


def bench(lab: Lab, rounds: int) -> Iterator[Measurement]:
    """Yield requests per second, their 99th percentile, and MB/s up and down; `rounds` rounds of both sides in turn."""
    sides = bench_sides.Sides(lab, plain=False)
    vm.execute(KIT, "sh", "-c", "apt-get install -yqq --no-install-recommends wrk >/dev/null 2>&1")
    filled = bench_api.fill(sides)
    yield from _requests(sides, filled, rounds, "", [])
    asked = "import os; print(*sorted(os.sched_getaffinity(0)))"
    cores = [int(one) for one in vm.execute(KIT, "python3", "-c", asked).split()]
    half = len(cores) // 2
    if half:
        try:
            _confine(SERVER, cores[:half])
            _confine(BEFORE, cores[half:])
            yield from _requests(sides, filled, rounds, ", gateway on cores of its own", cores[half:])
        finally:
            _confine(f"{SERVER}|{BEFORE}", cores)
    kit: list[dict[str, float]] = []
    peer: list[dict[str, float]] = []
    for number in range(rounds):
        say(f"transfers, round {number + 1} of {rounds}")
        kit.append(_transfer("kit"))
        peer.append(_transfer("peer"))
    ours, theirs = medians(kit), medians(peer)
    detail = {"rounds": rounds, "megabytes": MEGABYTES}
    name = "boto3 straight to S3"
    yield Measurement("gateway", "presigned upload", "MB/s", "higher", ours["up"], theirs["up"], name, detail)
    yield Measurement("gateway", "presigned download", "MB/s", "higher", ours["down"], theirs["down"], name, detail)

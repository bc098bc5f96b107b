"""What the gateway costs: requests through TLS, credentials and allowlist beside the server itself, and transfers
by presigned URL beside S3 itself. Both sides run on the same machine, over loopback, in turn."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Iterator

from kit import vm
from kit.bench_lab import KIT, NAME, BenchError, Lab, Measurement, medians, say
from kit.bench_sides import client_environment, ports

SECONDS, CONNECTIONS, MEGABYTES = 12, 8, 600
PATH = "/api/2.0/mlflow/experiments/get?experiment_id=0"
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


def _wrk(urls: list[str], header: str, seconds: int) -> dict[str, float]:
    """Requests per second and the 99th percentile in ms of `urls`, asked at once."""
    each = CONNECTIONS // len(urls)
    head = f"-H {shlex.quote(header)}" if header else ""
    runs = " & ".join(f"wrk -t1 -c{each} -d{seconds}s --latency {head} {shlex.quote(url)}" for url in urls)
    out = vm.execute(KIT, "sh", "-c", f"({runs} & wait) 2>&1")
    rates = [float(rate) for rate in re.findall(r"Requests/sec:\s+([\d.]+)", out)]
    tails = re.findall(r"99%\s+([\d.]+)(us|ms|s)", out)
    if len(rates) != len(urls) or "Non-2xx" in out:
        raise BenchError(f"wrk failed:\n{out[-2000:]}")
    scale = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    return {"requests_s": sum(rates), "p99_ms": max(float(value) * scale[unit] for value, unit in tails)}


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


def bench(lab: Lab, rounds: int) -> Iterator[Measurement]:
    """Yield requests per second, their 99th percentile, and MB/s up and down; `rounds` rounds of both sides in turn."""
    if not lab.deployed:
        lab.deploy_kit()
    login = client_environment(lab)
    vm.execute(KIT, "sh", "-c", "apt-get install -yqq --no-install-recommends wrk >/dev/null 2>&1")
    pair = f"{login['MLFLOW_TRACKING_USERNAME']}:{login['MLFLOW_TRACKING_PASSWORD']}"
    header = "Authorization: Basic " + base64.b64encode(pair.encode()).decode()
    direct = [f"http://127.0.0.1:{port}{PATH}" for port in ports("mlflow_rest") or ports("mlflow")]
    through = [f"https://{NAME}{PATH}"]
    _wrk(direct, "", 3)
    _wrk(through, header, 3)
    kit, peer = [], []
    for number in range(rounds):
        say(f"requests, round {number + 1} of {rounds}")
        kit.append(_wrk(through, header, SECONDS))
        peer.append(_wrk(direct, "", SECONDS))
    ours, theirs = medians(kit), medians(peer)
    detail = {"rounds": rounds, "connections": CONNECTIONS, "path": PATH}
    name = "the same instances without the gateway"
    yield Measurement(
        "gateway", "requests", "requests/s", "higher", ours["requests_s"], theirs["requests_s"], name, detail
    )
    yield Measurement("gateway", "p99", "ms", "lower", ours["p99_ms"], theirs["p99_ms"], name, detail)
    kit, peer = [], []
    for number in range(rounds):
        say(f"transfers, round {number + 1} of {rounds}")
        kit.append(_transfer("kit"))
        peer.append(_transfer("peer"))
    ours, theirs = medians(kit), medians(peer)
    detail = {"rounds": rounds, "megabytes": MEGABYTES}
    name = "boto3 straight to S3"
    yield Measurement("gateway", "presigned upload", "MB/s", "higher", ours["up"], theirs["up"], name, detail)
    yield Measurement("gateway", "presigned download", "MB/s", "higher", ours["down"], theirs["down"], name, detail)

"""Artifacts: one large file straight to S3 by presigned URLs, beside the way through the server and beside S3 itself;
and many small ones, beside the plain server. What comes back is compared each time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kit.bench_lab import Lab, Measurement, medians, say
from kit.bench_sides import BUCKET, PEER, S3, Sides, run, s3_environment

MEGABYTES, FILES, BYTES = 1000, 1000, 4096
# Runs in the server's own environment, so that both sides have the very same client.
TRANSFER = r"""
import concurrent.futures, hashlib, json, os, pathlib, shutil, sys, time
told = json.load(sys.stdin)
os.environ.update(told["environment"], MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false")
import logging; logging.disable(logging.WARNING)
import boto3, urllib3

source, back = pathlib.Path("/var/tmp/bench-source"), pathlib.Path("/var/tmp/bench-back")
large, small = source / "large.bin", source / "small"
if not source.exists():
    small.mkdir(parents=True)
    with large.open("wb") as file:
        for _ in range(told["megabytes"]):
            file.write(os.urandom(1_000_000))
    for number in range(told["files"]):
        folder = small / f"part{number % 10}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:04}.bin").write_bytes(os.urandom(told["bytes"]))
shutil.rmtree(back, ignore_errors=True)
back.mkdir()

def digest(root):
    found = {}
    for path in sorted([root] if root.is_file() else (p for p in root.rglob("*") if p.is_file())):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found

def timed(side):
    began = time.monotonic(); side(); return time.monotonic() - began

# Requests that carry a signature in their query went by a presigned URL.
signed = 0
plain = urllib3.connectionpool.HTTPConnectionPool.urlopen
def urlopen(pool, method, url, *rest, **more):
    global signed
    signed += "X-Amz-Signature=" in url
    return plain(pool, method, url, *rest, **more)
urllib3.connectionpool.HTTPConnectionPool.urlopen = urlopen

s3 = boto3.client("s3", endpoint_url=told["s3"], **told["keys"])
if told["what"] == "boto3":
    one = back / large.name
    up = timed(lambda: s3.upload_file(str(large), told["bucket"], "bench/large.bin"))
    down = timed(lambda: s3.download_file(told["bucket"], "bench/large.bin", str(one)))
    prefix, sent = "bench/", large
else:
    import mlflow
    from mlflow.artifacts import download_artifacts
    mlflow.set_experiment("bench artifacts")
    sent = small if told["what"] == "small" else large
    with mlflow.start_run() as run:
        log = {small: lambda: mlflow.log_artifacts(str(small), "small"), large: lambda: mlflow.log_artifact(str(large))}
        up = timed(log[sent])
    got = lambda: download_artifacts(run_id=run.info.run_id, artifact_path=sent.name, dst_path=str(back))
    down = timed(got)
    prefix = run.info.run_id
if digest(back / sent.name) != digest(sent):
    sys.exit("what came back is not what was sent")
if told["what"] == "presigned" and not signed or told["what"] == "proxied" and signed:
    sys.exit(f"{told['what']}: {signed} requests went by a presigned URL")
keys = [one["Key"] for page in s3.get_paginator("list_objects_v2").paginate(Bucket=told["bucket"])
        for one in page.get("Contents", []) if prefix in one["Key"]]
if not keys:
    sys.exit("nothing of it is in the bucket")
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda key: s3.delete_object(Bucket=told["bucket"], Key=key), keys))
shutil.rmtree(back)
print(json.dumps({"up_s": up, "down_s": down, "signed": signed}))
"""


def _transfer(sides: Sides, what: str, keys: dict[str, str]) -> dict[str, float]:
    environment = dict(sides.client(sides.serving))
    if what == "proxied":
        environment |= {f"MLFLOW_ENABLE_PROXY_MULTIPART_{way}": "false" for way in ("UPLOAD", "DOWNLOAD")}
    environment |= {name: value for name, value in keys.items() if "CHECKSUM" in name}
    told: dict[str, Any] = {"what": what, "environment": environment}
    told |= {"megabytes": MEGABYTES, "files": FILES, "bytes": BYTES, "s3": S3, "bucket": BUCKET}
    told["keys"] = {
        "aws_access_key_id": keys["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": keys["AWS_SECRET_ACCESS_KEY"],
        "region_name": keys["AWS_DEFAULT_REGION"],
    }
    found: dict[str, float] = json.loads(run(TRANSFER, told, "/opt/mlflow/current/bin/python").splitlines()[-1])
    amount = FILES if what == "small" else MEGABYTES
    return {"up": amount / found["up_s"], "down": amount / found["down_s"], "signed_requests": found["signed"]}


def bench(lab: Lab, rounds: int) -> Iterator[Measurement]:
    """Yield MB/s of the large file and files/s of the small ones, up and down; all ways in turn in each round."""
    sides, keys = Sides(lab), s3_environment()
    large = ["presigned", "proxied", "boto3"]
    ways: dict[str, list[dict[str, float]]] = {name: [] for name in (*large, "small", "small, plain")}
    try:
        for number in range(rounds):
            sides.serve("kit")
            for what in [*(reversed(large) if number % 2 else large), "small"]:
                ways[what].append(_transfer(sides, what, keys))
            sides.serve("plain")
            ways["small, plain"].append(_transfer(sides, "small", keys))
            words = ", ".join(f"{way} {done[-1]['up']:.0f}/{done[-1]['down']:.0f}" for way, done in ways.items())
            say(f"artifacts, round {number + 1} of {rounds}, up/down: {words}")
    finally:
        sides.serve("kit")
    middle = {way: medians(done) for way, done in ways.items()}
    comparisons = [
        ("1 GB", "MB/s", "presigned", "proxied", "the same client and gateway, proxied by the server"),
        ("1 GB", "MB/s", "presigned", "boto3", "boto3 straight to S3"),
        ("1,000 small files", "files/s", "small", "small, plain", PEER),
    ]
    for thing, unit, ours, theirs, name in comparisons:
        for way in ("up", "down"):
            detail = {
                "rounds": rounds,
                "kit_rounds": [round(one[way], 1) for one in ways[ours]],
                "peer_rounds": [round(one[way], 1) for one in ways[theirs]],
                "kit_signed_requests": middle[ours]["signed_requests"],
                "peer_signed_requests": middle[theirs]["signed_requests"],
                "sha256": "equal",
            }
            kit, peer = middle[ours][way], middle[theirs][way]
            yield Measurement("artifacts", f"{thing} {way}", unit, "higher", kit, peer, name, detail)

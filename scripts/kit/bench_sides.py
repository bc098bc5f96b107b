"""The kit's site and a plain `mlflow server` on one machine, of which one runs at a time."""

from __future__ import annotations

import base64
import json
import re
import shlex
import time
from collections.abc import Mapping
from typing import Any

from kit import vm
from kit.bench_lab import KIT, NAME, BenchError, Lab, pinned, say

PLAIN_UNIT, PLAIN_PORT, PLAIN_DATABASE = "kit-bench-plain.service", 5080, "bench_plain"
PLAIN = "/opt/bench-plain"
S3 = "http://127.0.0.1:8080"
BUCKET = "mlflow"
ADDRESSES = {"kit": f"https://{NAME}", "plain": f"http://127.0.0.1:{PLAIN_PORT}"}
DATABASES = {"kit": "mlflow", "plain": PLAIN_DATABASE}
PEER = "mlflow server with its defaults (4 workers, jobs on), direct, no TLS"
# Instances of every kind: mlflow@1, mlflow-rest@1; not what has a word for an instance, like a timer's unit.
INSTANCE = r"mlflow(?:-[a-z]+)?@\d+\.service"
# Asks what it is told on standard input, over one connection, and tells what came back.
ASK = r"""
import http.client, json, ssl, sys, urllib.parse
told = json.load(sys.stdin)
parts = urllib.parse.urlsplit(told["address"])
if parts.scheme == "https":
    trust = ssl.create_default_context(cafile="/root/ca-bundle.crt")
    connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=60, context=trust)
else:
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
found = []
for path, body in told["questions"]:
    headers = dict(told["headers"])
    if body is not None:
        headers["Content-Type"] = "application/json"
        connection.request("POST", path, json.dumps(body), headers)
    else:
        connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    data = answer.read()
    kind = answer.headers.get_content_type()
    text = data.decode() if kind in ("text/html", "application/json") and not answer.headers["Content-Encoding"] else ""
    found.append({"path": path, "status": answer.status, "bytes": len(data), "text": text})
print(json.dumps(found))
"""


def instances() -> list[str]:
    """The names of the kit's instances, of every kind, whether they run or not."""
    argv = ["systemctl", "list-units", "--plain", "--no-legend", "--all", "mlflow@*.service", "mlflow-*@*.service"]
    names = [line.split()[0] for line in vm.execute(KIT, *argv).splitlines() if line.strip()]
    return sorted(name for name in names if re.fullmatch(INSTANCE, name))


def ports(kind: str = "") -> list[int]:
    """The ports on which the kit's instances listen behind the gateway; with `kind`, those of one upstream."""
    text = vm.execute(KIT, "cat", "/etc/nginx/mlflow-kit/upstreams.conf")
    found = re.findall(rf"^upstream ({kind or 'mlflow[^ ]*'}) \{{(.*?)^\}}", text, re.MULTILINE | re.DOTALL)
    return [int(port) for _, servers in found for port in re.findall(r"^\s*server 127\.0\.0\.1:(\d+)", servers, re.M)]


def run(script: str, told: Mapping[str, Any], python: str = "python3") -> str:
    """Run a Python `script` on the measured machine with `told` as JSON on its standard input; returns what it printed.

    Both go through files that only root can read, because `told` may hold a password.
    """
    vm.write(KIT, "/root/bench-script.py", script.encode())
    vm.write(KIT, "/root/bench-told.json", json.dumps(told).encode())
    return vm.execute(KIT, "sh", "-c", f"{python} -W ignore /root/bench-script.py < /root/bench-told.json")


class Sides:
    """Both sides of a comparison on the kit's machine; made ready once, then one of them serves."""

    def __init__(self, lab: Lab, *, plain: bool = True) -> None:
        """Deploy the kit unless that was done, and install the plain server beside it if it is wanted."""
        if not lab.deployed:
            lab.deploy_kit()
        self.lab = lab
        self.environment = client_environment(lab)
        pair = f"{self.environment['MLFLOW_TRACKING_USERNAME']}:{self.environment['MLFLOW_TRACKING_PASSWORD']}"
        self.headers: dict[str, dict[str, str]] = {
            "kit": {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()},
            "plain": {},
        }
        self.units = instances()
        self.serving = "kit"
        if plain and vm.execute(KIT, "sh", "-c", f"test -e {PLAIN}/ready && echo yes", check=False) != "yes":
            _install_plain(lab)

    def client(self, side: str) -> dict[str, str]:
        """The environment of an MLflow client of `side`."""
        return self.environment if side == "kit" else {"MLFLOW_TRACKING_URI": ADDRESSES["plain"]}

    def serve(self, side: str) -> bool:
        """Let `side` serve alone; returns whether its processes are new, since it did not serve before."""
        if self.serving == side:
            return False
        if side == "plain":
            vm.execute(KIT, "systemctl", "stop", *self.units)
            _start_plain()
        else:
            # Of itself it may wait for connections of clients that are long gone until systemd's 90 s are over.
            verbs = ("stop --no-block", "kill --signal=SIGKILL", "stop")
            vm.execute(KIT, "sh", "-c", "".join(f"systemctl {verb} {PLAIN_UNIT}; " for verb in verbs), check=False)
            vm.execute(KIT, "systemctl", "start", *self.units)
        self.serving = side
        self.wait()
        return True

    def wait(self, seconds: float = 300) -> None:
        """Wait until the serving side answers a question of the API five times in a row. Raises BenchError."""
        until, good, last = time.monotonic() + seconds, 0, ""
        while good < 5:
            try:
                found = self.ask(["/api/2.0/mlflow/experiments/get?experiment_id=0"], check=False)
                good, last = (good + 1, "") if found[0]["status"] == 200 else (0, str(found[0]))
            except vm.VmError as error:
                good, last = 0, str(error)[-500:]
            if time.monotonic() > until:
                units = shlex.join([PLAIN_UNIT] if self.serving == "plain" else self.units)
                journal = vm.execute(KIT, "sh", "-c", f"journalctl -n 40 -o cat --no-pager -u {units}", check=False)
                raise BenchError(f"{self.serving} does not answer: {last}\n{journal[-3000:]}")
            if not good:
                time.sleep(0.5)

    def ask(
        self,
        questions: list[str | tuple[str, Any]],
        *,
        headers: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> list[dict[str, Any]]:
        """Ask the serving side: a path is a GET, a path with a body a POST. Raises BenchError unless each is a 200."""
        told = {
            "address": ADDRESSES[self.serving],
            "headers": {**self.headers[self.serving], **(headers or {})},
            "questions": [(one, None) if isinstance(one, str) else one for one in questions],
        }
        found: list[dict[str, Any]] = json.loads(run(ASK, told))
        for one in found:
            if check and one["status"] != 200:
                raise BenchError(f"{self.serving}: {one['path']} answers {one['status']}: {one['text'][:500]}")
        return found


def client_environment(lab: Lab) -> dict[str, str]:
    """Give the kit's machine what its clients have (/root/client.env and the certificates), and return its content."""
    text = (lab.secret / "client.env").read_text().replace(str(lab.secret), "/root")
    vm.write(KIT, "/root/client.env", text.encode())
    vm.write(KIT, "/root/ca-bundle.crt", (lab.secret / "ca-bundle.crt").read_bytes())
    return dict(line.split("=", 1) for line in text.splitlines() if re.match(r"^[A-Z_]+=", line))


def s3_environment() -> dict[str, str]:
    """What a program needs to use the site's S3 straight."""
    held = json.loads(vm.execute(KIT, "cat", "/etc/mlflow/secrets.json"))
    found = {name: held[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    checksums = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
    return found | dict.fromkeys(checksums, "when_required") | {"AWS_DEFAULT_REGION": "us-east-1"}


def _install_plain(lab: Lab) -> None:
    """Put a plain MLflow of the same versions beside the kit, with a database of its own in the same PostgreSQL.

    It gets what `pip install mlflow psycopg2-binary boto3` brings, so neither the event loop nor the parser that the
    kit adds; its interpreter is the kit's, its bytecode compiled as pip would.
    """
    say("installing the plain server")
    further = json.dumps({"postgresql_further_databases": [PLAIN_DATABASE]})
    lab.playbook("playbooks/database.yml", "-e", further, log="bench-plain")
    lock = (vm.CHECKOUT / "requirements" / "server.txt").read_text()
    constraints = "\n".join(re.findall(r"^[A-Za-z0-9._-]+==[^\\\n]*", lock, re.MULTILINE)) + "\n"
    vm.write(KIT, "/root/bench-constraints.txt", constraints.encode())
    index = vm.python_index()
    lines = [
        "set -e",
        "export UV_CACHE_DIR=/var/cache/mlflow-kit/uv UV_SYSTEM_CERTS=1 UV_LINK_MODE=copy",
        f"export UV_DEFAULT_INDEX={shlex.quote(index)}" if index else "",
        "uv=$(ls /opt/mlflow/envs/.tools/*/bin/uv | head -1)",
        f"$uv venv -q --clear --python /opt/mlflow/current/bin/python {PLAIN}",
        f"$uv pip install -q --python {PLAIN}/bin/python --compile-bytecode -c /root/bench-constraints.txt "
        + " ".join(pinned("server.txt", "mlflow", "psycopg2-binary", "boto3")),
        f"! {PLAIN}/bin/python -c 'import uvloop' 2>/dev/null",
        f"touch {PLAIN}/ready",
    ]
    vm.execute(KIT, "sh", "-c", "\n".join(lines))


def _start_plain() -> None:
    uri = vm.execute(KIT, "sh", "-c", ". /etc/mlflow/mlflow.env; echo $MLFLOW_BACKEND_STORE_URI")
    uri = re.sub(r"/mlflow(?=\?|$)", f"/{PLAIN_DATABASE}", uri)
    settings = {
        **s3_environment(),
        "PGPASSFILE": "/etc/mlflow/pgpass",
        "MLFLOW_S3_ENDPOINT_URL": S3,
        "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    vm.write(KIT, "/root/bench-plain.env", "".join(f"{k}={v}\n" for k, v in settings.items()).encode())
    argv = ["systemd-run", f"--unit={PLAIN_UNIT}", "--collect", "--quiet", "-p", "WorkingDirectory=/var/tmp"]
    argv += ["-p", "EnvironmentFile=/root/bench-plain.env", "-p", "LimitNOFILE=16384", "-p", "Restart=always"]
    argv += [f"{PLAIN}/bin/mlflow", "server", "--backend-store-uri", uri, "--port", str(PLAIN_PORT)]
    vm.execute(KIT, *argv, "--artifacts-destination", f"s3://{BUCKET}/bench-plain")

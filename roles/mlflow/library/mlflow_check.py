#!/usr/bin/python
"""Do a small piece of real work on an MLflow server: a run with an artifact, written, read back and deleted."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import ssl
import time
import typing
import urllib.parse

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: mlflow_check
short_description: Prove that an MLflow server of a version works
description:
  - Asks for the version, then logs a run with a parameter, metrics, a tag and an artifact, finds it by search, fetches
    the artifact, and deletes both. Tries again until O(timeout), and tells what went wrong last.
options:
  url: {description: Address that clients use., type: str, required: true}
  address: {description: Address to connect to instead of what the name resolves to., type: str, default: ""}
  user: {description: Who logs in; empty for nobody., type: str, default: ""}
  password: {description: The user's password., type: str, default: ""}
  ca_certificate: {description: Authorities in PEM to trust besides the host's., type: str, default: ""}
  version: {description: The version that every answer must come from; empty for any., type: str, default: ""}
  timeout: {description: Seconds to try., type: int, default: 60}
author: [mlflow-kit]
"""

EXPERIMENT = "mlflow-kit check"
API = "/api/2.0/mlflow"
REFUSED = 400


class CheckError(Exception):
    """A step did not work; the message says which, and what was answered."""


class Client:
    """Requests to the server, one connection each.

    Args:
        p: the module's parameters.
    """

    def __init__(self, p: dict[str, typing.Any]) -> None:
        """Split the address."""
        self.parts = urllib.parse.urlsplit(p["url"])
        self.address = p["address"]
        self.context = ssl.create_default_context()
        if p["ca_certificate"]:
            self.context.load_verify_locations(cadata=p["ca_certificate"])
        self.headers = {"Host": self.parts.netloc}
        if p["user"]:
            login = base64.b64encode(f"{p['user']}:{p['password']}".encode()).decode()
            self.headers["Authorization"] = f"Basic {login}"

    def call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Send a request and return the body of the answer. Raises CheckError."""
        secure = self.parts.scheme == "https"
        name, port = self.parts.hostname or "", self.parts.port or (443 if secure else 80)
        connection = http.client.HTTPConnection(self.address or name, port, timeout=30)
        try:
            connection.connect()
            if secure:
                connection.sock = self.context.wrap_socket(connection.sock, server_hostname=name)
            kind = {"Content-Type": "application/json"} if body is not None and "artifacts" not in path else {}
            connection.request(method, path, body=body, headers={**self.headers, **kind})
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise CheckError(f"{method} {path}: {error}") from None
        finally:
            connection.close()
        if answer.status >= REFUSED:
            words = data.decode(errors="replace")[:300].replace("\n", " ")
            raise CheckError(f"{method} {path}: status {answer.status}: {words}")
        return data

    def api(self, method: str, path: str, **fields: typing.Any) -> typing.Any:
        """Call the REST API and return its JSON. Raises CheckError."""
        query = f"?{urllib.parse.urlencode(fields)}" if method == "GET" else ""
        body = None if method == "GET" else json.dumps(fields).encode()
        return json.loads(self.call(method, f"{API}/{path}{query}", body))


def experiment(client: Client) -> str:
    """The identifier of the check's own experiment, which is made when it is not there. Raises CheckError."""
    try:
        found = client.api("GET", "experiments/get-by-name", experiment_name=EXPERIMENT)["experiment"]
        if found["lifecycle_stage"] == "active":
            return str(found["experiment_id"])
        client.api("POST", "experiments/restore", experiment_id=found["experiment_id"])
        return str(found["experiment_id"])
    except CheckError as error:
        if "status 404" not in str(error):
            raise
    return str(client.api("POST", "experiments/create", name=EXPERIMENT)["experiment_id"])


def work(client: Client, version: str) -> str:
    """Do the piece of work and return the version that answered. Raises CheckError."""
    runs = client.call("GET", "/version").decode().strip()
    if version and runs != version:
        raise CheckError(f"MLflow {runs} answers instead of {version}")
    now = int(time.time() * 1000)
    place = experiment(client)
    run = client.api("POST", "runs/create", experiment_id=place, start_time=now, run_name="check")["run"]["info"]
    run_id = run["run_id"]
    token = hashlib.sha256(os.urandom(16)).hexdigest()[:16]
    client.api("POST", "runs/log-parameter", run_id=run_id, key="token", value=token)
    for step in range(3):
        client.api("POST", "runs/log-metric", run_id=run_id, key="m", value=step / 2, timestamp=now, step=step)
    client.api("POST", "runs/set-tag", run_id=run_id, key="check", value=token)
    client.api("POST", "runs/update", run_id=run_id, status="FINISHED", end_time=now)
    found = client.api("POST", "runs/search", experiment_ids=[place], filter=f"params.token = '{token}'")
    data = found.get("runs", [{}])[0].get("data", {})
    if {m["key"]: m["value"] for m in data.get("metrics", [])} != {"m": 1.0}:
        raise CheckError(f"the run that was logged reads back as {data}")
    scheme, _, path = run["artifact_uri"].partition(":/")
    if scheme == "mlflow-artifacts":
        target = f"/api/2.0/mlflow-artifacts/artifacts/{path.strip('/')}/check.bin"
        sent = os.urandom(100_000)
        client.call("PUT", target, sent)
        if client.call("GET", target) != sent:
            raise CheckError("the artifact came back changed")
        client.call("DELETE", target)
    client.api("POST", "runs/delete", run_id=run_id)
    return runs


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "address": {"type": "str", "default": ""},
            "user": {"type": "str", "default": ""},
            "password": {"type": "str", "default": "", "no_log": True},
            "ca_certificate": {"type": "str", "default": ""},
            "version": {"type": "str", "default": ""},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    p = module.params
    if module.check_mode:
        module.exit_json(changed=False)
    began = time.monotonic()
    while True:
        try:
            version = work(Client(p), p["version"])
            break
        except (CheckError, ValueError, LookupError) as error:
            if time.monotonic() - began > p["timeout"]:
                module.exit_json(changed=False, problem=str(error), seconds=round(time.monotonic() - began, 1))
            time.sleep(1)
    module.exit_json(changed=False, problem="", version=version, seconds=round(time.monotonic() - began, 1))


if __name__ == "__main__":
    main()

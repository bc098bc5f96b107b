#!/usr/bin/python
"""A real piece of work through the gateway, as a client does it, and no trace of it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pathlib
import tempfile
import time
import typing
import uuid
import warnings

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: mlflow_verify
short_description: Log a run, an artifact and a model through the gateway, use them, and remove them
description:
  - Must run in an interpreter that has MLflow. Changes nothing that stays but an empty experiment.
options:
  url: {description: Address of the site., type: str, required: true}
  username: {description: Who logs in., type: str, default: ""}
  password: {description: "That user's password.", type: str, default: ""}
  ca_certificate: {description: Authority in PEM; empty for the trust of the host., type: str, default: ""}
  version: {description: Version that the server must have; empty for any., type: str, default: ""}
  experiment: {description: Experiment that the run is logged to., type: str, required: true}
  timeout: {description: Seconds for each request., type: int, default: 60}
author: [mlflow-kit]
"""
RETURN = r"""
version: {description: "The server's version.", type: str, returned: success}
seconds: {description: Step to the seconds that it took., type: dict, returned: success}
"""
SIZE = 200_000


def environment(p: dict[str, typing.Any], folder: pathlib.Path) -> None:
    """Set what the client reads; must come before it is imported."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
        del os.environ[name]
    os.environ["MLFLOW_TRACKING_URI"] = os.environ["MLFLOW_REGISTRY_URI"] = p["url"]
    if p["username"]:
        os.environ["MLFLOW_TRACKING_USERNAME"] = p["username"]
        os.environ["MLFLOW_TRACKING_PASSWORD"] = p["password"]
    if p["ca_certificate"]:
        (folder / "ca.crt").write_text(p["ca_certificate"])
        os.environ["MLFLOW_TRACKING_SERVER_CERT_PATH"] = os.environ["REQUESTS_CA_BUNDLE"] = str(folder / "ca.crt")
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(p["timeout"])
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "3"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["HOME"] = str(folder)
    os.environ["NO_PROXY"] = "*"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


class Check:
    """The steps, each with what it took."""

    def __init__(self, p: dict[str, typing.Any], folder: pathlib.Path) -> None:
        """Become a client of the site."""
        import mlflow
        from mlflow.tracking import MlflowClient

        self.p, self.folder, self.mlflow = p, folder, mlflow
        self.client = MlflowClient()
        self.seconds: dict[str, float] = {}
        self.step = "reach the server"
        self.run = self.model = self.model_id = ""
        self.uris: list[str] = []

    @contextlib.contextmanager
    def doing(self, step: str) -> typing.Iterator[None]:
        """Name what is being done, and time it."""
        self.step, began = step, time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - began, 2)

    def version(self) -> str:
        """Ask for the server's version. Raises ValueError for another than was asked for."""
        from mlflow.utils.rest_utils import http_request

        with self.doing("reach the server"):
            answer = http_request(self.client._tracking_client.store.get_host_creds(), "/version", "GET")
            if answer.status_code != 200:
                raise ValueError(f"/version answers {answer.status_code}")
            version = str(answer.text.strip())
            if self.p["version"] and version != self.p["version"]:
                raise ValueError(f"the server is MLflow {version}, not {self.p['version']}")
        return version

    def log(self) -> None:
        """Log a run with a parameter, a metric, a tag and an artifact, and read all of it back."""
        content = os.urandom(SIZE)
        (self.folder / "data.bin").write_bytes(content)
        with self.doing("log a run"):
            self.mlflow.set_experiment(self.p["experiment"])
            with self.mlflow.start_run() as run:
                self.run = run.info.run_id
                self.uris.append(run.info.artifact_uri)
                self.mlflow.log_param("p", "1")
                self.mlflow.log_metric("m", 0.5)
                self.mlflow.set_tag("t", "x")
        with self.doing("send and fetch an artifact"):
            self.client.log_artifact(self.run, str(self.folder / "data.bin"))
            back = self.mlflow.artifacts.download_artifacts(
                run_id=self.run, artifact_path="data.bin", dst_path=str(self.folder / "back")
            )
            if hashlib.sha256(pathlib.Path(back).read_bytes()).digest() != hashlib.sha256(content).digest():
                raise ValueError("the artifact came back changed")
        found = self.client.get_run(self.run)
        if (found.data.params, found.data.metrics, found.data.tags.get("t")) != ({"p": "1"}, {"m": 0.5}, "x"):
            raise ValueError("the run came back changed")

    def register(self) -> None:
        """Log a model, register it, load it by an alias and use it."""
        import mlflow.pyfunc

        class Double(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow's class is not typed
            def predict(self, context: typing.Any, model_input: typing.Any, params: typing.Any = None) -> typing.Any:
                return [2 * n for n in model_input]

        name = f"mlflow-kit-verify-{uuid.uuid4().hex[:8]}"
        with self.doing("log and register a model"):
            with self.mlflow.start_run(run_id=self.run):
                info = mlflow.pyfunc.log_model(
                    **({"name": "model"} if hasattr(self.client, "get_logged_model") else {"artifact_path": "model"}),
                    python_model=Double(),
                    pip_requirements=[],
                )
            self.model_id = getattr(info, "model_id", None) or ""
            if self.model_id:
                self.uris.append(self.client.get_logged_model(self.model_id).artifact_location)
            self.model = name
            version = self.mlflow.register_model(info.model_uri, name).version
            self.client.set_registered_model_alias(name, "verified", version)
        with self.doing("load the model and use it"):
            answer = mlflow.pyfunc.load_model(f"models:/{name}@verified").predict([1, 2])
            if list(answer) != [2, 4]:
                raise ValueError(f"the model answers {answer!r}")

    def remove(self) -> None:
        """Remove all that was logged, whatever came before: what remains is marked as deleted and holds nothing."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with self.doing("remove all of it"):
            if self.model and self.client.search_registered_models(f"name = '{self.model}'"):
                self.client.delete_registered_model(self.model)
            for uri in self.uris:
                get_artifact_repository(uri).delete_artifacts()
            if self.model_id:
                self.client.delete_logged_model(self.model_id)
            if self.run:
                self.client.delete_run(self.run)


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "username": {"type": "str", "default": ""},
            "password": {"type": "str", "default": "", "no_log": True},
            "ca_certificate": {"type": "str", "default": ""},
            "version": {"type": "str", "default": ""},
            "experiment": {"type": "str", "required": True},
            "timeout": {"type": "int", "default": 60},
        }
    )
    p = module.params
    with tempfile.TemporaryDirectory(prefix="mlflow-kit-verify-") as work:
        folder = pathlib.Path(work)
        environment(p, folder)
        os.chdir(folder)
        version, failed = "", ""
        # The client prints where it looks; the module's output is one object.
        with (
            pathlib.Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            check = Check(p, folder)
            try:
                version = check.version()
                check.log()
                check.register()
            except Exception as error:
                failed = f"could not {check.step}: {type(error).__name__}: {error}"
            try:
                check.remove()
            except Exception as error:
                failed = failed or f"could not {check.step}: {type(error).__name__}: {error}"
    if failed:
        module.fail_json(msg=f"{p['url']}: {failed}", seconds=check.seconds)
    module.exit_json(changed=False, version=version, seconds=check.seconds)


if __name__ == "__main__":
    main()

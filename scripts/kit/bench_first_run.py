"""Poll a tracking server until a run with a parameter and a metric is acknowledged; runs in the bench's client."""

from __future__ import annotations

import os
import sys
import time

os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
import mlflow  # noqa: E402
import requests  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402


def answers(address: str) -> bool:
    """Whether anything but an error comes from the server: a cheap question, so that polling costs it little."""
    try:
        return requests.get(f"{address}/health", timeout=2, auth=_login()).ok
    except requests.RequestException:
        return False


def _login() -> tuple[str, str] | None:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return (user, os.environ["MLFLOW_TRACKING_PASSWORD"]) if user else None


def main() -> None:
    """Log one run and read it back; ends with status 1 after five minutes without an answer."""
    address = os.environ["MLFLOW_TRACKING_URI"]
    until = time.monotonic() + 300
    client, error = MlflowClient(), "the server never answered"
    while time.monotonic() < until:
        if answers(address):
            try:
                with mlflow.start_run() as run:
                    mlflow.log_param("alpha", 1)
                    mlflow.log_metric("loss", 0.5)
                data = client.get_run(run.info.run_id).data
                assert data.params == {"alpha": "1"} and data.metrics == {"loss": 0.5}
                print(run.info.run_id)
                return
            except MlflowException as failure:
                error = str(failure)
        time.sleep(0.2)
    sys.exit(error)


if __name__ == "__main__":
    main()

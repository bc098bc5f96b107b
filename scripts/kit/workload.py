"""A real piece of work against a tracking server: train, log, register, load back, predict; move a large artifact.

Runs where MLflow and scikit-learn are installed, with the environment of client.env. Prints a line of JSON for
each step. Used by the quickstart, the tests and the benchmarks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import sys
import tempfile
import time
import typing

import mlflow
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient


def say(step: str, **facts: typing.Any) -> None:
    """Print one step as a line of JSON."""
    print(json.dumps({"step": step, **facts}), flush=True)


def train(name: str) -> None:
    """Train a random forest on Iris, log everything about it, register it as `name` and use it.

    Raises SystemExit when the model that comes back does not predict as well as the one that was sent.
    """
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import accuracy_score
    from sklearn.model_selection import train_test_split

    data, target = load_iris(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(data, target, test_size=0.3, random_state=7, stratify=target)
    mlflow.set_experiment(name)
    params = {"n_estimators": 40, "max_depth": 4, "random_state": 7}
    with mlflow.start_run(run_name="random forest") as run:
        model = RandomForestClassifier(**params).fit(train_x, train_y)
        accuracy = float(accuracy_score(test_y, model.predict(test_x)))
        mlflow.log_params(params)
        mlflow.log_metric("accuracy", accuracy)
        for step in range(5):
            mlflow.log_metric("trees", (step + 1) * 8, step=step)
        mlflow.set_tags({"dataset": "iris", "purpose": "quickstart"})
        # The default format refuses types that it does not know; the tree's own is what a forest is made of.
        mlflow.sklearn.log_model(
            model,
            name="model",
            input_example=test_x[:2],
            registered_model_name=name,
            skops_trusted_types=["sklearn.tree._tree.Tree"],
        )
    say("run logged", run=run.info.run_id, accuracy=round(accuracy, 4))

    client = MlflowClient()
    newest = max(client.search_model_versions(f"name='{name}'"), key=lambda v: int(v.version))
    client.set_registered_model_alias(name, "champion", newest.version)
    say("model registered", model=name, version=newest.version, alias="champion")

    back = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    again = float(accuracy_score(test_y, back.predict(test_x)))
    if again != accuracy:
        sys.exit(f"the model that came back has accuracy {again}, the one that was logged {accuracy}")
    say("model loaded and used", predicted=[int(n) for n in back.predict(test_x[:3])], accuracy=round(again, 4))


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def transfer(name: str, megabytes: int) -> None:
    """Send an artifact of `megabytes` MB up and down again. Raises SystemExit when it comes back changed."""
    mlflow.set_experiment(name)
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "large.bin"
        with source.open("wb") as file:
            for _ in range(megabytes):
                file.write(os.urandom(1_000_000))
        with mlflow.start_run(run_name=f"{megabytes} MB") as run:
            began = time.monotonic()
            mlflow.log_artifact(str(source), "data")
            up = time.monotonic() - began
        began = time.monotonic()
        target = download_artifacts(run_id=run.info.run_id, artifact_path="data/large.bin", dst_path=f"{folder}/back")
        down = time.monotonic() - began
        if _sha256(pathlib.Path(target)) != _sha256(source):
            sys.exit("the artifact came back changed")
    say(
        "artifact up and down",
        megabytes=megabytes,
        up_mb_s=round(megabytes / up, 1),
        down_mb_s=round(megabytes / down, 1),
        sha256="equal",
    )


def main() -> None:
    """Command line: `workload.py train|transfer [--name NAME] [--megabytes N]`."""
    parser = argparse.ArgumentParser(description="A real piece of work against a tracking server.")
    parser.add_argument("work", choices=["train", "transfer"])
    parser.add_argument("--name", default="quickstart")
    parser.add_argument("--megabytes", type=int, default=600)
    a = parser.parse_args()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if a.work == "train":
        train(a.name)
    else:
        transfer(a.name, a.megabytes)


if __name__ == "__main__":
    main()

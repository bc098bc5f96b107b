"""Delete for good what was deleted long ago, as `mlflow gc` does, but never what a registered model needs.

`mlflow gc` takes every deleted experiment and model along, whatever runs it is given, and does not look whether a
model version is made of one. Here the choice is made first, and only what was chosen is handed to its code.

Usage: cleanup.py show | delete

Prints one object of JSON, which is also kept in the state directory. Settings: KIT_GC_DAYS (age in days),
KIT_GC_UPLOAD_HOURS (age of unfinished uploads), KIT_GC_BACKUP (state file of backups; empty: none is asked for),
KIT_GC_USERNAME (who asks the server, where MLflow itself has users).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import json
import os
import pathlib
import re
import sys
import typing
import urllib.parse

import launcher

RUN, MODEL = re.compile(r"\b[0-9a-f]{32}\b"), re.compile(r"\bm-[0-9a-f]{32}\b")
PAGE = 1000


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return int(datetime.datetime.now(datetime.UTC).timestamp() * 1000)


def pages(ask: typing.Callable[[str | None], typing.Any]) -> typing.Iterator[typing.Any]:
    """Every entry of a listing that comes in pages."""
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


@dataclasses.dataclass
class Thing:
    """What may be deleted: a run or a logged model; `deleted` in ms since the epoch."""

    kind: str
    name: str
    experiment: str
    deleted: int
    uri: str
    objects: int = 0
    size: int = 0
    kept: str = ""
    forsaken: bool = False  # not deleted itself, but its experiment is


class Bucket:
    """Where artifacts lie."""

    def __init__(self, destination: str) -> None:
        """Speak to the bucket of `destination` (s3://BUCKET/PREFIX) with the server's own settings."""
        from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

        parts = urllib.parse.urlsplit(destination)
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        self.s3 = S3ArtifactRepository(destination)._get_s3_client()

    def held(self, uri: str) -> tuple[int, int]:
        """Number and bytes of the objects at an artifact URI; nothing for one that lies elsewhere."""
        parts = urllib.parse.urlsplit(uri)
        path = parts.path.strip("/")
        if parts.scheme == "mlflow-artifacts":
            path = f"{self.prefix}/{path}".strip("/")
        elif parts.scheme != "s3" or parts.netloc != self.bucket:
            return 0, 0
        count = size = 0
        for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=path + "/"):
            for entry in page.get("Contents", []):
                count, size = count + 1, size + entry["Size"]
        return count, size

    def unfinished(self, hours: float, delete: bool) -> dict[str, int]:
        """Uploads in parts that began longer ago than `hours`; they are aborted if `delete`. Their number and bytes."""
        limit = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=hours)
        found = {"uploads": 0, "bytes": 0}
        for page in self.s3.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket):
            for upload in page.get("Uploads", []):
                if upload["Initiated"] > limit:
                    continue
                which = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                with contextlib.suppress(self.s3.exceptions.ClientError):
                    for parts in self.s3.get_paginator("list_parts").paginate(**which):
                        found["bytes"] += sum(part["Size"] for part in parts.get("Parts", []))
                    if delete:
                        self.s3.abort_multipart_upload(**which)
                    found["uploads"] += 1
        return found


class Cleanup:
    """The choice, and what is done about it."""

    def __init__(self) -> None:
        """Open the stores with the server's own settings."""
        from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
        from mlflow.tracking._tracking_service.utils import _get_store

        uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
        self.store = _get_store(uri, os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") or "mlflow-artifacts:/")
        self.registry = Registry(os.environ.get("MLFLOW_REGISTRY_STORE_URI") or uri)
        self.bucket = None
        if os.environ.get("MLFLOW_ARTIFACTS_DESTINATION", "").startswith("s3://"):
            self.bucket = Bucket(os.environ["MLFLOW_ARTIFACTS_DESTINATION"])
        self.age = int(float(os.environ["KIT_GC_DAYS"]) * 86_400_000)
        self.things: list[Thing] = []
        self.experiments: list[str] = []

    def saved(self) -> int | None:
        """When the last good backup began, in ms since the epoch: 0 for never, None where none is asked for."""
        path = os.environ.get("KIT_GC_BACKUP", "")
        if not path:
            return None
        try:
            began = json.loads(pathlib.Path(path).read_text())["last_good"]["started"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return int(datetime.datetime.fromisoformat(began.replace("Z", "+00:00")).timestamp() * 1000)

    def registered(self) -> tuple[set[str], set[str]]:
        """Runs and logged models that a model version is made of."""
        runs, models = set(), set()
        for version in pages(lambda token: self.registry.search_model_versions("", PAGE, None, token)):
            words = f"{version.run_id or ''} {version.source or ''} {getattr(version, 'model_id', None) or ''}"
            models |= set(MODEL.findall(words))
            runs |= set(RUN.findall(words))
        for model in models:
            with contextlib.suppress(Exception):  # a model that is gone has no run to keep
                runs.add(self.store.get_logged_model(model, allow_deleted=True).source_run_id or "")
        return runs, models

    def choose(self) -> None:
        """Find what was deleted long enough ago, and why some of it is kept all the same."""
        from mlflow.entities import ViewType

        runs, models = self.registered()
        saved = self.saved()
        for name in self.store._get_deleted_runs(older_than=self.age):
            info = self.store.get_run(name).info
            deleted = self._deleted_at("runs", name)
            self.things.append(Thing("run", name, info.experiment_id, deleted, info.artifact_uri))
        for name in self.store._get_deleted_logged_models(older_than=self.age):
            model = self.store.get_logged_model(name, allow_deleted=True)
            self.things.append(
                Thing("model", name, model.experiment_id, model.last_updated_timestamp, model.artifact_location)
            )
        limit = now_ms() - self.age
        old = {
            experiment.experiment_id: experiment.last_update_time
            for experiment in pages(
                lambda token: self.store.search_experiments(
                    view_type=ViewType.DELETED_ONLY, filter_string=f"last_update_time < {limit}", page_token=token
                )
            )
        }
        # Runs are deleted with their experiment, logged models are not: they would be left in the bucket.
        for number, deleted in old.items():
            for model in self._models(number):
                self.things.append(
                    Thing("model", model.model_id, number, deleted, model.artifact_location, forsaken=True)
                )
        for thing in self.things:
            if thing.name in runs | models:
                thing.kept = "a registered model version is made of it"
            elif saved is not None and thing.deleted >= saved:
                thing.kept = "no backup is newer than its deletion"
            if self.bucket:
                thing.objects, thing.size = self.bucket.held(thing.uri)
        going = {thing.name for thing in self.things if not thing.kept}
        for number, deleted in old.items():
            within = {run.info.run_id for run in self._runs(number)}
            within |= {thing.name for thing in self.things if thing.experiment == number}
            if within <= going and (saved is None or deleted < saved):
                self.experiments.append(number)

    def _runs(self, experiment: str) -> list[typing.Any]:
        from mlflow.entities import ViewType

        return list(pages(lambda token: self.store.search_runs([experiment], "", ViewType.ALL, PAGE, [], token)))

    def _models(self, experiment: str) -> list[typing.Any]:
        return list(pages(lambda token: self.store.search_logged_models([experiment], page_token=token)))

    def _deleted_at(self, table: str, name: str) -> int:
        from mlflow.store.tracking.dbmodels.models import SqlRun

        with self.store.ManagedSessionMaker() as session:
            return int(session.query(SqlRun.deleted_time).filter(SqlRun.run_uuid == name).scalar() or now_ms())

    def delete(self) -> None:
        """Hand what was chosen to the code of `mlflow gc`, one by one; what it refuses is kept and says why."""
        from mlflow.cli import _gc_tracking_resources

        for thing in [thing for thing in self.things if not thing.kept]:
            self._collect(_gc_tracking_resources, thing)
        going = {thing.experiment for thing in self.things if thing.kept}
        for number in [number for number in self.experiments if number not in going]:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    _gc_tracking_resources(self.store, [], [number], [], None, 0, False, True)
            except Exception as error:
                self.experiments.remove(number)
                print(f"experiment {number} is kept: {error}", file=sys.stderr)

    def _collect(self, collect: typing.Callable[..., None], thing: Thing) -> None:
        run, model = ([thing.name], []) if thing.kind == "run" else ([], [thing.name])
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                if thing.forsaken:
                    self.store.delete_logged_model(thing.name)
                collect(self.store, run, None, model, None, 0, True, thing.kind == "run")
        except Exception as error:
            thing.kept = f"{type(error).__name__}: {error}"[:300]


def main() -> None:
    """Do what the command line says."""
    if sys.argv[1:] not in (["show"], ["delete"]):
        sys.exit(__doc__)
    deleting = sys.argv[1] == "delete"
    launcher.load_secrets()
    os.environ["MLFLOW_TRACKING_URI"] = f"http://{os.environ['MLFLOW_HOST']}:{os.environ['MLFLOW_PORT']}"
    if os.environ.get("KIT_GC_USERNAME"):
        os.environ["MLFLOW_TRACKING_USERNAME"] = os.environ["KIT_GC_USERNAME"]
        os.environ["MLFLOW_TRACKING_PASSWORD"] = os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
    began = datetime.datetime.now(datetime.UTC)
    cleanup = Cleanup()
    cleanup.choose()
    if deleting:
        cleanup.delete()
    hours = float(os.environ["KIT_GC_UPLOAD_HOURS"])
    uploads = cleanup.bucket.unfinished(hours, deleting) if cleanup.bucket else {"uploads": 0, "bytes": 0}
    gone = [thing for thing in cleanup.things if not thing.kept]
    report = {
        "mode": sys.argv[1],
        "time": began.isoformat(timespec="seconds"),
        "days": float(os.environ["KIT_GC_DAYS"]),
        "runs": sorted(thing.name for thing in gone if thing.kind == "run"),
        "models": sorted(thing.name for thing in gone if thing.kind == "model"),
        "experiments": sorted(cleanup.experiments),
        "objects": sum(thing.objects for thing in gone),
        "bytes": sum(thing.size for thing in gone) + uploads["bytes"],
        "uploads": uploads,
        "kept": {thing.name: thing.kept for thing in cleanup.things if thing.kept},
    }
    text = json.dumps(report)
    state = pathlib.Path(os.environ["STATE_DIRECTORY"]) / f"gc-{sys.argv[1]}.json"
    scratch = state.with_suffix(".new")
    scratch.write_text(text + "\n")
    scratch.replace(state)
    print(text)


if __name__ == "__main__":
    main()

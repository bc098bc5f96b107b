"""Real MLflow clients at work, and what became of each of their requests.

Runs where MLflow is installed, with the environment of client.env. Every HTTP request is seen below the client's
own retries, so that a failure which a retry hides is counted all the same. Used by the tests and the benchmarks.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import pathlib
import signal
import tempfile
import threading
import time
import typing

import mlflow
import requests
import urllib3
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

EXPERIMENT = "load"
# How HTTP/1.1 shows that the other side closed a connection, and within how many seconds if it stood idle there.
CLOSED, AT_ONCE = ("RemoteDisconnected", "ConnectionResetError", "BrokenPipeError"), 2.0


class Ledger:
    """What was asked and answered; safe to be used by many threads.

    Requests are counted as failed when the connection breaks or the status is 500 or more, and as refused when
    it is 401, 403 or 429. One thing is counted by itself, as closed: a server that reloads closes connections that
    stand idle, and HTTP/1.1 has no way to say so beforehand. Who sends on one at that very moment finds it closed
    without an answer, and sends again on a new one. A repeat that fails, too, is a failure.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.lock = threading.Lock()
        self.runs: list[dict[str, typing.Any]] = []
        self.forget()

    def forget(self) -> None:
        """Begin the figures anew; the acknowledged runs stay."""
        self.seconds: list[float] = []
        self.waits: list[float] = []
        self.worst: tuple[float, str] = (0.0, "")
        self.failed: list[str] = []
        self.refused: list[str] = []
        self.closed: list[str] = []
        self.failed_between: list[float] = []
        self.gave_up: list[str] = []

    def note(self, began: float, words: str, status: int, error: str = "", used: bool = False) -> None:
        """Write one request down.

        It `began` at monotonic seconds, `words` are for it, its `status` is 0 for none, and `used` says whether its
        connection had served another one before.
        """
        took = time.monotonic() - began
        with self.lock:
            self.seconds.append(took)
            self.worst = max(self.worst, (took, words))
            if used and error in CLOSED and took < AT_ONCE:
                self.closed.append(f"{time.strftime('%H:%M:%S')} {words}: {error}")
            elif error or status >= 500:
                self.failed.append(f"{time.strftime('%H:%M:%S')} {words}: {error or status}")
                self.failed_between += [time.time() - took, time.time()]
            elif status in (401, 403, 429):
                self.refused.append(f"{time.strftime('%H:%M:%S')} {words}: {status}")

    def report(self, began: float) -> dict[str, typing.Any]:
        """Return the figures since `began` (monotonic seconds); times in ms and s."""
        with self.lock:
            ordered, waits = sorted(self.seconds) or [0.0], sorted(self.waits) or [0.0]
            span = time.monotonic() - began
            return {
                "requests": len(self.seconds),
                "requests_s": round(len(self.seconds) / span, 1),
                "seconds": round(span, 1),
                "failed": len(self.failed),
                "failures": self.failed[:20],
                "failing_s": round(max(self.failed_between) - min(self.failed_between), 2) if self.failed else 0.0,
                "closed": len(self.closed),
                "closings": self.closed[:20],
                "refused": len(self.refused),
                "refusals": self.refused[:20],
                "median_ms": round(ordered[len(ordered) // 2] * 1000, 1),
                "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1000, 1),
                "worst_ms": round(self.worst[0] * 1000, 1),
                "worst": self.worst[1],
                "wait_median_ms": round(waits[len(waits) // 2] * 1000, 1),
                "wait_p99_ms": round(waits[int(len(waits) * 0.99)] * 1000, 1),
                "wait_worst_ms": round(waits[-1] * 1000, 1),
                "runs": len(self.runs),
                "gave_up": self.gave_up[:20],
            }


def watch(ledger: Ledger, pause: float) -> None:
    """Let `ledger` see each request of this process: each try, and how long its caller waited for all of them.

    Whoever asked does nothing for `pause` seconds afterwards.
    """
    plain = urllib3.connectionpool.HTTPConnectionPool._make_request

    def make_request(
        pool: typing.Any, connection: typing.Any, method: str, url: str, *rest: typing.Any, **more: typing.Any
    ) -> typing.Any:
        words = f"{method} {url.partition('?')[0]}"
        used = getattr(connection, "sock", None) is not None
        began = time.monotonic()
        try:
            response = plain(pool, connection, method, url, *rest, **more)
        except Exception as error:
            ledger.note(began, words, 0, type(error).__name__, used)
            raise
        ledger.note(began, words, response.status)
        return response

    urllib3.connectionpool.HTTPConnectionPool._make_request = make_request  # type: ignore[method-assign, assignment]
    whole = requests.adapters.HTTPAdapter.send

    def send(adapter: requests.adapters.HTTPAdapter, *rest: typing.Any, **more: typing.Any) -> requests.Response:
        began = time.monotonic()
        try:
            return whole(adapter, *rest, **more)
        finally:
            with ledger.lock:
                ledger.waits.append(time.monotonic() - began)
            time.sleep(pause)

    requests.adapters.HTTPAdapter.send = send  # type: ignore[method-assign, assignment]


def write(ledger: Ledger, client: MlflowClient, experiment: str, stop: threading.Event, number: int) -> None:
    """Write runs with metrics, parameters, tags and a small artifact until `stop`; each acknowledged one is noted."""
    turn = 0
    while not stop.is_set():
        turn += 1
        try:
            run = client.create_run(experiment, tags={"writer": str(number)}).info.run_id
            client.log_param(run, "turn", turn)
            for step in range(3):
                client.log_metric(run, "n", float(step), step=step)
            now = int(time.time() * 1000)
            metrics = [Metric(f"m{i}", i / 7, now, 0) for i in range(10)]
            client.log_batch(run, metrics=metrics, params=[Param("batch", "yes")])
            digest = ""
            if turn % 3 == 1:
                with tempfile.TemporaryDirectory() as folder:
                    path = pathlib.Path(folder) / "data.bin"
                    path.write_bytes(os.urandom(30_000))
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    client.log_artifact(run, str(path))
            client.set_terminated(run)
        except Exception as error:
            with ledger.lock:
                ledger.gave_up.append(f"{time.strftime('%H:%M:%S')} writer {number}: {error}"[:400])
            time.sleep(0.5)
            continue
        with ledger.lock:
            ledger.runs.append({"run": run, "turn": turn, "sha256": digest})


def read(ledger: Ledger, client: MlflowClient, experiment: str, stop: threading.Event) -> None:
    """Search and read what was written until `stop`."""
    while not stop.is_set():
        try:
            found = client.search_runs([experiment], "metrics.n > 1", max_results=20)
            for run in found[:3]:
                client.get_run(run.info.run_id)
                client.get_metric_history(run.info.run_id, "n")
        except Exception as error:
            with ledger.lock:
                ledger.gave_up.append(f"{time.strftime('%H:%M:%S')} reader: {error}"[:400])
            time.sleep(0.5)


def run(writers: int, readers: int, pause: float, out: pathlib.Path) -> None:
    """Work until SIGTERM, keeping the report in `out` (JSON) and the acknowledged runs beside it, appended.

    SIGUSR1 ends a stretch: its report goes to a file beside `out` (.before), and the figures begin anew.
    """
    ledger, stop, turn = Ledger(), threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGUSR1, lambda *_: turn.set())
    watch(ledger, pause)
    client = MlflowClient()
    made = client.get_experiment_by_name(EXPERIMENT)
    experiment = made.experiment_id if made else client.create_experiment(EXPERIMENT)
    began = time.monotonic()
    threads = [
        threading.Thread(target=write, args=(ledger, client, experiment, stop, number), daemon=True)
        for number in range(writers)
    ]
    threads += [
        threading.Thread(target=read, args=(ledger, client, experiment, stop), daemon=True) for _ in range(readers)
    ]
    for thread in threads:
        thread.start()
    while not stop.wait(0.3):
        if turn.is_set():
            _keep(out.with_suffix(".before"), ledger.report(began))
            ledger.forget()
            began = time.monotonic()
            turn.clear()
        _keep(out, ledger.report(began))
    for thread in threads:
        thread.join(150)
    with out.with_suffix(".runs").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in ledger.runs)
    _keep(out, ledger.report(began) | {"ended": True})


def _keep(out: pathlib.Path, report: dict[str, typing.Any]) -> None:
    scratch = out.with_suffix(".new")
    scratch.write_text(json.dumps(report))
    scratch.replace(out)


def check(out: pathlib.Path) -> None:
    """Read every acknowledged run back and print how many there are, and which are not as they were written."""
    client = MlflowClient()
    noted = [json.loads(line) for line in out.with_suffix(".runs").read_text().splitlines()]
    lost: list[str] = []
    counts: collections.Counter[str] = collections.Counter()
    for one in noted:
        try:
            run = client.get_run(one["run"])
            whole = run.info.status == "FINISHED" and run.data.params == {"turn": str(one["turn"]), "batch": "yes"}
            whole = whole and run.data.metrics["n"] == 2.0 and len(run.data.metrics) == 11
            if one["sha256"]:
                counts["artifacts"] += 1
                path = mlflow.artifacts.download_artifacts(run_id=one["run"], artifact_path="data.bin")
                whole = whole and hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() == one["sha256"]
        except Exception as error:
            lost.append(f"{one['run']}: {error}"[:200])
            continue
        if not whole:
            lost.append(one["run"])
    print(json.dumps({"runs": len(noted), "artifacts": counts["artifacts"], "lost": lost}))


def main() -> None:
    """Command line: `load.py run|check --out FILE [--writers N] [--readers N] [--pause SECONDS]`."""
    parser = argparse.ArgumentParser(description="Real MLflow clients at work.")
    parser.add_argument("work", choices=["run", "check"])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.005)
    a = parser.parse_args()
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "10")
    if a.work == "run":
        run(a.writers, a.readers, a.pause, a.out)
    else:
        check(a.out)


if __name__ == "__main__":
    main()

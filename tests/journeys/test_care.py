"""Looking after a site: what its status tells, what a verification sees, what a cleanup may take."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import uuid
from typing import Any

import pytest
from journey import ROOT, Site

pytestmark = pytest.mark.xdist_group("quickstart")
LOG = """
import json, os
import mlflow
from mlflow.tracking import MlflowClient

class Same(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return model_input

client, made = MlflowClient(), {}
open("/root/data.bin", "wb").write(os.urandom(50_000))
for kind, experiment, model in (
    ("old", "one", ""), ("registered", "one", "kept"), ("alive", "one", ""),
    ("in a dead experiment", "two", ""), ("registered there", "three", "kept too"),
):
    mlflow.set_experiment(f"cleanup {experiment} {NAME}")
    with mlflow.start_run() as run:
        mlflow.log_artifact("/root/data.bin")
        info = mlflow.pyfunc.log_model(name="m", python_model=Same(), pip_requirements=[])
        if model:
            mlflow.register_model(info.model_uri, f"{model} {NAME}")
    made[kind] = [run.info.run_id, info.model_id, run.info.experiment_id]
for kind in ("old", "registered"):
    client.delete_run(made[kind][0])
    client.delete_logged_model(made[kind][1])
for kind in ("in a dead experiment", "registered there"):
    client.delete_experiment(made[kind][2])
print("made", json.dumps(made))
"""
USE = """
import mlflow
names = [f"{name} {NAME}" for name in ("kept", "kept too")]
print("used", [list(mlflow.pyfunc.load_model(f"models:/{name}/1").predict([3])) for name in names])
"""


@pytest.fixture(scope="module")
def site(quickstart: tuple[Site, str]) -> Site:
    """The quickstart's site."""
    return quickstart[0]


def status(site: Site, tmp_path: pathlib.Path) -> dict[str, Any]:
    """What the status says, as a machine reads it."""
    site.playbook("playbooks/status.yml", "-e", f"status_file={tmp_path}/status.json")
    found: dict[str, Any] = json.loads((tmp_path / "status.json").read_text())
    return found


def rows(found: dict[str, Any], state: str) -> dict[str, str]:
    """What is in this state, with the words for it."""
    return {row["what"]: row["words"] for row in found["rows"] if row["state"] == state}


def test_a_site_that_is_well(site: Site, tmp_path: pathlib.Path) -> None:
    """Everything that an operator asks for stands in the table, and strictness has nothing against it."""
    found = status(site, tmp_path)
    good = rows(found, "ok")
    assert {"gateway", "certificate", "mlflow@1", "mlflow@2", "mlflow-rest@1", "mlflow-rest@2"} <= set(good), found[
        "rows"
    ]
    assert {"postgresql", "s3", "allowed"} <= set(good), found["rows"]
    assert "health 200" in good["mlflow@1"] and good["mlflow@1"].startswith("3.")
    assert "days left" in good["certificate"]
    assert "connections" in good["postgresql"]
    out = site.playbook("playbooks/status.yml", "-e", "status_strict=true")
    assert "mlflow@2" in out and "failed=0" in out


@pytest.mark.parametrize(
    ("blow", "cure", "what", "words"),
    [
        ("systemctl stop mlflow@2", "systemctl start mlflow@2", "mlflow@2", "does not run"),
        ("systemctl stop mlflow-rest@1", "systemctl start mlflow-rest@1", "mlflow-rest@1", "does not run"),
        ("systemctl stop 'postgresql@*-main.service'", "systemctl start postgresql", "postgresql", "not running"),
        ("systemctl stop swift-proxy", "systemctl start swift-proxy", "s3", "swift-proxy.service"),
        ("systemctl stop nginx", "systemctl start nginx", "gateway", "443"),
    ],
)
def test_what_is_broken_is_named(
    site: Site, tmp_path: pathlib.Path, blow: str, cure: str, what: str, words: str
) -> None:
    host = site.host(site.machine)
    host.check_output(blow)
    try:
        told = ("-e", f"status_file={tmp_path}/status.json", "-e", "status_strict=true")
        assert "failed=1" in site.playbook("playbooks/status.yml", *told, check=False)
        found = json.loads((tmp_path / "status.json").read_text())
        assert words in rows(found, "BAD")[what], found["rows"]
    finally:
        host.check_output(cure)


def test_a_verification_goes_through_and_says_what_it_did(site: Site) -> None:
    out = " ".join(site.playbook("playbooks/verify.yml").split())
    assert "and works: reach the server" in out


def test_a_verification_names_what_is_broken(site: Site) -> None:
    """Without S3 no artifact comes back."""
    host = site.host(site.machine)
    host.check_output("systemctl stop swift-object")
    try:
        out = " ".join(site.playbook("playbooks/verify.yml", "-e", "verify_timeout=10", check=False).split())
    finally:
        host.check_output("systemctl start swift-object")
    assert "could not send and fetch an artifact" in out


def test_a_cleanup_takes_what_is_dead_and_nothing_that_is_needed(site: Site) -> None:
    """Deleted runs, models and experiments go with their files; what a registered model is made of stays and works."""
    host = site.host(site.machine)
    name = f"NAME = {uuid.uuid4().hex[:8]!r}\n"
    out = site.python(name + LOG)
    made = json.loads(next(line for line in out.splitlines() if line.startswith("made ")).removeprefix("made "))
    at_once = ("-e", "site_gc_days=0", "-e", "site_gc_requires_backup=false")
    cleanup = ("--tags", "mlflow", "playbooks/mlflow.yml")
    # Too young: nothing goes.
    shown = site.playbook("playbooks/gc.yml", "-e", "gc_delete=true")
    assert made["old"][0] not in shown
    site.playbook(cleanup[2], *cleanup[:2], *at_once)
    try:
        shown = site.playbook("playbooks/gc.yml")
        report = json.loads(host.check_output("cat /var/lib/mlflow/gc-show.json"))
        assert made["old"][0] in report["runs"] and made["old"][0] in shown
        assert report["bytes"] > 100_000 and "KB" in shown
        assert (
            site.python(f"import mlflow; print(mlflow.get_run({made['old'][0]!r}).info.status)").strip() == "FINISHED"
        )
        site.playbook("playbooks/gc.yml", "-e", "gc_delete=true")
        report = json.loads(host.check_output("cat /var/lib/mlflow/gc-delete.json"))
    finally:
        site.playbook(cleanup[2], *cleanup[:2])
    assert {made["old"][0], made["in a dead experiment"][0]} <= set(report["runs"])
    assert {made["old"][1], made["in a dead experiment"][1]} <= set(report["models"])
    assert report["experiments"] == [made["in a dead experiment"][2]]
    kept = {made[kind][part] for kind in ("registered", "registered there") for part in (0, 1)}
    assert kept <= set(report["kept"])
    gone = f"import mlflow; print(mlflow.get_run({made['old'][0]!r}))"
    assert "not found" in site.python(f"try:\n {gone}\nexcept Exception as e: print(e)")
    assert site.python(f"import mlflow; print(mlflow.get_run({made['alive'][0]!r}).info.status)").strip() == "FINISHED"
    assert "used [[3], [3]]" in site.python(name + USE)


def test_a_cleanup_asks_for_a_backup_that_is_newer(site: Site) -> None:
    """Deleted after the last good backup, or without any: kept, and it says so."""
    host = site.host(site.machine)
    out = site.python(
        "import mlflow\nmlflow.set_experiment('unsaved')\nwith mlflow.start_run() as r: mlflow.log_metric('m', 1)\n"
        "mlflow.MlflowClient().delete_run(r.info.run_id)\nprint(r.info.run_id)"
    )
    run = out.splitlines()[-1].strip()
    site.playbook("playbooks/mlflow.yml", "--tags", "mlflow", "-e", "site_gc_days=0")
    try:
        site.playbook("playbooks/gc.yml", "-e", "gc_delete=true")
        report = json.loads(host.check_output("cat /var/lib/mlflow/gc-delete.json"))
    finally:
        site.playbook("playbooks/mlflow.yml", "--tags", "mlflow")
    assert report["kept"][run] == "no backup is newer than its deletion"


VERBS = sorted(path.name for path in (ROOT / "playbooks").glob("*.yml"))


@pytest.mark.parametrize("verb", VERBS)
def test_with_a_wrong_vault_password_nothing_begins(site: Site, tmp_path: pathlib.Path, verb: str) -> None:
    """Whatever the verb: it says that the vault does not open, and no task has run."""
    wrong = tmp_path / "wrong"
    wrong.write_text("not this one")
    other = dataclasses.replace(
        site, environment={**site.environment, "MLFLOW_KIT_VAULT_PASSWORD_FILE": str(wrong), "ANSIBLE_NOCOLOR": "1"}
    )
    out = other.playbook(f"playbooks/{verb}", check=False)
    assert "Decryption failed" in out
    assert "changed:" not in out

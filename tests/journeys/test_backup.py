"""The host is gone: everything comes back from the backups, to the latest or to a time, equal by count and checksum."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from journey import Site, copy_of_checkout, start_load, stop_load
from kit import channel, quickstart, vm

pytestmark = pytest.mark.xdist_group("backup")
MACHINE, CLIENT, NETWORK, NAME = "kit-restore-vm", "kit-restore-client", "kit-restore", "restore.test"
TARGET, PLACE = "kit-restore-target", "/var/backups/mlflow-kit"
SUITE = "trixie"
PYTHON = "3.13"
VAULT = "inventories/prod/group_vars/all/vault.yml"

# Logs what a project logs, with a large artifact in parts and names that need care; argument: a word for all of it.
FILL = """
import os, pathlib, random, sys, tempfile
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
os.environ["MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE"] = "10485760"
import mlflow
from mlflow.tracking import MlflowClient
word = "@WORD@"
random.seed(word)
client = MlflowClient()
found = client.get_experiment_by_name("project")
experiment = found.experiment_id if found else client.create_experiment("project", tags={"team": "Zürich"})
folder = pathlib.Path(tempfile.mkdtemp())
for number in range(12):
    run = client.create_run(experiment, tags={"word": word}, run_name=f"{word} {number}").info.run_id
    client.log_param(run, "rate", number / 7)
    for step in range(20):
        client.log_metric(run, "loss", random.random(), step=step)
    for name in ("notes.txt", "plot of Ünicode & signs #1 (50%)+.bin"):
        (folder / name).write_bytes(random.randbytes(20_000))
        client.log_artifact(run, str(folder / name), "deep/er")
    client.set_terminated(run)
(folder / "large.bin").write_bytes(random.randbytes(25_000_000))
client.log_artifact(run, str(folder / "large.bin"))
try:
    client.create_registered_model("forest", tags={"kind": "tree"})
except mlflow.MlflowException:
    # The newest version's file is written over, and an old one is deleted.
    version = client.get_latest_versions("forest")[0]
    (folder / "notes.txt").write_bytes(random.randbytes(20_000))
    client.log_artifact(version.run_id, str(folder / "notes.txt"), "deep/er")
made = client.create_model_version("forest", f"runs:/{run}/deep", run, tags={"word": word})
client.set_registered_model_alias("forest", "champion", made.version)
"""
# All that a client can read of the site, as JSON, artifacts by their SHA-256.
EXPORT = """
import hashlib, json, os, pathlib, tempfile
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
from mlflow.artifacts import download_artifacts
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
client = MlflowClient()
out = {"experiments": {}, "runs": {}, "models": {}, "versions": {}, "artifacts": {}}
for e in client.search_experiments(view_type=ViewType.ALL):
    out["experiments"][e.experiment_id] = [e.name, e.lifecycle_stage, dict(e.tags)]
for run in client.search_runs(list(out["experiments"]), run_view_type=ViewType.ALL, max_results=5000):
    i = run.info
    history = {}
    for key in run.data.metrics:
        history[key] = [[m.value, m.step, m.timestamp] for m in client.get_metric_history(i.run_id, key)]
    about = [i.run_name, i.status, i.start_time, i.end_time, i.experiment_id, i.lifecycle_stage]
    out["runs"][i.run_id] = [about, dict(run.data.params), dict(run.data.tags), history]
    there = pathlib.Path(download_artifacts(run_id=i.run_id, dst_path=tempfile.mkdtemp()))
    for path in sorted(there.rglob("*")):
        if path.is_file():
            name = i.run_id + "/" + str(path.relative_to(there))
            out["artifacts"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
for model in client.search_registered_models():
    out["models"][model.name] = [dict(model.tags), dict(model.aliases)]
for v in client.search_model_versions():
    out["versions"][v.name + "/" + str(v.version)] = [v.source, v.run_id, v.status, dict(v.tags)]
print(json.dumps(out, sort_keys=True))
"""
State = dict[str, dict[str, Any]]


def boot() -> None:
    """A bare machine; the place for the backups is mounted from elsewhere, as it should be."""
    volumes = [f"mlflow-kit-uv-{SUITE}:{quickstart.CACHE_VOLUME}", f"{TARGET}:{PLACE}"]
    volumes.append(f"{channel.make(SUITE, if_missing=True)}:/srv/conda-channel:ro")
    vm.up(MACHINE, suite=SUITE, networks=[NETWORK], aliases=[NAME], volumes=volumes)


def fill(site: Site, word: str) -> None:
    """Let a client log things."""
    site.python(FILL.replace("@WORD@", word))


def export(site: Site) -> State:
    """All that a client can read."""
    found: State = json.loads(site.python(EXPORT).splitlines()[-1])
    return found


def counts(state: State) -> dict[str, int]:
    """How much of what is in an export."""
    return {name: len(held) for name, held in state.items()}


def now(site: Site) -> str:
    """The machine's time, as restore_time takes it, with a second of silence on both sides."""
    time.sleep(1.1)
    text: str = site.host(MACHINE).check_output("date -u +%Y-%m-%dT%H:%M:%SZ")
    time.sleep(1.1)
    return text


def state(site: Site, name: str) -> dict[str, Any]:
    """One of the state files that `status` reads."""
    found: dict[str, Any] = json.loads(site.host(MACHINE).check_output(f"cat /var/lib/mlflow-kit/{name}.json"))
    return found


def restore(site: Site, *more: str, check: bool = True) -> str:
    """Run playbooks/restore.yml; gives its output on one line."""
    out = site.playbook("playbooks/restore.yml", *more, check=check)
    return " ".join(out.split())


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A site of its own with data in it, and a first backup."""
    if not os.environ.get("KIT_KEEP"):
        vm.down([MACHINE, CLIENT], [NETWORK])
        vm.podman("volume", "rm", "--force", TARGET)
    checkout = copy_of_checkout("restore")
    link = checkout / ".venv"
    if not link.is_symlink():
        link.symlink_to(pathlib.Path(os.environ["KIT_ROOT"]) / ".venv")
    inventory = checkout / "inventories/prod"
    if not inventory.exists():
        shutil.copytree(checkout / "inventories/single", inventory, symlinks=True)
    boot()
    volumes = [f"mlflow-kit-uv-{SUITE}:{quickstart.CACHE_VOLUME}"]
    client = vm.up(CLIENT, suite=SUITE, networks=[NETWORK], volumes=volumes)
    hosts = inventory / "hosts.yml"
    hosts.write_text(hosts.read_text().replace("ansible_host: mlflow.example.org", f"ansible_host: {MACHINE}"))
    settings = inventory / "group_vars/all/site.yml"
    content = yaml.safe_load(settings.read_text())
    content["site_public_name"] = NAME
    content["site_allow"] = [{"cidr": f"{a}/{128 if ':' in a else 32}", "description": "the client"} for a in client]
    content["conda_env_channels"] = ["file:///srv/conda-channel"]
    content["conda_env_python"] = PYTHON
    # It has a journey of its own.
    content["site_monitoring_enabled"] = False
    content["mlflow_multipart_minimum_size"] = 10_000_000
    settings.write_text(yaml.safe_dump(content))
    environment = {"ANSIBLE_SSH_ARGS": f"-F {vm.SSH_CONFIG}"}
    made = Site(checkout, "inventories/prod", MACHINE, CLIENT, NAME, environment)
    made.changed()
    made.playbook("playbooks/client.yml")
    hand_over(made)
    quickstart.client_python(CLIENT)
    yield made
    if not os.environ.get("KIT_KEEP"):
        vm.down([MACHINE, CLIENT], [NETWORK])
        vm.podman("volume", "rm", "--force", TARGET)
        shutil.rmtree(checkout)


def hand_over(site: Site) -> None:
    """Give the client what playbooks/client.yml wrote."""
    env = (site.checkout / "client.env").read_text().replace(str(site.checkout), "/root")
    vm.write(CLIENT, "/root/client.env", env.encode())
    vm.write(CLIENT, "/root/ca-bundle.crt", (site.checkout / "ca-bundle.crt").read_bytes())


@pytest.fixture(scope="module")
def moments() -> dict[str, Any]:
    """What the tests of this file hand on: exports, and the times between them."""
    return {}


def test_a_backup_and_a_drill(site: Site, moments: dict[str, Any]) -> None:
    """With every figure that `status` reads, and nothing of it readable in the open."""
    fill(site, "first")
    moments["first"] = export(site)
    out = site.playbook("playbooks/backup.yml")
    held = state(site, "backup")
    print(counts(moments["first"]), {k: held[k] for k in ("duration_s", "database", "bucket")})
    assert held["result"] == "ok" and held["last_good"]["id"] == held["id"]
    assert held["bucket"]["objects"] == len(moments["first"]["artifacts"]) > 20
    assert held["bucket"]["bytes"] > 25_000_000 and held["database"]["rows"] > 200
    assert "objects" in out
    seen = site.host(MACHINE).check_output(f"grep -rlaE 'Zürich|notes.txt|plot of|champion' {PLACE} || true")
    assert seen == ""
    moments["time"] = now(site)
    site.playbook("playbooks/drill.yml")
    held = state(site, "drill")
    assert (held["result"], held["differences"]) == ("ok", 0)
    assert held["bucket"]["read"] == len(moments["first"]["artifacts"])
    assert held["database"]["rows"] == state(site, "backup")["database"]["rows"]


def test_restore_to_a_time_loses_exactly_what_came_after(site: Site, moments: dict[str, Any]) -> None:
    """And what it put away can be had back, since that was saved first."""
    fill(site, "second")
    moments["second"] = export(site)
    assert counts(moments["second"])["runs"] == 2 * counts(moments["first"])["runs"]
    moments["later"] = now(site)
    to = {"restore_time": moments["time"], "restore_confirm": "mlflow"}
    assert "restore to " + moments["time"] in restore(site, "--check", "-e", json.dumps(to))
    refused = restore(site, "-e", json.dumps({"restore_time": moments["time"]}), check=False)
    assert "restore_confirm=mlflow" in refused and "Nothing was changed" in refused
    assert export(site) == moments["second"]
    began = time.monotonic()
    restore(site, "-e", json.dumps(to))
    took = time.monotonic() - began
    assert export(site) == moments["first"]
    held = state(site, "restore")
    print(f"to a time: {took:.0f} s, {held['duration_s']} s of it on the host; {held['database']}, {held['bucket']}")
    to = {"restore_time": moments["later"], "restore_timeline": held["saved_timeline"], "restore_confirm": "mlflow"}
    restore(site, "-e", json.dumps(to))
    assert export(site) == moments["second"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"restore_time": "yesterday"}, "restore_time: found «yesterday», expected a time with its zone"),
        (
            {"restore_time": "2020-01-01T00:00:00Z"},
            "restore_time: found 2020-01-01T00:00:00Z, expected a time from",
        ),
        (
            {"restore_time": "2090-01-01T00:00:00Z"},
            "restore_time: found 2090-01-01T00:00:00Z, expected a time from",
        ),
        ({"restore_confirm": "another"}, "this host holds data"),
    ],
)
def test_a_restore_that_cannot_be_meant_is_refused(site: Site, more: dict[str, str], words: str) -> None:
    """Before anything is stopped."""
    host = site.host(MACHINE)
    before = host.check_output("systemctl show -p MainPID --value mlflow@1 postgresql@17-main")
    assert words in restore(site, "-e", json.dumps(more), check=False)
    assert host.check_output("systemctl show -p MainPID --value mlflow@1 postgresql@17-main") == before


def test_with_the_wrong_vault_password_nothing_begins(site: Site, tmp_path: pathlib.Path) -> None:
    """Neither a backup nor a restore, and the cause is named."""
    wrong = tmp_path / "password"
    wrong.write_text("wrong\n")
    before = state(site, "backup")
    other = Site(site.checkout, site.inventory, MACHINE, CLIENT, NAME, {**site.environment})
    other.environment["MLFLOW_KIT_VAULT_PASSWORD_FILE"] = str(wrong)
    for name in ("playbooks/backup.yml", "playbooks/restore.yml"):
        assert "Decryption failed" in other.playbook(name, check=False)
    assert state(site, "backup") == before


def test_the_host_and_the_controller_are_gone(site: Site, moments: dict[str, Any]) -> None:
    """A bare machine, the checkout and the vault's password: the rest comes from the backups (docs/restore.md)."""
    site.playbook("playbooks/backup.yml")
    secrets = site.secrets()
    shutil.rmtree(site.checkout / "inventories/prod")
    vm.down([MACHINE])
    began = time.monotonic()
    boot()
    machine = ["ssh", "-F", str(vm.SSH_CONFIG), MACHINE]
    packed = subprocess.run([*machine, f"cat {PLACE}/site/inventory.tar.gz.vault"], check=True, capture_output=True)
    (site.checkout / "inventory.tar.gz.vault").write_bytes(packed.stdout)
    site.command("sh", "-c", "ansible-vault decrypt --output - inventory.tar.gz.vault | tar xz -C inventories")
    assert site.secrets() == secrets
    out = site.playbook("site.yml")
    assert "NO BACKUPS ARE TAKEN" in out
    deployed = time.monotonic()
    restore(site)
    done = time.monotonic()
    found = export(site)
    assert found == moments["second"]
    held = state(site, "restore")
    size = held["database"]["bytes"] + held["bucket"]["bytes"]
    print(f"{counts(found)} equal; deploy {deployed - began:.0f} s, restore {done - deployed:.0f} s, {size} bytes")
    assert site.changed() == 0


def test_a_backup_and_a_drill_under_load_fail_no_request(site: Site) -> None:
    """On the machine that came back, which goes on where the lost one ended. The drill compares it row for row."""
    start_load(site)
    site.playbook("playbooks/backup.yml")
    site.playbook("playbooks/drill.yml")
    figures = stop_load(site)
    print(figures)
    assert (figures["failed"], figures["lost"]) == (0, [])
    held = state(site, "drill")
    assert (held["result"], held["differences"]) == ("ok", 0)
    assert held["backup"] == state(site, "backup")["last_good"]["id"]

"""MLflow changes its version under data and load: forth, back, broken on purpose, killed anywhere; and is released."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from journey import Site, copy_of_checkout, start_load, stop_load
from killing import counted, kill, sample
from kit import channel, quickstart, vm

pytestmark = pytest.mark.xdist_group("upgrade")
MACHINE, CLIENT, NETWORK, NAME = "kit-upgrade-vm", "kit-upgrade-client", "kit-upgrade", "upgrade.test"
SUITE = "trixie"
# Where downloads are kept, apart from what a release deletes.
CACHE = "/srv/kit-cache"
# The machine as it was before anything was deployed.
BEFORE = vm.CACHE / "journeys" / "upgrade-before.json"
# Writes experiments, runs, metrics with their history, parameters, tags, artifacts and model versions.
FILL = """
import os, tempfile, pathlib
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient
client = MlflowClient()
for e in range(2):
    experiment = client.create_experiment(f"kept {e}", tags={"team": f"t{e}"})
    for r in range(4):
        run = client.create_run(experiment, run_name=f"run {r}", tags={"r": str(r)}).info.run_id
        metrics = [Metric("loss", 1 / (s + 1), 1700000000000 + s, s) for s in range(40)]
        client.log_batch(run, metrics=metrics, params=[Param("lr", str(r / 10))], tags=[RunTag("note", "ü" * 300)])
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "data.bin"
            path.write_bytes(os.urandom(200_000))
            client.log_artifact(run, str(path), "files")
        client.set_terminated(run)
        if r == 3:
            client.delete_run(run)
for m in range(2):
    client.create_registered_model(f"kept-{m}", tags={"m": str(m)}, description="a model")
    for v in range(3):
        client.create_model_version(f"kept-{m}", f"mlflow-artifacts:/models/{m}/{v}", tags={"v": str(v)})
    client.set_registered_model_alias(f"kept-{m}", "champion", "2")
"""
# Prints the server's version, and everything of the above as it reads now, in a fixed order: how much, how many
# artifacts of it, and the checksum.
READ = """
import hashlib, json, os
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
from mlflow.artifacts import download_artifacts
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service.utils import _get_store
from mlflow.utils.rest_utils import http_request
client = MlflowClient()
print(http_request(_get_store().get_host_creds(), "/version", "GET").text.strip())
seen = []
experiments = [e for e in client.search_experiments() if e.name.startswith("kept ")]
for e in sorted(experiments, key=lambda e: e.name):
    seen.append(["experiment", e.name, e.experiment_id, e.tags.get("team")])
    for run in sorted(client.search_runs([e.experiment_id], run_view_type=ViewType.ALL), key=lambda r: r.info.run_id):
        history = [[m.step, m.timestamp, m.value] for m in client.get_metric_history(run.info.run_id, "loss")]
        tags = {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.")}
        seen.append(["run", run.info.run_id, run.info.run_name, run.info.status, run.info.lifecycle_stage,
                     run.data.params, tags, run.data.metrics, sorted(history)])
        path = download_artifacts(run_id=run.info.run_id, artifact_path="files/data.bin")
        seen.append(["artifact", hashlib.sha256(open(path, "rb").read()).hexdigest()])
for m in sorted(client.search_registered_models("name LIKE 'kept-%'"), key=lambda m: m.name):
    seen.append(["model", m.name, m.tags, m.description, dict(m.aliases)])
    for v in sorted(client.search_model_versions(f"name='{m.name}'"), key=lambda v: int(v.version)):
        seen.append(["version", v.name, int(v.version), v.source, v.tags])
artifacts = len([one for one in seen if one[0] == "artifact"])
print(json.dumps([len(seen), artifacts, hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()]))
"""


class Upgradable(Site):
    """A site whose lock is chosen by the test."""

    def want(self, lock: str, **more: Any) -> None:
        """Let the inventory name `lock`, a file below the checkout, with further settings."""
        path = self.checkout / self.inventory / "group_vars/all/site.yml"
        content = yaml.safe_load(path.read_text())
        content["conda_env_requirements"] = f"{{{{ site_root }}}}/{lock}"
        content.update(more)
        path.write_text(yaml.safe_dump(content))

    def settled(self) -> int:
        """How many tasks of site.yml change something, once the backups have the inventory as it is now."""
        self.playbook("playbooks/backups.yml")
        return self.changed()

    def hand_over(self) -> None:
        """Give the client what a client needs."""
        self.playbook("playbooks/client.yml")
        quickstart.client_python(self.client)
        env = (self.checkout / "client.env").read_text().replace(str(self.checkout), "/root")
        vm.write(self.client, "/root/client.env", env.encode())
        vm.write(self.client, "/root/ca-bundle.crt", (self.checkout / "ca-bundle.crt").read_bytes())

    def count(self, playbook: str, *more: str) -> str:
        """Run a playbook, remember of which tasks it consists, and return what it printed."""
        out, tasks = counted(self, playbook, *more)
        path = self.checkout / "tasks.json"
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(held | {playbook: tasks}))
        return out

    def read(self) -> tuple[str, str]:
        """The version that the gateway answers with; how much of FILL is there, and its checksum."""
        version, kept = self.python(READ).splitlines()[-2:]
        return version, kept


OLD, MIDDLE, NOW = (
    "tests/journeys/locks/mlflow-2.22.txt",
    "tests/journeys/locks/mlflow-3.4.txt",
    "requirements/server.txt",
)
UPGRADE, ROLLBACK, RELEASE = "playbooks/upgrade.yml", "playbooks/rollback.yml", "playbooks/release.yml"
STATE = "/var/lib/mlflow-kit-move.json"
# What a machine is made of: what must be the same before a deployment and after a release.
SNAPSHOT = r"""
import json, os, subprocess
def lines(command):
    return subprocess.run(command, shell=True, capture_output=True, text=True).stdout.split("\n")
# What every package installation, every login and every boot leaves on its own, and what only looks like a file.
SKIP = ("/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp", "/var/log", "/var/cache", "/var/lib/apt", "/var/lib/dpkg",
        "/var/lib/systemd", "/var/lib/ucf", "/etc/xml", "/var/backups",
        *map(os.path.expanduser, ("~root/.ansible", "~root/.ansible_async")), "/srv/kit-cache", "/srv/conda-channel")
files = []
for folder, folders, names in os.walk("/"):
    folders[:] = [f for f in folders if os.path.join(folder, f) not in SKIP and f != "__pycache__"]
    files += [os.path.join(folder, n) for n in [*names, *folders] if not n.endswith(("-", ".pyc", ".dpkg-old"))]
print(json.dumps({
    "files": sorted(files),
    "users": sorted(l.split(":")[0] for l in lines("getent passwd; getent group")),
    "packages": sorted(l for l in lines("dpkg-query -W -f '${Package} ${db:Status-Status}\n'")
                       if l.endswith(" installed")),
    "units": sorted(l.split()[0] for l in lines("systemctl list-unit-files --no-legend")
                    if l and not l.startswith("session-")),
    "active": sorted(l.split()[0] for l in lines("systemctl list-units --no-legend --plain --type=service,timer,socket")
                     if l and "session" not in l and "user" not in l),
    "ports": sorted({l.split()[3] for l in lines("ss -Htln") if l}),
    "hosts": lines("cat /etc/hosts"),
    "tables": lines("command -v nft >/dev/null && nft list tables"),
}))
"""


def version_of(lock: str) -> str:
    """The MLflow of a lock."""
    found = re.search(r"^mlflow==(\S+)", (pathlib.Path(__file__).parents[2] / lock).read_text(), re.MULTILINE)
    assert found
    return found[1]


def snapshot() -> dict[str, Any]:
    """The machine as it is now."""
    vm.write(MACHINE, "/tmp/snapshot.py", SNAPSHOT.encode())
    found: dict[str, Any] = json.loads(vm.execute(MACHINE, "python3", "/tmp/snapshot.py"))
    return found


def waited(out: str) -> float:
    """The pause that a playbook told of, in seconds; 0 for none."""
    text = " ".join(out.split())
    found = re.search(r"Writes waited ([0-9.]+) s", text)
    assert found or "No write waited" in text, out[-3000:]
    return float(found[1]) if found else 0.0


def failures(figures: dict[str, Any]) -> list[str]:
    """The load's failed requests to the site: a client also asks elsewhere for news of its version."""
    return [line for line in figures["failures"] if "/api/" in line or "/get-artifact" in line]


def settled(site: Site) -> None:
    """Nothing is left of a move: no state, no pause, every instance in the gateway and of the live environment."""
    host = site.host(MACHINE)
    assert host.run(f"ls {STATE} /etc/nginx/mlflow-kit/paused/*").stdout == ""
    assert " down;" not in host.check_output("cat /etc/nginx/mlflow-kit/upstreams.conf")
    live = host.check_output("readlink -f /opt/mlflow/current/bin/python")
    pids = host.check_output("systemctl show -p MainPID --value mlflow-rest@1 mlflow-rest@2 mlflow@1 mlflow@2").split()
    assert {host.check_output(f"readlink -f /proc/{pid}/exe") for pid in pids} == {live}
    assert host.check_output("systemctl --failed --no-legend --plain") == ""
    # A database that was loaded from a dump is as closed to others as the one before.
    opened = "SELECT has_database_privilege('public', 'mlflow', 'CONNECT'), datcollate FROM pg_database"
    asked = f"{opened} WHERE datname = 'mlflow'"
    assert host.check_output("cd /; runuser -u postgres -- psql -XAtc %s", asked) == "f|C.UTF-8"


@pytest.fixture(scope="module")
def site() -> Iterator[Upgradable]:
    """A machine of its own with MLflow 2.22, and a client with the current one."""
    keep = bool(os.environ.get("KIT_KEEP"))
    if not keep:
        vm.down([MACHINE, CLIENT], [NETWORK])
    checkout = copy_of_checkout("upgrade")
    if not (checkout / ".venv").exists():
        (checkout / ".venv").symlink_to(pathlib.Path(os.environ["KIT_ROOT"]) / ".venv")
    prod = checkout / "inventories/prod"
    local_channel = channel.make(SUITE, if_missing=True)
    uv = f"mlflow-kit-uv-{SUITE}"
    machine_volumes = [f"{uv}:{CACHE}", f"{local_channel}:/srv/conda-channel:ro"]
    vm.up(MACHINE, suite=SUITE, networks=[NETWORK], aliases=[NAME], volumes=machine_volumes)
    client = vm.up(CLIENT, suite=SUITE, networks=[NETWORK], volumes=[f"{uv}:{quickstart.CACHE_VOLUME}"])
    made = Upgradable(checkout, "inventories/prod", MACHINE, CLIENT, NAME, {"ANSIBLE_SSH_ARGS": f"-F {vm.SSH_CONFIG}"})
    if not prod.exists():
        shutil.copytree(checkout / "inventories/single", prod, symlinks=True)
        hosts = prod / "hosts.yml"
        hosts.write_text(hosts.read_text().replace("ansible_host: mlflow.example.org", f"ansible_host: {MACHINE}"))
        settings = prod / "group_vars/all/site.yml"
        content = yaml.safe_load(settings.read_text())
        content["site_public_name"] = NAME
        content["site_allow"] = [{"cidr": f"{a}/{128 if ':' in a else 32}", "description": "client"} for a in client]
        content["conda_env_channels"] = ["file:///srv/conda-channel"]
        content["conda_env_python"] = quickstart.PYTHONS[SUITE]
        content["conda_env_cache"] = CACHE
        content["conda_env_remove_cache"] = False
        # One of the upgrades begins with a backup, which has a journey of its own, as what watches has.
        content["upgrade_backup"] = False
        content["site_monitoring_enabled"] = False
        if vm.python_index():
            content["conda_env_index_url"] = vm.python_index()
        settings.write_text(yaml.safe_dump(content))
        made.want(OLD)
        BEFORE.write_text(json.dumps(snapshot()))
    yield made
    if not keep:
        vm.down([MACHINE, CLIENT], [NETWORK])
        shutil.rmtree(checkout)


def test_an_old_version_is_deployed_and_filled(site: Upgradable) -> None:
    """The kit runs MLflow 2.22 as it runs the current one; it is filled with a bit of everything."""
    site.changed()
    site.hand_over()
    site.python(FILL)
    version, kept = site.read()
    print(version, kept)
    assert version == version_of(OLD)
    (site.checkout / "kept").write_text(kept)


def unharmed(site: Upgradable, version: str) -> None:
    """The service is what it was, with all that is in it."""
    settled(site)
    assert site.read() == (version, (site.checkout / "kept").read_text())


def test_site_yml_leaves_the_version_alone(site: Upgradable) -> None:
    """With a newer lock in the inventory it changes nothing and says who would."""
    site.want(NOW)
    # The backups keep a copy of the inventory, which is another now.
    site.playbook("playbooks/backups.yml")
    text = site.playbook("site.yml")
    assert "changed=0" in text
    out = " ".join(text.split())
    assert f"mlflow {version_of(OLD)} is live and the lock has {version_of(NOW)}" in out
    assert "playbooks/upgrade.yml" in out
    unharmed(site, version_of(OLD))


@pytest.mark.parametrize(
    ("blow", "cure", "words"),
    [
        ("systemctl stop 'postgresql@*'", "systemctl start postgresql@$(ls /etc/postgresql)-main", "Start it"),
        ("systemctl stop swift-proxy", "systemctl start swift-proxy", "does not do its work"),
        (
            "mkdir -p /var/lib/mlflow-kit-dumps; mount -t tmpfs -o size=1m tmpfs /var/lib/mlflow-kit-dumps",
            "umount /var/lib/mlflow-kit-dumps",
            "MB free at /var/lib/mlflow-kit-dumps",
        ),
    ],
    ids=["postgresql stopped", "s3 stopped", "disk full"],
)
def test_an_upgrade_that_cannot_work_changes_nothing(site: Upgradable, blow: str, cure: str, words: str) -> None:
    """It stops with the cause and what to do."""
    host = site.host(MACHINE)
    host.check_output(blow)
    try:
        out = site.playbook(UPGRADE, check=False)
    finally:
        host.check_output(cure)
    assert "failed=1" in out
    assert words in " ".join(out.split())
    unharmed(site, version_of(OLD))


def test_upgrade_with_another_schema(site: Upgradable) -> None:
    """From 2.22 under load, a backup first: writes wait, reads go on, clients get over it, and everything is there."""
    start_load(site)
    out = site.playbook(UPGRADE, "-e", "upgrade_backup=true")
    figures = stop_load(site)
    print(f"2.22 to the pin: writes waited {waited(out)} s; {figures}")
    backup = json.loads(site.host(MACHINE).check_output("cat /var/lib/mlflow-kit/backup.json"))
    assert (backup["result"], backup["kind"]) == ("ok", "all")
    (site.checkout / "moment").write_text(backup["finished"])
    assert waited(out) > 0
    assert "writes will wait about" in " ".join(out.split())
    wrong = [line for line in failures(figures) if "POST" not in line or not line.endswith(": 503")]
    assert (wrong, figures["lost"], figures["gave_up"]) == ([], [], [])
    unharmed(site, version_of(NOW))
    assert site.settled() == 0


def test_restore_brings_an_older_schema_forth(site: Upgradable) -> None:
    """The backup from before the upgrade: its schema is migrated to that of the live MLflow, and all is there."""
    confirm = f"restore_time={(site.checkout / 'moment').read_text()} restore_confirm=mlflow"
    site.playbook("playbooks/restore.yml", "-e", confirm)
    restored = json.loads(site.host(MACHINE).check_output("cat /var/lib/mlflow-kit/restore.json"))
    assert restored["result"] == "ok"
    unharmed(site, version_of(NOW))


def test_upgrade_with_the_same_schema(site: Upgradable) -> None:
    """Another environment of the same version: not one request fails."""
    lock = "requirements/again.txt"
    (site.checkout / lock).write_text("# another environment\n" + (site.checkout / NOW).read_text())
    site.want(lock)
    start_load(site)
    out = site.playbook(UPGRADE)
    figures = stop_load(site)
    print(f"the same schema: {figures}")
    assert (waited(out), failures(figures), figures["lost"]) == (0.0, [], [])
    unharmed(site, version_of(NOW))


def test_rollback_with_the_same_schema(site: Upgradable) -> None:
    """Back to the environment before: nothing is lost, nothing fails, and site.yml does not go forth again."""
    start_load(site, writers=1)
    out = site.playbook(ROLLBACK)
    figures = stop_load(site)
    print(f"rollback with the same schema: {figures}")
    assert (waited(out), failures(figures), figures["lost"]) == (0.0, [], [])
    live = site.host(MACHINE).check_output("readlink /opt/mlflow/current")
    assert site.settled() == 0
    assert site.host(MACHINE).check_output("readlink /opt/mlflow/current") == live
    unharmed(site, version_of(NOW))


def test_rollback_to_another_schema_asks_first(site: Upgradable) -> None:
    """It says what would be lost and does nothing; with consent it goes back, and site.yml stays there."""
    out = " ".join(site.playbook(ROLLBACK, check=False).split())
    assert re.search(r"is lost \([1-9][0-9]* runs", out), out[-2000:]
    unharmed(site, version_of(NOW))
    out = site.count(ROLLBACK, "-e", "rollback_confirm=true")
    print(f"the pin to 2.22: writes waited {waited(out)} s")
    unharmed(site, version_of(OLD))
    site.want(NOW)
    assert site.settled() == 0
    unharmed(site, version_of(OLD))


def test_upgrade_to_a_version_that_is_broken(site: Upgradable) -> None:
    """From 3.4: the schema is changed already when the server does not start; all is put back, under load."""
    site.want(MIDDLE)
    site.count(UPGRADE)
    unharmed(site, version_of(MIDDLE))
    site.want(NOW)
    host = site.host(MACHINE)
    pattern = f"/opt/mlflow/envs/*/lib/python3*/site-packages/mlflow-{version_of(NOW)}.dist-info"
    place = host.check_output(f"dirname $(ls -d {pattern})").splitlines()
    broken = [f"{path}/mlflow/server/fastapi_app.py" for path in place]
    for path in broken:
        host.check_output(f"cp {path} {path}.good; echo 'raise RuntimeError(42)' > {path}")
    start_load(site, writers=1)
    out = site.playbook(UPGRADE, check=False)
    figures = stop_load(site)
    print(f"broken and put back: {figures}")
    for path in broken:
        host.check_output(f"mv {path}.good {path}")
    text = " ".join(out.split())
    assert "RuntimeError: 42" in text and "everything is as it was" in text, out[-4000:]
    assert (figures["lost"], figures["gave_up"]) == ([], [])
    unharmed(site, version_of(MIDDLE))


def test_killed_anywhere_and_run_again(site: Upgradable) -> None:
    """kill -9 at the boundaries of tasks, upgrading and rolling back in turn: the next run ends in a healthy site."""
    confirm = ("-e", "rollback_confirm=true")
    tasks = json.loads((site.checkout / "tasks.json").read_text())
    begun = "Note that the move is begun"
    # With the twelve of rotations seventeen in all.
    ups, backs = sample(tasks[UPGRADE], 3, begun), sample(tasks[ROLLBACK], 2, begun)
    for number, up in enumerate(ups):
        began = time.monotonic()
        start_load(site, writers=1, readers=0)
        at = kill(site, up, UPGRADE)
        site.playbook(UPGRADE)
        figures = stop_load(site)
        print(
            f"upgrade killed before {up}/{len(tasks[UPGRADE])} «{at}»: {figures['runs']} acknowledged, lost"
            f" {figures['lost']}, {time.monotonic() - began:.0f} s"
        )
        assert at, "the run ended before it could be killed"
        # Between the killed run and the next a client may give up; what was acknowledged stays.
        assert figures["lost"] == []
        unharmed(site, version_of(NOW))
        if number < len(backs):
            began, back = time.monotonic(), backs[number]
            at = kill(site, back, ROLLBACK, *confirm)
            site.playbook(ROLLBACK, *confirm)
            print(f"rollback killed before {back}/{len(tasks[ROLLBACK])} «{at}»: {time.monotonic() - began:.0f} s")
            assert at, "the run ended before it could be killed"
            unharmed(site, version_of(MIDDLE))


def test_redeploy_keeps_the_data(site: Upgradable) -> None:
    """One host from nothing, under the same data."""
    assert "redeploy_host" in site.playbook("playbooks/redeploy.yml", check=False)
    site.playbook("playbooks/redeploy.yml", "-e", "redeploy_host=mlflow1")
    unharmed(site, version_of(NOW))


def test_release_asks_for_the_name(site: Upgradable) -> None:
    """Without the site's name nothing happens; with S3 away, nothing either."""
    assert "expected the site's name" in " ".join(site.playbook(RELEASE, check=False).split())
    host = site.host(MACHINE)
    host.check_output("systemctl stop swift-proxy")
    out = " ".join(site.playbook(RELEASE, "-e", "release_confirm=mlflow", check=False).split())
    host.check_output("systemctl start swift-proxy")
    assert "nothing was removed" in out and "could not be saved" in out, out[-3000:]
    unharmed(site, version_of(NOW))


def test_release_leaves_nothing_behind(site: Upgradable) -> None:
    """Files, users, packages, units, ports, rules: as before the first deployment; and there is a last backup."""
    site.playbook(RELEASE, "-e", "release_confirm=mlflow")
    saved = next((site.checkout / site.inventory / "released").iterdir())
    assert {path.name for path in saved.iterdir()} == {"mlflow.dump", "bucket.tar", "vault.yml"}
    listed = site.command("tar", "-tf", str(saved / "bucket.tar")).splitlines()
    artifacts = json.loads((site.checkout / "kept").read_text())[1]
    assert len([name for name in listed if name.endswith("files/data.bin")]) == artifacts > 0
    assert (saved / "mlflow.dump").read_bytes().startswith(b"PGDMP")
    before, after = json.loads(BEFORE.read_text()), snapshot()
    differences = {
        kind: {
            "left": sorted(set(after[kind]) - set(before[kind])),
            "gone": sorted(set(before[kind]) - set(after[kind])),
        }
        for kind in before
        if set(after[kind]) != set(before[kind])
    }
    assert differences == {}

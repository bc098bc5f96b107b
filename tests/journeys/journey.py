"""Whole sites, deployed as an operator would, from a copy of this checkout."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import time
from typing import Any

import testinfra
import yaml
from kit import vm

ROOT = pathlib.Path(__file__).parents[2]
RECAP = re.compile(r"^\S+\s+: ok=\d+\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)


@dataclasses.dataclass
class Site:
    """A deployed site: where its checkout and inventory are, and the machines that play in it."""

    checkout: pathlib.Path
    inventory: str
    machine: str
    client: str
    name: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    def command(self, *argv: str, check: bool = True) -> str:
        """Run a command at the root of the site's checkout and return all that it prints."""
        python = f"{self.checkout}/.venv/bin:{os.environ['PATH']}"
        done = subprocess.run(
            argv,
            cwd=self.checkout,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PATH": python, **self.environment},
        )
        assert not check or done.returncode == 0, f"{argv}: exit {done.returncode}\n{done.stdout[-8000:]}"
        return done.stdout

    def playbook(self, name: str, *more: str, check: bool = True) -> str:
        """Run a playbook on the site and return its output."""
        return self.command("ansible-playbook", "-i", self.inventory, name, *more, check=check)

    def changed(self, *more: str) -> int:
        """Run site.yml and return how many tasks changed something."""
        out = self.playbook("site.yml", *more)
        found = RECAP.findall(out)
        assert found, out[-3000:]
        assert all(unreachable == failed == "0" for _, unreachable, failed in found)
        return sum(int(changed) for changed, _, _ in found)

    def secrets(self) -> dict[str, str]:
        """What the site's vault holds, but the public certificates."""
        path = f"{self.inventory}/group_vars/all/vault.yml"
        held = yaml.safe_load(self.command("ansible-vault", "view", path))
        return {name: value for name, value in held.items() if not name.endswith("certificate")}

    def host(self, name: str) -> Any:
        """testinfra's host for one of the machines."""
        return testinfra.get_host(f"ssh://{name}", ssh_config=str(vm.SSH_CONFIG))

    def python(self, source: str, check: bool = True) -> str:
        """Run Python with MLflow in the client's machine, with the environment of client.env."""
        vm.write(self.client, "/root/snippet.py", source.encode())
        script = "set -a; . /root/client.env; set +a; exec /opt/client/bin/python -W ignore /root/snippet.py"
        return vm.execute(self.client, "sh", "-c", script, check=check)


def start_load(site: Site, writers: int = 2, readers: int = 1, pause: float = 0.1) -> None:
    """Let real MLflow clients work in the client's machine until stop_load; returns when they are under way."""
    stop_load_unit(site)
    source = (pathlib.Path(os.environ["KIT_ROOT"]) / "scripts/kit/load.py").read_bytes()
    vm.write(site.client, "/root/load.py", source)
    vm.execute(site.client, "sh", "-c", "rm -f /root/load.json /root/load.runs")
    script = (
        # Telemetry asks a host that is not the site.
        "set -a; . /root/client.env; MLFLOW_DISABLE_TELEMETRY=true; set +a; "
        "exec /opt/client/bin/python -W ignore /root/load.py run "
        # Steady, and not all that the machine gives: what is done under it would wait for it.
        f"--out /root/load.json --pause {pause} --writers {writers} --readers {readers}"
    )
    vm.execute(
        site.client,
        *("systemd-run", "--quiet", "--unit=load", "--property=KillMode=mixed"),
        *("--property=TimeoutStopSec=180", "sh", "-c", script),
    )
    deadline = time.monotonic() + 60
    while load(site).get("runs", 0) < 3:
        assert time.monotonic() < deadline, vm.execute(site.client, "journalctl", "-u", "load", "-n", "30", "-o", "cat")
        time.sleep(0.3)


def load(site: Site) -> dict[str, Any]:
    """The load's figures so far, empty when it has not begun (see scripts/kit/load.py)."""
    found: dict[str, Any] = json.loads(
        vm.execute(site.client, "sh", "-c", "cat /root/load.json 2>/dev/null || echo {}")
    )
    return found


def stop_load_unit(site: Site) -> None:
    """End the load's unit, however it stands."""
    vm.execute(site.client, "systemctl", "stop", "load", check=False)
    vm.execute(site.client, "systemctl", "reset-failed", "load", check=False)


def stop_load(site: Site) -> dict[str, Any]:
    """Stop the load and return its figures, with `lost`: the acknowledged runs that are not there as written."""
    stop_load_unit(site)
    figures = load(site)
    assert figures.get("ended"), f"the load did not end by itself: {figures}"
    script = (
        "set -a; . /root/client.env; set +a; "
        "exec /opt/client/bin/python -W ignore /root/load.py check --out /root/load.json"
    )
    checked = json.loads(vm.execute(site.client, "sh", "-c", script).splitlines()[-1])
    assert checked["runs"] == figures["runs"] > 0
    return figures | {"lost": checked["lost"], "artifacts": checked["artifacts"]}


def copy_of_checkout(name: str) -> pathlib.Path:
    """Copy what git would commit to a folder of its own, and return the folder.

    With KIT_KEEP in the environment an earlier copy, and with it the site that was made from it, is used again.
    """
    target = vm.CACHE / "journeys" / name
    if not os.environ.get("KIT_KEEP"):
        shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for path in filter(None, listed.stdout.split("\0")):
        source = ROOT / path
        if source.is_symlink() or source.exists():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).unlink(missing_ok=True)
            shutil.copy2(source, target / path, follow_symlinks=False)
    return target


def leaked(secrets: dict[str, str], text: str) -> list[str]:
    """Names of the secrets that stand in `text`, whole or by a line of theirs."""
    found = []
    for name, value in secrets.items():
        pieces = [piece for piece in value.splitlines() if len(piece) >= 12 and not piece.startswith("-----")]
        if any(piece in text for piece in pieces):
            found.append(name)
    return found

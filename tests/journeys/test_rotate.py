"""Credentials change while clients work: nothing fails, the old is refused, a killed run is completed by the next."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator

import pytest
import yaml
from journey import Site, copy_of_checkout
from kit import channel, quickstart, vm

pytestmark = pytest.mark.xdist_group("rotate")
MACHINE, CLIENT, NETWORK, NAME = "kit-rotate-vm", "kit-rotate-client", "kit-rotate", "rotate.test"
SUITE = "trixie"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A site of its own, deployed, and a client with what it needs."""
    if not os.environ.get("KIT_KEEP"):
        vm.down([MACHINE, CLIENT], [NETWORK])
    checkout = copy_of_checkout("rotate")
    prod = checkout / "inventories/prod"
    if not prod.exists():
        (checkout / ".venv").symlink_to(pathlib.Path(os.environ["KIT_ROOT"]) / ".venv")
        shutil.copytree(checkout / "inventories/single", prod, symlinks=True)
    volumes = [f"mlflow-kit-uv-{SUITE}:{quickstart.CACHE_VOLUME}"]
    own = [*volumes]
    content: dict[str, object] = {
        "site_public_name": NAME,
        "conda_env_python": quickstart.PYTHONS[SUITE],
    }
    if not quickstart.conda_forge_answers():
        own.append(f"{channel.make(SUITE, if_missing=True)}:{quickstart.CHANNEL}:ro")
        content["conda_env_channels"] = [f"file://{quickstart.CHANNEL}"]
    if vm.python_index():
        content["conda_env_index_url"] = vm.python_index()
    vm.up(MACHINE, suite=SUITE, networks=[NETWORK], aliases=[NAME], volumes=own)
    client = vm.up(CLIENT, suite=SUITE, networks=[NETWORK], volumes=volumes)
    hosts = prod / "hosts.yml"
    hosts.write_text(hosts.read_text().replace("ansible_host: mlflow.example.org", f"ansible_host: {MACHINE}"))
    content["site_allow"] = [{"cidr": f"{a}/{128 if ':' in a else 32}", "description": "the client"} for a in client]
    (prod / "group_vars/all/site.yml").write_text(yaml.safe_dump(content))
    made = Site(checkout, "inventories/prod", MACHINE, CLIENT, NAME, {"ANSIBLE_SSH_ARGS": f"-F {vm.SSH_CONFIG}"})
    made.playbook("site.yml")
    made.playbook("playbooks/client.yml")
    quickstart.client_python(CLIENT)
    yield made
    if not os.environ.get("KIT_KEEP"):
        vm.down([MACHINE, CLIENT], [NETWORK])
        shutil.rmtree(checkout)


def test_it_is_there(site: Site) -> None:
    assert site.changed() == 0

"""A machine of one's own: inventories/single, copied and edited as docs/deploy.md says, on Debian 12."""

from __future__ import annotations

import ast
import os
import pathlib
import shutil
from collections.abc import Iterator

import pytest
import yaml
from journey import Site, copy_of_checkout
from kit import channel, quickstart, vm

pytestmark = pytest.mark.xdist_group("single")
MACHINE, CLIENT, NETWORK, NAME = "kit-single-vm", "kit-single-client", "kit-single", "single.test"
SUITE = "bookworm"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A bare machine, a client, and a copy of the inventory that is edited for them."""
    vm.down([MACHINE, CLIENT], [NETWORK])
    checkout = copy_of_checkout("single")
    (checkout / ".venv").symlink_to(pathlib.Path(os.environ["KIT_ROOT"]) / ".venv")
    shutil.copytree(checkout / "inventories/single", checkout / "inventories/prod", symlinks=True)
    volumes = [f"mlflow-kit-uv-{SUITE}:{quickstart.CACHE_VOLUME}"]
    local_channel = channel.make(SUITE, if_missing=True)
    vm.up(
        MACHINE,
        suite=SUITE,
        networks=[NETWORK],
        aliases=[NAME],
        volumes=[*volumes, f"{local_channel}:/srv/conda-channel:ro"],
    )
    client = vm.up(CLIENT, suite=SUITE, networks=[NETWORK], volumes=volumes)
    hosts = checkout / "inventories/prod/hosts.yml"
    edited = hosts.read_text().replace("ansible_host: mlflow.example.org", f"ansible_host: {MACHINE}")
    hosts.write_text(edited)
    settings = checkout / "inventories/prod/group_vars/all/site.yml"
    content = yaml.safe_load(settings.read_text())
    content["site_public_name"] = NAME
    content["site_allow"] = [{"cidr": f"{a}/{128 if ':' in a else 32}", "description": "the client"} for a in client]
    content["conda_env_channels"] = ["file:///srv/conda-channel"]
    content["conda_env_python"] = "3.11"
    settings.write_text(yaml.safe_dump(content))
    environment = {"ANSIBLE_SSH_ARGS": f"-F {vm.SSH_CONFIG}"}
    yield Site(checkout, "inventories/prod", MACHINE, CLIENT, NAME, environment)
    if not os.environ.get("KIT_KEEP"):
        vm.down([MACHINE, CLIENT], [NETWORK])
        shutil.rmtree(checkout)


def test_a_dry_run_on_a_bare_host_works(site: Site) -> None:
    """It ends well, names changes, and makes none: not even a secret."""
    host = site.host(MACHINE)
    before = host.check_output("dpkg -l | sha256sum; ls /etc | sha256sum")
    assert site.changed("--check", "--diff") > 5
    assert host.check_output("dpkg -l | sha256sum; ls /etc | sha256sum") == before
    assert not (site.checkout / "inventories/prod/group_vars/all/vault.yml").exists()


def test_one_command_deploys(site: Site) -> None:
    """And the next one has nothing to do."""
    assert site.changed() > 20
    assert site.changed() == 0
    assert site.changed("--check") == 0


def test_the_vault_is_encrypted(site: Site) -> None:
    """The site's secrets stand beside the inventory, and not in the open."""
    text = (site.checkout / "inventories/prod/group_vars/all/vault.yml").read_text()
    assert text.startswith("$ANSIBLE_VAULT;")


def test_a_real_model_goes_through(site: Site) -> None:
    """The quickstart's workload, with what playbooks/client.yml hands to a client."""
    site.playbook("playbooks/client.yml")
    quickstart.client_python(CLIENT)
    lines = quickstart.work(CLIENT, site.checkout)
    assert len(lines) == 4 and '"sha256": "equal"' in lines[-1], lines


def test_mlflow_asks_for_credentials_where_that_is_chosen(site: Site) -> None:
    """One variable hands the question over to MLflow's own users; the same client goes on working."""
    chosen = ("-e", "site_authentication=mlflow")
    assert site.changed(*chosen) > 0
    assert site.changed(*chosen) == 0
    lines = quickstart.work(CLIENT, site.checkout)
    assert len(lines) == 4, lines
    probe = """
import os, requests
session = requests.Session(); session.trust_env = False; session.verify = "/root/ca-bundle.crt"
url = os.environ["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow/users/get?username=mlflow"
page = os.environ["MLFLOW_TRACKING_URI"] + "/monitoring/api/v1/query?query=up"
login = (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"])
def ask(address, auth):
    answer = session.get(address, auth=auth)
    return answer.status_code, len(answer.raw.headers.getlist("WWW-Authenticate")), "Retry-After" in answer.headers
told = [ask(address, auth) for auth in (None, ("mlflow", "wrong"), login) for address in (url, page)]
guesses = [ask(url, ("mlflow", f"wrong {number}")) for number in range(20)]
print([told, sorted(set(guesses)), ask(url, login)])
"""
    told, guesses, after = ast.literal_eval(site.python(probe).splitlines()[-1])
    # Who is refused is asked for a password, once; who goes on guessing is told to wait; who knows it waits for nobody.
    assert told == [(401, 1, False)] * 4 + [(200, 0, False)] * 2
    assert {(status, wait) for status, _, wait in guesses} == {(401, False), (429, True)}
    assert after == (200, 0, False)

"""What an operator sees of a host or an inventory that cannot work, and that neither run leaves a trace."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

HERE = pathlib.Path(__file__).parents[1]
NAME = "kit-preflight-vm"
# Everything but what every login writes.
CHANGED = (
    "find / -xdev -newercm /run/preflight-marker ! -type d ! -path '/proc/*' ! -path '/sys/*' ! -path '/run/*'"
    " ! -path '/dev/*' ! -path '/var/log/*' ! -path '/tmp/*' ! -path '/var/lib/systemd/*'"
)


@pytest.fixture
def host(host_of: Callable[[str], Any]) -> Any:
    """The machine."""
    return host_of(NAME)


def preflight(*argv: str, inventory: str = f"{HERE}/inventory.yml", **variables: Any) -> tuple[int, str]:
    """Run the scenario's playbook with other `variables`: its exit code and what it said."""
    command = ["ansible-playbook", "-i", "molecule/_shared/inventory", "-i", inventory, "-e", json.dumps(variables)]
    done = subprocess.run(
        [*command, f"{HERE}/converge.yml", *argv], cwd=HERE.parents[1], text=True, capture_output=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def refusals(said: str) -> list[str]:
    """The lines of the list in the message. There is one message."""
    message = said[said.rindex("FAILED! =>") :].partition("PLAY RECAP")[0]
    return re.findall(r"^\s+(- .*)$", message, re.MULTILINE)


@contextlib.contextmanager
def unchanged(host: Any) -> Iterator[None]:
    """Hold that the host is as it was: no file written, no package come or gone, no unit started."""
    state = (
        "dpkg-query -W | sha256sum; systemctl list-units --plain --no-legend --type=service | grep -v user | sha256sum"
    )
    host.check_output("touch /run/preflight-marker; sleep 0.05")
    before = host.check_output(state)
    yield
    assert host.check_output(state) == before
    assert host.check_output(CHANGED) == ""


def test_a_sound_site_passes_and_nothing_changes(host: Any) -> None:
    with unchanged(host):
        code, said = preflight()
    assert code == 0, said
    assert re.search(r"ok=\d+ +changed=0 .*failed=0", said)


def test_a_broken_inventory_is_refused_without_a_host(tmp_path: pathlib.Path) -> None:
    """The host in this inventory does not exist: had it been called, it would be unreachable."""
    inventory = json.loads(json.dumps({"all": {"hosts": {"kit-preflight-nowhere": {"ansible_host": "192.0.2.1"}}}}))
    path = tmp_path / "inventory.json"
    path.write_text(json.dumps(inventory))
    code, said = preflight(
        "-vvv",
        "--diff",
        inventory=str(path),
        site_name="https://x.example.org/",
        site_port="abc",
        site_ssh_port=22,
        site_password="Kurz-7!",
        site_disk="var/lib",
        site_min_disk_mb=1,
        site_min_memory_mb=1,
        site_database_url="mysql://root:Geheim-Xy9@db/x",
    )
    assert code != 0
    assert "UNREACHABLE" not in said
    assert [line.split(":")[0] for line in refusals(said)] == [
        "- public name",
        "- password",
        "- port",
        "- path",
        "- database URL",
        "- database URL",
    ]
    assert all(re.search(r": found .+; expected .+; change \w+\.$", line) for line in refusals(said))
    assert "vault_database_password" in refusals(said)[-1]
    # What was given by -e stands in the command that -vvv repeats nowhere, and in no message.
    assert "Geheim" not in said
    assert "Kurz-7" not in said


def test_all_faults_of_a_host_come_at_once(host: Any) -> None:
    host.check_output("mkdir -p /srv/tiny && mount -t tmpfs -o size=4m tmpfs /srv/tiny")
    host.check_output("systemd-run --unit=squatter python3 -m http.server 18443 --bind ::")
    host.check_output("timeout 10 sh -c 'until ss -Hltn sport = 18443 | grep -q .; do sleep 0.1; done'")
    try:
        with unchanged(host):
            code, said = preflight(
                site_disk="/srv/tiny/data/deep", site_min_memory_mb=9_999_999, site_name="no-such-host.invalid"
            )
        found = refusals(said)
    finally:
        host.run("systemctl stop squatter; umount /srv/tiny; rmdir /srv/tiny")
    assert code != 0
    memory, disk, port, name = found
    assert re.search(r"found \d+ MB; expected at least 9999999 MB; change the host, or site_min_memory_mb\.", memory)
    assert re.search(r"found [34] MB free for /srv/tiny/data/deep; expected at least 100 MB", disk)
    assert "site_disk" in disk
    assert re.search(r"found 18443 taken by python3 \(pid \d+, squatter\.service\) on ::; .*; change site_port\.", port)
    assert re.search(r"found «no-such-host\.invalid» does not resolve .*; change site_name, ", name)


def test_a_port_in_the_right_hands_passes(host: Any) -> None:
    """Held by a unit that is expected there, in a template's instance and by a child process too."""
    host.check_output("systemd-run --unit=mlflow@7 sh -c 'python3 -m http.server 18443 & wait'")
    host.check_output("timeout 10 sh -c 'until ss -Hltn sport = 18443 | grep -q .; do sleep 0.1; done'")
    try:
        code, said = preflight()
        assert code == 0, said
        code, said = preflight(site_port=22, site_ssh_port=2222)
        assert "taken by sshd" in "".join(refusals(said)), said
    finally:
        host.run("systemctl stop mlflow@7")


def test_another_distribution_is_refused(host: Any) -> None:
    # A bind mount, so that the machine's own file stays.
    host.check_output('printf \'ID=ubuntu\\nVERSION_ID="24.04"\\nPRETTY_NAME="Ubuntu 24.04"\\n\' > /run/other-release')
    host.check_output("mount --bind /run/other-release /usr/lib/os-release")
    try:
        with unchanged(host):
            code, said = preflight()
    finally:
        host.check_output("umount /usr/lib/os-release")
    assert code != 0
    assert "found Ubuntu 24.04; expected Debian 12 or Debian 13; change the host" in "".join(refusals(said))


def test_another_user_than_root_is_refused(host: Any) -> None:
    host.check_output("useradd --create-home plain && cp -r ~root/.ssh /home/plain/ && chown -R plain: /home/plain")
    try:
        code, said = preflight(ansible_user="plain")
    finally:
        host.check_output("loginctl terminate-user plain; userdel --remove --force plain 2>/dev/null; true")
    assert code != 0
    assert "found plain; expected root; change ansible_become or ansible_user" in "".join(refusals(said))

"""What reaches a filtered host, seen from itself and from two others, and what happens when its rules change."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kit import vm

ROOT = pathlib.Path(__file__).parents[3]
VM, FRIEND, STRANGER = "kit-firewall-vm", "kit-firewall-friend", "kit-firewall-stranger"
FAMILIES = pytest.mark.parametrize("family", [4, 6])
ALL = ["22", "443", "5432", "8443", "9000"]
# Admits nobody here; the guard must be set aside, for it would refuse it.
FOREIGN: dict[str, Any] = {"firewall_ssh_allow": ["203.0.113.0/24"], "__firewall_guard": False}
HostOf = Callable[[str], Any]


def address(family: int) -> str:
    """The filtered host's address of an IP version."""
    return vm.addresses(VM)[0 if family == 4 else 1]  # noqa: PLR2004


def answers(host: Any, to: str, *ports: str) -> list[str]:
    """Those of `ports` that answer `host` at the address `to`."""
    found: str = host.check_output("python3 /usr/local/lib/probe.py connect %s " + " ".join(ports or ALL), to)
    return found.split()


def play(check: bool = True, verb: tuple[str, ...] = (), **extra: object) -> subprocess.CompletedProcess[str]:
    """Run the scenario's playbook as an operator would; `extra` are extra variables."""
    done = subprocess.run(argv(*verb, **extra), cwd=ROOT, text=True, capture_output=True)
    if check and done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    return done


def argv(*verb: str, **extra: object) -> list[str]:
    """The command of `play`."""
    here = ROOT / "molecule"
    found = ["ansible-playbook", "-i", str(here / "_shared" / "inventory"), "-i", str(here / "firewall/inventory.yml")]
    return [*found, str(here / "firewall/converge.yml"), *verb, "-e", json.dumps(extra)]


def changes(output: str) -> int:
    """How many tasks changed the filtered host."""
    found = re.search(rf"^{VM}\s.*\bchanged=(\d+)", output, re.MULTILINE)
    assert found, output
    return int(found[1])


def words(output: str) -> str:
    """`output` on one line, as messages may be folded."""
    return " ".join(output.split())


def listing() -> str:
    """The live table, by the engine and not by ssh."""
    return vm.execute(VM, "nft", "-s", "list", "table", "inet", "mlflow_kit")


def abandon(**extra: object) -> None:
    """Start the playbook and kill the controller as soon as it says that the new rules are on trial."""
    before = listing()
    with subprocess.Popen(
        argv(**extra), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as controller:
        assert controller.stdout
        said = []
        for line in controller.stdout:
            said.append(line)
            if line.startswith(f"changed: [{VM}]"):
                os.killpg(controller.pid, signal.SIGKILL)
                break
        else:
            raise AssertionError("the rules never changed: " + "".join(said))
    assert listing() != before
    assert vm.execute(VM, "sh", "-c", "ls /run/mlflow-kit-firewall").count(".previous") == 1


@pytest.fixture
def download(host_of: HostOf) -> Iterator[Callable[[], int]]:
    """A slow download from the filtered host to the stranger; gives how far it has come."""
    stranger = host_of(STRANGER)
    probe = f"/usr/bin/python3 /usr/local/lib/probe.py download {address(6)} 443"
    stranger.check_output(f"systemd-run --collect --unit=kit-download {probe}")
    try:
        yield lambda: progress(stranger)
    finally:
        stranger.run("systemctl stop kit-download")


def progress(host: Any) -> int:
    """The last line of the download in `host`, which must still be running."""
    time.sleep(0.5)
    assert host.run("systemctl is-active kit-download").stdout.strip() == "active"
    return int(host.check_output("cat /run/kit-download"))


def test_a_download_older_than_the_first_rules_goes_on(host_of: HostOf) -> None:
    before = progress(host_of(VM))
    time.sleep(1)
    assert progress(host_of(VM)) > before


@FAMILIES
@pytest.mark.parametrize(
    ("client", "expected"), [(FRIEND, ["22", "443", "9000"]), (STRANGER, ["22", "443"])], ids=["friend", "stranger"]
)
def test_only_what_is_named_answers(host_of: HostOf, family: int, client: str, expected: list[str]) -> None:
    assert answers(host_of(client), address(family)) == expected


@pytest.mark.parametrize("to", ["127.0.0.1", "::1"])
def test_loopback_is_open(host_of: HostOf, to: str) -> None:
    assert answers(host_of(VM), to) == ALL


@FAMILIES
def test_echo_is_answered(host_of: HostOf, family: int) -> None:
    assert host_of(STRANGER).check_output("python3 /usr/local/lib/probe.py ping %s", address(family)) == "pong"


def test_neighbours_are_found_anew(host_of: HostOf) -> None:
    """Neighbour discovery is ICMPv6: a filter that forgets it fails only when the caches are empty."""
    for name in (VM, STRANGER):
        host_of(name).check_output("ip -6 neigh flush dev eth0")
    assert answers(host_of(STRANGER), address(6), "443") == ["443"]


def test_a_change_cuts_nothing_and_touches_no_other_table(host_of: HostOf, download: Callable[[], int]) -> None:
    vm.execute(VM, "nft", "add table ip other; add chain ip other c; add rule ip other c tcp dport 1 counter drop")
    other = vm.execute(VM, "nft", "list", "table", "ip", "other")
    before = download()
    done = play(firewall_public_ports=[443, 8443], verb=("--diff",))
    assert changes(done.stdout) == 1
    assert re.search(r"^\+.*tcp dport \{ 443, 8443 \}", done.stdout, re.MULTILINE), done.stdout
    assert download() > before
    assert answers(host_of(STRANGER), address(4)) == ["22", "443", "8443"]
    assert changes(play(firewall_public_ports=[443, 8443]).stdout) == 0
    assert changes(play().stdout) == 1
    assert download() > before
    assert answers(host_of(STRANGER), address(4)) == ["22", "443"]
    assert vm.execute(VM, "nft", "list", "table", "ip", "other") == other
    vm.execute(VM, "nft", "delete table ip other")


def test_ssh_can_be_closed_to_all_but_the_controller(host_of: HostOf) -> None:
    controllers = vm.gateways("kit-firewall")
    play(firewall_ssh_allow=[f"{controller}/32" for controller in controllers if ":" not in controller])
    assert answers(host_of(FRIEND), address(4), "22", "443") == ["443"]
    assert answers(host_of(FRIEND), address(6), "22", "443") == ["443"]
    assert host_of(VM).check_output("echo in") == "in"
    play()


def test_what_another_hand_changed_is_put_right(host_of: HostOf) -> None:
    good = listing()
    vm.execute(VM, "nft", "insert rule inet mlflow_kit input tcp dport 5432 accept")
    assert answers(host_of(STRANGER), address(4), "5432") == ["5432"]
    live = listing()
    assert changes(play(verb=("--check",)).stdout) == 1
    assert listing() == live
    assert changes(play().stdout) == 1
    assert listing() == good
    vm.execute(VM, "nft", "flush ruleset")
    assert answers(host_of(STRANGER), address(4), "5432") == ["5432"]
    assert changes(play().stdout) == 1
    assert listing() == good
    assert answers(host_of(STRANGER), address(4), "5432") == []


def test_the_distributions_service_may_come_and_go() -> None:
    """It flushes every table each time, this one too."""
    good = listing()
    for verb in ("start", "reload", "restart", "stop"):
        vm.execute(VM, "systemctl", verb, "nftables.service")
        assert listing() == good, verb


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"firewall_ssh_port": 2222}, "firewall_ssh_port: found 2222; expected 22, the port of the sshd"),
        ({"firewall_ssh_allow": ["203.0.113.0/24"]}, "firewall_ssh_allow: found 203.0.113.0/24; expected a network"),
        (
            {"firewall_ssh_allow": ["10.0.0.1/8"], "firewall_public_ports": [0]},
            "expected a port from 1 to 65535",
        ),
    ],
)
def test_what_would_shut_out_or_is_malformed_changes_nothing(extra: dict[str, Any], expected: str) -> None:
    before = listing()
    done = play(check=False, **extra)
    assert done.returncode
    assert expected in words(done.stdout)
    assert changes(done.stdout) == 0
    assert listing() == before


def test_a_port_that_a_public_rule_opens_needs_no_ssh_rule(host_of: HostOf) -> None:
    play(firewall_public_ports=[22, 443], firewall_ssh_port=2222)
    assert answers(host_of(STRANGER), address(4), "22") == ["22"]
    play()


def test_rules_that_shut_out_the_controller_are_taken_back(host_of: HostOf, download: Callable[[], int]) -> None:
    good, before = listing(), download()
    started = time.monotonic()
    done = play(check=False, firewall_rollback_seconds=20, **FOREIGN)
    assert time.monotonic() - started > 15  # noqa: PLR2004
    assert done.returncode
    said = words(done.stdout)
    assert "The new rules were taken back, and those from before are in force." in said
    assert "to port 22 could be confirmed within 20 s" in said
    assert "Change firewall_ssh_port, firewall_ssh_allow" in said
    assert "UNREACHABLE" not in said
    assert listing() == good
    assert host_of(VM).check_output("echo in") == "in"
    assert answers(host_of(STRANGER), address(4), "22", "443", "5432") == ["22", "443"]
    assert download() > before
    again = play()
    assert changes(again.stdout) == 0
    assert "Rules of an earlier run were taken back at" in words(again.stdout + again.stderr)
    assert "taken back" not in words(play().stdout)


def test_a_trial_without_its_controller_ends_by_itself(host_of: HostOf) -> None:
    good = listing()
    abandon(firewall_rollback_seconds=20, **FOREIGN)
    assert answers(host_of(FRIEND), address(4), "22") == []
    end = time.monotonic() + 30
    while listing() != good:
        assert time.monotonic() < end, "the rules were not taken back"
        time.sleep(0.5)
    assert answers(host_of(FRIEND), address(4), "22") == ["22"]
    again = play()
    assert "Rules of an earlier run were taken back at" in words(again.stdout + again.stderr)


def test_a_rerun_does_not_take_an_abandoned_trial_for_confirmed() -> None:
    good = listing()
    abandon(firewall_rollback_seconds=300, firewall_public_ports=[443, 8443])
    again = play()
    assert "were never confirmed by a new connection" in words(again.stdout + again.stderr)
    assert listing() == good
    assert vm.execute(VM, "systemctl", "list-units", "--all", "--plain", "--no-legend", "*rollback*") == ""


def test_rules_hold_after_a_reboot_and_those_on_trial_do_not(host_of: HostOf) -> None:
    good = listing()
    abandon(firewall_rollback_seconds=300, **FOREIGN)
    vm.restart(VM)
    assert listing() == good
    assert answers(host_of(FRIEND), address(4)) == ["22", "443", "9000"]
    assert answers(host_of(STRANGER), address(6)) == ["22", "443"]
    assert changes(play().stdout) == 0


def test_it_can_be_switched_off_and_on_again(host_of: HostOf) -> None:
    assert changes(play(firewall_enabled=False, verb=("--check",)).stdout) == 1
    assert changes(play(firewall_enabled=False).stdout) == 1
    assert answers(host_of(STRANGER), address(4)) == ALL
    assert vm.execute(VM, "nft", "list", "ruleset") == ""
    assert changes(play(firewall_enabled=False).stdout) == 0
    play()
    assert answers(host_of(STRANGER), address(4)) == ["22", "443"]
    assert changes(play().stdout) == 0

"""What the role refuses on the controller, value by value."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import pytest

PATH = pathlib.Path(__file__).parents[3] / "roles" / "firewall" / "filter_plugins" / "firewall.py"
SPEC = importlib.util.spec_from_file_location("kit_firewall_filters", PATH)
assert SPEC
assert SPEC.loader
filters: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(filters)

GOOD: dict[str, Any] = {
    "ssh_port": 22,
    "ssh_allow": ["10.0.0.0/8", "2001:db8::/32", "192.0.2.1", "0.0.0.0/0", "::/0"],
    "public_ports": [443, "80", "8000-8010"],
    "internal": [{"ports": [5432], "sources": ["10.1.0.0/16", "fd00::1/128"], "description": "la base d'été"}],
    "trusted_interfaces": ["docker0", "podman*", "eth0.100"],
    "rollback_seconds": 60,
}
ENTRY = GOOD["internal"][0]


def test_what_is_right_has_no_fault() -> None:
    assert filters.firewall_faults(GOOD) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ssh_port", 0, "firewall_ssh_port: found 0; expected one port from 1 to 65535"),
        ("ssh_port", 70000, "found 70000"),
        ("ssh_port", "22-23", "found '22-23'"),
        ("ssh_port", True, "found True"),
        ("ssh_allow", "10.0.0.0/8", "firewall_ssh_allow: found '10.0.0.0/8'; expected a list"),
        ("ssh_allow", ["10.0.0.1/8"], "found '10.0.0.1/8'; expected an IPv4 or IPv6 network"),
        ("ssh_allow", ["10.0.0.1/8"], "such as 10.0.0.0/8"),
        ("ssh_allow", ["2001:db8::1/32"], "such as 2001:db8::/32"),
        ("ssh_allow", ["10.0.0.0/33"], "found '10.0.0.0/33'"),
        ("ssh_allow", ["office"], "found 'office'"),
        ("ssh_allow", [42], "found 42"),
        ("public_ports", [443, 0], "firewall_public_ports: found 0"),
        ("public_ports", ["90-80"], "found '90-80'"),
        ("public_ports", ["https"], "found 'https'"),
        ("public_ports", [443.5], "found 443.5"),
        ("public_ports", 443, "found 443; expected a list"),
        ("internal", {}, "firewall_internal: found {}; expected a list"),
        ("internal", ["5432"], "firewall_internal[0]: found '5432'; expected a mapping"),
        ("internal", [ENTRY, {**ENTRY, "ports": []}], "firewall_internal[1].ports: found []"),
        ("internal", [{**ENTRY, "ports": [65536]}], "firewall_internal[0].ports: found 65536"),
        ("internal", [{**ENTRY, "sources": []}], "firewall_internal[0].sources: found []"),
        ("internal", [{**ENTRY, "sources": ["10.0.0.9/24"]}], "firewall_internal[0].sources: found '10.0.0.9/24'"),
        ("internal", [{**ENTRY, "port": 1}], "found the key 'port'"),
        (
            "internal",
            [{**ENTRY, "protocol": "sctp"}],
            "firewall_internal[0].protocol: found 'sctp'; expected tcp or udp",
        ),
        ("internal", [{**ENTRY, "description": 'a" accept; flush'}], "firewall_internal[0].description"),
        ("internal", [{**ENTRY, "description": "two\nlines"}], "firewall_internal[0].description"),
        ("internal", [{**ENTRY, "description": "é" * 51}], "at most 100 bytes"),
        ("trusted_interfaces", ['eth0" accept'], "firewall_trusted_interfaces: found"),
        ("trusted_interfaces", ["*"], "firewall_trusted_interfaces: found '*'"),
        ("trusted_interfaces", ["a-name-that-is-too-long"], "at most 15 characters"),
        ("rollback_seconds", 5, "firewall_rollback_seconds: found 5; expected 20 to 600"),
        ("rollback_seconds", "soon", "found 'soon'"),
    ],
)
def test_what_is_wrong_is_named(key: str, value: object, words: str) -> None:
    faults = filters.firewall_faults({**GOOD, key: value})
    assert len(faults) == 1
    assert words in faults[0]


def test_all_faults_come_at_once() -> None:
    assert len(filters.firewall_faults({**GOOD, "ssh_port": 0, "public_ports": [0, -1], "ssh_allow": ["x"]})) == 4  # noqa: PLR2004


def test_what_overlaps_is_merged() -> None:
    networks = ["10.0.0.0/8", "10.1.0.0/16", "2001:db8::/32", "2001:db8:1::/48", "192.0.2.0/25", "192.0.2.128/25"]
    assert filters.firewall_networks(networks, 4) == ["10.0.0.0/8", "192.0.2.0/24"]
    assert filters.firewall_networks(networks, 6) == ["2001:db8::/32"]
    assert filters.firewall_ports([443, "80", 81, "8000-8010", "8005-8020", 443]) == ["80-81", "443", "8000-8020"]

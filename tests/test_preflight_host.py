"""How the role preflight reads a host: the kernel's tables of sockets and control groups, disks and names."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import socket
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

PATH = pathlib.Path(__file__).parents[1] / "roles" / "preflight" / "library" / "preflight_host.py"
PARAMS: dict[str, Any] = {
    "distributions": {"debian": ["12", "13"]},
    "architectures": ["x86_64", "aarch64"],
    "min_memory_mb": 1,
    "min_disk_mb": 0,
    "disk_paths": ["/var/lib"],
    "ports": [],
    "public_name": "127.0.0.1",
    "variable_names": {"min_memory_mb": "site_memory", "disk_paths": "site_paths", "public_name": "site_name"},
}


def load() -> ModuleType:
    """Import the module from its file."""
    spec = importlib.util.spec_from_file_location("kit_preflight_host", PATH)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


look = load()


@pytest.fixture(params=["127.0.0.1", "::1"])
def listening(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """An address and a port on which this process listens."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    try:
        server = socket.create_server((request.param, 0), family=family)
    except OSError:
        pytest.skip(f"no {request.param} here")
    with server:
        yield request.param, server.getsockname()[1]


def test_a_listener_is_found_with_its_process(listening: tuple[str, int]) -> None:
    address, port = listening
    wanted = [{"variable": "site_port", "port": port, "units": ["other.service"]}]
    (fault,) = look.check_ports(wanted)
    assert fault["found"].startswith(f"{port} taken by ")
    assert f"(pid {os.getpid()}, " in fault["found"]
    assert fault["found"].endswith(f" on {address}")
    assert fault["variable"] == "site_port"


def test_a_listener_in_an_expected_unit_passes(listening: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "unit_of", lambda _text: "mlflow@3.service")
    wanted = [{"variable": "site_port", "port": listening[1], "units": ["nginx.service", "mlflow@*.service"]}]
    assert list(look.check_ports(wanted)) == []


def test_a_free_port_passes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert list(look.check_ports([{"variable": "site_port", "port": port, "units": []}])) == []


@pytest.mark.skipif(sys.byteorder != "little", reason="the examples are a little-endian kernel's")
@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0100007F", "127.0.0.1"),
        ("00000000", "0.0.0.0"),
        ("00000000000000000000000001000000", "::1"),
        ("B80D012000000000000000000000FEFF", "2001:db8::fffe:0"),
    ],
)
def test_addresses_of_the_kernel(text: str, address: str) -> None:
    assert look.address_of(text) == address


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("0::/system.slice/nginx.service\n", "nginx.service"),
        ("0::/system.slice/system-postgresql.slice/postgresql@17-main.service\n", "postgresql@17-main.service"),
        ("0::/user.slice/user-0.slice/session-3.scope\n", "session-3.scope"),
        ("0::/user.slice/user-0.slice/user@0.service/app.slice/x.service\n", "x.service"),
        ("4:memory:/a\n1:name=systemd:/machine/abc/system.slice/ssh.service\n0::/\n", "ssh.service"),
        ("4:memory:/fake.service\n0::/\n", ""),
        ("0::/\n", ""),
        ("", ""),
    ],
)
def test_units_of_control_groups(text: str, unit: str) -> None:
    assert look.unit_of(text) == unit


def test_a_file_system_is_refused_once_and_by_the_nearest_parent(tmp_path: pathlib.Path) -> None:
    paths = [str(tmp_path / "a" / "b"), str(tmp_path)]
    (fault,) = look.check_disk({**PARAMS, "disk_paths": paths, "min_disk_mb": 10**12})
    assert f"MB free for {paths[0]} and {paths[1]}" in fault["found"]
    assert "site_paths" in fault["variable"]
    assert list(look.check_disk({**PARAMS, "disk_paths": paths})) == []


def test_memory() -> None:
    assert list(look.check_memory(PARAMS)) == []
    (fault,) = look.check_memory({**PARAMS, "min_memory_mb": 10**12})
    assert fault["variable"] == "the host, or site_memory"


@pytest.mark.parametrize("name", ["", "localhost", "192.0.2.1", "2001:db8::1"])
def test_names_that_pass(name: str) -> None:
    assert list(look.check_name({**PARAMS, "public_name": name})) == []


@pytest.mark.parametrize("name", ["no-such-host.invalid", "a" * 64 + ".invalid"])
def test_names_that_do_not_resolve(name: str) -> None:
    (fault,) = look.check_name({**PARAMS, "public_name": name})
    assert fault["variable"] == "site_name, DNS or /etc/hosts"


@pytest.mark.parametrize(
    ("release", "refused"),
    [
        ({"ID": "debian", "VERSION_ID": "12"}, False),
        ({"ID": "debian", "VERSION_ID": "13.1"}, False),
        ({"ID": "debian", "VERSION_ID": "11"}, True),
        ({"ID": "debian"}, True),
        ({"ID": "ubuntu", "VERSION_ID": "24.04", "ID_LIKE": "debian"}, True),
        ({}, True),
    ],
)
def test_distributions(release: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look.platform, "freedesktop_os_release", lambda: release)
    found = [f for f in look.check_system(PARAMS) if f["subject"] == "distribution"]
    assert bool(found) == refused
    assert not found or found[0]["expected"] == "Debian 12 or Debian 13"


def test_architecture_and_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(look.os, "geteuid", lambda: 1)
    found = {f["subject"]: f["found"] for f in look.check_system(PARAMS)}
    assert found["architecture"] == "riscv64"
    assert "user" in found

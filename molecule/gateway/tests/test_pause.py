"""Writes wait at the gateway for a while; reads, artifacts and whoever may not enter get what they always get."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest

GATEWAY, FRIEND, STRANGER = "kit-gateway-vm", "kit-gateway-friend", "kit-gateway-stranger"
ADA = ("-u", "ada:correct horse: battery$staple")
API = "/api/2.0/mlflow"
HostOf = Callable[[str], Any]


@pytest.fixture(scope="module", autouse=True)
def pause(host_of: HostOf) -> Iterator[None]:
    """Writes wait, for a client to try again after 7 s."""
    host_of(GATEWAY).check_output("mlflow-kit-pause on 7")
    yield
    host_of(GATEWAY).check_output("mlflow-kit-pause off")


def ask(host: Any, method: str, path: str, *options: str) -> tuple[str, str]:
    """The status and Retry-After that a request is answered with."""
    words = " ".join(shlex.quote(word) for word in ("-X", method, *options))
    shown = "-o /dev/null -w '%{http_code} %header{retry-after}'"
    out = host.check_output(f"curl -sS -4 --cacert /root/ca.crt {shown} {words} 'https://gateway.test{path}'")
    status, _, after = out.strip().partition(" ")
    return status, after


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"{API}/runs/create"),
        ("POST", f"{API}/runs/log-batch"),
        ("PATCH", f"{API}/registered-models/update"),
        ("DELETE", f"{API}/registered-models/delete"),
        ("POST", "/ajax-api/2.0/mlflow/experiments/create"),
        ("POST", "/v1/traces"),
    ],
)
def test_a_write_is_told_to_come_again(host_of: HostOf, method: str, path: str) -> None:
    assert ask(host_of(FRIEND), method, path, *ADA) == ("503", "7")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", f"{API}/runs/get?run_id=1"),
        ("POST", f"{API}/runs/search"),
        ("POST", "/ajax-api/2.0/mlflow/experiments/search-datasets"),
        ("POST", "/api/3.0/mlflow/traces/search"),
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/1/x"),
        ("GET", "/health"),
    ],
)
def test_a_read_goes_on(host_of: HostOf, method: str, path: str) -> None:
    assert ask(host_of(FRIEND), method, path, *ADA) == ("200", "")


def test_who_may_not_enter_learns_nothing(host_of: HostOf) -> None:
    """The allowlist and the credentials come first."""
    assert ask(host_of(STRANGER), "POST", f"{API}/runs/create", *ADA)[0] == "403"
    assert ask(host_of(FRIEND), "POST", f"{API}/runs/create")[0] == "401"
    assert ask(host_of(FRIEND), "POST", f"{API}/runs/create", "-u", "ada:wrong")[0] == "401"


def test_it_holds_over_a_restart_and_ends(host_of: HostOf) -> None:
    """A pause is a file; its end tells how long it was."""
    gateway, friend = host_of(GATEWAY), host_of(FRIEND)
    gateway.check_output("systemctl restart nginx")
    assert ask(friend, "POST", f"{API}/runs/create", *ADA)[0] == "503"
    assert float(gateway.check_output("mlflow-kit-pause off")) > 0
    assert ask(friend, "POST", f"{API}/runs/create", *ADA) == ("200", "")
    assert gateway.check_output("mlflow-kit-pause status") == ""

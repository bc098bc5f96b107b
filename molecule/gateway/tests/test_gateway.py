"""What the gateway does for clients at different addresses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

GATEWAY, FRIEND, STRANGER = "kit-gateway-vm", "kit-gateway-friend", "kit-gateway-stranger"
ADA, WRONG = "ada:correct horse: battery$staple", "ada:wrong"
SIGNED = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=0123456789abcdef"
SIGV4 = "AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0a"
HostOf = Callable[[str], Any]


def curl(host: Any, path: str, *more: str, family: str = "-4") -> tuple[str, str]:
    """Ask the gateway for `path` and return status and body."""
    quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in more)
    url = f"https://gateway.test{path}"
    done = host.run(f"curl -sS {family} --cacert /root/ca.crt -w '\\n%{{http_code}}' {quoted} '{url}'")
    body, _, status = done.stdout.rpartition("\n")
    return status, body


@pytest.mark.parametrize("family", ["-4", "-6"])
@pytest.mark.parametrize(
    ("client", "path", "options", "status"),
    [
        (FRIEND, "/", ["-u", ADA], "200"),
        (FRIEND, "/", ["-u", "grace:zweites-Kennwort-0"], "200"),
        (FRIEND, "/", ["-u", WRONG], "401"),
        (FRIEND, "/", ["-u", "nobody:at all"], "401"),
        (FRIEND, "/", [], "401"),
        (FRIEND, "/api/2.0/mlflow/experiments/search", ["-u", ADA], "200"),
        (FRIEND, "/models/a/b", [], "403"),
        (FRIEND, "/models", [], "403"),
        (FRIEND, f"/models/a/b?{SIGNED}", [], "200"),
        (FRIEND, "/models/a/b", ["-H", f"Authorization: {SIGV4}"], "200"),
        (FRIEND, "/models/a/b", ["-u", ADA], "403"),
        (FRIEND, "/models/a/b?x-X-Amz-Signature=", [], "403"),
        (FRIEND, "/models-of-others/x", [], "401"),
        (STRANGER, "/", ["-u", ADA], "403"),
        (STRANGER, "/", [], "403"),
        (STRANGER, "/health", [], "403"),
        (STRANGER, f"/models/a/b?{SIGNED}", [], "403"),
        (STRANGER, "/", ["-u", ADA, "-H", "X-Forwarded-For: 127.0.0.1"], "403"),
        (STRANGER, "/", ["-u", ADA, "-H", "X-Real-IP: 127.0.0.1"], "403"),
    ],
)
def test_who_gets_what(host_of: HostOf, client: str, path: str, options: list[str], status: str, family: str) -> None:
    """The table of clients, credentials and paths."""
    assert curl(host_of(client), path, *options, family=family)[0] == status


def test_the_store_sees_what_was_signed(host_of: HostOf) -> None:
    """Host, path and query of a signed request reach the store untouched."""
    _, body = curl(host_of(FRIEND), f"/models/a%2Fb%20c/d?{SIGNED}&x-id=GetObject")
    told = json.loads(body)
    assert told["port"] == 8080
    assert told["path"] == f"/models/a%2Fb%20c/d?{SIGNED}&x-id=GetObject"
    assert told["headers"]["Host"] == "gateway.test"


def test_the_password_ends_at_the_gateway(host_of: HostOf) -> None:
    """The server behind sees who asks from where, and no password."""
    _, body = curl(host_of(FRIEND), "/x", "-u", ADA, "-H", "X-Forwarded-For: 10.9.9.9")
    headers = json.loads(body)["headers"]
    assert "Authorization" not in headers
    assert "10.9.9.9" not in headers["X-Forwarded-For"]
    assert headers["Host"] == "gateway.test"
    assert headers["X-Request-ID"]


def test_both_instances_serve_and_one_is_enough(host_of: HostOf) -> None:
    """Requests reach both instances; with one of them dead none fails."""
    friend, gateway = host_of(FRIEND), host_of(GATEWAY)
    ports = {json.loads(curl(friend, "/", "-u", ADA)[1])["port"] for _ in range(8)}
    assert ports == {5001, 5002}
    gateway.check_output("kill -9 $(systemctl show -p MainPID --value upstream-5001)")
    answers = [curl(friend, "/", "-u", ADA, "-X", verb)[0] for verb in ("GET", "POST") * 10]
    assert answers == ["200"] * 20


def test_large_bodies_pass(host_of: HostOf) -> None:
    """Half a gigabyte goes up without a limit, whole."""
    friend = host_of(FRIEND)
    friend.check_output("head -c 500000000 /dev/urandom > /root/large")
    status, body = curl(friend, f"/models/large?{SIGNED}", "-T", "/root/large")
    assert status == "200"
    assert json.loads(body)["sha256"] == friend.check_output("sha256sum /root/large").split()[0]


def test_nothing_secret_is_logged(host_of: HostOf) -> None:
    """The log names the user and the path, and holds no password and no signature."""
    gateway = host_of(GATEWAY)
    curl(host_of(FRIEND), "/seen?token=hidden", "-u", ADA)
    journal = gateway.check_output("sleep 0.5; journalctl -t gateway -o cat --no-pager")
    lines = [json.loads(line) for line in journal.splitlines() if line.startswith("{")]
    assert any(line["user"] == "ada" and line["path"] == "/seen" for line in lines)
    for secret in ("correct horse", "0123456789abcdef", "hidden", "Signature"):
        assert secret not in journal


@pytest.mark.parametrize(
    ("options", "works"), [("--tls-max 1.1", False), ("--tls-max 1.2", True), ("--tlsv1.3", True), ("--http2", True)]
)
def test_only_modern_tls(host_of: HostOf, options: str, works: bool) -> None:
    """TLS 1.2 and 1.3 and HTTP/2, nothing older."""
    done = host_of(FRIEND).run(f"curl -sf {options} --cacert /root/ca.crt -u '{ADA}' https://gateway.test/")
    assert (done.rc == 0) is works


def test_the_certificate_is_checked_against_the_authority(host_of: HostOf) -> None:
    """A client that does not know the authority refuses."""
    assert host_of(FRIEND).run("curl -s https://gateway.test/").rc == 60


def test_files_are_closed(host_of: HostOf) -> None:
    """The key is root's alone, and the hashes are not for everybody."""
    gateway = host_of(GATEWAY)
    assert gateway.file("/etc/nginx/mlflow-kit/tls.key").mode == 0o600
    assert gateway.file("/etc/nginx/mlflow-kit/users").mode == 0o640


def test_it_comes_back_after_a_crash(host_of: HostOf) -> None:
    """A worker that is killed is replaced without a failed request."""
    gateway = host_of(GATEWAY)
    gateway.check_output("pkill -9 -f 'nginx: worker'")
    assert curl(host_of(FRIEND), "/", "-u", ADA)[0] == "200"

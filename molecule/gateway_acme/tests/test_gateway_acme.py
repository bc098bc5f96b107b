"""A certificate by ACME: got, renewed under load, asked of another service, and not got."""

from __future__ import annotations

import datetime
import http.client
import json
import pathlib
import re
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kit import vm

ROOT = pathlib.Path(__file__).parents[3]
GATEWAY, ISSUER, NAME = "kit-gateway-acme-vm", "kit-gateway-acme-issuer", "acme.test"
STATE = "find /etc/nginx /etc/letsencrypt/live -type f -o -type l | sort | xargs sha256sum | sha256sum"
HostOf = Callable[[str], Any]


@pytest.fixture(scope="module")
def trust(host_of: HostOf) -> ssl.SSLContext:
    """A client's trust in the issuer's root and in nothing else."""
    root = host_of(ISSUER).check_output("curl -sS --cacert /etc/pebble/ca.crt https://$(hostname):15000/roots/0")
    return ssl.create_default_context(cadata=root)


def connect(trust: ssl.SSLContext, family: int = 0) -> http.client.HTTPSConnection:
    """A connection from this machine, which may enter, to the gateway under its public name."""
    address = vm.addresses(GATEWAY)[family]
    connection = http.client.HTTPSConnection(NAME, context=trust, timeout=10)
    connection.sock = trust.wrap_socket(socket.create_connection((address, 443), 10), server_hostname=NAME)
    return connection


def served(trust: ssl.SSLContext, family: int = 0) -> x509.Certificate:
    """The certificate that the gateway shows, after the client has verified it."""
    connection = connect(trust, family)
    der = connection.sock.getpeercert(binary_form=True)
    connection.close()
    assert der
    return x509.load_der_x509_certificate(der)


def status(host: Any, url: str, *options: str) -> str:
    """Status and target of a redirect of `url`, asked by `host`."""
    words = " ".join(options)
    return str(host.check_output(f"curl -sk -o /dev/null -w '%{{http_code}} %{{redirect_url}}' {words} {url}")).strip()


class Asker:
    """Asks the gateway without end, by new connections and by kept ones, until it is told to stop."""

    def __init__(self, trust: ssl.SSLContext) -> None:
        self.trust = trust
        self.answers: Counter[str] = Counter()
        self.serials: list[int] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=(kept,)) for kept in (True, False)]
        for thread in self.threads:
            thread.start()

    def ask(self, kept: bool) -> None:
        """Ask until the end and count the answers."""
        connection = None
        while not self.over.is_set():
            fresh = connection is None
            try:
                if connection is None:
                    connection = connect(self.trust)
                    der = connection.sock.getpeercert(binary_form=True)
                    self.serials.append(x509.load_der_x509_certificate(der or b"").serial_number)
                connection.request("GET", "/x")
                answer = connection.getresponse()
                answer.read()
                self.answers[str(answer.status)] += 1
                if answer.will_close or not kept:
                    connection.close()
                    connection = None
            except OSError as error:
                # A server may close a connection that was idle: every client asks again on a new one.
                gone = isinstance(error, (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError))
                self.answers["closed" if gone and not fresh else repr(error)] += 1
                connection = None
            time.sleep(0.02)

    def stop(self) -> Counter[str]:
        """End, and return how often each answer came; "closed" is a kept connection that ended between requests."""
        self.over.set()
        for thread in self.threads:
            thread.join()
        return self.answers


@pytest.fixture
def asker(trust: ssl.SSLContext) -> Iterator[Asker]:
    """Somebody who keeps asking."""
    it = Asker(trust)
    time.sleep(0.5)
    yield it
    it.stop()


def converge(check: bool = True, **changes: Any) -> str:
    """Converge again with changed variables and return the output in one line."""
    argv = ["molecule", "converge", "-s", "gateway_acme", "--", "-e", json.dumps(changes)]
    done = subprocess.run(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode == 0) is check, done.stdout[-8000:]
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|│", " ", done.stdout).split())


def no_request_failed(asker: Asker) -> None:
    """Stop asking; every request was answered with 200."""
    answers = asker.stop()
    print(dict(answers))
    assert answers["200"] > 50
    assert set(answers) <= {"200", "closed"}


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_the_certificate_is_the_issuers(trust: ssl.SSLContext, family: int) -> None:
    """Verified by the issuer's root alone, and for the name alone."""
    certificate = served(trust, family)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME]
    assert "Pebble" in certificate.issuer.rfc4514_string()


def test_port_80_leads_who_may_enter_to_https_and_nobody_else(host_of: HostOf) -> None:
    """The gateway itself may enter, the issuer may not, save for the challenge."""
    gateway, issuer = host_of(GATEWAY), host_of(ISSUER)
    plain = f"http://{NAME}/a?b=c"
    address = vm.addresses(GATEWAY)[0]
    done = http.client.HTTPConnection(address, 80, timeout=10)
    done.request("GET", "/a?b=c", headers={"Host": NAME})
    answer = done.getresponse()
    assert (answer.status, answer.headers["Location"]) == (301, f"https://{NAME}/a?b=c")
    for family in ("-4", "-6"):
        assert status(issuer, plain, family) == "403"
        assert status(issuer, f"https://{NAME}/", family) == "403"
        # Nobody answers the challenge now; what matters is that it is not refused.
        assert status(issuer, f"http://{NAME}/.well-known/acme-challenge/x", family) == "502"
    assert gateway.run("ss -ltnH sport = :8402").stdout == ""


def test_a_renewal_by_its_timer_costs_no_request(host_of: HostOf, trust: ssl.SSLContext, asker: Asker) -> None:
    """The timer's own service, told not to wait for the last month, brings a new certificate into use."""
    gateway = host_of(GATEWAY)
    assert gateway.service("certbot.timer").is_enabled
    assert gateway.service("certbot.timer").is_running
    before = served(trust).serial_number
    # The distribution's own command with one word more.
    gateway.check_output(
        "d=/run/systemd/system/certbot.service.d; mkdir -p $d;"
        "c=$(sed -n 's/^ExecStart=//p' /usr/lib/systemd/system/certbot.service /lib/systemd/system/certbot.service"
        " 2>/dev/null | head -1);"
        "printf '[Service]\\nExecStart=\\nExecStart=%s --force-renewal\\n' \"$c\" > $d/zz-now.conf;"
        "systemctl daemon-reload"
    )
    try:
        gateway.check_output("systemctl start certbot.service")
    finally:
        gateway.check_output("rm -r /run/systemd/system/certbot.service.d; systemctl daemon-reload")
    time.sleep(1)
    after = served(trust).serial_number
    no_request_failed(asker)
    assert after != before
    assert asker.serials[0] == before
    assert asker.serials[-1] == after


def test_a_service_that_does_not_answer_changes_nothing(host_of: HostOf, trust: ssl.SSLContext) -> None:
    """The run tells which service gave no certificate and why; files and gateway stay as they were."""
    gateway = host_of(GATEWAY)
    before = gateway.check_output(STATE)
    out = converge(check=False, gateway_acme_directory_url=f"https://{ISSUER}:1/dir")
    assert f"https://{ISSUER}:1/dir gave no certificate for {NAME}" in out
    assert "Connection refused" in out
    assert gateway.check_output(STATE) == before
    gateway.check_output("nginx -t -q")
    served(trust)


def test_another_service_is_asked_when_another_is_named(host_of: HostOf, trust: ssl.SSLContext, asker: Asker) -> None:
    """From a service for trials to the real one: its certificate replaces the first, without a failed request."""
    before = served(trust).serial_number
    converge(gateway_acme_directory_url="https://other-issuer.test:14000/dir")
    no_request_failed(asker)
    assert served(trust).serial_number != before


def own_certificate() -> tuple[str, str]:
    """A self-signed certificate for the name and its key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=9))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    return (
        builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode(),
        key.private_bytes(serialization.Encoding.PEM, form, plain).decode(),
    )


def test_from_files_to_acme_while_it_serves(host_of: HostOf, trust: ssl.SSLContext) -> None:
    """A gateway that holds port 80 and a certificate of its own moves to ACME without a failed request."""
    gateway = host_of(GATEWAY)
    certificate, key = own_certificate()
    converge(
        gateway_tls_mode="files",
        gateway_redirect_port=80,
        gateway_tls_certificate=certificate,
        gateway_tls_private_key=key,
    )
    gateway.check_output(f"certbot delete -n --cert-name {NAME}")
    both = ssl.create_default_context(cadata=certificate)
    both.load_verify_locations(
        cadata=host_of(ISSUER).check_output("curl -sS --cacert /etc/pebble/ca.crt https://$(hostname):15000/roots/0")
    )
    asker = Asker(both)
    try:
        time.sleep(0.5)
        converge()
    finally:
        asker.stop()
    no_request_failed(asker)
    assert "Pebble" in served(trust).issuer.rfc4514_string()
    assert gateway.run("nginx -t -q").rc == 0

"""What is said of a certificate that a site was given, before a host sees it."""

from __future__ import annotations

import datetime
import importlib.util
import pathlib
import sys
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PLUGIN = pathlib.Path(__file__).parents[1] / "roles" / "preflight" / "filter_plugins" / "preflight.py"
spec = importlib.util.spec_from_file_location("kit_preflight_certificate", PLUGIN)
assert spec and spec.loader
plugin = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = plugin
spec.loader.exec_module(plugin)

KEY, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())


def key(of: ec.EllipticCurvePrivateKey, passphrase: bytes = b"") -> str:
    """A private key in PEM."""
    kind = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return of.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, kind).decode()


def certificate(*names: str, begins: int = -1, ends: int = 30) -> str:
    """A certificate in PEM for `names`, valid from `begins` to `ends` days from now."""
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mlflow.example.org")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(KEY.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=begins))
        .not_valid_after(now + datetime.timedelta(days=ends))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def faults(pem: str, private: str, name: str = "mlflow.example.org") -> list[dict[str, Any]]:
    """What the check has to say."""
    given = {"certificate": pem, "private_key": private, "name": name}
    given |= {"certificate_variable": "site_tls_certificate", "private_key_variable": "site_tls_private_key"}
    return list(plugin.certificate(plugin.Inventory({"certificate": given})))


@pytest.mark.parametrize("names", [("mlflow.example.org",), ("other.org", "*.example.org"), ("MLflow.Example.org",)])
def test_one_that_fits_passes(names: tuple[str, ...]) -> None:
    assert faults(certificate(*names), key(KEY)) == []


def test_none_is_asked_for() -> None:
    assert list(plugin.certificate(plugin.Inventory({"certificate": {}}))) == []


@pytest.mark.parametrize(
    ("pem", "private", "found", "variable"),
    [
        ("", key(KEY), "nothing", "site_tls_certificate"),
        ("nonsense", key(KEY), "8 characters that are no certificate", "site_tls_certificate"),
        (certificate("mlflow.example.org", begins=-9, ends=-1), key(KEY), "one valid from", "site_tls_certificate"),
        (certificate("mlflow.example.org", begins=1), key(KEY), "one valid from", "site_tls_certificate"),
        (certificate("*.other.org", "a.org"), key(KEY), "one for *.other.org, a.org", "site_tls_certificate"),
        (certificate("*.mlflow.example.org"), key(KEY), "one for *.mlflow", "site_tls_certificate"),
        (certificate(), key(KEY), "one for no name at all", "site_tls_certificate"),
        (certificate("mlflow.example.org"), "", "nothing", "site_tls_private_key"),
        (certificate("mlflow.example.org"), key(KEY, b"secret"), "text that is no private key", "site_tls_private_key"),
        (
            certificate("mlflow.example.org"),
            key(OTHER),
            "one that the certificate was not made for",
            "site_tls_certificate or site_tls_private_key",
        ),
    ],
    # Certificates are made anew in each process: as names they would differ from worker to worker.
    ids=lambda value: "pem" if "-----BEGIN" in value else value or "nothing",
)
def test_one_that_does_not_fit_is_refused_by_name(pem: str, private: str, found: str, variable: str) -> None:
    (fault,) = faults(pem, private)
    assert fault["found"].startswith(found)
    assert fault["variable"] == variable
    assert "PRIVATE" not in str(fault)

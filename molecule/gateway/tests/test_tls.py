"""The gateway's TLS as an independent scanner, sslyze, finds it."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from kit import vm

LOCK = pathlib.Path(__file__).parents[3] / "requirements" / "tls.txt"
GATEWAY, FRIEND, NAME = "kit-gateway-vm", "kit-gateway-friend", "gateway.test"
STRONG_CURVES = {"X25519", "X448", "secp256r1", "secp384r1", "secp521r1"}


class Scan(NamedTuple):
    """What the scanner found, and in what it differs from Mozilla's intermediate profile."""

    found: dict[str, Any]
    differences: dict[str, str]


def scanner() -> pathlib.Path:
    """The Python of an environment with the scanner alone, made once for each lock file."""
    home = vm.CACHE / f"tls-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        uv = shutil.which("uv") or str(pathlib.Path(sys.executable).with_name("uv"))
        index = vm.python_index()
        env = os.environ | {"UV_SYSTEM_CERTS": "1"} | ({"UV_DEFAULT_INDEX": index} if index else {})
        for argv in (
            ["venv", "-q", "--clear", "--python", sys.executable, str(home)],
            ["pip", "install", "-q", "--python", str(python), "--require-hashes", "-r", str(LOCK)],
        ):
            subprocess.run([uv, *argv], check=True, env=env)
        (home / "complete").touch()
    return python


@pytest.fixture(scope="module")
def scan(host_of: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """One scan for all tests. Any client may shake hands: the allowlist is asked after that."""
    work = tmp_path_factory.mktemp("tls")
    (work / "ca.crt").write_text(host_of(FRIEND).file("/root/ca.crt").content_string)
    argv = [str(scanner()), "-m", "sslyze", f"--sni={NAME}", f"--certinfo_ca_file={work}/ca.crt"]
    argv += ["--mozilla_config=intermediate", f"--json_out={work}/out.json", f"{vm.addresses(GATEWAY)[0]}:443"]
    done = subprocess.run(argv, text=True, capture_output=True, timeout=300)
    (result,) = json.loads((work / "out.json").read_text())["server_scan_results"]
    assert result["scan_status"] == "COMPLETED", done.stdout + done.stderr
    _, _, verdict = done.stdout.partition("COMPLIANCE AGAINST TLS CONFIGURATION")
    assert f"{vm.addresses(GATEWAY)[0]}:443: " in verdict
    differences = dict(re.findall(r"^ +\* (\w+): (.*)$", verdict, re.MULTILINE))
    assert differences or "OK - Compliant" in verdict
    asked = {name: part for name, part in result["scan_result"].items() if part["status"] != "NOT_SCHEDULED"}
    # HTTP answers to those who may enter only, and this machine may not.
    failed = [name for name, part in asked.items() if part["status"] != "COMPLETED" and name != "http_headers"]
    assert not failed
    return Scan({name: part["result"] for name, part in asked.items()}, differences)


def test_mozillas_intermediate_profile(scan: Scan) -> None:
    """Nothing differs but what is meant to."""
    meant = {
        # The kit's own authority gives certificates for a year and a month.
        "maximum_certificate_lifespan",
        # NGINX offers the library's curves, more of them and stronger ones; they are looked at below.
        "tls_curves",
    }
    assert {name: text for name, text in scan.differences.items() if name not in meant} == {}


@pytest.mark.parametrize(
    ("version", "spoken"),
    [
        ("ssl_2_0", False),
        ("ssl_3_0", False),
        ("tls_1_0", False),
        ("tls_1_1", False),
        ("tls_1_2", True),
        ("tls_1_3", True),
    ],
)
def test_versions(scan: Scan, version: str, spoken: bool) -> None:
    """TLS 1.2 and 1.3 and nothing older, each cipher authenticated and with forward secrecy."""
    suites = scan.found[f"{version}_cipher_suites"]["accepted_cipher_suites"]
    assert bool(suites) is spoken
    for suite in suites:
        name = suite["cipher_suite"]["name"]
        assert re.search("_GCM_|_CHACHA20_POLY1305_", name), name
        assert suite["ephemeral_key"], name
        assert not suite["cipher_suite"]["is_anonymous"], name


def test_curves(scan: Scan) -> None:
    """Keys are agreed on by strong curves only."""
    curves = {curve["name"] for curve in scan.found["elliptic_curves"]["supported_curves"]}
    assert {"X25519", "secp256r1"} <= curves <= STRONG_CURVES


@pytest.mark.parametrize(
    ("part", "finding", "expected"),
    [
        ("tls_compression", "supports_compression", False),
        ("heartbleed", "is_vulnerable_to_heartbleed", False),
        ("openssl_ccs_injection", "is_vulnerable_to_ccs_injection", False),
        ("robot", "robot_result", "NOT_VULNERABLE_RSA_NOT_SUPPORTED"),
        ("session_renegotiation", "supports_secure_renegotiation", True),
        ("session_renegotiation", "is_vulnerable_to_client_renegotiation_dos", False),
        ("tls_fallback_scsv", "supports_fallback_scsv", True),
        ("tls_extended_master_secret", "supports_ems_extension", True),
    ],
)
def test_known_attacks(scan: Scan, part: str, finding: str, expected: bool | str) -> None:
    """None of the known attacks finds a way."""
    assert scan.found[part][finding] == expected


def test_the_chain(scan: Scan) -> None:
    """The chain is in order, ends at the site's authority, has no weak signature, and no public store knows it."""
    for deployment in scan.found["certificate_info"]["certificate_deployments"]:
        verified = {
            path["trust_store"]["name"]: path["was_validation_successful"]
            for path in deployment["path_validation_results"]
        }
        assert [store for store, fine in verified.items() if fine] == ["Supplied CA file"]
        assert deployment["received_chain_has_valid_order"]
        assert not deployment["verified_chain_has_sha1_signature"]

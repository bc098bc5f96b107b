"""Make the secrets that a site lacks, each on its own, in one vaulted file.

The work is done on the controller alone; no secret is returned, printed or handed to a host.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import fcntl
import ipaddress
import json
import os
import pathlib
import secrets
import string
from collections.abc import Iterator
from typing import Any

import yaml
from ansible import constants
from ansible.errors import AnsibleActionFail
from ansible.parsing.vault import AnsibleVaultError, VaultLib
from ansible.plugins.action import ActionBase
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ALPHABET = string.ascii_letters + string.digits
CA_DAYS = 3650
LEAF_DAYS = 365  # browsers accept little more
RENEW_DAYS = 45


def generate(kind: str) -> str:
    """Return a new secret.

    `kind`: `password` (40 letters and digits), `identifier` (12 lower-case letters and digits, for names that
    show up in logs), `fernet` (32 bytes in URL-safe base64) or `hex` (32 bytes). Raises ValueError for another kind.
    """
    if kind == "password":
        return "".join(secrets.choice(ALPHABET) for _ in range(40))
    if kind == "identifier":
        return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(12))
    if kind == "fernet":
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    if kind == "hex":
        return secrets.token_hex(32)
    raise ValueError(f"unknown kind of secret: {kind}")


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject[:64])]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer[:64])]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def make_authority(title: str) -> tuple[str, str]:
    """Return the private key and certificate (both PEM) of a new certificate authority named `title`."""
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        _builder(title, title, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(key), certificate.public_bytes(serialization.Encoding.PEM).decode()


def make_leaf(ca_key_pem: str, ca_certificate_pem: str, names: list[str]) -> tuple[str, str]:
    """Return the private key and certificate (both PEM) of a server called `names` (DNS names or addresses)."""
    ca_key = serialization.load_pem_private_key(ca_key_pem.encode(), None)
    ca = x509.load_pem_x509_certificate(ca_certificate_pem.encode())
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ValueError("the authority's key is not an elliptic-curve key")
    issuer = str(ca.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    certificate = (
        _builder(names[0], issuer, key, LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectAlternativeName([_general_name(n) for n in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return _pem(key), certificate.public_bytes(serialization.Encoding.PEM).decode()


def leaf_is_good(certificate_pem: str, names: list[str]) -> bool:
    """Whether the certificate holds exactly `names` and stays valid for another RENEW_DAYS days."""
    certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return set(found) == {_general_name(n) for n in names} and left.days >= RENEW_DAYS


def complete(held: dict[str, Any], wanted: dict[str, str], authority: str, names: list[str]) -> dict[str, Any]:
    """Return `held` with what it lacks of `wanted` (name to kind) and with a CA and server certificate for `names`.

    The certificates stand under vault_ca_key, vault_ca_certificate, vault_tls_key and vault_tls_certificate.
    """
    new = dict(held)
    for name, kind in wanted.items():
        if not new.get(name):
            new[name] = generate(kind)
    if not new.get("vault_ca_key"):
        new["vault_ca_key"], new["vault_ca_certificate"] = make_authority(authority)
        new.pop("vault_tls_certificate", None)
    if not new.get("vault_tls_certificate") or not leaf_is_good(new["vault_tls_certificate"], names):
        new["vault_tls_key"], new["vault_tls_certificate"] = make_leaf(
            new["vault_ca_key"], new["vault_ca_certificate"], names
        )
    return new


def _complete_tokens(new: dict[str, Any], machines: list[str]) -> None:
    """Give each of `machines` a token of its own; one that is no longer named loses it."""
    held = new.get("vault_machine_tokens") or {}
    if machines or held:
        new["vault_machine_tokens"] = {name: held.get(name) or generate("password") for name in machines}


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Keep every other run out of the vaulted file `path` meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".vault.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read(path: pathlib.Path, vault: VaultLib) -> dict[str, Any]:
    """Return what the vaulted file `path` holds; nothing when there is none. Raises AnsibleActionFail."""
    if not path.exists():
        return {}
    raw = path.read_bytes()
    try:
        text = vault.decrypt(raw) if raw.startswith(b"$ANSIBLE_VAULT") else raw
    except AnsibleVaultError as error:
        raise AnsibleActionFail(
            f"{path}: this vault password does not open it, and nothing was changed. Bring back the one that it was"
            f" encrypted with (.vault-password, or the file that MLFLOW_KIT_VAULT_PASSWORD_FILE names): {error}"
        ) from error
    return yaml.safe_load(text) or {}


def write(path: pathlib.Path, vault: VaultLib, held: dict[str, Any]) -> None:
    """Replace the vaulted file `path` in one step; when this returns, it is on the disk."""
    scratch = path.with_name(f".{path.name}.new")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(vault.encrypt(yaml.safe_dump(held)))
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class ActionModule(ActionBase):  # type: ignore[misc]  # Ansible ships no types
    """`site_secrets`: path, secrets (name to kind), authority (a title), names (of the certificate), machine_tokens.

    Returns `path`, the vaulted file that now holds everything (a scratch one in check mode), and `made`, the
    names of what was made.
    """

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Complete the vaulted file. Raises AnsibleActionFail when it cannot be read or there is no password."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        # Plain values: what came out of a playbook carries Ansible's own types.
        args = json.loads(json.dumps(self._task.args))
        path = pathlib.Path(args["path"])
        vault: VaultLib = self._loader._vault
        if not vault.secrets:
            raise AnsibleActionFail("there is no vault password: see vault_password_file in ansible.cfg")
        with locked(path):
            held = read(path, vault)
            new = complete(held, args["secrets"], args["authority"], args["names"])
            _complete_tokens(new, args.get("machine_tokens") or [])
            result["made"] = sorted(name for name in new if new[name] != held.get(name))
            result["changed"] = bool(result["made"]) or set(held) != set(new)
            if result["changed"]:
                if self._task.check_mode:
                    path = pathlib.Path(constants.DEFAULT_LOCAL_TMP) / "vault.yml"
                write(path, vault, new)
        result["path"] = str(path)
        return result

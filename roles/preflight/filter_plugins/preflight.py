"""What can be refused from the inventory alone, before any host is asked.

Every check gives faults: what is wrong, what was found, what was expected and which variable changes it. No secret is
ever in one: of a password its length and classes are told, of a URL everything but the password.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypedDict
from urllib.parse import SplitResult, parse_qsl, urlsplit

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

INSTANCE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
HOST_LENGTH = 253
BUCKET = re.compile(r"[a-z0-9](?:[a-z0-9.-]{1,61})[a-z0-9]")
PATH_BAD = re.compile(r"[\s\"'\\$%\x00-\x1f\x7f]")
PORTS = range(1, 65536)
PASSWORD_LENGTH = 8
PASSWORD_CLASSES = 3
LOCAL_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback", "localhost4", "localhost6")
# What operators of other systems write, and what it is called here.
DIALECT_HINTS = {
    "postgres": "SQLAlchemy knows no «postgres://»",
    "postgresql+psycopg": "the environment has psycopg2",
    "postgresql+psycopg3": "the environment has psycopg2",
    "postgresql+asyncpg": "the environment has psycopg2",
    "postgresql+pg8000": "the environment has psycopg2",
}


class Fault(TypedDict):
    """One thing to put right.

    Attributes:
        subject: what it is about, in an operator's words.
        found: what is there, without secrets.
        expected: what would be right.
        variable: name of the operator's variable, or of several that come into question.
    """

    subject: str
    found: str
    expected: str
    variable: str


def shown(value: object, longest: int = 80) -> str:
    """`value` as a message shows it: in quotes, on one line, cut when longer than `longest` characters."""
    if value is None or value == "":
        return "nothing"
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in value)
    return f"«{text}»" if len(text) <= longest else f"«{text[:longest]}…» ({len(text)} characters)"


def masked(url: str) -> str:
    """`url` without its password, however badly it is written: what may be part of one is left out."""
    head, at, tail = url.rpartition("@")
    if at:
        user = re.match(r"([A-Za-z0-9+.-]*://)?([^:/?#@]*)", head)
        start = user[0] if user else ""
        head = start if start == head else f"{start}:***"
    return re.sub(r"(?i)([?&][^=&]*(?:pass|secret|token|key)[^=&]*=).*", r"\1***", head + at + tail)


def whole_number(value: object) -> int | None:
    """The integer that `value` is or spells, as an INI inventory may give it; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}", value) else None


def classes(text: str) -> list[str]:
    """Which kinds of characters `text` has: lower, upper, digit, other."""
    kinds = {"lower": str.islower, "upper": str.isupper, "digit": str.isdigit}
    found = [kind for kind, test in kinds.items() if any(map(test, text))]
    other = any(not any(test(c) for test in kinds.values()) for c in text)
    return [*found, "other"] if other else found


def is_local(host: str) -> bool:
    """Whether `host`, a name or address in any spelling, only ever means the machine that asks."""
    name = host.lower().rstrip(".")
    if name in LOCAL_NAMES or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        try:  # 127.1, 0x7f.1, 2130706433
            address = ipaddress.ip_address(socket.inet_aton(name))
        except OSError:
            return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


def is_host(value: str) -> bool:
    """Whether `value` is a host name or an IP address (IPv6 without brackets)."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        labels = value.rstrip(".").split(".")
        return len(value) <= HOST_LENGTH and all(map(HOST_LABEL.fullmatch, labels)) and not labels[-1].isdigit()
    return True


class Inventory:
    """The values of one host and the names under which its operator knows them.

    Args:
        values: the role's variables by name, without their prefix.
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        """Keep `values`."""
        self.values = values
        self.names = self.mapping("variable_names")

    def name(self, key: str) -> str:
        """The operator's variable for the role's variable `key`."""
        return str(self.names.get(key) or f"preflight_{key}")

    def text(self, key: str) -> object:
        """The value of `key`; an absent one is an empty string."""
        value = self.values.get(key)
        return "" if value is None else value

    def mapping(self, key: str) -> Mapping[str, object]:
        """The value of `key` when it is a mapping, else an empty one."""
        value = self.values.get(key)
        return value if isinstance(value, Mapping) else {}

    def entries(self, key: str) -> Iterator[Mapping[str, object]]:
        """The mappings in the list `key`."""
        value = self.values.get(key)
        for entry in value if isinstance(value, Sequence) and not isinstance(value, str) else ():
            if isinstance(entry, Mapping):
                yield entry

    def fault(self, subject: str, found: str, expected: str, key: str) -> Fault:
        """Make a fault about the role's variable `key`."""
        return Fault(subject=subject, found=found, expected=expected, variable=self.name(key))


def instance_name(inventory: Inventory) -> Iterator[Fault]:
    """Check the name of the service."""
    value = inventory.text("instance_name")
    if not isinstance(value, str) or not INSTANCE_NAME.fullmatch(value):
        expected = "a letter first, then letters, digits, «-» or «_», 64 characters at most"
        yield inventory.fault("instance name", shown(value), expected, "instance_name")


def public_name(inventory: Inventory) -> Iterator[Fault]:
    """Check the form of the name that clients use; whether it resolves is asked on the host."""
    value = inventory.text("public_name")
    if not isinstance(value, str) or not is_host(value):
        expected = "a host name or an IP address alone, without scheme, port or path"
        found = masked(value) if isinstance(value, str) else value
        yield inventory.fault("public name", shown(found), expected, "public_name")


def passwords(inventory: Inventory) -> Iterator[Fault]:
    """Check the passwords, telling nothing of them but length and classes."""
    for entry in inventory.entries("passwords"):
        value, variable = entry.get("value"), str(entry.get("variable"))
        expected = (
            f"at least {PASSWORD_LENGTH} characters of {PASSWORD_CLASSES} of the classes lower, upper, digit, other"
        )
        found = ""
        if value is None or value == "":
            found = "nothing"
        elif not isinstance(value, str):
            found, expected = f"a {type(value).__name__}", "text: put it in quotes"
        elif any(ord(c) < ord(" ") or c == "\x7f" for c in value):
            found, expected = "a line break or another control character", "one line of printable characters"
        elif len(value) < PASSWORD_LENGTH or len(classes(value)) < PASSWORD_CLASSES:
            kinds = classes(value)
            found = f"{len(value)} characters of {len(kinds)} class{'es' * (len(kinds) > 1)} ({', '.join(kinds)})"
        if found:
            yield Fault(subject="password", found=found, expected=expected, variable=variable)


def ports(inventory: Inventory) -> Iterator[Fault]:
    """Check the range of each port and that no two services want the same."""
    users: dict[int, list[str]] = {}
    for entry in inventory.entries("ports"):
        value, variable = entry.get("port"), str(entry.get("variable"))
        number = whole_number(value)
        if number is None or number not in PORTS:
            expected = f"a whole number from {PORTS[0]} to {PORTS[-1]}"
            yield Fault(subject="port", found=shown(value), expected=expected, variable=variable)
        else:
            users.setdefault(number, []).append(variable)
    for number, variables in users.items():
        if len(variables) > 1:
            counted = Counter(variables)
            named = [name if times == 1 else f"{name} ({times} times)" for name, times in counted.items()]
            yield Fault(
                subject="port clash",
                found=f"{number} in {' and '.join(named)}",
                expected="a port of its own for each service",
                variable=" or ".join(counted),
            )


def paths(inventory: Inventory) -> Iterator[Fault]:
    """Check that paths are absolute and can stand in unit files."""
    for entry in inventory.entries("paths"):
        value, expected = entry.get("path"), ""
        if not isinstance(value, str) or not value.startswith("/"):
            expected = "an absolute path"
        elif ".." in value.split("/"):
            expected = "a path without «..»"
        elif not value.strip("/"):
            expected = "a directory of its own, not the root"
        elif PATH_BAD.search(value):
            expected = "a path without spaces, quotes, «\\», «$» or «%», which mean something else in unit files"
        if expected:
            yield Fault(subject="path", found=shown(value), expected=expected, variable=str(entry.get("variable")))


def database_url(inventory: Inventory) -> Iterator[Fault]:
    """Check the URL of a database of the site's own; an empty one means the embedded one."""
    value = inventory.text("database_url")
    if value == "":
        return
    subject, key = "database URL", "database_url"
    dialects = [str(d) for d in inventory.values.get("database_dialects") or ()]  # type: ignore[attr-defined]
    example = f"{dialects[-1] if dialects else 'postgresql+psycopg2'}://USER@HOST:5432/DATABASE"
    parts = split(value)
    if not isinstance(value, str) or parts is None or not parts.scheme or "://" not in value:
        found = shown(masked(value) if isinstance(value, str) else value)
        yield inventory.fault(subject, found, f"a URL such as {example}", key)
        return
    if parts.scheme not in dialects:
        hint = DIALECT_HINTS.get(parts.scheme, f"the service is not run on {parts.scheme.partition('+')[0]}")
        found = f"dialect «{parts.scheme}» in {shown(masked(value))}"
        yield inventory.fault(subject, found, f"{' or '.join(dialects)} ({hint}): {example}", key)
    if has_password(value):
        home = str(inventory.values.get("database_password_variable") or "a vaulted variable")
        yield inventory.fault(
            subject, f"a password in {shown(masked(value))}", f"none there: it belongs, vaulted, in {home}", key
        )
    elif parts.path.strip("/") == "":
        yield inventory.fault(subject, f"no database in {shown(masked(value))}", f"one, as in {example}", key)


def split(value: object) -> SplitResult | None:
    """The parts of a URL, or None when it is none, also when its port is none."""
    try:
        parts = urlsplit(value) if isinstance(value, str) and not re.search(r"\s", value) else None
        return parts if parts is None or parts.port is None or parts.port in PORTS else None
    except ValueError:
        # A repeated host of libpq's has several ports, a password may look like one: both are judged elsewhere.
        scheme, _, rest = str(value).partition("://")
        user, at, tail = rest.rpartition("@")
        host, _, path = tail.partition("/")
        return SplitResult(scheme.lower(), f"{user}@{host}", f"/{path}", "", "") if at else None


def has_password(url: str) -> bool:
    """Whether `url` has a password, before its host or among its options."""
    head, at, _tail = url.partition("://")[2].rpartition("@")
    if at and ":" in head:
        return True
    return any(
        re.search(r"(?i)pass(word|wd)?$", name)
        for name, _value in parse_qsl(url.partition("?")[2], keep_blank_values=True)
    )


def s3_endpoint(inventory: Inventory) -> Iterator[Fault]:
    """Check the URL of S3; an empty one means the embedded one."""
    value = inventory.text("s3_endpoint")
    if value == "":
        return
    subject, key, example = "S3 endpoint", "s3_endpoint", "https://s3.example.org"
    found = shown(masked(value) if isinstance(value, str) else value)
    parts = split(value)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        yield inventory.fault(subject, found, f"a URL such as {example}", key)
        return
    if "@" in parts.netloc:
        yield inventory.fault(subject, f"credentials in {found}", "none there: keys have vaulted variables", key)
    elif parts.path.strip("/") or parts.query or parts.fragment:
        yield inventory.fault(subject, found, f"scheme, host and port alone, such as {example}", key)
    if is_local(parts.hostname):
        expected = "an address that clients reach: their transfers go straight there by presigned URLs"
        yield inventory.fault(subject, f"loopback in {found}", expected, key)
    elif not is_host(parts.hostname):
        yield inventory.fault(subject, found, f"a valid host name, such as in {example}", key)


def bucket(inventory: Inventory) -> Iterator[Fault]:
    """Check the bucket's name: S3's rules, and no path of the service itself."""
    value = inventory.text("bucket")
    reserved = inventory.values.get("reserved_buckets") or ()
    expected = ""
    if not isinstance(value, str) or not BUCKET.fullmatch(value):
        expected = "3 to 63 lower-case letters, digits, «.» or «-», a letter or digit first and last"
    elif ".." in value or ".-" in value or "-." in value:
        expected = "a name without «..», «.-» or «-.»"
    elif re.fullmatch(r"[\d.]+", value) and value.count(".") == 3:  # noqa: PLR2004 - as IPv4 has
        expected = "a name that is no IP address"
    elif value.startswith(("xn--", "sthree-")) or value.endswith(("-s3alias", "--ol-s3", "--x-s3")):
        expected = "a name without the prefixes and suffixes that S3 keeps for itself"
    elif isinstance(reserved, Sequence) and value in reserved:
        expected = "another name: this path is the service's own, and buckets are served beside it"
    if expected:
        yield inventory.fault("bucket", shown(value), expected, "bucket")


def database_connections(inventory: Inventory) -> Iterator[Fault]:
    """Check that the pools of all workers fit into the database."""
    budget = inventory.mapping("database_connections")
    if not budget:
        return
    names = budget.get("variables")
    variable = (
        " or ".join(map(str, names)) if isinstance(names, Sequence) and not isinstance(names, str) else str(names)
    )
    needed, available = whole_number(budget.get("needed")), whole_number(budget.get("available"))
    found = f"{shown(budget.get('needed'))} needed of {shown(budget.get('available'))} available"
    if needed is None or available is None:
        expected = "two whole numbers"
    elif needed > available:
        expected = f"at most {available} for all workers and their pools, or at least {needed} in the database"
    else:
        return
    yield Fault(subject="database connections", found=found, expected=expected, variable=variable)


def allow(inventory: Inventory) -> Iterator[Fault]:
    """Check the networks of the allowlist."""
    value = inventory.values.get("allow")
    example = "such as {cidr: 192.0.2.0/24, description: office}"
    if not isinstance(value, Sequence) or isinstance(value, str):
        if value is not None:
            yield inventory.fault("allowlist", shown(value), f"a list of entries {example}", "allow")
        return
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, Mapping):
            yield inventory.fault(f"allowlist entry {number}", shown(entry), f"an entry {example}", "allow")
            continue
        cidr, words = entry.get("cidr"), entry.get("description")
        subject = f"allowlist entry {number}" + (f" ({words})" if words else "")
        try:
            if not isinstance(cidr, str):
                raise ValueError
            ipaddress.ip_network(cidr, strict=True)
        except ValueError:
            expected = "a network in CIDR notation, such as 192.0.2.0/24 or 2001:db8::/32"
            try:
                near = ipaddress.ip_network(cidr, strict=False) if isinstance(cidr, str) else None
            except ValueError:
                near = None
            if near is not None:
                expected = f"{near} for the network, or {str(cidr).partition('/')[0]} for the one address"
            yield inventory.fault(subject, shown(cidr), expected, "allow")


def certificate(inventory: Inventory) -> Iterator[Fault]:
    """Check a certificate that the site was given: that it is one, belongs to its key, is in time, and has the name."""
    given = inventory.mapping("certificate")
    if not given:
        return
    pem, key, name = (str(given.get(part) or "") for part in ("certificate", "private_key", "name"))
    variables = [str(given.get(f"{part}_variable")) for part in ("certificate", "private_key")]
    try:
        leaf = x509.load_pem_x509_certificate(pem.encode())
    except ValueError:
        found = f"{len(pem)} characters that are no certificate in PEM" if pem else "nothing"
        expected = "the server's certificate in PEM, then those between it and its authority"
        yield Fault(subject="certificate", found=found, expected=expected, variable=variables[0])
        return
    now = datetime.datetime.now(datetime.UTC)
    if not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        times = [f"{time:%Y-%m-%d %H:%M}" for time in (leaf.not_valid_before_utc, leaf.not_valid_after_utc)]
        found = f"one valid from {times[0]} to {times[1]} UTC"
        yield Fault(subject="certificate", found=found, expected="one that is valid now", variable=variables[0])
    if not any(covers(known, name) for known in names_of(leaf)):
        found = f"one for {', '.join(names_of(leaf)) or 'no name at all'}"
        yield Fault(subject="certificate", found=found, expected=f"one for {name}", variable=variables[0])
    try:
        loaded = serialization.load_pem_private_key(key.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        found = "text that is no private key in PEM, or one with a passphrase" if key else "nothing"
        expected = "the certificate's private key in PEM, without a passphrase"
        yield Fault(subject="private key", found=found, expected=expected, variable=variables[1])
        return
    if loaded.public_key() != leaf.public_key():
        yield Fault(
            subject="private key",
            found="one that the certificate was not made for",
            expected="the certificate's own",
            variable=" or ".join(variables),
        )


def names_of(leaf: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for."""
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in found]


def covers(known: str, name: str) -> bool:
    """Whether a certificate's name stands for `name`: the same, or a wildcard in place of its first label."""
    known, name = known.lower(), name.lower().rstrip(".")
    return known == name or (known.startswith("*.") and known[2:] == name.partition(".")[2])


CHECKS: tuple[Callable[[Inventory], Iterator[Fault]], ...] = (
    instance_name,
    public_name,
    passwords,
    ports,
    paths,
    database_url,
    s3_endpoint,
    bucket,
    database_connections,
    allow,
    certificate,
)


def preflight_faults(values: Mapping[str, object]) -> list[Fault]:
    """All faults of an inventory.

    Args:
        values: the role's variables by name without the prefix `preflight_`, as its defaults list them.

    Returns:
        The faults in the order of the checks; an empty list when there are none.
    """
    inventory = Inventory(values)
    return [fault for check in CHECKS for fault in check(inventory)]


def preflight_message(faults: Sequence[Fault], closing: str = "") -> str:
    """The faults as a list to read in a terminal.

    Args:
        faults: what `preflight_faults` or the module `preflight_host` gave.
        closing: a sentence below the list.
    """
    count = f"{len(faults)} thing{'s' * (len(faults) != 1)} to put right before anything is changed:"
    lines = [f"- {f['subject']}: found {f['found']}; expected {f['expected']}; change {f['variable']}." for f in faults]
    return "\n".join([count, *lines, *([closing] if closing else [])])


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Name the filters."""
        return {"preflight_faults": preflight_faults, "preflight_message": preflight_message}

"""What the rules are made of: checked on the controller, before a host hears of it."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

PORT = range(1, 65536)
RANGE = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
# The kernel's limit is 15 characters; the rest is what can stand in nft's quotes.
INTERFACE = re.compile(r"(?=.{1,15}\Z)[A-Za-z0-9_.:@-]+\*?")
SECONDS = range(20, 601)
DESCRIPTION_BYTES = 100
PROTOCOLS = ("tcp", "udp")
KEYS = {"ports", "sources", "protocol", "description"}
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _span(port: object) -> tuple[int, int] | None:
    """First and last port that `port` names: a number, its digits, or FIRST-LAST. None when it names none."""
    if isinstance(port, bool):
        return None
    text = str(port).strip() if isinstance(port, int | str) else ""
    found = RANGE.fullmatch(text)
    if not found and not re.fullmatch(r"[0-9]{1,5}", text):
        return None
    first, last = (int(found[1]), int(found[2])) if found else (int(text), int(text))
    return (first, last) if first in PORT and last in PORT and first <= last else None


def _list(value: object) -> Sequence[object] | None:
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None


def _networks(values: Iterable[object], variable: str) -> Iterator[str]:
    for value in values:
        try:
            ipaddress.ip_network(value if isinstance(value, str) else "")
        except ValueError:
            meant = ""
            with contextlib.suppress(ValueError):
                meant = f", such as {ipaddress.ip_network(str(value), strict=False)}, with no bit set beyond the prefix"
            yield f"{variable}: found {value!r}; expected an IPv4 or IPv6 network as ADDRESS/PREFIX{meant}."


def _ports(values: Iterable[object], variable: str) -> Iterator[str]:
    for value in values:
        if _span(value) is None:
            yield f"{variable}: found {value!r}; expected a port from 1 to 65535, or a range as FIRST-LAST."


def _internal(entry: object, variable: str) -> Iterator[str]:
    if not isinstance(entry, Mapping):
        yield f"{variable}: found {entry!r}; expected a mapping with ports, sources and description."
        return
    for key in sorted(set(entry) - KEYS, key=str):
        yield f"{variable}: found the key {key!r}; expected only {', '.join(sorted(KEYS))}."
    checks: tuple[tuple[str, Callable[[Iterable[object], str], Iterator[str]]], ...]
    checks = (("ports", _ports), ("sources", _networks))
    for key, check in checks:
        values = _list(entry.get(key))
        if not values:
            yield f"{variable}.{key}: found {entry.get(key)!r}; expected a list of at least one."
        else:
            yield from check(values, f"{variable}.{key}")
    if entry.get("protocol", "tcp") not in PROTOCOLS:
        yield f"{variable}.protocol: found {entry['protocol']!r}; expected {' or '.join(PROTOCOLS)}."
    text = entry.get("description", "")
    if not isinstance(text, str) or '"' in text or not text.isprintable() or len(text.encode()) > DESCRIPTION_BYTES:
        yield (
            f"{variable}.description: found {text!r}; expected one line of at most {DESCRIPTION_BYTES} bytes "
            "without double quotes."
        )


def firewall_faults(values: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with the role's variables, a sentence each with what was found and expected.

    Args:
        values: ssh_port, ssh_allow, public_ports, internal, trusted_interfaces and rollback_seconds (seconds).
    """
    faults = []
    ssh = _span(values["ssh_port"])
    if ssh is None or ssh[0] != ssh[1]:
        faults.append(f"firewall_ssh_port: found {values['ssh_port']!r}; expected one port from 1 to 65535.")
    for key, check in (("ssh_allow", _networks), ("public_ports", _ports)):
        found = _list(values[key])
        if found is None:
            faults.append(f"firewall_{key}: found {values[key]!r}; expected a list.")
        else:
            faults += check(found, f"firewall_{key}")
    internal = _list(values["internal"])
    if internal is None:
        faults.append(f"firewall_internal: found {values['internal']!r}; expected a list.")
    for index, entry in enumerate(internal or ()):
        faults += _internal(entry, f"firewall_internal[{index}]")
    for name in _list(values["trusted_interfaces"]) or ():
        if not isinstance(name, str) or not INTERFACE.fullmatch(name):
            faults.append(
                f"firewall_trusted_interfaces: found {name!r}; expected the name of an interface, "
                "at most 15 characters with a star at its end at most."
            )
    seconds = str(values["rollback_seconds"])
    if not re.fullmatch(r"[0-9]{1,4}", seconds) or int(seconds) not in SECONDS:
        faults.append(
            f"firewall_rollback_seconds: found {values['rollback_seconds']!r}; "
            f"expected {SECONDS.start} to {SECONDS.stop - 1} seconds."
        )
    return faults


def firewall_networks(values: Iterable[str], version: int) -> list[str]:
    """The networks of one IP `version` among `values`, merged, since nft refuses those that overlap."""
    networks = [network for value in values if (network := ipaddress.ip_network(value)).version == version]
    return [str(network) for network in ipaddress.collapse_addresses(networks)]  # type: ignore[type-var]


def firewall_ports(values: Iterable[object]) -> list[str]:
    """The ports and ranges of `values` in order and merged, as nft writes them."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(span for value in values if (span := _span(value))):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return [str(first) if first == last else f"{first}-{last}" for first, last in merged]


def firewall_tcp(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, list[str]]]:
    """Ports and sources of those `entries` of firewall_internal that ssh could come through."""
    return [
        {"ports": firewall_ports(entry["ports"]), "sources": list(entry["sources"])}
        for entry in entries
        if entry.get("protocol", "tcp") == "tcp"
    ]


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Name the filters."""
        return {
            "firewall_faults": firewall_faults,
            "firewall_networks": firewall_networks,
            "firewall_ports": firewall_ports,
            "firewall_tcp": firewall_tcp,
        }

"""Words and answers about a site's allowlist."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def site_entry(entry: Mapping[str, str]) -> str:
    """Return one entry of the allowlist as a line to read."""
    words = entry.get("description", "")
    return f"{entry['cidr']}{f' ({words})' if words else ''}"


def site_may_enter(address: str, entries: Iterable[Mapping[str, str]]) -> bool:
    """Whether `address` (IPv4 or IPv6) is in one of the networks of `entries`.

    An address that cannot be read is taken as inside, so that nobody is warned for nothing.
    """
    try:
        own = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return True
    if own.is_loopback:
        return True
    networks = [ipaddress.ip_network(entry["cidr"]) for entry in entries]
    return any(own.version == network.version and own in network for network in networks)


class FilterModule:
    """The filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name to function."""
        return {"site_entry": site_entry, "site_may_enter": site_may_enter}

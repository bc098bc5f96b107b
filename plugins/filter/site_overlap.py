"""What a rotation under way means for the hosts: which other values they take, and which they must refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def site_accepted(rotation: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the values of `kind` that are taken beside those in use; empty when there are none."""
    entry = rotation.get(kind) or {}
    return dict(entry["other"]) if entry and entry["phase"] != "withdraw" else {}


def site_withdrawn(rotation: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the values of `kind` that must be refused by now; empty when there are none."""
    entry = rotation.get(kind) or {}
    return dict(entry["other"]) if entry and entry["phase"] == "withdraw" else {}


def site_tokens(values: Mapping[str, Any], names: list[str]) -> list[dict[str, str]]:
    """Return the kit's tokens in `values` as {name, token}, for those of `names` that have one."""
    held = values.get("vault_machine_tokens") or {}
    return [{"name": name, "token": held[name]} for name in names if name in held]


def site_kinds(rotation: Mapping[str, Any], *phases: str) -> list[str]:
    """Return the kinds that are in one of `phases`."""
    return [kind for kind, entry in rotation.items() if entry["phase"] in phases]


class FilterModule:
    """The filters of the playbooks."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name to function."""
        return {
            "site_accepted": site_accepted,
            "site_kinds": site_kinds,
            "site_tokens": site_tokens,
            "site_withdrawn": site_withdrawn,
        }

"""Rotate a site's secrets step by step: which values there are, and how far each kind has come, stand in its vault.

A kind goes through these phases, each written to the vault before a host changes:

accept    the hosts take the new value (`other`) beside the one in use
move      the new value is in use (now `other` is the old one), consumers go over to it
grace     every consumer was seen on it; the old one still works until its time has come
withdraw  the hosts take the new value alone; the kind leaves the vault when the old one was seen to be refused

The work is done on the controller alone; no secret is returned, printed or handed to a host.
"""

from __future__ import annotations

import copy
import datetime
import importlib.util
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase


def _sibling(name: str) -> Any:
    """Another action plugin of this folder as a module: Ansible's loader makes no package of them."""
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"mlflow_kit_{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


secrets = _sibling("site_secrets")
Held = dict[str, Any]
# Kind to the names in the vault that change together.
VALUES = {
    "database": ("vault_database_login", "vault_database_password"),
    "s3": ("vault_s3_access_name", "vault_s3_secret_key"),
    "gateway": ("vault_gateway_password",),
    "tokens": ("vault_machine_tokens",),
    "tls": ("vault_tls_key", "vault_tls_certificate"),
    "authority": ("vault_ca_key", "vault_ca_certificate", "vault_tls_key", "vault_tls_certificate"),
    "encryption": ("vault_crypto_kek_passphrase", "vault_crypto_kek_version"),
}
LOGINS = ("mlflow_a", "mlflow_b")
# What a vault of before holds without saying so.
ASSUMED = {"vault_database_login": LOGINS[0], "vault_crypto_kek_version": "1"}
# Whose old value others may still hold when it is withdrawn; the rest needs no emergency.
HURRIED = ("database", "s3", "gateway", "tokens")
PROVED = {
    "database": "MLflow works with the new login; a try with the old one was refused",
    "s3": "MLflow works with the new key; a try with the old one was refused",
    "gateway": "the new password opens; a try with the old one was refused",
    "tokens": "the new tokens open; a try with each of the old ones was refused",
    "tls": "the gateway shows the new certificate",
    "authority": "the gateway shows a certificate of the new authority, which alone is trusted",
    "encryption": "every secret in the database opens with the new passphrase, and none with the old one",
}
WORDS = {
    "database": "a second login of PostgreSQL; MLflow goes over to it instance by instance; the first is dropped",
    "s3": "a second S3 key; MLflow goes over to it instance by instance; the first is withdrawn",
    "gateway": "a second password of the gateway's first user; both open until the first is withdrawn",
    "tokens": "a second token for each of site_machine_tokens; both open until the first ones are withdrawn",
    "tls": "a new certificate by the same authority, and a new key; no connection is cut",
    "authority": "a second certificate authority; both are trusted, then a certificate of the new one is served",
    "encryption": "a new passphrase for the secrets in the database; every one of them is wrapped anew",
}


def values(held: Mapping[str, Any], kind: str) -> Held:
    """The part of `held` that a rotation of `kind` replaces."""
    return {name: held.get(name, ASSUMED.get(name)) for name in VALUES[kind]}


def successor(held: Mapping[str, Any], kind: str, authority: str, names: list[str]) -> Held:
    """New values for `kind`; `authority` and `names` are those of new certificates."""
    now = values(held, kind)
    if kind == "database":
        login = LOGINS[1] if now["vault_database_login"] == LOGINS[0] else LOGINS[0]
        return {"vault_database_login": login, "vault_database_password": secrets.generate("password")}
    if kind == "s3":
        name, key = secrets.generate("identifier"), secrets.generate("password")
        return {"vault_s3_access_name": name, "vault_s3_secret_key": key}
    if kind == "gateway":
        return {"vault_gateway_password": secrets.generate("password")}
    if kind == "tokens":
        return {"vault_machine_tokens": {name: secrets.generate("password") for name in now["vault_machine_tokens"]}}
    if kind == "tls":
        key, leaf = secrets.make_leaf(held["vault_ca_key"], held["vault_ca_certificate"], names)
        return {"vault_tls_key": key, "vault_tls_certificate": leaf}
    if kind == "authority":
        ca_key, ca = secrets.make_authority(authority)
        key, leaf = secrets.make_leaf(ca_key, ca, names)
        return dict(zip(VALUES[kind], (ca_key, ca, key, leaf), strict=True))
    version = str(int(now["vault_crypto_kek_version"]) + 1)
    return {"vault_crypto_kek_passphrase": secrets.generate("password"), "vault_crypto_kek_version": version}


def swap(held: Held, kind: str) -> None:
    """Put the other values of `kind` to use, and keep those that were."""
    entry = held["vault_rotation"][kind]
    now, entry["other"] = entry["other"], values(held, kind)
    held.update(now)
    entry["phase"] = "move"


def faults(held: Mapping[str, Any], kinds: Sequence[str], foreign: Mapping[str, str], machines: bool) -> list[str]:
    """Why a rotation of `kinds` cannot be begun; `foreign` has the reason for each kind that is not the kit's."""
    found = []
    unknown = sorted(set(kinds) - set(VALUES))
    if unknown:
        found.append(f"rotate: found {', '.join(unknown)}; expected one or more of {', '.join(VALUES)}")
    found += [f"{kind}: {foreign[kind]}" for kind in kinds if foreign.get(kind)]
    if "tokens" in kinds and not machines and not foreign.get("tokens"):
        found.append("tokens: the kit has made none; name the machines that need one in site_machine_tokens")
    for kind in set(kinds) & set(VALUES):
        missing = [name for name, value in values(held, kind).items() if value is None]
        if missing and kind != "tokens":
            found.append(f"{kind}: the vault lacks {', '.join(missing)}; run site.yml first")
    return found


def begin(
    held: Held, kinds: Sequence[str], *, emergency: bool, now: float, authority: str = "", names: Sequence[str] = ()
) -> None:
    """Add new values for `kinds` to `held`; those under way stay. `emergency`: the old ones are withdrawn first of all.

    Without `kinds` an emergency hurries everything that is under way.
    """
    rotation = held.setdefault("vault_rotation", {})
    for kind in kinds:
        if kind not in rotation:
            other = successor(held, kind, authority, list(names))
            rotation[kind] = {"phase": "accept", "other": other, "begun": int(now)}
            if kind == "tls":
                # Nobody has to take a certificate beforehand.
                swap(held, kind)
    if emergency:
        for kind in kinds or list(rotation):
            hurry(held, kind)


def hurry(held: Held, kind: str) -> None:
    """Withdraw the old value of `kind` before anything else is done."""
    entry = held["vault_rotation"][kind]
    entry["emergency"] = True
    if entry["phase"] == "accept" and kind != "encryption":
        swap(held, kind)
    if kind in HURRIED or entry["phase"] == "grace":
        entry["phase"] = "withdraw"


def due(kind: str, entry: Mapping[str, Any], grace: Mapping[str, float]) -> float:
    """When (seconds since the epoch) `kind` may leave the phase in which it waits; 0 for at once."""
    waits = "accept" if kind == "authority" else "grace"
    if entry["phase"] != waits or entry.get("emergency"):
        return 0.0
    began = entry["begun"] if waits == "accept" else entry["moved"]
    return float(began + grace.get(kind, 0))


def advance(held: Held, phase: str, now: float, grace: Mapping[str, float]) -> None:
    """Take every kind that is in `phase` and whose time has come to the next one; out of withdraw it is done."""
    rotation = held.setdefault("vault_rotation", {})
    for kind, entry in list(rotation.items()):
        if entry["phase"] != phase or due(kind, entry, grace) > now:
            continue
        if phase == "accept":
            swap(held, kind)
        elif phase == "move":
            entry.update(phase="grace", moved=int(now))
        elif phase == "grace":
            entry["phase"] = "withdraw"
        else:
            del rotation[kind]


def plan(held: Mapping[str, Any], kinds: Sequence[str], emergency: bool, grace: Mapping[str, float]) -> list[str]:
    """What a run will do, a line for each kind."""
    rotation = held.get("vault_rotation") or {}
    lines = [f"{kind}: goes on where an earlier run ended ({entry['phase']})" for kind, entry in rotation.items()]
    for kind in kinds:
        if kind not in rotation:
            wait = "" if emergency else f"; the overlap lasts {grace[kind]} s" if grace.get(kind) else ""
            lines.append(f"{kind}: {WORDS[kind]}{wait}")
    hurried = [kind for kind in kinds or rotation if kind in HURRIED]
    if emergency and hurried:
        lines.append(
            f"EMERGENCY: the old {', '.join(hurried)} is withdrawn before anybody has gone over to the new: requests"
            " fail until every instance has restarted, URLs presigned with an old key end, and people and machines"
            " stay outside until they have the new password or token"
        )
    return lines


def ending(done: Sequence[str], found: Mapping[str, Any]) -> list[str]:
    """What to say at the end: what is `done`, and what the state `found` leaves to do."""
    lines = [f"{kind}: {PROVED[kind]}" for kind in done]
    for kind, entry in found.items():
        if kind == "authority" and entry["phase"] == "accept":
            what = "both authorities are trusted; hand ca.crt and ca-bundle.crt of playbooks/client.yml to every client"
        else:
            what = "the new one is in use, the old one still works"
        when = f" until {entry['until']}" if entry["until"] else ""
        lines.append(f"{kind}: {what}{when}; then run this again, or at once with -e rotate_emergency=true")
    if {"gateway", "authority"} & {*done, *found}:
        lines.append("client.env, ca.crt and ca-bundle.crt are new: run playbooks/client.yml and hand them out")
    return lines


def state(held: Mapping[str, Any], grace: Mapping[str, float], now: float) -> dict[str, Any]:
    """How far each kind has come, without its values: phase, seconds left to wait, and until when in words."""
    found = {}
    for kind, entry in (held.get("vault_rotation") or {}).items():
        end = due(kind, entry, grace)
        until = datetime.datetime.fromtimestamp(end).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z") if end else ""
        found[kind] = {"phase": entry["phase"], "left": max(0, int(end - now + 0.999)) if end else 0, "until": until}
    return found


class ActionModule(ActionBase):  # type: ignore[misc]  # Ansible ships no types
    """`site_rotation`: path, do (plan, begin, accept, move, grace or withdraw), kinds, emergency, grace (kind to
    seconds), foreign (kind to a reason), authority and names (of new certificates).

    `plan` and `begin` refuse what cannot be done. A phase as `do` says that its work is done. Returns `plan` and
    `words` (lines to show), `state` (kind to phase, left and until) and `path`.
    """  # noqa: D205

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Read the vault, do the step and write the vault. Raises AnsibleActionFail."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = json.loads(json.dumps(self._task.args))
        path, step, now = pathlib.Path(args["path"]), args["do"], time.time()
        grace = {kind: float(seconds) for kind, seconds in (args.get("grace") or {}).items()}
        kinds = list(dict.fromkeys(args.get("kinds") or []))
        vault = self._loader._vault
        with secrets.locked(path):
            held = secrets.read(path, vault)
            if step in ("plan", "begin"):
                found = faults(held, kinds, args.get("foreign") or {}, bool(held.get("vault_machine_tokens")))
                if not kinds and not held.get("vault_rotation"):
                    found = [f"rotate: found nothing, and nothing unfinished; expected some of {', '.join(VALUES)}"]
                if found:
                    raise AnsibleActionFail("Nothing was changed:\n- " + "\n- ".join(found))
                result["plan"] = plan(held, kinds, bool(args.get("emergency")), grace)
            new = copy.deepcopy(held)
            if step == "begin":
                emergency, names = bool(args.get("emergency")), args.get("names") or []
                begin(new, kinds, emergency=emergency, now=now, authority=args.get("authority", ""), names=names)
            elif step != "plan":
                advance(new, step, now, grace)
            if new != held and not self._task.check_mode:
                secrets.write(path, vault, new)
            result["changed"] = new != held
            done = set(held.get("vault_rotation") or {}) - set(new.get("vault_rotation") or {})
            result["state"] = state(new if not self._task.check_mode else held, grace, now)
            result["words"] = ending(sorted(done), result["state"])
        result["path"] = str(path)
        return result

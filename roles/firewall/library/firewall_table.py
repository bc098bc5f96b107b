#!/usr/bin/python
"""Replace the kit's table of nftables on trial: unless a new connection confirms it, a timer takes it back."""

from __future__ import annotations

import dataclasses
import fnmatch
import ipaddress
import json
import os
import pathlib
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: firewall_table
short_description: Replace one table of nftables, with a way back
description:
  - C(apply) compares the rules with the file of those that hold and with the live table. If they differ it checks
    them, arms a timer that would restore the live table, and loads them in one transaction.
  - C(confirm) disarms the timer and keeps the rules, if it comes by another ssh connection than C(apply) did.
  - C(await) waits until the timer has done its work. C(absent) removes table, files and units.
options:
  phase:
    description: What to do.
    choices: [apply, confirm, await, absent]
    required: true
  rules:
    description: Text of the rules for C(apply), which must empty and fill the table C(inet mlflow_kit).
    type: str
  guard:
    description: Whether C(apply) refuses rules that shut out the connection it comes by.
    type: bool
    default: true
  ssh_port:
    description: Port that the rules admit ssh on.
    type: int
  ssh_allow:
    description: Networks that the rules admit there; everybody when empty.
    type: list
    elements: str
  public_ports:
    description: Ports and ranges that the rules open to everybody.
    type: list
    elements: str
  internal:
    description: Further rules for TCP, each with C(ports) and C(sources).
    type: list
    elements: dict
  trusted_interfaces:
    description: Interfaces that the rules do not filter.
    type: list
    elements: str
  rollback_seconds:
    description: Seconds until the timer takes the rules back.
    type: int
    default: 60
  units:
    description: Unit files that C(apply) installs, their texts by their paths within /etc/systemd/system.
    type: dict
    default: {}
  trial:
    description: What C(apply) returned as C(trial).
    type: str
  connection:
    description: What C(apply) returned as C(connection).
    type: dict
author: [mlflow-kit]
"""
EXAMPLES = r"""
- firewall_table: {phase: apply, rules: "{{ lookup('template', 'rules.nft.j2') }}", ssh_port: 22}
"""
RETURN = r"""
trial:
  description: Name of the trial that is to be confirmed.
  type: str
  returned: when C(apply) changed the table
units_changed:
  description: Whether systemd must read its unit files again.
  type: bool
  returned: for C(apply)
connection:
  description: The ssh connection that C(apply) came by; empty when it came by another way.
  type: dict
  returned: for C(apply)
"""

FAMILY, TABLE = "inet", "mlflow_kit"
NFT = "/usr/sbin/nft"
EMPTY = f"table {FAMILY} {TABLE}\ndelete table {FAMILY} {TABLE}\n"
# Lets conntrack learn of connections that are older than the first rules: what only receives would be cut else.
LISTEN = f"{EMPTY}table {FAMILY} {TABLE} {{\n\tchain input {{\n\t\ttype filter hook input priority filter; "
LISTEN += "policy accept;\n\t\tct state established accept\n\t}\n}\n"
LISTEN_SECONDS = 1.0

RULES = pathlib.Path("/etc/nftables.d/mlflow-kit.nft")
# How the kernel tells the rules of that file: what differs from it was changed by another hand.
LISTING = pathlib.Path("/var/lib/mlflow-kit-firewall.nft")
RUN = pathlib.Path("/run/mlflow-kit-firewall")
TAKEN_BACK = RUN / "taken-back"
UNIT = "mlflow-kit-firewall.service"
UNITS = pathlib.Path("/etc/systemd/system")
UNIT_FILES = (UNITS / UNIT, UNITS / "nftables.service.d" / "mlflow-kit.conf")


class FirewallError(Exception):
    """Something could not be done; the message is for the operator."""


@dataclasses.dataclass(frozen=True)
class Connection:
    """An ssh connection as sshd sees it.

    Attributes:
        client: address that it comes from.
        client_port: port that it comes from, new for each connection.
        port: port of sshd that it came to.
    """

    client: str
    client_port: int
    port: int


def call(*argv: str, stdin: str | None = None) -> str:
    """Run `argv` and return what it prints. Raises FirewallError."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FirewallError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def live() -> str | None:
    """The table as the kernel has it, without counters; None when there is none."""
    if not pathlib.Path(NFT).exists():
        return None
    done = subprocess.run([NFT, "-s", "list", "table", FAMILY, TABLE], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout
    if "No such file" in done.stderr:
        return None
    raise FirewallError(f"nft cannot list its table: {done.stderr.strip()}")


def read(path: pathlib.Path) -> str | None:
    """The text of `path`; None when there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def write(path: pathlib.Path, text: str, mode: int = 0o600) -> None:
    """Replace the file `path`; unless `mode` says more, root alone may read it."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def connection() -> Connection | None:
    """The ssh connection that this process serves; None when there is none.

    sudo hides SSH_CONNECTION, so the ancestors are asked too.
    """
    pid = os.getpid()
    while pid > 1:
        process = pathlib.Path("/proc") / str(pid)
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            pid = int((process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return None
        for variable in environment:
            name, _, value = variable.partition(b"=")
            words = value.decode(errors="replace").split()
            if name == b"SSH_CONNECTION" and len(words) == 4:  # noqa: PLR2004
                return Connection(words[0].partition("%")[0], int(words[1]), int(words[3]))
    return None


def interface(client: str) -> str:
    """The interface that packets of `client` come by, as far as the routes tell."""
    try:
        return str(json.loads(call("ip", "-j", "route", "get", client))[0].get("dev", ""))
    except (FirewallError, FileNotFoundError, ValueError, LookupError):
        return ""


def within(client: str, networks: Sequence[str]) -> bool:
    """Whether the address `client` is in one of `networks`."""
    address: Any = ipaddress.ip_address(client)
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in map(ipaddress.ip_network, networks))


def has_port(port: int, ports: Sequence[str]) -> bool:
    """Whether `port` is among `ports`, each a number or FIRST-LAST."""
    spans = (span.partition("-") for span in ports)
    return any(int(first) <= port <= int(last or first) for first, _, last in spans)


def shut_out(came: Connection, rules: Mapping[str, Any]) -> str:
    """Why `rules` would not admit such a connection as `came` again; empty when they would."""
    if has_port(came.port, rules["public_ports"] or []):
        return ""
    for entry in rules["internal"] or []:
        if has_port(came.port, entry["ports"]) and within(came.client, entry["sources"]):
            return ""
    dev = interface(came.client)
    if any(fnmatch.fnmatchcase(dev, pattern) for pattern in rules["trusted_interfaces"] or []):
        return ""
    if came.port != rules["ssh_port"]:
        return (
            f"firewall_ssh_port: found {rules['ssh_port']}; expected {came.port}, the port of the sshd that this "
            "connection came to. The rules would shut it out, so nothing was changed."
        )
    if rules["ssh_allow"] and not within(came.client, rules["ssh_allow"]):
        return (
            f"firewall_ssh_allow: found {', '.join(rules['ssh_allow'])}; expected a network with {came.client}, which "
            "this connection comes from. The rules would shut it out, so nothing was changed."
        )
    return ""


def rollback_argv(trial: str) -> list[str]:
    """The command that takes the `trial` back, unless it was confirmed: whoever renames its file first has won."""
    script = f'mv "$1" "$2" && {{ {NFT} -f "$2" || {NFT} delete table {FAMILY} {TABLE}; }}'
    return ["/bin/sh", "-c", script, "sh", str(RUN / f"{trial}.previous"), str(TAKEN_BACK)]


def timer(trial: str) -> str:
    """The name of the transient unit that waits for the `trial`."""
    return f"mlflow-kit-firewall-rollback-{trial}"


def disarm(trial: str) -> None:
    """Stop the timer of the `trial`, wherever it is."""
    subprocess.run(["systemctl", "stop", f"{timer(trial)}.timer"], capture_output=True, check=False)


def pending() -> list[str]:
    """The trials that wait for their confirmation."""
    return sorted(path.stem for path in RUN.glob("*.previous"))


def take_back_pending() -> bool:
    """Take back at once every trial whose controller is gone. Returns whether there was one. Raises FirewallError."""
    found = pending()
    for trial in found:
        disarm(trial)
        argv = rollback_argv(trial)
        if (RUN / f"{trial}.previous").exists():
            call(*argv)
    return bool(found)


def start(rules: str, seconds: int, before: str | None) -> str:
    """Load `rules` on trial for `seconds` and return the trial's name; `before` is the table that would come back.

    Raises FirewallError, and then the table is what it was.
    """
    RUN.mkdir(mode=0o700, exist_ok=True)
    trial = secrets.token_hex(4)
    previous = EMPTY + (before or "")
    call(NFT, "-c", "-f", "-", stdin=previous)
    write(RUN / f"{trial}.rules", rules)
    write(RUN / f"{trial}.previous", previous)
    argv = ["systemd-run", "--quiet", "--collect", f"--unit={timer(trial)}", f"--on-active={seconds}"]
    call(*argv, "--timer-property=AccuracySec=100ms", *rollback_argv(trial))
    try:
        if before is None:
            call(NFT, "-f", "-", stdin=LISTEN)
            time.sleep(LISTEN_SECONDS)
        call(NFT, "-f", str(RUN / f"{trial}.rules"))
    except FirewallError:
        disarm(trial)
        subprocess.run(rollback_argv(trial), capture_output=True, check=False)
        TAKEN_BACK.unlink(missing_ok=True)
        raise
    return trial


def install_units(units: Mapping[str, str], check: bool) -> list[dict[str, str]]:
    """Bring the unit files up to date, unless it is a mere `check`, and return how they differed."""
    differences = []
    for name, text in units.items():
        path, after = UNITS / name, text.rstrip() + "\n"
        before = read(path)
        if before != after:
            header = str(path)
            differences.append(
                {"before": before or "", "after": after, "before_header": header, "after_header": header}
            )
            if not check:
                write(path, after, 0o644)
    return differences


def apply(module: AnsibleModule) -> dict[str, Any]:
    """Phase apply. Raises FirewallError."""
    params = module.params
    rules = params["rules"].rstrip() + "\n"
    came = connection()
    result: dict[str, Any] = {"connection": dataclasses.asdict(came) if came else {}}
    if came and params["guard"] and (why := shut_out(came, params)):
        raise FirewallError(why)
    if pending():
        module.warn("Rules of an earlier run were never confirmed by a new connection: they are taken back now.")
        if not module.check_mode:
            take_back_pending()
            TAKEN_BACK.unlink(missing_ok=True)
    elif (at := read(TAKEN_BACK)) is not None:
        when = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(TAKEN_BACK.stat().st_ctime))
        had = "there was no table" if at == EMPTY else "those from before came back"
        module.warn(f"Rules of an earlier run were taken back at {when}: no new connection confirmed them, and {had}.")
        if not module.check_mode:
            TAKEN_BACK.unlink(missing_ok=True)
    before, known = read(RULES), read(LISTING)
    now = live()
    same = before == rules and now is not None and now == known
    if not same and pathlib.Path(NFT).exists():
        call(NFT, "-c", "-f", "-", stdin=rules)
    elif not same and not module.check_mode:
        raise FirewallError(f"{NFT} is missing: found nothing, expected the package nftables; see firewall_packages.")
    result["diff"] = install_units(params["units"], module.check_mode)
    result["units_changed"] = bool(result["diff"])
    result["changed"] = not same or result["units_changed"]
    if same:
        return result
    result["diff"].append(
        {"before": before or "", "after": rules, "before_header": str(RULES), "after_header": str(RULES)}
        if before != rules
        else {"before": now or "", "after": known or rules, "before_header": "live", "after_header": "live"}
    )
    if not module.check_mode:
        result["trial"] = start(rules, params["rollback_seconds"], now)
    return result


def confirm(params: Mapping[str, Any]) -> dict[str, Any]:
    """Phase confirm. Raises FirewallError."""
    trial, came = str(params["trial"]), connection()
    if came and dataclasses.asdict(came) == params["connection"]:
        raise FirewallError("this is still the connection from before, which no rule could shut out")
    kept = RUN / f"{trial}.kept"
    try:
        (RUN / f"{trial}.previous").rename(kept)
    except FileNotFoundError:
        raise FirewallError("the connection came after the rules had been taken back") from None
    disarm(trial)
    write(RULES, (RUN / f"{trial}.rules").read_text(encoding="utf-8"))
    write(LISTING, live() or "")
    for path in (kept, RUN / f"{trial}.rules", TAKEN_BACK):
        path.unlink(missing_ok=True)
    return {"changed": False}


def wait(params: Mapping[str, Any]) -> dict[str, Any]:
    """Phase await. Raises FirewallError when the timer has not done its work in time."""
    trial = str(params["trial"])
    end = time.monotonic() + params["rollback_seconds"] + 15
    while (RUN / f"{trial}.previous").exists():
        if time.monotonic() > end:
            raise FirewallError(f"the rules were not taken back; see `systemctl status {timer(trial)}` on the host")
        time.sleep(0.2)
    # The file is renamed first, and the rules are loaded a moment later.
    subprocess.run(["systemctl", "stop", f"{timer(trial)}.timer"], capture_output=True, check=False)
    while subprocess.run(["systemctl", "-q", "is-active", f"{timer(trial)}.service"], check=False).returncode == 0:
        time.sleep(0.1)
    (RUN / f"{trial}.rules").unlink(missing_ok=True)
    return {"changed": False}


def absent(check: bool) -> dict[str, Any]:
    """Phase absent. Raises FirewallError."""
    files = [path for path in (*UNIT_FILES, RULES, LISTING) if path.exists()]
    table = live()
    changed = bool(files or table is not None or pending())
    result = {"changed": changed, "diff": {"before": table or "", "after": ""}}
    if check or not changed:
        return result
    take_back_pending()
    if UNIT_FILES[0].exists():
        call("systemctl", "disable", "--quiet", "--now", UNIT)
    for path in (*files, *RUN.glob("*")):
        path.unlink(missing_ok=True)
    if live() is not None:
        call(NFT, "-f", "-", stdin=EMPTY)
    call("systemctl", "daemon-reload")
    return result


def main() -> None:
    """Entry point of the module."""
    lists = {name: {"type": "list", "elements": "str"} for name in ("ssh_allow", "public_ports", "trusted_interfaces")}
    module = AnsibleModule(
        argument_spec={
            "phase": {"required": True, "choices": ["apply", "confirm", "await", "absent"]},
            "rules": {"type": "str"},
            "guard": {"type": "bool", "default": True},
            "ssh_port": {"type": "int"},
            "internal": {"type": "list", "elements": "dict"},
            "rollback_seconds": {"type": "int", "default": 60},
            "units": {"type": "dict", "default": {}},
            "trial": {"type": "str"},
            "connection": {"type": "dict"},
            **lists,
        },
        required_if=[
            ("phase", "apply", ["rules", "ssh_port"]),
            ("phase", "confirm", ["trial", "connection"]),
            ("phase", "await", ["trial"]),
        ],
        supports_check_mode=True,
    )
    os.environ.update(LC_ALL="C.UTF-8", PATH="/usr/sbin:/usr/bin:/sbin:/bin")
    phase = module.params["phase"]
    try:
        if phase == "apply":
            result = apply(module)
        elif phase == "absent":
            result = absent(module.check_mode)
        else:
            result = confirm(module.params) if phase == "confirm" else wait(module.params)
    except FirewallError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()

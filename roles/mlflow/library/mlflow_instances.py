#!/usr/bin/python
"""Keep the instances of a templated unit running as configured, one restart after the other."""

from __future__ import annotations

import pathlib
import re
import time
import typing
import urllib.error
import urllib.request

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: mlflow_instances
short_description: Keep the instances of a templated unit as configured
description:
  - Enables and starts the instances 1 to O(count) of O(unit), and stops and disables every other one.
  - Restarts, one after the other, each instance that is older than one of the files in O(watch) or that runs
    another interpreter than O(python) now leads to. What decides is the state of the host and not a
    notification, so a run that was interrupted is completed by the next.
  - The unit must be of C(Type=notify), because a start is taken as healthy when systemd reports it.
options:
  unit: {description: Name of the template without C(@)., type: str, required: true}
  count: {description: Number of instances., type: int, required: true}
  watch: {description: Files that an instance has read at its start., type: list, elements: path, default: []}
  python: {description: Path of the interpreter that an instance runs., type: path, required: true}
  drain:
    description: Command that takes an instance out of its gateway; is given C(drain) or C(rejoin), and HOST:PORT.
    type: list
    elements: str
    default: []
  address: {description: Address that the instances listen on., type: str, required: true}
  port: {description: Port of the first instance., type: int, required: true}
  first_only:
    description: Restart the first instance alone, and take the others out of the gateway until the next run.
    type: bool
    default: false
  force: {description: Restart whatever the state., type: bool, default: false}
  look: {description: "Only look: return how each instance is, and change nothing.", type: bool, default: false}
author: [mlflow-kit]
"""
RETURN = r"""
done: {description: "What was done, or would be, in words.", type: list, elements: str, returned: success}
instances:
  description: >-
    With O(look), each instance: its number, whether it is C(active), C(since) (seconds since the epoch), memory in
    bytes, health as an HTTP status with its time in ms, version, and why a restart is C(pending), if one is.
  type: list
  elements: dict
  returned: when only looking
"""


class Units:
    """systemctl for the instances of one template."""

    def __init__(self, module: AnsibleModule, unit: str) -> None:
        """Remember the module and the template's name."""
        self.module, self.unit = module, unit

    def systemctl(self, *argv: str, check: bool = True) -> str:
        """Run systemctl and return its output; ends the module with the journal's last lines when it fails."""
        code, out, err = self.module.run_command(["systemctl", *argv])
        if check and code:
            name = argv[-1]
            journal = self.module.run_command(["journalctl", "-u", name, "-n", "40", "--no-pager", "-o", "cat"])[1]
            self.module.fail_json(msg=f"systemctl {' '.join(argv)} failed: {err.strip()}\n{journal[-4000:]}")
        return str(out)

    def name(self, instance: int) -> str:
        """The unit's full name."""
        return f"{self.unit}@{instance}.service"

    def known(self) -> dict[int, tuple[bool, bool]]:
        """Instance to (enabled, active), for all that systemd or its folder of links knows."""
        found: dict[int, tuple[bool, bool]] = {}
        pattern = re.compile(rf"{re.escape(self.unit)}@(\d+)\.service")
        links = pathlib.Path("/etc/systemd/system/multi-user.target.wants").glob(f"{self.unit}@*.service")
        enabled = {int(m[1]) for m in (pattern.fullmatch(link.name) for link in links) if m}
        listing = self.systemctl("list-units", "--all", "--plain", "--no-legend", f"{self.unit}@*.service", check=False)
        active = {
            int(m[1]) for line in listing.splitlines() if (m := pattern.match(line)) and line.split()[2] == "active"
        }
        for instance in enabled | active:
            found[instance] = (instance in enabled, instance in active)
        return found

    def started(self, instance: int) -> tuple[int, float]:
        """Main process and the time (seconds since the epoch) at which it began."""
        pid = int(self.systemctl("show", "-p", "MainPID", "--value", self.name(instance)).strip() or 0)
        if not pid:
            return 0, 0.0
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        up = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        return pid, time.time() - up + int(fields[19]) / 100


def stale(units: Units, instance: int, watch: typing.Sequence[str], python: str) -> str:
    """Why the running instance must be restarted, or nothing."""
    pid, began = units.started(instance)
    if not pid:
        return "it does not run"
    wanted, runs = pathlib.Path(python).resolve(), pathlib.Path(f"/proc/{pid}/exe").resolve()
    if wanted != runs:
        return f"it runs {runs} instead of {wanted}"
    for path in map(pathlib.Path, watch):
        if path.exists() and path.stat().st_mtime > began:
            return f"{path} is newer than it"
    return ""


def ask(url: str) -> tuple[int, str, float]:
    """HTTP status (0: no answer), body and time in ms of `url`."""
    began = time.monotonic()
    try:
        # Never by a proxy that the environment names.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
            status, body = answer.status, answer.read(200).decode(errors="replace")
    except urllib.error.HTTPError as error:
        status, body = error.code, ""
    except OSError:
        status, body = 0, ""
    return status, body, round((time.monotonic() - began) * 1000, 1)


def memory(pid: int) -> int:
    """What a process holds for itself and its share of what it shares, in bytes; 0 for one that is gone."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def look(module: AnsibleModule, units: Units) -> list[dict[str, typing.Any]]:
    """How each instance is that there is or ought to be."""
    p, known = module.params, units.known()
    found = []
    for instance in sorted(set(known) | set(range(1, p["count"] + 1))):
        active = known.get(instance, (False, False))[1]
        pid, began = units.started(instance) if active else (0, 0.0)
        address = f"http://{p['address']}:{p['port'] + instance - 1}"
        health, _, took = ask(f"{address}/health") if active else (0, "", 0.0)
        pending = stale(units, instance, p["watch"], p["python"]) if active else ""
        if instance > p["count"]:
            pending = f"it is to stop, since there are to be {p['count']}"
        version = ask(f"{address}/version")[1].strip() if active else ""
        found.append(
            {
                "instance": instance,
                "active": active,
                "since": round(began),
                "memory": memory(pid) if pid else 0,
                "health": health,
                "health_ms": took,
                "version": version,
                "pending": pending,
            }
        )
    return found


def tell(module: AnsibleModule, verb: str, instance: int) -> None:
    """Tell the gateway that an instance goes or is back; the module ends when the gateway does not take it."""
    p = module.params
    if p["drain"] and pathlib.Path(p["drain"][0]).exists():
        module.run_command([*p["drain"], verb, f"{p['address']}:{p['port'] + instance - 1}"], check_rc=True)


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "unit": {"type": "str", "required": True},
            "count": {"type": "int", "required": True},
            "watch": {"type": "list", "elements": "path", "default": []},
            "python": {"type": "path", "required": True},
            "force": {"type": "bool", "default": False},
            "look": {"type": "bool", "default": False},
            "first_only": {"type": "bool", "default": False},
            "drain": {"type": "list", "elements": "str", "default": []},
            "address": {"type": "str", "required": True},
            "port": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    units = Units(module, p["unit"])
    if p["look"]:
        module.exit_json(changed=False, done=[], instances=look(module, units))
    known = units.known()
    done: list[str] = []
    if not module.check_mode and "yes" in units.systemctl("show", "-p", "NeedDaemonReload", units.name(1)):
        units.systemctl("daemon-reload")
    for instance in sorted(set(known) - set(range(1, p["count"] + 1))):
        done.append(f"{instance}: stopped, since there are to be {p['count']}")
        if not module.check_mode:
            units.systemctl("disable", "--now", units.name(instance))
    if not p["count"]:
        module.exit_json(changed=bool(done), done=done)
    if not module.check_mode and not any(active for _, active in known.values()):
        # Nobody is served yet: all at once.
        names = [units.name(instance) for instance in range(1, p["count"] + 1)]
        units.systemctl("reset-failed", *names, check=False)
        units.systemctl("enable", "--now", "--quiet", *names)
        module.exit_json(changed=True, done=[*done, "all were enabled and started"])
    for instance in range(1, p["count"] + 1):
        if p["first_only"] and instance > 1:
            tell(module, "drain", instance)
            continue
        enabled, active = known.get(instance, (False, False))
        why = "it does not run" if not active else stale(units, instance, p["watch"], p["python"])
        if p["force"] and not why:
            why = "a restart was asked for"
        if not enabled:
            done.append(f"{instance}: enabled")
            if not module.check_mode:
                units.systemctl("enable", "--quiet", units.name(instance))
        if why:
            done.append(f"{instance}: restarted, since {why}")
            if not module.check_mode:
                if active:
                    tell(module, "drain", instance)
                units.systemctl("reset-failed", units.name(instance), check=False)
                units.systemctl("restart", units.name(instance))
        if not module.check_mode:
            # Also what an interrupted run has left outside.
            tell(module, "rejoin", instance)
    module.exit_json(changed=bool(done), done=done)


if __name__ == "__main__":
    main()

#!/usr/bin/python
"""Keep the instances of templated units running as configured, one restart after the other."""

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
short_description: Keep the instances of templated units as configured
description:
  - Enables and starts the instances 1 to C(count) of each unit of O(lanes), and stops and disables every other one.
  - Restarts, one after the other, each instance that is older than one of the files in O(watch) or that runs
    another interpreter than O(python) now leads to. What decides is the state of the host and not a
    notification, so a run that was interrupted is completed by the next.
  - The units must be of C(Type=notify), because a start is taken as healthy when systemd reports it.
options:
  lanes:
    description: Which units, in the order in which they restart.
    type: list
    elements: dict
    required: true
    suboptions:
      unit: {description: Name of the template without C(@)., type: str, required: true}
      count: {description: Number of instances., type: int, required: true}
      port: {description: Port of the first instance., type: int, required: true}
  watch: {description: Files that an instance has read at its start., type: list, elements: path, default: []}
  python: {description: Path of the interpreter that an instance runs., type: path, required: true}
  drain:
    description: Command that takes an instance out of its gateway; is given C(drain) or C(rejoin), and HOST:PORT.
    type: list
    elements: str
    default: []
  address: {description: Address that the instances listen on., type: str, required: true}
  first_only:
    description: Restart the first instance of each lane alone, and take the others out until the next run.
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
    With O(look), each instance: its unit, its number, whether it is C(active), C(since) (seconds since the epoch),
    memory in bytes, health as an HTTP status with its time in ms, version, and why a restart is C(pending), if one is.
  type: list
  elements: dict
  returned: when only looking
"""


class Lane:
    """systemctl for the instances of one template."""

    def __init__(self, module: AnsibleModule, unit: str, count: int, port: int) -> None:
        """Remember the module, the template's name, how many instances there are to be, and the first one's port."""
        self.module, self.unit, self.count, self.port = module, unit, count, port

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

    def names(self) -> list[str]:
        """The units that there are to be."""
        return [self.name(instance) for instance in range(1, self.count + 1)]

    def address(self, instance: int) -> str:
        """HOST:PORT of an instance."""
        return f"{self.module.params['address']}:{self.port + instance - 1}"

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

    def tell(self, verb: str, instance: int) -> None:
        """Tell the gateway that an instance goes or is back; the module ends when the gateway does not take it."""
        drain = self.module.params["drain"]
        if drain and pathlib.Path(drain[0]).exists():
            self.module.run_command([*drain, verb, self.address(instance)], check_rc=True)


def stale(lane: Lane, instance: int, watch: typing.Sequence[str], python: str) -> str:
    """Why the running instance must be restarted, or nothing."""
    pid, began = lane.started(instance)
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


def look(module: AnsibleModule, lane: Lane) -> list[dict[str, typing.Any]]:
    """How each instance is that there is or ought to be."""
    p, known = module.params, lane.known()
    found = []
    for instance in sorted(set(known) | set(range(1, lane.count + 1))):
        active = known.get(instance, (False, False))[1]
        pid, began = lane.started(instance) if active else (0, 0.0)
        address = f"http://{lane.address(instance)}"
        health, _, took = ask(f"{address}/health") if active else (0, "", 0.0)
        pending = stale(lane, instance, p["watch"], p["python"]) if active else ""
        if instance > lane.count:
            pending = f"it is to stop, since there are to be {lane.count}"
        version = ask(f"{address}/version")[1].strip() if active else ""
        found.append(
            {
                "unit": lane.unit,
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


def keep(module: AnsibleModule, lane: Lane, known: dict[int, tuple[bool, bool]]) -> list[str]:
    """Bring a lane's instances to what they are to be, one after the other, and return what was done in words."""
    p, done = module.params, []
    for instance in range(1, lane.count + 1):
        if p["first_only"] and instance > 1:
            lane.tell("drain", instance)
            continue
        enabled, active = known.get(instance, (False, False))
        why = "it does not run" if not active else stale(lane, instance, p["watch"], p["python"])
        if p["force"] and not why:
            why = "a restart was asked for"
        if not enabled:
            done.append(f"{lane.unit}@{instance}: enabled")
            if not module.check_mode:
                lane.systemctl("enable", "--quiet", lane.name(instance))
        if why:
            done.append(f"{lane.unit}@{instance}: restarted, since {why}")
            if not module.check_mode:
                if active:
                    lane.tell("drain", instance)
                lane.systemctl("reset-failed", lane.name(instance), check=False)
                lane.systemctl("restart", lane.name(instance))
        if not module.check_mode:
            # Also what an interrupted run has left outside.
            lane.tell("rejoin", instance)
    return done


def main() -> None:
    """Entry point of the module."""
    lane_spec = {
        "unit": {"type": "str", "required": True},
        "count": {"type": "int", "required": True},
        "port": {"type": "int", "required": True},
    }
    module = AnsibleModule(
        argument_spec={
            "lanes": {"type": "list", "elements": "dict", "required": True, "options": lane_spec},
            "watch": {"type": "list", "elements": "path", "default": []},
            "python": {"type": "path", "required": True},
            "force": {"type": "bool", "default": False},
            "look": {"type": "bool", "default": False},
            "first_only": {"type": "bool", "default": False},
            "drain": {"type": "list", "elements": "str", "default": []},
            "address": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    lanes = [Lane(module, **lane) for lane in p["lanes"]]
    if p["look"]:
        module.exit_json(changed=False, done=[], instances=[one for lane in lanes for one in look(module, lane)])
    known = {lane.unit: lane.known() for lane in lanes}
    done: list[str] = []
    names = [name for lane in lanes for name in lane.names()]
    for name in names if not module.check_mode else []:
        if "yes" in lanes[0].systemctl("show", "-p", "NeedDaemonReload", name):
            lanes[0].systemctl("daemon-reload")
            break
    for lane in lanes:
        for instance in sorted(set(known[lane.unit]) - set(range(1, lane.count + 1))):
            done.append(f"{lane.unit}@{instance}: stopped, since there are to be {lane.count}")
            if not module.check_mode:
                lane.systemctl("disable", "--now", lane.name(instance))
    served = any(active for found in known.values() for _, active in found.values())
    if names and not served and not module.check_mode:
        # Nobody is served yet: all at once.
        lanes[0].systemctl("reset-failed", *names, check=False)
        lanes[0].systemctl("enable", "--now", "--quiet", *names)
        module.exit_json(changed=True, done=[*done, "all were enabled and started"])
    for lane in lanes:
        done += keep(module, lane, known[lane.unit])
    module.exit_json(changed=bool(done), done=done)


if __name__ == "__main__":
    main()

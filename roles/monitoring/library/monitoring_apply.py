#!/usr/bin/python
"""Bring the files and units of the monitoring to their state, all in one go, after its programs have accepted them."""

from __future__ import annotations

import grp
import os
import pathlib
import pwd
import stat
import tempfile
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: monitoring_apply
short_description: Files and units of the monitoring
description:
  - Lays the files that differ into a scratch folder, lets the programs that will read them judge, and writes them
    only when all are content.
  - A unit restarts when one of its files, or of its program's, is newer than its process. So a run that was killed
    half-way is completed by the next one.
options:
  directories: {description: "Folders: path, mode, owner, group.", type: list, elements: dict, default: []}
  files: {description: "Files: path, content, mode, owner, group.", type: list, elements: dict, default: []}
  checks:
    description: "Commands that judge the files; C(STAGE) in them is the scratch folder, which holds all files by path."
    type: list
    elements: list
    default: []
  units:
    description: "Units to enable and start: C(name), and C(files) for whose news they restart."
    type: list
    elements: dict
    default: []
  absent_units: {description: Units to stop and disable., type: list, elements: str, default: []}
  absent_files: {description: Files that are not to be there., type: list, elements: path, default: []}
author: [mlflow-kit]
"""


def identity(owner: str, group: str) -> tuple[int, int] | None:
    """The numbers of `owner` and `group`, or None when one of them does not exist (yet)."""
    try:
        return pwd.getpwnam(owner).pw_uid, grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def as_wanted(path: pathlib.Path, wanted: dict[str, Any], ids: tuple[int, int]) -> bool:
    """Whether mode and owner of `path` are those of `wanted`."""
    found = path.stat()
    return (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (int(wanted["mode"], 8), *ids)


def write(path: pathlib.Path, content: bytes, mode: int, ids: tuple[int, int]) -> None:
    """Replace `path` by a file of `content` whose mode and owner are right before it has its name."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".kit-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        os.fchown(file.fileno(), *ids)
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    pathlib.Path(name).replace(path)


class Host:
    """What the module does to the host; `done` collects it in words."""

    def __init__(self, module: AnsibleModule) -> None:
        """Keep the module."""
        self.module, self.dry = module, module.check_mode
        self.done: list[str] = []
        self.diff: list[dict[str, str]] = []

    def folders(self, directories: list[dict[str, Any]]) -> None:
        """Make what is missing of `directories`."""
        for wanted in directories:
            path, ids = pathlib.Path(wanted["path"]), identity(wanted["owner"], wanted["group"])
            if path.is_dir() and ids and as_wanted(path, wanted, ids):
                continue
            self.done.append(f"made {path}")
            if not self.dry:
                path.mkdir(parents=True, exist_ok=True)
                os.chown(path, *(ids or (0, 0)))
                path.chmod(int(wanted["mode"], 8))

    def files(self, files: list[dict[str, Any]], checks: list[list[str]]) -> None:
        """Write those of `files` that differ, if `checks` have nothing against the lot."""
        differ = []
        for wanted in files:
            path, ids = pathlib.Path(wanted["path"]), identity(wanted["owner"], wanted["group"])
            before = path.read_bytes() if path.is_file() else None
            if before == wanted["content"].encode() and ids and as_wanted(path, wanted, ids):
                continue
            differ.append(wanted)
            heads = {"before_header": str(path), "after_header": str(path)}
            self.diff.append({**heads, "before": (before or b"").decode(errors="replace"), "after": wanted["content"]})
        if differ:
            self._judge(files, checks)
        for wanted in differ:
            self.done.append(f"wrote {wanted['path']}")
            if not self.dry:
                ids = identity(wanted["owner"], wanted["group"])
                if not ids:
                    self.module.fail_json(msg=f"{wanted['path']}: there is no {wanted['owner']} or {wanted['group']}")
                write(pathlib.Path(wanted["path"]), wanted["content"].encode(), int(wanted["mode"], 8), ids)

    def _judge(self, files: list[dict[str, Any]], checks: list[list[str]]) -> None:
        with tempfile.TemporaryDirectory(prefix="mlflow-kit-monitoring-") as stage:
            for wanted in files:
                path = pathlib.Path(stage + wanted["path"])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(
                    wanted["content"].encode().replace(b"/etc/prometheus/", f"{stage}/etc/prometheus/".encode())
                )
            for check in checks:
                program = self.module.get_bin_path(check[0])
                if not program and self.dry:
                    continue  # its package is still to come
                argv = [program or check[0], *(word.replace("STAGE", stage) for word in check[1:])]
                code, out, err = self.module.run_command(argv)
                if code:
                    words = (out + err).replace(stage, "")[-3000:]
                    self.module.fail_json(msg=f"{check[0]} refuses what is to be written, so nothing was:\n{words}")

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of `unit`, empty where there is none such."""
        argv = ["systemctl", "show", "--property", ",".join(names), unit]
        return dict(line.split("=", 1) for line in self.module.run_command(argv)[1].splitlines() if "=" in line)

    def units(self, units: list[dict[str, Any]]) -> None:
        """Enable and start `units`, and restart those whose process is older than what it reads."""
        names = ("UnitFileState", "ActiveState", "ExecMainStartTimestampMonotonic", "NeedDaemonReload", "Type")
        if not self.dry:
            need = any(self.show(unit["name"], "NeedDaemonReload").get("NeedDaemonReload") == "yes" for unit in units)
            if need or any(word.startswith("wrote /etc/systemd/") for word in self.done):
                self.module.run_command(["systemctl", "daemon-reload"], check_rc=True)
        for unit in units:
            state, name = self.show(unit["name"], *names), unit["name"]
            verbs = []
            if state.get("UnitFileState") != "enabled":
                verbs.append("enable")
            if state.get("ActiveState") not in ("active", "activating", "reloading"):
                verbs.append("start")
            elif self._stale(unit, state):
                verbs.append("restart")
            for verb in verbs:
                self.done.append(f"{verb} {name}")
                if not self.dry:
                    code, out, err = self.module.run_command(["systemctl", verb, "--quiet", name])
                    if code:
                        more = self.module.run_command(["journalctl", "-u", name, "-n", "15", "-o", "cat"])[1]
                        self.module.fail_json(msg=f"systemctl {verb} {name}: {err or out}\n{more}")

    def _stale(self, unit: dict[str, Any], state: dict[str, str]) -> bool:
        paths = [pathlib.Path(path) for path in unit["files"]]
        if any(f"wrote {path}" in self.done for path in paths):
            return True
        if not unit["name"].endswith(".service"):
            return False
        age = time.clock_gettime(time.CLOCK_MONOTONIC) - int(state["ExecMainStartTimestampMonotonic"]) / 1e6
        return any(path.exists() and path.stat().st_ctime > time.time() - age for path in paths)

    def absent(self, units: list[str], files: list[str]) -> None:
        """Stop and disable `units`, delete `files`."""
        for name in units:
            state = self.show(name, "LoadState", "UnitFileState", "ActiveState")
            on = state.get("UnitFileState") == "enabled" or state.get("ActiveState") in (
                "active",
                "activating",
                "failed",
            )
            if state.get("LoadState") == "not-found" or not on:
                continue
            self.done.append(f"stopped {name}")
            if not self.dry:
                self.module.run_command(["systemctl", "disable", "--now", "--quiet", name], check_rc=True)
                self.module.run_command(["systemctl", "reset-failed", name])
        for path in map(pathlib.Path, files):
            if path.is_file():
                self.done.append(f"removed {path}")
                if not self.dry:
                    path.unlink()
        if not self.dry and any(word.startswith("removed /etc/systemd/") for word in self.done):
            self.module.run_command(["systemctl", "daemon-reload"], check_rc=True)


def main() -> None:
    """Entry point of the module."""
    attributes = {
        "path": {"type": "path", "required": True},
        "mode": {"type": "str", "default": "0644"},
        "owner": {"type": "str", "default": "root"},
        "group": {"type": "str", "default": "root"},
    }
    unit = {"name": {"type": "str", "required": True}, "files": {"type": "list", "elements": "path", "default": []}}
    content = {**attributes, "content": {"type": "str", "required": True}}
    module = AnsibleModule(
        argument_spec={
            "directories": {"type": "list", "elements": "dict", "default": [], "options": attributes},
            "files": {"type": "list", "elements": "dict", "default": [], "options": content},
            "checks": {"type": "list", "elements": "list", "default": []},
            "units": {"type": "list", "elements": "dict", "default": [], "options": unit},
            "absent_units": {"type": "list", "elements": "str", "default": []},
            "absent_files": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    p, host = module.params, Host(module)
    host.absent(p["absent_units"], p["absent_files"])
    host.folders(p["directories"])
    host.files(p["files"], p["checks"])
    host.units(p["units"])
    module.exit_json(changed=bool(host.done), done=host.done, **({"diff": host.diff} if module._diff else {}))


if __name__ == "__main__":
    main()

#!/usr/bin/python
"""Bring the timers and the target to what the files say; what is in the way of backups is returned, not a failure."""

from __future__ import annotations

import json
import pathlib

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: backup_units
short_description: Enable the timers and prepare the target
options:
  timers: {description: Units to enable and start., type: list, elements: str, required: true}
  state: {description: Whether they are there., type: str, choices: [present, absent], default: present}
  absent_paths: {description: Files that go with them when they are absent., type: list, elements: path, default: []}
author: [mlflow-kit]
"""
COMMAND = "/usr/local/sbin/mlflow-kit-backup"


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "timers": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "absent_paths": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    timers: list[str] = module.params["timers"]
    done: list[str] = []
    if module.params["state"] == "absent":
        there = [path for path in module.params["absent_paths"] if pathlib.Path(path).exists()]
        if there and not module.check_mode:
            module.run_command(["systemctl", "disable", "--now", "--quiet", *timers])
            for path in there:
                pathlib.Path(path).unlink()
            module.run_command(["systemctl", "daemon-reload"], check_rc=True)
        module.exit_json(changed=bool(there), done=[f"removed {path}" for path in there], foreign="")
    if not module.check_mode:
        units = [*timers, *(timer.replace(".timer", ".service") for timer in timers)]
        shown = module.run_command(["systemctl", "show", "-p", "NeedDaemonReload", "--value", *units])[1]
        if "yes" in shown:
            module.run_command(["systemctl", "daemon-reload"], check_rc=True)
    foreign = ""
    if pathlib.Path(COMMAND).exists():
        code, out, err = module.run_command([COMMAND, "prepare", *(["--dry"] if module.check_mode else [])])
        if code:
            module.fail_json(msg=err.strip()[-2000:])
        prepared = json.loads(out.splitlines()[-1])
        done, foreign = prepared["made"], prepared["foreign"]
    for timer in timers:
        ask = ["systemctl", "is-enabled", "--quiet", timer], ["systemctl", "is-active", "--quiet", timer]
        if any(module.run_command(argv)[0] for argv in ask):
            done.append(f"enabled {timer}")
            if not module.check_mode:
                module.run_command(["systemctl", "enable", "--now", "--quiet", timer], check_rc=True)
    module.exit_json(changed=bool(done), done=done, foreign=foreign)


if __name__ == "__main__":
    main()

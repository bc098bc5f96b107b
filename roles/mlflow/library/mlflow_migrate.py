#!/usr/bin/python
"""Start the migration's unit when this environment has not migrated this database yet."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: mlflow_migrate
short_description: Migrate the database's schema once for each environment
options:
  unit: {description: The oneshot unit that migrates., type: str, required: true}
  python: {description: Path of the interpreter that the unit runs., type: path, required: true}
  uri: {description: The database's URL without a password., type: str, required: true}
  users_uri: {description: That of the database of users; empty for none., type: str, default: ""}
  go:
    description: A file that the unit waits for with everything in memory; with it the unit migrates whatever the stamp.
    type: path
  mark:
    description: Only remember that the environment's schema is the database's, as who calls has found out.
    type: bool
    default: false
  stamp: {description: The file in which the unit remembers what it did., type: path, required: true}
author: [mlflow-kit]
"""


def follow(module: AnsibleModule, unit: str, go: pathlib.Path, stamp: pathlib.Path, wanted: str) -> str:
    """Give the word to a unit that waits for it, see it to its end, and return what went wrong, or nothing."""

    def state() -> str:
        return str(module.run_command(["systemctl", "is-active", unit])[1]).strip()

    stamp.unlink(missing_ok=True)
    if state() != "activating":
        module.run_command(["systemctl", "start", "--no-block", unit], check_rc=True)
    while state() == "activating":
        # Its folder is there from its start to its end.
        if go.parent.is_dir() and not go.exists():
            go.touch()
        time.sleep(0.1)
    done = stamp.exists() and stamp.read_text().strip() == wanted
    return "" if done else f"{unit} is {state()}"


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "unit": {"type": "str", "required": True},
            "python": {"type": "path", "required": True},
            "uri": {"type": "str", "required": True},
            "users_uri": {"type": "str", "default": ""},
            "stamp": {"type": "path", "required": True},
            "go": {"type": "path"},
            "mark": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    p = module.params
    prefix = pathlib.Path(p["python"]).parent.parent.resolve()
    # Which login it was done by does not matter: rotations change that.
    named = re.sub(r"//[^/@]*@", "//", f"{prefix} {p['uri']} {p['users_uri']}")
    wanted = hashlib.sha256(named.encode()).hexdigest()
    stamp = pathlib.Path(p["stamp"])
    if not p["go"] and stamp.exists() and stamp.read_text().strip() == wanted:
        module.exit_json(changed=False)
    if p["mark"]:
        if not module.check_mode and stamp.parent.is_dir():
            owner = stamp.parent.stat()
            stamp.write_text(wanted + "\n")
            os.chown(stamp, owner.st_uid, owner.st_gid)
        module.exit_json(changed=True)
    if not module.check_mode:
        if "yes" in module.run_command(["systemctl", "show", "-p", "NeedDaemonReload", p["unit"]])[1]:
            module.run_command(["systemctl", "daemon-reload"], check_rc=True)
        if p["go"]:
            err = follow(module, p["unit"], pathlib.Path(p["go"]), stamp, wanted)
        else:
            code, _, err = module.run_command(["systemctl", "start", p["unit"]])
            err = err.strip() if code else ""
        if err:
            journal = module.run_command(["journalctl", "-u", p["unit"], "-n", "40", "--no-pager", "-o", "cat"])[1]
            module.fail_json(msg=f"the migration failed: {err}\n{journal[-4000:]}")
    module.exit_json(changed=True)


if __name__ == "__main__":
    main()

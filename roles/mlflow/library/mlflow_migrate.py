#!/usr/bin/python
"""Start the migration's unit when this environment has not migrated this database yet."""

from __future__ import annotations

import hashlib
import pathlib
import re

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: mlflow_migrate
short_description: Migrate the database's schema once for each environment
options:
  unit: {description: The oneshot unit that migrates., type: str, required: true}
  python: {description: Path of the interpreter that the unit runs., type: path, required: true}
  uri: {description: The database's URL without a password., type: str, required: true}
  users_uri: {description: That of the database of users; empty for none., type: str, default: ""}
  stamp: {description: The file in which the unit remembers what it did., type: path, required: true}
author: [mlflow-kit]
"""


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "unit": {"type": "str", "required": True},
            "python": {"type": "path", "required": True},
            "uri": {"type": "str", "required": True},
            "users_uri": {"type": "str", "default": ""},
            "stamp": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    prefix = pathlib.Path(p["python"]).parent.parent.resolve()
    # Which login it was done by does not matter: rotations change that.
    named = re.sub(r"//[^/@]*@", "//", f"{prefix} {p['uri']} {p['users_uri']}")
    wanted = hashlib.sha256(named.encode()).hexdigest()
    stamp = pathlib.Path(p["stamp"])
    if stamp.exists() and stamp.read_text().strip() == wanted:
        module.exit_json(changed=False)
    if not module.check_mode:
        if "yes" in module.run_command(["systemctl", "show", "-p", "NeedDaemonReload", p["unit"]])[1]:
            module.run_command(["systemctl", "daemon-reload"], check_rc=True)
        code, _, err = module.run_command(["systemctl", "start", p["unit"]])
        if code:
            journal = module.run_command(["journalctl", "-u", p["unit"], "-n", "40", "--no-pager", "-o", "cat"])[1]
            module.fail_json(msg=f"the migration failed: {err.strip()}\n{journal[-4000:]}")
    module.exit_json(changed=True)


if __name__ == "__main__":
    main()

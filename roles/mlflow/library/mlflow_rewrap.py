#!/usr/bin/python
"""Start the unit that wraps the secrets in the database anew, and tell what it reported."""

from __future__ import annotations

import json
import pathlib

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: mlflow_rewrap
short_description: Wrap the secrets in the database anew
options:
  unit: {description: The oneshot unit that does it., type: str, required: true}
  report: {description: The file in which the unit leaves what it did., type: path, required: true}
author: [mlflow-kit]
"""


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={"unit": {"type": "str", "required": True}, "report": {"type": "path", "required": True}},
        supports_check_mode=True,
    )
    p = module.params
    if module.check_mode:
        module.exit_json(changed=True, proved=[])
    report = pathlib.Path(p["report"])
    report.unlink(missing_ok=True)
    if "yes" in module.run_command(["systemctl", "show", "-p", "NeedDaemonReload", p["unit"]])[1]:
        module.run_command(["systemctl", "daemon-reload"], check_rc=True)
    code, _, err = module.run_command(["systemctl", "start", p["unit"]])
    if code:
        journal = module.run_command(["journalctl", "-u", p["unit"], "-n", "40", "--no-pager", "-o", "cat"])[1]
        module.fail_json(
            msg=f"the secrets were not wrapped anew, and stay as they were: {err.strip()}\n{journal[-4000:]}"
        )
    told = json.loads(report.read_text())
    proved = [
        f"{told['opened']} secrets in the database open with passphrase version {told['version']}",
        f"{told['refused']} of {told['opened']} refuse the old passphrase",
    ]
    module.exit_json(changed=told["rewrapped"] > 0, proved=proved, **told)


if __name__ == "__main__":
    main()

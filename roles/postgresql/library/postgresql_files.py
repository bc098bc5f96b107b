#!/usr/bin/python
"""Write whole files in one call: a task for each, and a loop no less, makes a run without changes slow."""

from __future__ import annotations

import grp
import os
import pathlib
import pwd
import shlex
import stat
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: postgresql_files
short_description: Write whole files
description:
  - Each takes its name only when content, owner and mode are right and its command of validation, if any, is content.
options:
  files:
    description: >-
      What is to be there: path, content, owner (its group is taken, too), mode, and C(validate), a command in which
      C(%s) is the file.
    type: list
    elements: dict
    required: true
author: [mlflow-kit]
"""


def differs(path: pathlib.Path, content: bytes, mode: int, owner: str) -> bool:
    """Whether the file on the disk is another, or there is none."""
    if not path.is_file():
        return True
    found = path.stat()
    try:
        wanted = (pwd.getpwnam(owner).pw_uid, grp.getgrnam(owner).gr_gid, mode)
    except KeyError:
        return True
    return (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) != wanted or path.read_bytes() != content


def judge(module: AnsibleModule, one: dict[str, Any]) -> None:
    """End the module when the command of validation refuses the content."""
    if not one["validate"]:
        return
    with tempfile.NamedTemporaryFile(prefix="mlflow-kit-", suffix=".conf") as file:
        file.write(one["content"].encode())
        file.flush()
        code, out, err = module.run_command([word.replace("%s", file.name) for word in shlex.split(one["validate"])])
    if code:
        module.fail_json(msg=f"{one['path']} is refused, so nothing was changed:\n{(out + err).strip()[-4000:]}")


def write(path: pathlib.Path, content: bytes, mode: int, owner: str) -> None:
    """Put the file in its place in one step, with the folders on the way."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        os.fchown(file.fileno(), pwd.getpwnam(owner).pw_uid, grp.getgrnam(owner).gr_gid)
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    scratch.replace(path)


def main() -> None:
    """Entry point of the module."""
    entry = {
        "path": {"type": "path", "required": True},
        "content": {"type": "str", "required": True},
        "owner": {"type": "str", "default": "root"},
        "mode": {"type": "str", "default": "0644"},
        "validate": {"type": "str", "default": ""},
    }
    spec = {"files": {"type": "list", "elements": "dict", "required": True, "options": entry}}
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    changed = []
    for one in module.params["files"]:
        one["mode"] = int(one["mode"], 8)
        if differs(pathlib.Path(one["path"]), one["content"].encode(), one["mode"], one["owner"]):
            changed.append(one)
    for one in changed:
        judge(module, one)
    diff = []
    for one in changed:
        path = pathlib.Path(one["path"])
        before = path.read_text(errors="replace") if path.is_file() else ""
        diff.append({"before": before, "after": one["content"], "before_header": str(path), "after_header": str(path)})
        if not module.check_mode:
            write(path, one["content"].encode(), one["mode"], one["owner"])
    module.exit_json(changed=bool(changed), files=[one["path"] for one in changed], diff=diff)


if __name__ == "__main__":
    main()

#!/usr/bin/python
"""Bring NGINX's files to a new state as a whole, after NGINX itself has accepted that state."""

from __future__ import annotations

import grp
import os
import pathlib
import shutil
import tempfile
import typing

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: gateway_config
short_description: Write NGINX's files only if NGINX accepts them
description:
  - Lays the given files over a copy of the configuration, lets C(nginx -t) read the copy, and writes the files
    to their places only when it is content. A faulty configuration is never on the disk, so neither a reload nor
    a reboot can meet it.
options:
  files:
    description: "What is to be there: path below O(root), content, mode and group."
    type: list
    elements: dict
    required: true
  absent: {description: Paths below O(root) that are not to be there., type: list, elements: str, default: []}
  root: {description: Folder of the configuration., type: path, default: /etc/nginx}
author: [mlflow-kit]
"""


class File(typing.NamedTuple):
    """One file as it is wanted."""

    path: pathlib.Path
    content: bytes
    mode: int
    group: str

    def differs(self) -> bool:
        """Whether the file on the disk is another."""
        if not self.path.is_file():
            return True
        state = self.path.stat()
        same_owner = state.st_uid == 0 and state.st_gid == _gid(self.group)
        return self.path.read_bytes() != self.content or state.st_mode & 0o7777 != self.mode or not same_owner

    def write(self) -> None:
        """Put the file in its place in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f".{self.path.name}.new")
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            out.write(self.content)
            out.flush()
            os.fsync(out.fileno())
        os.chown(scratch, 0, _gid(self.group))
        scratch.chmod(self.mode)
        scratch.replace(self.path)


def _gid(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return 0


def complaint(module: AnsibleModule, root: pathlib.Path, changed: list[File], gone: list[pathlib.Path]) -> str:
    """What NGINX has to say against the new state, or nothing."""
    nginx = module.get_bin_path("nginx", opt_dirs=["/usr/sbin"])
    if not nginx or not (root / "nginx.conf").exists():
        return ""
    with tempfile.TemporaryDirectory(prefix="mlflow-kit-nginx-") as work:
        copy = pathlib.Path(work) / "nginx"
        shutil.copytree(root, copy, symlinks=True)
        for path in gone:
            (copy / path.relative_to(root)).unlink(missing_ok=True)
        for file in changed:
            target = copy / file.path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.content)
        for path in copy.rglob("*.conf"):
            if path.is_file() and not path.is_symlink():
                path.write_bytes(path.read_bytes().replace(f"{root}/".encode(), f"{copy}/".encode()))
        code, _, err = module.run_command([nginx, "-t", "-q", "-c", str(copy / "nginx.conf")])
        return err.replace(str(copy), str(root)).strip() if code else ""


def main() -> None:
    """Entry point of the module."""
    entry = {
        "path": {"type": "str", "required": True},
        "content": {"type": "str", "required": True},
        "mode": {"type": "str", "default": "0644"},
        "group": {"type": "str", "default": "root"},
    }
    module = AnsibleModule(
        argument_spec={
            "files": {"type": "list", "elements": "dict", "required": True, "options": entry},
            "absent": {"type": "list", "elements": "str", "default": []},
            "root": {"type": "path", "default": "/etc/nginx"},
        },
        supports_check_mode=True,
    )
    p = module.params
    root = pathlib.Path(p["root"])
    wanted = [File(root / f["path"], f["content"].encode(), int(f["mode"], 8), f["group"]) for f in p["files"]]
    changed = [file for file in wanted if file.differs()]
    gone = [root / name for name in p["absent"] if (root / name).exists()]
    diff = [
        {
            "before": file.path.read_text(errors="replace") if file.path.exists() else "",
            "after": file.content.decode(),
            "before_header": str(file.path),
            "after_header": str(file.path),
        }
        for file in changed
    ]
    if changed or gone:
        against = complaint(module, root, changed, gone)
        if against:
            module.fail_json(msg=f"NGINX refuses the new configuration, so nothing was changed:\n{against}")
    if not module.check_mode:
        for file in changed:
            file.write()
        for path in gone:
            path.unlink()
    names = [str(file.path) for file in changed] + [str(path) for path in gone]
    module.exit_json(changed=bool(names), files=names, diff=diff)


if __name__ == "__main__":
    main()

"""Ansible module: folders and whole files in one call, since a task for each costs more than most services' start."""

from __future__ import annotations

import grp
import os
import pathlib
import pwd
import stat
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule

ATTRIBUTES = {
    "path": {"type": "path", "required": True},
    "mode": {"type": "str", "default": "0644"},
    "owner": {"type": "str", "default": "root"},
    "group": {"type": "str", "default": "root"},
}


def identity(owner: str, group: str) -> tuple[int, int] | None:
    """Return the numbers of `owner` and `group`, or None when one of them does not exist (yet)."""
    try:
        return pwd.getpwnam(owner).pw_uid, grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def matches(path: pathlib.Path, wanted: dict[str, Any], ids: tuple[int, int] | None) -> bool:
    """Return whether mode and owner of `path` are those of `wanted`."""
    found = path.lstat()
    return (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (int(wanted["mode"], 8), *(ids or (-1, -1)))


def write(path: pathlib.Path, content: bytes, mode: int, ids: tuple[int, int]) -> None:
    """Replace `path` by a file of `content` whose mode and owner are right before it has its name."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".kit-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchown(file.fileno(), *ids)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        pathlib.Path(name).replace(path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


def main() -> None:
    """Run the module; it returns `changed_paths`, so that handlers act on what really changed."""
    module = AnsibleModule(
        argument_spec={
            "directories": {"type": "list", "elements": "dict", "default": [], "options": ATTRIBUTES},
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {**ATTRIBUTES, "content": {"type": "str", "required": True}},
            },
        },
        supports_check_mode=True,
    )
    changed: list[str] = []
    diff: list[dict[str, str]] = []
    for wanted in [*module.params["directories"], *module.params["files"]]:
        path, ids = pathlib.Path(wanted["path"]), identity(wanted["owner"], wanted["group"])
        if ids is None and not module.check_mode:
            module.fail_json(msg=f"{path}: there is no user {wanted['owner']} or no group {wanted['group']}")
        if "content" not in wanted:
            if path.is_dir() and matches(path, wanted, ids):
                continue
            if ids and not module.check_mode:
                path.mkdir(parents=True, exist_ok=True)
                os.chown(path, *ids)
                path.chmod(int(wanted["mode"], 8))
        else:
            content = wanted["content"].encode()
            before = path.read_bytes() if path.is_file() else b""
            if path.is_file() and before == content and matches(path, wanted, ids):
                continue
            if ids and not module.check_mode:
                write(path, content, int(wanted["mode"], 8), ids)
            diff.append(
                {
                    "before_header": str(path),
                    "after_header": str(path),
                    "before": before.decode(errors="replace"),
                    "after": wanted["content"],
                }
            )
        changed.append(str(path))
    module.exit_json(changed=bool(changed), changed_paths=changed, **({"diff": diff} if module._diff else {}))


if __name__ == "__main__":
    main()

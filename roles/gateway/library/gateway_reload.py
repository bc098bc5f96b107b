#!/usr/bin/python
"""Let NGINX read its files again when its workers are older than one of them."""

from __future__ import annotations

import pathlib
import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: gateway_reload
short_description: Reload NGINX if its workers are older than its files
description:
  - What decides is the state of the host and not a notification, so that a run which was killed between a file and
    the reload is completed by the next. Returns when no worker that knew the old state takes new requests.
  - An NGINX that does not run is left alone.
options:
  root: {description: Folder whose files the workers have read., type: path, default: /etc/nginx}
  timeout: {description: Seconds in which the workers must have taken over., type: int, default: 15}
author: [mlflow-kit]
"""
PROC = pathlib.Path("/proc")
# /proc tells a process's start in hundredths of a second since a boot that it tells no more exactly: a file must be
# older than that when the workers which read it start, or they would look older than it.
COARSE = 0.05


def workers() -> dict[int, float]:
    """Workers that take new requests: process to its start in seconds since the epoch."""
    up = float((PROC / "uptime").read_text().split()[0])
    boot, found = time.time() - up, {}
    for folder in PROC.iterdir():
        try:
            if not folder.name.isdigit() or (folder / "comm").read_text().strip() != "nginx":
                continue
            line = (folder / "cmdline").read_bytes().rstrip(b"\0 ")
            ticks = int((folder / "stat").read_text().rpartition(")")[2].split()[19])
        except (OSError, ValueError):  # it ended meanwhile
            continue
        if line == b"nginx: worker process":
            found[int(folder.name)] = boot + ticks / 100
    return found


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={"root": {"type": "path", "default": "/etc/nginx"}, "timeout": {"type": "int", "default": 15}},
        supports_check_mode=True,
    )
    root, old = pathlib.Path(module.params["root"]), workers()
    written = {path: path.stat().st_mtime for path in root.rglob("*") if path.is_file()}
    newer = sorted(str(path) for path, when in written.items() if old and when > min(old.values()))
    if not newer:
        module.exit_json(changed=False, newer=[])
    if module.check_mode:
        module.exit_json(changed=True, newer=newer)
    module.run_command(["nginx", "-t", "-q"], check_rc=True)
    time.sleep(max(0.0, min(1.0, max(written.values()) + COARSE - time.time())))
    module.run_command(["nginx", "-s", "reload"], check_rc=True)
    end = time.monotonic() + module.params["timeout"]
    while set(old) & set(workers()):
        if time.monotonic() > end:
            module.fail_json(msg="NGINX's workers did not take the new state; see journalctl -u nginx")
        time.sleep(0.05)
    module.exit_json(changed=True, newer=newer)


if __name__ == "__main__":
    main()

#!/usr/bin/python
"""How the object store is: its units, its door, its disk; no change."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: object_store_status
short_description: How the object store is
options:
  units: {description: Units that are to run., type: list, elements: str, required: true}
  url: {description: The proxy's address., type: str, required: true}
  path: {description: Folder of the data., type: path, required: true}
author: [mlflow-kit]
"""
RETURN = r"""
status:
  description: >-
    C(up), whether the proxy answers its health check; C(down), the units that do not run; C(objects), files of
    objects; C(bytes) that they hold; C(version).
  type: dict
  returned: success
"""


def held(path: str) -> tuple[int, int]:
    """Number and size in bytes of the data files below `path`."""
    count = size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            if name.endswith(".data"):
                try:
                    size += os.stat(f"{folder}/{name}").st_size  # noqa: PTH116 - one call for each of many files
                except OSError:
                    continue  # deleted meanwhile
                count += 1
    return count, size


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "units": {"type": "list", "elements": "str", "required": True},
            "url": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    states = module.run_command(["systemctl", "is-active", *p["units"]])[1].split()
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{p['url']}/healthcheck", timeout=10) as answer:
            up = answer.status == 200
    except OSError:
        up = False
    objects, size = held(p["path"])
    version = module.run_command(["dpkg-query", "--show", "--showformat=${Version}", "swift-proxy"])[1]
    module.exit_json(
        changed=False,
        status={
            "up": up,
            "down": [unit for unit, state in zip(p["units"], states, strict=False) if state != "active"],
            "objects": objects,
            "bytes": size,
            "version": version.partition("-")[0],
        },
    )


if __name__ == "__main__":
    main()

#!/usr/bin/python
"""Learn of a host what PostgreSQL's version and sizes depend on, under the names of Ansible's own facts."""

from __future__ import annotations

import pathlib
import re

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: postgresql_host
short_description: Learn the distribution and the memory
description:
  - C(setup) tells the memory only together with disks, mounts and devices, which takes a second or more of every run.
author: [mlflow-kit]
"""


def facts(release: str, memory: str) -> dict[str, str | int]:
    """The facts in os-release(5) and /proc/meminfo, named and counted as Ansible does it (MB of 1024 kB)."""
    found = {name: value.strip("\"'") for name, value in re.findall(r"^([A-Z_]+)=(.*)$", release, re.MULTILINE)}
    kilobytes = re.search(r"^MemTotal: +(\d+) kB", memory, re.MULTILINE)
    return {
        "distribution": found.get("ID", "").capitalize(),
        "distribution_major_version": found.get("VERSION_ID", "").split(".")[0],
        "memtotal_mb": int(kilobytes[1]) // 1024 if kilobytes else 0,
    }


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    release, memory = pathlib.Path("/etc/os-release").read_text(), pathlib.Path("/proc/meminfo").read_text()
    module.exit_json(changed=False, ansible_facts=facts(release, memory))


if __name__ == "__main__":
    main()

#!/usr/bin/python
"""Learn of a host what versions and sizes depend on, under the names of Ansible's own facts."""

from __future__ import annotations

import os
import pathlib
import re

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: site_facts
short_description: Learn the distribution, the cores and the memory
description:
  - The facts that each run gathers (C(facts_modules) in ansible.cfg), once for each host.
  - C(setup) tells cores and memory only together with disks, mounts and devices, which takes a second or more.
author: [mlflow-kit]
"""


def facts(release: str, memory: str, cores: int) -> dict[str, str | int]:
    """The facts in os-release(5) and /proc/meminfo, named and counted as Ansible does it (MB of 1024 kB).

    `cores` is how many a process may use.
    """
    found = {name: value.strip("\"'") for name, value in re.findall(r"^([A-Z_]+)=(.*)$", release, re.MULTILINE)}
    kilobytes = re.search(r"^MemTotal: +(\d+) kB", memory, re.MULTILINE)
    return {
        "distribution": found.get("ID", "").capitalize(),
        "distribution_major_version": found.get("VERSION_ID", "").split(".")[0],
        "processor_nproc": cores,
        "memtotal_mb": int(kilobytes[1]) // 1024 if kilobytes else 0,
    }


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    release, memory = pathlib.Path("/etc/os-release").read_text(), pathlib.Path("/proc/meminfo").read_text()
    module.exit_json(changed=False, ansible_facts=facts(release, memory, len(os.sched_getaffinity(0))))


if __name__ == "__main__":
    main()

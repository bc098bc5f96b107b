#!/usr/bin/python
"""What can be refused by a look at a host, before it is changed. Only ever looks; needs nothing but Python."""

from __future__ import annotations

import fnmatch
import ipaddress
import os
import pathlib
import platform
import pwd
import re
import socket
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: preflight_host
short_description: Say what on a host stands against a deployment
description:
  - Looks at distribution, architecture, init, user, memory, disk, ports and name resolution, and changes nothing.
  - Never fails because of what it finds; it returns a list of faults, empty when all is well.
options:
  distributions:
    description: Supported major versions by distribution, as C(ID) in os-release has it.
    type: dict
    required: true
  architectures:
    description: Supported machines, as C(uname -m) has them.
    type: list
    elements: str
    required: true
  min_memory_mb:
    description: Least memory in MB.
    type: int
    required: true
  min_disk_mb:
    description: Least free disk in MB at each of O(disk_paths).
    type: int
    required: true
  disk_paths:
    description: Absolute paths that data will grow at; the nearest existing parent is looked at.
    type: list
    elements: str
    default: []
  ports:
    description: Ports that must be free, or held by one of the units named.
    type: list
    elements: dict
    default: []
    suboptions:
      variable:
        description: The operator's variable.
        type: str
        required: true
      port:
        description: TCP port.
        type: int
        required: true
      units:
        description: Patterns of the systemd units that may hold it.
        type: list
        elements: str
        default: []
  public_name:
    description: Name that must resolve; an address, or nothing, is fine.
    type: str
    default: ""
  variable_names:
    description: The operator's variables by this module's options.
    type: dict
    default: {}
author: [mlflow-kit]
"""
EXAMPLES = r"""
- preflight_host:
    distributions: {debian: ["12", "13"]}
    architectures: [x86_64]
    min_memory_mb: 1500
    min_disk_mb: 3000
    disk_paths: [/var/lib]
    ports: [{variable: site_https_port, port: 443, units: [nginx.service]}]
    public_name: mlflow.example.org
"""
RETURN = r"""
faults:
  description: What stands in the way, each with subject, found, expected and variable.
  type: list
  elements: dict
  returned: always
"""

LISTENING = "0A"
UNIT = re.compile(r"/([^/]+\.(?:service|scope|socket))(?=/|$)")


class Listener(NamedTuple):
    """A listening socket of /proc/net/tcp or tcp6."""

    address: str
    port: int
    inode: str


class Holder(NamedTuple):
    """A process that has a socket open."""

    pid: int
    name: str
    unit: str

    def __str__(self) -> str:
        """As a message names it."""
        return f"{self.name} (pid {self.pid}, {self.unit or 'no unit'})"


def fault(subject: str, found: str, expected: str, variable: str) -> dict[str, str]:
    """Make one fault; the fields are those of the role's filter plugin."""
    return {"subject": subject, "found": found, "expected": expected, "variable": variable}


def address_of(text: str) -> str:
    """The address in the kernel's hexadecimal: 32-bit words, each in the machine's own byte order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return str(ipaddress.ip_address(packed))


def listeners(table: str) -> Iterator[Listener]:
    """The listening sockets in the text of /proc/net/tcp or /proc/net/tcp6."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        if fields[3] == LISTENING:
            address, _, port = fields[1].partition(":")
            yield Listener(address_of(address), int(port, 16), fields[9])


def unit_of(cgroup: str) -> str:
    """The systemd unit in the text of /proc/PID/cgroup, or an empty string."""
    for line in cgroup.splitlines():
        number, controllers, path = line.split(":", 2)
        units = UNIT.findall(path)
        # Version 2 has number 0; version 1 keeps systemd's own tree by name.
        if units and (number == "0" or controllers == "name=systemd"):
            return str(units[-1])
    return ""


def target_of(link: pathlib.Path) -> str:
    """What `link` points to; an empty string when it is gone already."""
    try:
        return os.readlink(link)  # noqa: PTH115 - `socket:[1]` is no path
    except OSError:
        return ""


def holders(inodes: set[str], proc: pathlib.Path = pathlib.Path("/proc")) -> dict[str, list[Holder]]:
    """Which processes have the sockets `inodes` open. Those that end meanwhile are left out."""
    found: dict[str, list[Holder]] = {}
    for folder in sorted((p for p in proc.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)):
        try:
            links = set(map(target_of, (folder / "fd").iterdir()))
            mine = {inode for inode in inodes if f"socket:[{inode}]" in links}
            if mine:
                name = (folder / "comm").read_text(errors="replace").strip()
                holder = Holder(int(folder.name), name, unit_of((folder / "cgroup").read_text()))
        except OSError:
            continue
        for inode in mine:
            found.setdefault(inode, []).append(holder)
    return found


def check_ports(wanted: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """Refuse ports on which another's process listens."""
    tables = [path for name in ("tcp", "tcp6") if (path := pathlib.Path("/proc/net", name)).exists()]
    numbers = {entry["port"] for entry in wanted}
    taken = [one for path in tables for one in listeners(path.read_text()) if one.port in numbers]
    if not taken:
        return
    held = holders({one.inode for one in taken})
    for entry in wanted:
        foreign: dict[str, list[str]] = {}
        for one in (one for one in taken if one.port == entry["port"]):
            owners = held.get(one.inode, [])
            ours = any(fnmatch.fnmatchcase(owner.unit, pattern) for owner in owners for pattern in entry["units"])
            if not ours:
                who = str(owners[0]) if owners else "a process that cannot be seen from here"
                foreign.setdefault(who, []).append(one.address)
        for who, addresses in foreign.items():
            expected = "a free port" + (f", or one held by {' or '.join(entry['units'])}" if entry["units"] else "")
            found = f"{entry['port']} taken by {who} on {', '.join(sorted(set(addresses)))}"
            yield fault("port", found, expected, entry["variable"])


def check_system(params: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Refuse other distributions, architectures and init systems, and a user who is not root."""
    name = params["variable_names"].get
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    known, version = params["distributions"].get(release.get("ID", ""), []), release.get("VERSION_ID", "")
    if version.split(".")[0] not in map(str, known):
        found = release.get("PRETTY_NAME") or f"{release.get('ID', 'an unknown system')} {version}".strip()
        wanted = [f"{key.capitalize()} {one}" for key, versions in params["distributions"].items() for one in versions]
        variable = f"the host, or {name('distributions', 'preflight_distributions')}"
        yield fault("distribution", found, " or ".join(wanted), variable)
    if platform.machine() not in params["architectures"]:
        variable = f"the host, or {name('architectures', 'preflight_architectures')}"
        yield fault("architecture", platform.machine(), " or ".join(params["architectures"]), variable)
    if not pathlib.Path("/run/systemd/system").is_dir():
        init = pathlib.Path("/proc/1/comm").read_text(errors="replace").strip()
        yield fault("init system", init, "systemd, running", "the host")
    if os.geteuid() != 0:
        yield fault("user", pwd.getpwuid(os.geteuid()).pw_name, "root", "ansible_become or ansible_user")


def memory_mb() -> int:
    """The memory in MB that the host, or the control group that it is, may use."""
    total = int(re.findall(r"^MemTotal:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text(), re.MULTILINE)[0]) * 1024
    limits = [total]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int(pathlib.Path("/sys/fs/cgroup", limit).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits) // 2**20


def check_memory(params: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Refuse too little memory."""
    if (found := memory_mb()) < params["min_memory_mb"]:
        variable = f"the host, or {params['variable_names'].get('min_memory_mb', 'preflight_min_memory_mb')}"
        yield fault("memory", f"{found} MB", f"at least {params['min_memory_mb']} MB", variable)


def existing(path: pathlib.Path) -> pathlib.Path:
    """`path` or the nearest of its parents that exists."""
    return next(one for one in (path, *path.parents) if one.exists())


def check_disk(params: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Refuse too little free disk, once for each file system."""
    names, least = params["variable_names"], params["min_disk_mb"]
    by_device: dict[int, list[str]] = {}
    for path in params["disk_paths"]:
        by_device.setdefault(existing(pathlib.Path(path)).stat().st_dev, []).append(path)
    for paths in by_device.values():
        state = os.statvfs(existing(pathlib.Path(paths[0])))
        free = state.f_bavail * state.f_frsize // 2**20
        if free < least:
            disk, limit = (
                names.get("disk_paths", "preflight_disk_paths"),
                names.get("min_disk_mb", "preflight_min_disk_mb"),
            )
            found = f"{free} MB free for {' and '.join(paths)}"
            yield fault("disk", found, f"at least {least} MB", f"the host's disk, {disk} or {limit}")


def check_name(params: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Refuse a public name that this host cannot resolve."""
    name = params["public_name"]
    if not name:
        return
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a name"
        variable = f"{params['variable_names'].get('public_name', 'preflight_public_name')}, DNS or /etc/hosts"
        yield fault("public name", f"«{name}» does not resolve ({reason})", "a name that this host resolves", variable)


def faults(params: dict[str, Any]) -> list[dict[str, str]]:
    """All that stands against a deployment to this host, by the module's `params`."""
    return [
        *check_system(params),
        *check_memory(params),
        *check_disk(params),
        *check_ports(params["ports"]),
        *check_name(params),
    ]


def main() -> None:
    """Entry point of the module."""
    port = {
        "variable": {"type": "str", "required": True},
        "port": {"type": "int", "required": True},
        "units": {"type": "list", "elements": "str", "default": []},
    }
    module = AnsibleModule(
        argument_spec={
            "distributions": {"type": "dict", "required": True},
            "architectures": {"type": "list", "elements": "str", "required": True},
            "min_memory_mb": {"type": "int", "required": True},
            "min_disk_mb": {"type": "int", "required": True},
            "disk_paths": {"type": "list", "elements": "str", "default": []},
            "ports": {"type": "list", "elements": "dict", "default": [], "options": port},
            "public_name": {"type": "str", "default": ""},
            "variable_names": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, faults=faults(module.params))


if __name__ == "__main__":
    main()

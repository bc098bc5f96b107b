"""Ansible module: devices' folders and Swift's rings, with the checks that keep data from being lost."""

from __future__ import annotations

import configparser
import errno
import grp
import hashlib
import os
import pathlib
import pwd
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from swift.common.ring import RingBuilder

KINDS = ("account", "container", "object")
MARKER = ".hash-fingerprint"


class Refused(Exception):
    """The wish would lose data or cannot work; the message names found, expected and the variable."""


def fingerprint(prefix: str, suffix: str) -> str:
    """Return a digest that tells two pairs of hash values apart without giving them away."""
    return hashlib.sha256(f"{prefix}\0{suffix}".encode()).hexdigest()


def check_hash(p: dict[str, Any]) -> None:
    """Refuse hash values other than those that data on this host were stored with. Raises Refused."""
    expected = fingerprint(p["hash_prefix"], p["hash_suffix"])
    marker, conf = pathlib.Path(p["data_directory"]) / MARKER, pathlib.Path(p["directory"]) / "swift.conf"
    found = ""
    if marker.exists():
        where, found = marker, marker.read_text().strip()
    elif any(pathlib.Path(p["data_directory"]).glob("*/objects")) and conf.exists():
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(conf)
        values = dict(parser["swift-hash"]) if parser.has_section("swift-hash") else {}
        where = conf
        found = fingerprint(values.get("swift_hash_path_prefix", ""), values.get("swift_hash_path_suffix", ""))
    if found and found != expected:
        raise Refused(
            f"the data below {p['data_directory']} were stored with other hash values, without which they cannot be "
            f"found again. Found: fingerprint {found[:12]} ({where}). Expected from the inventory: fingerprint "
            f"{expected[:12]}. Give object_store_hash_prefix and object_store_hash_suffix their old values."
        )


def check_attributes(folder: pathlib.Path) -> None:
    """Refuse a file system that does not keep user extended attributes. Raises Refused."""
    probe = folder / ".xattr-probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift.probe", b"x" * 300)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSPC, errno.E2BIG, errno.EPERM):
            raise
        raise Refused(
            f"Found: the file system of {folder} keeps no user extended attributes ({error.strerror}). Expected: "
            f"ext4, XFS or another that does. Change object_store_data_directory or mount one there."
        ) from error
    finally:
        probe.unlink()


def prepare(p: dict[str, Any], check: bool) -> list[str]:
    """Make the folders of this node's devices and the marker; return the paths that changed. Raises Refused."""
    owner = (pwd.getpwnam("swift").pw_uid, grp.getgrnam("swift").gr_gid)
    root, changed = pathlib.Path(p["data_directory"]), []
    names = [d["device"] for d in p["devices"] if d["ip"] == p["local_ip"]]
    for folder in (root, *(root / name for name in names)):
        if folder.is_dir() and (folder.stat().st_uid, folder.stat().st_gid) == owner:
            continue
        changed.append(str(folder))
        if not check:
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            os.chown(folder, *owner)
            check_attributes(folder)
    marker = root / MARKER
    if not marker.exists():
        changed.append(str(marker))
        if not check:
            marker.write_text(fingerprint(p["hash_prefix"], p["hash_suffix"]) + "\n")
            marker.chmod(0o640)
            os.chown(marker, 0, owner[1])
    return changed


def plan(builder: RingBuilder, p: dict[str, Any], kind: str) -> bool:
    """Bring the builder's devices, weights and replicas to the wish; return whether it changed. Raises Refused."""
    port, changed = p["ports"][kind], False
    if builder.part_power != p["part_power"]:
        raise Refused(
            f"the part power of a ring with data cannot change. Found: {builder.part_power} ({kind}). "
            f"Expected: {p['part_power']}. Set object_store_part_power back."
        )
    known = {(d["ip"], d["port"], d["device"]): d for d in builder.devs if d is not None}
    wanted = {(d["ip"], port, d["device"]): d for d in p["devices"]}
    for key, device in wanted.items():
        if key not in known:
            new = {k: device[k] for k in ("ip", "device", "region", "zone", "weight")}
            builder.add_dev({**new, "port": port, "replication_ip": new["ip"], "replication_port": port, "meta": ""})
            changed = True
        elif known[key]["weight"] != device["weight"]:
            builder.set_dev_weight(known[key]["id"], device["weight"])
            changed = True
    for key, device in known.items():
        if key not in wanted:
            if device["parts"]:
                raise Refused(
                    f"the device {key[2]} of {key[0]}:{key[1]} cannot leave the {kind} ring. Found: {device['parts']} "
                    f"partitions on it. Expected: none. Keep it in object_store_devices with weight 0 until drained."
                )
            builder.remove_dev(device["id"])
            changed = True
    if builder.replicas != p["replicas"]:
        builder.set_replicas(p["replicas"])
        changed = True
    return changed


def build(p: dict[str, Any], check: bool) -> list[str]:
    """Build or rebalance the three rings where they differ from the wish; return the paths. Raises Refused."""
    from swift.common.ring import RingBuilder  # noqa: PLC0415 - not there before the package is

    group, changed = grp.getgrnam("swift").gr_gid, []
    work = []
    for kind in KINDS:
        source = pathlib.Path(p["directory"]) / f"{kind}.builder"
        ring = source.with_suffix(".ring.gz")
        builder = RingBuilder.load(str(source)) if source.exists() else RingBuilder(p["part_power"], p["replicas"], 1)
        if plan(builder, p, kind):
            builder.rebalance(seed="object-store")
        elif ring.exists():
            continue
        work.append((builder, source, ring))
    for builder, source, ring in work:
        changed += [str(source), str(ring)]
        if not check:
            builder.save(str(source))
            builder.get_ring().save(str(ring))
            for path in (source, ring):
                os.chown(path, 0, group)
                path.chmod(0o640)
    return changed


def main() -> None:
    """Run the module; it returns `changed_paths` and, when the wish is refused, `problem`."""
    number = {"type": "int", "required": True}
    device = {
        "ip": {"type": "str", "required": True},
        "device": {"type": "str", "required": True},
        "region": {"type": "int", "default": 1},
        "zone": {"type": "int", "default": 1},
        "weight": {"type": "float", "default": 100.0},
    }
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "default": "/etc/swift"},
            "data_directory": {"type": "path", "required": True},
            "hash_prefix": {"type": "str", "required": True, "no_log": True},
            "hash_suffix": {"type": "str", "required": True, "no_log": True},
            "devices": {"type": "list", "elements": "dict", "required": True, "options": device},
            "local_ip": {"type": "str", "required": True},
            "ports": {"type": "dict", "required": True, "options": dict.fromkeys(KINDS, number)},
            "part_power": number,
            "replicas": number,
            "manage_rings": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    try:
        check_hash(module.params)
        try:
            pwd.getpwnam("swift")
            import swift  # noqa: F401, PLC0415
        except (ImportError, KeyError):
            if module.check_mode:
                module.exit_json(changed=True, changed_paths=[], problem="")
            raise
        changed = prepare(module.params, module.check_mode)
        if module.params["manage_rings"]:
            changed += build(module.params, module.check_mode)
    except Refused as refusal:
        # Not a failure: the task that carries the hash values shows nothing of itself, and this must be seen.
        module.exit_json(changed=False, changed_paths=[], problem=str(refusal))
    module.exit_json(changed=bool(changed), changed_paths=changed, problem="")


if __name__ == "__main__":
    main()

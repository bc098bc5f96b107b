"""The bucket's copy: encrypted, with what was overwritten or deleted kept aside, and a catalog of every version.

The copy is `copy:current`; what left the bucket lies in `copy:old/ID`. The catalog names each version with the time
of its upload, its MD5, where it lies and when it was seen gone, so that the bucket of any moment can be told from it.
"""

from __future__ import annotations

import dataclasses
import datetime
import gzip
import json
import random
import re
from collections.abc import Collection, Iterable
from typing import Any

from kit_backup.common import ID, RUN, Failed, Settings, last, megabytes, now

CURRENT = "current"
KEPT_CATALOGS = 30
ROUNDS = 3
NANO = re.compile(r"(?<=\.\d{6})\d+")  # more digits of a second than Python reads
S3_AWAY = "is S3 running (systemctl status swift-proxy), and are its keys right? Then start this again"


@dataclasses.dataclass
class Version:
    """One version of an object.

    Attributes:
        path: the key.
        size: bytes.
        time: when it was uploaded, in seconds since 1970.
        md5: of its content; empty when it changed while it was copied.
        where: `current` or `old/ID`.
        gone: when it was seen to be deleted or overwritten, in seconds since 1970; None while it is there.
    """

    path: str
    size: int
    time: float
    md5: str
    where: str = CURRENT
    gone: float | None = None

    def same(self, other: Version) -> bool:
        """Whether both are of the same content, as far as that can be told."""
        if self.size != other.size:
            return False
        return self.md5 == other.md5 if self.md5 and other.md5 else abs(self.time - other.time) < 1


def listing(settings: Settings, remote: str, hashes: bool = False) -> dict[str, Version]:
    """What lies in `remote`, by path; with MD5 where S3 tells it. Raises Failed."""
    more = ["--hash", "--hash-type=md5"] if hashes else []
    done = settings.rclone("lsjson", "--recursive", "--files-only", "--no-mimetype", *more, remote)
    if done.returncode:
        if b"directory not found" in done.stderr and remote.startswith("copy:"):
            return {}
        raise Failed(f"{remote} cannot be listed: {last(done)}", S3_AWAY if remote.startswith("source:") else TARGET)
    found = {}
    for line in done.stdout.decode().splitlines():
        text = line.strip().rstrip(",")
        if text.startswith("{"):
            item = json.loads(text)
            moment = datetime.datetime.fromisoformat(NANO.sub("", item["ModTime"])).timestamp()
            md5 = (item.get("Hashes") or {}).get("md5", "")
            found[item["Path"]] = Version(item["Path"], item["Size"], moment, md5)
    return found


TARGET = "see that the target is mounted and readable, and that the vault is the one that it was written with"


def _names(paths: Iterable[str]) -> str:
    """A file with `paths` for --files-from-raw."""
    RUN.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = RUN / "names"
    path.write_text("".join(f"{one}\n" for one in paths))
    return f"--files-from-raw={path}"


def md5_by_reading(settings: Settings, remote: str, paths: Collection[str]) -> dict[str, str]:
    """The MD5 of each of `paths` that can be read from `remote`, by reading it whole."""
    if not paths:
        return {}
    done = settings.rclone("hashsum", "MD5", "--download", remote, _names(paths))
    found = {}
    for line in done.stdout.decode().splitlines():
        digest, _, path = line.partition("  ")
        if len(digest) == 32 and path:  # noqa: PLR2004
            found[path] = digest
    return found


class Catalog:
    """All versions that the copy holds.

    Args:
        settings: the host's.
    """

    def __init__(self, settings: Settings) -> None:
        """Read the newest catalog of the copy. Raises Failed when there is one and it cannot be read."""
        self.settings = settings
        self.versions: list[Version] = []
        self.id = ""
        names = catalogs(settings)
        if names:
            self.id = names[-1]
            done = settings.rclone("cat", f"copy:catalog/{self.id}.gz")
            try:
                lines = gzip.decompress(done.stdout).decode().splitlines()
            except (OSError, EOFError, ValueError):
                raise Failed(
                    f"the catalog {self.id} of {settings.target_words} is damaged: {last(done)}", TARGET
                ) from None
            self.versions = [Version(*json.loads(line)) for line in lines]

    def there(self) -> dict[str, Version]:
        """The versions that the bucket had when it was last copied, by path."""
        return {v.path: v for v in self.versions if v.gone is None}

    def at(self, moment: float | None) -> dict[str, Version]:
        """The versions that the bucket had at `moment` (seconds since 1970), or has, by path.

        What was deleted between two copies counts as there for all of that time.
        """
        if moment is None:
            return self.there()
        found: dict[str, Version] = {}
        for version in self.versions:
            if version.time <= moment and (version.gone is None or version.gone > moment):
                held = found.get(version.path)
                if held is None or version.time >= held.time:
                    found[version.path] = version
        return found

    def settle(self) -> dict[str, Version]:
        """Put right where versions lie, after a run that was interrupted, and return what lies in CURRENT.

        A run moves aside what left the bucket before it copies what is new, and writes the catalog last. So what lies
        in a folder that is younger than the catalog is the version that the catalog still sees in CURRENT.
        """
        there = self.there()
        for folder in folders(self.settings):
            if self.id and folder[:16] > self.id:
                for path in listing(self.settings, f"copy:old/{folder}"):
                    if path in there and there[path].where == CURRENT:
                        there[path].where = f"old/{folder}"
        return listing(self.settings, f"copy:{CURRENT}")

    def write(self, name: str) -> None:
        """Write the catalog as `name` (an ID) and drop the oldest ones. Raises Failed."""
        lines = [json.dumps(dataclasses.astuple(v), separators=(",", ":")) for v in self.versions]
        data = gzip.compress("\n".join(lines).encode(), 6, mtime=0)
        store(self.settings, f"catalog/{name}.gz", data)
        self.id = name
        for old in catalogs(self.settings)[:-KEPT_CATALOGS]:
            self.settings.rclone("deletefile", f"copy:catalog/{old}.gz")


def folders(settings: Settings) -> list[str]:
    """The folders of what was set aside, oldest first. Raises Failed."""
    done = settings.rclone("lsf", "--dirs-only", "copy:old")
    if done.returncode and b"directory not found" not in done.stderr:
        raise Failed(f"{settings.target_words} cannot be read: {last(done)}", TARGET)
    return sorted(line.rstrip("/") for line in done.stdout.decode().split())


def store(settings: Settings, name: str, data: bytes) -> None:
    """Write `data` encrypted into the copy as `name`, as a whole or not at all. Raises Failed."""
    scratch = f"copy:new/{name.replace('/', '-')}"
    done = settings.rclone("rcat", scratch, stdin=data)
    if not done.returncode:
        done = settings.rclone("moveto", scratch, f"copy:{name}")
    if done.returncode:
        raise Failed(f"{settings.target_words} cannot be written: {last(done)}", FULL)


FULL = "give the target space, see that it is mounted writable, and start this again; earlier backups are untouched"


def catalogs(settings: Settings) -> list[str]:
    """The IDs of the catalogs, oldest first. Raises Failed."""
    check_key(settings)
    return names(settings, "catalog", ".gz")


def check_key(settings: Settings) -> None:
    """See that the copy is encrypted with this host's secrets, before anything is added to it. Raises Failed."""
    if settings.key_checked:
        return
    raw = settings.rclone("lsf", f"target:{settings.base}/objects")
    read = settings.rclone("lsf", "copy:")
    # rclone leaves out the names that it cannot decrypt, and ends well.
    if len(read.stdout.split()) < len(raw.stdout.split()):
        raise Failed(
            f"{settings.target_words} was encrypted with other secrets than vault_backup_bucket_key and "
            "vault_backup_bucket_salt of this vault",
            "bring back the vault that wrote it: it lies in the target's folder site/ (docs/restore.md)",
        )
    settings.key_checked = True


def names(settings: Settings, folder: str, suffix: str) -> list[str]:
    """The IDs of the files in `folder` of the copy, oldest first. Raises Failed."""
    done = settings.rclone("lsf", "--files-only", f"copy:{folder}")
    if done.returncode and b"directory not found" not in done.stderr:
        raise Failed(f"{settings.target_words} cannot be read: {last(done)}", TARGET)
    found = sorted(line.removesuffix(suffix) for line in done.stdout.decode().split() if line.endswith(suffix))
    return found


def reach(settings: Settings) -> None:
    """See that the bucket answers. Raises Failed."""
    done = settings.rclone("lsf", "--max-depth=1", f"source:{settings.bucket['bucket']}", "--files-only")
    if done.returncode:
        raise Failed(f"the bucket {settings.bucket['bucket']} does not answer: {last(done)}", S3_AWAY)


@dataclasses.dataclass
class Copied:
    """What a run of `copy` did: objects and bytes in the bucket, and those that were copied and set aside."""

    objects: int = 0
    bytes: int = 0
    copied: int = 0
    copied_bytes: int = 0
    set_aside: int = 0


def copy(settings: Settings, moment: datetime.datetime) -> Copied:
    """Bring the copy to the bucket's state; what it no longer has is set aside. Raises Failed.

    An object that changes while it is copied is copied again, up to ROUNDS times. The catalog is written last: a run
    that is interrupted has lost nothing, and the next one completes it.
    """
    source, done = f"source:{settings.bucket['bucket']}", Copied()
    catalog = Catalog(settings)
    present = catalog.settle()
    kept = [v for v in catalog.versions if v.gone is not None]
    held = {}
    for version in catalog.there().values():
        if version.where != CURRENT:  # set aside by a run that did not come to an end
            kept.append(dataclasses.replace(version, gone=_stamp(version.where)))
        elif version.path in present and present[version.path].size == version.size:
            held[version.path] = version
    before, changed_at_all = listing(settings, source, hashes=True), len(held) != len(catalog.there())
    for attempt in range(ROUNDS):
        _fill_md5(settings, source, before, held)
        changed = {p: v for p, v in before.items() if p not in held or not held[p].same(v)}
        gone = [p for p in held if p not in before or p in changed] + [
            p for p in changed if p in present and p not in held
        ]
        if not changed and not gone:
            break
        changed_at_all = True
        settings.need(sum(v.size for v in changed.values()), f"{len(changed)} new objects of the bucket")
        folder = f"old/{moment.strftime(ID)}-{attempt}"
        _run(settings, "move", f"copy:{CURRENT}", f"copy:{folder}", gone)
        for path in gone:
            if path in held:
                version = held.pop(path)
                kept.append(dataclasses.replace(version, where=folder, gone=moment.timestamp()))
                done.set_aside += 1
        _run(settings, "copy", source, f"copy:{CURRENT}", changed)
        after = listing(settings, source, hashes=True)
        present = listing(settings, f"copy:{CURRENT}")
        for path, version in changed.items():
            steady = path in after and after[path].size == version.size and after[path].time == version.time
            if steady and path in present and present[path].size == version.size:
                held[path] = version
                done.copied += 1
                done.copied_bytes += version.size
            elif attempt == ROUNDS - 1 and path in present:
                held[path] = Version(path, present[path].size, version.time, "")
        before = after
    done.objects, done.bytes = len(held), sum(v.size for v in held.values())
    if changed_at_all or not catalog.id:
        catalog.versions = kept + list(held.values())
        catalog.write(moment.strftime(ID))
    return done


def _fill_md5(settings: Settings, source: str, before: dict[str, Version], held: dict[str, Version]) -> None:
    """Read those objects of which S3 tells no MD5 (uploads in parts), unless they are as they were."""
    for path, version in before.items():
        old = held.get(path)
        if not version.md5 and old and old.same(version):
            version.md5 = old.md5
    unknown = [p for p, v in before.items() if not v.md5]
    for path, md5 in md5_by_reading(settings, source, unknown).items():
        before[path].md5 = md5


def _run(settings: Settings, verb: str, source: str, target: str, paths: Collection[str]) -> None:
    if not paths:
        return
    done = settings.rclone(verb, source, target, _names(paths), "--no-traverse")
    if done.returncode:
        away = b"connection refused" in done.stderr or b"http" in done.stderr.lower()
        raise Failed(f"rclone {verb} {source} {target} failed: {last(done)}", S3_AWAY if away else FULL)


def _stamp(where: str) -> float:
    """When `old/ID` was begun, in seconds since 1970."""
    return datetime.datetime.strptime(where[4:20], ID).replace(tzinfo=datetime.UTC).timestamp()


def expire(settings: Settings, cutoff: float, moment: datetime.datetime) -> int:
    """Delete what left the bucket before `cutoff` (seconds since 1970); return how many versions. Raises Failed."""
    catalog = Catalog(settings)
    dropped = [v for v in catalog.versions if v.gone is not None and v.gone < cutoff]
    if dropped:
        catalog.versions = [v for v in catalog.versions if v.gone is None or v.gone >= cutoff]
        catalog.write(moment.strftime(ID))
    for folder in folders(settings):
        if _stamp(f"old/{folder}") < cutoff:
            settings.rclone("purge", f"copy:old/{folder}")
    return len(dropped)


def verify(settings: Settings, percent: int) -> tuple[dict[str, Any], list[str]]:
    """Read the copy back through its encryption and compare it with the catalog; what differs is named.

    `percent` of the versions are read, picked at random; whether each is there is checked for all of them.
    """
    catalog, differences = Catalog(settings), []
    catalog.settle()
    by_folder: dict[str, list[Version]] = {}
    for version in catalog.versions:
        by_folder.setdefault(version.where, []).append(version)
    read = size = 0
    for folder, versions in sorted(by_folder.items()):
        present = listing(settings, f"copy:{folder}")
        for version in versions:
            if version.path not in present:
                differences.append(f"{folder}: {version.path} is missing")
            elif present[version.path].size != version.size:
                differences.append(
                    f"{folder}: {version.path} has {present[version.path].size} bytes, and had {version.size}"
                )
        picked = [v for v in versions if v.path in present and random.random() * 100 < percent]
        digests = md5_by_reading(settings, f"copy:{folder}", [v.path for v in picked])
        for version in picked:
            if version.path not in digests:
                differences.append(f"{folder}: {version.path} cannot be read back")
            elif version.md5 and digests[version.path] != version.md5:
                differences.append(f"{folder}: {version.path} came back changed")
            read, size = read + 1, size + version.size
    there = catalog.there().values()
    counts = {"objects": len(there), "bytes": sum(v.size for v in there), "versions": len(catalog.versions)}
    return {**counts, "read": read, "read_bytes": size, "catalog": catalog.id}, differences


@dataclasses.dataclass
class Restored:
    """What a restore of the bucket did: objects and bytes that are there, that were sent, and that were removed."""

    objects: int = 0
    bytes: int = 0
    sent: int = 0
    removed: int = 0


def restore(settings: Settings, moment: float | None) -> Restored:
    """Bring the bucket to its state at `moment` (seconds since 1970), or to that of the last copy. Raises Failed."""
    remote = f"source:{settings.bucket['bucket']}"
    catalog = Catalog(settings)
    catalog.settle()
    wanted = catalog.at(moment)
    found = _hashed(settings, remote, wanted)
    lacking = {p: v for p, v in wanted.items() if not (p in found and v.md5 and found[p].md5 == v.md5)}
    surplus = [p for p in found if p not in wanted]
    done = Restored(len(wanted), sum(v.size for v in wanted.values()), len(lacking), len(surplus))
    by_folder: dict[str, list[Version]] = {}
    for version in lacking.values():
        by_folder.setdefault(version.where, []).append(version)
    for folder, versions in sorted(by_folder.items()):
        _run(settings, "copy", f"copy:{folder}", remote, [v.path for v in versions])
    if surplus:
        deleted = settings.rclone("delete", remote, _names(surplus))
        if deleted.returncode:
            raise Failed(f"{len(surplus)} newer objects could not be removed: {last(deleted)}", S3_AWAY)
    _compare(settings, remote, wanted)
    return done


def put_back(settings: Settings, path: str, moment: float | None) -> Version:
    """Bring one object to its state at `moment` (seconds since 1970), or to that of the last copy, and return it.

    Raises Failed, also when what S3 then serves is not what the backup holds.
    """
    settings.check_target()
    remote = f"source:{settings.bucket['bucket']}"
    catalog = Catalog(settings)
    catalog.settle()
    version = catalog.at(moment).get(path)
    if version is None:
        raise Failed(
            f"the backups hold no «{path}» of that time",
            "give the key in the bucket, such as 1/RUN/artifacts/FILE, and --time if it was deleted since",
        )
    _run(settings, "copy", f"copy:{version.where}", remote, [path])
    served = md5_by_reading(settings, remote, [path]).get(path)
    if not served or served != (version.md5 or served):
        raise Failed(f"«{path}» was written, and S3 does not serve it as it was", S3_AWAY)
    return version


def _hashed(settings: Settings, remote: str, wanted: dict[str, Version]) -> dict[str, Version]:
    """What lies in `remote`, with the MD5 of all that may be what is wanted, if need be by reading it."""
    found = listing(settings, remote, hashes=True)
    unknown = [p for p, v in found.items() if not v.md5 and p in wanted and wanted[p].size == v.size]
    for path, md5 in md5_by_reading(settings, remote, unknown).items():
        found[path].md5 = md5
    return found


def _compare(settings: Settings, remote: str, wanted: dict[str, Version]) -> None:
    """See that the bucket is what was wanted, object for object. Raises Failed."""
    found = _hashed(settings, remote, wanted)
    wrong = [p for p in wanted if p not in found] + [p for p in found if p not in wanted]
    wrong += [p for p, v in wanted.items() if p in found and v.md5 and found[p].md5 != v.md5]
    if wrong:
        raise Failed(
            f"after the restore {len(wrong)} of {len(wanted)} objects differ from the backup: {', '.join(wrong[:5])}",
            "run the restore again; objects that cannot be read are named by mlflow-kit-backup drill",
        )


def describe(done: Copied) -> str:
    """`done` in words."""
    return (
        f"bucket: {done.objects} objects, {megabytes(done.bytes)}; {done.copied} copied "
        f"({megabytes(done.copied_bytes)}), {done.set_aside} set aside"
    )


def cutoff(settings: Settings, oldest_backup: float | None) -> float:
    """Before when versions may be dropped: the retention, or the oldest backup of the database if that is earlier."""
    limit = now().timestamp() - int(settings.held["retention_days"]) * 86400
    return min(limit, oldest_backup) if oldest_backup is not None else limit

"""What Prometheus cannot ask for: how old backups and drills are, what S3 set aside, and the memory of each unit.

Writes one file for the node exporter, as a whole. Reads what everybody may read, and names in Swift's folders.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

KIT = pathlib.Path("/var/lib/mlflow-kit")
PROC = pathlib.Path("/proc")
KINDS = "mlflow|postgresql|swift|nginx|memcached|prometheus|mtail|object-store"
UNIT = re.compile(rf"/(?:system\.slice/)?(?:system-[^/]+\.slice/)?((?:{KINDS})[^/]*)\.service")


def seconds(moment: str) -> float:
    """The time that `moment` (ISO 8601) names, in seconds since 1970."""
    return datetime.datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()


def watched_since(folder: pathlib.Path) -> float:
    """When this program ran here first: what a backup that never was is measured from."""
    mark = folder / "since"
    if not mark.exists():
        mark.touch()
    return mark.stat().st_mtime


def backups(since: float) -> Iterator[str]:
    """Lines about backups and drills, from the state files that they leave."""
    yield "# TYPE mlflow_kit_last_good_timestamp_seconds gauge"
    yield "# TYPE mlflow_kit_last_failed gauge"
    yield "# TYPE mlflow_kit_watched_since_timestamp_seconds gauge"
    for kind in ("backup", "drill"):
        labels = f'{{kind="{kind}"}}'
        yield f"mlflow_kit_watched_since_timestamp_seconds{labels} {since:.0f}"
        try:
            state: dict[str, Any] = json.loads((KIT / f"{kind}.json").read_text())
        except FileNotFoundError:
            yield f"mlflow_kit_last_failed{labels} 0"
            continue
        yield f"mlflow_kit_last_failed{labels} {int(state.get('result') == 'failed')}"
        good = state.get("last_good") or {}
        if good.get("started"):
            yield f"mlflow_kit_last_good_timestamp_seconds{labels} {seconds(good['started']):.0f}"


def quarantined(data: pathlib.Path) -> Iterator[str]:
    """Lines about what Swift found damaged and set aside, by kind: each is a folder of its own, of any device."""
    yield "# TYPE mlflow_kit_s3_quarantined gauge"
    for kind in ("objects", "containers", "accounts"):
        count = sum(1 for _ in data.glob(f"*/quarantined/{kind}*/*"))
        yield f'mlflow_kit_s3_quarantined{{kind="{kind}"}} {count}'


def memory() -> Iterator[str]:
    """Lines about the memory of each unit: what its processes have for themselves, and what they share once."""
    own: collections.Counter[str] = collections.Counter()
    shared: collections.Counter[str] = collections.Counter()
    for process in PROC.glob("[0-9]*"):
        try:
            found = UNIT.search((process / "cgroup").read_text())
            status = (process / "status").read_text() if found else ""
        except OSError:
            continue  # it has ended meanwhile
        if not found:
            continue
        kilobytes = dict(re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.MULTILINE))
        own[found[1]] += 1024 * int(kilobytes.get("RssAnon", 0))
        shared[found[1]] = max(shared[found[1]], 1024 * int(kilobytes.get("RssShmem", 0)))
    yield "# TYPE mlflow_kit_unit_memory_bytes gauge"
    for name in sorted(own):
        yield f'mlflow_kit_unit_memory_bytes{{unit="{name}"}} {own[name] + shared[name]}'


def main() -> None:
    """Command line: `figures.py [--backups] [--swift DATA] FOLDER`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backups", action="store_true", help="this host takes backups")
    parser.add_argument("--swift", type=pathlib.Path, metavar="DATA", help="where this host's Swift keeps its devices")
    parser.add_argument("folder", type=pathlib.Path, help="where the node exporter reads")
    a = parser.parse_args()
    lines = list(memory())
    if a.backups:
        lines += backups(watched_since(a.folder))
    if a.swift:
        lines += quarantined(a.swift)
    scratch = a.folder / ".figures.new"
    scratch.write_text("\n".join(lines) + "\n")
    scratch.replace(a.folder / "figures.prom")


if __name__ == "__main__":
    main()

"""Keep what was measured in docs/performance.json, and render it into docs/performance.md."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import re
import sys
from typing import Any

from kit import vm

RECORD = vm.CHECKOUT / "docs" / "performance.json"
PAGE = vm.CHECKOUT / "docs" / "performance.md"
BEGIN, END = "<!-- table: scripts/bench table -->", "<!-- end of the table -->"
RELEASES = {"trixie": "Debian 13", "bookworm": "Debian 12"}


def this_machine() -> str:
    """What it was measured on: cores and memory."""
    text = pathlib.Path("/proc/meminfo").read_text()
    kilobytes = int(re.findall(r"^MemTotal: +(\d+)", text, re.MULTILINE)[0])
    return f"{os.cpu_count()} cores, {kilobytes / 1024 / 1024:.0f} GB"


def record(line: dict[str, Any], suite: str, path: pathlib.Path = RECORD) -> None:
    """Put a measurement into the record, in the place of an older one of the same bench, case, peer and release."""
    known: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    new = {"date": today, "machine": this_machine(), "system": RELEASES[suite], **line}

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(one[name] for name in ("bench", "case", "peer_name", "system"))

    kept = [one for one in known if key(one) != key(new)]
    place = next((n for n, one in enumerate(known) if key(one) == key(new)), len(kept))
    kept.insert(place, new)
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def table(known: list[dict[str, Any]]) -> str:
    """The record as a Markdown table."""
    rows = ["| bench | case | unit | kit | peer | kit / peer | peer is | system | measured |"]
    rows.append("|---|---|---|---:|---:|---:|---|---|---|")
    for one in known:
        better = "less is better" if one["better"] == "lower" else "more is better"
        rows.append(
            f"| {one['bench']} | {one['case']} | {one['unit']}, {better} | {one['kit']:g} | {one['peer']:g} "
            f"| **{one['ratio']:.2f}** | {one['peer_name']} | {one['system']}, {one['machine']} | {one['date']} |"
        )
    return "\n".join(rows)


def page(text: str, known: list[dict[str, Any]]) -> str:
    """`text` with the table between its markers brought up to date. Raises ValueError without markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no «{BEGIN}» and «{END}»")
    return f"{before}{BEGIN}\n{table(known)}\n{END}{after}"


def render(*, check: bool = False) -> int:
    """Render docs/performance.md from the record; with `check`, only say (status 1) whether it is behind."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else []
    old = PAGE.read_text()
    new = page(old, known)
    if check and new != old:
        print("docs/performance.md is behind docs/performance.json: run scripts/bench table", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(new)
    return 0

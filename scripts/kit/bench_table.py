"""Keep what was measured in docs/performance.json, and render it into docs/performance.md, as a table and pictures."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import re
import sys
from typing import Any

from kit import bench_plots, vm

RECORD = vm.CHECKOUT / "docs" / "performance.json"
PAGE = vm.CHECKOUT / "docs" / "performance.md"
BEGIN, END = "<!-- table: scripts/bench table -->", "<!-- end of the table -->"
PLOTS, PLOTS_END = "<!-- pictures: scripts/bench table -->", "<!-- end of the pictures -->"
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


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def table(known: list[dict[str, Any]]) -> str:
    """The record as a Markdown table."""
    rows = ["| bench | case | unit | kit | peer | kit / peer | peer is | system | measured |"]
    rows.append("|---|---|---|---:|---:|---:|---|---|---|")
    for one in known:
        better = "less is better" if one["better"] == "lower" else "more is better"
        rows.append(
            f"| {one['bench']} | {one['case']} | {one['unit']}, {better} | {one['kit']:g} | {one['peer']:g} "
            f"| **{_ratio(one['ratio'])}** | {one['peer_name']} | {one['system']}, {one['machine']} | {one['date']} |"
        )
    return "\n".join(rows)


def _between(text: str, begin: str, end: str, content: str) -> str:
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page has no «{begin}» and «{end}»")
    return f"{before}{begin}\n{content}\n{end}{after}"


def page(text: str, known: list[dict[str, Any]]) -> str:
    """`text` with table and pictures between their markers brought up to date. Raises ValueError without markers."""
    images = [
        f"![{name.removeprefix('performance-').removesuffix('.svg')}]({name})" for name in bench_plots.pictures(known)
    ]
    return _between(_between(text, BEGIN, END, table(known)), PLOTS, PLOTS_END, "\n\n".join(images))


def render(*, check: bool = False) -> int:
    """Render docs/performance.md and its pictures from the record; with `check`, only say (status 1) what is behind."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else []
    wanted = {PAGE: page(PAGE.read_text(), known)}
    wanted |= {RECORD.with_name(name): content for name, content in bench_plots.pictures(known).items()}
    stale = [path for path in RECORD.parent.glob("performance-*.svg") if path not in wanted]
    behind = [path for path, content in wanted.items() if not path.exists() or path.read_text() != content]
    if check and (behind or stale):
        names = ", ".join(sorted(path.name for path in [*behind, *stale]))
        print(f"behind docs/performance.json: {names}; run scripts/bench table", file=sys.stderr)
        return 1
    if not check:
        for path in behind:
            path.write_text(wanted[path])
        for path in stale:
            path.unlink()
    return 0

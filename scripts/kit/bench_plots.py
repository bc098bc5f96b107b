"""Pictures of what was measured: one SVG a bench, drawn from the record alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, LEFT, BARS, ROW, BAR, HEAD = 860, 300, 400, 58, 16, 62
KIT, PEER, INK, FAINT = "#1f6feb", "#b4bcc6", "#1f2328", "#59636e"


def _text(x: float, y: float, words: str, *, size: int = 13, fill: str = INK, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}"{more}>{escape(words)}</text>'


def _bar(y: float, value: float, rounds: Sequence[float], most: float, fill: str) -> list[str]:
    """A bar with its figure, and a thin line from the lowest round to the highest."""
    scale = BARS / most if most else 0
    lines = [f'<rect x="{LEFT}" y="{y:g}" width="{max(value * scale, 1):.1f}" height="{BAR}" rx="2" fill="{fill}"/>']
    end = value
    if len(rounds) > 1:
        low, high = min(rounds), max(rounds)
        end, middle = max(value, high), y + BAR / 2
        x, to = LEFT + low * scale, LEFT + high * scale
        lines.append(f'<path d="M{x:.1f} {middle:g}H{to:.1f}" stroke="{INK}" stroke-width="1.2"/>')
    lines.append(
        _text(LEFT + end * scale + 6, y + BAR - 3, f"{value:,.4g}" if value < 1000 else f"{value:,.0f}", size=12)
    )
    return lines


def _rounds(one: dict[str, Any], name: str) -> list[float]:
    found = one["detail"].get(name, [])
    return [float(value) for value in found] if isinstance(found, list) else []


def draw(bench: str, known: Sequence[dict[str, Any]]) -> str:
    """One bench's picture: for each case the kit's bar above the peer's, on a scale of the case's own."""
    systems = {one["system"] for one in known}
    height = HEAD + ROW * len(known) + 26
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" role="img">',
        f"<title>scripts/bench {escape(bench)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(16, 26, bench, size=17, more=' font-weight="600"'),
        f'<rect x="{LEFT}" y="15" width="12" height="12" rx="2" fill="{KIT}"/>',
        _text(LEFT + 18, 26, "kit", size=12),
        f'<rect x="{LEFT + 60}" y="15" width="12" height="12" rx="2" fill="{PEER}"/>',
        _text(LEFT + 78, 26, "peer", size=12),
        _text(
            16,
            46,
            "each case on its own scale; the thin line goes from the lowest round to the highest",
            size=11,
            fill=FAINT,
        ),
    ]
    for number, one in enumerate(known):
        y = HEAD + number * ROW
        rounds = {side: _rounds(one, f"{side}_rounds") for side in ("kit", "peer")}
        most = max([one["kit"], one["peer"], *rounds["kit"], *rounds["peer"]])
        label = f"{one['case']} ({one['system']})" if len(systems) > 1 else one["case"]
        better = "less is better" if one["better"] == "lower" else "more is better"
        lines.append(_text(16, y + 13, label, more=' font-weight="600"'))
        lines.append(_text(16, y + 28, f"{one['unit']}, {better}", size=11, fill=FAINT))
        peer = one["peer_name"]
        lines.append(_text(16, y + 42, peer if len(peer) < 50 else peer[:48] + "…", size=10, fill=FAINT))
        lines += _bar(y + 2, one["kit"], rounds["kit"], most, KIT)
        lines += _bar(y + 4 + BAR, one["peer"], rounds["peer"], most, PEER)
        if one["ratio"] is not None:
            lines.append(
                _text(WIDTH - 16, y + 22, f"×{one['ratio']:.2f}", size=14, more=' text-anchor="end" font-weight="600"')
            )
    dates = sorted({one["date"] for one in known})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    machines = sorted({one["machine"] for one in known})
    words = "; ".join([when, ", ".join(machines), ", ".join(sorted(systems)), "× is kit over peer"])
    lines += [_text(16, height - 10, words, size=11, fill=FAINT), "</svg>"]
    return "\n".join(lines) + "\n"


def pictures(known: Sequence[dict[str, Any]]) -> dict[str, str]:
    """File name to content, for each bench of the record."""
    ordered = sorted(known, key=lambda one: str(one["bench"]))
    groups = itertools.groupby(ordered, key=lambda one: str(one["bench"]))
    return {f"performance-{bench}.svg": draw(bench, list(found)) for bench, found in groups}

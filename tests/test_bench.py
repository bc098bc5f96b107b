"""The benchmarks' own arithmetic: what they print, keep and render."""

from __future__ import annotations

import json
import pathlib
import re

import pytest
from kit import bench, bench_deploy, bench_lab, bench_table, vm

LINE = bench_lab.Measurement("deploy", "case", "s", "lower", 40.004, 80.0, "guide", {"rounds": 1}).line()
OUTPUT = """
TASK [Make what is missing] ****************
Friday 20 November 2026  11:39:54 +0000 (0:00:00.068)       0:00:00.500 *******
ok: [bench]

TASK [postgresql : install | Install the packages] ****************
Friday 20 November 2026  11:39:56 +0000 (0:00:01.500)       0:00:02.000 *******
changed: [bench]

RUNNING HANDLER [postgresql : Reload] ****************
Friday 20 November 2026  11:40:56 +0000 (0:01:00.000)       0:01:02.000 *******

TASKS RECAP ********************************
Friday 20 November 2026  11:40:58 +0000 (0:00:02.250)       0:01:04.250 *******
===============================================================================
postgresql : install | Install the packages ---------------------------- 60.00s
Make what is missing --------------------------------------------------- 1.50s
"""


def test_a_line_has_the_contracts_fields_in_order() -> None:
    """Whoever reads the lines relies on these names, and on the ratio being kit over peer."""
    names = ["bench", "case", "unit", "better", "kit", "peer", "peer_name", "ratio", "detail"]
    assert list(LINE) == names
    assert LINE["ratio"] == 0.5


def test_times_are_read_from_ansibles_output() -> None:
    """Seconds by role, handlers included, and the longest tasks by name."""
    assert bench_deploy.role_seconds(OUTPUT) == {"playbooks": 1.5, "postgresql": 62.25}
    assert bench_deploy.task_seconds(OUTPUT)["postgresql : install | Install the packages"] == 60.0


def test_the_guide_installs_what_the_kit_locks() -> None:
    """Another version on one side would compare two MLflows."""
    lock = (vm.CHECKOUT / "requirements" / "server.txt").read_text()
    for name in ("mlflow", "psycopg2-binary", "boto3"):
        found = re.search(rf"^{name}==(\S+)", lock, re.MULTILINE)
        assert found and f"{name}=={found[1]}" in bench_deploy.guide()
    with pytest.raises(bench_lab.BenchError, match="no-such-package"):
        bench_lab.pinned("server.txt", "no-such-package")


def test_medians_are_of_each_value() -> None:
    """An outlier of one round does not reach the figure."""
    assert bench_lab.medians([{"a": 1, "b": 9}, {"a": 2, "b": 8}, {"a": 100, "b": 7}]) == {"a": 2, "b": 8}


def test_a_new_figure_takes_the_old_ones_place(tmp_path: pathlib.Path) -> None:
    """The record holds one figure for each comparison and release, in a steady order."""
    path = tmp_path / "performance.json"
    bench_table.record(LINE, "trixie", path)
    bench_table.record({**LINE, "bench": "idle"}, "trixie", path)
    bench_table.record({**LINE, "kit": 30.0}, "trixie", path)
    bench_table.record(LINE, "bookworm", path)
    kept = [(one["bench"], one["system"], one["kit"]) for one in json.loads(path.read_text())]
    assert kept == [("deploy", "Debian 13", 30.0), ("idle", "Debian 13", 40.0), ("deploy", "Debian 12", 40.0)]


def test_the_table_replaces_what_is_between_its_markers() -> None:
    """Twice gives the same; the words around stay; a page without markers is refused."""
    known = [{"date": "2026-01-02", "machine": "2 cores, 24 GB", "system": "Debian 13", **LINE}]
    old = f"before\n{bench_table.BEGIN}\nold\n{bench_table.END}\nafter\n"
    new = bench_table.page(old, known)
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new
    assert "| deploy | case | s, less is better | 40 | 80 | **0.50** | guide |" in new
    assert bench_table.page(new, known) == new
    with pytest.raises(ValueError, match="scripts/bench table"):
        bench_table.page("no markers", known)


def test_the_committed_table_is_the_records() -> None:
    """Figures are never typed into the page."""
    assert bench_table.render(check=True) == 0


@pytest.mark.parametrize("argv", [["nothing"], ["deploy", "--rounds", "0"]])
def test_a_wrong_call_is_refused_before_anything_boots(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Argparse's status 2, and no machine."""
    monkeypatch.setattr("sys.argv", ["bench", *argv])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2

"""The benchmarks' own arithmetic: what they print, keep and render."""

from __future__ import annotations

import json
import pathlib
import re
from xml.etree import ElementTree

import pytest
from kit import (
    bench,
    bench_api,
    bench_deploy,
    bench_idle,
    bench_lab,
    bench_noop,
    bench_plots,
    bench_rollout,
    bench_table,
    vm,
)

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
    pictures = f"{bench_table.PLOTS}\nold\n{bench_table.PLOTS_END}"
    old = f"before\n{bench_table.BEGIN}\nold\n{bench_table.END}\n{pictures}\nafter\n"
    new = bench_table.page(old, known)
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new
    assert "| deploy | case | s, less is better | 40 | 80 | **0.50** | guide |" in new
    assert "![deploy](performance-deploy.svg)" in new
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


def test_a_load_counts_only_when_every_answer_is_a_200() -> None:
    """One refused or broken request makes the figures those of something else."""
    told = '{"requests":100,"seconds":5.0,"bytes":1000000,"p50_ms":1.0,"p99_ms":9.5,"worst_ms":20.0,'
    told += '"not200":%d,"broken":%d}'
    assert bench_api.parse(f"words\nRESULT {told % (0, 0)}\n") == {
        "requests_s": 20.0,
        "p50_ms": 1.0,
        "p99_ms": 9.5,
        "worst_ms": 20.0,
        "mb_s": 0.2,
    }
    with pytest.raises(bench_lab.BenchError, match="RESOURCE_DOES_NOT_EXIST"):
        bench_api.parse(f"RESULT {told % (1, 0)}\nFIRST 404 RESOURCE_DOES_NOT_EXIST\n")
    with pytest.raises(bench_lab.BenchError, match="every request"):
        bench_api.parse(f"RESULT {told % (0, 1)}\n")
    with pytest.raises(bench_lab.BenchError, match="unable to connect"):
        bench_api.parse("unable to connect")


def test_settings_reach_the_load_as_they_are() -> None:
    """Quotes, backslashes and line ends of a body are no syntax of Lua's."""
    assert bench_api.lua({"a": [1, 'say "x" \\ y\n']}) == '{["a"] = {1, "say \\034x\\034 \\092 y\\010"}}'


def test_a_pages_assets_are_found() -> None:
    """Scripts and styles by their relative paths; what stands elsewhere is not part of the page."""
    page = (
        '<link rel="icon" href="./static-files/favicon.ico"/>'
        '<script defer="defer" src="static-files/js/main.1.js"></script>'
        '<link href="static-files/css/main.2.css" rel="stylesheet"><script src="https://elsewhere.test/x.js"></script>'
    )
    assert bench_api.assets(page) == ["/static-files/js/main.1.js", "/static-files/css/main.2.css"]


@pytest.mark.parametrize(
    ("unit", "counts"),
    [
        ("mlflow@1.service", True),
        ("mlflow-rest@12.service", True),
        ("mlflow-gc@delete.service", False),
        ("kit-bench-plain.service", False),
    ],
)
def test_the_memory_of_every_kind_of_instance_counts(unit: str, counts: bool) -> None:
    """A site with two kinds would look smaller than it is."""
    group = f"0::/system.slice/system-mlflow.slice/{unit}"
    assert bool(re.search(bench_api.MEMORY["kit"], group)) is counts
    assert bool(re.search(bench_idle.STACK["mlflow"], group)) is counts


def test_a_ratio_to_nothing_is_none() -> None:
    """Where the peer has no failure either, there is nothing to divide by."""
    line = bench_lab.Measurement("rollout", "failed", "requests", "lower", 0.0, 0.0, "restart", {}).line()
    assert line["ratio"] is None
    row = bench_table.table([{"date": "2026-01-02", "machine": "m", "system": "Debian 13", **line}])
    assert "| **–** |" in row


def test_pictures_are_drawn_from_the_record_alone() -> None:
    """One for each bench, the same each time, with whatever a name may hold escaped."""
    one = {"date": "2026-01-02", "machine": "2 cores, 24 GB", "system": "Debian 13", **LINE}
    one["detail"] = {"kit_rounds": [38.0, 40.0, 42.0], "peer_rounds": [80.0]}
    known = [one, {**one, "bench": "idle", "case": "a < b & c"}]
    pictures = bench_plots.pictures(known)
    assert sorted(pictures) == ["performance-deploy.svg", "performance-idle.svg"]
    assert pictures == bench_plots.pictures(known)
    root = ElementTree.fromstring(pictures["performance-idle.svg"])
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a < b & c" in texts and "×0.50" in texts and "40" in texts and "80" in texts
    widths = [
        float(node.attrib["width"]) for node in root.iter("{http://www.w3.org/2000/svg}rect") if "rx" in node.attrib
    ]
    assert widths[-2:] == [200.0, 400.0]


def test_a_run_that_changed_something_is_no_noop() -> None:
    """The names of the tasks that did, handlers and loops included; the recap's words do not count."""
    output = OUTPUT + "\nPLAY RECAP ****\nbench : ok=3 changed=1\nchanged: nothing\n"
    assert bench_noop.changed(output) == ["postgresql : install | Install the packages"]
    assert bench_noop.changed(output.replace("\nchanged: [bench]", "\nok: [bench]")) == []


def test_a_rollouts_added_wait_is_against_the_calm_before() -> None:
    """Each case has what the restart added to the wait of the same clients on the same side."""
    calm = {"requests": 100, "failed": 0, "failing_s": 0.0, "seconds": 10.0, "gave_up": []}
    calm |= {"wait_median_ms": 20.0, "wait_p99_ms": 50.0, "wait_worst_ms": 60.0}
    kit = {"calm": calm, "through": {**calm, "wait_p99_ms": 80.0, "restart_s": 20.0}}
    plain = {
        "calm": calm,
        "through": {**calm, "failed": 30, "wait_worst_ms": 16000.0, "restart_s": 15.0, "gave_up": ["x"]},
    }
    found = {m.case: m.line() for m in bench_rollout.measurements({"kit": [kit], "plain": [plain]}, 1)}
    assert found["failed requests"]["ratio"] == 0.0 and found["failed requests"]["peer"] == 30
    assert found["p99 until answered"]["detail"]["kit_added"] == 30.0
    assert found["worst until answered"]["detail"]["peer_added"] == 15940.0
    assert found["worst until answered"]["detail"]["peer_gave_up"] == 1

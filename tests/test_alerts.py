"""Alert rules under promtool: what raises each of them, what does not, and that nothing raises two."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
ROLE = ROOT / "roles" / "monitoring"
HELD: dict[str, Any] = yaml.safe_load((ROOT / "tests" / "alerts.yml").read_text())
CASES: list[dict[str, Any]] = HELD["cases"]
PANELS = ROLE / "files/usr/local/share/mlflow-kit-monitoring/panels.json"
TIME = {"s": 1, "m": 60, "h": 3600}
# Series whose values grow for as long as the case lasts are written without a count.
OPEN = re.compile(r"^(?P<value>[^x]*)x$")


def seconds(words: str) -> int:
    """The length of a time such as 1m45s, in seconds."""
    return sum(int(count) * TIME[unit] for count, unit in re.findall(r"(\d+)([smh])", words))


def promtool(*argv: str) -> str:
    """Run promtool and return what it printed; fails the test with it when promtool is not content."""
    program = shutil.which("promtool")
    assert program, "promtool is not there: scripts/test unit gets it"
    done = subprocess.run([program, *argv], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder with the rules and the dashboard, as the role renders them from its defaults."""
    folder = tmp_path_factory.mktemp("rendered")
    playbook = [
        {
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "vars_files": [str(ROLE / "defaults/main.yml"), str(ROLE / "vars/main.yml")],
            "vars": {"monitoring_required_units": "swift-object[.]service|mlflow-kit-.*[.]timer"},
            "tasks": [
                {
                    "name": "Render",
                    "ansible.builtin.template": {
                        "src": str(ROLE / f"templates/{source}.j2"),
                        "dest": f"{folder}/{name}",
                    }
                    | more,
                }
                for source, name, more in (
                    (
                        "etc/prometheus/mlflow-kit-rules.yml",
                        "rules.yml",
                        {"variable_start_string": "<<", "variable_end_string": ">>"},
                    ),
                    ("usr/local/share/mlflow-kit-monitoring/grafana.json", "grafana.json", {}),
                )
            ],
        }
    ]
    # Beside the role's files, where lookups find them.
    path = folder / "render.yml"
    path.write_text(yaml.safe_dump(playbook))
    (folder / "files").symlink_to(ROLE / "files")
    done = subprocess.run(
        ["ansible-playbook", "-i", "localhost,", str(path)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return folder


@functools.cache
def alerts(rules: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The alert rules in a file, by name."""
    held = yaml.safe_load(rules.read_text())
    return {rule["alert"]: rule for group in held["groups"] for rule in group["rules"] if "alert" in rule}


def series(case: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The input of promtool for a case: a well site's series, with the case's own in their place."""
    step = seconds(case.get("step", "15s"))
    steps = max(map(seconds, case["at"])) // step + 2
    for name, values in {**HELD["well"], **case.get("series", {})}.items():
        words = str(values).split()
        last = OPEN.match(words[-1])
        if last:
            words[-1] = f"{last['value']}x{steps}"
        yield {"series": name, "values": " ".join(words)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"])
def test_exactly_these_are_raised(rendered: pathlib.Path, tmp_path: pathlib.Path, case: dict[str, Any]) -> None:
    tests = [
        {
            "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": moment,
            "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names],
        }
        for moment, names in case["at"].items()
    ]
    step = case.get("step", "15s")
    whole = {
        "rule_files": [str(rendered / "rules.yml")],
        "evaluation_interval": step,
        "tests": [{"interval": step, "input_series": list(series(case)), "promql_expr_test": tests}],
    }
    path = tmp_path / "case.yml"
    path.write_text(yaml.safe_dump(whole))
    promtool("test", "rules", str(path))


def test_every_alert_is_raised_by_a_case_and_not_at_once(rendered: pathlib.Path) -> None:
    """In some case it fires, and at an earlier time of the same case it does not."""
    shown = set()
    for case in CASES:
        moments = sorted(case["at"].items(), key=lambda item: seconds(item[0]))
        for index, (_, names) in enumerate(moments):
            shown |= {name for name in names if any(name not in earlier for _, earlier in moments[:index])}
    assert shown == set(alerts(rendered / "rules.yml"))


def test_every_alert_says_what_and_what_next(rendered: pathlib.Path) -> None:
    for name, rule in alerts(rendered / "rules.yml").items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert rule["annotations"]["summary"] and len(rule["annotations"]["description"]) > 20, name
        assert re.fullmatch(r"\d+s", rule["for"]), f"{name}: a time that no variable sets"


def test_every_query_of_page_and_grafana_is_one(rendered: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Prometheus' own parser reads each query that the page or the dashboard asks."""
    held = json.loads(PANELS.read_text())
    asked = [one["query"] for section in held["sections"] for panel in section["panels"] for one in panel["queries"]]
    asked += [tile[key] for tile in held["tiles"] for key in ("query", "of") if key in tile]
    board = json.loads((rendered / "grafana.json").read_text())
    shown = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    assert len(shown) == len(asked) - sum("of" in tile for tile in held["tiles"]) > 30
    queries = [query.replace("$rate", "60s") for query in asked]
    queries += [query.replace("$__rate_interval", "60s") for query in shown]
    assert not [query for query in queries if "$" in query]
    rules = [{"record": f"asked_{index}", "expr": query} for index, query in enumerate(queries)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(path))


def test_grafana_panels_do_not_overlap(rendered: pathlib.Path) -> None:
    """Each cell of the dashboard's grid belongs to one panel, so that Grafana moves none."""
    board = json.loads((rendered / "grafana.json").read_text())
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])

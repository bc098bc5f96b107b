"""`pytest molecule` runs every scenario: Molecule's steps are test items, so that one closing line counts all.

Each scenario runs: destroy, create, prepare, check (on virgin hosts), converge, idempotence, check (nothing
left to change), then its own tests/, then destroy. KIT_KEEP=1 leaves the machines for a look.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import testinfra
from kit import vm

HERE = pathlib.Path(__file__).parent
BEFORE = ("destroy", "create", "prepare", "check", "converge", "idempotence", "check again")
AFTER = () if os.environ.get("KIT_KEEP") else ("destroy after",)
RECAP = re.compile(r"^\W*\S+\s+: ok=\d+\s+changed=(\d+)", re.MULTILINE)
broken: dict[str, str] = {}


@pytest.fixture(scope="session")
def host_of() -> Callable[[str], Any]:
    """host_of("name"): testinfra's host for the machine of that name, by ssh."""
    return lambda name: testinfra.get_host(f"ssh://{name}", ssh_config=str(vm.SSH_CONFIG))


class StepFailed(Exception):
    """A step of Molecule failed; the message is its output."""


class Step(pytest.Item):
    """One step of a scenario."""

    place = "before"

    def runtest(self) -> None:
        """Run the step. Raises StepFailed."""
        verb = self.name.split()[0]
        scenario = self.path.parent
        if verb == "prepare" and "prepare" not in self.path.read_text() and not (scenario / "prepare.yml").exists():
            return
        argv = ["molecule", verb, "-s", scenario.name]
        done = subprocess.run(argv, cwd=HERE.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.add_report_section("call", "stdout", done.stdout)
        if done.returncode:
            raise StepFailed(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout[-12000:]}")
        if self.name == "check again":
            changed = RECAP.findall(re.sub(r"\x1b\[[0-9;]*m", "", done.stdout))
            if not changed or any(n != "0" for n in changed):
                raise StepFailed(f"a dry run on the converged hosts would change: {changed}\n{done.stdout[-12000:]}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show a failed step by its output alone."""
        return str(excinfo.value) if excinfo.errisinstance(StepFailed) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[pathlib.Path, None, str]:
        """Name the step as `scenario: step`."""
        return self.path, None, f"{self.path.parent.name}: {self.name}"


class Scenario(pytest.File):
    """A molecule.yml and its steps."""

    def collect(self) -> Iterator[Step]:
        """Yield the steps before and after the scenario's own tests."""
        for name in (*BEFORE, *AFTER):
            item = Step.from_parent(self, name=name)
            item.place = "before" if name in BEFORE else "after"
            yield item


def pytest_collect_file(file_path: pathlib.Path, parent: pytest.Collector) -> Scenario | None:
    """Collect every molecule.yml as a scenario."""
    if file_path.name == "molecule.yml" and file_path.parent.parent == HERE:
        return Scenario.from_parent(parent, path=file_path)
    return None


def _scenario_of(item: pytest.Item) -> str:
    inside = item.path.is_relative_to(HERE) and len(item.path.relative_to(HERE).parts) > 1
    return item.path.relative_to(HERE).parts[0] if inside else ""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep a scenario whole on one worker of `pytest -n`."""
    if _scenario_of(item):
        item.add_marker(pytest.mark.xdist_group(_scenario_of(item)))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put a scenario's steps around its tests."""
    order = {"before": 0, "": 1, "after": 2}
    items.sort(key=lambda item: (_scenario_of(item), order[getattr(item, "place", "")]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Remember the scenario whose steps failed."""
    report: Any = yield
    if report.failed and getattr(item, "place", "") == "before":
        broken[_scenario_of(item)] = item.name
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Do not test what was not built: the failed step has already turned the run red."""
    scenario = _scenario_of(item)
    if scenario in broken and getattr(item, "place", "") != "after":
        pytest.skip(f"{scenario}: {broken[scenario]} failed")

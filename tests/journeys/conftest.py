"""The sites that several journeys share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import yaml
from journey import Site, copy_of_checkout

# The longest begin first, or the last of them would keep one worker busy long after the others are done.
LONGEST = ("upgrade", "rotate", "quickstart", "backup", "single")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the journeys before everything else, the longest of them first; what ends with a site's removal goes last."""

    def rank(item: pytest.Item) -> tuple[int, bool]:
        mark = item.get_closest_marker("xdist_group")
        name = mark.args[0] if mark else ""
        return LONGEST.index(name) if name in LONGEST else len(LONGEST), item.path.name == "test_quickstart.py"

    items.sort(key=rank)


@pytest.fixture(scope="session")
def quickstart() -> Iterator[tuple[Site, str]]:
    """The site that scripts/quickstart makes from a clean copy, and what the command printed."""
    checkout = copy_of_checkout("quickstart")
    environment = {"KIT_PUBLIC_NAME": "journey.test"}
    site = Site(checkout, "inventories/quickstart", "", "", "journey.test", environment)
    if not os.environ.get("KIT_KEEP"):
        site.command("scripts/quickstart", "--down")
    out = site.command("scripts/quickstart")
    own = yaml.safe_load((checkout / "inventories/quickstart/group_vars/all/local.yml").read_text())
    site.machine = own["quickstart_machine"]
    site.client = site.machine.removesuffix("-vm") + "-client"
    yield site, out
    if not os.environ.get("KIT_KEEP"):
        site.command("scripts/quickstart", "--down")
        shutil.rmtree(checkout)

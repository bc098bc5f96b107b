"""The sites that several journeys share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import yaml
from journey import Site, copy_of_checkout


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

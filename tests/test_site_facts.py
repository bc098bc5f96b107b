"""What each run asks of a host."""

from __future__ import annotations

import json
import pathlib
import subprocess

from kit import vm


def test_the_facts_are_those_of_setup(tmp_path: pathlib.Path) -> None:
    """Roles ask for them by Ansible's names, and take them from whoever told them first."""
    told = {}
    for module in ("site_facts", "setup"):
        argv = ["ansible", "localhost", "-i", "localhost,", "-c", "local", "-m", module, "--tree", str(tmp_path)]
        subprocess.run(argv, cwd=vm.CHECKOUT, capture_output=True, text=True, check=True)
        found = json.loads((tmp_path / "localhost").read_text())["ansible_facts"]
        told[module] = {name.removeprefix("ansible_"): value for name, value in found.items()}
    ours = told["site_facts"]
    assert set(ours) == {"distribution", "distribution_major_version", "memtotal_mb", "processor_nproc"}
    assert ours == {name: told["setup"][name] for name in ours}

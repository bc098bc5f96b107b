"""What tests keep of Ansible's modules is of the modules as they are: a changed one is built anew."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest
from ansible import constants

SOURCE = pathlib.Path(__file__).parent / "kept" / "callbacks" / "kept_modules.py"


@pytest.mark.parametrize("place", ["roles/one/library", "roles/one/module_utils", "modules", "utils"])
def test_a_changed_module_is_built_anew(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Wherever it stands that Ansible looks for one."""
    monkeypatch.setattr(constants, "DEFAULT_MODULE_PATH", [str(tmp_path / "modules")])
    monkeypatch.setattr(constants, "DEFAULT_MODULE_UTILS_PATH", [str(tmp_path / "utils")])
    monkeypatch.setattr(constants, "DEFAULT_ROLES_PATH", [str(tmp_path / "roles")])
    found = importlib.util.spec_from_file_location("kept_modules", SOURCE)
    assert found and found.loader
    kept = importlib.util.module_from_spec(found)
    found.loader.exec_module(kept)
    path = tmp_path / place / "some.py"
    path.parent.mkdir(parents=True)
    path.write_text("a = 1\n")
    before = kept._key()
    assert kept._key() == before
    path.write_text("a = 2\n")
    assert kept._key() != before

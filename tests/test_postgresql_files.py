"""How the role postgresql tells a file that is as it should be."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from types import ModuleType

import pytest

LIBRARY = pathlib.Path(__file__).parents[1] / "roles" / "postgresql" / "library"


def load(name: str) -> ModuleType:
    """Import a module of the role from its file."""
    spec = importlib.util.spec_from_file_location(f"kit_{name}", LIBRARY / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("content", "mode", "expected"), [(b"a", 0o640, False), (b"b", 0o640, True), (b"a", 0o644, True)]
)
def test_a_file_differs_by_content_and_mode(
    content: bytes, mode: int, expected: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is not there differs, whatever is wanted."""
    files, path = load("postgresql_files"), tmp_path / "x.conf"
    owner = type("Entry", (), {"pw_uid": tmp_path.stat().st_uid, "gr_gid": tmp_path.stat().st_gid})
    monkeypatch.setattr(files.pwd, "getpwnam", lambda _: owner)
    monkeypatch.setattr(files.grp, "getgrnam", lambda _: owner)
    assert files.differs(path, content, mode, "postgres")
    path.write_bytes(b"a")
    path.chmod(0o640)
    assert files.differs(path, content, mode, "postgres") is expected


def test_an_owner_that_is_not_there_yet_differs(tmp_path: pathlib.Path) -> None:
    """A dry run on a virgin host has no such user."""
    path = tmp_path / "x.conf"
    path.write_bytes(b"a")
    assert load("postgresql_files").differs(path, b"a", 0o644, "no-such-user")

"""The parts of backups that need no machine: which versions a moment had, times, and the packed inventory."""

from __future__ import annotations

import importlib.util
import io
import pathlib
import sys
import tarfile
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "roles/backup/files/usr/local/lib/mlflow-kit-backup"))

from kit_backup import bucket, common  # noqa: E402


def catalog(*versions: bucket.Version) -> bucket.Catalog:
    """A catalog of `versions`, without a target behind it."""
    made = bucket.Catalog.__new__(bucket.Catalog)
    made.versions, made.id = list(versions), ""
    return made


# Written at 10, over at 20, again over at 30; another one from 15 that was seen gone at 40.
HISTORY = catalog(
    bucket.Version("a", 1, 10, "one", "old/2", 25),
    bucket.Version("a", 1, 20, "two", "old/3", 35),
    bucket.Version("a", 1, 30, "three"),
    bucket.Version("b", 1, 15, "b", "old/4", 40),
)


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (9, {}),
        (10, {"a": "one"}),
        (19, {"a": "one", "b": "b"}),
        (22, {"a": "two", "b": "b"}),  # "one" was only seen to be gone at 25
        (30, {"a": "three", "b": "b"}),
        (39, {"a": "three", "b": "b"}),
        (40, {"a": "three"}),
        (None, {"a": "three"}),
    ],
)
def test_a_moment_has_the_newest_version_that_was_there(moment: float | None, expected: dict[str, str]) -> None:
    assert {path: version.md5 for path, version in HISTORY.at(moment).items()} == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("x", 5, 1.0, "m"), ("x", 5, 99.0, "m"), True),  # uploaded again as it was
        (("x", 5, 1.0, "m"), ("x", 5, 1.0, "n"), False),
        (("x", 5, 1.0, "m"), ("x", 6, 1.0, "m"), False),
        (("x", 5, 1.0, ""), ("x", 5, 1.4, "m"), True),  # in parts: S3 tells no MD5
        (("x", 5, 1.0, ""), ("x", 5, 3.0, "m"), False),
    ],
)
def test_what_counts_as_the_same_content(one: Any, other: Any, same: bool) -> None:
    assert bucket.Version(*one).same(bucket.Version(*other)) is same


@pytest.mark.parametrize(
    "text", ["2026-11-21T13:00:00Z", "2026-11-21 13:00:00+00", "2026-11-21T14:00:00+01:00", " 2026-11-21T13:00Z "]
)
def test_times_of_operators(text: str) -> None:
    assert common.iso(common.seconds(text)) == "2026-11-21T13:00:00Z"


@pytest.mark.parametrize("text", ["2026-11-21", "2026-11-21T13:00:00", "yesterday", ""])
def test_a_time_without_a_zone_is_none(text: str) -> None:
    with pytest.raises(ValueError):
        common.seconds(text)


def test_the_packed_inventory_depends_on_its_contents_alone(tmp_path: pathlib.Path) -> None:
    """Links stay links, locks stay out, and neither the time nor the order of files matters."""
    spec = importlib.util.spec_from_file_location("site_bundle", ROOT / "plugins/lookup/site_bundle.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    packed = []
    for name, order in (("one", ("b", "a")), ("two", ("a", "b"))):
        folder = tmp_path / name / "prod"
        folder.mkdir(parents=True)
        for file in order:
            (folder / file).write_text(file)
        (folder / ".vault.lock").touch()
        (folder / "wiring").symlink_to("../common")
        packed.append(module.archive(folder))
    assert packed[0] == packed[1]
    with tarfile.open(fileobj=io.BytesIO(packed[0])) as tar:
        assert {m.name: m.linkname for m in tar} == {"prod/a": "", "prod/b": "", "prod/wiring": "../common"}
    (tmp_path / "two/prod/a").write_text("changed")
    assert module.archive(tmp_path / "two/prod") != packed[0]

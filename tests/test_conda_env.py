"""The builder of role conda_env: what it decides without a network."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from types import ModuleType
from typing import Any

import pytest

SOURCE = pathlib.Path(__file__).parents[1] / "roles/conda_env/files/mlflow_kit_conda_env.py"


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    """The builder as a module."""
    spec = importlib.util.spec_from_file_location("mlflow_kit_conda_env", SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plan(tmp_path: pathlib.Path) -> dict[str, Any]:
    """A plan as the role sends it to ask for the status."""
    texts = {"python": "3.13", "channel_alias": "", "index_url": "", "ca_file": "", "offline_directory": ""}
    texts |= {"existing_conda": "", "requirements_sha256": "a", "tools_sha256": "b"}
    places = {"root": str(tmp_path / "envs"), "link": str(tmp_path / "current"), "cache": str(tmp_path / "cache")}
    return {**texts, **places, "packages": [], "channels": ["conda-forge"], "keep": 1}


@pytest.mark.parametrize(
    ("key", "value", "is_another"),
    [
        ("python", "3.12", True),
        ("packages", ["pip"], True),
        ("channels", ["other"], True),
        ("channel_alias", "https://mirror.invalid", True),
        ("requirements_sha256", "c", True),
        ("offline_directory", "/srv/offline", True),
        ("index_url", "https://pypi.invalid/simple", False),
        ("ca_file", "/etc/ca.pem", False),
        ("keep", 7, False),
        ("tools_sha256", "c", False),
    ],
)
def test_the_name_follows_what_is_in_it(
    builder: ModuleType, plan: dict[str, Any], key: str, value: object, is_another: bool
) -> None:
    """What is installed makes the name; where hashed packages came from does not."""
    assert (builder.name_of(plan) != builder.name_of(plan | {key: value})) is is_another


def test_pips_settings_become_uvs(builder: ModuleType, tmp_path: pathlib.Path) -> None:
    """As pip would: the environment wins, and local folders that are not there are left out."""
    listing = (
        ":env:.index-url='https://a.invalid/simple'\n"
        "global.index-url='https://b.invalid/simple'\n"
        f"global.extra-index-url='https://c.invalid/simple\\nfile:///no/such/folder'\n"
        f"global.find-links='{tmp_path} /no/such/folder'\n"
        "global.cert='/etc/ca.pem'\nglobal.timeout='180'\n"
    )
    assert builder.uv_settings_of_pip(listing) == {
        "UV_DEFAULT_INDEX": "https://a.invalid/simple",
        "UV_INDEX": "https://c.invalid/simple",
        "UV_FIND_LINKS": str(tmp_path),
        "SSL_CERT_FILE": "/etc/ca.pem",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert builder.uv_settings_of_pip("") == {}


def test_no_credentials_in_messages(builder: ModuleType) -> None:
    """What a tool says is shown without the passwords in its URLs."""
    said = builder._without_credentials("fetch https://me:secret@host.invalid/x failed")
    assert said == "fetch https://***@host.invalid/x failed"


def test_switching_needs_a_complete_environment_and_keeps_what_was_live(
    builder: ModuleType, plan: dict[str, Any]
) -> None:
    """Links are replaced whole; half an environment, and a folder in the link's place, are refused."""
    names = [digit * 16 for digit in "abcd"]
    root = pathlib.Path(plan["root"])
    for name in names:
        (root / name / builder.OWN).mkdir(parents=True)
    with pytest.raises(builder.BuildError, match="build it first"):
        builder.switch(plan, names[0])
    for name in names:
        (root / name / builder.MARKER).write_text("{}")
        assert builder.switch(plan, name)["changed"]
    assert builder.live_name(plan) == names[3]
    assert sorted(p.name for p in builder.environments(root)) == names[2:]
    assert not builder.switch(plan, names[3])["changed"]
    link = pathlib.Path(plan["link"])
    link.unlink()
    link.mkdir()
    with pytest.raises(builder.BuildError, match="in the way"):
        builder.switch(plan, names[3])


def make(plan: dict[str, Any], name: str, version: str) -> None:
    """An environment that looks complete, with one package in it."""
    prefix = pathlib.Path(plan["root"]) / name
    (prefix / ".mlflow-kit").mkdir(parents=True)
    (prefix / ".mlflow-kit/complete.json").write_text("{}")
    (prefix / f"lib/python3.13/site-packages/mlflow-{version}.dist-info").mkdir(parents=True)


def test_the_way_back_is_the_one_that_was_live_before(builder: ModuleType, plan: dict[str, Any]) -> None:
    """Each step back goes one further, and what was left on the way back is no place to go back to."""
    names = [letter * 16 for letter in "abcd"]
    for name in names:
        make(plan, name, "1.0")
    plan["keep"] = 9
    for name in names[:3]:
        builder.switch(plan, name)
    make(plan, "e" * 16, "1.0")  # built, and never live
    assert builder.previous_name(plan) == names[1]
    builder.switch(plan, names[1], back=True)
    assert (builder.previous_name(plan), builder.used(pathlib.Path(plan["root"]))["left"]) == (names[0], [names[2]])
    builder.switch(plan, names[0], back=True)
    assert builder.previous_name(plan) == ""
    builder.switch(plan, names[2])
    assert (builder.previous_name(plan), builder.used(pathlib.Path(plan["root"]))["left"]) == (names[0], [names[1]])


def test_pruning_leaves_the_way_back(builder: ModuleType, plan: dict[str, Any]) -> None:
    """However few are kept, the one that was live before stays."""
    plan["keep"] = 0
    names = [letter * 16 for letter in "abc"]
    for name in names:
        make(plan, name, "1.0")
        builder.switch(plan, name)
    assert builder.previous_name(plan) == names[1]
    assert builder.status(plan)["kept"] == names[1:]


@pytest.mark.parametrize(
    ("live", "runs", "left", "held"),
    [
        ("", "", False, ""),
        ("other", "2.0", False, ""),
        ("other", "1.0", False, "mlflow 1.0 is live and the lock has 2.0"),
        ("other", "2.0", True, "was rolled back from"),
        ("own", "2.0", True, ""),
    ],
)
def test_a_version_stays_until_it_is_changed_on_purpose(
    builder: ModuleType, plan: dict[str, Any], live: str, runs: str, left: bool, held: str
) -> None:
    """A live environment of another version stays, and so does one after a way back."""
    plan |= {"guard": "mlflow", "guard_version": "2.0"}
    wanted = builder.name_of(plan)
    if live:
        name = wanted if live == "own" else "a" * 16
        make(plan, name, runs)
        builder.switch(plan, name)
        known = builder.used(pathlib.Path(plan["root"])) | {"left": [wanted] if left else []}
        (pathlib.Path(plan["root"]) / builder.USED).write_text(json.dumps(known))
    found = builder.held(plan)
    assert held in found if held else found == ""

"""The builder of role conda_env: what it decides without a network."""

from __future__ import annotations

import importlib.util
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

"""A role's argument spec is a promise: its names, types and defaults are those of defaults/main.yml, or this fails."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
ROLES = sorted(path for path in (ROOT / "roles").glob("*") if path.is_dir())
COMMENTED = re.compile(r"^#\s?([a-z][a-z0-9_]*):", re.MULTILINE)
SECRET = re.compile(r"(^|_)(password|passphrase|secret|token)s?$")
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "path": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
    "raw": (object,),
}

by_role = pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)


def load(path: pathlib.Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty one when there is none."""
    loaded = yaml.safe_load(path.read_text()) if path.exists() else {}
    assert isinstance(loaded or {}, dict), f"{path} is no mapping"
    return loaded or {}


def defaults(role: pathlib.Path) -> dict[str, Any]:
    """What the role sets when nobody else does."""
    return load(role / "defaults" / "main.yml")


def commented(role: pathlib.Path) -> set[str]:
    """Variables that the defaults file only mentions, for want of a sane value."""
    path = role / "defaults" / "main.yml"
    return set(COMMENTED.findall(path.read_text())) if path.exists() else set()


def entry_points(role: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The role's argument specs by entry point."""
    specs = load(role / "meta" / "argument_specs.yml").get("argument_specs")
    assert isinstance(specs, dict), f"{role.name} has no meta/argument_specs.yml with argument_specs"
    return specs


def options(role: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The options of the entry point main."""
    found = entry_points(role).get("main", {}).get("options")
    assert isinstance(found or {}, dict)
    return found or {}


def deep(found: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All options and those within them, each with its full name."""
    for name, option in found.items():
        assert isinstance(option, dict), f"{above}{name} is no mapping"
        yield f"{above}{name}", option
        yield from deep(option.get("options") or {}, f"{above}{name}.")


def is_template(value: object) -> bool:
    """Whether a default is only known once it is templated."""
    return isinstance(value, str) and ("{{" in value or "{%" in value)


def is_of(value: object, type_: str) -> bool:
    """Whether `value` is of the spec's type; a boolean is no number."""
    if isinstance(value, bool):
        return type_ in ("bool", "raw")
    return isinstance(value, TYPES[type_])


def same(one: object, other: object) -> bool:
    """Equal in value and in type, all the way down: 1, "1" and true are three things."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_there_are_roles() -> None:
    assert len(ROLES) > 0


@by_role
def test_a_role_has_its_papers_and_its_scenario(role: pathlib.Path) -> None:
    meta = load(role / "meta" / "main.yml").get("galaxy_info", {})
    assert meta.get("license") == "MIT"
    assert meta.get("description")
    assert (role / "tasks" / "main.yml").is_file()
    assert (role / "README.md").read_text().strip(), "an empty README"
    assert (ROOT / "molecule" / role.name / "molecule.yml").is_file(), f"no scenario molecule/{role.name}"
    assert list((ROOT / "molecule" / role.name / "tests").glob("test_*.py")), f"molecule/{role.name} tests nothing"


@by_role
def test_the_spec_and_the_defaults_name_the_same_variables(role: pathlib.Path) -> None:
    promised, set_, mentioned = set(options(role)), set(defaults(role)), commented(role)
    assert promised - set_ - mentioned == set(), "in the spec, not in defaults/main.yml, not even commented out"
    assert set_ - promised == set(), "in defaults/main.yml, not in the spec"


@by_role
def test_public_names_begin_with_the_roles(role: pathlib.Path) -> None:
    names = {name for spec in entry_points(role).values() for name in spec.get("options") or {}} | set(defaults(role))
    assert {name for name in names if not name.startswith(f"{role.name}_")} == set()


@by_role
def test_the_spec_and_the_defaults_give_the_same_values(role: pathlib.Path) -> None:
    values, wrong = defaults(role), []
    for entry, spec in entry_points(role).items():
        for name, option in (spec.get("options") or {}).items():
            where = f"{entry}: {name}"
            if name not in values:
                if "default" in option:
                    wrong.append(f"{where}: a default in the spec that defaults/main.yml does not set")
            elif option.get("required"):
                wrong.append(f"{where}: required, yet it has a default")
            elif "default" not in option:
                wrong.append(f"{where}: defaults/main.yml sets {values[name]!r}, the spec tells no default")
            elif not same(option["default"], values[name]):
                wrong.append(f"{where}: spec {option['default']!r}, defaults/main.yml {values[name]!r}")
    assert wrong == []


@by_role
def test_what_has_no_default_is_required_or_shown(role: pathlib.Path) -> None:
    """A variable without a value is either required or can be left undefined: both stand commented out, as examples."""
    missing = [name for name in options(role) if name not in defaults(role) and name not in commented(role)]
    assert missing == []


@by_role
def test_every_option_has_a_type_and_a_sentence(role: pathlib.Path) -> None:
    wrong = []
    for entry, spec in entry_points(role).items():
        if not spec.get("short_description"):
            wrong.append(f"{entry}: no short_description")
        for name, option in deep(spec.get("options") or {}):
            type_, words = option.get("type"), option.get("description")
            text = " ".join(map(str, words)) if isinstance(words, list) else str(words or "")
            if type_ not in TYPES:
                wrong.append(f"{entry}: {name}: type {type_!r}")
            if type_ == "list" and option.get("elements") not in TYPES:
                wrong.append(f"{entry}: {name}: a list without elements")
            if len(text.split()) < 2 or not text.rstrip().endswith((".", ")")):  # noqa: PLR2004
                wrong.append(f"{entry}: {name}: no sentence")
    assert wrong == []


@by_role
def test_defaults_are_of_their_type_and_among_the_choices(role: pathlib.Path) -> None:
    wrong = []
    for entry, spec in entry_points(role).items():
        for name, option in deep(spec.get("options") or {}):
            if "default" not in option or is_template(option["default"]):
                continue
            value, type_ = option["default"], option.get("type", "str")
            if not is_of(value, type_):
                wrong.append(f"{entry}: {name}: {value!r} is no {type_}")
            elif type_ == "list":
                elements = option.get("elements", "raw")
                wrong += [
                    f"{entry}: {name}: {one!r} is no {elements}"
                    for one in value
                    if not is_template(one) and not is_of(one, elements)
                ]
            if "choices" in option:
                chosen = value if isinstance(value, list) else [value]
                wrong += [f"{entry}: {name}: {one!r} is no choice" for one in chosen if one not in option["choices"]]
    assert wrong == []


@by_role
def test_secrets_are_marked(role: pathlib.Path) -> None:
    """An option that is named for a secret, or has one inside, is no_log, so that Ansible blots it out."""
    wrong = []
    for entry, spec in entry_points(role).items():
        for name, option in deep(spec.get("options") or {}):
            secret = SECRET.search(name.rpartition(".")[2]) and option.get("type") in ("str", "raw", "list", "dict")
            within = any(inner.get("no_log") for _, inner in deep(option.get("options") or {}))
            if (secret or within) and not option.get("no_log"):
                wrong.append(f"{entry}: {name}")
    assert wrong == []


@by_role
def test_every_entry_point_has_its_tasks(role: pathlib.Path) -> None:
    assert "main" in entry_points(role)
    missing = [name for name in entry_points(role) if not (role / "tasks" / f"{name}.yml").is_file()]
    assert missing == []

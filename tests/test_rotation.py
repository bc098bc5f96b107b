"""What a rotation writes to the vault, step by step: at none of them is a consumer without what the hosts take."""

from __future__ import annotations

import copy
import importlib.util
import pathlib
from typing import Any

import pytest

PLUGINS = pathlib.Path(__file__).parents[1] / "plugins"
NOW = 1_000_000.0
GRACE = {"s3": 3600.0, "gateway": 86400.0, "tokens": 86400.0, "authority": 604800.0}
KINDS = ("database", "s3", "gateway", "tokens", "tls", "authority", "encryption")
PHASES = ("accept", "move", "grace", "withdraw")


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), PLUGINS / f"{path}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rotation, overlap, secrets = load("action/site_rotation"), load("filter/site_overlap"), load("action/site_secrets")


@pytest.fixture
def held() -> dict[str, Any]:
    """The vault of a site that was never rotated."""
    wanted = {
        "vault_database_password": "password",
        "vault_s3_access_name": "identifier",
        "vault_s3_secret_key": "password",
        "vault_gateway_password": "password",
        "vault_crypto_kek_passphrase": "password",
    }
    made: dict[str, Any] = secrets.complete({}, wanted, "a test's", ["a.test"])
    return made | {"vault_machine_tokens": {"nightly": "t" * 40}}


def begin(held: dict[str, Any], *kinds: str, emergency: bool = False) -> None:
    rotation.begin(held, kinds, emergency=emergency, now=NOW, authority="a test's", names=["a.test"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_goes_through_its_phases(held: dict[str, Any], kind: str) -> None:
    old = rotation.values(held, kind)
    begin(held, kind)
    seen, when = [], NOW
    for phase in PHASES:
        entry = held["vault_rotation"].get(kind)
        if entry and entry["phase"] == phase:
            seen.append(phase)
            when += 10_000_000
            rotation.advance(held, phase, when, GRACE)
    assert seen == list(PHASES if kind != "tls" else PHASES[1:])
    assert held["vault_rotation"] == {}
    new = rotation.values(held, kind)
    assert all(new[name] != old[name] for name in new)


@pytest.mark.parametrize("emergency", [False, True])
@pytest.mark.parametrize("kind", ["database", "s3", "gateway", "tokens", "encryption"])
def test_both_values_are_kept_and_taken_until_the_old_is_withdrawn(
    held: dict[str, Any], kind: str, emergency: bool
) -> None:
    """And an emergency takes the new one alone from the beginning, but for what only MLflow itself holds."""
    old = rotation.values(held, kind)
    begin(held, kind, emergency=emergency)
    new: dict[str, Any] = {}
    for step, phase in enumerate(PHASES):
        entry = held["vault_rotation"][kind]
        used, other = rotation.values(held, kind), entry["other"]
        assert old in (used, other)
        new = new or (other if used == old else used)
        assert new in (used, other) and new != old
        if entry["phase"] != phase:
            assert emergency
            continue
        accepted = overlap.site_accepted(held["vault_rotation"], kind)
        assert accepted == ({} if phase == "withdraw" else other)
        assert overlap.site_withdrawn(held["vault_rotation"], kind) == (old if phase == "withdraw" else {})
        assert used == (old if phase == "accept" else new)
        rotation.advance(held, phase, NOW + step * 10_000_000, GRACE)
    assert rotation.values(held, kind) == new


def test_a_second_run_goes_on_with_the_same_values(held: dict[str, Any]) -> None:
    begin(held, "s3", "database")
    rotation.advance(held, "accept", NOW, GRACE)
    before = copy.deepcopy(held)
    begin(held, "s3")
    assert held == before


def test_the_overlap_is_waited_for(held: dict[str, Any]) -> None:
    begin(held, "s3", "database")
    for phase in ("accept", "move", "grace"):
        rotation.advance(held, phase, NOW, GRACE)
    assert {kind: entry["phase"] for kind, entry in held["vault_rotation"].items()} == {
        "s3": "grace",
        "database": "withdraw",
    }
    assert rotation.state(held, GRACE, NOW)["s3"]["left"] == 3600
    rotation.advance(held, "grace", NOW + 3599, GRACE)
    assert held["vault_rotation"]["s3"]["phase"] == "grace"
    rotation.advance(held, "grace", NOW + 3600, GRACE)
    assert held["vault_rotation"]["s3"]["phase"] == "withdraw"


def test_a_new_authority_waits_before_its_certificate_is_served(held: dict[str, Any]) -> None:
    leaf = held["vault_tls_certificate"]
    begin(held, "authority")
    rotation.advance(held, "accept", NOW + 604799, GRACE)
    assert held["vault_tls_certificate"] == leaf
    rotation.advance(held, "accept", NOW + 604800, GRACE)
    assert held["vault_tls_certificate"] != leaf


@pytest.mark.parametrize("phase", ["accept", "move", "grace"])
def test_an_emergency_hurries_what_is_under_way(held: dict[str, Any], phase: str) -> None:
    old = rotation.values(held, "s3")
    begin(held, "s3")
    for before in PHASES[: PHASES.index(phase)]:
        rotation.advance(held, before, NOW, GRACE)
    assert held["vault_rotation"]["s3"]["phase"] == phase
    begin(held, emergency=True)
    assert held["vault_rotation"]["s3"]["phase"] == "withdraw"
    assert held["vault_rotation"]["s3"]["other"] == old


def test_logins_take_turns_and_versions_rise(held: dict[str, Any]) -> None:
    for login, version in (("mlflow_b", "2"), ("mlflow_a", "3")):
        begin(held, "database", "encryption")
        for phase in PHASES:
            rotation.advance(held, phase, NOW, GRACE)
        assert held["vault_database_login"] == login
        assert held["vault_crypto_kek_version"] == version


def test_what_cannot_be_begun_is_named(held: dict[str, Any]) -> None:
    foreign = {"database": "it is yours", "s3": ""}
    del held["vault_s3_secret_key"]
    found = rotation.faults(held, ["database", "s3", "passwords", "tokens"], foreign, machines=False)
    assert [line.split(":")[0] for line in found] == ["rotate", "database", "tokens", "s3"]
    assert "vault_s3_secret_key" in found[-1]


def test_nothing_that_is_said_holds_a_value(held: dict[str, Any]) -> None:
    begin(held, *KINDS)
    said = repr((rotation.plan(held, KINDS, True, GRACE), rotation.state(held, GRACE, NOW)))
    said += repr(rotation.ending(KINDS, rotation.state(held, GRACE, NOW)))
    values: list[Any] = [*held.values(), *(v for e in held["vault_rotation"].values() for v in e["other"].values())]
    texts = [value for value in values if isinstance(value, str) and len(value) > 8]
    assert len(texts) > 15
    assert [text for text in texts if text in said] == []


def test_a_token_that_is_no_longer_named_is_forgotten(held: dict[str, Any]) -> None:
    secrets._complete_tokens(held, ["nightly", "weekly"])
    first = dict(held["vault_machine_tokens"])
    assert first["nightly"] == "t" * 40 and len(first["weekly"]) == 40
    secrets._complete_tokens(held, ["weekly"])
    assert held["vault_machine_tokens"] == {"weekly": first["weekly"]}

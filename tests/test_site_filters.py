"""The words and answers that a site's playbooks are made of."""

from __future__ import annotations

import importlib.util
import pathlib
import types
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError

FILTERS = pathlib.Path(__file__).parents[1] / "plugins" / "filter"


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, FILTERS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WINDOW, STATUS = load("site_window"), load("site_status")
SUNDAY = {"days": ["sun"], "from": "02:00", "to": "04:00"}
NIGHT = {"days": ["sat"], "from": "23:00", "to": "01:30"}


@pytest.mark.parametrize(
    ("window", "now", "seconds"),
    [
        ({}, "2026-11-21T12:00:00+00:00", 0),
        # 21 November 2026 is a Saturday.
        (SUNDAY, "2026-11-21T12:00:00+00:00", 14 * 3600),
        (SUNDAY, "2026-11-22T01:59:00+00:00", 60),
        (SUNDAY, "2026-11-22T02:00:00+00:00", 0),
        (SUNDAY, "2026-11-22T03:59:59+00:00", 0),
        (SUNDAY, "2026-11-22T04:00:00+00:00", 7 * 86400 - 2 * 3600),
        # Over midnight: it belongs to the day on which it opened.
        (NIGHT, "2026-11-21T22:59:00+00:00", 60),
        (NIGHT, "2026-11-22T01:29:00+00:00", 0),
        (NIGHT, "2026-11-22T01:30:00+00:00", 6 * 86400 + 21 * 3600 + 1800),
        ({**SUNDAY, "timezone": "Europe/Berlin"}, "2026-11-22T01:00:00+00:00", 0),
        # The night in which summer time begins has an hour less: 28 March 2027.
        (
            {"days": ["sun"], "from": "04:00", "to": "05:00", "timezone": "Europe/Berlin"},
            "2027-03-28T00:30:00+00:00",
            5400,
        ),
        ({"from": "02:00", "to": "04:00"}, "2026-11-21T03:00:00+00:00", 0),
    ],
)
def test_when_a_window_opens(window: dict[str, Any], now: str, seconds: int) -> None:
    assert WINDOW.site_window(window, now)["seconds"] == seconds


@pytest.mark.parametrize(
    "window",
    [
        {"days": ["someday"], "from": "02:00", "to": "04:00"},
        {"from": "2", "to": "04:00"},
        {"from": "25:00", "to": "04:00"},
        {"from": "02:00", "to": "02:00"},
        {"to": "02:00"},
        {**SUNDAY, "timezone": "Nowhere/Land"},
        {**SUNDAY, "hours": 3},
    ],
)
def test_a_window_that_cannot_be_read_is_refused_by_name(window: dict[str, Any]) -> None:
    with pytest.raises(AnsibleFilterError, match="change site_maintenance_window"):
        WINDOW.site_window(window, "2026-11-21T12:00:00+00:00")


def state(found: dict[str, Any], **site: Any) -> tuple[str, list[str]]:
    about = {"name": "s", "url": "u", "allow": [{"cidr": "10.0.0.0/8"}], "rotating": [], **site}
    status = STATUS.site_status({"h": found}, "2026-11-21T12:00:00+00:00", about)
    return status["state"], [row["words"] for row in status["rows"]]


INSTANCE = {
    "unit": "mlflow",
    "instance": 1,
    "active": True,
    "since": 1,
    "memory": 1,
    "health": 200,
    "health_ms": 1.0,
    "version": "3",
}
GATEWAY = {"up": True, "why": "", "certificate_days": 100.0, "issuer": "CN=x", "servers": [], "out": [], "version": "1"}
BACKUP = '{"result": "ok", "error": "", "last_good": {"started": "2026-11-21T02:30:00Z"}}'


@pytest.mark.parametrize(
    ("found", "worst"),
    [
        ({"mlflow": [INSTANCE | {"pending": ""}]}, "ok"),
        ({"mlflow": [INSTANCE | {"pending": "it is old"}]}, "warn"),
        ({"mlflow": [INSTANCE | {"pending": "", "health": 500}]}, "BAD"),
        ({"mlflow": [{"unit": "mlflow", "instance": 2, "active": False, "pending": ""}]}, "BAD"),
        ({"gateway": GATEWAY}, "ok"),
        ({"gateway": GATEWAY | {"out": ["a"]}}, "warn"),
        ({"gateway": GATEWAY | {"certificate_days": 20.0}}, "warn"),
        ({"gateway": GATEWAY | {"certificate_days": -0.5}}, "BAD"),
        ({"gateway": GATEWAY | {"certificate_days": None}}, "ok"),
        ({"disks": ["/ 100 50"]}, "ok"),
        ({"disks": ["/ 100 10"]}, "warn"),
        ({"disks": ["/ 100 4"]}, "BAD"),
        ({"backup": BACKUP}, "ok"),
        ({"backup": BACKUP.replace("-21T", "-20T")}, "BAD"),
        ({"backup": BACKUP.replace('"ok"', '"failed"')}, "BAD"),
        ({"backup": BACKUP[:-1] + ', "local": true}'}, "warn"),
        ({"backup": ""}, "warn"),
        ({"drill": BACKUP.replace("-21T", "-14T")}, "ok"),
        ({"drill": BACKUP.replace("-21T", "-13T")}, "BAD"),
        ({"flags": ["reboot"]}, "warn"),
        ({"flags": ["moving"]}, "BAD"),
        ({"unreachable": True}, "BAD"),
    ],
)
def test_what_is_bad_and_what_is_worth_a_look(found: dict[str, Any], worst: str) -> None:
    assert state(found)[0] == worst


def test_who_may_enter_is_told() -> None:
    everybody = state({}, allow=[{"cidr": "0.0.0.0/0", "description": "all"}])
    assert everybody == ("warn", ["0.0.0.0/0 all: everybody"])
    assert state({}, allow=[])[0] == "warn"
    assert state({}, rotating=["s3"])[0] == "warn"


def test_a_host_that_does_not_answer_is_told_apart() -> None:
    assert STATUS.site_host({"status_host": {"unreachable": True}, "group_names": []}, True) == {"unreachable": True}
    assert STATUS.site_host({"group_names": []}, True) == {"unreachable": True}
    answer = {
        "status_host": {"stdout": "Mounted on  1B-blocks  Avail\n/ 1 1\n---\n---\n---\nreboot"},
        "group_names": ["database"],
    }
    assert STATUS.site_host(answer, True) == {"disks": ["/ 1 1"], "flags": ["reboot"], "backup": "", "drill": ""}

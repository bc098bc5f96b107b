"""What the verification sees, and what it leaves behind."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

VM = "kit-verify-vm"
ANSWERS = 'python3 -c "import urllib.request as u; u.urlopen(\\"http://127.0.0.1:5001/health\\")" 2>/dev/null'
ROOT = pathlib.Path(__file__).parents[3]
TABLES = (
    "runs where lifecycle_stage = 'active'",
    "registered_models",
    "model_versions",
    "logged_models where lifecycle_stage = 'active'",
)


@pytest.fixture
def host(host_of: Callable[[str], Any]) -> Any:
    """The machine with the server."""
    return host_of(VM)


def verify(**variables: Any) -> tuple[bool, str]:
    """Run the role with `variables`; whether it was content, and its output in one line."""
    argv = ["molecule", "converge", "-s", "verify", "--", "-e", json.dumps(variables)]
    done = subprocess.run(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # Molecule draws a frame around what Ansible prints.
    return done.returncode == 0, " ".join(re.sub(r"\x1b\[[0-9;]*m|│", " ", done.stdout).split())


def left(host: Any) -> list[str]:
    """What is there of runs, models and their files."""
    script = "import sqlite3; c = sqlite3.connect('/srv/mlflow.db')\n"
    script += f"for t in {TABLES!r}: print(c.execute('select count(*) from ' + t).fetchone()[0])"
    counts = host.check_output("python3 -c %s", script).split()
    return [*counts, *host.check_output("find /srv/artifacts -type f 2>/dev/null || true").split()]


def test_it_leaves_nothing(host: Any) -> None:
    """The scenario's runs so far have left neither a run nor a model nor a file."""
    assert verify()[0]
    assert left(host) == ["0"] * len(TABLES)


def test_another_version_is_told() -> None:
    content, out = verify(verify_version="1.0.0")
    assert not content
    assert "could not reach the server: ValueError: the server is MLflow 3" in out
    assert "not 1.0.0" in out


@pytest.fixture
def no_room(host: Any) -> Iterator[None]:
    """Let the server keep runs and lose artifacts."""
    host.check_output("rm -rf /srv/artifacts && touch /srv/artifacts")
    yield
    host.check_output("rm -f /srv/artifacts")


@pytest.mark.usefixtures("no_room")
def test_artifacts_that_cannot_be_kept_are_noticed(host: Any) -> None:
    """The step is named, and what was there before it is removed."""
    content, out = verify()
    assert not content
    assert "could not send and fetch an artifact" in out
    host.check_output("rm -f /srv/artifacts")
    assert left(host)[0] == "0"


def test_a_server_that_is_away_is_told(host: Any) -> None:
    host.check_output("systemctl stop plain")
    try:
        content, out = verify(verify_timeout=5)
    finally:
        host.check_output("systemctl start plain")
        host.check_output(f"timeout 120 sh -c 'until {ANSWERS}; do sleep 1; done'")
    assert not content
    assert "could not reach the server" in out

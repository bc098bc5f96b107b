"""Dumps: a way back that is whole or not there, and a present database that is never a mixture."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

HERE = pathlib.Path(__file__).parents[1]
FOLDER = "/var/lib/mlflow-kit-dumps"


@pytest.fixture
def host(host_of: Callable[[str], Any]) -> Any:
    """The machine."""
    return host_of("kit-postgresql-vm")


def role(entry: str, check: bool = True, **variables: Any) -> str:
    """Run an entry point of the role and return what Ansible said."""
    argv = ["ansible", "-i", "molecule/_shared/inventory", "-i", f"{HERE}/inventory.yml", "all"]
    argv += ["-m", "ansible.builtin.include_role", "-a", f"name=postgresql tasks_from={entry}"]
    done = subprocess.run(
        # Who may connect depends on facts, which no play has gathered here.
        [*argv, "-e", json.dumps({"postgresql_allow": [], **variables})],
        cwd=HERE.parents[1],
        text=True,
        capture_output=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def sql(host: Any, statement: str) -> str:
    """Run a statement as the superuser and return what it prints."""
    return str(host.check_output("runuser -u postgres -- psql -XAtq -d mlflow -c %s", statement))


def newest(host: Any) -> str:
    """The name of the last dump."""
    return str(host.check_output(f"ls {FOLDER}").split()[-1])


def test_a_dump_brings_the_database_back(host: Any) -> None:
    """What came after it is gone, what was there before is back, and the database is made as the role makes it."""
    how = (
        "SELECT pg_get_userbyid(datdba), datcollate, datacl, (SELECT nspacl FROM pg_namespace WHERE nspname = 'public')"
        " FROM pg_database WHERE datname = 'mlflow'"
    )
    made = sql(host, how)
    sql(host, "SET role mlflow_owner; CREATE TABLE kept (n int); INSERT INTO kept VALUES (1), (2);")
    role("dump", postgresql_dump_about={"version": "1.0"}, postgresql_dump_quiet=True)
    about = json.loads(host.check_output(f"cat {FOLDER}/{newest(host)}/about.json"))
    assert (about["version"], about["databases"], about["quiet"]) == ("1.0", ["mlflow"], True)
    assert host.file(FOLDER).mode == 0o700
    sql(host, "DELETE FROM kept; SET role mlflow_owner; CREATE TABLE later (n int);")
    role("restore_dump", postgresql_dump_name=newest(host))
    assert sql(host, "SELECT count(*), to_regclass('later') IS NULL FROM kept") == "2|t"
    assert sql(host, "SELECT DISTINCT tableowner FROM pg_tables WHERE tablename = 'kept'") == "mlflow_owner"
    assert sql(host, "SELECT count(*) FROM pg_database WHERE datname LIKE '%kit%' OR NOT datallowconn") == "1"
    assert sql(host, how) == made


def test_a_dump_that_would_not_hold_everything_is_none(host: Any) -> None:
    """While somebody writes a quiet dump is refused, and nothing is left of it."""
    before = host.check_output(f"ls {FOLDER}")
    count = int(sql(host, "SELECT count(*) FROM kept"))
    # One session: a new one for each row would leave gaps in which a dump has its rest.
    loop = "while :; do echo 'INSERT INTO kept VALUES (3);'; sleep 0.01; done | runuser -u postgres -- psql -qd mlflow"
    host.check_output(f"systemd-run -q --unit=writer sh -c {json.dumps(loop)}")
    try:
        until = time.monotonic() + 60
        while int(sql(host, "SELECT count(*) FROM kept")) < count + 5:
            assert time.monotonic() < until
            time.sleep(0.1)
        out = role("dump", check=False, postgresql_dump_quiet=True)
    finally:
        host.check_output("systemctl stop writer")
    assert "something writes to the database" in " ".join(out.split())
    assert host.check_output(f"ls -A {FOLDER} | grep -v lock") == before


def test_a_dump_that_cannot_be_loaded_changes_nothing(host: Any) -> None:
    """A damaged one is found out beside the present database."""
    count = sql(host, "SELECT count(*) FROM kept")
    role("dump")
    name = newest(host)
    host.check_output(f"truncate -s 700 {FOLDER}/{name}/mlflow.dump")
    out = role("restore_dump", check=False, postgresql_dump_name=name)
    assert "pg_restore failed" in out
    assert sql(host, "SELECT count(*) FROM kept") == count
    host.check_output(f"rm -r {FOLDER}/{name}")


def test_a_full_disk_is_seen_before(host: Any) -> None:
    """With what was found, what was expected, and what to do."""
    host.check_output("mkdir -p /mnt/small && mount -t tmpfs -o size=1m tmpfs /mnt/small")
    try:
        out = role("dump", check=False, postgresql_dump_directory="/mnt/small/dumps")
        assert re.search(r"found \d+ MB free at /mnt/small/dumps; expected \d+ MB", " ".join(out.split()))
        assert host.check_output("ls -A /mnt/small/dumps") == ".lock"
    finally:
        host.check_output("umount /mnt/small")


def test_old_dumps_go_and_named_ones_stay(host: Any) -> None:
    """The newest are kept, and those that are named."""
    for _ in range(3):
        role("dump")
    names = host.check_output(f"ls {FOLDER}").split()
    role("prune_dumps", postgresql_dump_keep=1, postgresql_dump_protect=[names[0]])
    assert host.check_output(f"ls {FOLDER}").split() == [names[0], names[-1]]

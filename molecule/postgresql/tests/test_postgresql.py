"""The database as its clients see it: who gets in, what survives, and what a change of settings costs."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from kit import vm

HERE = pathlib.Path(__file__).parents[1]
NAME = "kit-postgresql-vm"
PASSWORDS = {"mlflow_a": "pA-Kd8%@:/Vw3-one-9Zt' \\ q", "mlflow_b": "zwölf Ⅸ Boxkämpfer"}
REFUSED = r"FATAL: +(password authentication failed|no pg_hba.conf entry)"
NEXT_A = "Qx7-next-Lm2%/@-for-a"


@contextlib.contextmanager
def session(user: str = "mlflow_a", password: str | None = None, **more: Any) -> Iterator[Any]:
    """Log in over TCP from the test's host; autocommit."""
    address = vm.addresses(NAME)[0]
    options = {"dbname": "mlflow", "sslmode": "require", "connect_timeout": 5, **more}
    connection = psycopg2.connect(host=address, user=user, password=password or PASSWORDS[user], **options)
    connection.autocommit = True
    try:
        yield connection
    finally:
        connection.close()


def ask(connection: Any, sql: str) -> Any:
    """Run one statement and return the first field of its first row, if any."""
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()[0] if cursor.description else None


@pytest.fixture
def host(host_of: Callable[[str], Any]) -> Any:
    """The machine."""
    return host_of(NAME)


def superuser(host: Any, sql: str, database: str = "mlflow") -> str:
    """Run `sql` as postgres by peer authentication."""
    return str(host.check_output("runuser -u postgres -- psql -XAtq -d %s -c %s", database, sql))


def converge(*argv: str, **variables: Any) -> str:
    """Run the scenario's playbook with other `variables` and return all that Ansible said."""
    path = HERE.parents[1] / ".cache" / "postgresql-test-vars.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(variables))
    command = ["ansible-playbook", "-i", "molecule/_shared/inventory", "-i", f"{HERE}/inventory.yml", "-e", f"@{path}"]
    try:
        done = subprocess.run(
            [*command, f"{HERE}/converge.yml", *argv], cwd=HERE.parents[1], text=True, capture_output=True, check=False
        )
    finally:
        path.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def logins(**passwords: str) -> list[dict[str, str]]:
    """The list of logins with these passwords; an empty one is to be withdrawn."""
    return [{"name": n, "password": p} if p else {"name": n, "state": "absent"} for n, p in passwords.items()]


def pieces(secret: str) -> set[str]:
    """The secret and every part of it of eight characters, as they would show in text or JSON."""
    parts = {secret[i : i + 8] for i in range(len(secret) - 7)}
    return parts | {json.dumps(p)[1:-1] for p in parts} | {json.dumps(p, ensure_ascii=False)[1:-1] for p in parts}


@pytest.mark.parametrize("user", PASSWORDS)
def test_login(user: str) -> None:
    with session(user) as connection:
        assert ask(connection, "SELECT session_user || ' as ' || current_user") == f"{user} as mlflow_owner"
        assert connection.info.ssl_in_use


@pytest.mark.parametrize(
    ("user", "password", "options"),
    [
        ("mlflow_a", "pA-Kd8%@:/Vw3-one-9Zt' \\ Q", {}),
        ("mlflow_a", PASSWORDS["mlflow_b"], {}),
        ("mlflow_owner", PASSWORDS["mlflow_a"], {}),
        ("postgres", PASSWORDS["mlflow_a"], {}),
        ("mlflow_a", PASSWORDS["mlflow_a"], {"dbname": "postgres"}),
        ("mlflow_a", PASSWORDS["mlflow_a"], {"sslmode": "disable"}),
    ],
    ids=["wrong password", "another's password", "owner", "superuser", "another database", "without TLS"],
)
def test_refused(user: str, password: str, options: dict[str, str]) -> None:
    with (
        pytest.raises(psycopg2.OperationalError, match=REFUSED),
        session(user, password, **options),
    ):
        pass


def test_an_md5_password_opens_nothing(host: Any) -> None:
    make = "SET password_encryption = 'md5'; CREATE ROLE old LOGIN PASSWORD 'old-password' IN ROLE mlflow_owner"
    superuser(host, make)
    try:
        with (
            pytest.raises(psycopg2.OperationalError, match=REFUSED),
            session("old", "old-password"),
        ):
            pass
    finally:
        superuser(host, "DROP ROLE old")


def test_a_stranger_is_refused(host: Any) -> None:
    """The machine's own outer address is none of those allowed, even with the right password."""
    superuser(host, "CREATE ROLE outsider LOGIN PASSWORD 'Outsider-1'")
    try:
        with pytest.raises(psycopg2.OperationalError, match=r"no pg_hba.conf entry"), session("outsider", "Outsider-1"):
            pass
    finally:
        superuser(host, "DROP ROLE outsider")
    assert "no pg_hba.conf entry" in from_outer_address(host)


def from_outer_address(host: Any) -> str:
    """What psql says on the machine when it comes from the machine's own outer address."""
    file = "/run/test-pgpass"
    content = "*:*:*:mlflow_a:" + PASSWORDS["mlflow_a"].replace("\\", "\\\\").replace(":", "\\:")
    host.run("umask 077; printf %%s %s > %s", content, file)
    done = host.run(f"PGPASSFILE={file} psql -w -h %s -U mlflow_a -d mlflow -XAtc 'SELECT 42'", vm.addresses(NAME)[0])
    host.run("rm %s", file)
    return str(done.stdout + done.stderr)


def test_logins_share_what_either_makes(host: Any) -> None:
    with session("mlflow_a") as a, session("mlflow_b") as b:
        ask(a, "CREATE TABLE shared (id serial PRIMARY KEY, word text)")
        ask(b, "ALTER TABLE shared ADD COLUMN more int; INSERT INTO shared (word) VALUES ('by b')")
        assert ask(a, "SELECT word FROM shared") == "by b"
        assert ask(a, "SELECT tableowner FROM pg_tables WHERE tablename = 'shared'") == "mlflow_owner"
        ask(b, "DROP TABLE shared")


def test_the_database_is_closed_to_other_roles(host: Any) -> None:
    superuser(host, "CREATE ROLE nobody_special LOGIN")
    try:
        for kind in ("CONNECT", "TEMPORARY", "CREATE"):
            assert superuser(host, f"SELECT has_database_privilege('nobody_special', 'mlflow', '{kind}')") == "f"
        assert superuser(host, "SELECT has_schema_privilege('nobody_special', 'public', 'CREATE, USAGE')") == "f"
    finally:
        superuser(host, "DROP ROLE nobody_special")


def test_a_table_restored_by_the_superuser_goes_to_the_owner(host: Any) -> None:
    superuser(host, "CREATE TABLE restored (id serial PRIMARY KEY, word text)")
    said = converge()
    assert re.search(r"changed=1\b", said), said
    with session() as connection:
        ask(connection, "INSERT INTO restored (word) VALUES ('mine'); DROP TABLE restored")


def test_the_database_keeps_text_and_checks_its_pages(host: Any) -> None:
    with session() as connection:
        assert ask(connection, "SHOW data_checksums") == "on"
        assert (
            ask(connection, "SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = 'mlflow'") == "UTF8"
        )
        assert ask(connection, "SELECT upper('ä')") == "Ä"


def test_settings_follow_the_memory_of_the_host(host: Any) -> None:
    total = int(re.findall(r"MemTotal:\s+(\d+)", host.check_output("cat /proc/meminfo"))[0]) // 1024
    with session() as connection:
        shared = int(ask(connection, "SELECT setting FROM pg_settings WHERE name = 'shared_buffers'")) // 128
        assert 0.11 * total < shared < 0.13 * total
        assert (
            int(ask(connection, "SELECT setting FROM pg_settings WHERE name = 'effective_cache_size'")) // 128 > shared
        )


def test_a_reload_keeps_sessions_and_nothing_shows_the_passwords(host: Any) -> None:
    """A network more, a new password, a setting that a reload takes: no restart, and no secret in all that was said."""
    with session() as kept:
        started = ask(kept, "SELECT pg_postmaster_start_time()")
        outer = vm.addresses(NAME)[0]
        said = converge(
            "-vvv",
            "--diff",
            postgresql_allow=["{{ ansible_facts['default_ipv4']['gateway'] }}/32", f"{outer}/32"],
            postgresql_logins=logins(mlflow_a=NEXT_A, mlflow_b=PASSWORDS["mlflow_b"]),
            postgresql_settings={"work_mem": "7MB"},
        )
        assert f"{outer}/32" in said, "no diff was shown, so this proves nothing"
        for secret in (*PASSWORDS.values(), NEXT_A):
            found = [piece for piece in pieces(secret) if piece in said]
            assert not found, f"{len(found)} pieces of a password in Ansible's output"
        assert ask(kept, "SELECT pg_postmaster_start_time()") == started
        assert ask(kept, "SHOW work_mem") == "7MB"
    with pytest.raises(psycopg2.OperationalError, match=REFUSED), session():
        pass
    PASSWORDS["mlflow_a"] = NEXT_A
    with session() as connection:
        assert ask(connection, "SELECT pg_postmaster_start_time()") == started
    assert "42" in from_outer_address(host)


def test_a_restart_when_needed_and_a_login_withdrawn(host: Any) -> None:
    with session("mlflow_b") as b:
        started = ask(b, "SELECT pg_postmaster_start_time()")
        superuser(host, "CREATE SCHEMA hidden AUTHORIZATION mlflow_b")
    converge(
        postgresql_logins=logins(mlflow_a=NEXT_A, mlflow_b=""), postgresql_memory_mb=2048, postgresql_max_connections=40
    )
    with session() as a:
        assert ask(a, "SELECT pg_postmaster_start_time()") > started
        assert ask(a, "SHOW shared_buffers") == "256MB"
        assert ask(a, "SHOW max_connections") == "40"
        assert ask(a, "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'hidden'") == "mlflow_owner"
    with pytest.raises(psycopg2.OperationalError, match=REFUSED), session("mlflow_b"):
        pass


def test_a_withdrawn_login_loses_its_sessions() -> None:
    both = {"postgresql_memory_mb": 2048, "postgresql_max_connections": 40}
    converge(postgresql_logins=logins(mlflow_a=NEXT_A, mlflow_b=PASSWORDS["mlflow_b"]), **both)
    with session("mlflow_b") as b, session("mlflow_a") as a:
        converge(postgresql_logins=logins(mlflow_a=NEXT_A, mlflow_b=""), **both)
        with pytest.raises(psycopg2.OperationalError):
            ask(b, "SELECT 1")
        assert ask(a, "SELECT 1") == 1, "only the withdrawn login's session may end"


def test_a_bad_setting_never_reaches_the_server(host: Any) -> None:
    with session() as kept:
        with pytest.raises(AssertionError, match="no_such_parameter"):
            converge(postgresql_logins=logins(mlflow_a=NEXT_A), postgresql_settings={"no_such_parameter": 1})
        assert ask(kept, "SELECT 1") == 1
    assert "no_such_parameter" not in host.check_output("cat /etc/postgresql/*/main/conf.d/*")


def test_killed_it_comes_back_with_what_was_committed(host: Any) -> None:
    with session() as connection:
        ask(connection, "CREATE TABLE survived (word text); INSERT INTO survived VALUES ('before the kill')")
    unit = host.check_output("systemctl list-units --plain --no-legend 'postgresql@*' | cut -d' ' -f1")
    host.check_output("kill -9 $(systemctl show -P MainPID %s)", unit)
    end = time.monotonic() + 30
    while True:
        try:
            with session() as connection:
                assert ask(connection, "SELECT word FROM survived") == "before the kill"
            break
        except psycopg2.OperationalError:
            assert time.monotonic() < end, host.run("systemctl status %s", unit).stdout
            time.sleep(0.2)
    assert int(host.check_output("systemctl show -P NRestarts %s", unit)) >= 1


def test_rebooted_it_comes_back_with_what_was_committed(host_of: Callable[[str], Any]) -> None:
    vm.restart(NAME)
    end = time.monotonic() + 30
    while True:
        try:
            with session() as connection:
                assert ask(connection, "SELECT word FROM survived") == "before the kill"
            return
        except psycopg2.OperationalError:
            assert time.monotonic() < end
            time.sleep(0.2)


@pytest.mark.parametrize("secret", [*PASSWORDS.values(), NEXT_A], ids=["a", "b", "next a"])
def test_the_host_shows_no_password(host: Any, secret: str) -> None:
    patterns = "\n".join(sorted(pieces(secret)))
    places = {
        "processes": "cat /proc/[0-9]*/cmdline | tr '\\0' ' '",
        "the journal": "journalctl --no-pager",
        "PostgreSQL's logs": "cat /var/log/postgresql/*",
        "units": "systemctl show '*'; systemctl cat 'postgresql*'",
        "all other logs": "find /var/log -type f ! -path '*/journal/*' -exec cat {} +",
        "files": "find /etc /tmp /var/tmp ~root/.ansible /run -type f -size -1024k -exec cat {} +",
    }
    host.run("umask 077; printf %%s %s > /root/patterns", patterns)
    try:
        # The search itself can find something: this copy stands where it looks.
        control = host.run(
            f"cp /root/patterns /tmp/control; {{ {places['files']}; }} 2>/dev/null | grep -acFf /root/patterns"
        )
        host.run("rm /tmp/control")
        assert int(control.stdout) > 0
        for place, command in places.items():
            done = host.run(f"{{ {command}; }} 2>/dev/null | grep -acFf /root/patterns")
            assert done.stdout.strip() == "0", f"{place}: {done.stdout} lines"
    finally:
        host.run("rm /root/patterns")

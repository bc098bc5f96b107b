"""SQL by psql's standard input, as the superuser `postgres` over the local socket: no driver, no password, no argv."""

from __future__ import annotations

import pathlib
import re
import subprocess
import time

SOCKETS = "/var/run/postgresql"
# What the session runs is nobody's to read in the log, not even when it fails.
QUIET = "SET log_statement = 'none'; SET log_min_duration_statement = -1; SET log_min_error_statement = 'panic';\n"


class SqlError(Exception):
    """The server refused a statement or did not answer; the message is psql's, without the statement."""


class Server:
    """A cluster of the distribution's PostgreSQL.

    Args:
        version: major version, such as "17".
        cluster: the cluster's name, as in `pg_lsclusters`.
    """

    def __init__(self, version: str, cluster: str = "main") -> None:
        """Find the cluster's folders from its own configuration."""
        self.unit = f"postgresql@{version}-{cluster}.service"
        self.psql = f"/usr/lib/postgresql/{version}/bin/psql"
        text = pathlib.Path(f"/etc/postgresql/{version}/{cluster}/postgresql.conf").read_text(encoding="utf-8")
        named = re.search(r"^\s*data_directory\s*=\s*'([^']+)'", text, re.MULTILINE)
        self.data = pathlib.Path(named[1] if named else f"/var/lib/postgresql/{version}/{cluster}")

    def port(self) -> str:
        """The port that the running server has, which the files may already name another for. Raises SqlError."""
        try:
            return (self.data / "postmaster.pid").read_text(encoding="utf-8").splitlines()[3]
        except (FileNotFoundError, IndexError):
            raise SqlError(f"{self.unit} is not running") from None

    def sql(self, script: str, database: str = "postgres") -> str:
        """Run `script` in `database` and return the rows it prints. Raises SqlError."""
        argv = [self.psql, "-XAtq", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=terse", "-h", SOCKETS, "-p", self.port()]
        argv += ["-d", database, "-f", "-"]
        try:
            done = subprocess.run(
                argv,
                input=QUIET + script,
                capture_output=True,
                text=True,
                encoding="utf-8",
                check=False,
                timeout=120,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PGCONNECT_TIMEOUT": "10", "PGAPPNAME": "ansible"},
                user="postgres",
                group="postgres",
                extra_groups=[],
            )
        except PermissionError:
            raise SqlError("the task must run as root: set `become: true`") from None
        except subprocess.TimeoutExpired:
            raise SqlError("the server did not finish within 120 s; is a lock held?") from None
        if done.returncode:
            raise SqlError(done.stderr.strip())
        return done.stdout.strip()

    def wait(self, seconds: float) -> None:
        """Wait until the server answers queries. Raises SqlError after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.sql("SELECT 1;")
                return
            except SqlError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)


def literal(text: str) -> str:
    """Quote `text` as an SQL string. Raises SqlError for a character that no SQL string can hold."""
    if "\0" in text:
        raise SqlError("a NUL character cannot be stored")
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """Quote `name` as an SQL identifier. Raises SqlError when it is empty or longer than PostgreSQL keeps."""
    longest = 63
    if not name or "\0" in name or len(name.encode()) > longest:
        raise SqlError(f"{name!r} is no name for a role or database: 1 to {longest} bytes")
    return '"' + name.replace('"', '""') + '"'

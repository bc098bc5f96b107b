"""PostgreSQL: what is in it, its backup by pgBackRest, and clusters that a backup is restored into."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kit_backup.common import RUN, Failed, Settings, call, last, megabytes, now

SOCKETS = "/var/run/postgresql"
LOCK_TRIES = 40
TABLES = """SELECT coalesce(json_agg(format('%I.%I', schemaname, tablename) ORDER BY 1), '[]')
FROM (SELECT schemaname, tablename FROM pg_tables
       WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1, 2) AS t;"""
# Independent of the order of rows. Numbers and times must look the same in both places.
SUMS = "SET timezone = 'UTC'; SET extra_float_digits = 1; SET bytea_output = 'hex';"
SUM = "SELECT '{name}', count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) FROM {name} AS t;"
EMPTY = "SELECT coalesce(sum(n), 0) FROM (SELECT count(*) AS n FROM {name}) AS t;"


class Database:
    """The distribution's PostgreSQL on this host and its stanza in pgBackRest's repository."""

    def __init__(self, settings: Settings) -> None:
        """Know the cluster from the settings."""
        held = settings.database
        self.settings, self.names = settings, list(held["names"])
        self.version, self.cluster, self.port = str(held["version"]), held["cluster"], int(held["port"])
        self.stanza, self.unit = held["stanza"], f"postgresql@{self.version}-{self.cluster}.service"
        self.bin = pathlib.Path(f"/usr/lib/postgresql/{self.version}/bin")
        self.data = pathlib.Path(held["data_directory"])
        self.config = pathlib.Path(f"/etc/postgresql/{self.version}/{self.cluster}/postgresql.conf")
        self.start_it = f"systemctl start {self.unit} (its log: /var/log/postgresql), then start this again"

    def psql(self, name: str, socket: str = SOCKETS) -> list[str]:
        """The command that runs SQL from its standard input in the database `name`."""
        argv = [str(self.bin / "psql"), "-XAtq", "-F", " ", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=terse"]
        return [*argv, "-h", socket, "-p", str(self.port), "-d", name, "-f", "-"]

    def sql(self, script: str, name: str = "postgres", socket: str = SOCKETS) -> str:
        """Run `script` as postgres and return the rows that it prints. Raises Failed."""
        done = call(self.psql(name, socket), stdin=script, user="postgres")
        if done.returncode:
            raise Failed(f"PostgreSQL did not answer: {last(done)}", self.start_it)
        return done.stdout.decode().strip()

    def pgbackrest(self, *argv: str) -> subprocess.CompletedProcess[bytes]:
        """Run pgBackRest as postgres."""
        return call(["pgbackrest", f"--stanza={self.stanza}", *argv], user="postgres")

    def complaint(self, done: subprocess.CompletedProcess[bytes]) -> str:
        """What pgBackRest complained about, and what the target has free: it does not always tell that it is full."""
        text = re.sub(r"(?m)^[-0-9]+ [:.0-9]+ P\d+ +", "", (done.stdout + done.stderr).decode(errors="replace"))
        words = re.sub(r"\s+", " ", text).strip()[-700:]
        free = f" ({megabytes(self.settings.free()[0])} are free in {self.settings.base})"
        return words + (free if self.settings.directory else "")

    def info(self) -> dict[str, Any]:
        """What pgBackRest's repository holds: its own description of the stanza. Raises Failed."""
        done = self.pgbackrest("info", "--output=json")
        text = (done.stdout + done.stderr).decode(errors="replace")
        try:
            found = json.loads(done.stdout)[0] if done.returncode == 0 else {}
        except (ValueError, IndexError):
            found = {}
        # 1 to 3: nothing there yet, of the stanza or of backups.
        if not found or found["status"]["code"] not in range(4):
            raise Failed(
                f"pgBackRest cannot read the backups of the database: {text.strip()[-500:]}",
                "if it speaks of a cipher or of a file that it cannot parse, this vault's vault_backup_database_key is "
                "not the one that they were written with: bring back the vault from the target's folder site/ "
                "(docs/restore.md); else see that the target is mounted and readable by postgres",
            )
        return found

    def backups(self) -> list[dict[str, Any]]:
        """The backups in the repository, oldest first, as pgBackRest describes them. Raises Failed."""
        return [one for one in self.info().get("backup", []) if not one.get("error")]

    def reach(self) -> None:
        """See that PostgreSQL runs and archives. Raises Failed."""
        if self.sql("SHOW archive_mode;") == "off":
            raise Failed(
                "PostgreSQL does not archive: archive_mode is off",
                "run site.yml; settings of your own belong into site_postgresql_settings, since postgresql_settings "
                "carries archive_mode and archive_command",
            )

    def size(self) -> int:
        """Bytes of all databases. Raises Failed."""
        return int(self.sql("SELECT sum(pg_database_size(oid)) FROM pg_database WHERE datallowconn;"))

    def is_empty(self) -> bool:
        """Whether the databases hold so little that a server makes it at its first start. Raises Failed."""
        rows = 0
        for name in self.names:
            if name not in self.sql("SELECT datname FROM pg_database;").split():
                continue
            tables = json.loads(self.sql(TABLES, name))
            kept = [t for t in tables if t in ("public.runs", "public.registered_models", "public.users")]
            rows += sum(int(self.sql(EMPTY.format(name=t), name)) for t in kept if t != "public.users")
            if "public.experiments" in tables:
                rows += int(self.sql("SELECT count(*) FROM public.experiments WHERE experiment_id > 0;", name))
            if "public.users" in tables:
                rows += max(int(self.sql(EMPTY.format(name="public.users"), name)) - 1, 0)
        return rows == 0

    def check(self) -> None:
        """See that a log segment reaches the repository. Raises Failed."""
        done = self.pgbackrest("check", "--log-level-console=error")
        if done.returncode:
            raise Failed(f"PostgreSQL's log does not reach the backups: {self.complaint(done)}", ARCHIVE)

    def backup(self, full_days: int) -> dict[str, Any]:
        """Take a full backup, or what changed since one that is younger than `full_days`. Raises Failed."""
        fulls = [one["timestamp"]["stop"] for one in self.backups() if one["type"] == "full"]
        young = bool(fulls) and now().timestamp() - max(fulls) < full_days * 86400 - 3600
        done = self.pgbackrest("backup", f"--type={'diff' if young else 'full'}", "--log-level-console=error")
        if done.returncode:
            raise Failed(f"pgBackRest could not take the backup: {self.complaint(done)}", ARCHIVE)
        return self.backups()[-1]

    def archived(self, seconds: float = 120) -> None:
        """Close the running log segment and wait until it is in the repository. Raises Failed."""
        name = self.sql("SELECT pg_walfile_name(pg_switch_wal());")
        end = time.monotonic() + seconds
        while True:
            told = self.sql("SELECT coalesce(last_archived_wal, ''), now() FROM pg_stat_archiver;").split()[0]
            if told[8:24] >= name[8:24]:
                return
            if time.monotonic() > end:
                raise Failed(f"PostgreSQL's log {name} did not reach the backups within {seconds:.0f} s", ARCHIVE)
            time.sleep(0.3)

    def fingerprint(self, mark: str) -> dict[str, Any]:
        """Count and sum up every table, and set the mark `mark` into the log at exactly that moment. Raises Failed.

        Writers wait while all tables are locked at once, which takes milliseconds; whoever holds one of them for
        longer is not waited for but asked again later. The counting itself hinders nobody.
        """
        for _ in range(LOCK_TRIES):
            with contextlib.ExitStack() as stack:
                holders = {name: stack.enter_context(Session(self.psql(name))) for name in self.names}
                readers = {name: stack.enter_context(Session(self.psql(name))) for name in self.names}
                tables = {name: json.loads(reader.ask(TABLES)) for name, reader in readers.items()}
                for reader in readers.values():
                    reader.ask(f"{SUMS} SET default_transaction_isolation = 'repeatable read';")
                try:
                    for name, holder in holders.items():
                        # Shorter than deadlock_timeout: who is in the way never pays for it.
                        lock = f"LOCK TABLE {', '.join(tables[name])} IN SHARE MODE;" if tables[name] else ""
                        holder.ask(f"BEGIN; SET LOCAL lock_timeout = '200ms'; {lock}")
                except BrokenPipeError:
                    time.sleep(0.25)
                    continue
                for reader in readers.values():
                    reader.ask("BEGIN READ ONLY; SELECT 1;")
                holder = next(iter(holders.values()))
                holder.ask(f"SELECT pg_create_restore_point('{mark}');")
                for holder in holders.values():
                    holder.ask("COMMIT;")
                sums = {
                    name: _rows(reader.ask("".join(SUM.format(name=t) for t in tables[name])))
                    for name, reader in readers.items()
                }
                return {"mark": mark, "tables": sums}
        raise Failed(
            f"no moment was found in {LOCK_TRIES} attempts at which all tables could be counted together",
            "something holds a lock for long: SELECT * FROM pg_stat_activity; then start this again",
        )

    def sums(self, names: Sequence[str], socket: str) -> dict[str, dict[str, list[str]]]:
        """Count and sum up every table of `names` in the cluster behind `socket`. Raises Failed."""
        found = {}
        for name in names:
            tables = json.loads(self.sql(TABLES, name, socket))
            found[name] = _rows(self.sql(SUMS + "".join(SUM.format(name=t) for t in tables), name, socket))
        return found

    def last_archived(self) -> float:
        """When the newest log segment reached the repository, in seconds since 1970; 0 for none. Raises Failed."""
        newest = 0.0
        for archive in self.info().get("archive", []):
            if archive.get("max"):
                folder = f"archive/{self.stanza}/{archive['id']}/{archive['max'][:16]}"
                done = self.pgbackrest("repo-ls", "--output=json", folder)
                held = json.loads(done.stdout) if done.returncode == 0 else {}
                newest = max([newest, *(float(one.get("time", 0)) for one in held.values())])
        return newest

    def restore(self, data: pathlib.Path, *argv: str) -> None:
        """Restore a backup into `data` by pgBackRest's restore with `argv`. Raises Failed."""
        done = self.pgbackrest(f"--pg1-path={data}", "restore", "--log-level-console=error", *argv)
        if done.returncode:
            raise Failed(
                f"pgBackRest could not restore: {self.complaint(done)}",
                "if the disk is full, give it space; a checksum error means a damaged backup: choose another time; "
                "then run the same command again",
            )

    def stopped(self) -> None:
        """Stop PostgreSQL, and take away what a killed one has left. Raises Failed."""
        done = call(["systemctl", "stop", self.unit])
        if done.returncode:
            raise Failed(f"PostgreSQL did not stop: {last(done)}", f"systemctl status {self.unit}")
        self.end(self.data)

    def end(self, data: pathlib.Path) -> None:
        """End a server that a killed run left in `data`, and take away what a killed server left. Raises Failed."""
        pid = data / "postmaster.pid"
        try:
            number = int(pid.read_text().split()[0])
            alive = "postgres" in pathlib.Path(f"/proc/{number}/comm").read_text()
        except (FileNotFoundError, ValueError, IndexError):
            alive = False
        if alive:
            done = call([str(self.bin / "pg_ctl"), "-D", str(data), "-s", "-w", "-m", "fast", "stop"], user="postgres")
            if done.returncode:
                raise Failed(
                    f"PostgreSQL's process {number} does not end: {last(done)}", "end it, and start this again"
                )
        pid.unlink(missing_ok=True)

    @contextlib.contextmanager
    def private(self, data: pathlib.Path, config: pathlib.Path, log: pathlib.Path) -> Iterator[str]:
        """Run the cluster in `data` where no client reaches it, until it has recovered; gives its socket's folder."""
        socket = RUN / "pg"
        RUN.mkdir(exist_ok=True)
        RUN.chmod(0o711)
        call(["install", "-d", "-m", "0700", "-o", "postgres", "-g", "postgres", str(socket)])
        log.unlink(missing_ok=True)
        call(["install", "-m", "0600", "-o", "postgres", "-g", "postgres", "/dev/null", str(log)])
        options = f"-c config_file={config} -c listen_addresses= -c unix_socket_directories={socket} -p {self.port}"
        options += " -c ssl=off -c logging_collector=off -c log_destination=stderr -c hot_standby=off"
        control = [str(self.bin / "pg_ctl"), "-D", str(data), "-s"]
        started = call(
            [*control, "-w", "-t", "86400", "-l", str(log), "-o", options, "start"],
            user="postgres",
            keeps_lock=False,
        )
        try:
            if started.returncode:
                raise NotRecovered(log.read_text(errors="replace")[-3000:] or last(started))
            # It takes no questions before its end. A server that gives up ends by itself.
            ask = self.psql("postgres", str(socket))
            while call(ask, stdin="SELECT pg_is_in_recovery();", user="postgres").stdout.strip() != b"f":
                if call([*control, "status"], user="postgres").returncode:
                    raise NotRecovered(log.read_text(errors="replace")[-3000:])
                time.sleep(0.2)
            yield str(socket)
        finally:
            call([*control, "-w", "-t", "600", "-m", "fast", "stop"], user="postgres")

    def scratch_config(self, folder: pathlib.Path) -> pathlib.Path:
        """Write the settings of a cluster that nobody but postgres sees, and return their path."""
        hba, config = folder / "pg_hba.conf", folder / "postgresql.conf"
        hba.write_text("local all postgres peer\n")
        config.write_text(
            f"hba_file = '{hba}'\nshared_buffers = 64MB\nmax_connections = 20\nfsync = off\narchive_mode = off\n"
            "autovacuum = off\nmax_wal_size = 256MB\ndynamic_shared_memory_type = mmap\n"
        )
        for path in (hba, config):
            path.chmod(0o644)
        return config

    def timeline(self) -> str:
        """The timeline of the running server. Raises Failed."""
        return self.sql("SELECT timeline_id FROM pg_control_checkpoint();")


ARCHIVE = (
    "see that the target is mounted, has space and belongs to postgres (pgbackrest/ in it), and /var/log/postgresql; "
    "then start this again; earlier backups are untouched"
)


class NotRecovered(Exception):
    """A restored cluster did not come up; the message is the end of its log."""

    @property
    def too_early(self) -> bool:
        """Whether the log ended before the time that was asked for, so that its end is the state at that time."""
        return "recovery ended before configured recovery target was reached" in str(self)


class Session:
    """A session of psql that is asked one thing after the other.

    Args:
        argv: psql's command line.
    """

    END = "--end-of-answer--"

    def __init__(self, argv: Sequence[str]) -> None:
        """Remember the command."""
        self.argv = argv

    def __enter__(self) -> Session:
        """Start psql."""
        self.process = subprocess.Popen(
            self.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PGAPPNAME": "mlflow-kit-backup"},
            user="postgres",
            group="postgres",
            extra_groups=[],
        )
        return self

    def ask(self, script: str) -> str:
        """Run `script` and return the rows. Raises BrokenPipeError when psql has ended, as it does with an error."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{script}\n\\echo {self.END}\n")
        self.process.stdin.flush()
        lines: list[str] = []
        for line in self.process.stdout:
            if line.strip() == self.END:
                return "\n".join(lines)
            lines.append(line.rstrip("\n"))
        raise BrokenPipeError

    def __exit__(self, *_: object) -> None:
        """End psql, and with it whatever it has open."""
        with contextlib.suppress(OSError):
            if self.process.stdin:
                self.process.stdin.close()
        if self.process.stdout:
            self.process.stdout.close()
        self.process.terminate()
        self.process.wait()


def _rows(text: str) -> dict[str, list[str]]:
    """Table to count and sum."""
    found = {}
    for line in text.splitlines():
        name, count, total = line.rsplit(" ", 2)
        found[name] = [count, total]
    return found


def compare(expected: Mapping[str, Mapping[str, Sequence[str]]], found: Mapping[str, Any]) -> list[str]:
    """What of `expected` (database, table, count and sum) is different in `found`."""
    differences = []
    for name, tables in expected.items():
        for table in sorted(set(tables) | set(found.get(name, {}))):
            want, have = tables.get(table), found.get(name, {}).get(table)
            if want is None or have is None:
                differences.append(f"{name}: {table} {'is missing' if have is None else 'should not be there'}")
            elif list(want) != list(have):
                what = f"{have[0]} rows, and had {want[0]}" if want[0] != have[0] else "the same count, other content"
                differences.append(f"{name}: {table} has {what}")
    return differences


def summary(backup: Mapping[str, Any], prints: Mapping[str, Any]) -> dict[str, Any]:
    """What the state file tells of a backup of the database."""
    tables = [rows for held in prints["tables"].values() for rows in held.values()]
    return {
        "label": backup["label"],
        "type": backup["type"],
        "bytes": backup["info"]["size"],
        "repository_bytes": backup["info"]["repository"]["delta"],
        "tables": len(tables),
        "rows": sum(int(count) for count, _ in tables),
        "mark": prints["mark"],
    }


def describe(held: Mapping[str, Any]) -> str:
    """A summary in words."""
    return (
        f"database: {held['type']} backup {held['label']}, {megabytes(held['bytes'])} in {held['tables']} tables, "
        f"{held['rows']} rows"
    )

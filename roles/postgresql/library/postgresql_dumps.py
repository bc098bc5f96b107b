#!/usr/bin/python
"""Dumps of an application's databases on the host itself: taken, listed, put back as a whole, and pruned."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import subprocess
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_psql import SOCKETS, Server, SqlError, identifier, literal

DOCUMENTATION = r"""
module: postgresql_dumps
short_description: Dumps of databases, in a folder that only root reads
description:
  - C(take) dumps O(databases) and remembers O(about) beside them. It counts only when it is whole and on the disk.
  - C(restore) puts the dump O(name) back. It is loaded beside the present databases, which it replaces in one step,
    so that an interrupted run leaves the one or the other and never a mixture.
  - C(list) tells what there is, and C(prune) keeps the newest O(keep) and those in O(protect).
options:
  state: {description: What to do., type: str, choices: [list, take, restore, prune], default: list}
  directory: {description: Folder of the dumps., type: path, required: true}
  databases: {description: Names of the databases., type: list, elements: str, required: true}
  owner: {description: Role that owns them., type: str, required: true}
  about: {description: What to remember with the dump., type: dict, default: {}}
  quiet:
    description: Whether the dump must hold all that was written; it is taken again while something writes.
    type: bool
    default: false
  name: {description: The dump to put back., type: str}
  keep: {description: Number of dumps to keep., type: int, default: 3}
  protect: {description: Names of dumps that are kept besides., type: list, elements: str, default: []}
author: [mlflow-kit]
"""

NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z(-[0-9]+)?")
MARGIN = 64 * 1024 * 1024
NEXT_WRITER = "SELECT pg_snapshot_xmax(pg_current_snapshot());"
ATTEMPTS = 3


class DumpError(Exception):
    """A dump cannot be taken or put back; the message says what was found, expected and what to do."""


def cluster() -> Server:
    """The one cluster `main` of this host. Raises DumpError when there is none, or more than one."""
    found = sorted(path.parents[1].name for path in pathlib.Path("/etc/postgresql").glob("*/main/postgresql.conf"))
    if len(found) != 1:
        raise DumpError(
            f"found {len(found)} clusters «main» in /etc/postgresql; expected 1: run playbooks/database.yml"
        )
    return Server(found[0])


class Dumps:
    """The dumps in one folder.

    Args:
        module: the module that was called.
    """

    def __init__(self, module: AnsibleModule) -> None:
        """Find cluster and folder."""
        self.p: dict[str, Any] = module.params
        self.folder = pathlib.Path(self.p["directory"])
        self.server = cluster()

    def lock(self) -> Any:
        """Wait for another process at work here, such as that of a controller which is gone, and return the lock."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (self.folder / ".lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def there(self) -> list[dict[str, Any]]:
        """What each whole dump remembers, the newest first."""
        found = []
        for path in sorted(self.folder.glob("*/about.json"), reverse=True):
            if NAME.fullmatch(path.parent.name):
                found.append(json.loads(path.read_text()))
        return found

    def sizes(self) -> dict[str, int]:
        """Bytes of each database that there is. Raises SqlError."""
        names = ", ".join(map(literal, self.p["databases"]))
        rows = f"SELECT datname, pg_database_size(oid) FROM pg_database WHERE datname IN ({names});"
        lines = (line.rpartition("|") for line in self.server.sql(rows).splitlines())
        return {name: int(size) for name, _, size in lines}

    def program(self, name: str, *argv: str, stdin: Any = subprocess.DEVNULL, stdout: Any = subprocess.DEVNULL) -> None:
        """Run one of PostgreSQL's programs as its superuser. Raises DumpError with what it said."""
        path = pathlib.Path(self.server.psql).with_name(name)
        command = [str(path), "-h", SOCKETS, "-p", self.server.port(), "--no-password", *argv]
        done = subprocess.run(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PGAPPNAME": "ansible"},
            user="postgres",
            group="postgres",
            extra_groups=[],
        )
        if done.returncode:
            raise DumpError(f"{name} failed: {done.stderr.strip()[-1500:]}")

    def room(self, needed: int, where: pathlib.Path, what: str) -> None:
        """Raise DumpError unless `where` has `needed` bytes left."""
        there = next(path for path in (where, *where.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise DumpError(
                f"{what}: found {free // 2**20} MB free at {there}; expected {needed // 2**20} MB. Make room there, or "
                "change postgresql_dump_directory; nothing was changed."
            )

    def take(self) -> dict[str, Any]:
        """Take a dump and return what it remembers. Raises DumpError, SqlError or OSError, and leaves nothing then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        for left in self.folder.glob(".new-*"):
            shutil.rmtree(left)
        self.reopen()
        sizes = self.sizes()
        missing = sorted(set(self.p["databases"]) - set(sizes))
        if missing:
            raise DumpError(f"found no database {', '.join(missing)}; expected it: run playbooks/database.yml")
        self.room(sum(sizes.values()) // 2 + MARGIN, self.folder, "the dump of the database")
        scratch = self.folder / f".new-{os.getpid()}"
        began, quiet = time.time(), False
        try:
            for _ in range(ATTEMPTS):
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(mode=0o700)
                writer = self.server.sql(NEXT_WRITER)
                for name in sizes:
                    with os.fdopen(os.open(scratch / f"{name}.dump", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                        self.program("pg_dump", "-Fc", "-Z1", "--no-owner", "--no-acl", "-d", name, stdout=file)
                        os.fsync(file.fileno())
                quiet = self.server.sql(NEXT_WRITER) == writer
                if quiet or not self.p["quiet"]:
                    break
            else:
                raise DumpError(
                    "something writes to the database beside the gateway, so that no dump holds everything; expected "
                    "nobody: end what does (SELECT * FROM pg_stat_activity), and try again. Nothing was changed."
                )
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(began))
            name, count = stamp, 1
            while (self.folder / name).exists():
                name, count = f"{stamp}-{count}", count + 1
            about = {
                "name": name,
                "taken": began,
                "seconds": round(time.time() - began, 2),
                "databases": list(sizes),
                "bytes": sum(path.stat().st_size for path in scratch.iterdir()),
                "size": sum(sizes.values()),
                "quiet": quiet,
                **self.p["about"],
            }
            with (scratch / "about.json").open("w") as text:
                text.write(json.dumps(about, indent=1) + "\n")
                text.flush()
                os.fsync(text.fileno())
            scratch.rename(self.folder / name)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        opened = os.open(self.folder, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)
        return about

    def reopen(self) -> None:
        """Let databases that an interrupted exchange has closed accept connections again, and drop what it left."""
        listed = ", ".join(map(literal, self.p["databases"]))
        closed = f"SELECT datname FROM pg_database WHERE NOT datallowconn AND datname IN ({listed});"
        for name in self.server.sql(closed).splitlines():
            self.server.sql(f"ALTER DATABASE {identifier(name)} WITH ALLOW_CONNECTIONS true;")
        for name in self.p["databases"]:
            for ending in ("_kit_new", "_kit_old"):
                self.server.sql(f"DROP DATABASE IF EXISTS {identifier(name + ending)} WITH (FORCE);")

    def restore(self) -> dict[str, Any]:
        """Put the dump back and return what it remembers. Raises DumpError or SqlError; the old is there then."""
        about = next((one for one in self.there() if one["name"] == self.p["name"]), None)
        if about is None:
            raise DumpError(f"found no dump {self.p['name']} in {self.folder}; expected it there")
        self.reopen()
        self.room(int(about["size"]) + MARGIN, self.server.data, "loading the dump beside the database")
        owner = identifier(self.p["owner"])
        try:
            for name in about["databases"]:
                new = identifier(f"{name}_kit_new")
                # As postgresql_objects makes and closes it: a dump of one database holds nothing of this.
                how = "TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C.UTF-8'"
                self.server.sql(f"CREATE DATABASE {new} OWNER {owner} {how};")
                self.server.sql(f"REVOKE ALL ON DATABASE {new} FROM PUBLIC;")
                self.server.sql("REVOKE ALL ON SCHEMA public FROM PUBLIC;", f"{name}_kit_new")
                with (self.folder / about["name"] / f"{name}.dump").open("rb") as file:
                    argv = ["--no-owner", "--no-acl", "--exit-on-error", f"--role={self.p['owner']}"]
                    self.program("pg_restore", *argv, "-d", f"{name}_kit_new", stdin=file)
                self.program("vacuumdb", "--analyze-only", "-d", f"{name}_kit_new")
            self.exchange(about["databases"])
        finally:
            with contextlib.suppress(SqlError):
                self.reopen()
        return about

    def exchange(self, names: list[str]) -> None:
        """Let the loaded databases take the names of the present ones, all at once. Raises SqlError."""
        present = [name for name in names if name in self.sizes()]
        for _ in range(20):
            for name in present:
                self.server.sql(f"ALTER DATABASE {identifier(name)} WITH ALLOW_CONNECTIONS false;")
            listed = ", ".join(literal(name) for each in names for name in (each, f"{each}_kit_new"))
            end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname IN"
            self.server.sql(f"{end} ({listed});")
            steps = [f"ALTER DATABASE {identifier(n)} RENAME TO {identifier(n + '_kit_old')};" for n in present]
            steps += [f"ALTER DATABASE {identifier(n + '_kit_new')} RENAME TO {identifier(n)};" for n in names]
            try:
                self.server.sql("BEGIN;\n" + "\n".join(steps) + "\nCOMMIT;")
                return
            except SqlError as error:  # a session takes a moment to end
                last = error
                time.sleep(0.25)
        raise last

    def prune(self) -> list[str]:
        """Remove what is beyond the newest to keep, and return the names."""
        names = [one["name"] for one in self.there()]
        gone = [name for name in names[max(0, self.p["keep"]) :] if name not in self.p["protect"]]
        for name in gone:
            (self.folder / name / "about.json").unlink()
            shutil.rmtree(self.folder / name)
        return gone


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["list", "take", "restore", "prune"], "default": "list"},
            "directory": {"type": "path", "required": True},
            "databases": {"type": "list", "elements": "str", "required": True},
            "owner": {"type": "str", "required": True},
            "about": {"type": "dict", "default": {}},
            "quiet": {"type": "bool", "default": False},
            "name": {"type": "str"},
            "keep": {"type": "int", "default": 3},
            "protect": {"type": "list", "elements": "str", "default": []},
        },
        required_if=[("state", "restore", ["name"])],
        supports_check_mode=True,
    )
    os.umask(0o077)
    state, result = module.params["state"], {"changed": False}
    try:
        dumps = Dumps(module)
        lock = dumps.lock()  # noqa: F841 - held until this process ends
        if module.check_mode:
            state = "list"
        if state == "take":
            result = {"changed": True, "dump": dumps.take()}
        elif state == "restore":
            result = {"changed": True, "dump": dumps.restore()}
        elif state == "prune":
            pruned = dumps.prune()
            result = {"changed": bool(pruned), "pruned": pruned}
        result |= {"dumps": dumps.there(), "sizes": dumps.sizes()}
    except (DumpError, SqlError) as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error}; expected room and rights in {module.params['directory']}. Nothing was changed.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()

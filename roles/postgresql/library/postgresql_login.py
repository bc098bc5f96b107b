#!/usr/bin/python
"""Try logins as a client would, with their passwords over TCP, and see who is logged in."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_psql import Server, SqlError, literal

DOCUMENTATION = r"""
module: postgresql_login
short_description: Try which logins a PostgreSQL server takes and which it refuses
description:
  - Logs in over TCP; a password reaches psql by a file that only root may read, and for as long as that takes.
  - Never fails because of what it finds; it tells what is not as expected in RV(problem), without any password.
options:
  version: {description: Major version of the cluster., type: str, required: true}
  cluster: {description: Name of the cluster., type: str, default: main}
  database: {description: Name of the database., type: str, required: true}
  accepted:
    description: "Logins that must be taken: name and password. Those with C(state=absent) are left out."
    type: list
    elements: dict
    default: []
  refused:
    description: "Logins that must be refused: name and password."
    type: list
    elements: dict
    default: []
  unused:
    description: Names of logins that must have no session.
    type: list
    elements: str
    default: []
  timeout: {description: Seconds in which the sessions of O(unused) must have ended., type: int, default: 15}
author: [mlflow-kit]
"""
RETURN = r"""
problem:
  description: What is not as expected; empty when all is well.
  type: str
  returned: always
proved:
  description: What was tried, in words without secrets.
  type: list
  elements: str
  returned: always
"""
# A role that is gone is member of no group that pg_hba.conf names.
WRONG = ("password authentication failed", "no pg_hba.conf entry", "is not permitted to log in")
SESSIONS = """
SELECT coalesce(json_agg(format('%s from %s (%s)', usename, coalesce(client_addr::text, 'the host itself'),
  coalesce(nullif(application_name, ''), 'no name'))), '[]') FROM pg_stat_activity WHERE usename IN ({names});
"""


def complaint(server: Server, database: str, name: str, password: str) -> str:
    """What the server says to a login; nothing when it takes it. Raises SqlError when it does not run."""
    port = server.port()
    with tempfile.TemporaryDirectory(prefix="mlflow-kit-") as work:
        held = pathlib.Path(work) / "pgpass"
        escaped = password.replace("\\", "\\\\").replace(":", "\\:")
        with os.fdopen(os.open(held, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"*:*:*:*:{escaped}\n")
        done = subprocess.run(
            [server.psql, "-XAtqw", "-h", "127.0.0.1", "-p", port, "-U", name, "-d", database, "-c", "SELECT 1"],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PGCONNECT_TIMEOUT": "10", "PGPASSFILE": str(held)},
        )
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit {done.returncode}"


def look(server: Server, p: dict[str, object]) -> tuple[str, list[str]]:
    """The first thing that is not as expected, and what was as expected before. Raises SqlError."""
    database, proved = str(p["database"]), ["PostgreSQL answers"]
    server.sql("SELECT 1;")
    accepted, refused, unused = p["accepted"], p["refused"], p["unused"]
    assert isinstance(accepted, list) and isinstance(refused, list) and isinstance(unused, list)
    for login in accepted:
        if login.get("state", "present") == "absent":
            continue
        if said := complaint(server, database, login["name"], login["password"]):
            return f"PostgreSQL refuses the login {login['name']}: {said}", proved
        proved.append(f"PostgreSQL takes the login {login['name']}")
    end = time.monotonic() + int(str(p["timeout"]))
    while unused and (found := json.loads(server.sql(SESSIONS.format(names=", ".join(map(literal, unused)))))):
        if time.monotonic() > end:
            who = ", ".join(sorted(set(found)))
            return f"somebody still uses the old login: {who}. Next: give them the new one, and run this again", proved
        time.sleep(0.2)
    if unused:
        proved.append(f"nobody is logged in as {' or '.join(unused)}")
    for login in refused:
        said = complaint(server, database, login["name"], login["password"])
        if not any(words in said for words in WRONG):
            return f"PostgreSQL did not refuse the old login {login['name']}: {said or 'it was let in'}", proved
        proved.append(f"PostgreSQL refuses the old login {login['name']}")
    return "", proved


def main() -> None:
    """Entry point of the module."""
    login = {
        "name": {"type": "str", "required": True},
        "password": {"type": "str", "no_log": True},
        "state": {"type": "str", "default": "present"},
    }
    logins = {"type": "list", "elements": "dict", "default": [], "options": login}
    module = AnsibleModule(
        argument_spec={
            "version": {"type": "str", "required": True},
            "cluster": {"type": "str", "default": "main"},
            "database": {"type": "str", "required": True},
            "accepted": logins,
            "refused": logins,
            "unused": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "int", "default": 15},
        },
        supports_check_mode=True,
    )
    try:
        problem, proved = look(Server(module.params["version"], module.params["cluster"]), module.params)
    except SqlError as error:
        problem, proved = f"{error}. Next: systemctl start postgresql; see /var/log/postgresql.", []
    except FileNotFoundError as error:
        problem, proved = f"PostgreSQL is not installed here ({error.filename}). Next: run site.yml.", []
    module.exit_json(changed=False, problem=problem, proved=proved)


if __name__ == "__main__":
    main()

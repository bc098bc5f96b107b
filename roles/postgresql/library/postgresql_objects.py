#!/usr/bin/python
"""One database, the role that owns it, and the roles that log in to act as that owner."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import stringprep
import unicodedata
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_psql import Server, SqlError, identifier, literal

DOCUMENTATION = r"""
module: postgresql_objects
short_description: A PostgreSQL database with its owner and rotating login roles
description:
  - Looks at what is there, and changes only what differs; a password is compared with the stored SCRAM verifier.
  - Verifiers are computed here, so that the server never sees a password. All SQL goes through standard input.
  - Withdraws a login by ending its sessions and dropping it; what it owned goes to the owner.
options:
  version:
    description: Major version of the cluster.
    type: str
    required: true
  cluster:
    description: Name of the cluster.
    type: str
    default: main
  database:
    description: Name of the database.
    type: str
    required: true
  owner:
    description: Role that owns the database and everything in it, and that cannot log in.
    type: str
    required: true
  logins:
    description: Login roles.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the role.
        type: str
        required: true
      password:
        description: Its password.
        type: str
      state:
        description: Whether it may log in.
        type: str
        choices: [present, absent]
        default: present
  monitors:
    description:
      - Users of this machine that read the statistics, by peer and without a password. Those that this module made
        and that are not named here any more are dropped; without this option all stay as they are.
    type: list
    elements: str
author: [mlflow-kit]
"""
EXAMPLES = r"""
- postgresql_objects:
    version: "17"
    database: mlflow
    owner: mlflow_owner
    logins: [{name: mlflow_a, password: "{{ vault_password }}"}, {name: mlflow_b, state: absent}]
  no_log: true
"""
RETURN = r"""
changes:
  description: What was changed, or would be in a dry run, in words without secrets.
  type: list
  elements: str
  returned: success
"""

SCHEME = "SCRAM-SHA-256"
ITERATIONS = 4096
MARK, MONITOR_CONNECTIONS = "reads statistics for mlflow-kit", 5
PLAIN = "NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS"
STATE = """
SELECT json_build_object(
  'roles', (
    SELECT coalesce(json_object_agg(r.rolname, json_build_object(
      'login', r.rolcanlogin,
      'plain', NOT (r.rolsuper OR r.rolcreatedb OR r.rolcreaterole OR r.rolreplication OR r.rolbypassrls),
      'inherit', r.rolinherit,
      'unlimited', r.rolconnlimit = -1 AND coalesce(r.rolvaliduntil = 'infinity', true),
      'verifier', r.rolpassword,
      'settings', (SELECT to_json(setconfig) FROM pg_db_role_setting WHERE setrole = r.oid AND setdatabase = 0),
      'member', EXISTS (SELECT FROM pg_auth_members WHERE member = r.oid AND roleid = o.oid))), '{{}}')
    FROM pg_authid r LEFT JOIN pg_authid o ON o.rolname = {owner}
    WHERE r.rolname IN ({names})),
  'database', (
    SELECT json_build_object(
      'owner', pg_get_userbyid(datdba),
      'open', has_database_privilege('public', oid, 'CONNECT, TEMPORARY, CREATE'))
    FROM pg_database WHERE datname = {database}),
  'monitors', (
    SELECT coalesce(json_object_agg(r.rolname, json_build_object(
      'ours', coalesce(shobj_description(r.oid, 'pg_authid') = {mark}, false),
      'right', r.rolcanlogin AND r.rolinherit AND r.rolconnlimit = {limit} AND r.rolpassword IS NULL
        AND NOT (r.rolsuper OR r.rolcreatedb OR r.rolcreaterole OR r.rolreplication OR r.rolbypassrls)
        AND EXISTS (SELECT FROM pg_auth_members WHERE member = r.oid AND roleid = 'pg_monitor'::regrole))), '{{}}')
    FROM pg_authid r
    WHERE r.rolname IN ({monitors}) OR shobj_description(r.oid, 'pg_authid') = {mark}));
"""
INSIDE = """
SELECT json_build_object(
  'open', (SELECT has_schema_privilege('public', oid, 'CREATE, USAGE') FROM pg_namespace WHERE nspname = 'public'),
  'strays', (
    SELECT coalesce(json_agg(c.oid::regclass::text), '[]') FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
      AND pg_get_userbyid(c.relowner) <> {owner}
      AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = c.oid
                        AND deptype IN ('a', 'e', 'i') AND objsubid = 0)));
"""


def saslprep(password: str) -> str:
    """Normalize `password` as PostgreSQL and libpq do (RFC 4013); what the RFC refuses stays as it is."""
    if password.isascii():
        return password
    mapped = "".join(
        " " if stringprep.in_table_c12(c) else c for c in password if c == " " or not stringprep.in_table_b1(c)
    )
    text = unicodedata.normalize("NFKC", mapped)
    prohibited = (
        stringprep.in_table_c12,
        stringprep.in_table_c21_c22,
        stringprep.in_table_c3,
        stringprep.in_table_c4,
        stringprep.in_table_c5,
        stringprep.in_table_c6,
        stringprep.in_table_c7,
        stringprep.in_table_c8,
        stringprep.in_table_c9,
        stringprep.in_table_a1,
    )
    if not text or any(table(c) for c in text for table in prohibited):
        return password
    if any(map(stringprep.in_table_d1, text)):
        outer = stringprep.in_table_d1(text[0]) and stringprep.in_table_d1(text[-1])
        if any(map(stringprep.in_table_d2, text)) or not outer:
            return password
    return text


def verifier(password: str, salt: bytes, iterations: int = ITERATIONS) -> str:
    """The SCRAM-SHA-256 verifier (RFC 5802, RFC 7677) of `password`, in the form that pg_authid holds."""
    salted = hashlib.pbkdf2_hmac("sha256", saslprep(password).encode(), salt, iterations)
    client = hmac.digest(salted, b"Client Key", "sha256")
    stored, server = hashlib.sha256(client).digest(), hmac.digest(salted, b"Server Key", "sha256")
    salt64, stored64, server64 = (base64.b64encode(part).decode() for part in (salt, stored, server))
    return f"{SCHEME}${iterations}:{salt64}${stored64}:{server64}"


def fits(password: str, stored: str | None) -> bool:
    """Whether `stored`, a verifier from pg_authid, was made of `password`."""
    try:
        scheme, head, _keys = (stored or "").split("$")
        iterations, salt = head.split(":")
        again = verifier(password, base64.b64decode(salt), int(iterations))
    except ValueError:
        return False
    return scheme == SCHEME and hmac.compare_digest(again, stored or "")


class Plan:
    """What differs, as statements and as words.

    Args:
        params: the module's parameters.
        found: the answer to STATE.
        inside: the answer to INSIDE, empty when there is no such database.
    """

    def __init__(self, params: dict[str, Any], found: dict[str, Any], inside: dict[str, Any]) -> None:
        """Compare what is wanted with what was found."""
        self.owner, self.database = params["owner"], params["database"]
        self.roles: dict[str, Any] = found["roles"]
        self.words: list[str] = []
        self.before: list[str] = []
        self.create = found["database"] is None
        self.within: list[str] = []
        self.after: list[str] = []
        self._plan_owner()
        for login in params["logins"]:
            if login["state"] == "absent":
                self._plan_absent(login["name"])
            else:
                self._plan_present(login["name"], login["password"])
        if params["monitors"] is not None:
            self._plan_monitors(params["monitors"], found["monitors"])
        self._plan_database(found["database"] or {"owner": self.owner, "open": True}, inside)

    def _plan_owner(self) -> None:
        found, role = self.roles.get(self.owner), identifier(self.owner)
        if found is None:
            self.words.append(f"make the owner {self.owner}")
            self.before.append(f"CREATE ROLE {role} NOLOGIN {PLAIN};")
        elif found["login"] or not found["plain"] or found["verifier"]:
            self.words.append(f"take login and privileges from the owner {self.owner}")
            self.before.append(f"ALTER ROLE {role} NOLOGIN {PLAIN} PASSWORD NULL;")

    def _plan_present(self, name: str, password: str) -> None:
        found, role, owner = self.roles.get(name), identifier(name), identifier(self.owner)
        attributes = f"LOGIN INHERIT {PLAIN} CONNECTION LIMIT -1"
        secret = literal(verifier(password, os.urandom(16)))
        if found is None:
            self.words.append(f"make the login {name}")
            self.before.append(f"CREATE ROLE {role} {attributes} PASSWORD {secret};")
        else:
            if not (found["login"] and found["plain"] and found["inherit"] and found["unlimited"]):
                self.words.append(f"correct the attributes of {name}")
                self.before.append(f"ALTER ROLE {role} {attributes} VALID UNTIL 'infinity';")
            if not fits(password, found["verifier"]):
                self.words.append(f"change the password of {name}")
                self.before.append(f"ALTER ROLE {role} PASSWORD {secret};")
        if not (found and found["member"]):
            self.words.append(f"make {name} a member of {self.owner}")
            self.before.append(f"GRANT {owner} TO {role};")
        if not (found and f"role={self.owner}" in (found["settings"] or [])):
            self.words.append(f"let {name} act as {self.owner}")
            self.before.append(f"ALTER ROLE {role} SET role = {literal(self.owner)};")

    def _plan_absent(self, name: str) -> None:
        if name not in self.roles:
            return
        role, owner = identifier(name), identifier(self.owner)
        self.words.append(f"withdraw the login {name}")
        self.before.append(f"ALTER ROLE {role} NOLOGIN PASSWORD NULL;")
        self.within.append(f"REASSIGN OWNED BY {role} TO {owner}; DROP OWNED BY {role};")
        self.after.append(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = {literal(name)};")
        self.after.append(f"DROP ROLE {role};")

    def _plan_monitors(self, wanted: list[str], found: dict[str, Any]) -> None:
        attributes = f"LOGIN INHERIT {PLAIN} CONNECTION LIMIT {MONITOR_CONNECTIONS} PASSWORD NULL"
        for name in wanted:
            role = identifier(name)
            if found.get(name, {}).get("right") and found[name]["ours"]:
                continue
            self.words.append(f"let {name} read statistics")
            self.before.append(f"{'ALTER' if name in found else 'CREATE'} ROLE {role} {attributes};")
            self.before.append(f"GRANT pg_monitor TO {role}; COMMENT ON ROLE {role} IS {literal(MARK)};")
        for name in sorted(set(found) - set(wanted)):
            self.words.append(f"let {name} read no more statistics")
            self.after.append(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = {literal(name)};"
            )
            self.after.append(f"DROP ROLE {identifier(name)};")

    def _plan_database(self, found: dict[str, Any], inside: dict[str, Any]) -> None:
        database, owner = identifier(self.database), identifier(self.owner)
        if self.create:
            self.words.append(f"make the database {self.database}")
        elif found["owner"] != self.owner:
            self.words.append(f"give the database {self.database} to {self.owner}")
            self.before.append(f"ALTER DATABASE {database} OWNER TO {owner};")
        if self.create or found["open"] or inside.get("open"):
            self.words.append(f"close the database {self.database} to other roles")
            self.within.append(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC;")
            self.within.append("REVOKE ALL ON SCHEMA public FROM PUBLIC;")
        for stray in inside.get("strays", ()):
            self.words.append(f"give {stray} to {self.owner}")
            self.within.append(f"ALTER TABLE {stray} OWNER TO {owner};")

    def run(self, server: Server) -> None:
        """Carry the plan out, each part whole or not at all. Raises SqlError."""
        transaction = "BEGIN;\n{}\nCOMMIT;".format
        if self.before:
            server.sql(transaction("\n".join(self.before)))
        if self.create:
            encoding = "TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C.UTF-8'"
            server.sql(f"CREATE DATABASE {identifier(self.database)} OWNER {identifier(self.owner)} {encoding};")
        if self.within:
            server.sql(transaction("\n".join(self.within)), self.database)
        if self.after:
            server.sql(transaction("\n".join(self.after)))


def look(server: Server, params: dict[str, Any]) -> Plan:
    """Compare `params` with what `server` has. Raises SqlError."""
    names = {params["owner"], *(login["name"] for login in params["logins"])}
    owner, database = literal(params["owner"]), literal(params["database"])
    listed = ", ".join(map(literal, sorted(names)))
    monitors = ", ".join(map(literal, params["monitors"] or [""]))
    mark, limit = literal(MARK), MONITOR_CONNECTIONS
    state = STATE.format(owner=owner, database=database, names=listed, monitors=monitors, mark=mark, limit=limit)
    found = json.loads(server.sql(state))
    inside = json.loads(server.sql(INSIDE.format(owner=owner), params["database"])) if found["database"] else {}
    return Plan(params, found, inside)


def main() -> None:
    """Entry point of the module."""
    login = {
        "name": {"type": "str", "required": True},
        "password": {"type": "str", "no_log": True},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    }
    module = AnsibleModule(
        argument_spec={
            "version": {"type": "str", "required": True},
            "cluster": {"type": "str", "default": "main"},
            "database": {"type": "str", "required": True},
            "owner": {"type": "str", "required": True},
            "logins": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": login,
                "required_if": [("state", "present", ["password"])],
            },
            "monitors": {"type": "list", "elements": "str"},
        },
        supports_check_mode=True,
    )
    params = module.params
    names = [params["owner"], *(one["name"] for one in params["logins"])]
    if len(set(names)) != len(names):
        module.fail_json(msg="the owner and the logins must all have different names")
    if any(one["state"] == "present" and not one["password"] for one in params["logins"]):
        module.fail_json(msg="a login needs a password")
    try:
        server = Server(params["version"], params["cluster"])
        plan = look(server, params)
        if plan.words and not module.check_mode:
            plan.run(server)
    except SqlError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(plan.words), changes=plan.words)


if __name__ == "__main__":
    main()

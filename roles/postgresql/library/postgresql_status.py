#!/usr/bin/python
"""How a cluster of the distribution's PostgreSQL is: one question, no change."""

from __future__ import annotations

import json

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_psql import Server, SqlError, literal

DOCUMENTATION = r"""
module: postgresql_status
short_description: How PostgreSQL is
options:
  version: {description: Major version of the cluster., type: str, required: true}
  cluster: {description: Name of the cluster., type: str, default: main}
  database: {description: The database that is looked at., type: str, required: true}
author: [mlflow-kit]
"""
RETURN = r"""
status:
  description: >-
    C(up); C(why) not; C(version); C(bytes) of the database; C(connections), how many of them are C(active),
    C(waiting) for a lock and C(max); C(logins) with connections each; C(pending) settings that wait for a restart;
    C(archive_failed), WAL segments that could not be archived since the last that could; C(replicas).
  type: dict
  returned: success
"""
QUESTION = """
SELECT json_build_object(
  'up', true,
  'version', current_setting('server_version'),
  'bytes', (SELECT pg_database_size(oid) FROM pg_database WHERE datname = {database}),
  'connections', (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
  'active', (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND state = 'active'),
  'waiting', (SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'),
  'max', current_setting('max_connections')::int,
  'logins', (SELECT coalesce(json_object_agg(usename, n), '{{}}') FROM (
     SELECT usename, count(*) AS n FROM pg_stat_activity
     WHERE datname = {database} AND usename IS NOT NULL GROUP BY usename) AS each),
  'pending', (SELECT coalesce(json_agg(name ORDER BY name), '[]') FROM pg_settings WHERE pending_restart),
  'archive_failed', (SELECT CASE WHEN last_failed_time > coalesce(last_archived_time, '-infinity')
     THEN failed_count ELSE 0 END FROM pg_stat_archiver),
  'replicas', (SELECT count(*) FROM pg_stat_replication));
"""


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "version": {"type": "str", "required": True},
            "cluster": {"type": "str", "default": "main"},
            "database": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    try:
        status = json.loads(Server(p["version"], p["cluster"]).sql(QUESTION.format(database=literal(p["database"]))))
    except (SqlError, OSError) as error:
        status = {"up": False, "why": str(error)}
    module.exit_json(changed=False, status=status)


if __name__ == "__main__":
    main()

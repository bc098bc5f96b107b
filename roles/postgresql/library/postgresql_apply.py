#!/usr/bin/python
"""Make the running PostgreSQL follow its files: a reload, and a restart only where a parameter asks for one."""

from __future__ import annotations

import json
import subprocess
import time

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_psql import Server, SqlError

DOCUMENTATION = r"""
module: postgresql_apply
short_description: Reload PostgreSQL, or restart it for a parameter that needs it
description:
  - Refuses files with errors while the server runs on with what it has.
  - Reloads, asks the server which parameters wait for a restart, and restarts only if there are any.
options:
  version:
    description: Major version of the cluster.
    type: str
    required: true
  cluster:
    description: Name of the cluster.
    type: str
    default: main
  timeout:
    description: Seconds to wait until the server answers after a restart.
    type: int
    default: 60
author: [mlflow-kit]
"""
EXAMPLES = r"""
- postgresql_apply: {version: "17"}
"""
RETURN = r"""
restarted_for:
  description: Parameters that the server restarted for; empty after a mere reload.
  type: list
  elements: str
  returned: success
"""

ERRORS = """
SELECT coalesce(json_agg(e), '[]') FROM (
  SELECT format('%s:%s: %s: %s', sourcefile, sourceline, name, error) AS e FROM pg_file_settings
   WHERE error IS NOT NULL AND error <> 'setting could not be applied'
  UNION ALL SELECT format('pg_hba line %s: %s', line_number, error) FROM pg_hba_file_rules WHERE error IS NOT NULL
) AS found;
"""
PENDING = "SELECT coalesce(json_agg(name ORDER BY name), '[]') FROM pg_settings WHERE pending_restart;"


def reload(server: Server, seconds: float = 10) -> list[str]:
    """Reload `server` and return the names of the parameters that wait for a restart. Raises SqlError."""
    loaded = "SELECT pg_conf_load_time();"
    before = server.sql(loaded)
    server.sql("SELECT pg_reload_conf();")
    end = time.monotonic() + seconds
    # The postmaster reloads when the signal reaches it, and only sessions that begin later tell of it.
    while server.sql(loaded) == before:
        if time.monotonic() > end:
            raise SqlError(f"the server did not reload within {seconds:g} s")
        time.sleep(0.05)
    pending: list[str] = json.loads(server.sql(PENDING))
    return pending


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "version": {"type": "str", "required": True},
            "cluster": {"type": "str", "default": "main"},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=True, restarted_for=[])
    try:
        server = Server(module.params["version"], module.params["cluster"])
        server.wait(module.params["timeout"])
        if errors := json.loads(server.sql(ERRORS)):
            module.fail_json(
                msg="PostgreSQL's files have errors, and it runs on with what it had: " + "; ".join(errors)
            )
        pending = reload(server)
        if pending:
            subprocess.run(["systemctl", "restart", server.unit], check=True, capture_output=True, text=True)
            server.wait(module.params["timeout"])
            if left := json.loads(server.sql(PENDING)):
                module.fail_json(msg=f"the restart did not apply {', '.join(left)}")
    except SqlError as error:
        module.fail_json(msg=f"{error}. See /var/log/postgresql.")
    except subprocess.CalledProcessError as error:
        module.fail_json(msg=f"{' '.join(error.cmd)}: {error.stderr.strip()}")
    module.exit_json(changed=True, restarted_for=pending)


if __name__ == "__main__":
    main()

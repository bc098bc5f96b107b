#!/usr/bin/python
"""Ask each instance of the MLflow server on this host whether it serves."""

from __future__ import annotations

import http.client

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: mlflow_alive
short_description: See that every instance of the MLflow server answers
description:
  - Fails with the instances that do not answer 200 at C(/health), and changes nothing.
options:
  address: {description: Address that the instances listen on., type: str, required: true}
  ports: {description: Their ports., type: list, elements: int, required: true}
author: [mlflow-kit]
"""


def complaint(address: str, port: int) -> str:
    """What is wrong with the instance on `port`; nothing when it serves."""
    connection = http.client.HTTPConnection({"0.0.0.0": "127.0.0.1"}.get(address, address), port, timeout=10)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"port {port}: {error}"
    finally:
        connection.close()
    return "" if status == 200 else f"port {port}: status {status}"


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "address": {"type": "str", "required": True},
            "ports": {"type": "list", "elements": "int", "required": True},
        },
        supports_check_mode=True,
    )
    ports = module.params["ports"]
    found = [words for port in ports if (words := complaint(module.params["address"], port))]
    if found:
        module.fail_json(
            msg=f"{len(found)} of {len(ports)} MLflow instances do not serve ({'; '.join(found)})."
            " Next: systemctl status 'mlflow*@*'; journalctl -u 'mlflow*@*' -n 50."
        )
    module.exit_json(changed=False)


if __name__ == "__main__":
    main()

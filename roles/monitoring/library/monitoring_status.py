#!/usr/bin/python
"""What Prometheus on this host has to say: alerts that are raised, targets that it does not reach; no change."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: monitoring_status
short_description: Alerts that are raised
options:
  port: {description: Port of Prometheus on loopback., type: int, required: true}
author: [mlflow-kit]
"""
RETURN = r"""
status:
  description: >-
    C(up), whether Prometheus answers, and C(why) not; C(alerts) that fire, each with C(name), C(severity), C(since) in
    ISO 8601 and C(summary); C(rules), how many there are; C(targets) and C(reached), how many it asks and hears.
  type: dict
  returned: success
"""


def ask(port: int, path: str) -> Any:
    """The data of an answer of Prometheus' API. Raises OSError or ValueError."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=10) as answer:
        return json.load(answer)["data"]


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(argument_spec={"port": {"type": "int", "required": True}}, supports_check_mode=True)
    port = module.params["port"]
    status: dict[str, Any] = {"up": True, "why": "", "alerts": [], "rules": 0, "targets": 0, "reached": 0}
    try:
        for group in ask(port, "rules?type=alert")["groups"]:
            for rule in group["rules"]:
                status["rules"] += 1
                status["alerts"] += [
                    {
                        "name": rule["name"],
                        "severity": rule["labels"].get("severity", ""),
                        "since": alert["activeAt"],
                        "summary": alert["annotations"].get("summary", ""),
                    }
                    for alert in rule["alerts"]
                    if alert["state"] == "firing"
                ]
        for one in ask(port, "query?query=up")["result"]:
            status["targets"] += 1
            status["reached"] += int(one["value"][1] == "1")
    except (OSError, ValueError, KeyError) as error:
        status |= {"up": False, "why": f"Prometheus does not answer on port {port}: {error}"}
    module.exit_json(changed=False, status=status)


if __name__ == "__main__":
    main()

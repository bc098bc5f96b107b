#!/usr/bin/python
"""How the gateway is: NGINX, its certificate, its servers; no change."""

from __future__ import annotations

import datetime
import pathlib
import re
import socket
import ssl

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: gateway_status
short_description: How the gateway is
options:
  port: {description: Port that clients come to., type: int, required: true}
  name: {description: Name that clients know., type: str, required: true}
  tls: {description: Whether it speaks TLS., type: bool, required: true}
  upstreams: {description: File that lists the servers behind., type: path, required: true}
author: [mlflow-kit]
"""
RETURN = r"""
status:
  description: >-
    C(up), whether it answers; C(why) not; C(certificate_days) that what it really serves stays valid (negative:
    expired; null without TLS); C(issuer); C(servers) behind; those of them that are taken C(out); C(version).
  type: dict
  returned: success
"""


def certificate(module: AnsibleModule, name: str, port: int) -> tuple[float, str]:
    """Days that the certificate which is served stays valid, and who has issued it. Raises OSError."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection(("127.0.0.1", port), timeout=10)
    with plain, context.wrap_socket(plain, server_hostname=name) as secure:
        der = secure.getpeercert(binary_form=True) or b""
    argv = ["openssl", "x509", "-inform", "DER", "-noout", "-enddate", "-issuer", "-nameopt", "RFC2253"]
    out = module.run_command(argv, data=der, binary_data=True, check_rc=True)[1]
    ends = re.search(r"^notAfter=(.+)$", out, re.MULTILINE)
    issuer = re.search(r"^issuer=(.*)$", out, re.MULTILINE)
    if not ends:
        raise OSError(f"openssl says: {out}")
    left = datetime.datetime.strptime(ends[1], "%b %d %H:%M:%S %Y %Z") - datetime.datetime.utcnow()
    return round(left.total_seconds() / 86400, 1), issuer[1].strip() if issuer else ""


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "port": {"type": "int", "required": True},
            "name": {"type": "str", "required": True},
            "tls": {"type": "bool", "required": True},
            "upstreams": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    status: dict[str, object] = {"up": True, "why": "", "certificate_days": None, "issuer": ""}
    try:
        if p["tls"]:
            status["certificate_days"], status["issuer"] = certificate(module, p["name"], p["port"])
        else:
            socket.create_connection(("127.0.0.1", p["port"]), timeout=10).close()
    except OSError as error:
        status |= {"up": False, "why": f"port {p['port']}: {error}"}
    file = pathlib.Path(p["upstreams"])
    lines = re.findall(r"^ *server (\S+) (.*); # mlflow\w*$", file.read_text() if file.exists() else "", re.MULTILINE)
    status["servers"] = [server for server, _ in lines]
    status["out"] = [server for server, options in lines if " down" in f" {options}"]
    status["version"] = module.run_command(["nginx", "-v"])[2].strip().rpartition("/")[2]
    module.exit_json(changed=False, status=status)


if __name__ == "__main__":
    main()

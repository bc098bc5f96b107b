#!/usr/bin/python
"""Ask the gateway on its own host with passwords and tokens, and look at the certificate that it shows."""

from __future__ import annotations

import base64
import datetime
import http.client
import socket
import ssl
import time
import typing

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: gateway_try
short_description: Try which credentials the gateway takes and which it refuses
description:
  - Asks over loopback, as a client would. Nothing is sent but by the connection itself.
  - Never fails because of what it finds; it tells what is not as expected in RV(problem), without any secret.
options:
  port: {description: Port of the gateway., type: int, required: true}
  name: {description: Its public name., type: str, required: true}
  tls: {description: Whether it speaks TLS., type: bool, required: true}
  certificate: {description: "Certificate (PEM, the first of a chain) that it must show; empty for any.", type: str}
  accepted: {description: "Users (name, password) and tokens (name, token) that open.", type: list, elements: dict}
  refused: {description: The same for those that must not., type: list, elements: dict}
  timeout: {description: Seconds in which all must be so., type: int, default: 20}
author: [mlflow-kit]
"""
UNAUTHORIZED, FORBIDDEN, MANY, ERROR = 401, 403, 429, 500


def words(one: dict[str, str]) -> str:
    """How a credential is named."""
    return f"the token {one['name']}" if one.get("token") else f"the password of {one['name']}"


def header(one: dict[str, str]) -> str:
    """The Authorization header of a user or token."""
    if one.get("token"):
        return f"Bearer {one['token']}"
    return "Basic " + base64.b64encode(f"{one['name']}:{one['password']}".encode()).decode()


class Gateway:
    """Where it is asked."""

    def __init__(self, port: int, name: str, tls: bool) -> None:
        """Remember port and name; the certificate is looked at, not judged."""
        self.port, self.name, self.tls = port, name, tls
        self.context = ssl.create_default_context()
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE

    def certificate(self) -> bytes:
        """The certificate that it shows (DER). Raises OSError."""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
            self.context.wrap_socket(plain, server_hostname=self.name) as secure,
        ):
            return secure.getpeercert(binary_form=True) or b""

    def status(self, authorization: str) -> int:
        """What it answers to a request for /version. Raises OSError."""
        connection: http.client.HTTPConnection
        if self.tls:
            raw = self.context.wrap_socket(
                socket.create_connection(("127.0.0.1", self.port), timeout=20), server_hostname=self.name
            )
            connection = http.client.HTTPConnection(self.name, self.port)
            connection.sock = raw
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            headers = {"Authorization": authorization} if authorization else {}
            connection.request("GET", "/version", headers={"Host": self.name, **headers})
            return connection.getresponse().status
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error
        finally:
            connection.close()


def expiry(der: bytes) -> datetime.datetime:
    """When the certificate `der` ends: the second time in it (RFC 5280), which the standard library does not tell."""
    for tag, form, digits in ((0x17, "%y%m%d%H%M%SZ", 13), (0x18, "%Y%m%d%H%M%SZ", 15)):
        at = -1
        for _ in range(2):
            at = der.find(bytes([tag, digits]), at + 1)
        if at > 0:
            text = der[at + 2 : at + 2 + digits].decode(errors="replace")
            return datetime.datetime.strptime(text, form).replace(tzinfo=datetime.UTC)
    return datetime.datetime.max.replace(tzinfo=datetime.UTC)


def look(gateway: Gateway, p: dict[str, typing.Any], proved: list[str]) -> str:
    """The first thing that is not as expected; what was is added to `proved`. Raises OSError."""
    if gateway.tls:
        shown = gateway.certificate()
        end = expiry(shown)
        if end < datetime.datetime.now(datetime.UTC):
            return f"the gateway's certificate ended on {end:%Y-%m-%d %H:%M} UTC: rotate tls, or renew it, first of all"
        if p["certificate"] and shown != ssl.PEM_cert_to_DER_cert(p["certificate"].split("-----END")[0] + FOOT):
            return "the gateway shows another certificate than the one that it was given"
        which = "the certificate that it was given" if p["certificate"] else "a certificate"
        proved.append(f"the gateway shows {which}, valid until {end:%Y-%m-%d}")
    for one in p["accepted"]:
        status = gateway.status(header(one))
        if status in (UNAUTHORIZED, FORBIDDEN, MANY) or status >= ERROR:
            return f"the gateway answered {status} to {words(one)}, expected 200"
        proved.append(f"the gateway takes {words(one)}")
    for one in p["refused"]:
        status = gateway.status(header(one))
        if status != UNAUTHORIZED:
            return f"the gateway answered {status} to {words(one)} that was withdrawn, expected 401"
        proved.append(f"the gateway refuses {words(one)} that was withdrawn")
    return ""


FOOT = "-----END CERTIFICATE-----\n"


def main() -> None:
    """Entry point of the module."""
    one = {
        "name": {"type": "str", "required": True},
        "password": {"type": "str", "no_log": True},
        "token": {"type": "str", "no_log": True},
    }
    some = {"type": "list", "elements": "dict", "default": [], "options": one}
    module = AnsibleModule(
        argument_spec={
            "port": {"type": "int", "required": True},
            "name": {"type": "str", "required": True},
            "tls": {"type": "bool", "required": True},
            "certificate": {"type": "str", "default": ""},
            "accepted": some,
            "refused": some,
            "timeout": {"type": "int", "default": 20},
        },
        supports_check_mode=True,
    )
    p = module.params
    gateway, end = Gateway(p["port"], p["name"], p["tls"]), time.monotonic() + p["timeout"]
    while True:
        proved: list[str] = []
        try:
            problem = look(gateway, p, proved)
        except OSError as error:
            problem = f"the gateway does not answer on port {p['port']}: {error}"
        if not problem or time.monotonic() > end:
            break
        time.sleep(0.5)
    module.exit_json(changed=False, problem=problem, proved=sorted(set(proved), key=proved.index))


if __name__ == "__main__":
    main()

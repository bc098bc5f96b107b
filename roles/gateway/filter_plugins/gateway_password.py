"""Hashes of the gateway's passwords, made on the controller."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any


def gateway_ssha(password: str, user: str, salt: str) -> str:
    """Return `password` as a salted hash that NGINX checks in microseconds (`{SSHA}`).

    NGINX checks it at every request: a slow hash would cost a third of the machine, and generated passwords of 40
    random characters need none. The salt of a user follows from the site's `salt` and the name, so that the same
    input always gives the same line. Raises ValueError when there is no salt.
    """
    if not salt:
        raise ValueError("gateway_users_salt is empty; expected a random string")
    own = hashlib.sha256(f"{salt}\0{user}".encode()).digest()[:16]
    return "{SSHA}" + base64.b64encode(hashlib.sha1(password.encode() + own).digest() + own).decode()


class FilterModule:
    """The filters of the role."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name to function."""
        return {"gateway_ssha": gateway_ssha}

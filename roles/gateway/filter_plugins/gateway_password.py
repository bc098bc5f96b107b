"""Hashes of the gateway's credentials, made on the controller."""

from __future__ import annotations

import base64
import ctypes
import ctypes.util
import hashlib
from collections.abc import Callable
from typing import Any

ALPHABET = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def gateway_crypt(password: str, user: str, salt: str) -> str:
    """Return `password` as a sha512-crypt hash, the strong one that NGINX and every Debian know.

    The salt of a user follows from the site's `salt` and the name, so that the same input always gives the same
    line; a salt need not be secret. Raises ValueError when there is no salt or the C library has no such hash.
    """
    if not salt:
        raise ValueError("gateway_salt is empty; expected a random string")
    own = "".join(ALPHABET[byte % 64] for byte in hashlib.sha256(f"{salt}\0{user}".encode()).digest()[:16])
    library = ctypes.CDLL(ctypes.util.find_library("crypt") or "libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    made = library.crypt(password.encode(), f"$6$rounds=10000${own}".encode())
    if not made or not made.startswith(b"$6$"):
        raise ValueError("the C library of this machine does not make sha512-crypt hashes")
    return str(made.decode())


def gateway_user_lines(users: list[dict[str, str]], salt: str) -> list[str]:
    """Return a line of a users' file for each of `users` (name and password)."""
    return [f"{user['name']}:{gateway_crypt(user['password'], user['name'], salt)}" for user in users]


def gateway_token(token: str) -> str:
    """Return what the gateway compares a bearer token by: the SHA-256 of its header, in hexadecimal.

    A token is long and random, so it needs no slow hash.
    """
    return hashlib.sha256(f"Bearer {token}".encode()).hexdigest()


def gateway_generation(text: str) -> str:
    """Return a short fingerprint of `text`, which says nothing of it."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest())[:16].decode().lower()


class FilterModule:
    """The filters of the role."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name to function."""
        return {
            "gateway_crypt": gateway_crypt,
            "gateway_generation": gateway_generation,
            "gateway_token": gateway_token,
            "gateway_user_lines": gateway_user_lines,
        }

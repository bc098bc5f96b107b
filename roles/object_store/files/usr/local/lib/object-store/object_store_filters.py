"""Filters of Swift's proxy: what current S3 clients need, and nothing but signed S3."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

Environ = dict[str, Any]
App = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]
DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>AccessDenied</Code><Message>Only signed S3 requests are answered here.</Message></Error>"
)


class DeleteMD5:
    """Fill in the Content-MD5 that Swift 2.30 wants of DeleteObjects and that boto3 >= 1.36 no longer sends."""

    def __init__(self, app: App, max_body: int = 2 * 1024 * 1024) -> None:
        """Wrap `app`; bodies above `max_body` bytes (S3's own limit is 1000 keys) are passed as they are."""
        self.app, self.max_body = app, max_body

    def __call__(self, env: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Handle one request."""
        if env["REQUEST_METHOD"] == "POST" and "HTTP_CONTENT_MD5" not in env:
            length = env.get("CONTENT_LENGTH") or ""
            size = int(length) if length.isdigit() else 0
            if 0 < size <= self.max_body and "delete" in parse_qs(env.get("QUERY_STRING", ""), keep_blank_values=True):
                body = env["wsgi.input"].read(size)
                env["wsgi.input"] = io.BytesIO(body)
                env["HTTP_CONTENT_MD5"] = base64.b64encode(hashlib.md5(body).digest()).decode()
        return self.app(env, start_response)


class SignedOnly:
    """Answer 403 to all that s3api did not take for a signed S3 request.

    Behind s3api stands Swift's own API, whose tokens would outlive a withdrawn key. s3api marks its requests in the
    environment, where no header of a client can reach, and so do filters the questions that they ask on their own.
    """

    INNER = ("s3api.auth_details", "swift.authorize_override")

    def __init__(self, app: App) -> None:
        """Wrap `app`."""
        self.app = app

    def __call__(self, env: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Handle one request."""
        if any(env.get(mark) for mark in self.INNER):
            return self.app(env, start_response)
        start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(DENIED)))])
        return [b"" if env["REQUEST_METHOD"] == "HEAD" else DENIED]


class LiveKeys:
    """Swift's tempauth with the keys of a file that is looked at before each request.

    A reload for a key would close every connection that stands idle, a gateway's too, and with it what was just sent
    on one. This way a key counts from the next request on, for connections that are open as well.
    """

    def __init__(self, auth: Any, path: str, prefix: str = "AUTH_") -> None:
        """Wrap `auth`, a TempAuth; `path` is JSON of access keys and their secrets. Raises when it cannot be read."""
        self.auth, self.path, self.prefix = auth, pathlib.Path(path), prefix
        self.seen = self.stamp()
        self.read()

    def stamp(self) -> tuple[int, int, int]:
        """What differs once the file was replaced."""
        found = self.path.stat()
        return found.st_mtime_ns, found.st_ino, found.st_size

    def read(self) -> None:
        """Take the file's keys instead of those known so far."""
        users = {}
        for name, secret in json.loads(self.path.read_text()).items():
            url = f"$HOST/v1/{self.prefix}{name.partition(':')[0]}"
            users[name] = {"key": str(secret), "url": url, "groups": [".admin"]}
        self.auth.users = users

    def __call__(self, env: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Handle one request."""
        try:
            stamp = self.stamp()
            if stamp != self.seen:
                self.seen = stamp
                self.read()
        except (OSError, ValueError, AttributeError) as error:
            # The keys known so far go on: who changes them tries them, and is told.
            self.auth.logger.error("%s cannot be read: %s", self.path, error)
        return self.auth(env, start_response)  # type: ignore[no-any-return]


def delete_md5(_: dict[str, str], **__: str) -> type[DeleteMD5]:
    """Give paste the filter DeleteMD5."""
    return DeleteMD5


def signed_only(_: dict[str, str], **__: str) -> type[SignedOnly]:
    """Give paste the filter SignedOnly."""
    return SignedOnly


def live_keys(common: dict[str, str], keys: str, **own: str) -> Callable[[App], LiveKeys]:
    """Give paste the filter LiveKeys around Swift's own tempauth."""
    from swift.common.middleware import tempauth  # noqa: PLC0415 - the tests of the other filters have no Swift

    make = tempauth.filter_factory(common, **own)
    return lambda app: LiveKeys(make(app), keys)

"""An upstream that answers with what reached it, and counts and hashes what is sent to it."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Mirror(BaseHTTPRequestHandler):
    """Answer every request with its own description as JSON."""

    protocol_version = "HTTP/1.1"

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for n in range(4):
            line = f"data {n}\n".encode()
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            self.wfile.flush()
            time.sleep(0.5)
        self.wfile.write(b"0\r\n\r\n")

    def do_GET(self) -> None:
        """Read the body as it comes and describe the request."""
        if self.path == "/stream":
            self._stream()
            return
        began = time.monotonic()
        digest, size = hashlib.sha256(), 0
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            chunk = self.rfile.read(min(left, 1 << 20))
            digest.update(chunk)
            size += len(chunk)
            left -= len(chunk)
        port = self.server.server_address[1]
        # In small letters, as HTTP/2 sends them, and each as often as it came: whoever looks for one finds it.
        headers: dict[str, list[str]] = {}
        for name, value in self.headers.items():
            headers.setdefault(name.lower(), []).append(value)
        told = {"port": port, "path": self.path, "headers": {k: ", ".join(v) for k, v in headers.items()}, "size": size}
        told["waited"] = time.monotonic() - began
        body = json.dumps(told | {"sha256": digest.hexdigest()}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Mirror).serve_forever()

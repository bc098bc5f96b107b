"""Listen on the given ports, IPv4 and IPv6, and send every client a numbered line five times a second."""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
import time


class Lines(socketserver.BaseRequestHandler):
    """A download that never ends."""

    def handle(self) -> None:
        """Send lines until the client has gone."""
        number = 0
        while True:
            self.request.sendall(f"{number}\n".encode())
            number += 1
            time.sleep(0.2)


class Server(socketserver.ThreadingTCPServer):
    """Both families on one socket."""

    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True


for port in sys.argv[1:]:
    threading.Thread(target=Server(("::", int(port)), Lines).serve_forever).start()

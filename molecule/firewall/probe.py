"""Ask another host: `connect HOST PORT...` prints those that answer, `ping HOST`, `download HOST PORT`."""

from __future__ import annotations

import pathlib
import socket
import sys
from collections.abc import Callable

PATIENCE = 2.0  # seconds
STALL = 8.0  # seconds without a line that a download takes for the end


def connect(host: str, *ports: str) -> None:
    """Print each of `ports` that a connection to `host` can be made to, and that sends something."""
    for port in ports:
        try:
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as to:
                if to.recv(1):
                    print(port)
        except OSError:
            pass


def ping(host: str) -> None:
    """Print `pong` when `host` echoes."""
    family, protocol, kind = socket.AF_INET, socket.IPPROTO_ICMP, 8
    if ":" in host:
        family, protocol, kind = socket.AF_INET6, socket.IPPROTO_ICMPV6, 128
    # Echo request, code 0, checksum and identifier filled in by the kernel, sequence 1.
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as to:
        to.settimeout(PATIENCE)
        to.sendto(bytes([kind, 0, 0, 0, 0, 0, 0, 1]) + b"kit", (host, 0))
        if to.recv(100).endswith(b"kit"):
            print("pong")


def download(host: str, port: str) -> None:
    """Write the number of the last line that arrived to /run/kit-download; fail when a line is missing or late."""
    with socket.create_connection((host, int(port)), timeout=STALL) as to, to.makefile() as lines:
        for expected, line in enumerate(lines):
            if int(line) != expected:
                sys.exit(f"line {line} came instead of {expected}")
            pathlib.Path("/run/kit-download").write_text(line)
    sys.exit("the download ended")


verbs: dict[str, Callable[..., None]] = {"connect": connect, "ping": ping, "download": download}
verbs[sys.argv[1]](*sys.argv[2:])

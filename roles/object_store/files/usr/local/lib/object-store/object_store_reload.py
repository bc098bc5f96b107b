"""Reload a Swift server without a refused connection, and return when the old sockets are gone.

Usage: object_store_reload.py CONFIGURATION MAIN_PID. The new configuration is loaded first, and a faulty one never
reaches the running server. Debian 13 has swift-reload for this; Debian 12 has not.
"""

from __future__ import annotations

import configparser
import os
import pathlib
import signal
import sys
import time

LISTEN = "0A"
TIMEOUT = 60.0


def listening(port: int) -> set[str]:
    """Return the inodes of the sockets that listen on TCP `port`."""
    found = set()
    for name in ("tcp", "tcp6"):
        table = pathlib.Path("/proc/net") / name
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == LISTEN and int(fields[1].rsplit(":", 1)[1], 16) == port:
                found.add(fields[9])
    return found


def main() -> None:
    """Check, signal, wait. Exits with a message when the configuration is faulty or the reload takes 60 s."""
    conf, pid = sys.argv[1], int(sys.argv[2])
    from swift.common.wsgi import loadapp  # noqa: PLC0415 - slow, and its own errors are worth a message

    try:
        loadapp(conf, global_conf={"log_name": "swift-reload"})
    except Exception as error:
        sys.exit(f"{conf} is faulty, the server goes on with the old one: {error}")
    parser = configparser.RawConfigParser(strict=False)
    parser.read(conf)
    port = parser.getint("DEFAULT", "bind_port")
    before = listening(port)
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        now = listening(port)
        if now and not now & before:
            os._exit(0)  # eventlet's hub has nothing left to do
        time.sleep(0.05)
    sys.exit(f"the server {pid} did not take the new configuration within {TIMEOUT:.0f} s")


if __name__ == "__main__":
    main()

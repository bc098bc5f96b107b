"""The distribution's Chromium, headless, as a user's machine that trusts the site's authority."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import os
import pathlib
import re
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Response, sync_playwright

EXECUTABLE = pathlib.Path("/usr/bin/chromium")
# What the browser itself says of a page that the server's headers or its own policies hinder.
HINDERED = re.compile(r"CORS|Cross-Origin|Content Security Policy|Mixed Content|Refused to|Permissions policy", re.I)
# Each page counts what its scripts wait for by itself: on a busy machine the developer tools lose such events.
COUNTED = """
(() => {
  const asked = window.kitAsked = new Set();
  const until = (address, begin) => {
    const one = { address };
    asked.add(one);
    return begin(() => asked.delete(one));
  };
  const { fetch } = window;
  window.fetch = (...given) =>
    until(String(given[0]?.url ?? given[0]), (end) => fetch.apply(window, given).finally(end));
  const { open, send } = XMLHttpRequest.prototype;
  XMLHttpRequest.prototype.open = function (...given) {
    this.kitAddress = String(given[1]);
    return open.apply(this, given);
  };
  XMLHttpRequest.prototype.send = function (...given) {
    return until(this.kitAddress, (end) => {
      this.addEventListener('loadend', end);
      return send.apply(this, given);
    });
  };
})();
"""


@dataclasses.dataclass
class Watch:
    """What went wrong in a browser's windows, as the developer tools would show it.

    Attributes:
        answers: status and address of each answer of 400 and above.
        failures: address and reason of each request without an answer, but those that the page itself gave up.
        console: errors and warnings of the console that speak of CORS, CSP and their kind.
        exceptions: exceptions that no script caught.
        hosts: all hosts that a request went to.
    """

    answers: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    console: list[str] = dataclasses.field(default_factory=list)
    exceptions: list[str] = dataclasses.field(default_factory=list)
    hosts: set[str] = dataclasses.field(default_factory=set)

    def over(self, context: BrowserContext) -> None:
        """Begin to listen to all windows of `context`."""
        context.add_init_script(COUNTED)
        context.on("request", self._request)
        context.on("response", self._response)
        context.on("requestfailed", self._failure)
        context.on("console", self._message)
        context.on("weberror", lambda error: self.exceptions.append(str(error.error)))

    @staticmethod
    def rest(page: Page, seconds: float = 30) -> None:
        """Wait until the scripts of `page` have all that they asked for, and nothing more to do at once.

        Raises:
            TimeoutError: they have not after `seconds`.
        """
        end = time.monotonic() + seconds
        calm = 0
        while calm < 2:
            page.wait_for_timeout(50)
            # A page that has nothing to draw may never be told that it is idle.
            page.evaluate("() => new Promise(done => requestIdleCallback(done, { timeout: 500 }))")
            pending = page.evaluate("() => [...window.kitAsked].map(one => one.address)")
            if pending and time.monotonic() > end:
                raise TimeoutError(f"without an answer after {seconds} s: {pending}")
            # What an answer lets a script ask next is asked within that time.
            calm = 0 if pending else calm + 1

    def _request(self, request: Request) -> None:
        if request.url.startswith(("http:", "https:", "ws:", "wss:")):
            self.hosts.add(request.url.split("/")[2])

    def _response(self, response: Response) -> None:
        if response.status >= 400:
            self.answers.append(f"{response.status} {response.request.method} {response.url}")

    def _failure(self, request: Request) -> None:
        # A page that is left gives up what it still waits for; a saved file ends the navigation to it.
        if request.failure != "net::ERR_ABORTED":
            self.failures.append(f"{request.failure} {request.method} {request.url}")

    def _message(self, message: ConsoleMessage) -> None:
        if HINDERED.search(message.text):
            self.console.append(f"{message.type}: {message.text}")


def _trust(home: pathlib.Path, certificates: Sequence[pathlib.Path]) -> None:
    """Put `certificates` among those that a browser with this home folder trusts for servers."""
    store = home / ".pki" / "nssdb"
    store.mkdir(parents=True)
    database = ["certutil", "-d", f"sql:{store}"]
    subprocess.run([*database, "-N", "--empty-password"], check=True)
    for index, path in enumerate(certificates):
        subprocess.run([*database, "-A", "-n", f"site-{index}", "-t", "CP,,", "-i", str(path)], check=True)


@contextlib.contextmanager
def chromium(trusted: Sequence[pathlib.Path] = (), here: Sequence[str] = ()) -> Iterator[Browser]:
    """Start Chromium with a home of its own, and without a sandbox, since tests run as root too.

    Parameters:
        trusted: PEM files of certificates to trust beyond the usual. Certificate errors are never ignored.
        here: host names that mean this machine to the browser alone.
    """
    with tempfile.TemporaryDirectory(prefix="kit-browser-") as folder, sync_playwright() as playwright:
        home = pathlib.Path(folder)
        _trust(home, trusted)
        browser = playwright.chromium.launch(
            executable_path=EXECUTABLE,
            args=["--no-proxy-server", "--host-resolver-rules=" + ",".join(f"MAP {n} 127.0.0.1" for n in here)],
            chromium_sandbox=False,
            env={**os.environ, "HOME": folder, "XDG_CONFIG_HOME": f"{folder}/.config"},
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def neighbour(name: str, body: str) -> Iterator[tuple[str, pathlib.Path]]:
    """Serve one page by HTTPS on this machine.

    Parameters:
        name: the host name that its certificate is for.
        body: its HTML.

    Yields:
        Its address, and the PEM file of its self-signed certificate.
    """

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(f"<!doctype html><title>{name}</title>{body}".encode())

        def log_message(self, format: str, *args: object) -> None:
            """Tests have no use for its log."""

    with tempfile.TemporaryDirectory(prefix="kit-neighbour-") as folder:
        certificate, key = pathlib.Path(folder) / "crt", pathlib.Path(folder) / "key"
        new = "openssl req -x509 -nodes -days 2 -newkey ec -pkeyopt ec_paramgen_curve:P-256"
        more = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        argv = [*new.split(), *more, "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(argv, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            yield f"https://{name}:{server.server_port}/", certificate
            server.shutdown()


def picture(page: Page, path: pathlib.Path) -> None:
    """Keep what `page` shows as a PNG file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path)

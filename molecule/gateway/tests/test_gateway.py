"""What the gateway does for clients at different addresses."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from kit import vm

ROOT = pathlib.Path(__file__).parents[3]
GATEWAY = "kit-gateway-vm"
FRIEND, STRANGER, PROXY = "kit-gateway-friend", "kit-gateway-stranger", "kit-gateway-proxy"
ADA, GRACE, WRONG = "ada:correct horse: battery$staple", "grace:zweites-Kennwort-0", "ada:wrong"
TOKEN = "tok-4f0a9d7c61b24e5b8a37"
SIGNED = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=0123456789abcdef"
SIGV4 = (
    "Authorization: AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0a"
)
CREDENTIALS: dict[str, list[str]] = {
    "nothing": [],
    "a password": ["-u", ADA],
    "another's password": ["-u", GRACE],
    "a wrong password": ["-u", WRONG],
    "an unknown user": ["-u", "nobody:at all"],
    "an empty password": ["-u", "ada:"],
    "a token": ["-H", f"Authorization: Bearer {TOKEN}"],
    "a wrong token": ["-H", f"Authorization: Bearer {TOKEN}x"],
    "a token as a password": ["-u", f"nightly-training:{TOKEN}"],
    "a certificate": ["--cert", "/root/known.crt", "--key", "/root/known.key"],
    "a foreign certificate": ["--cert", "/root/foreign.crt", "--key", "/root/foreign.key"],
    "garbage": ["-H", "Authorization: Basic !!!"],
    "a signature": ["-H", SIGV4],
}
UI, API, HEALTH, METRICS = "/", "/api/2.0/mlflow/experiments/search?max_results=1", "/health", "/metrics"
ARTIFACT, BUCKET, OBJECT = "/api/2.0/mlflow-artifacts/artifacts/1/x", "/models", "/models/a/b"
PRESIGNED, ALIKE = f"/models/a/b?{SIGNED}", "/models-of-others/x"
HostOf = Callable[[str], Any]


class Case(NamedTuple):
    """One row of the table: who asks for what with which credential, and what must come back."""

    client: str
    credential: str
    path: str
    status: str
    headers: tuple[str, ...] = ()
    families: str = "46"


TABLE = [
    # Whoever may enter and says who it is.
    *(
        Case(FRIEND, credential, path, "200")
        for credential in ("a password", "a token", "a certificate")
        for path in (UI, API, ARTIFACT, HEALTH)
    ),
    Case(FRIEND, "another's password", API, "200"),
    # Whoever may enter and does not.
    *(Case(FRIEND, "nothing", path, "401") for path in (UI, API, ARTIFACT, ALIKE)),
    *(
        Case(FRIEND, credential, API, "401", families="4")
        for credential in ("an unknown user", "an empty password", "a wrong token", "garbage", "a signature")
    ),
    Case(FRIEND, "a token as a password", API, "401", families="4"),
    Case(FRIEND, "a foreign certificate", API, "400"),
    Case(FRIEND, "nothing", HEALTH, "200"),
    # The store: a signature, and nothing else.
    Case(FRIEND, "nothing", PRESIGNED, "200"),
    Case(FRIEND, "a signature", OBJECT, "200"),
    Case(FRIEND, "a signature", BUCKET, "200"),
    *(Case(FRIEND, credential, OBJECT, "403") for credential in ("nothing", "a password", "a token", "a certificate")),
    Case(FRIEND, "nothing", BUCKET, "403"),
    Case(FRIEND, "nothing", "/models/a/b?x-X-Amz-Signature=", "403"),
    # Figures of the inside: by IPv4 the friend is named for them, by IPv6 it is not.
    Case(FRIEND, "a password", METRICS, "200", families="4"),
    Case(FRIEND, "nothing", METRICS, "401", families="4"),
    Case(FRIEND, "a password", METRICS, "403", families="6"),
    # Inner locations are not for anybody.
    Case(FRIEND, "a password", "/-/credentials", "404"),
    # Whoever may not enter, whatever it has.
    *(
        Case(STRANGER, credential, path, "403")
        for credential in ("nothing", "a password", "a token")
        for path in (UI, API, HEALTH, METRICS, PRESIGNED)
    ),
    Case(STRANGER, "a signature", OBJECT, "403"),
    # Forged headers gain nothing, and cost nothing.
    *(
        Case(STRANGER, "a password", API, "403", (f"{header}: FRIEND",))
        for header in ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client", "X-Forwarded-User")
    ),
    Case(STRANGER, "a password", API, "403", ("X-Forwarded-For: 127.0.0.1",)),
    Case(FRIEND, "a password", API, "200", ("X-Forwarded-For: 203.0.113.9",)),
    # Behind the trusted load balancer it is the client that counts.
    Case(PROXY, "a password", API, "200", ("X-Forwarded-For: FRIEND",)),
    Case(PROXY, "a password", API, "200", ("X-Forwarded-For: 203.0.113.9, FRIEND",)),
    Case(PROXY, "nothing", PRESIGNED, "200", ("X-Forwarded-For: FRIEND",)),
    Case(PROXY, "nothing", API, "401", ("X-Forwarded-For: FRIEND",)),
    Case(PROXY, "a password", API, "403", ("X-Forwarded-For: STRANGER",)),
    Case(PROXY, "a password", API, "403", ("X-Forwarded-For: FRIEND, STRANGER",)),
    Case(PROXY, "a password", API, "403"),
]
ROWS = [(case, family) for case in TABLE for family in case.families]


def command(path: str, *options: str, family: str = "4", output: str = "-o /dev/null -w '%{http_code}\\n'") -> str:
    """The curl command that asks the gateway for `path`."""
    words = " ".join(shlex.quote(option) for option in options)
    return f"curl -sS -{family} --cacert /root/ca.crt {output} {words} {shlex.quote('https://gateway.test' + path)}"


def ask_all(host_of: HostOf) -> dict[tuple[Case, str], str]:
    """Ask everything in the table, each client all of its questions in one go."""
    place = {name: vm.addresses(name) for name in (FRIEND, STRANGER)}
    answers: dict[tuple[Case, str], str] = {}
    for client in (FRIEND, STRANGER, PROXY):
        rows = [row for row in ROWS if row[0].client == client]
        lines = []
        for case, family in rows:
            index = 0 if family == "4" else 1
            headers = [
                h.replace("FRIEND", place[FRIEND][index]).replace("STRANGER", place[STRANGER][index])
                for h in case.headers
            ]
            options = [*CREDENTIALS[case.credential], *(word for header in headers for word in ("-H", header))]
            lines.append(command(case.path, *options, family=family))
        out = host_of(client).check_output("\n".join(lines))
        answers |= dict(zip(rows, out.split(), strict=True))
    return answers


def wrong(answers: dict[tuple[Case, str], str]) -> list[tuple[Case, str, str]]:
    """The rows whose answer is not the expected one."""
    return [(case, family, got) for (case, family), got in answers.items() if got != case.status]


@pytest.fixture(scope="module")
def answers(host_of: HostOf) -> dict[tuple[Case, str], str]:
    """What the gateway as it was converged answers to the whole table."""
    return ask_all(host_of)


@pytest.mark.parametrize(("case", "family"), ROWS, ids=[f"{c.client} {c.credential} {c.path} v{f}" for c, f in ROWS])
def test_who_gets_what(answers: dict[tuple[Case, str], str], case: Case, family: str) -> None:
    """The table of clients, credentials and paths, by IPv4 and IPv6."""
    assert answers[case, family] == case.status


@pytest.mark.parametrize(
    ("file", "rule", "instead"),
    [
        ("acl.conf", "deny all;", "allow all;"),
        ("site.conf", "auth_request /-/credentials;", "auth_request off;"),
        ("site.conf", "if ($unsigned) {", "if ($request_method = NONE) {"),
        ("site.conf", "real_ip_header", "#"),
        ("site.conf", "location = /metrics {\n    allow", "location = /metrics {\n    allow all; allow"),
        ("tokens.conf", '"nightly-training"', '""'),
        ("site.conf", "location = /-/credentials {\n        internal;", "location = /-/credentials {"),
    ],
)
def test_the_table_fails_without_a_rule(host_of: HostOf, file: str, rule: str, instead: str) -> None:
    """Take one rule away: the table must notice."""
    gateway = host_of(GATEWAY)
    path = f"/etc/nginx/mlflow-kit/{file}"
    gateway.check_output(f"cp -p {path} /root/rule")
    try:
        text = gateway.file(path).content_string
        flat = rule.replace("\n    ", "\n        ") if rule not in text else rule
        assert flat in text
        vm.write(GATEWAY, path, text.replace(flat, instead).encode())
        gateway.check_output("nginx -t -q && nginx -s reload && sleep 1")
        assert wrong(ask_all(host_of))
    finally:
        gateway.check_output(f"cp -p /root/rule {path}; nginx -s reload; sleep 1")


def curl(host: Any, path: str, *options: str) -> tuple[str, str]:
    """Ask the gateway for `path` and return status and body."""
    done = host.run(command(path, *options, output="-w '\\n%{http_code}'"))
    body, _, status = done.stdout.rpartition("\n")
    return status, body


def test_the_store_sees_what_was_signed(host_of: HostOf) -> None:
    """Host, path and query of a signed request reach the store untouched."""
    _, body = curl(host_of(FRIEND), f"/models/a%2Fb%20c/d?{SIGNED}&x-id=GetObject")
    told = json.loads(body)
    assert told["port"] == 8080
    assert told["path"] == f"/models/a%2Fb%20c/d?{SIGNED}&x-id=GetObject"
    assert told["headers"]["host"] == "gateway.test"


@pytest.mark.parametrize(
    ("credential", "who"), [("a password", "ada"), ("a token", "nightly-training"), ("a certificate", "CN=robot")]
)
def test_the_credential_ends_at_the_gateway(host_of: HostOf, credential: str, who: str) -> None:
    """The server behind learns who asks and from where, and gets neither password nor token."""
    _, body = curl(host_of(FRIEND), "/x", *CREDENTIALS[credential], "-H", "X-Forwarded-For: 10.9.9.9")
    headers = json.loads(body)["headers"]
    assert "authorization" not in headers
    assert headers["x-forwarded-for"] == vm.addresses(FRIEND)[0]
    assert headers["x-forwarded-user"] == who
    assert headers["host"] == "gateway.test"
    assert headers["x-request-id"]


def test_both_instances_serve_and_one_is_enough(host_of: HostOf) -> None:
    """Requests reach both instances; with one of them dead none fails."""
    friend, gateway = host_of(FRIEND), host_of(GATEWAY)
    ports = {json.loads(curl(friend, "/", "-u", ADA)[1])["port"] for _ in range(8)}
    assert ports == {5001, 5002}
    gateway.check_output("systemctl kill -s KILL upstream-5001")
    answered = [curl(friend, "/", "-u", ADA, "-X", verb)[0] for verb in ("GET", "POST") * 10]
    assert answered == ["200"] * 20


def test_a_drained_instance_gets_nothing_and_comes_back(host_of: HostOf) -> None:
    """Taken out, no request reaches it; the last one is never taken out; back in, it serves again."""
    friend, gateway = host_of(FRIEND), host_of(GATEWAY)
    gateway.check_output("sleep 4; mlflow-kit-upstream drain 127.0.0.1:5001")
    assert {json.loads(curl(friend, "/", "-u", ADA)[1])["port"] for _ in range(8)} == {5002}
    gateway.check_output("mlflow-kit-upstream drain 127.0.0.1:5002")
    assert curl(friend, "/", "-u", ADA)[0] == "200"
    gateway.check_output("mlflow-kit-upstream rejoin 127.0.0.1:5001")
    assert {json.loads(curl(friend, "/", "-u", ADA)[1])["port"] for _ in range(8)} == {5001, 5002}


def ports(client: Any, path: str, *more: str) -> set[int]:
    """Which of the servers behind answer `path`."""
    return {json.loads(curl(client, path, "-u", ADA, *more)[1])["port"] for _ in range(8)}


@pytest.mark.parametrize(
    ("path", "lane"),
    [
        ("/api/2.0/mlflow/runs/create", "rest"),
        ("/ajax-api/3.0/mlflow/runs", "rest"),
        ("/api/2.0/mlflow/runs/get?run_id=/api/2.0/mlflow/x", "rest"),
        ("/api/2.0/mlflow/runs/special", "everything"),
        ("/api/2.0/mlflow/runsx", "everything"),
        ("/x/api/2.0/mlflow/runs/create", "everything"),
        ("/v1/traces", "everything"),
    ],
)
def test_paths_part_the_lanes(host_of: HostOf, path: str, lane: str) -> None:
    """A lane's paths reach its own servers, all others those that serve everything."""
    assert ports(host_of(FRIEND), path, "-X", "POST") == {"rest": {5101, 5102}, "everything": {5001, 5002}}[lane]


def test_a_lane_is_told_what_it_reads(host_of: HostOf) -> None:
    """Its server learns the request's id; neither the gateway's X-Forwarded headers nor a client's reach it."""
    names = ("x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-user", "x-request-id")
    forged = [word for name in names for word in ("-H", f"{name}: forged")]
    _, body = curl(host_of(FRIEND), "/api/2.0/mlflow/runs/get", "-u", ADA, *forged)
    headers = json.loads(body)["headers"]
    assert not {*names[:4], "authorization"} & headers.keys()
    assert headers["host"] == "gateway.test"
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])


# Sends a body in two halves, a second apart, and prints the answer's body.
HALVES = """
import base64, http.client, ssl, sys, time
context = ssl.create_default_context(cafile="/root/ca.crt")
connection = http.client.HTTPSConnection("gateway.test", context=context, timeout=10)
connection.putrequest("POST", sys.argv[2])
connection.putheader("Authorization", "Basic " + base64.b64encode(sys.argv[1].encode()).decode())
connection.putheader("Content-Length", "20")
connection.endheaders(b"x" * 10)
time.sleep(1)
connection.send(b"y" * 10)
print(connection.getresponse().read().decode())
"""


@pytest.mark.parametrize(("path", "waits"), [("/api/2.0/mlflow/runs/log-batch", False), ("/x", True)])
def test_a_slow_client_costs_a_lane_nothing(host_of: HostOf, path: str, waits: bool) -> None:
    """Its server, which has a thread for each request, gets requests that are whole; the others get what streams."""
    vm.write(FRIEND, "/root/halves.py", HALVES.encode())
    out = host_of(FRIEND).check_output(f"python3 /root/halves.py {shlex.quote(ADA)} {path}")
    told = json.loads(out)
    assert told["size"] == 20
    assert (told["waited"] > 0.5) == waits


def test_lanes_are_drained_by_themselves(host_of: HostOf) -> None:
    """A server is taken out of its lane alone, and each lane keeps its last one."""
    friend, gateway = host_of(FRIEND), host_of(GATEWAY)
    try:
        gateway.check_output("mlflow-kit-upstream drain 127.0.0.1:5101; mlflow-kit-upstream drain 127.0.0.1:5102")
        assert ports(friend, "/api/2.0/mlflow/runs/get") == {5102}
        assert ports(friend, "/") == {5001, 5002}
    finally:
        gateway.check_output("mlflow-kit-upstream rejoin 127.0.0.1:5101")
    assert ports(friend, "/api/2.0/mlflow/runs/get") == {5101, 5102}


def test_static_files_are_kept_for_those_who_may_have_them(host_of: HostOf) -> None:
    """The servers behind send each of the page's files once; who has no credential or no entry gets none of them."""
    friend, path = host_of(FRIEND), "/static-files/main.0a1b.js"
    first, second = (json.loads(curl(friend, path, "-u", user)[1]) for user in (ADA, GRACE))
    assert first["headers"]["x-request-id"] == second["headers"]["x-request-id"]
    assert "authorization" not in first["headers"]
    assert curl(friend, path)[0] == "401"
    assert curl(host_of(STRANGER), path, "-u", ADA)[0] == "403"


def test_large_bodies_pass(host_of: HostOf) -> None:
    """Half a gigabyte goes up without a limit, whole."""
    friend = host_of(FRIEND)
    friend.check_output("head -c 500000000 /dev/urandom > /root/large")
    status, body = curl(friend, f"/models/large?{SIGNED}", "-T", "/root/large")
    assert status == "200"
    assert json.loads(body)["sha256"] == friend.check_output("sha256sum /root/large").split()[0]


def test_a_stream_passes_at_once(host_of: HostOf) -> None:
    """What the server sends bit by bit arrives bit by bit."""
    out = host_of(FRIEND).check_output(
        "curl -sSN --cacert /root/ca.crt -u " + shlex.quote(ADA) + " https://gateway.test/stream | "
        "while read -r line; do date +%s.%N; done"
    )
    times = [float(line) for line in out.split()]
    assert len(times) == 4
    assert times[-1] - times[0] > 1.0


def test_nothing_secret_is_logged(host_of: HostOf) -> None:
    """The log names the user and the path, and holds no password, token or signature."""
    gateway = host_of(GATEWAY)
    curl(host_of(FRIEND), "/seen?token=hidden", "-u", ADA)
    curl(host_of(FRIEND), "/seen-by-token", *CREDENTIALS["a token"])
    log = gateway.check_output("sleep 1.5; cat /var/log/nginx/gateway.log")
    lines = [json.loads(line) for line in log.splitlines()]
    journal = log + gateway.check_output("journalctl -t gateway -o cat --no-pager")
    assert any(line["user"] == "ada" and line["path"] == "/seen" for line in lines)
    assert any(line["user"] == "nightly-training" and line["path"] == "/seen-by-token" for line in lines)
    for secret in ("correct horse", "0123456789abcdef", "hidden", "Signature", TOKEN, "Y29ycmVjdCBob3JzZ"):
        assert secret not in journal


def test_the_log_is_rotated(host_of: HostOf) -> None:
    """What comes after the distribution's rotation stands in a new file."""
    gateway = host_of(GATEWAY)
    curl(host_of(FRIEND), "/before", "-u", ADA)
    gateway.check_output("sleep 1.5; logrotate -f /etc/logrotate.d/nginx")
    curl(host_of(FRIEND), "/after", "-u", ADA)
    paths = gateway.check_output("sleep 1.5; cat /var/log/nginx/gateway.log")
    assert "/after" in paths and "/before" not in paths
    assert "/before" in gateway.check_output("cat /var/log/nginx/gateway.log.1")


def test_a_refusal_asks_once(host_of: HostOf) -> None:
    """Whoever is not known gets one challenge, with or without a wrong credential."""
    for credential in ((), ("-u", "ada:wrong"), ("-H", "Authorization: Bearer wrong")):
        head = host_of(FRIEND).check_output(command("/", *credential, output="-D - -o /dev/null")).lower()
        assert head.count("www-authenticate: basic") == 1, head


def test_no_credential_stands_in_a_file(host_of: HostOf) -> None:
    """Neither in the configuration nor among the remembered verdicts is a password or token to be found."""
    gateway = host_of(GATEWAY)
    curl(host_of(FRIEND), "/", "-u", ADA)
    assert gateway.check_output("find /run/mlflow-kit-verdicts -type f | wc -l") != "0"
    for secret in ("correct horse", TOKEN, "Y29ycmVjdCBob3JzZ"):
        assert gateway.run(f"grep -rlaF '{secret}' /etc/nginx /run/mlflow-kit-verdicts").stdout == ""
    assert gateway.file("/etc/nginx/mlflow-kit/tls.key").mode == 0o600
    assert gateway.file("/etc/nginx/mlflow-kit/users").mode == 0o640
    assert gateway.file("/etc/nginx/mlflow-kit/tokens.conf").mode == 0o600


def test_wrong_passwords_are_limited_and_right_ones_are_not(host_of: HostOf) -> None:
    """An address that guesses gets 429; who knows the password gets in from there all the same."""
    friend = host_of(FRIEND)
    guesses = "\n".join(command("/", "-u", f"ada:guess {n}") for n in range(25))
    got = friend.check_output(guesses).split()
    assert set(got) == {"401", "429"}
    assert [curl(friend, "/", "-u", who)[0] for who in (ADA, GRACE)] == ["200", "200"]
    # The allowance grows back while a busy machine asks: guess until it is used up again.
    heads = (friend.check_output(command("/", "-u", f"ada:more {n}", output="-D - -o /dev/null")) for n in range(40))
    refused = next(head.lower() for head in heads if "429" in head.splitlines()[0])
    assert "retry-after" in refused


@pytest.mark.parametrize(
    ("options", "works"), [("--tls-max 1.1", False), ("--tls-max 1.2", True), ("--tlsv1.3", True), ("--http2", True)]
)
def test_only_modern_tls(host_of: HostOf, options: str, works: bool) -> None:
    """TLS 1.2 and 1.3 and HTTP/2, nothing older."""
    done = host_of(FRIEND).run(command("/", "-u", ADA, "-f", *options.split()))
    assert (done.rc == 0) is works


def test_the_certificate_is_checked_against_the_authority(host_of: HostOf) -> None:
    """A client that does not know the authority refuses."""
    assert host_of(FRIEND).run("curl -s https://gateway.test/").rc == 60


def test_embedding_is_for_those_who_are_named(host_of: HostOf) -> None:
    """The browser is told who may embed the page, and to insist on TLS."""
    out = host_of(FRIEND).check_output(command("/", "-u", ADA, output="-D - -o /dev/null")).lower()
    assert "content-security-policy: frame-ancestors 'self' https://portal.example.org" in out
    assert "x-frame-options" not in out
    assert "strict-transport-security: max-age=86400" in out


def test_it_comes_back_after_a_crash(host_of: HostOf) -> None:
    """Killed workers are replaced by NGINX, a killed NGINX by systemd."""
    gateway = host_of(GATEWAY)
    gateway.check_output("pkill -9 -f '^nginx: worker'")
    assert curl(host_of(FRIEND), "/", "-u", ADA)[0] == "200"
    gateway.check_output("systemctl kill -s KILL nginx; sleep 3")
    assert curl(host_of(FRIEND), "/", "-u", ADA)[0] == "200"


def converge(changes: dict[str, Any], check: bool = True) -> str:
    """Converge again with changed variables and return the output."""
    argv = ["molecule", "converge", "-s", "gateway", "--", "-e", json.dumps(changes)]
    done = subprocess.run(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|│", " ", done.stdout).split())


@pytest.mark.parametrize(
    "changes",
    [
        {"gateway_realm": 'a " quote; breaks'},
        {"gateway_tls_certificate": "no certificate"},
        {"gateway_upstreams": ["not an upstream"]},
    ],
)
def test_a_faulty_configuration_never_reaches_the_disk(host_of: HostOf, changes: dict[str, Any]) -> None:
    """NGINX's own words are shown; the files stay, so that a reload or a reboot would still work."""
    gateway = host_of(GATEWAY)
    state = "find /etc/nginx -type f | sort | xargs sha256sum | sha256sum; pgrep -f '^nginx: worker'"
    before = gateway.check_output(state)
    out = converge(changes, check=False)
    assert "nothing was changed" in out or "censored" in out
    assert gateway.check_output(state) == before
    assert gateway.run("nginx -t").rc == 0
    assert curl(host_of(FRIEND), "/", "-u", ADA)[0] == "200"


# Asks without end over connections that it keeps, half of them writes; prints a line for each answer.
POLL = """
import base64, http.client, os, ssl, sys, threading, time
context = ssl.create_default_context(cafile="/root/ca.crt")
login = "Basic " + base64.b64encode(sys.argv[1].encode()).decode()
def ask(n):
    connection, asked = None, 0
    end = time.time() + 120
    while time.time() < end and not os.path.exists("/root/stop"):
        if connection is None:
            connection = http.client.HTTPSConnection("gateway.test", context=context, timeout=10)
        verb = "POST" if asked % 2 else "GET"
        fresh, asked = connection.sock is None, asked + 1
        try:
            body = b"b" * 100 if verb == "POST" else None
            connection.request(verb, "/x", body=body, headers={"Authorization": login})
            answer = connection.getresponse()
            answer.read()
            status = str(answer.status)
            if answer.will_close:
                connection.close()
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
            # A server may close a connection that was idle: every HTTP client asks again on a new one.
            status = "failed" if fresh else "closed"
            connection = None
        except OSError as error:
            status, connection = f"failed {error!r}", None
        print(f"{time.time():.3f} {status}", flush=True)
        time.sleep(0.01)
for n in range(4):
    threading.Thread(target=ask, args=(n,)).start()
"""


@pytest.fixture
def poll(host_of: HostOf) -> Iterator[Callable[[str, str], Callable[[], list[tuple[float, str]]]]]:
    """poll(client, login) asks without end in the background; what it returns stops that and gives the answers."""
    started = []

    def start(client: str, login: str) -> Callable[[], list[tuple[float, str]]]:
        host = host_of(client)
        vm.write(client, "/root/poll.py", POLL.encode())
        host.check_output(
            f"rm -f /root/stop; (python3 /root/poll.py {shlex.quote(login)} > /root/polled 2>&1 &) ; sleep 1"
        )
        started.append(host)

        def stop() -> list[tuple[float, str]]:
            host.check_output("touch /root/stop; while pgrep -f '[p]oll.py' >/dev/null; do sleep 0.1; done")
            lines = host.check_output("cat /root/polled").splitlines()
            return [(float(line.split()[0]), line.split(maxsplit=1)[1]) for line in lines]

        return stop

    yield start
    for host in started:
        host.run("touch /root/stop")


def test_changes_cost_those_who_stay_nothing_and_end_the_rest(
    host_of: HostOf, poll: Callable[[str, str], Callable[[], list[tuple[float, str]]]]
) -> None:
    """Under load: an entry comes and goes, TLS is renewed, a user goes. 0 failed requests; refused within 2 s."""
    friend = [{"cidr": f"{a}/{128 if ':' in a else 32}", "description": "the friend"} for a in vm.addresses(FRIEND)]
    stranger = [{"cidr": f"{a}/{128 if ':' in a else 32}", "description": "for now"} for a in vm.addresses(STRANGER)]
    grace = {"name": "grace", "password": GRACE.split(":", 1)[1]}
    ada = {"name": "ada", "password": ADA.split(":", 1)[1]}
    stays = poll(FRIEND, ADA)
    converge({"gateway_allow": friend + stranger})
    goes = poll(STRANGER, GRACE)
    reloads = "journalctl -u nginx --no-pager -o short-unix | grep -E 'Reloaded' | tail -1 | cut -d' ' -f1"
    converge({"gateway_allow": friend})
    removed = float(host_of(GATEWAY).check_output(reloads))
    answers = goes()
    assert {status for when, status in answers if when < removed - 1} <= {"200", "closed"}
    assert any(status == "200" for _, status in answers)
    last = max(when for when, status in answers if status == "200")
    assert last - removed < 2, f"still served {last - removed:.2f} s after the list changed"
    assert answers[-1][1] == "403"

    converge({"gateway_users": [ada]})
    assert curl(host_of(FRIEND), "/", "-u", GRACE)[0] == "401"
    converge({"gateway_users": [ada, grace]})
    old = host_of(GATEWAY).file("/etc/nginx/mlflow-kit/tls.crt").content_string
    converge({"__converge_renew": True})
    assert host_of(GATEWAY).file("/etc/nginx/mlflow-kit/tls.crt").content_string != old
    answered = stays()
    failed = [status for _, status in answered if status not in ("200", "closed")]
    print(f"{len(answered)} requests, {len(failed)} failed; who was removed was served {last - removed:.2f} s more")
    assert len(answered) > 500
    assert failed == []


def test_without_tls_inside_a_private_network(host_of: HostOf) -> None:
    """Plain port 80 keeps the list and the credentials."""
    friend, gateway = host_of(FRIEND), host_of(GATEWAY)
    try:
        converge({"gateway_tls_mode": "none", "gateway_port": 80})
        asked = "curl -s4 -o /dev/null -w '%{{http_code}}' {} http://gateway.test/"
        login = f"-u {shlex.quote(ADA)}"
        assert friend.check_output(asked.format(login)) == "200"
        assert friend.check_output(asked.format("")) == "401"
        assert host_of(STRANGER).check_output(asked.format(login)) == "403"
        assert not gateway.socket("tcp://0.0.0.0:443").is_listening
    finally:
        converge({})


# Speaks the PROXY protocol, as a load balancer does, for the client that it names; prints the status.
SPEAK = """
import base64, socket, ssl, sys
source, login = sys.argv[1:]
target = socket.getaddrinfo("gateway.test", 443, socket.AF_INET)[0][4]
raw = socket.create_connection(target)
raw.sendall(f"PROXY TCP4 {source} {target[0]} 40000 443\\r\\n".encode())
secure = ssl.create_default_context(cafile="/root/ca.crt").wrap_socket(raw, server_hostname="gateway.test")
word = base64.b64encode(login.encode()).decode()
lines = ["GET / HTTP/1.1", "Host: gateway.test", f"Authorization: Basic {word}", "Connection: close", "", ""]
secure.sendall("\\r\\n".join(lines).encode())
print(secure.recv(100).split()[1].decode())
"""


def test_the_proxy_protocol_is_believed_from_the_trusted(host_of: HostOf) -> None:
    """The client that the load balancer names counts; the same words of somebody else gain nothing."""
    friend, stranger = vm.addresses(FRIEND)[0], vm.addresses(STRANGER)[0]
    try:
        converge({"gateway_proxy_protocol": True})
        for name in (PROXY, STRANGER):
            vm.write(name, "/root/speak.py", SPEAK.encode())

        def say(client: str, source: str) -> str:
            return str(host_of(client).check_output(f"python3 /root/speak.py {source} {shlex.quote(ADA)}"))

        assert say(PROXY, friend) == "200"
        assert say(PROXY, stranger) == "403"
        assert say(STRANGER, friend) == "403"
        # The machine itself, as its MLflow asks for S3.
        ask = (
            "import ssl, sys, urllib.error, urllib.request as u\n"
            "context = ssl._create_unverified_context()\n"
            "try: print(u.urlopen('https://gateway.test' + sys.argv[1], context=context).status)\n"
            "except urllib.error.HTTPError as error: print(error.code)\n"
        )
        vm.write(GATEWAY, "/root/ask.py", ask.encode())
        assert host_of(GATEWAY).check_output(f"python3 /root/ask.py {OBJECT}") == "403"
        assert host_of(GATEWAY).check_output(f"python3 /root/ask.py '{OBJECT}?{SIGNED}'") == "200"
    finally:
        converge({})

"""What the server does on a real PostgreSQL, and what it does not show."""

from __future__ import annotations

import base64
import json
import pathlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

VM = "kit-mlflow-vm"
ROOT = pathlib.Path(__file__).parents[3]
SECRETS = (
    "a%2F:b@c/d",
    "scenario-kek-4vDqYwZk2n",
    "c2NlbmFyaW8td2ViaG9vay1rZXktMzItYnl0ZXMhISE=",
    "scenario-flask-8Kx2mQ",
    "scenario-secret-99",
)
HostOf = Callable[[str], Any]
# An instance that serves everything, and one of the tracking and registry API.
LANES = pytest.mark.parametrize("port", [5001, 5101], ids=["everything", "rest"])


@pytest.fixture
def host(host_of: HostOf) -> Any:
    """The machine of the scenario."""
    return host_of(VM)


def converge(*more: str, check: bool = True) -> str:
    """Run the scenario's converge again with further arguments of ansible-playbook, and return its output."""
    argv = ["molecule", "converge", "-s", "mlflow", "--", *more]
    done = subprocess.run(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not check or done.returncode == 0, done.stdout[-6000:]
    # Molecule draws a coloured frame around what it breaks into lines.
    return re.sub(r"\x1b\[[0-9;]*m|│", " ", done.stdout)


@pytest.fixture
def as_before() -> Iterator[None]:
    """Bring the machine back to the scenario's own settings."""
    yield
    converge()


def api(host: Any, path: str, body: dict[str, Any] | None = None, port: int = 5001, *headers: str) -> tuple[int, Any]:
    """Call the REST API of an instance and return status and JSON (or text)."""
    script = (
        "import json,sys,urllib.request,urllib.error\n"
        "url,body,headers=json.load(sys.stdin)\n"
        "r=urllib.request.Request(url,data=None if body is None else json.dumps(body).encode(),"
        "headers={'Content-Type':'application/json',**headers})\n"
        "try:\n a=urllib.request.urlopen(r,timeout=20);s,t=a.status,a.read().decode()\n"
        "except urllib.error.HTTPError as e:\n s,t=e.code,e.read().decode()\n"
        "except OSError as e:\n s,t=0,str(e)\n"
        "print(json.dumps([s,t]))"
    )
    extra = dict(h.split(": ", 1) for h in headers)
    ask = json.dumps([f"http://127.0.0.1:{port}{path}", body, extra]).replace("'", "'\\''")
    status, text = json.loads(host.check_output(f"printf '%s' '{ask}' | python3 -c \"{script}\""))
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def wait_healthy(host: Any, port: int = 5001, seconds: int = 60) -> float:
    """Wait until an instance answers, and return how many seconds it took."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if api(host, "/health", port=port)[0] == 200:
            return time.monotonic() - began
        time.sleep(0.3)
    raise AssertionError(f"port {port} was not healthy within {seconds} s")


def main_pid(host: Any, instance: int = 1, unit: str = "mlflow") -> int:
    """The process of an instance."""
    return int(host.check_output(f"systemctl show -p MainPID --value {unit}@{instance}"))


@pytest.mark.parametrize("other", [5002, 5101, 5102])
def test_all_instances_share_the_database(host: Any, other: int) -> None:
    """What is written through one instance is read through the others."""
    name = f"shared {time.time()}"
    status, made = api(host, "/api/2.0/mlflow/experiments/create", {"name": name})
    assert status == 200
    status, found = api(host, f"/api/2.0/mlflow/experiments/get?experiment_id={made['experiment_id']}", port=other)
    assert (status, found["experiment"]["name"]) == (200, name)


def test_artifacts_pass_through_the_server(host: Any) -> None:
    """A proxied artifact comes back as it went."""
    host.check_output("head -c 3000000 /dev/urandom > /root/a.bin")
    url = "http://127.0.0.1:5001/api/2.0/mlflow-artifacts/artifacts/probe/a.bin"
    script = (
        f"import urllib.request as u;d=open('/root/a.bin','rb').read();"
        f"u.urlopen(u.Request('{url}',data=d,method='PUT'));"
        f"print(u.urlopen('{url}').read()==d)"
    )
    assert host.check_output(f'python3 -c "{script}"') == "True"


@LANES
@pytest.mark.parametrize(
    ("header", "status"), [("Host: mlflow.test", 200), ("Host: evil.test", 403), ("Host: localhost:5001", 200)]
)
def test_only_known_hosts_are_answered(host: Any, header: str, status: int, port: int) -> None:
    """The server refuses a Host header that is not the site's."""
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert api(host, path, None, port, header)[0] == status


@LANES
@pytest.mark.parametrize(("origin", "status"), [("https://mlflow.test", 200), ("https://evil.test", 403)])
def test_only_the_sites_own_pages_write(host: Any, origin: str, status: int, port: int) -> None:
    """A page of another origin cannot write."""
    body = {"name": f"cors {time.time()}"}
    path = "/api/2.0/mlflow/experiments/create"
    assert api(host, path, body, port, f"Origin: {origin}", "Host: mlflow.test")[0] == status


@LANES
def test_other_pages_may_not_frame_it(host: Any, port: int) -> None:
    """Each answer says so to browsers."""
    script = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/').headers['X-Frame-Options'])"
    assert host.check_output(f'python3 -c "{script}"') == "SAMEORIGIN"


@pytest.mark.parametrize(("unit", "port"), [("mlflow", 5001), ("mlflow-rest", 5101)])
def test_a_request_under_way_ends_well(host: Any, unit: str, port: int) -> None:
    """An instance that is told to stop answers first what it has begun to read."""
    body = json.dumps({"name": f"slow {time.time()}"})
    script = f"""
import http.client, subprocess, time
body = {body!r}.encode()
c = http.client.HTTPConnection("127.0.0.1", {port}, timeout=30)
c.putrequest("POST", "/api/2.0/mlflow/experiments/create")
c.putheader("Content-Type", "application/json")
c.putheader("Content-Length", str(len(body)))
c.endheaders(body[:5])
time.sleep(1)
subprocess.run(["systemctl", "restart", "--no-block", "{unit}@1"], check=True)
time.sleep(2)
c.send(body[5:])
print(c.getresponse().status)
"""
    before = main_pid(host, 1, unit)
    host.check_output(f"cat > /tmp/slow.py <<'END'\n{script}\nEND")
    assert host.check_output("python3 /tmp/slow.py") == "200"
    wait_healthy(host, port)
    assert main_pid(host, 1, unit) != before


def test_the_rest_lane_is_small(host: Any) -> None:
    """Its instances hold no data frames."""
    sizes = {}
    for unit in ("mlflow", "mlflow-rest"):
        pid = main_pid(host, 1, unit)
        sizes[unit] = int(host.check_output(f"grep ^Pss: /proc/{pid}/smaps_rollup").split()[1])
        maps = host.check_output(f"cat /proc/{pid}/maps")
        assert ("pandas" in maps) == (unit == "mlflow")
    assert sizes["mlflow-rest"] < 0.8 * sizes["mlflow"]


def test_lanes_are_turned_off_by_one_variable(host: Any, as_before: None) -> None:
    """Without instances of its own the API is served by those that serve everything, and those do not restart twice."""
    converge("-e", '{"mlflow_rest_instances": 0}')
    assert [api(host, "/health", port=port)[0] for port in (5001, 5002, 5101, 5102)] == [200, 200, 0, 0]
    assert "changed=0" in converge("-e", '{"mlflow_rest_instances": 0}')


def test_paths_that_would_be_lost_stop_an_instance(host: Any, as_before: None) -> None:
    """Where the lane's paths name a route that only the others have, those do not start, and the log says which."""
    out = converge("-e", json.dumps({"mlflow_rest_paths": "^/v1/"}), check=False)
    assert "POST /v1/traces" in " ".join(out.split())
    assert api(host, "/health", port=5002)[0] == 200


@pytest.mark.parametrize(
    "place",
    [
        "ps auxeww",
        "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'",
        "systemctl show 'mlflow@*' 'mlflow-rest@*' mlflow-migrate",
        "systemctl cat 'mlflow@*' 'mlflow-rest@*' mlflow-migrate",
        "journalctl --no-pager",
        "find /etc /usr/local /run /var/lib /var/log /tmp -xdev -type f -perm -o=r -exec cat {} + 2>/dev/null",
    ],
)
def test_no_secret_shows(host: Any, place: str) -> None:
    """No secret stands where an ordinary user or a log reader would see it."""
    shown = host.run(place).stdout_bytes.decode(errors="replace")
    assert len(shown) > 200
    assert not [secret for secret in SECRETS if secret in shown]


def test_ansible_shows_no_secret(host: Any) -> None:
    """A run at the highest verbosity with diffs prints none, although it writes them all."""
    host.check_output("rm /etc/mlflow/secrets.json /etc/mlflow/pgpass")
    out = converge("-vvv", "--diff").replace("\n", "")
    assert "/etc/mlflow/mlflow.env" in out
    assert not [secret for secret in SECRETS if secret in out]


def test_the_service_user_owns_nothing_that_runs(host: Any) -> None:
    """Neither the environment nor the configuration can be changed by who runs it."""
    for path in ("/opt/mlflow/current/", "/etc/mlflow/", "/usr/local/lib/mlflow-kit/"):
        assert host.run(f"setpriv --reuid=mlflow --clear-groups --regid=mlflow touch {path}x").rc != 0
    found = host.check_output("find -L /opt/mlflow/current /etc/mlflow /usr/local/lib/mlflow-kit -user mlflow")
    assert found == ""


@pytest.mark.parametrize("unit", ["mlflow", "mlflow-rest"])
def test_the_sandbox_holds(host: Any, unit: str) -> None:
    """The process cannot write outside its own folders, see other processes or gain anything."""
    pid = main_pid(host, 1, unit)
    enter = f"nsenter -t {pid} -m -- setpriv --reuid=mlflow --regid=mlflow --clear-groups"
    assert host.run(f"nsenter -t {pid} -m touch /etc/x").rc != 0
    assert host.run(f"nsenter -t {pid} -m touch /opt/mlflow/x").rc != 0
    assert host.run(f"{enter} sh -c 'ls /proc/1'").rc != 0
    status = host.check_output(f"cat /proc/{pid}/status")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(facts["CapEff"].strip(), 16) == 0
    assert (facts["NoNewPrivs"].strip(), facts["Seccomp"].strip()) == ("1", "2")
    score = host.check_output(f"systemd-analyze security --no-pager {unit}@1 | tail -1")
    assert float(score.split(":")[1].split()[0]) < 2.0, score


def test_an_instance_that_is_killed_comes_back(host: Any) -> None:
    """systemd starts it again, and the other serves meanwhile."""
    before = main_pid(host)
    host.check_output(f"kill -9 {before}")
    assert api(host, "/health", port=5002)[0] == 200
    wait_healthy(host)
    assert main_pid(host) != before


def test_it_waits_for_a_database_that_is_away(host: Any) -> None:
    """Without PostgreSQL the service keeps trying, and serves when it is back."""
    host.check_output("systemctl stop postgresql@*-main.service")
    host.check_output("systemctl kill -s KILL mlflow@1")
    time.sleep(8)
    assert host.check_output("systemctl show -p ActiveState --value mlflow@1") == "activating"
    host.check_output(
        "systemctl start $(systemctl list-units --all --plain --no-legend 'postgresql@*' | cut -d' ' -f1)"
    )
    wait_healthy(host)


def test_the_number_of_instances_follows_the_setting(host: Any, as_before: None) -> None:
    """A third one is added and two are taken away, without touching those that stay."""
    first = main_pid(host)
    converge("-e", '{"mlflow_instances": 3}')
    assert api(host, "/version", port=5003)[0] == 200
    converge("-e", '{"mlflow_instances": 1}')
    assert [api(host, "/health", port=port)[0] for port in (5001, 5002, 5003)] == [200, 0, 0]
    assert main_pid(host) == first


def test_settings_that_nothing_reads_are_refused(host: Any) -> None:
    """They are named, and neither the file nor the running server changes."""
    names = ["AWS_S3_ADDRESSING_STYLE", "GUNICORN_CMD_ARGS", "MLFLOW_S3_MAX_THREADS"]
    before = (main_pid(host), host.check_output("sha256sum /etc/mlflow/mlflow.env"))
    out = converge("-e", json.dumps({"mlflow_environment": dict.fromkeys(names, "1")}), check=False)
    assert f"reads no {', '.join(names)}" in " ".join(out.split())
    assert (main_pid(host), host.check_output("sha256sum /etc/mlflow/mlflow.env")) == before


def test_a_changed_setting_restarts_one_after_the_other(host: Any, as_before: None) -> None:
    """While instances restart for a new setting, one of them always answers."""
    pids = [main_pid(host, n) for n in (1, 2)]
    poll = (
        "import time,urllib.request,sys\nbad=0;n=0\nend=time.time()+40\n"
        "while time.time()<end and not __import__('os').path.exists('/tmp/stop'):\n"
        " ok=0\n"
        " for p in (5001,5002):\n"
        "  try: ok+=urllib.request.urlopen(f'http://127.0.0.1:{p}/health',timeout=5).status==200\n"
        "  except OSError: pass\n"
        " bad+=ok==0;n+=1;time.sleep(.1)\n"
        "print(bad,n)"
    )
    host.check_output(f'rm -f /tmp/stop; nohup python3 -c "{poll}" > /tmp/poll 2>&1 & true')
    converge("-e", '{"mlflow_shutdown_timeout": 31}')
    host.check_output("touch /tmp/stop; sleep 1")
    bad, asked = map(int, host.check_output("cat /tmp/poll").split())
    assert bad == 0 and asked > 10
    assert not set(pids) & {main_pid(host, n) for n in (1, 2)}


def test_jobs_run_where_they_are_asked_for(host: Any, as_before: None) -> None:
    """With jobs on the runner and its workers are there, with jobs off none is."""
    assert "huey" not in host.check_output("ps auxww")
    converge("-e", '{"mlflow_job_execution": true}')
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and "huey" not in host.check_output("ps auxww"):
        time.sleep(1)
    assert "huey" in host.check_output("ps auxww")
    assert api(host, "/health")[0] == 200


def test_two_migrations_at_once_are_one_after_the_other(host: Any) -> None:
    """The advisory lock holds the second until the first has let go."""
    take = "SELECT pg_advisory_lock(hashtext('mlflow-kit')); SELECT pg_sleep(12);"
    host.check_output(f'nohup su postgres -c "psql -d mlflow -c \\"{take}\\"" >/dev/null 2>&1 & true')
    began = time.monotonic()
    host.check_output("systemctl start mlflow-migrate")
    assert time.monotonic() - began > 9


def test_mlflow_can_ask_for_credentials_itself(host: Any, as_before: None) -> None:
    """With its own users and permissions, in a database of their own, on both instances."""
    password = "Scenario-admin-5Qm8vK"
    settings = {
        "mlflow_basic_auth": True,
        "mlflow_basic_auth_database_uri": "postgresql+psycopg2://mlflow_a@127.0.0.1:5432/mlflow_auth?sslmode=disable",
        "mlflow_basic_auth_admin_password": password,
    }
    converge("-e", json.dumps(settings))

    def login(user: str, secret: str) -> str:
        return "Authorization: Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()

    admin, create = login("admin", password), "/api/2.0/mlflow/experiments/create"
    for port in (5001, 5002, 5101, 5102):
        assert api(host, "/health", port=port)[0] == 200
        assert api(host, create, {"name": "x"}, port)[0] == 401
        assert api(host, create, {"name": "x"}, port, login("admin", "wrong"))[0] == 401
    status, made = api(host, create, {"name": f"owned {time.time()}"}, 5101, admin)
    assert status == 200
    reader = {"username": f"reader{int(time.time())}", "password": "Reader-password-71xQ"}
    assert api(host, "/api/2.0/mlflow/users/create", reader, 5002, admin)[0] == 200
    theirs = login(reader["username"], reader["password"])
    name = {"experiment_id": made["experiment_id"], "new_name": f"taken {time.time()}"}
    assert (
        api(host, f"/api/2.0/mlflow/experiments/get?experiment_id={made['experiment_id']}", None, 5001, theirs)[0]
        == 200
    )
    assert {api(host, "/api/2.0/mlflow/experiments/update", name, port, theirs)[0] for port in (5001, 5101)} == {403}
    shown = host.check_output(
        "ps auxeww; systemctl show 'mlflow*@*'; journalctl --no-pager; cat /etc/mlflow/basic_auth.ini"
    )
    assert password not in shown

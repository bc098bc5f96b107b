"""The programs that the role runs, against a real PostgreSQL and NGINX: figures, alerts, changes, and the end."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest

MACHINE = "kit-monitoring-vm"
HERE = pathlib.Path(__file__).parents[1]
UNITS = [
    "prometheus",
    "prometheus-node-exporter",
    "prometheus-blackbox-exporter",
    "prometheus-postgres-exporter",
    "prometheus-nginx-exporter",
    "mtail",
]
ASK = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode())"


@pytest.fixture(scope="module")
def host(host_of: Callable[[str], Any]) -> Any:
    """The scenario's machine."""
    return host_of(MACHINE)


def ask(host: Any, path: str, port: int = 9090) -> str:
    """What a program on the machine answers."""
    found: str = host.check_output(f"python3 -c '{ASK}' '{f'http://127.0.0.1:{port}/{path}'}'")
    return found


def query(host: Any, expression: str) -> list[dict[str, Any]]:
    """The samples that `expression` has in Prometheus now."""
    answer = ask(host, "api/v1/query?query=" + urllib.parse.quote(expression))
    found: list[dict[str, Any]] = json.loads(answer)["data"]["result"]
    return found


def value(host: Any, expression: str) -> float:
    """The only value of `expression`, 0 for none."""
    found = query(host, expression)
    return float(found[0]["value"][1]) if found else 0.0


def alerts(host: Any) -> set[str]:
    """The alerts that fire."""
    found = json.loads(ask(host, "api/v1/alerts"))["data"]["alerts"]
    return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until `true()` is. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not after {seconds} s"
        time.sleep(1)


def converge(*more: str, tasks_from: str = "main", check: bool = True) -> str:
    """Run the role with other variables and return what Ansible printed."""
    root = HERE.parents[1]
    play = [
        {
            "hosts": "all",
            "gather_facts": False,
            "tasks": [{"ansible.builtin.include_role": {"name": "monitoring", "tasks_from": tasks_from}}],
        }
    ]
    inventories = ["-i", str(root / "molecule/_shared/inventory"), "-i", str(HERE / "inventory.yml")]
    path = root / ".cache" / "molecule-monitoring.yml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(play))
    done = subprocess.run(
        ["ansible-playbook", *inventories, str(path), *more],
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
    )
    assert not check or done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_every_source_answers(host: Any) -> None:
    until(lambda: value(host, "count(up)") == 9 and value(host, "sum(up)") == 9)
    assert value(host, "pg_up") == value(host, "nginx_up") == 1
    assert value(host, "sum(probe_success)") == 3
    assert value(host, 'sum(pg_database_size_bytes{datname="mlflow"})') > 5e6
    assert value(host, "max(pg_settings_max_connections)") > 20
    assert value(host, "site:connections_percent") > 0
    assert value(host, "kit_replication_is_replica") == 0 and query(host, "kit_replication_is_replica")
    assert value(host, 'node_systemd_unit_state{name="nginx.service",state="active"}') == 1
    assert value(host, 'mlflow_kit_unit_memory_bytes{unit="nginx"}') > 1e5
    assert alerts(host) == set()


def test_the_user_that_reads_statistics_reads_nothing_else(host: Any) -> None:
    """By the socket alone, without a password; neither MLflow's database nor another's tables."""
    as_monitor = "runuser -u prometheus -- psql -Atq -h /var/run/postgresql"
    assert host.check_output(f"{as_monitor} -d postgres -c 'SELECT count(*) > 0 FROM pg_stat_activity'") == "t"
    assert host.run(f"{as_monitor} -d mlflow -c 'SELECT 1'").rc != 0
    assert host.run(f"{as_monitor} -d postgres -c 'CREATE TABLE t (i int)'").rc != 0
    assert host.run(f"{as_monitor} -d postgres -c 'SELECT rolpassword FROM pg_authid'").rc != 0
    assert host.run("runuser -u prometheus -- psql -h 127.0.0.1 -d postgres -c 'SELECT 1' </dev/null").rc != 0
    assert (
        host.run("runuser -u www-data -- psql -U prometheus -h /var/run/postgresql -d postgres -c 'SELECT 1'").rc != 0
    )


def test_requests_are_counted_by_what_they_are(host: Any) -> None:
    """What clients write into a path or a user's name changes no count; a pause is no error."""
    script = """
import base64, urllib.request, urllib.error
def get(path, user=""):
    head = {"Authorization": "Basic " + base64.b64encode(f"{user}:x".encode()).decode()} if user else {}
    try:
        urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8000" + path, headers=head)).read()
    except urllib.error.HTTPError:
        pass
for _ in range(3):
    get("/api/2.0/mlflow/runs/search"); get("/ajax-api/2.0/mlflow/runs/search"); get("/v1/traces")
    get("/api/2.0/mlflow-artifacts/artifacts/1/x"); get("/models/1/x"); get("/static-files/x.js"); get("/modelsx")
    get("/monitoring/api/v1/query"); get("/broken"); get("/paused")
    get("/api/2.0/%22,%22status%22:500,%22bytes%22:1,%22seconds%22:9,%22upstream%22:%22x")
    get("/api/x", user='","method":"GET","path":"/models/y","status":500,"bytes":0,"seconds":1,"upstream":"u"')
"""
    names = {
        ("api", "2xx"): 15,
        ("artifacts", "2xx"): 3,
        ("s3", "2xx"): 3,
        ("page", "2xx"): 6,
        ("monitoring", "2xx"): 3,
        ("page", "5xx"): 3,
        ("page", "paused"): 3,
    }

    def counts() -> dict[tuple[str, str], float]:
        return {
            (one["metric"]["route"], one["metric"]["code"]): float(one["value"][1])
            for one in query(host, 'gateway_requests_total{route!="health"}')
        }

    before = counts()
    host.check_output("cat > /root/requests.py <<'EOF'\n" + script + "\nEOF\npython3 /root/requests.py")
    wanted = {name: count + before.get(name, 0) for name, count in names.items()}
    until(lambda: counts() == wanted, 20)
    assert value(host, 'sum(gateway_request_seconds_count{route="api"})') == wanted["api", "2xx"]
    assert value(host, 'gateway_bytes_total{route="s3"}') == 10 * wanted["s3", "2xx"]


def test_backups_are_seen(host: Any) -> None:
    """A good one's time, a failed one's failure, by the files that the backups leave."""
    host.check_output("mkdir -p /var/lib/mlflow-kit")
    since = value(host, 'mlflow_kit_watched_since_timestamp_seconds{kind="backup"}')
    assert 0 < since < time.time() + 60
    good = {"result": "failed", "error": "x", "last_good": {"started": "2026-11-21T13:00:00Z"}}
    host.check_output(f"echo '{json.dumps(good)}' > /var/lib/mlflow-kit/backup.json")
    host.check_output("systemctl start mlflow-kit-figures")
    until(lambda: value(host, 'mlflow_kit_last_good_timestamp_seconds{kind="backup"}') == 1795266000)
    until(lambda: "BackupFailed" in alerts(host))
    host.check_output("rm /var/lib/mlflow-kit/backup.json; systemctl start mlflow-kit-figures")
    until(lambda: alerts(host) == set())
    assert value(host, 'mlflow_kit_watched_since_timestamp_seconds{kind="backup"}') == since


def test_a_file_that_is_none_fails_loudly(host: Any) -> None:
    """The unit fails, and its alert is raised; half a file is never served."""
    host.check_output("echo '{' > /var/lib/mlflow-kit/backup.json")
    try:
        assert host.run("systemctl start mlflow-kit-figures").rc != 0
        until(lambda: alerts(host) == {"UnitDown"})
        assert value(host, 'mlflow_kit_last_failed{kind="backup"}') == 0
    finally:
        host.check_output("rm /var/lib/mlflow-kit/backup.json; systemctl start mlflow-kit-figures")
    until(lambda: alerts(host) == set())


def test_alerts_go_to_the_sites_alertmanager(host: Any) -> None:
    """A listener in its place gets the alert as JSON, at its path."""
    listener = """
import http.server
class Keep(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        open("/run/alertmanager", "ab").write(self.path.encode() + b" " + body + b"\\n")
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", 9093), Keep).serve_forever()
"""
    host.check_output(
        f"cat > /root/listener.py <<'EOF'\n{listener}\nEOF\nsystemd-run -q --unit=listener python3 /root/listener.py"
    )
    host.check_output("systemctl stop prometheus-nginx-exporter")
    try:
        until(lambda: host.file("/run/alertmanager").exists)
        words = host.check_output("head -1 /run/alertmanager")
    finally:
        host.check_output("systemctl start prometheus-nginx-exporter; systemctl stop listener; rm -f /run/alertmanager")
    assert words.startswith("/alerts/api/v2/alerts ")
    alert = json.loads(words.split(" ", 1)[1])[0]
    assert alert["labels"]["alertname"] == "TargetMissing" and alert["labels"]["site"] == "scenario"
    assert alert["labels"]["job"] == "nginx"
    until(lambda: alerts(host) == set())


@pytest.mark.parametrize("unit", UNITS)
def test_who_is_killed_comes_back(host: Any, unit: str) -> None:
    """And cannot do much: the sandbox holds, memory is bounded."""
    before = host.check_output(f"systemctl show -P MainPID {unit}")
    host.check_output(f"systemctl kill --signal=KILL {unit}")
    until(lambda: host.check_output(f"systemctl show -P MainPID {unit}") not in (before, "0"), 20)
    shown = host.check_output(f"systemctl show -p MemoryMax -p User -p NoNewPrivileges -p ProtectSystem {unit}")
    held = dict(line.split("=", 1) for line in shown.splitlines())
    assert 0 < int(held["MemoryMax"]) <= 384 * 1024**2
    assert held["User"] in ("prometheus", "mtail") and held["NoNewPrivileges"] == "yes"
    pid = host.check_output(f"systemctl show -P MainPID {unit}")
    # At first it is still systemd's own child.
    until(lambda: host.check_output(f"awk '/^CapEff/ {{print $2}}' /proc/{pid}/status") == "0" * 16, 10)
    assert host.run(f"nsenter -t {pid} -m touch /usr/seen").rc != 0, "it could write to the system"
    score = float(host.check_output(f"systemd-analyze security {unit} | tail -1").split(":")[1].split()[0])
    assert score < 3.5


def test_all_listen_on_loopback(host: Any) -> None:
    lines = [line for line in host.check_output("ss -Hltnp").splitlines() if "prometheus" in line or "mtail" in line]
    assert len(lines) == len(UNITS)
    assert [line for line in lines if " 127.0.0.1:" not in line] == []


def test_the_journal_knows_its_limits(host: Any) -> None:
    """It says itself how much it may take."""
    host.check_output("systemctl restart systemd-journald && logger seen && journalctl --flush")
    said = "journalctl -b -u systemd-journald -o cat --no-pager | tail -4"
    until(lambda: re.search(r"System Journal .* max 64(\.0)?M", host.check_output(said)), 20)


def test_what_the_programs_refuse_is_not_written(host: Any) -> None:
    """A unit's name that is no regular expression: nothing is changed, the message names it, and Prometheus goes on."""
    before = host.check_output("md5sum /etc/prometheus/* 2>/dev/null | md5sum; systemctl show -P MainPID prometheus")
    out = " ".join(converge("-e", json.dumps({"monitoring_required_units": "swift-(object"}), check=False).split())
    assert "promtool refuses what is to be written" in out and "missing closing )" in out
    after = host.check_output("md5sum /etc/prometheus/* 2>/dev/null | md5sum; systemctl show -P MainPID prometheus")
    assert after == before


def test_state_decides_who_restarts(host: Any) -> None:
    """A file that is newer than its program restarts that one alone, even if another run has written it."""
    pids = "systemctl show -P MainPID " + " ".join(f"{unit}.service" for unit in UNITS) + " | grep ."
    before = host.check_output(pids).split()
    time.sleep(1.1)
    host.check_output("touch /etc/prometheus/blackbox.yml")
    assert "changed=1" in converge()
    after = host.check_output(pids).split()
    assert [unit for unit, one, other in zip(UNITS, before, after, strict=True) if one != other] == [
        "prometheus-blackbox-exporter"
    ]
    assert "changed=0" in converge()


def test_figures_end_by_size_and_time(host: Any) -> None:
    """What Prometheus itself says of its limits."""
    until(lambda: host.run("ss -Hltn | grep -q :9090").rc == 0)
    flags = json.loads(ask(host, "api/v1/status/flags"))["data"]
    assert flags["storage.tsdb.retention.time"] in ("30d", "4w2d")
    assert flags["storage.tsdb.retention.size"] in ("1GiB", "1024MiB", "1GB")
    assert flags["web.enable-admin-api"] == flags["web.enable-lifecycle"] == "false"


def test_it_goes_without_a_trace(host: Any) -> None:
    """Off by one variable: nothing runs, figures stay. Removed: no file, no user, no package."""
    converge()
    assert "changed=1" in converge("-e", json.dumps({"monitoring_enabled": False}))
    states = host.run("systemctl is-active 'prometheus*' mtail mlflow-kit-figures.timer").stdout.split()
    assert "active" not in states
    assert host.file("/var/lib/prometheus/metrics2/wal").exists
    assert "changed=0" in converge("-e", json.dumps({"monitoring_enabled": False}))
    converge(tasks_from="remove")
    host.check_output("rm -rf /var/lib/mlflow-kit")  # the backups' own, made by a test
    left = host.check_output(
        "find / -xdev \\( -path /proc -o -path /sys -o -path /run -o -path /usr/share/doc -o -path '/var/cache' "
        "-o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/lib/systemd \\) -prune -o "
        "\\( -name '*prometheus*' -o -name '*mtail*' -o -name 'mlflow-kit*' \\) -print"
    )
    assert [line for line in left.splitlines() if "postgresql" not in line] == []
    assert not host.file("/etc/systemd/journald.conf.d").exists
    assert host.run("getent passwd prometheus mtail").stdout == ""
    packages = host.run("dpkg-query -W -f '${Package} ${db:Status-Status}\\n' prometheus mtail libjs-dygraphs").stdout
    assert [line for line in packages.splitlines() if line.endswith(" installed")] == []

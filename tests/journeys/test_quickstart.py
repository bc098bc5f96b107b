"""From nothing to a registered model, and what then must hold for years."""

from __future__ import annotations

import json
import pathlib
import stat
import time

import pytest
from journey import RECAP, Site, leaked, start_load, stop_load
from kit import vm

pytestmark = pytest.mark.xdist_group("quickstart")
INSTANCES = "mlflow-rest@1 mlflow-rest@2 mlflow@1 mlflow@2"
ARTIFACT = """
import os
import mlflow
from mlflow.artifacts import download_artifacts
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
if not os.path.exists("/root/kept.bin"):
    open("/root/kept.bin", "wb").write(os.urandom(5_000_000))
    mlflow.set_experiment("kept")
    with mlflow.start_run() as run:
        mlflow.log_artifact("/root/kept.bin")
    open("/root/kept.run", "w").write(run.info.run_id)
back = download_artifacts(run_id=open("/root/kept.run").read(), artifact_path="kept.bin")
print(open(back, "rb").read() == open("/root/kept.bin", "rb").read(), end="")
"""


@pytest.fixture
def site(quickstart: tuple[Site, str]) -> Site:
    """The quickstart's site."""
    return quickstart[0]


def test_it_says_what_it_did_and_how_to_log_in(quickstart: tuple[Site, str]) -> None:
    """Phases with durations, the workload's steps, the URL, the user and where the password is."""
    site, out = quickstart
    steps = {json.loads(line)["step"]: json.loads(line) for line in map(str.strip, out.splitlines()) if line[:1] == "{"}
    assert set(steps) == {"run logged", "model registered", "model loaded and used", "artifact up and down"}
    assert steps["artifact up and down"]["sha256"] == "equal"
    assert steps["model loaded and used"]["accuracy"] == steps["run logged"]["accuracy"] > 0.9
    assert f"https://{site.name}" in out
    environment = site.checkout / "client.env"
    assert stat.S_IMODE(environment.stat().st_mode) == 0o600
    assert not leaked(site.secrets(), out)


def test_it_is_idempotent(site: Site) -> None:
    """A second quickstart works on what is there, changes nothing of it, and takes little."""
    began = time.monotonic()
    out = site.command("scripts/quickstart")
    print(f"repeated in {time.monotonic() - began:.0f} s")
    assert '"version": "2"' in out
    ran = RECAP.findall((site.checkout / ".cache/log/deploy.log").read_text())
    assert ran and all(counts == ("0", "0", "0") for counts in ran)


def test_the_name_resolves_on_this_machine(site: Site) -> None:
    """What the quickstart says of /etc/hosts is true, and the page answers here too."""
    out = site.command(
        "curl", "-sS", "--cacert", "ca.crt", "-o", "/dev/null", "-w", "%{http_code}", f"https://{site.name}"
    )
    assert out == "401"


def test_a_dry_run_on_the_live_host_names_no_change(site: Site) -> None:
    """Nor does it fail; that a run which is not dry has nothing to do, the second quickstart has shown."""
    assert site.changed("--check", "--diff") == 0


def test_only_ssh_and_the_gateway_answer(site: Site) -> None:
    """Every TCP port of the host, by both families, as a client sees it."""
    scan = """
import asyncio, resource, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
async def probe(host, port):
    try:
        # What the firewall drops never answers: many at once, and not for long.
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 2)
        writer.close()
        return port
    except (OSError, asyncio.TimeoutError):
        return None
async def scan(host):
    found = set()
    for start in range(1, 65536, 3000):
        for attempt in range(5):
            # On a busy machine an open port, too, may not answer in time: a part counts if the gateway's did.
            ports = [443, *range(start, min(start + 3000, 65536)), 443]
            open_ports = await asyncio.gather(*(probe(host, port) for port in ports))
            found |= {port for port in open_ports if port}
            if open_ports[0] and open_ports[-1]:
                break
        else:
            sys.exit(f"{host} did not answer in time at all")
    print(host, *sorted(found))
async def main():
    await asyncio.gather(*map(scan, sys.argv[1:]))
asyncio.run(main())
"""
    vm.write(site.client, "/root/scan.py", scan.encode())
    addresses = vm.addresses(site.machine)
    out = vm.execute(site.client, "python3", "/root/scan.py", *addresses)
    assert sorted(out.splitlines()) == sorted(f"{address} 22 443" for address in addresses)


@pytest.mark.parametrize(
    ("path", "credentials", "status"),
    [
        ("/", "right", "200"),
        ("/", "wrong", "401"),
        ("/", "none", "401"),
        ("/api/2.0/mlflow/experiments/search?max_results=1", "none", "401"),
        ("/mlflow/", "none", "403"),
        ("/mlflow/1/x", "right", "403"),
        ("/mlflow/1/x?X-Amz-Signature=00", "none", "403"),
    ],
)
def test_who_gets_in(site: Site, path: str, credentials: str, status: str) -> None:
    """From the allowed client; the store refuses what is signed wrongly."""
    password = {"right": site.secrets()["vault_gateway_password"], "wrong": "wrong", "none": ""}[credentials]
    vm.write(site.client, "/root/netrc", f"machine {site.name} login mlflow password {password}\n".encode())
    probe = f"""
import requests, netrc, sys
login = netrc.netrc("/root/netrc").authenticators("{site.name}")
auth = (login[0], login[2]) if "{credentials}" != "none" else None
session = requests.Session(); session.trust_env = False
print(session.get("https://{site.name}{path}", auth=auth, verify="/root/ca-bundle.crt").status_code)
"""
    assert site.python(probe).strip() == status


def places(site: Site) -> dict[str, str]:
    """What an ordinary user, a log reader or a support bundle would see of the host."""
    host = site.host(site.machine)
    readable = "-xdev -type f -perm -o=r -size -20M -not -path '/opt/mlflow/*' -not -path '/usr/share/*'"
    commands = {
        "ps": "ps auxeww",
        "proc": "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'",
        "show": "systemctl show '*'",
        "units": "cat /etc/systemd/system/* /etc/systemd/system/*/* /run/systemd/*/*.service 2>/dev/null",
        "journal": "journalctl --no-pager -o export | tr -d '\\0'",
        "files": f"find /etc /usr/local /run /var /srv /tmp /home {readable} -exec cat {{}} + 2>/dev/null",
    }
    return {name: host.run(command).stdout_bytes.decode(errors="replace") for name, command in commands.items()}


def test_no_secret_shows(site: Site) -> None:
    """Every secret of the vault is looked for in all of these, after a run that wrote them all at -vvv --diff."""
    secrets = site.secrets()
    assert len(secrets) > 8
    host = site.host(site.machine)
    host.check_output(
        "rm -f /etc/mlflow/secrets.json /etc/mlflow/pgpass /etc/nginx/mlflow-kit/users /etc/swift/swift.conf"
    )
    out = site.playbook("site.yml", "-vvv", "--diff")
    seen = {"ansible": out, **places(site)}
    assert all(len(text) > 500 for text in seen.values())
    assert {name: leaked(secrets, text) for name, text in seen.items() if leaked(secrets, text)} == {}


def test_a_rolling_restart_fails_no_request(site: Site) -> None:
    """While every instance restarts for a changed setting, real clients read and write on: nobody is refused."""
    host = site.host(site.machine)
    start_load(site, pause=0.005)
    before = host.check_output(f"systemctl show -p MainPID --value {INSTANCES}").split()
    site.playbook("playbooks/mlflow.yml", "-e", "mlflow_shutdown_timeout=29")
    after = host.check_output(f"systemctl show -p MainPID --value {INSTANCES}").split()
    assert not set(before) & set(after)
    figures = stop_load(site)
    print(f"rolling restart: {figures}")
    assert figures["requests"] > 50 and figures["requests_s"] >= 20
    assert (figures["failures"], figures["refusals"], figures["gave_up"], figures["lost"]) == ([], [], [], [])
    site.playbook("playbooks/mlflow.yml")


def recovered(site: Site, seconds: int = 120) -> float:
    """Wait until a client's run is logged through the gateway, and return how long it took."""
    began = time.monotonic()
    probe = (
        "import mlflow; mlflow.set_experiment('probe'); mlflow.start_run(); mlflow.log_metric('m', 1); mlflow.end_run()"
    )
    while time.monotonic() - began < seconds:
        out = site.python(probe + "; print('logged')", check=False)
        if "logged" in out:
            return time.monotonic() - began
        time.sleep(1)
    raise AssertionError(f"no run was logged within {seconds} s")


@pytest.mark.parametrize(
    "blow",
    [
        "kill -9 $(systemctl show -p MainPID --value mlflow-rest@1)",
        f"systemctl kill -s KILL {INSTANCES}",
        "systemctl kill -s KILL 'postgresql@*-main.service'",
        "systemctl kill -s KILL swift-proxy swift-object swift-container swift-account",
        "systemctl kill -s KILL nginx",
        "reboot",
    ],
)
def test_it_survives(site: Site, blow: str) -> None:
    """Whatever dies under load comes back by itself, with every acknowledged run and artifact."""
    assert site.python(ARTIFACT).endswith("True")
    host = site.host(site.machine)
    start_load(site, writers=1, readers=0)
    processes = "systemctl show -p MainPID --value mlflow-rest@1 'postgresql@*-main.service' swift-proxy nginx"
    before = host.check_output(processes).split()
    assert len(before) == 4
    if blow == "reboot":
        vm.restart(site.machine)
    else:
        host.check_output(blow)
    took = recovered(site)
    assert set(before) != set(host.check_output(processes).split()), "nothing was killed"
    time.sleep(2)
    figures = stop_load(site)
    print(f"{blow}: a run was logged again after {took:.1f} s; {figures}")
    assert figures["runs"] >= 3
    assert figures["lost"] == []
    assert site.python(ARTIFACT).endswith("True")
    assert host.check_output("systemctl --failed --no-legend --plain") == ""


def test_bad_input_changes_nothing(site: Site) -> None:
    """All faults come in one list, each with what was found, what was expected and which variable to change."""
    host = site.host(site.machine)
    state = (
        "find /etc /srv /opt/mlflow /var/lib/mlflow -newer /root/mark -not -type d | grep -v -e '^/srv/swift/' | head"
    )
    host.check_output("touch /root/mark")
    bad = {
        "site_name": "9 lives",
        "site_password": "short",
        "site_port": 5001,
        "site_bucket": "Bad_Bucket",
        "site_s3_endpoint": "http://127.0.0.1:9000",
        "site_database_url": "mysql://u:secret-in-url@db/x",
        "conda_env_root": "relative/path",
        "site_allow": [{"cidr": "10.0.0.1/8", "description": "host bits"}],
    }
    out = site.playbook("site.yml", "-e", json.dumps(bad), check=False)
    for variable in bad:
        assert f"change {variable}" in out.replace("\n", " "), f"{variable} is not named:\n{out[-4000:]}"
    assert "secret-in-url" not in out
    assert host.check_output(state) == ""


def test_down_removes_everything(site: Site) -> None:
    """Nothing of the quickstart stays behind: machines, network, names, secrets."""
    site.command("scripts/quickstart", "--down")
    assert site.name not in pathlib.Path("/etc/hosts").read_text()
    assert not vm.exists(site.machine) and not vm.exists(site.client)
    left = [site.checkout / "client.env", site.checkout / "inventories/quickstart/group_vars/all/vault.yml"]
    assert not [path for path in left if path.exists()]

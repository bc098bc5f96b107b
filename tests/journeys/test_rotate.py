"""Credentials change while clients work: nothing fails, the old is refused, a killed run is completed by the next."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import killing
import pytest
import yaml
from journey import Site, copy_of_checkout, leaked, start_load, stop_load
from kit import channel, quickstart, vm

pytestmark = pytest.mark.xdist_group("rotate")
MACHINE, CLIENT, NETWORK, NAME = "kit-rotate-vm", "kit-rotate-client", "kit-rotate", "rotate.test"
SUITE = "trixie"
LOAD = "the-load-s-own-4711"
ROTATE = "playbooks/rotate.yml"
# NGINX's main process as deployed: rotations reload it, which ends no request, and never restart it.
NGINX: list[str] = []
# Of which tasks a rotation of these kinds consists, as seen when it ran whole.
TASKS: dict[str, list[str]] = {}
PYTHON = "/opt/mlflow/current/bin/python"
# Tries credentials on the site's machine with clients of others, and prints a word for each: taken or refused.
KNOCK = """
import base64, http.client, json, ssl, sys
import boto3, botocore.config, botocore.exceptions, psycopg2
asked, name = json.load(open("/root/knock.json")), sys.argv[1]
context = ssl.create_default_context(cafile="/etc/mlflow/s3-ca.crt")
def database(login, password):
    try:
        psycopg2.connect(host="127.0.0.1", dbname="mlflow", user=login, password=password).close()
        return "taken"
    except psycopg2.OperationalError as error:
        return "refused" if "password authentication failed" in str(error) or "no pg_hba" in str(error) else str(error)
def s3(key, secret):
    config = botocore.config.Config(s3={"addressing_style": "path"}, retries={"max_attempts": 0})
    client = boto3.client("s3", endpoint_url=f"https://{name}", aws_access_key_id=key, aws_secret_access_key=secret,
                          region_name="us-east-1", verify="/etc/mlflow/s3-ca.crt", config=config)
    try:
        client.head_bucket(Bucket="mlflow")
        return "taken"
    except botocore.exceptions.ClientError as error:
        return "refused" if error.response["ResponseMetadata"]["HTTPStatusCode"] == 403 else str(error)
def https(header):
    connection = http.client.HTTPSConnection(name, context=context, timeout=20)
    connection.request("GET", "/version", headers={"Authorization": header})
    status = connection.getresponse().status
    return {200: "taken", 401: "refused"}.get(status, str(status))
def gateway(password):
    return https("Basic " + base64.b64encode(f"mlflow:{password}".encode()).decode())
def tokens(token):
    return https("Bearer " + token)
print(*[globals()[kind](*values) for kind, *values in asked])
"""
# Uploads by a URL that the key of now presigned, slowly, until /root/stop-upload exists; then tries the URL again.
UPLOAD = """
import http.client, json, os, ssl, sys, time
import boto3, botocore.config
key, secret = json.load(open("/root/upload.json"))
name, size = sys.argv[1], 20_000_000
config = botocore.config.Config(s3={"addressing_style": "path"}, signature_version="s3v4")
client = boto3.client("s3", endpoint_url=f"https://{name}", aws_access_key_id=key, aws_secret_access_key=secret,
                      region_name="us-east-1", verify="/etc/mlflow/s3-ca.crt", config=config)
where = {"Bucket": "mlflow", "Key": "slow.bin"}
url = client.generate_presigned_url("put_object", Params=where, ExpiresIn=3600)
context = ssl.create_default_context(cafile="/etc/mlflow/s3-ca.crt")
def put(pieces, length):
    connection = http.client.HTTPSConnection(name, context=context, timeout=300)
    connection.putrequest("PUT", url[len(f"https://{name}"):])
    connection.putheader("Content-Length", str(length))
    connection.endheaders()
    for piece in pieces:
        connection.send(piece)
    return connection.getresponse().status
def slowly():
    sent, began = 0, time.time()
    while sent < size:
        slow = not os.path.exists("/root/stop-upload")
        piece = min(1000 if slow else 1_000_000, size - sent)
        yield bytes(piece)
        sent += piece
        if slow:
            open("/root/uploading", "w").close()
            time.sleep(0.2)
status = put((p for p in slowly()), size)
print(status, put([b"again"], 5))
"""
# A provider of language models as an endpoint of MLflow's AI gateway reaches it: answers with the key that came along.
MODEL = """
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Model(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        words = {"role": "assistant", "content": self.headers.get("Authorization", "")}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m",
                "choices": [{"index": 0, "message": words, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", 11434), Model).serve_forever()
"""
# Makes secrets through the API and uses every one of them, old and new, until /root/stop exists.
SECRETS = """
import json, os, sys, time, uuid
import requests
from mlflow.entities import GatewayEndpointModelConfig
from mlflow.entities.gateway_endpoint import GatewayModelLinkageType
from mlflow.tracking import _get_store
store, url = _get_store(), os.environ["MLFLOW_TRACKING_URI"]
login = (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"])
made, used, wrong = {}, 0, []
def make():
    value, name = uuid.uuid4().hex, "s" + uuid.uuid4().hex[:10]
    secret = store.create_gateway_secret(name, {"api_key": value}, provider="ollama")
    model = store.create_gateway_model_definition(name, secret.secret_id, "ollama", "m")
    how = GatewayEndpointModelConfig(model.model_definition_id, GatewayModelLinkageType.PRIMARY)
    store.create_gateway_endpoint(name, [how])
    made[name] = value
def use(name):
    global used
    said = {"messages": [{"role": "user", "content": "?"}]}
    answer = requests.post(f"{url}/gateway/{name}/mlflow/invocations", json=said, auth=login)
    used += 1
    time.sleep(0.1)
    words = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
    if words != f"Bearer {made[name]}":
        wrong.append(f"{time.strftime('%H:%M:%S')} {answer.status_code} {words[:200]}")
if os.path.exists("/root/made.json"):
    made = json.load(open("/root/made.json"))
while True:
    stop = os.path.exists("/root/stop")
    try:
        make()
        # Each change of a secret empties the instance's cache, so these are read from the database.
        for name in [*list(made)[:3], *list(made)[-2:]]:
            use(name)
        if stop:
            for name in made:
                use(name)
            break
    except Exception as error:
        wrong.append(f"{time.strftime('%H:%M:%S')} {error!r}"[:300])
json.dump(made, open("/root/made.json", "w"))
json.dump({"made": len(made), "used": used, "wrong": wrong}, open("/root/secrets.json", "w"))
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A site of its own, deployed, and a client with what it needs."""
    if not os.environ.get("KIT_KEEP"):
        vm.down([MACHINE, CLIENT], [NETWORK])
    checkout = copy_of_checkout("rotate")
    prod = checkout / "inventories/prod"
    if not prod.exists():
        (checkout / ".venv").symlink_to(pathlib.Path(os.environ["KIT_ROOT"]) / ".venv")
        shutil.copytree(checkout / "inventories/single", prod, symlinks=True)
    volumes = [f"mlflow-kit-uv-{SUITE}:{quickstart.CACHE_VOLUME}"]
    own = [*volumes]
    content: dict[str, object] = {
        "site_public_name": NAME,
        "conda_env_python": quickstart.PYTHONS[SUITE],
    }
    if not quickstart.conda_forge_answers():
        own.append(f"{channel.make(SUITE, if_missing=True)}:{quickstart.CHANNEL}:ro")
        content["conda_env_channels"] = [f"file://{quickstart.CHANNEL}"]
    if vm.python_index():
        content["conda_env_index_url"] = vm.python_index()
    vm.up(MACHINE, suite=SUITE, networks=[NETWORK], aliases=[NAME], volumes=own)
    client = vm.up(CLIENT, suite=SUITE, networks=[NETWORK], volumes=volumes)
    hosts = prod / "hosts.yml"
    hosts.write_text(hosts.read_text().replace("ansible_host: mlflow.example.org", f"ansible_host: {MACHINE}"))
    content["site_allow"] = [{"cidr": f"{a}/{128 if ':' in a else 32}", "description": "the client"} for a in client]
    # The load keeps a password of its own, so that it does not mind that the first user's changes.
    # It has a journey of its own.
    content["site_monitoring_enabled"] = False
    content["site_users"] = [{"name": "load", "password": LOAD}]
    content["site_machine_tokens"] = ["nightly"]
    (prod / "group_vars/all/site.yml").write_text(yaml.safe_dump(content))
    made = Site(checkout, "inventories/prod", MACHINE, CLIENT, NAME, {"ANSIBLE_SSH_ARGS": f"-F {vm.SSH_CONFIG}"})
    made.playbook("site.yml")
    made.playbook("playbooks/client.yml")
    quickstart.client_python(CLIENT)
    environment = (checkout / "client.env").read_text().replace(str(checkout), "/root")
    environment = re.sub(r"USERNAME=.*", "USERNAME=load", environment)
    environment = re.sub(r"PASSWORD=.*", f"PASSWORD={LOAD}", environment)
    # The client's own call to MLflow's makers is no request to the site.
    vm.write(CLIENT, "/root/client.env", f"{environment}\nMLFLOW_DISABLE_TELEMETRY=true\n".encode())
    vm.write(CLIENT, "/root/ca-bundle.crt", (checkout / "ca-bundle.crt").read_bytes())
    NGINX[:] = [vm.execute(MACHINE, "systemctl", "show", "-p", "MainPID", "--value", "nginx")]
    vm.write(MACHINE, "/root/knock.py", KNOCK.encode())
    vm.write(MACHINE, "/root/model.py", MODEL.encode())
    vm.execute(
        MACHINE, "sh", "-c", "systemctl is-active -q model || systemd-run -q --unit=model python3 /root/model.py"
    )
    yield made
    if not os.environ.get("KIT_KEEP"):
        vm.down([MACHINE, CLIENT], [NETWORK])
        shutil.rmtree(checkout)


def held(site: Site) -> dict[str, Any]:
    """All that the vault holds."""
    found: dict[str, Any] = yaml.safe_load(
        site.command("ansible-vault", "view", f"{site.inventory}/group_vars/all/vault.yml")
    )
    return found


def flat(values: dict[str, Any], above: str = "") -> dict[str, str]:
    """Every secret text in the vault by the way to it; certificates are public."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{name}.")
        elif isinstance(value, str) and not name.endswith("certificate"):
            found[f"{above}{name}"] = value
    return found


def credentials(values: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Kind to what a client would come with."""
    return {
        "database": (values.get("vault_database_login", "mlflow_a"), values["vault_database_password"]),
        "s3": (f"mlflow:{values['vault_s3_access_name']}", values["vault_s3_secret_key"]),
        "gateway": (values["vault_gateway_password"],),
        "tokens": (values["vault_machine_tokens"]["nightly"],),
    }


def knock(site: Site, *values: dict[str, Any], kinds: tuple[str, ...] = ("database", "s3", "gateway", "tokens")) -> str:
    """What the site says to the credentials of each of `values`, a word a kind."""
    asked = [(kind, *credentials(one)[kind]) for one in values for kind in kinds]
    vm.write(site.machine, "/root/knock.json", json.dumps(asked).encode())
    return vm.execute(site.machine, PYTHON, "/root/knock.py", site.name)


def fingerprint(site: Site) -> str:
    """Of all that a rotation could change, on the host and in the vault."""
    vault = (site.checkout / site.inventory / "group_vars/all/vault.yml").read_bytes()
    files = "find /etc/mlflow /etc/nginx /etc/swift -type f | sort | xargs sha256sum"
    files += "; systemctl show -p MainPID --value mlflow-rest@1 mlflow-rest@2 mlflow@1 mlflow@2"
    logins = "su postgres -c \"psql -Atc 'select rolname, rolpassword from pg_authid order by 1'\""
    return f"{vault!r} {site.host(site.machine).check_output(f'{files}; {logins}')}"


def healthy(site: Site) -> None:
    """Both instances serve, are in the gateway, and nothing has failed."""
    host = site.host(site.machine)
    assert host.check_output("systemctl --failed --no-legend --plain") == ""
    assert host.run("grep -q ' down;' /etc/nginx/mlflow-kit/upstreams.conf").rc == 1
    assert host.check_output("systemctl show -p MainPID --value nginx") == NGINX[0]
    for port in (5001, 5002, 5101, 5102):
        assert host.check_output(f"python3 -c 'import urllib.request as u; {ask(port)}'") == "200"


def ask(port: int) -> str:
    return f'print(u.urlopen("http://127.0.0.1:{port}/health").status)'


def quiet(figures: dict[str, Any], kind: str) -> None:
    """Nothing failed, nobody was refused, nothing is lost; say so.

    Idle connections that NGINX closed as it reloaded are counted beside (see kit.load.Ledger): the client's own
    repeat of such a request was answered, or it would be among the failed ones and somebody had given up.
    """
    print(
        f"rotate {kind}: {figures['requests']} requests ({figures['requests_s']}/s), {figures['failed']} failed,"
        f" {figures['closed']} idle connections closed ({'; '.join(figures['closings'])}),"
        f" worst {figures['worst_ms']} ms ({figures['worst']}), median {figures['median_ms']} ms,"
        f" {figures['runs']} acknowledged runs, {len(figures['lost'])} lost"
    )
    assert (figures["failed"], figures["refused"], figures["gave_up"], figures["lost"]) == (0, 0, [], []), figures
    assert figures["requests"] > max(100, 20 * figures["closed"])


def test_a_dry_run_tells_and_changes_nothing(site: Site) -> None:
    before = fingerprint(site)
    out = site.playbook(ROTATE, "-e", "rotate=database,s3,gateway,tokens,tls,encryption", "--check", "--diff")
    for words in ("a second login of PostgreSQL", "a second S3 key", "a new passphrase", "the overlap lasts 86400"):
        assert words in " ".join(out.split())
    assert fingerprint(site) == before


@pytest.mark.parametrize(
    ("more", "blow", "cure", "words"),
    [
        (("rotate=databse",), "", "", "found databse; expected one or more of database, s3"),
        (("rotate=",), "", "", "found nothing, and nothing unfinished"),
        (
            ("rotate=database", "site_database_url=postgresql://me@db.example.org/mlflow"),
            "",
            "",
            "set site_database_url and site_database_password",
        ),
        (("rotate=s3", "site_s3_endpoint=https://s3.example.org"), "", "", "set site_s3_access_key and"),
        (("rotate=database", "site_rotation_disk_mb=99999999"), "", "", "at least 99999999 MB"),
        (
            ("rotate=s3",),
            "systemctl stop postgresql@17-main",
            "systemctl start postgresql@17-main",
            "Next: systemctl start postgresql",
        ),
        (("rotate=s3",), "systemctl stop swift-proxy", "systemctl start swift-proxy", "Next: systemctl status swift"),
    ],
)
def test_what_cannot_work_is_refused(site: Site, more: tuple[str, ...], blow: str, cure: str, words: str) -> None:
    """The cause and the next step are named, and neither host nor vault has changed."""
    host = site.host(site.machine)
    before = fingerprint(site)
    try:
        if blow:
            host.check_output(blow)
        out = site.playbook(ROTATE, *(word for one in more for word in ("-e", one)), check=False)
    finally:
        if cure:
            host.check_output(cure)
    assert words in " ".join(out.replace("│", " ").split())
    assert "failed=1" in out
    assert fingerprint(site) == before


def test_a_wrong_vault_password_is_refused(site: Site, tmp_path: pathlib.Path) -> None:
    before = fingerprint(site)
    (tmp_path / "password").write_text("another one\n")
    wrong = {**site.environment, "MLFLOW_KIT_VAULT_PASSWORD_FILE": str(tmp_path / "password")}
    out = Site(site.checkout, site.inventory, "", "", "", wrong).playbook(ROTATE, "-e", "rotate=s3", check=False)
    assert "Decryption failed (no vault secrets were found that could decrypt)" in out
    assert "TASK" not in out
    assert fingerprint(site) == before


def test_an_expired_certificate_is_named_and_rotation_of_tls_cures_it(site: Site) -> None:
    host = site.host(site.machine)
    host.check_output(
        "cd /etc/nginx/mlflow-kit && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
        " -keyout tls.key -out tls.crt -subj /CN=old -not_before 20200101000000Z -not_after 20210101000000Z"
        " 2>/dev/null; systemctl reload nginx; sleep 1"
    )
    out = site.playbook(ROTATE, "-e", "rotate=gateway", check=False)
    assert "certificate ended on 2021-01-01" in out and "rotate tls" in out
    site.playbook(ROTATE, "-e", "rotate=tls")
    assert knock(site, held(site)) == "taken taken taken taken"


def whole(site: Site, kinds: str, *more: str) -> str:
    """Rotate `kinds` without a blow, remember of which tasks that consists, and return what was printed."""
    out, TASKS[kinds] = killing.counted(site, ROTATE, "-e", f"rotate={kinds}", *more)
    return out


@pytest.mark.parametrize("kinds", ["database,s3", "gateway,tokens,tls"])
def test_nothing_fails_under_load(site: Site, kinds: str) -> None:
    """The old is refused, the new works, no request failed, and no secret is shown at -vvv --diff."""
    old = held(site)
    start_load(site, writers=1, readers=1)
    began = time.monotonic()
    out = whole(site, kinds, "-e", "rotate_grace_seconds=2", "-vvv", "--diff")
    print(f"rotate {kinds}: {time.monotonic() - began:.0f} s")
    quiet(stop_load(site), kinds)
    new = held(site)
    assert new["vault_rotation"] == {}
    assert leaked(flat(old) | flat(new, "new "), out) == []
    healthy(site)
    knocked = tuple(kind for kind in kinds.split(",") if kind in credentials(old))
    assert knock(site, old, new, kinds=knocked).split() == ["refused"] * len(knocked) + ["taken"] * len(knocked)
    if "tls" in kinds:
        certificate = new["vault_tls_certificate"]
        assert certificate != old["vault_tls_certificate"]
        assert site.host(site.machine).file("/etc/nginx/mlflow-kit/tls.crt").content_string == certificate


def test_passwords_overlap_until_people_have_the_new_one(site: Site) -> None:
    """With a long overlap the run says until when, and ends; site.yml leaves that so; a later run completes it."""
    old = held(site)
    start_load(site, writers=1, readers=1)
    out = site.playbook(ROTATE, "-e", "rotate=gateway")
    assert "the old one still works until" in " ".join(out.split())
    middle = held(site)
    assert middle["vault_rotation"]["gateway"]["phase"] == "grace"
    assert knock(site, old, middle, kinds=("gateway",)) == "taken taken"
    out = site.playbook("site.yml", "--tags", "gateway")
    assert "A rotation of gateway is unfinished" in " ".join(out.split())
    assert knock(site, old, middle, kinds=("gateway",)) == "taken taken"
    site.playbook(ROTATE, "-e", "rotate_grace_seconds=0")
    quiet(stop_load(site), "gateway")
    assert held(site)["vault_rotation"] == {}
    assert knock(site, old, held(site), kinds=("gateway",)) == "refused taken"


def test_secrets_in_the_database_stay_readable_throughout(site: Site) -> None:
    """Secrets are made and used by MLflow's AI gateway all the while; every one reaches its provider unharmed."""
    vm.write(site.client, "/root/wrapped.py", SECRETS.encode())
    vm.execute(site.client, "rm", "-f", "/root/stop", "/root/secrets.json", "/root/made.json")
    script = "set -a; . /root/client.env; set +a; exec /opt/client/bin/python -W ignore /root/wrapped.py"
    vm.execute(site.client, "systemctl", "reset-failed", "secrets", check=False)
    vm.execute(site.client, "systemd-run", "--quiet", "--collect", "--unit=secrets", "sh", "-c", script)
    start_load(site, writers=1, readers=1)
    old = held(site)
    out = whole(site, "encryption", "-vvv", "--diff")
    new = held(site)
    quiet(stop_load(site), "encryption")
    vm.execute(site.client, "touch", "/root/stop")
    vm.execute(site.client, "timeout", "300", "sh", "-c", "while systemctl is-active -q secrets; do sleep 0.2; done")
    used = json.loads(vm.execute(site.client, "cat", "/root/secrets.json"))
    print(f"{used['made']} secrets made, used {used['used']} times, {len(used['wrong'])} times not well")
    assert used["made"] > 5
    assert used["wrong"] == []
    assert int(new["vault_crypto_kek_version"]) == int(old.get("vault_crypto_kek_version", "1")) + 1
    rows = "su postgres -c \"psql -At mlflow -c 'select distinct kek_version from secrets'\""
    assert site.host(site.machine).check_output(rows) == new["vault_crypto_kek_version"]
    assert leaked(flat(old) | flat(new, "new "), out) == []


def test_nothing_is_left_for_a_deployment_to_do(site: Site) -> None:
    """After a rotation of every kind."""
    assert site.changed() == 0


def test_an_upload_under_way_ends_well_and_its_url_ends_with_the_key(site: Site) -> None:
    """A transfer that an old key's URL has begun is not cut by the withdrawal; a new one by that URL is refused."""
    vm.write(site.machine, "/root/upload.py", UPLOAD.encode())
    vm.write(site.machine, "/root/upload.json", json.dumps(credentials(held(site))["s3"]).encode())
    run = f"rm -f /root/stop-upload /root/uploading; exec {PYTHON} /root/upload.py {site.name}"
    argv = ("systemd-run", "-q", "--collect", "--unit=upload", "-p", "StandardOutput=truncate:/root/uploaded")
    vm.execute(site.machine, *argv, "sh", "-c", run)
    vm.execute(site.machine, "timeout", "60", "sh", "-c", "until [ -e /root/uploading ]; do sleep 0.2; done")
    site.playbook(ROTATE, "-e", "rotate=s3", "-e", "rotate_grace_seconds=0")
    ended = "touch /root/stop-upload; while systemctl is-active -q upload; do sleep 0.2; done"
    vm.execute(site.machine, "timeout", "120", "sh", "-c", ended)
    assert vm.execute(site.machine, "cat", "/root/uploaded") == "200 403"


def test_an_emergency_withdraws_before_anything_else(site: Site) -> None:
    """Also when an ordinary rotation waits for its overlap to end; what it costs clients is measured."""
    old = held(site)
    site.playbook(ROTATE, "-e", "rotate=s3")
    assert held(site)["vault_rotation"]["s3"]["phase"] == "grace"
    start_load(site, writers=1, readers=1)
    out = site.playbook(ROTATE, "-e", "rotate=database,s3", "-e", "rotate_emergency=true")
    assert "EMERGENCY: the old database, s3 is withdrawn" in " ".join(out.split())
    assert out.index("PostgreSQL refuses the old login") < out.index("Keep the instances as configured")
    figures = stop_load(site)
    new = held(site)
    print(
        f"emergency: {figures['failed']} of {figures['requests']} requests failed within {figures['failing_s']} s;"
        f" {figures['runs']} acknowledged runs, {len(figures['lost'])} lost"
    )
    assert new["vault_rotation"] == {}
    assert knock(site, old, new, kinds=("database", "s3")) == "refused refused taken taken"
    assert figures["lost"] == []
    healthy(site)


@pytest.mark.parametrize(("kinds", "size"), [("gateway,tokens,tls", 5), ("database,s3", 5), ("encryption", 2)])
def test_a_killed_run_is_completed_by_the_next(site: Site, kinds: str, size: int) -> None:
    """kill -9 of ansible-playbook before a task, for tasks that a fixed seed picks, while clients work."""
    more = ("-e", f"rotate={kinds}", "-e", "rotate_grace_seconds=0")
    knocked = tuple(kind for kind in kinds.split(",") if kind in credentials(held(site)))
    start_load(site, writers=1, readers=1)
    if kinds not in TASKS:
        whole(site, kinds, "-e", "rotate_grace_seconds=0")
    for number in killing.sample(TASKS[kinds], size, "Make the new values"):
        old = held(site)
        at = killing.kill(site, number, ROTATE, *more)
        assert at, "the run ended before it could be killed"
        left = held(site)["vault_rotation"]
        began = time.monotonic()
        if left:
            site.playbook(ROTATE, "-e", "rotate_grace_seconds=0")
        new = held(site)
        phases = {kind: entry["phase"] for kind, entry in left.items()}
        took, of = time.monotonic() - began, len(TASKS[kinds])
        print(f"killed before {number}/{of} ({at}): {phases}, completed in {took:.0f} s")
        assert new["vault_rotation"] == {}
        changed = flat(old) != flat(new)
        assert changed or not left
        if knocked and changed:
            assert set(knock(site, old, kinds=knocked).split()) == {"refused"}
        if knocked:
            assert set(knock(site, new, kinds=knocked).split()) == {"taken"}
        healthy(site)
    quiet(stop_load(site), f"{kinds}, killed {size} times")

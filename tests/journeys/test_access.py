"""Ways in, each with MLflow's own client: tokens, client certificates, a certificate that the site was given."""

from __future__ import annotations

import json
import pathlib
import subprocess

import pytest
from journey import Site
from kit import vm

pytestmark = pytest.mark.xdist_group("quickstart")
# What a client needs is set by hand here: nothing of client.env but the address and the authority.
PROBE = """
import os
for name in [name for name in os.environ if name.startswith("MLFLOW_TRACKING_") and name != "MLFLOW_TRACKING_URI"]:
    del os.environ[name]
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
os.environ.update(GIVEN)
import mlflow
try:
    mlflow.set_experiment("access")
    with mlflow.start_run() as run:
        mlflow.log_metric("m", 1)
    open("/root/small.txt", "w").write("x" * 1000)
    mlflow.log_artifact("/root/small.txt", run_id=run.info.run_id)
    print("in")
except mlflow.exceptions.MlflowException as error:
    print("out", " ".join(str(error).split())[-600:])
"""


@pytest.fixture(scope="module")
def site(quickstart: tuple[Site, str]) -> Site:
    """The quickstart's site."""
    return quickstart[0]


def enter(site: Site, **given: str) -> str:
    """Log a run with MLflow's client and the environment `given`; what became of it."""
    return site.python(f"GIVEN = {given!r}\n{PROBE}").splitlines()[-1]


def authority(folder: pathlib.Path, name: str, *subject: str) -> dict[str, str]:
    """An authority and a certificate by it, all in PEM: `ca`, `crt`, `key`."""
    run = {"cwd": folder, "check": True, "capture_output": True}
    new = "openssl req -x509 -nodes -days 2 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -subj /CN=authority"
    new += " -addext keyUsage=critical,keyCertSign,cRLSign"
    subprocess.run([*new.split(), "-keyout", f"{name}-ca.key", "-out", f"{name}-ca.crt"], **run)  # type: ignore[call-overload]
    new = f"openssl req -x509 -nodes -days 2 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -CA {name}-ca.crt"
    more = ["-CAkey", f"{name}-ca.key", "-keyout", f"{name}.key", "-out", f"{name}.crt", *subject]
    subprocess.run([*new.split(), "-addext", "basicConstraints=critical,CA:FALSE", *more], **run)  # type: ignore[call-overload]
    files = {"ca": f"{name}-ca.crt", "crt": f"{name}.crt", "key": f"{name}.key"}
    return {kind: (folder / path).read_text() for kind, path in files.items()}


def test_a_token_enters(site: Site) -> None:
    """MLFLOW_TRACKING_TOKEN of a machine that the site knows; another is refused."""
    token = "tok-" + "5b8a37c1d2e94f60"
    tokens = [{"name": "nightly", "token": token}]
    site.playbook("playbooks/gateway.yml", "-e", json.dumps({"site_tokens": tokens}))
    try:
        assert enter(site, MLFLOW_TRACKING_TOKEN=token) == "in"
        assert "401" in enter(site, MLFLOW_TRACKING_TOKEN=token + "x")
        assert "401" in enter(site)
    finally:
        site.playbook("playbooks/gateway.yml")
    assert "401" in enter(site, MLFLOW_TRACKING_TOKEN=token)


def test_a_client_certificate_enters(site: Site, tmp_path: pathlib.Path) -> None:
    """MLFLOW_TRACKING_CLIENT_CERT_PATH by the site's authority; one by another authority is refused."""
    good = authority(tmp_path, "good", "-subj", "/CN=ada")
    other = authority(tmp_path, "other", "-subj", "/CN=eve")
    for name, made in (("good", good), ("other", other)):
        vm.write(site.client, f"/root/{name}.pem", (made["crt"] + made["key"]).encode())
    site.playbook("playbooks/gateway.yml", "-e", json.dumps({"site_client_ca_certificate": good["ca"]}))
    try:
        assert enter(site, MLFLOW_TRACKING_CLIENT_CERT_PATH="/root/good.pem") == "in"
        assert enter(site, MLFLOW_TRACKING_CLIENT_CERT_PATH="/root/other.pem").startswith("out")
        assert "401" in enter(site)
    finally:
        site.playbook("playbooks/gateway.yml")
    assert "401" in enter(site, MLFLOW_TRACKING_CLIENT_CERT_PATH="/root/good.pem")


def test_a_certificate_that_the_site_was_given(site: Site, tmp_path: pathlib.Path) -> None:
    """With site_tls: provided clients and the server trust its authority alone; and back again."""
    names = ["-subj", f"/CN={site.name}", "-addext", f"subjectAltName=DNS:{site.name}"]
    made = authority(tmp_path, "site", *names, "-addext", "extendedKeyUsage=serverAuth")
    chosen = {
        "site_tls": "provided",
        "site_tls_certificate": made["crt"],
        "site_tls_private_key": made["key"],
        "site_tls_ca_certificate": made["ca"],
    }
    (tmp_path / "chosen.json").write_text(json.dumps(chosen))
    more = ("-e", f"@{tmp_path}/chosen.json")
    bundle = vm.execute(site.client, "cat", "/root/ca-bundle.crt")
    login = {
        "MLFLOW_TRACKING_USERNAME": "mlflow",
        "MLFLOW_TRACKING_PASSWORD": site.secrets()["vault_gateway_password"],
    }

    def apply(*more: str) -> None:
        site.playbook("playbooks/gateway.yml", *more)
        # The server itself asks S3 by the same name: an artifact is kept only if it trusts the new authority, too.
        site.playbook("playbooks/mlflow.yml", "--tags", "mlflow", *more)

    try:
        apply(*more)
        assert "CERTIFICATE_VERIFY_FAILED" in enter(site, **login)
        vm.write(site.client, "/root/ca-bundle.crt", made["ca"].encode())
        assert enter(site, **login) == "in"
        assert "by CN=authority" in site.playbook("playbooks/status.yml", *more)
    finally:
        vm.write(site.client, "/root/ca-bundle.crt", bundle.encode())
        apply()
    assert enter(site, **login) == "in"

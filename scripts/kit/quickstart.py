"""Boot a container as a machine, deploy the whole stack on it, and log a real model through the gateway."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import yaml

from kit import channel, vm

# Each checkout has machines of its own, so that two of them do not share one site with different secrets.
OWN = hashlib.sha256(str(vm.CHECKOUT).encode()).hexdigest()[:6]
MACHINE, CLIENT, NETWORK = f"mlflow-kit-{OWN}-vm", f"mlflow-kit-{OWN}-client", f"mlflow-kit-{OWN}"
NAME = os.environ.get("KIT_PUBLIC_NAME", "mlflow.test")
INVENTORY = vm.CHECKOUT / "inventories" / "quickstart"
LOCAL = INVENTORY / "group_vars" / "all" / "local.yml"
MARK = f"# mlflow-kit quickstart {OWN}"
PYTHONS = {"trixie": "3.13", "bookworm": "3.11"}
CHANNEL = "/srv/conda-channel"
CACHE_VOLUME = "/var/cache/mlflow-kit"


class Failed(RuntimeError):
    """A phase failed; the message says which and where its output is."""


@contextlib.contextmanager
def phase(title: str) -> Iterator[None]:
    """Print `title` and how long what follows took."""
    print(f"  {title} …", flush=True)
    began = time.monotonic()
    yield
    print(f"  {title}: {time.monotonic() - began:.0f} s", flush=True)


def run(argv: list[str], log: str) -> None:
    """Run `argv` with its output in .cache/log/LOG.log. Raises Failed with the output's end."""
    path = vm.CHECKOUT / ".cache" / "log" / f"{log}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        done = subprocess.run(argv, stdout=file, stderr=subprocess.STDOUT, cwd=vm.CHECKOUT, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise Failed(f"{log} failed; the end of {path}:\n{path.read_text()[-6000:]}")


def playbook(name: str, *more: str, log: str) -> None:
    """Run a playbook of this checkout against the quickstart's inventory."""
    run(["ansible-playbook", "-i", str(INVENTORY), name, *more], log)


def conda_forge_answers() -> bool:
    """Whether the conda solver's own default for conda-forge is reached from here."""
    from rattler import Channel

    url = str(Channel("conda-forge").base_url).rstrip("/") + "/noarch/repodata.json.zst"
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=8):
            return True
    except (OSError, ValueError):
        return False


def boot(suite: str, local_channel: pathlib.Path | None) -> dict[str, list[str]]:
    """Boot the machine and the client, and return their addresses."""
    volumes = [f"mlflow-kit-uv-{suite}:{CACHE_VOLUME}"]
    if local_channel:
        volumes.append(f"{local_channel}:{CHANNEL}:ro")
    machine = vm.up(MACHINE, suite=suite, networks=[NETWORK], aliases=[NAME], volumes=volumes)
    client = vm.up(CLIENT, suite=suite, networks=[NETWORK], volumes=volumes)
    vm.write_ssh_config()
    return {MACHINE: machine, CLIENT: client}


def settings(suite: str, addresses: dict[str, list[str]], local_channel: bool) -> None:
    """Write what depends on this machine into the inventory: who may enter, and where Python comes from."""
    allow = [
        {"cidr": f"{address}/{128 if ':' in address else 32}", "description": "the client container"}
        for address in addresses[CLIENT]
    ]
    allow += [
        {"cidr": f"{address}/{128 if ':' in address else 32}", "description": "this machine, as the containers see it"}
        for address in vm.gateways(NETWORK)
    ]
    content: dict[str, object] = {
        "quickstart_machine": MACHINE,
        "site_public_name": NAME,
        "site_allow": allow,
        "conda_env_python": PYTHONS[suite],
    }
    if local_channel:
        content["conda_env_channels"] = [f"file://{CHANNEL}"]
    index = vm.python_index()
    if index:
        content["conda_env_index_url"] = index
    LOCAL.write_text("---\n# Written by scripts/quickstart.\n" + yaml.safe_dump(content, sort_keys=True))


def client_python(name: str) -> None:
    """Give the machine `name` a Python with MLflow and scikit-learn."""
    lock = (vm.CHECKOUT / "requirements" / "client.txt").read_bytes()
    script = """set -e
        command -v python3 >/dev/null && [ -d /usr/share/doc/python3-venv ] || {
          apt-get update -qq; apt-get install -yqq --no-install-recommends python3-venv; }
        [ -x /opt/client/bin/uv ] || {
          python3 -m venv /opt/client
          /opt/client/bin/pip install -q --require-hashes -r /root/tools.txt; }
        export UV_CACHE_DIR=/var/cache/mlflow-kit/uv UV_LINK_MODE=copy UV_SYSTEM_CERTS=1
        /opt/client/bin/uv pip install -q --python /opt/client/bin/python --require-hashes -r /root/client.txt"""
    index = vm.python_index()
    vm.write(name, "/root/client.txt", lock)
    vm.write(name, "/root/tools.txt", (vm.CHECKOUT / "requirements" / "tools.txt").read_bytes())
    prefix = f"export UV_DEFAULT_INDEX='{index}' PIP_INDEX_URL='{index}'\n" if index else ""
    vm.execute(name, "sh", "-c", prefix + script)


def work(name: str, folder: pathlib.Path) -> list[str]:
    """Run the real workload in the machine `name`, with the client.env of `folder`; return what it printed."""
    vm.write(name, "/root/workload.py", (vm.CHECKOUT / "scripts" / "kit" / "workload.py").read_bytes())
    env = (folder / "client.env").read_text().replace(str(folder), "/root")
    vm.write(name, "/root/client.env", env.encode())
    vm.write(name, "/root/ca-bundle.crt", (folder / "ca-bundle.crt").read_bytes())
    lines = []
    for kind in ("train", "transfer"):
        command = f"set -a; . /root/client.env; set +a; exec /opt/client/bin/python -W ignore /root/workload.py {kind}"
        try:
            out = vm.execute(name, "sh", "-c", command)
        except vm.VmError as error:
            raise Failed(f"the workload failed: {error}") from error
        lines += [line for line in out.splitlines() if line.startswith("{")]
    return lines


def name_on_this_machine(address: str) -> str:
    """Make NAME resolve here, by a line in /etc/hosts, and say what was done."""
    hosts = pathlib.Path("/etc/hosts")
    line = f"{address} {NAME} {MARK}"
    old = hosts.read_text()
    if line in old.splitlines():
        return f"{NAME} stands in /etc/hosts already"
    _write_hosts(re.sub(rf".*{MARK}\n?", "", old).rstrip("\n") + f"\n{line}\n")
    return f"added «{address} {NAME}» to /etc/hosts (scripts/quickstart --down removes it)"


def _write_hosts(text: str) -> None:
    argv = ["tee", "/etc/hosts"] if os.geteuid() == 0 else ["sudo", "tee", "/etc/hosts"]
    subprocess.run(argv, input=text, text=True, check=True, stdout=subprocess.DEVNULL)


def down() -> None:
    """Remove everything that the quickstart made."""
    vm.down([MACHINE, CLIENT], [NETWORK])
    for suite in PYTHONS:
        for name in (MACHINE, CLIENT):
            vm.podman("volume", "rm", "--force", f"mlflow-kit-apt-{name}-{suite}", check=False)
    hosts = pathlib.Path("/etc/hosts").read_text()
    if MARK in hosts:
        _write_hosts(re.sub(rf".*{MARK}\n?", "", hosts))
    made = [LOCAL, INVENTORY / "group_vars" / "all" / "vault.yml"]
    made += [vm.CHECKOUT / name for name in ("client.env", "ca.crt", "ca-bundle.crt")]
    for path in made:
        path.unlink(missing_ok=True)
    print("removed the machines, their network, their data, the site's secrets and the line in /etc/hosts")


def quickstart(suite: str) -> None:
    """Do it all, or what is left to do."""
    print(f"mlflow-kit quickstart: the whole stack on one Debian {suite} machine")
    began = time.monotonic()
    local_channel = None
    with phase("boot the machine and a client"):
        if not conda_forge_answers():
            local_channel = channel.make(suite, if_missing=True)
        addresses = boot(suite, local_channel)
    if local_channel:
        print("    no public conda channel is reached from here:")
        print(f"    Python comes from a channel made of Debian's own, {local_channel}")
    settings(suite, addresses, bool(local_channel))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        client = pool.submit(client_python, CLIENT)
        with phase("deploy (ansible-playbook -i inventories/quickstart site.yml)"):
            playbook("site.yml", log="deploy")
        playbook("playbooks/client.yml", log="client")
        with phase("give the client MLflow and scikit-learn"):
            client.result()
    with phase("train, log, register, load back, predict; 600 MB up and down"):
        lines = work(CLIENT, vm.CHECKOUT)
    for line in lines:
        print(f"    {line}")
    print(f"  {name_on_this_machine(addresses[MACHINE][0])}")
    print(f"done in {time.monotonic() - began:.0f} s")
    print(f"""
  UI         https://{NAME}   (certificate authority: ca.crt)
  user       mlflow
  password   in client.env: grep PASSWORD client.env
  client     set -a; . ./client.env; set +a   and any Python with mlflow just works
  machine    ssh -F {vm.SSH_CONFIG} {MACHINE}
  next       ansible-playbook -i inventories/quickstart site.yml --check --diff   (shows: nothing to change)
             docs/deploy.md for a machine of your own;  scripts/quickstart --down removes all of this""")


def main() -> None:
    """Command line: `quickstart [--suite trixie|bookworm] [--down]`."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument("--suite", choices=vm.SUITES, default="trixie", help="Debian 13 (trixie) or 12 (bookworm)")
    parser.add_argument("--down", action="store_true", help="remove all that it made")
    a = parser.parse_args()
    try:
        if a.down:
            down()
        else:
            quickstart(a.suite)
    except (Failed, vm.VmError) as error:
        sys.exit(f"scripts/quickstart: {error}")


if __name__ == "__main__":
    main()

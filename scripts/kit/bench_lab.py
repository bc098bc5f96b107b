"""The machines that benchmarks run on, and what both sides of a comparison need."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from kit import channel, quickstart, vm

PREFIX = f"kit-bench-{quickstart.OWN}"
KIT, GUIDE, CLIENT, NETWORK = f"{PREFIX}-kit", f"{PREFIX}-guide", f"{PREFIX}-client", PREFIX
NAME = "mlflow.bench.test"
# The client's side of a first run: poll until a run with a parameter and a metric is acknowledged.
FIRST_RUN = pathlib.Path(__file__).with_name("bench_first_run.py")


class BenchError(RuntimeError):
    """A measurement could not be made; the message says which step failed and what it printed."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One comparison: what `scripts/bench` prints as a line of JSON."""

    bench: str
    case: str
    unit: str
    better: str
    kit: float
    peer: float
    peer_name: str
    detail: dict[str, Any]

    def line(self) -> dict[str, Any]:
        """The measurement in the order of the contract, with `ratio`, kit over peer; none where the peer's is zero."""
        return {
            "bench": self.bench,
            "case": self.case,
            "unit": self.unit,
            "better": self.better,
            "kit": round(self.kit, 2),
            "peer": round(self.peer, 2),
            "peer_name": self.peer_name,
            "ratio": round(self.kit / self.peer, 3) if self.peer else None,
            "detail": self.detail,
        }


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each value that every round has, under the same names."""
    return {key: round(statistics.median(one[key] for one in rounds), 2) for key in rounds[0]} if rounds else {}


def cpu_seconds(name: str) -> float:
    """Processor time that the machine `name` has used since it was booted: steadier than the clock on a busy host."""
    return round(int(vm.podman("stats", "--no-stream", "--format", "{{.CPUNano}}", name)) / 1e9, 1)


def say(text: str) -> None:
    """Tell the person who waits; standard output is for measurements alone."""
    print(f"  {text}", file=sys.stderr, flush=True)


def pinned(lock: str, *names: str) -> list[str]:
    """What a hashed lock in requirements/ pins for `names`, as NAME==VERSION. Raises BenchError without a pin."""
    text = (vm.CHECKOUT / "requirements" / lock).read_text()
    found = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE))
    missing = [name for name in names if name not in found]
    if missing:
        raise BenchError(f"requirements/{lock} pins no {', '.join(missing)}")
    return [f"{name}=={found[name]}" for name in names]


class Lab:
    """Machines of one call, which all go when it ends."""

    def __init__(self, suite: str) -> None:
        """Remember the Debian release; nothing is booted yet."""
        self.suite = suite
        # What bench_api.fill has put where, by side.
        self.filled: dict[str, dict[str, Any]] = {}
        self.log = vm.CHECKOUT / ".cache" / "log"
        self.log.mkdir(parents=True, exist_ok=True)
        self.site = pathlib.Path()
        self.secret = pathlib.Path()
        self.local_channel: pathlib.Path | None = None
        self.deployed = False
        self.first_seconds = 0.0
        self._client_ready = False

    @contextlib.contextmanager
    def opened(self) -> Iterator[Lab]:
        """Make the bench's site, and at the end remove it with every machine."""
        folder = tempfile.mkdtemp(prefix="mlflow-kit-bench-")
        self.secret = pathlib.Path(folder)
        # Beside the other inventories, so that its relative link to the common wiring holds.
        self.site = pathlib.Path(tempfile.mkdtemp(prefix=".bench-", dir=vm.CHECKOUT / "inventories"))
        try:
            self.remove(KIT, GUIDE, CLIENT)
            if not quickstart.conda_forge_answers():
                self.local_channel = channel.make(self.suite, if_missing=True)
            yield self
        finally:
            self.remove(KIT, GUIDE, CLIENT)
            vm.down([], [NETWORK])
            shutil.rmtree(self.site, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self, *names: str) -> None:
        """Remove machines, with what they downloaded: the next of that name starts cold."""
        vm.down(names)
        for name in names:
            vm.podman("volume", "rm", "--force", f"mlflow-kit-apt-{name}-{self.suite}", check=False)
        if KIT in names:
            self.deployed = False
            self.filled.clear()

    def boot(self, name: str, *, aliases: Sequence[str] = ()) -> list[str]:
        """Boot a machine that was never used; no cache of any package manager is mounted."""
        self.remove(name)
        volumes = [f"{self.local_channel}:{quickstart.CHANNEL}:ro"] if self.local_channel and name == KIT else []
        return vm.up(name, suite=self.suite, networks=[NETWORK], aliases=aliases, volumes=volumes)

    def client(self) -> None:
        """Boot the client and give it a Python with MLflow, outside of anything measured."""
        if self._client_ready:
            return
        say("preparing the client")
        vm.up(
            CLIENT, suite=self.suite, networks=[NETWORK], volumes=[f"mlflow-kit-uv-{self.suite}:/var/cache/mlflow-kit"]
        )
        quickstart.client_python(CLIENT)
        vm.write(CLIENT, "/root/first_run.py", FIRST_RUN.read_bytes())
        # Its first import reads everything from disk: that, too, is not what is measured.
        vm.execute(CLIENT, "/opt/client/bin/python", "-W", "ignore", "-c", "import mlflow")
        self._client_ready = True

    def ssh(self, name: str, script: str, log: str) -> str:
        """Run a shell script in a machine as a person would, over ssh, and return what it printed."""
        argv = ["ssh", "-F", str(vm.SSH_CONFIG), name, "sh -s"]
        with (self.log / f"{log}.log").open("w") as file:
            done = subprocess.run(argv, input=script, text=True, stdout=subprocess.PIPE, stderr=file)
        with (self.log / f"{log}.log").open("a") as file:
            file.write(done.stdout)
        if done.returncode:
            raise BenchError(f"{log} failed:\n{(self.log / f'{log}.log').read_text()[-4000:]}")
        return done.stdout

    def await_run(self, env: str) -> subprocess.Popen[str]:
        """Start the client's polling with the environment file at `env`, which need not be there yet."""
        script = (
            f"while ! [ -s {env} ]; do sleep 0.1; done; set -a; . {env}; set +a; "
            "exec /opt/client/bin/python -W ignore /root/first_run.py"
        )
        argv = ["ssh", "-F", str(vm.SSH_CONFIG), CLIENT, script]
        return subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def write_site(self) -> None:
        """Write the inventory: a copy of inventories/single for the bench's machine, with secrets of its own."""
        shutil.rmtree(self.site)
        shutil.copytree(vm.CHECKOUT / "inventories" / "single", self.site, symlinks=True)
        group_vars = self.site / "group_vars" / "all"
        for left in ("vault.yml", ".vault.lock"):
            (group_vars / left).unlink(missing_ok=True)
        groups: dict[str, Any] = {
            group: {"hosts": {"bench": {}}} for group in ("database", "object_store", "mlflow", "gateway")
        }
        host = {"ansible_host": KIT, "ansible_user": "root", "ansible_ssh_args": f"-F {vm.SSH_CONFIG}"}
        hosts = {"all": {"hosts": {"bench": host}, "children": groups}}
        (self.site / "hosts.yml").write_text(yaml.safe_dump(hosts))
        allow = [*vm.addresses(CLIENT), *vm.gateways(NETWORK)]
        settings: dict[str, Any] = {
            "site_public_name": NAME,
            "site_allow": [{"cidr": f"{a}/{128 if ':' in a else 32}", "description": "bench"} for a in allow],
            "conda_env_python": quickstart.PYTHONS[self.suite],
        }
        if self.local_channel:
            settings["conda_env_channels"] = [f"file://{quickstart.CHANNEL}"]
        if index := vm.python_index():
            settings["conda_env_index_url"] = index
        (group_vars / "site.yml").write_text(yaml.safe_dump(settings))
        password = self.secret / "vault-password"
        password.write_text(os.urandom(24).hex())
        password.chmod(0o600)

    def playbook(self, *argv: str, log: str) -> str:
        """Run ansible-playbook on the bench's site and return its output. Raises BenchError with the output's end."""
        env = os.environ | {"MLFLOW_KIT_VAULT_PASSWORD_FILE": str(self.secret / "vault-password")}
        command = ["ansible-playbook", "-i", str(self.site), *argv, "-e", f"client_env_path={self.secret}/client.env"]
        with (self.log / f"{log}.log").open("w") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=vm.CHECKOUT, env=env, stdin=subprocess.DEVNULL
            )
        text = (self.log / f"{log}.log").read_text()
        if done.returncode:
            raise BenchError(f"{shlex.join(command)} failed:\n{text[-6000:]}")
        return text

    def hand_over(self) -> None:
        """Give the client what playbooks/client.yml wrote; the environment last, since the client waits for it."""
        vm.write(CLIENT, "/root/ca-bundle.crt", (self.secret / "ca-bundle.crt").read_bytes())
        env = (self.secret / "client.env").read_text().replace(str(self.secret), "/root")
        vm.write(CLIENT, "/root/kit.env.new", env.encode())
        vm.execute(CLIENT, "mv", "/root/kit.env.new", "/root/kit.env")

    def deploy_kit(self, log: str = "bench-kit") -> tuple[float, float, str]:
        """Deploy the kit on a new machine and log a run; returns seconds to both, and Ansible's output.

        Both sides' clients know from the beginning where the server will be and how to log in, and ask until it
        answers: the kit's by client.yml, which needs no host.
        """
        self.client()
        self.boot(KIT, aliases=[NAME])
        self.write_site()
        vm.execute(CLIENT, "rm", "-f", "/root/kit.env")
        (self.secret / "client.env").unlink(missing_ok=True)
        waiting = self.await_run("/root/kit.env")
        began = time.monotonic()
        try:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                first_run = pool.submit(self._first_run, waiting)
                output = self.playbook("playbooks/client.yml", "site.yml", log=log)
                deployed = self.first_seconds = time.monotonic() - began
                logged = first_run.result() - began
        finally:
            waiting.kill()
        self.deployed = True
        return deployed, logged, output

    def _first_run(self, waiting: subprocess.Popen[str]) -> float:
        """Hand over what client.yml writes as soon as it has, and return the monotonic time of the first run."""
        until = time.monotonic() + 300
        while not (self.secret / "client.env").exists():
            if time.monotonic() > until:
                raise BenchError("no client.env was written within 300 s")
            time.sleep(0.1)
        self.hand_over()
        return ended(waiting)


def ended(waiting: subprocess.Popen[str]) -> float:
    """Wait for a client's first run and return the monotonic time of its end. Raises BenchError when it fails."""
    try:
        out, _ = waiting.communicate(timeout=600)
    except subprocess.TimeoutExpired as error:
        raise BenchError("no run was logged within 600 s") from error
    if waiting.returncode:
        raise BenchError(f"the first run failed:\n{out[-3000:]}")
    return time.monotonic()

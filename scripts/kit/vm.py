"""Systemd containers that stand in for virtual machines: made by podman, reached by ssh.

The image is bootstrapped from the distribution's mirror, so no container registry is needed.
Every machine is reached through one ssh configuration, `SSH_CONFIG`, by its name.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mlflow-kit"
SSH_CONFIG = CACHE / "ssh_config"
SSH_KEY = CACHE / "ssh_key"
LABEL = "mlflow-kit"
SUITES = ("trixie", "bookworm")
PACKAGES = (
    "systemd,systemd-sysv,dbus,python3,python3-apt,sudo,ca-certificates,iproute2,openssh-server,libpam-systemd,procps"
)
# Credentials reach a service by mounts that must propagate, which a container's root does not do by itself.
RSHARED = """[Unit]
Description=Let mounts propagate, as on a machine
DefaultDependencies=no
Before=sysinit.target
[Service]
Type=oneshot
ExecStart=/bin/mount --make-rshared /
[Install]
WantedBy=sysinit.target
"""
# What a hypervisor without CAP_SYS_RESOURCE and with a hybrid cgroup hierarchy needs.
MODEST = """[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
"""


class VmError(RuntimeError):
    """A machine could not be made; the message says what the engine answered."""


def _call(argv: Sequence[str], *, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, text=True, capture_output=True, input=stdin)
    if check and done.returncode:
        raise VmError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done


def _engine_argv() -> list[str]:
    prefix = [] if os.geteuid() == 0 else ["sudo"]
    conf = CACHE / "containers.conf"
    if conf.exists():
        prefix = [*prefix, "env", f"CONTAINERS_CONF={conf}"]
    return [*prefix, "podman"]


def podman(*argv: str, check: bool = True) -> str:
    """Run podman with `argv` and return what it prints. Raises VmError when `check` and it fails."""
    return _call([*_engine_argv(), *argv], check=check).stdout.strip()


def execute(name: str, *argv: str, check: bool = True) -> str:
    """Run `argv` as root in the machine `name` and return its standard output."""
    return podman("exec", name, *argv, check=check)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def apt_sources(suite: str) -> list[str]:
    """Source lines for `suite` (a Debian code name) on the mirrors that this host itself is set up for."""
    text = ""
    for path in [pathlib.Path("/etc/apt/sources.list"), *sorted(pathlib.Path("/etc/apt/sources.list.d").glob("*"))]:
        if path.is_file():
            text += path.read_text(errors="replace") + "\n"
    found = re.findall(r"^[^#\n]*?(https?://\S+?)/?(?=\s|$)", text, re.MULTILINE)
    main = os.environ.get("KIT_APT_MIRROR") or next((u for u in found if u.endswith("/debian")), "")
    security = os.environ.get("KIT_APT_SECURITY_MIRROR") or next(
        (u for u in found if u.endswith("/debian-security")), ""
    )
    if not main:
        return []
    lines = [f"deb {main} {suite} main", f"deb {main} {suite}-updates main"]
    return [*lines, f"deb {security} {suite}-security main"] if security else lines


def image(suite: str) -> str:
    """Make the systemd image of a Debian `suite` unless it is there, and return its name."""
    authorities = sorted(pathlib.Path("/usr/local/share/ca-certificates").glob("**/*.crt"))
    recipe = hashlib.sha256((PACKAGES + RSHARED + str(apt_sources(suite))).encode())
    for path in authorities:
        recipe.update(path.read_bytes())
    name = f"localhost/mlflow-kit-vm:{suite}-{recipe.hexdigest()[:12]}"
    with _lock():
        if _call([*_engine_argv(), "image", "exists", name], check=False).returncode:
            print(f"bootstrapping the image of Debian {suite}", file=sys.stderr)
            _bootstrap(suite, name, authorities)
        _probe(name)
    return name


def _bootstrap(suite: str, name: str, authorities: Sequence[pathlib.Path]) -> None:
    with tempfile.TemporaryDirectory(prefix="mlflow-kit-") as work:
        tar, unit = f"{work}/image.tar", pathlib.Path(work) / "kit-rshared.service"
        unit.write_text(RSHARED)
        hooks = [f"copy-in {unit} /etc/systemd/system", 'chroot "$1" systemctl -q enable kit-rshared.service']
        if authorities:
            hooks.append(f"copy-in {' '.join(map(str, authorities))} /usr/local/share/ca-certificates")
        hooks += [
            'chroot "$1" update-ca-certificates >/dev/null',
            'printf "127.0.0.1 localhost\\n::1 localhost ip6-localhost ip6-loopback\\n" > "$1/etc/hosts"',
            ': > "$1/etc/machine-id"',
            'echo force-unsafe-io > "$1/etc/dpkg/dpkg.cfg.d/kit"',
            'printf \'Acquire::Languages "none";\\n\' > "$1/etc/apt/apt.conf.d/90kit"',
        ]
        sudo = [] if os.geteuid() == 0 else ["sudo"]
        argv = [*sudo, "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={PACKAGES}"]
        argv += [f"--customize-hook={hook}" for hook in hooks]
        _call([*argv, suite, tar, *apt_sources(suite)])
        podman("import", "--change", "CMD=/sbin/init", "--change", "STOPSIGNAL=SIGRTMIN+3", tar, name)


def _probe(name: str) -> None:
    """Find out once whether podman runs as it is here, or needs the modest settings."""
    done, conf = CACHE / "probed", CACHE / "containers.conf"
    if done.exists():
        return
    probe = ("run", "--rm", "--network=none", name, "true")
    if _call([*_engine_argv(), *probe], check=False).returncode:
        conf.write_text(MODEST)
        _call([*_engine_argv(), *probe])
    done.touch()


def network(name: str) -> None:
    """Make the bridge network `name`, IPv6 too where the kernel has it, unless it is there."""
    with _lock():
        if not _call([*_engine_argv(), "network", "exists", name], check=False).returncode:
            return
        argv = ["network", "create", "--label", LABEL]
        if pathlib.Path("/proc/net/if_inet6").exists():
            argv.append("--ipv6")
        podman(*argv, name)


def addresses(name: str) -> list[str]:
    """The machine's addresses, IPv4 first."""
    networks = json.loads(podman("inspect", name, "--format", "{{json .NetworkSettings.Networks}}"))
    found = [n[key] for key in ("IPAddress", "GlobalIPv6Address") for n in networks.values() if n.get(key)]
    return [str(ipaddress.ip_address(address)) for address in found]


def gateways(name: str) -> list[str]:
    """The host's own addresses on the network `name`: how its containers see this machine."""
    found = json.loads(podman("network", "inspect", name))[0]["subnets"]
    return [str(ipaddress.ip_address(subnet["gateway"])) for subnet in found]


def python_index() -> str:
    """The Python package index that this machine is set up for, or nothing for the tools' default."""
    for variable in ("UV_DEFAULT_INDEX", "PIP_INDEX_URL"):
        if os.environ.get(variable):
            return os.environ[variable]
    done = _call([sys.executable, "-m", "pip", "config", "get", "global.index-url"], check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def write(name: str, path: str, data: bytes) -> None:
    """Write `data` to `path` in the machine `name`, readable by root alone."""
    argv = [*_engine_argv(), "exec", "-i", name, "sh", "-c", 'umask 077; cat > "$1"', "sh", path]
    done = subprocess.run(argv, input=data, capture_output=True)
    if done.returncode:
        raise VmError(f"cannot write {path} in {name}: {done.stderr.decode(errors='replace')}")


def running(name: str) -> bool:
    """Whether the machine `name` exists and runs."""
    return podman("inspect", name, "--format", "{{.State.Running}}", check=False) == "true"


def exists(name: str) -> bool:
    """Whether there is a machine `name`, running or not."""
    return _call([*_engine_argv(), "container", "exists", name], check=False).returncode == 0


def up(
    name: str,
    *,
    suite: str = "trixie",
    networks: Sequence[str] = (LABEL,),
    aliases: Sequence[str] = (),
    volumes: Sequence[str] = (),
    run_args: Sequence[str] = (),
) -> list[str]:
    """Boot the machine `name` unless it runs, wait until systemd is up, and return its addresses.

    `volumes` are podman's `SOURCE:TARGET[:OPTIONS]`; `aliases` are further names in the networks' DNS.
    Raises VmError with the failed units when it does not come up within 60 s.
    """
    if not exists(name):
        made = image(suite)
        for net in networks:
            network(net)
        argv = ["run", "--detach", f"--name={name}", f"--hostname={name}", f"--label={LABEL}"]
        argv += ["--systemd=always", "--cap-add=SYS_ADMIN,NET_ADMIN,SYS_PTRACE", "--no-hosts"]
        argv += [f"--network={net}" for net in networks] + [f"--network-alias={a}" for a in aliases]
        argv += [f"--volume={v}" for v in (f"mlflow-kit-apt-{name}-{suite}:/var/cache/apt/archives", *volumes)]
        argv += [f"--volume={v}" for v in _kept_code()]
        podman(*argv, *run_args, made, "/sbin/init")
        # An emptied folder of lists looks fresh to Ansible: set its time back.
        execute(name, "touch", "-d", "@0", "/var/lib/apt/lists")
    elif not running(name):
        podman("start", name)
    _wait(name)
    _authorize(name)
    return addresses(name)


def _kept_code() -> list[str]:
    """Mounts for machines of tests: see tests/kept/machine. A machine that something is measured on has none."""
    if not os.environ.get("KIT_KEPT_CODE"):
        return []
    folder = CACHE / "code"
    folder.mkdir(parents=True, exist_ok=True)
    packages = "/usr/lib/python3/dist-packages"
    source = CHECKOUT / "tests" / "kept" / "machine"
    return [
        f"{folder}:/var/cache/kit-code",
        *(f"{source}/{name}:{packages}/{name}:ro" for name in ("kit_kept_code.py", "kit_kept_code.pth")),
    ]


def restart(name: str) -> None:
    """Reboot the machine `name` and wait until systemd is up again."""
    _hang_up(name)
    podman("restart", "--time=60", name)
    _wait(name)
    write_ssh_config()


def _wait(name: str) -> None:
    state = ""
    for _ in range(240):
        state = execute(name, "systemctl", "is-system-running", check=False)
        if state in ("running", "degraded"):
            break
        time.sleep(0.25)
    if state != "running":
        failed = execute(name, "systemctl", "--failed", "--no-pager", "--plain", check=False)
        if state != "degraded":
            raise VmError(f"{name} did not boot: systemd is «{state}»\n{failed}")
        print(f"{name}: systemd is degraded\n{failed}", file=sys.stderr)


def _authorize(name: str) -> None:
    with _lock():
        if not SSH_KEY.exists():
            _call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", LABEL, "-f", str(SSH_KEY)])
    public = SSH_KEY.with_suffix(".pub").read_text()
    script = f"install -d -m 700 ~root/.ssh && echo '{public.strip()}' > ~root/.ssh/authorized_keys"
    execute(name, "sh", "-c", script)
    write_ssh_config()


def write_ssh_config() -> None:
    """Write `SSH_CONFIG` for every machine of this host that runs."""
    with _lock():
        names = podman("ps", "--filter", f"label={LABEL}", "--format", "{{.Names}}").split()
        text = ""
        for name in sorted(names):
            found = addresses(name)
            text += f"Host {name}\n  HostName {found[0]}\n" if found else ""
        text += (
            f"Host *\n  User root\n  IdentityFile {SSH_KEY}\n  IdentitiesOnly yes\n  LogLevel ERROR\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
            f"  ControlMaster auto\n  ControlPath {CACHE}/ssh-%C\n  ControlPersist 120\n"
        )
        new = SSH_CONFIG.with_suffix(".new")
        new.write_text(text)
        new.replace(SSH_CONFIG)


def _hang_up(name: str) -> None:
    """Close the shared ssh connection: the next machine of that name would not answer on it."""
    if SSH_CONFIG.exists():
        _call(["ssh", "-F", str(SSH_CONFIG), "-O", "exit", name], check=False)


def down(names: Sequence[str], networks: Sequence[str] = ()) -> None:
    """Remove the machines `names` and then the `networks`; those that are not there are no error."""
    for name in names:
        _hang_up(name)
        podman("rm", "--force", "--ignore", "--time=5", "--volumes", name)
    for net in networks:
        podman("network", "rm", "--force", net, check=False)
    write_ssh_config()


def main() -> None:
    """Command line: `vm up|down|restart|exec|image|address ...`."""
    parser = argparse.ArgumentParser(prog="scripts/vm", description="Containers that stand in for virtual machines.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    boot = verbs.add_parser("up", help="boot machines")
    boot.add_argument("names", nargs="+")
    boot.add_argument("--suite", choices=SUITES, default="trixie")
    boot.add_argument("--network", action="append", default=[])
    boot.add_argument("--alias", action="append", default=[])
    boot.add_argument("--volume", action="append", default=[])
    boot.add_argument("--run-arg", action="append", default=[])
    remove = verbs.add_parser("down", help="remove machines and networks")
    remove.add_argument("names", nargs="*")
    remove.add_argument("--network", action="append", default=[])
    for verb, text in (("restart", "reboot a machine"), ("address", "print a machine's addresses")):
        verbs.add_parser(verb, help=text).add_argument("name")
    verbs.add_parser("image", help="make the image of a suite").add_argument("suite", choices=SUITES)
    a = parser.parse_args()
    try:
        if a.verb == "up":
            for name in a.names:
                found = up(
                    name,
                    suite=a.suite,
                    networks=a.network or [LABEL],
                    aliases=a.alias,
                    volumes=a.volume,
                    run_args=a.run_arg,
                )
                print(name, *found)
        elif a.verb == "down":
            down(a.names, a.network)
        elif a.verb == "restart":
            restart(a.name)
        elif a.verb == "address":
            print(*addresses(a.name))
        else:
            print(image(a.suite))
    except VmError as error:
        sys.exit(f"scripts/vm: {error}")


if __name__ == "__main__":
    main()

#!/usr/bin/python3
"""Builds, switches and verifies immutable conda environments; no conda binary is needed.

An environment's name is the hash of what it is made of, and its folder is its final place, since prefixes are
written into files. It counts from the moment its marker exists, which is written last, after everything else
has reached the disk; what has no marker is thrown away and built anew. Which one is live is a symbolic link,
replaced in one step by a verb of its own.

A plan is a JSON object, in a file or on standard input (`-`); role conda_env writes it. Each verb prints one
JSON object; a failure is a plain sentence on standard error and exit status 1.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import csv
import ctypes
import fcntl
import hashlib
import importlib
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

FORMAT = 1  # raise it when a build gives something else from the same plan
PLAN = "/var/lib/mlflow-kit-conda-env.json"
OWN = ".mlflow-kit"  # our folder inside an environment
MARKER = f"{OWN}/complete.json"
USED = ".used.json"  # beside the environments: which were live, in order, and which were left for good
NAME = re.compile(r"[0-9a-f]{16}")
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# Test suites that packages carry are never imported by a service: a third of the compiling is saved.
NOT_COMPILED = r"/(tests?|idlelib|turtledemo|lib2to3)/"

Plan = Mapping[str, Any]


class BuildError(RuntimeError):
    """A step cannot be done; the message names the step, and what its tool said."""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha256_of(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _without_credentials(text: str) -> str:
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)


# ---------------------------------------------------------------- what is wanted


def read_plan(source: str) -> Plan:
    """Read a plan from a file's path or from standard input (`-`). Raises BuildError when its locks are damaged."""
    text = sys.stdin.read() if source == "-" else pathlib.Path(source).read_text()
    plan: Plan = json.loads(text)
    for lock in ("requirements", "tools"):
        if lock in plan and _sha256("\n".join(plan[lock]).encode()) != plan[f"{lock}_sha256"]:
            raise BuildError(f"the lock «{lock}» in the plan is not the one that its hash names")
    return plan


def channels(plan: Plan) -> list[str]:
    """Return the channels that a build really uses: those of the offline directory instead of all others."""
    if plan["offline_directory"]:
        return [pathlib.Path(plan["offline_directory"], "channel").as_uri()]
    return list(plan["channels"])


def specs(plan: Plan) -> list[str]:
    """Return the conda specs to solve for."""
    return [f"python {plan['python']}.*", *plan["packages"]]


def identity(plan: Plan) -> dict[str, Any]:
    """Return everything that makes one environment differ from another."""
    return {
        "format": FORMAT,
        "machine": platform.machine(),
        "specs": specs(plan),
        "channels": channels(plan),
        "channel_alias": "" if plan["offline_directory"] else plan["channel_alias"],
        "existing_conda": plan["existing_conda"],
        "requirements_sha256": plan["requirements_sha256"],
    }


def name_of(plan: Plan) -> str:
    """Return the environment's name: 16 hexadecimal digits of the hash of its identity."""
    return _sha256(json.dumps(identity(plan), sort_keys=True).encode())[:16]


def is_complete(prefix: pathlib.Path) -> bool:
    """Whether a build of `prefix` has ended."""
    return (prefix / MARKER).is_file()


def environments(root: pathlib.Path) -> list[pathlib.Path]:
    """Return every environment in `root`, whole or not."""
    return [p for p in root.iterdir() if NAME.fullmatch(p.name) and not p.is_symlink()] if root.is_dir() else []


def live_name(plan: Plan) -> str:
    """Return the name of the environment that the link leads to, or an empty string."""
    try:
        target = pathlib.Path(plan["link"]).readlink()
    except OSError:
        return ""
    return target.name if target.parent == pathlib.Path(plan["root"]) else ""


def used(root: pathlib.Path) -> dict[str, list[str]]:
    """Return `live`, the names that were live one after the other, and `left`, those that a way back was taken from."""
    try:
        found = json.loads((root / USED).read_text())
    except (OSError, ValueError):
        found = {}
    return {key: [str(name) for name in found.get(key, [])] for key in ("live", "left")}


def previous_name(plan: Plan) -> str:
    """Return the environment to go back to: the last that was live before the live one and is still there."""
    root, live = pathlib.Path(plan["root"]), live_name(plan)
    before = [name for name in used(root)["live"] if name != live and is_complete(root / name)]
    return before[-1] if before else ""


def version_in(prefix: pathlib.Path, package: str) -> str:
    """Return the version of a Python package in an environment, or an empty string."""
    wanted = package.lower().replace("-", "_")
    for folder in _site_packages(prefix):
        for found in folder.glob("*.dist-info"):
            name, _, version = found.name.removesuffix(".dist-info").partition("-")
            if name.lower() == wanted:
                return version
    return ""


def held(plan: Plan) -> str:
    """Say why the live environment is to stay although another one is wanted; an empty string when it need not."""
    root, live, wanted = pathlib.Path(plan["root"]), live_name(plan), name_of(plan)
    guard = plan.get("guard", "")
    if not guard or not live or live == wanted or not is_complete(root / live):
        return ""
    runs = version_in(root / live, guard)
    if runs != plan["guard_version"]:
        return f"{guard} {runs} is live and the lock has {plan['guard_version']}"
    if wanted in used(root)["left"]:
        return f"the environment of the lock ({wanted}) was rolled back from"
    return ""


def tools_of(plan: Plan) -> pathlib.Path:
    """Return the folder of the tools' virtual environment for this plan."""
    key = _sha256(f"{FORMAT} {platform.python_version()} {plan['tools_sha256']}".encode())[:16]
    return pathlib.Path(plan["root"], ".tools", key)


def status(plan: Plan) -> dict[str, Any]:
    """Say what the plan's environment is called, and whether it is there and live."""
    root, name = pathlib.Path(plan["root"]), name_of(plan)
    return {
        "name": name,
        "prefix": str(root / name),
        "complete": is_complete(root / name),
        "tools": (tools_of(plan) / "complete").exists(),
        "live": live_name(plan),
        "kept": (kept := sorted(p.name for p in environments(root) if is_complete(p))),
        "previous": previous_name(plan),
        "held": held(plan),
        "versions": {name: version_in(root / name, plan["guard"]) for name in kept} if plan.get("guard") else {},
    }


# ---------------------------------------------------------------- how children run


class Work:
    """The lock on a root folder, the children that run under it, and the phases' durations in seconds."""

    def __init__(self, lock: int) -> None:
        """Take over the locked file descriptor `lock`."""
        self.lock = lock
        self.phases: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase."""
        start = time.monotonic()
        yield
        self.phases[name] = round(time.monotonic() - start, 2)

    def call(
        self, what: str, argv: Sequence[str], *, env: Mapping[str, str], stdin: str = "", may_fail: bool = False
    ) -> str:
        """Run `argv` and return its standard output. Raises BuildError with what it said.

        A child dies with the builder, and holds the lock until it has: nobody builds where an orphan still writes.
        """
        done = subprocess.run(
            argv,
            check=False,
            text=True,
            capture_output=True,
            env=env,
            input=stdin,
            pass_fds=(self.lock,),
            preexec_fn=_die_with_parent,
        )
        if done.returncode and not may_fail:
            said = _without_credentials((done.stderr or done.stdout).strip())[-4000:]
            raise BuildError(f"{what} failed (exit status {done.returncode}):\n{said}")
        return done.stdout


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def locked(root: pathlib.Path, *, wait: bool = True) -> Iterator[Work | None]:
    """Hold the lock of `root`; with `wait` false, yield None when somebody else does."""
    root.mkdir(parents=True, exist_ok=True)
    # Who may open the file may hold the lock for ever: that is root alone.
    lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    held = False
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield Work(lock) if held else None
    finally:
        os.close(lock)


def base_environment(plan: Plan) -> dict[str, str]:
    """Return the environment of every child: the caller's (proxies), without what would lead a Python astray."""
    led_astray = ("PYTHON", "VIRTUAL_ENV", "CONDA_", "MAMBA_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(led_astray)}
    env |= {"LC_ALL": "C.UTF-8", "HOME": env.get("HOME", "/root"), "PIP_CACHE_DIR": f"{plan['cache']}/pip"}
    env |= {"PATH": env.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), "UV_CACHE_DIR": f"{plan['cache']}/uv"}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "UV_NO_PROGRESS": "1", "UV_SYSTEM_CERTS": "1"}
    if plan["ca_file"]:
        ca_file = str(plan["ca_file"])
        env |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CONDA_SSL_VERIFY"), ca_file)
        env.pop("SSL_CERT_DIR", None)
    if plan["offline_directory"]:
        env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": f"{plan['offline_directory']}/wheels"}
        env |= {"UV_NO_INDEX": "1", "UV_FIND_LINKS": f"{plan['offline_directory']}/wheels", "UV_OFFLINE": "1"}
    elif plan["index_url"]:
        env |= {"PIP_INDEX_URL": plan["index_url"], "UV_DEFAULT_INDEX": plan["index_url"]}
        env |= {"PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1"}
        for other in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "UV_INDEX", "UV_INDEX_URL"):
            env.pop(other, None)
    return env


def uv_settings_of_pip(listing: str) -> dict[str, str]:
    """Translate what `pip config list` prints into uv's environment: uv does not read pip's configuration."""
    found: dict[str, str] = {}
    for section in ("global.", "install.", ":env:."):  # the later one wins, as for pip
        for line in listing.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(section):
                with contextlib.suppress(ValueError, SyntaxError):
                    found[key.removeprefix(section)] = str(ast.literal_eval(value))

    def urls(key: str) -> list[str]:
        # pip only warns about a local folder that is not there; uv would stop.
        local = [(u, urllib.parse.urlsplit(u)) for u in found.get(key, "").split()]
        return [u for u, s in local if s.scheme not in ("", "file") or pathlib.Path(s.path).exists()]

    settings = {
        "UV_DEFAULT_INDEX": found.get("index-url", ""),
        "UV_INDEX": " ".join(urls("extra-index-url")),
        "UV_FIND_LINKS": ",".join(urls("find-links")),
        "UV_NO_INDEX": "1" if found.get("no-index", "").lower() in ("1", "true", "yes", "on") else "",
        "UV_INSECURE_HOST": " ".join(found.get("trusted-host", "").split()),
        "SSL_CERT_FILE": found.get("cert", ""),
        "HTTPS_PROXY": found.get("proxy", ""),
        "HTTP_PROXY": found.get("proxy", ""),
    }
    if settings["UV_INDEX"]:  # pip takes the best of all indexes; the lock's hashes make that safe
        settings["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {key: value for key, value in settings.items() if value}


def _pip_wheel() -> str:
    wheels = sorted(pathlib.Path("/usr/share/python-wheels").glob("pip-*.whl"))
    if not wheels:
        raise BuildError("the distribution's pip is not installed: package python3-pip-whl")
    return str(wheels[-1])


def uv_environment(plan: Plan, work: Work) -> dict[str, str]:
    """Return the environment that uv runs in: the host's own configuration of pip where uv has none."""
    env = base_environment(plan)
    own = ("/etc/uv/uv.toml", f"{env['HOME']}/.config/uv/uv.toml")
    told = any(key in env for key in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_NO_INDEX"))
    if not told and not any(pathlib.Path(path).exists() for path in own):
        argv = ["/usr/bin/python3", "-m", "pip", "config", "list"]
        listing = work.call("reading pip's configuration", argv, env=env | {"PYTHONPATH": _pip_wheel()})
        env = uv_settings_of_pip(listing) | env
    return env


# ---------------------------------------------------------------- the build


def ensure_tools(plan: Plan, work: Work) -> pathlib.Path:
    """Install the solver and uv from their hashed lock unless they are there; return their bin folder."""
    folder = tools_of(plan)
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        env = base_environment(plan)
        # pip runs from its own wheel: laying it out in each environment costs seconds and serves nobody.
        work.call(
            "making the tools' environment", ["/usr/bin/python3", "-m", "venv", "--without-pip", str(folder)], env=env
        )
        lock = folder / "requirements.txt"
        lock.write_text("\n".join(plan["tools"]) + "\n")
        argv = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"]
        argv += ["--require-hashes", "--only-binary=:all:", "--requirement", str(lock)]
        work.call("installing the tools", argv, env=env | {"PYTHONPATH": _pip_wheel()})
        _sync(folder)
        (folder / "complete").touch()
    return folder / "bin"


def install_conda_part(plan: Plan, prefix: pathlib.Path, tools: pathlib.Path, work: Work) -> None:
    """Solve for the conda packages and install them into the new folder `prefix`."""
    env, what = base_environment(plan), f"the conda part ({', '.join(specs(plan))} from {', '.join(channels(plan))})"
    if not plan["existing_conda"]:
        argv = [f"{tools}/python", "-I", str(pathlib.Path(__file__).resolve()), "_conda", str(prefix)]
        work.phases |= json.loads(work.call(what, argv, env=env, stdin=json.dumps(dict(plan))))
        return
    base = pathlib.Path(plan["existing_conda"])
    binary = next((p for p in (base / "bin/conda", base / "condabin/conda") if os.access(p, os.X_OK)), None)
    if binary is None:
        raise BuildError(f"there is no bin/conda below conda_env_existing_conda: {base}")
    argv = [str(binary), "create", "--yes", "--quiet", "--copy", "--no-default-packages", "--prefix", str(prefix)]
    argv += ["--override-channels", *[word for channel in channels(plan) for word in ("--channel", channel)]]
    argv += ["--offline"] if plan["offline_directory"] else []
    argv += [f"python={plan['python']}", *plan["packages"]]  # one = stands for .* too
    env |= {"CONDA_PKGS_DIRS": f"{plan['cache']}/conda", "CONDA_REGISTER_ENVS": "false"}
    if plan["channel_alias"]:
        env["CONDA_CHANNEL_ALIAS"] = plan["channel_alias"]
    with work.phase("conda_s"):
        work.call(what, argv, env=env)


def install_python_packages(plan: Plan, prefix: pathlib.Path, tools: pathlib.Path, work: Work) -> None:
    """Install the hashed lock with uv, check that it fits together, and compile bytecode on all cores."""
    env = uv_environment(plan, work)
    lock = prefix / OWN / "requirements.txt"
    lock.write_text("\n".join(plan["requirements"]) + "\n")
    python = f"{prefix}/bin/python"
    common = ["--python", python, "--no-python-downloads"]
    with work.phase("pip_s"):
        # Copies, because a write through a hard link would change the cache too.
        argv = [f"{tools}/uv", "pip", "install", *common, "--require-hashes", "--no-deps", "--only-binary=:all:"]
        work.call("installing the Python packages", [*argv, "--link-mode=copy", "--requirements", str(lock)], env=env)
        work.call("checking the Python packages", [f"{tools}/uv", "pip", "check", *common], env=env)
    with work.phase("bytecode_s"):
        # The service's user may not write here, so what is not compiled now is compiled at each of its starts.
        # A standard library brings its own, as hashes or as time stamps: only the packages are left to do.
        folders = [p for p in prefix.glob("lib/python3*") if not (p / "__pycache__").is_dir()] or _site_packages(prefix)
        argv = [python, "-I", "-m", "compileall", "-q", "-q", "-j0", "-x", NOT_COMPILED, *map(str, folders)]
        work.call("compiling bytecode", argv, env=env, may_fail=True)  # some packages carry files of other Pythons
    work.call("starting the new Python", [python, "-I", "-c", "import ctypes, sqlite3, ssl"], env=env)


def _make_readable(prefix: pathlib.Path) -> None:
    """Let everybody read and nobody but root write, whatever the archives said."""
    for folder, _, files in os.walk(prefix):
        for path in (folder, *[os.path.join(folder, file) for file in files]):  # noqa: PTH118 - 50,000 times
            mode = stat.S_IMODE((found := os.lstat(path)).st_mode)
            if stat.S_ISLNK(found.st_mode):
                continue
            everybody = stat.S_IRGRP | stat.S_IROTH | ((stat.S_IXGRP | stat.S_IXOTH) if mode & stat.S_IXUSR else 0)
            if (wanted := (mode | everybody) & ~WRITABLE_BY_OTHERS) != mode:
                os.chmod(path, wanted)  # noqa: PTH101


def _sync(path: pathlib.Path) -> None:
    """Wait until everything on the file system of `path` has reached the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(opened):
            raise OSError(ctypes.get_errno(), f"cannot sync {path}")
    finally:
        os.close(opened)


def _write_durably(path: pathlib.Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: pathlib.Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def build(plan: Plan) -> dict[str, Any]:
    """Build the plan's environment unless it is there; a build that is under way elsewhere is waited for.

    Returns `changed`, `name`, `prefix`, whether it is `live` already, and each phase's duration in seconds.
    """
    root, name = pathlib.Path(plan["root"]), name_of(plan)
    prefix = root / name
    result: dict[str, Any] = {"changed": False, "name": name, "prefix": str(prefix)}
    started = time.monotonic()
    if not is_complete(prefix):
        with locked(root) as work:
            assert work is not None  # noqa: S101 - only without `wait`
            waited = time.monotonic() - started
            if not is_complete(prefix):
                work.phases["wait_s"] = round(waited, 2)
                _build(plan, prefix, work)
                work.phases["total_s"] = round(time.monotonic() - started, 2)
                result |= {"changed": True, "phases": work.phases}
    return result | {"live": live_name(plan) == name}


def _build(plan: Plan, prefix: pathlib.Path, work: Work) -> None:
    if plan["offline_directory"]:
        for part in ("channel", "wheels"):
            if not pathlib.Path(plan["offline_directory"], part).is_dir():
                raise BuildError(f"conda_env_offline_directory has no folder «{part}»: {plan['offline_directory']}")
    with work.phase("clean_s"):
        for left in environments(prefix.parent):
            if not is_complete(left) and left.name != live_name(plan):
                shutil.rmtree(left)
        if prefix.exists():
            shutil.rmtree(prefix)
    with work.phase("tools_s"):
        tools = ensure_tools(plan, work)
    install_conda_part(plan, prefix, tools, work)
    (prefix / OWN).mkdir()
    install_python_packages(plan, prefix, tools, work)
    with work.phase("finish_s"):
        _make_readable(prefix)
        marker = {"name": prefix.name, "identity": identity(plan), "records_sha256": records_sha256(prefix)}
        marker |= {"built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "phases": work.phases}
        _sync(prefix)
        _write_durably(prefix / MARKER, json.dumps(marker, indent=1) + "\n")
        _sync_folder(prefix)
        _sync_folder(prefix.parent)


# ---------------------------------------------------------------- the solver, inside the tools' Python


async def _solve_and_install(plan: Plan, prefix: pathlib.Path) -> dict[str, float]:
    rattler = importlib.import_module("rattler")
    config = rattler.Config()
    config.set("allow-hard-links", "false")  # or a write in the environment changes the cache too
    config.set("tls-root-certs", "system")
    client = rattler.Client.from_config(config)
    start = time.monotonic()
    alias = (str(plan["channel_alias"]).rstrip("/") + "/",) if plan["channel_alias"] else ()
    sources = [rattler.Channel(name, rattler.ChannelConfig(*alias)) for name in channels(plan)]
    gateway = rattler.Gateway(cache_dir=pathlib.Path(plan["cache"], "rattler/repodata"), client=client)
    virtual = rattler.VirtualPackage.detect()
    records = await rattler.solve(sources, specs(plan), gateway=gateway, virtual_packages=virtual)
    for record in records:  # packages of a local channel are not hashed by the library
        url = urllib.parse.urlsplit(str(record.url))
        if url.scheme == "file":
            path = pathlib.Path(urllib.parse.unquote(url.path))
            if not record.sha256 or _sha256_of(path) != record.sha256:
                raise BuildError(f"{path} is not what the channel's index says: its sha256 differs")
    solved = time.monotonic()
    layer = rattler.PackageCacheLayer(pathlib.Path(plan["cache"], "rattler/packages"))
    validated = layer.with_validation_mode(rattler.ValidationMode.full())
    await rattler.install(
        records,
        prefix.absolute(),
        installed_packages=[],
        client=client,
        config=config,
        show_progress=False,
        package_cache=rattler.PackageCache.from_layers([validated]),
        requested_specs=[rattler.MatchSpec(spec)._match_spec for spec in specs(plan)],  # 0.28 wants the inner one
    )
    return {"solve_s": round(solved - start, 2), "conda_s": round(time.monotonic() - solved, 2)}


def solver_child(plan: Plan, prefix: pathlib.Path) -> None:
    """Solve and install, print the durations and leave at once: the library's threads outlive a tidy exit."""
    asyncio = importlib.import_module("asyncio")
    code = 0
    try:
        print(json.dumps(asyncio.run(_solve_and_install(plan, prefix))))
    except Exception as error:
        print(error, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---------------------------------------------------------------- switching


def switch(plan: Plan, to: str = "", *, back: bool = False) -> dict[str, Any]:
    """Let the link lead to the plan's environment, or to the complete one named `to`, and prune old ones.

    With `back` the one that was live until now counts as left: nothing goes there again by itself.

    Kept are the live one, the one before it, and as many others as the plan says, those last in use first.
    """
    root, link = pathlib.Path(plan["root"]), pathlib.Path(plan["link"])
    name, before = to or name_of(plan), live_name(plan)
    prefix = root / name
    if not NAME.fullmatch(name) or not is_complete(prefix):
        raise BuildError(f"{prefix} is not a complete environment: build it first")
    if link.exists() and not link.is_symlink():
        raise BuildError(f"conda_env_link is in the way: {link} exists and is no symbolic link")
    result = {"changed": before != name, "name": name, "prefix": str(prefix), "previous": before, "pruned": []}
    if before == name:
        return result
    for each in (before, name):
        if each and is_complete(root / each):
            os.utime(root / each / MARKER)
    _remember(root, before, name, back=back)
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(prefix)
    new.replace(link)
    _sync_folder(link.parent)
    with locked(root, wait=False) as work:
        result["pruned"] = prune(plan, keep_also=before) if work else []
    return result


def _remember(root: pathlib.Path, before: str, name: str, *, back: bool) -> None:
    known = used(root)
    # On the way back the one that is left, and what came after the target, is no place to go back to.
    live = known["live"] or [before]
    live = live[: live.index(name)] if back and name in live else [one for one in live if one != name]
    live = [one for one in live if one and (not back or one != before)]
    left = [one for one in known["left"] if one != name] + ([before] if back and before else [])
    left = [one for one in dict.fromkeys(left) if (root / one).exists()]
    _write_durably(root / USED, json.dumps({"live": [*live, name][-20:], "left": left}) + "\n")


def prune(plan: Plan, keep_also: str) -> list[str]:
    """Remove environments beyond those to keep, and tools of other plans; return the environments' names."""
    root = pathlib.Path(plan["root"])
    found = sorted(filter(is_complete, environments(root)), key=lambda p: -(p / MARKER).stat().st_mtime_ns)
    live = live_name(plan)
    # What was live a moment ago is still running until its services have restarted.
    old = [p for p in found if p.name != live][max(1, plan["keep"]) :]
    gone = [p for p in old if p.name not in (keep_also, previous_name(plan))]
    for path in gone:
        (path / MARKER).unlink()
        shutil.rmtree(path)
    for path in (root / ".tools").glob("*"):
        if path != tools_of(plan):
            shutil.rmtree(path)
    return [path.name for path in gone]


# ---------------------------------------------------------------- verifying


def _site_packages(prefix: pathlib.Path) -> list[pathlib.Path]:
    return sorted(prefix.glob("lib/python3*/site-packages"))


def _index_files(prefix: pathlib.Path) -> list[pathlib.Path]:
    records = [p for folder in _site_packages(prefix) for p in folder.glob("*.dist-info/RECORD")]
    return sorted([*prefix.glob("conda-meta/*.json"), *records])


def records_sha256(prefix: pathlib.Path) -> str:
    """Return one hash over all lists of files that the packages brought."""
    total = hashlib.sha256()
    for path in _index_files(prefix):
        total.update(f"{path.relative_to(prefix)}\0".encode() + _sha256_of(path))
    return total.hexdigest()


def expected_files(prefix: pathlib.Path) -> dict[str, bytes | None]:
    """Map each file that a package owns, relative to `prefix`, to its sha256; None where no hash was recorded."""
    owned: dict[str, bytes | None] = {}
    for meta in prefix.glob("conda-meta/*.json"):
        for entry in json.loads(meta.read_text())["paths_data"]["paths"]:
            recorded = entry.get("sha256_in_prefix") or entry.get("sha256")
            owned[entry["_path"]] = bytes.fromhex(recorded) if recorded else None
    by_conda = set(owned)
    for folder in _site_packages(prefix):
        for record in folder.glob("*.dist-info/RECORD"):
            if str(record.relative_to(prefix)) in by_conda:
                continue  # conda's list is the one that knows what was rewritten
            with record.open(newline="") as file:
                for name, recorded, *_ in csv.reader(file):
                    path = os.path.normpath(folder / name)
                    algorithm, _, value = recorded.partition("=")
                    digest = (
                        base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)) if algorithm == "sha256" else None
                    )
                    owned[os.path.relpath(path, prefix)] = digest
    return owned


def _is_bytecode(path: str) -> bool:
    return path.endswith(".pyc") and "/__pycache__/" in path


def _source_of(path: str) -> str:
    folder, _, name = path.rpartition("/__pycache__/")
    return f"{folder}/{name.partition('.')[0]}.py"


def verify(prefix: pathlib.Path) -> dict[str, list[str]]:
    """Compare every file of an environment with the packages' own records; bytecode beside its source is excepted.

    Returns what is `changed`, `missing`, `extra` (owned by no package) and `unsafe` (not root's alone to write).
    """
    owned = expected_files(prefix)
    found: dict[str, list[str]] = {"changed": [], "missing": [], "extra": [], "unsafe": []}
    present: list[str] = []
    for folder, folders, files in os.walk(prefix):
        inside = os.path.relpath(folder, prefix)
        links = [d for d in folders if os.path.islink(os.path.join(folder, d))]  # noqa: PTH114, PTH118
        for name in (".", *files, *links):
            path = os.path.normpath(os.path.join(inside, name))  # noqa: PTH118
            seen = os.lstat(prefix / path)
            if seen.st_uid != 0 or (not stat.S_ISLNK(seen.st_mode) and seen.st_mode & WRITABLE_BY_OTHERS):
                found["unsafe"].append(path)
            if name != ".":
                present.append(path)
    here = set(present)
    for path in present:
        if path in owned or path.startswith((f"{OWN}/", "conda-meta/")) or path == "CACHEDIR.TAG":
            continue
        if not _is_bytecode(path) or not (_source_of(path) in here or _source_of(path) in owned):
            found["extra"].append(path)
    found["missing"] = [p for p in owned if p not in here and not _is_bytecode(p)]

    def is_changed(path: str) -> bool:
        file = prefix / path
        if file.is_symlink():
            return not file.resolve().is_relative_to(prefix.resolve())
        return _sha256_of(file) != owned[path]

    hashed = [p for p, digest in owned.items() if digest and p in here and not _is_bytecode(p)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found["changed"] = [
            p for p, bad in zip(hashed, pool.map(is_changed, hashed, chunksize=256), strict=True) if bad
        ]
    marker = json.loads((prefix / MARKER).read_text()) if is_complete(prefix) else {}
    if marker.get("records_sha256") != records_sha256(prefix):
        found["changed"].append("the packages' lists of files (conda-meta/*.json and *.dist-info/RECORD)")
    return {key: sorted(paths) for key, paths in found.items()}


def main() -> int:
    """Command line: `status|build|switch|verify [PLAN]`; returns the exit status."""
    parser = argparse.ArgumentParser(prog=pathlib.Path(__file__).name, description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("status", "say whether the plan's environment is there and live"),
        ("build", "build it beside the live one"),
        ("switch", "make it the live one"),
        ("verify", "compare the live one's files with the packages' records"),
    ):
        made = verbs.add_parser(verb, help=text)
        made.add_argument("plan", nargs="?", default=PLAN, help="a file, or - for standard input")
        if verb == "switch":
            made.add_argument("--to", default="", metavar="NAME", help="another complete environment")
            made.add_argument("--back", action="store_true", help="the live one is left for good")
    verbs.add_parser("_conda").add_argument("prefix", type=pathlib.Path)
    a = parser.parse_args()
    os.umask(0o022)
    try:
        if a.verb == "_conda":
            solver_child(read_plan("-"), a.prefix)
        plan = read_plan(a.plan)
        if a.verb == "verify":
            prefix = pathlib.Path(plan["link"]).resolve(strict=True)
            bad = verify(prefix)
            print(json.dumps({"prefix": str(prefix), **bad}, indent=1))
            return int(any(bad.values()))
        do = {"status": status, "build": build}.get(a.verb)
        print(json.dumps(do(plan) if do else switch(plan, a.to, back=a.back)))
    except (BuildError, OSError, ValueError) as error:
        print(f"{a.verb}: {_without_credentials(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

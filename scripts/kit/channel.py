"""A small conda channel made out of the Python that a Debian release ships.

For places that no public conda channel reaches, and for tests. The packages are ordinary ones: `python` for
the machine's own platform, with the libraries it needs beside it, and `pip` as `noarch`; any conda client can
install them. `make` builds inside a throw-away container of a release; `build OUT` uses the Debian host it
runs on, as any user, with the standard library alone.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import ctypes
import fcntl
import hashlib
import io
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SUBDIRS = {
    "x86_64": "linux-64",
    "aarch64": "linux-aarch64",
    "ppc64le": "linux-ppc64le",
    "s390x": "linux-s390x",
    "riscv64": "linux-riscv64",
    "armv7l": "linux-armv7l",
}
# Parts of the C library come from the host, as in every conda environment.
SYSTEM_LIBRARIES = re.compile(r"^(libc|libm|libpthread|libdl|librt|libutil|libcrypt|libresolv|ld-linux.*|ld64)\.so")
# Longer than any real prefix has to be; a client replaces it in the files that name it.
PLACEHOLDER = "/opt/" + "_placehold" * 20
LEFT_OUT = {"test", "tests", "__pycache__", "EXTERNALLY-MANAGED", "_distutils_system_mod.py", "sitecustomize.py"}
# Debian's own `site` looks into dist-packages only, and it is compiled into the interpreter.
SITECUSTOMIZE = """import site
import sys

_directory = f"{sys.prefix}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
if _directory not in sys.path:
    site.addsitedir(_directory)
"""
EXCHANGE, AT_FDCWD = 2, -100


class ChannelError(RuntimeError):
    """The channel could not be made; the message says what was missing."""


def _call(argv: Sequence[str | os.PathLike[str]], cwd: pathlib.Path | None = None) -> str:
    done = subprocess.run(argv, text=True, capture_output=True, cwd=cwd, check=False)
    if done.returncode:
        raise ChannelError(f"{' '.join(map(str, argv))}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def subdir(machine: str | None = None) -> str:
    """Conda's name for a Linux `machine` as uname gives it (this one's by default). Raises ChannelError."""
    found = machine or platform.machine()
    if found not in SUBDIRS:
        raise ChannelError(f"no conda platform is known for the machine type {found}")
    return SUBDIRS[found]


# ---------------------------------------------------------------- the distribution's side


def _unpack_debs(names: Sequence[str], into: pathlib.Path) -> None:
    """Fetch Debian packages with apt state of our own, so that nothing on the host changes, and unpack them."""
    work = into / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (work / folder).mkdir(parents=True)
    # Root would hand the download to a user who may not enter a temporary folder.
    options = [f"Dir::State::lists={work}/lists", f"Dir::Cache={work}", "Debug::NoLocking=1", "APT::Sandbox::User=root"]
    options += ["Acquire::Languages=none", "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false"]
    argv = ["apt-get", "-qq", *[f"-o{option}" for option in options]]
    _call([*argv, "update"])
    _call([*argv, "download", *names], cwd=work / "archives")
    for deb in (work / "archives").glob("*.deb"):
        _call(["dpkg-deb", "-x", deb, into])
    shutil.rmtree(work)


def _tool(name: str, unpacked: pathlib.Path) -> str:
    return shutil.which(name) or str(unpacked / "usr/bin" / name)


def _is_elf(path: pathlib.Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _bundle_libraries(root: pathlib.Path, patchelf: str) -> list[str]:
    """Put the libraries that programs under `root` load into its lib/, and let them look there first."""
    todo, added = [p for p in sorted(root.rglob("*")) if _is_elf(p)], []
    while todo:
        program = todo.pop()
        needed = _call([patchelf, "--print-needed", program]).split()
        if not needed:
            continue
        # What a program needs through another is found when that one's turn comes.
        found = dict(re.findall(r"^\s+(\S+) => (/\S+)", _call(["ldd", program]), re.MULTILINE))
        for name in needed:
            if SYSTEM_LIBRARIES.match(name) or name not in found:
                continue
            target = root / "lib" / name
            if not target.exists():
                shutil.copy(pathlib.Path(found[name]).resolve(), target)
                target.chmod(0o755)
                added.append(name)
                todo.append(target)
        _call([patchelf, "--set-rpath", f"$ORIGIN/{os.path.relpath(root / 'lib', program.parent)}", program])
    return sorted(added)


def _replace(path: pathlib.Path, *pairs: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in pairs:
        if text.count(old) != 1:
            raise ChannelError(f"{path.name}: expected «{old}» once, found it {text.count(old)} times")
        text = text.replace(old, new)
    path.write_text(text)


def _stage_python(root: pathlib.Path, patchelf: str) -> None:
    """Lay the running Debian Python out below `root` as conda has it: bin/ and lib/pythonX.Y/."""
    short = f"{sys.version_info[0]}.{sys.version_info[1]}"
    (root / "bin").mkdir(parents=True)
    shutil.copy(f"/usr/bin/python{short}", root / "bin")
    for name in ("python", "python3"):
        (root / "bin" / name).symlink_to(f"python{short}")
    library = root / "lib" / f"python{short}"
    shutil.copytree(
        f"/usr/lib/python{short}",
        library,
        symlinks=True,
        ignore=lambda _, names: LEFT_OUT.intersection(names) | {n for n in names if n.startswith("config-")},
    )
    for path in library.rglob("*"):
        if path.is_symlink() and not path.exists():
            path.unlink()
    settings = library / "sysconfig/__init__.py"
    _replace(
        settings if settings.exists() else library / "sysconfig.py",
        ("os.environ.get('DEB_PYTHON_INSTALL_LAYOUT', 'posix_local')", "'posix_prefix'"),
        ("            prefix_scheme = 'posix_local'", "            prefix_scheme = 'posix_prefix'"),
    )
    for path in library.glob("_sysconfigdata_*.py"):
        if not path.is_symlink():
            path.write_text(re.sub(r"'/usr(?=[/'])", f"'{PLACEHOLDER}", path.read_text()))
    (library / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (library / "site-packages").mkdir()
    (library / "site-packages/README.txt").write_text("Third-party packages are installed here.\n")
    _bundle_libraries(root, patchelf)
    # Valid wherever and whenever it is unpacked: the check is of no time stamp, and the loader sets the path.
    argv = [sys.executable, "-m", "compileall", "-q", "-j0", "--invalidation-mode=unchecked-hash"]
    _call([*argv, "-s", str(root), library])
    for path in (library / "__pycache__").glob("_sysconfigdata_*"):
        path.unlink()  # it would name the placeholder for ever


def _stage_wheel(wheel: pathlib.Path, root: pathlib.Path) -> list[str]:
    """Unpack a pure Python `wheel` as a noarch package has it, and return its entry points."""
    packages = root / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    info = next(packages.glob("*.dist-info"))
    (info / "INSTALLER").write_text("conda\n")
    (info / "RECORD").unlink()  # conda-meta has the list of files
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.optionxform = lambda optionstr: optionstr  # type: ignore[method-assign]
    parser.read(info / "entry_points.txt")
    found = parser["console_scripts"] if parser.has_section("console_scripts") else {}
    return [f"{name} = {target}" for name, target in found.items() if not re.search(r"\d$", name)]


# ---------------------------------------------------------------- conda's side


def _describe(root: pathlib.Path) -> list[dict[str, Any]]:
    """List every file below `root` as paths.json has it."""
    entries = []
    for path in sorted(root.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        entry: dict[str, Any] = {"_path": path.relative_to(root).as_posix(), "path_type": "hardlink"}
        data = path.read_bytes()
        if path.is_symlink():
            entry["path_type"] = "softlink"
        elif PLACEHOLDER.encode() in data and path.suffix != ".pyc":
            entry |= {"prefix_placeholder": PLACEHOLDER, "file_mode": "text"}
        entries.append(entry | {"sha256": hashlib.sha256(data).hexdigest(), "size_in_bytes": len(data)})
    return entries


def _tar(root: pathlib.Path, names: Iterable[str], when: int) -> bytes:
    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime = when
        info.mode = 0o755 if info.mode & 0o100 else 0o644
        return info

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            archive.add(root / name, name, recursive=False, filter=plain)
    return stream.getvalue()


def _pack(
    root: pathlib.Path,
    channel: pathlib.Path,
    index: Mapping[str, Any],
    zstd: str,
    entry_points: Sequence[str] = (),
) -> tuple[str, dict[str, Any]]:
    """Write the tree `root` as a .conda package into `channel`; return its name and its repodata entry."""
    entries = _describe(root)
    names = [str(entry["_path"]) for entry in entries]
    information: dict[str, Any] = {
        "index.json": index,
        "paths.json": {"paths": entries, "paths_version": 1},
        "about.json": {"license": index["license"], "summary": "made from the Debian package of that name"},
    }
    if index.get("noarch") == "python":
        python = {"type": "python", "entry_points": list(entry_points)}
        information["link.json"] = {"noarch": python, "package_metadata_version": 1}
    (root / "info").mkdir()
    for name, content in information.items():
        (root / "info" / name).write_text(json.dumps(content, indent=1) + "\n")
    (root / "info/files").write_text("".join(f"{name}\n" for name in names))
    stem, when = f"{index['name']}-{index['version']}-{index['build']}", int(index["timestamp"]) // 1000
    package = channel / str(index["subdir"]) / f"{stem}.conda"
    package.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(package, "w", zipfile.ZIP_STORED) as archive:

        def put(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)

        def squeeze(data: bytes) -> bytes:
            return subprocess.run(
                [zstd, "-q", "-9", "-T0", "-c"], input=data, stdout=subprocess.PIPE, check=True
            ).stdout

        put("metadata.json", json.dumps({"conda_pkg_format_version": 2}).encode())
        put(f"pkg-{stem}.tar.zst", squeeze(_tar(root, names, when)))
        infos = [f"info/{name}" for name in sorted([*information, "files"])]
        put(f"info-{stem}.tar.zst", squeeze(_tar(root, infos, when)))
    data = package.read_bytes()
    sums = {"md5": hashlib.md5(data, usedforsecurity=False).hexdigest(), "sha256": hashlib.sha256(data).hexdigest()}
    return package.name, {**index, **sums, "size": len(data)}


def write_repodata(channel: pathlib.Path, packages: Mapping[str, Mapping[str, Any]]) -> None:
    """Write each platform's repodata.json of `channel`; `packages` maps a file's name to its entry."""
    for name in {subdir(), "noarch"}:
        entries = {file: entry for file, entry in packages.items() if entry["subdir"] == name}
        (channel / name).mkdir(parents=True, exist_ok=True)
        content = {"info": {"subdir": name}, "packages": {}, "packages.conda": entries, "removed": []}
        (channel / name / "repodata.json").write_text(json.dumps(content | {"repodata_version": 1}, indent=1) + "\n")


def build(out: pathlib.Path) -> None:
    """Make the channel from this Debian host's own Python in the folder `out`, which must be empty or new.

    Needs no privilege; two small tools come from the host's apt sources and are used where they are unpacked.
    Raises ChannelError.
    """
    if not (sys.executable.startswith("/usr/bin/") and sysconfig.get_config_var("prefix") == "/usr"):
        raise ChannelError(f"found {sys.executable}, expected the distribution's own Python: use /usr/bin/python3")
    short = f"{sys.version_info[0]}.{sys.version_info[1]}"
    debian = _call(["dpkg-query", "-W", "-f", "${Version}", f"libpython{short}-stdlib"])
    when = int(pathlib.Path(f"/usr/lib/python{short}/os.py").stat().st_mtime) * 1000
    with tempfile.TemporaryDirectory(prefix="channel-") as name:
        work = pathlib.Path(name)
        unpacked = work / "debs"
        unpacked.mkdir()
        _unpack_debs([t for t in ("patchelf", "zstd") if not shutil.which(t)] + ["python3-pip-whl"], unpacked)
        zstd = _tool("zstd", unpacked)
        common = {"build_number": 0, "timestamp": when, "constrains": []}
        _stage_python(work / "python", _tool("patchelf", unpacked))
        revision = re.sub(r"[^A-Za-z0-9_.]", "_", debian.partition("-")[2] or "0")
        glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "glibc 2.0").split()[1]
        index: dict[str, Any] = {"name": "python", "version": platform.python_version(), "build": f"{revision}_0"}
        index |= {"subdir": subdir(), "license": "PSF-2.0", "depends": [f"__glibc >={glibc}"]}
        packages = dict([_pack(work / "python", out, index | common, zstd)])
        wheel = next((unpacked / "usr/share/python-wheels").glob("pip-*.whl"))
        points = _stage_wheel(wheel, work / "pip")
        index = {"name": "pip", "version": wheel.name.split("-")[1], "build": "pyh0_0", "noarch": "python"}
        index |= {"subdir": "noarch", "license": "MIT", "depends": [f"python >={short}"]}
        packages |= dict([_pack(work / "pip", out, index | common, zstd, points)])
        write_repodata(out, packages)


def _swap(new: pathlib.Path, old: pathlib.Path) -> None:
    """Put the folder `new` in the place of `old` in one step; `new` then holds what was there."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, bytes(new), AT_FDCWD, bytes(old), EXCHANGE):
        raise OSError(ctypes.get_errno(), f"cannot exchange {new} and {old}")


def make(suite: str, out: pathlib.Path | None = None, *, if_missing: bool = False) -> pathlib.Path:
    """Make the channel of a Debian `suite` in `out` (the user's cache by default) and return that folder.

    Builds in a container of the suite, so any controller will do. A channel that is there is replaced in one
    step, or left as it is with `if_missing`. Raises ChannelError or VmError.
    """
    from kit import vm  # noqa: PLC0415 - a host that builds from its own Python has only this file

    target = (out or vm.CACHE / "channel" / suite).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if if_missing and (target / "noarch/repodata.json").exists():
            return target
        print(f"making a conda channel of Debian {suite}'s Python", file=sys.stderr)
        new = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            new.chmod(0o755)
            argv = [
                "run",
                "--rm",
                "--network=podman",
                f"--volume={__file__}:/channel.py:ro",
                f"--volume={new}:/channel",
            ]
            owner = f"{os.getuid()}:{os.getgid()}"
            script = f"/usr/bin/python3 /channel.py build /channel && chown -R {owner} /channel"
            vm.podman(*argv, vm.image(suite), "sh", "-c", script)
            target.mkdir(exist_ok=True)
            _swap(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return target


def main() -> None:
    """Command line: `make SUITE [-o DIR] [--if-missing]` or `build OUT`."""
    parser = argparse.ArgumentParser(prog="scripts/make-channel", description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    here = verbs.add_parser("make", prog="scripts/make-channel", help="build in a container", description=__doc__)
    here.add_argument("suite", choices=("trixie", "bookworm"))
    here.add_argument("-o", "--output", type=pathlib.Path, help="the channel's folder (default: the user's cache)")
    here.add_argument("--if-missing", action="store_true", help="do nothing when the channel is there")
    direct = verbs.add_parser("build", help="build from the Python of this Debian host")
    direct.add_argument("output", type=pathlib.Path)
    a = parser.parse_args()
    try:
        if a.verb == "make":
            print(make(a.suite, a.output, if_missing=a.if_missing))
        else:
            if a.output.is_dir() and any(a.output.iterdir()):
                raise ChannelError(f"{a.output} is not empty")
            build(a.output)
    except RuntimeError as error:
        sys.exit(f"scripts/make-channel: {error}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()

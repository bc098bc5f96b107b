"""What all parts share: the settings, the remotes of rclone, the lock, the state files, and how failures are told."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SETTINGS = pathlib.Path("/etc/mlflow-kit-backup/settings.json")
SITE_FILES = pathlib.Path("/etc/mlflow-kit-backup/site")
STATE = pathlib.Path("/var/lib/mlflow-kit")
RUN = pathlib.Path("/run/mlflow-kit-backup")
LOCKS: list[int] = []  # file descriptors of the lock, while it is held
ID = "%Y%m%dT%H%M%SZ"


class Failed(Exception):
    """A step failed: `cause` is what was found, `step` what the operator does next."""

    def __init__(self, cause: str, step: str) -> None:
        """Keep both; the text is both."""
        super().__init__(f"{cause.rstrip('.')}. Next: {step}")
        self.cause, self.step = cause, step


def now() -> datetime.datetime:
    """The time in UTC, in whole seconds."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def iso(moment: datetime.datetime | float) -> str:
    """`moment` (a datetime, or seconds since 1970) as people and `restore_time` write it, in UTC."""
    if isinstance(moment, int | float):
        moment = datetime.datetime.fromtimestamp(moment, datetime.UTC)
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(text: str) -> float:
    """The time that `text` names, in seconds since 1970. Raises ValueError when it names none or no time zone."""
    moment = datetime.datetime.fromisoformat(text.strip())
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} names no time zone")
    return moment.timestamp()


def megabytes(size: float) -> str:
    """`size` in bytes as words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def call(
    argv: Sequence[str],
    *,
    stdin: str | bytes | None = None,
    user: str | None = None,
    environment: Mapping[str, str] | None = None,
    keeps_lock: bool = True,
) -> subprocess.CompletedProcess[bytes]:
    """Run `argv` (as `user`, with a clean environment) and return what it gave; never raises for its exit code.

    It holds this program's lock as well (`keeps_lock`): where the program is killed, nobody begins beside what it left.
    """
    data = stdin.encode() if isinstance(stdin, str) else stdin
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "TZ": "UTC"}
    rights: dict[str, Any] = {}
    if user:
        held = pwd.getpwnam(user)
        rights = {"user": user, "group": held.pw_gid, "extra_groups": os.getgrouplist(user, held.pw_gid)}
    return subprocess.run(
        argv,
        input=data,
        stdin=subprocess.DEVNULL if data is None else None,
        capture_output=True,
        env={**env, **(environment or {})},
        cwd="/",
        check=False,
        pass_fds=tuple(LOCKS) if keeps_lock else (),
        **rights,
    )


def replace(path: pathlib.Path, text: str, mode: int = 0o644) -> None:
    """Write `text` to `path` as a whole or not at all."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, mode)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def read_state(name: str) -> dict[str, Any]:
    """The state file `name`, or an empty one."""
    try:
        held = json.loads((STATE / name).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def write_state(name: str, state: Mapping[str, Any]) -> None:
    """Write the state file `name`."""
    STATE.mkdir(parents=True, exist_ok=True)
    STATE.chmod(0o755)
    replace(STATE / name, json.dumps(state, indent=1) + "\n")


@contextlib.contextmanager
def alone(wait: float) -> Iterator[bool]:
    """Hold the lock of backup, drill and restore; gives False when another holds it for longer than `wait` seconds."""
    STATE.mkdir(parents=True, exist_ok=True)
    STATE.chmod(0o755)
    with (STATE / "backup.lock").open("w") as file:
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                LOCKS.append(file.fileno())
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    yield False
                    return
                time.sleep(0.5)
        yield True


class Settings:
    """The role's settings on this host, and the remotes of rclone that are made from them.

    Attributes:
        held: the settings file as it is.
        directory: the target, where it is a directory.
        key_checked: whether the secrets have been seen to be those that the copy was encrypted with.
    """

    def __init__(self, path: pathlib.Path = SETTINGS) -> None:
        """Read `path`. Raises Failed when it is not there."""
        try:
            self.held: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise Failed(f"{path} is not there: this host is not set up for backups", "run site.yml") from None
        target = self.held["target"]
        self.directory = pathlib.Path(target["directory"]) if not target["bucket"] else None
        self.base = str(self.directory) if self.directory else f"{target['bucket']}/{target['prefix']}".rstrip("/")
        self.key_checked = False
        self.database: dict[str, Any] = self.held["database"]
        self.bucket: dict[str, Any] = self.held["bucket"]

    @property
    def target_words(self) -> str:
        """The target, for a message."""
        return self.base if self.directory else f"{self.held['target']['endpoint']}/{self.base}"

    def rclone_environment(self) -> dict[str, str]:
        """Write rclone's configuration, readable by root alone and gone with the next boot, and say where it is."""
        RUN.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = RUN / "rclone.conf"
        if not path.exists() or path.stat().st_mtime <= max(SETTINGS.stat().st_mtime, STARTED):
            replace(path, self._rclone_conf(), 0o600)
        return {"RCLONE_CONFIG": str(path), "RCLONE_CACHE_DIR": str(RUN / "cache")}

    def _rclone_conf(self) -> str:
        target = self.held["target"]
        text = "[target]\ntype = local\n" if self.directory else _s3("target", target)
        text += "[copy]\ntype = crypt\n"
        text += f"remote = target:{self.base}/objects\nfilename_encoding = base64\n"
        text += f"password = {_obscured(self.held['bucket_key'])}\npassword2 = {_obscured(self.held['bucket_salt'])}\n"
        return text + (_s3("source", self.bucket) if self.bucket else "")

    def rclone(self, *argv: str, stdin: str | bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run rclone with `argv` on the remotes source, target and copy."""
        flags = ["--retries=1", "--low-level-retries=4", "--contimeout=10s", "--timeout=5m", "--stats=0"]
        flags += ["--use-server-modtime", "--fast-list", "--log-level=NOTICE", "--s3-no-check-bucket"]
        flags += [f"--transfers={self.held['transfers']}", "--ignore-times"]
        if self.held["ca_file"]:
            flags.append(f"--ca-cert={self.held['ca_file']}")
        return call(["rclone", *argv, *flags], stdin=stdin, environment=self.rclone_environment())

    def check_target(self) -> None:
        """See that the target is there and this site's. Raises Failed."""
        if self.directory:
            if not self.directory.is_dir():
                raise Failed(
                    f"backup_directory: {self.directory} is not there", "mount it, or run site.yml if it is new"
                )
            if self.held["require_mount"] and self.local():
                raise Failed(
                    f"backup_directory: {self.directory} lies on this host's own disk, and backup_require_mount asks "
                    "for another",
                    "mount it (systemctl --failed shows a mount that failed), and start this again",
                )

    def local(self) -> bool:
        """Whether the target lies on the disk of the host itself, and would be lost with it."""
        if not self.directory or not self.directory.exists():
            return False
        return self.directory.stat().st_dev == pathlib.Path("/").stat().st_dev

    def owner(self) -> str:
        """The mark of the site whose backups the target holds, or nothing when it holds none. Raises Failed."""
        if self.directory:
            try:
                text = (self.directory / "owner").read_text()
            except FileNotFoundError:
                return ""
        else:
            done = self.rclone("cat", f"target:{self.base}/owner")
            if done.returncode and not _is_missing(done.stderr):
                raise Failed(
                    f"the target {self.target_words} does not answer: {last(done)}", "see that S3 and its keys"
                )
            text = done.stdout.decode(errors="replace")
        return text.strip()

    def own_mark(self) -> str:
        """The mark of the site that this host is, or nothing before it began to use a target."""
        path = STATE / "backup.owner"
        return path.read_text().split("\n")[0] if path.exists() else ""

    def began_here(self) -> bool:
        """Whether this host has begun to use this very target."""
        path = STATE / "backup.owner"
        return path.exists() and path.read_text().split("\n")[1:2] == [self.target_words]

    def adopt(self, mark: str) -> None:
        """Remember on the host that the backups called `mark` in this target are its own."""
        STATE.mkdir(parents=True, exist_ok=True)
        STATE.chmod(0o755)
        replace(STATE / "backup.owner", f"{mark}\n{self.target_words}\n", 0o600)

    def check_owner(self) -> None:
        """See that the target's backups are this host's. Raises Failed."""
        self.check_target()
        owner, own = self.owner(), self.own_mark()
        if owner == own != "":
            return
        own = own if self.began_here() else ""
        if not owner:
            raise Failed(
                f"{self.target_words} holds no backups, although this host has begun there"
                if own
                else f"{self.target_words} is not prepared",
                "is it mounted? If it was emptied on purpose, "
                f"rm {STATE}/backup.owner and run playbooks/backup.yml: a new series begins"
                if own
                else "run site.yml",
            )
        raise Failed(
            f"{self.target_words} holds the backups of a site that is not on this host",
            "playbooks/restore.yml brings that site back here (docs/restore.md); for a new site choose another "
            "backup_directory or backup_s3_prefix",
        )

    def free(self) -> tuple[int, int]:
        """Bytes free in the target's file system and bytes that stay reserved; both huge and 0 for S3."""
        if not self.directory:
            return 1 << 62, 0
        usage = shutil.disk_usage(self.directory)
        return usage.free, usage.total * int(self.held["reserve_percent"]) // 100

    def need(self, size: int, what: str) -> None:
        """See that `size` bytes more fit into the target. Raises Failed."""
        free, reserve = self.free()
        if free - size < reserve:
            raise Failed(
                f"{self.target_words} is too full for {what}: {megabytes(free)} are free, {megabytes(size)} are "
                f"needed and {megabytes(reserve)} ({self.held['reserve_percent']} %, backup_disk_reserve_percent) "
                "stay free",
                "give it more space, or lower backup_retention_days and run site.yml; earlier backups are untouched",
            )


STARTED = time.time()


def _obscured(secret: str) -> str:
    """`secret` as rclone wants it in its configuration. Raises Failed."""
    done = call(["rclone", "obscure", "-"], stdin=secret, environment={"RCLONE_CONFIG": "/dev/null"})
    if done.returncode:
        raise Failed(f"rclone does not work: {last(done)}", "apt-get install rclone, or run site.yml")
    return done.stdout.decode().strip()


def _s3(name: str, held: Mapping[str, str]) -> str:
    """A remote of the S3 server that `held` describes; the files stay below S3's limits for one upload."""
    return (
        f"[{name}]\ntype = s3\nprovider = Other\nenv_auth = false\nforce_path_style = true\n"
        f"endpoint = {held['endpoint']}\nregion = {held['region']}\n"
        f"access_key_id = {held['access_key']}\nsecret_access_key = {held['secret_key']}\n"
        "acl = private\nupload_cutoff = 4Gi\nchunk_size = 64Mi\nmax_upload_parts = 1000\n"
    )


def _is_missing(stderr: bytes) -> bool:
    return any(word in stderr for word in (b"not found", b"NoSuchKey", b"404"))


def last(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last lines of what a command complained about, on one line."""
    text = (done.stderr or done.stdout).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-700:] or f"exit {done.returncode}"

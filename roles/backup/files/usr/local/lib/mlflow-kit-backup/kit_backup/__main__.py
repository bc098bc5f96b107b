"""Command line: see `mlflow-kit-backup --help`. Failures say the cause and the next step, and exit with 1."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from kit_backup import bucket, verbs
from kit_backup.common import Failed, Settings, alone, call, iso, last, megabytes, read_state, seconds
from kit_backup.database import Database

UNITS = {"backup": "mlflow-kit-backup", "bucket": "mlflow-kit-backup-bucket", "drill": "mlflow-kit-drill"}
STATES = {"backup": "backup.json", "bucket": "backup.json", "drill": "drill.json"}
BUSY = "another backup, drill or restore holds this host"


def run(kind: str) -> None:
    """Start the unit of `kind` and wait for its end: a run that is under way already began too early to count."""
    unit, asked = UNITS[kind], time.time()
    while call(["systemctl", "is-active", f"{unit}.service"]).stdout.strip() in (b"activating", b"deactivating"):
        time.sleep(1)
    call(["systemctl", "reset-failed", f"{unit}.service"])
    done = call(["systemctl", "start", f"{unit}.service"])
    invocation = call(["systemctl", "show", "-p", "InvocationID", "--value", f"{unit}.service"]).stdout.decode().strip()
    said = call(["journalctl", "-o", "cat", "--no-pager", f"_SYSTEMD_INVOCATION_ID={invocation}"]).stdout.decode()
    print(said.strip())
    state = read_state(STATES[kind])
    if done.returncode or state.get("result") != "ok" or seconds(state["started"]) < int(asked):
        raise Failed(
            state.get("error", "").partition(". Next: ")[0] or f"{unit}.service failed: {last(done)}",
            state.get("error", "").partition(". Next: ")[2] or f"journalctl -u {unit}",
        )
    print(f"{kind}: ok, in {state['duration_s']} s; {state['target']}")
    if state.get("local"):
        print(
            f"WARNING: {state['target']} lies on the disk of this host and is lost with it. It is a backup once it is "
            "mounted from elsewhere, or backup_s3_bucket names another S3 (docs/backup.md)"
        )


def show(settings: Settings) -> None:
    """Print the backups that can be restored, and from when to when. Raises Failed."""
    settings.check_target()
    print(f"target: {settings.target_words}{' (on the disk of this host!)' if settings.local() else ''}")
    print("complete backups:", ", ".join(verbs.manifests(settings)) or "none")
    if settings.database:
        database = Database(settings)
        backups = database.backups()
        for one in backups:
            print(f"database: {one['label']} ({one['type']}), {megabytes(one['info']['size'])}")
        if backups:
            first, newest = iso(float(backups[0]["timestamp"]["stop"])), iso(database.last_archived())
            print(f"database: any time from {first} to {newest}")
    if settings.bucket:
        catalog = bucket.Catalog(settings)
        there = catalog.there().values()
        print(f"bucket: {len(there)} objects, {megabytes(sum(v.size for v in there))}, copied {catalog.id or 'never'}")


def give_files(settings: Settings, name: str) -> None:
    """Write the archive of the backup `name` to standard output. Raises Failed."""
    done = settings.rclone("cat", f"copy:host/{name}.tar.gz")
    if done.returncode:
        raise Failed(f"there is no archive of a backup {name}: {last(done)}", "mlflow-kit-backup list")
    sys.stdout.buffer.write(done.stdout)


def plan_words(plan: dict[str, object]) -> str:
    """What a restore would do, in words."""
    lines = [f"restore to {plan['to']}{' (completing an earlier run)' if plan['resumed'] else ''}"]
    if "database_bytes" in plan:
        lines.append(
            f"database: {megabytes(float(str(plan['database_bytes'])))}; from {plan['from']} to {plan['until']}"
        )
    if "objects" in plan:
        lines.append(
            f"bucket: {plan['objects']} objects, {megabytes(float(str(plan['bucket_bytes'])))}; last copied "
            f"{plan['bucket_copied']}: what was uploaded later is not in it"
        )
    lines.append(f"in place of: {plan['holds'] or 'nothing, the host is empty'}")
    return "\n".join(lines)


def locked(options: argparse.Namespace, settings: Settings) -> None:
    """Run a verb that must be alone on this host. Raises Failed."""
    if options.verb == "take":
        verbs.take(settings, options.bucket)
    elif options.verb == "drill":
        verbs.drill(settings)
    elif options.verb == "restore":
        verbs.check_restore(settings, options.time, options.confirm, options.timeline)
        verbs.begin_restore(settings, options.time, not options.no_save)
        verbs.restore_database(settings, options.time, options.timeline)
        verbs.restore_bucket(settings, options.time)
        verbs.restored()
    elif options.verb == "put-back":
        version = bucket.put_back(settings, options.path, verbs.moment_of(options.time, "--time"))
        print(f"{version.path} is there as it was: {version.size} bytes, stored {iso(version.time)}")
    elif options.verb == "end-restore":
        print(json.dumps(verbs.end_restore(settings)))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="mlflow-kit-backup", description=__doc__)
    sub = parser.add_subparsers(dest="verb", required=True)
    runs = sub.add_parser("run", help="start a unit, wait for it and say what it did")
    runs.add_argument("kind", choices=list(UNITS))
    sub.add_parser("list", help="what can be restored")
    files = sub.add_parser("files", help="write the archive of configuration of a complete backup to standard output")
    files.add_argument("id", help="of the backup, as list shows it")
    makes = sub.add_parser("prepare", help="make what the target lacks (the role does this)")
    makes.add_argument("--dry", action="store_true")
    takes = sub.add_parser("take", help="take a backup in the foreground")
    takes.add_argument("--bucket", action="store_true", help="of the bucket alone")
    puts = sub.add_parser("put-back", help="bring one object of the bucket back, damaged or deleted")
    puts.add_argument("path", help="its key in the bucket")
    puts.add_argument("--time", default="", help="as of this time, with its zone; else as of the last copy")
    sub.add_parser("drill", help="restore into a scratch place and compare, in the foreground")
    for name, words in (
        ("check-restore", "see that a restore can work, and change nothing"),
        ("restore", "save what is there, then restore database and bucket (playbooks/restore.yml does this)"),
    ):
        step = sub.add_parser(name, help=words)
        step.add_argument("--time", default="")
        step.add_argument("--timeline", default="")
        step.add_argument("--confirm", default="")
        step.add_argument("--no-save", action="store_true")
    sub.add_parser("end-restore", help="the last step of playbooks/restore.yml")
    options = parser.parse_args()
    os.umask(0o077)
    if os.geteuid():
        sys.exit("mlflow-kit-backup: must run as root")
    try:
        if options.verb == "run":
            run(options.kind)
            return
        settings = Settings()
        if options.verb == "list":
            show(settings)
        elif options.verb == "files":
            give_files(settings, options.id)
        elif options.verb == "prepare":
            print(json.dumps(verbs.prepare(settings, options.dry)))
        elif options.verb == "check-restore":
            print(plan_words(verbs.check_restore(settings, options.time, options.confirm, options.timeline)))
        else:
            with alone(0 if getattr(options, "bucket", False) else 3600) as free:
                if free:
                    locked(options, settings)
                elif getattr(options, "bucket", False):
                    print(f"{BUSY}; it copies the bucket itself, or the next hour does")
                else:
                    raise Failed(BUSY, "wait for its end (systemctl list-units 'mlflow-kit-*'), then start this again")
    except Failed as error:
        sys.exit(f"mlflow-kit-backup: {error}")


if __name__ == "__main__":
    main()

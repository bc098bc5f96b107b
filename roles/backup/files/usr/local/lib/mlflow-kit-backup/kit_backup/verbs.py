"""The verbs: take, drill, and the steps of a restore."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import shutil
import tarfile
import time
from typing import Any

from kit_backup import bucket
from kit_backup.common import (
    ID,
    SITE_FILES,
    STATE,
    Failed,
    Settings,
    call,
    iso,
    last,
    megabytes,
    now,
    read_state,
    replace,
    seconds,
    write_state,
)
from kit_backup.database import Database, NotRecovered, compare, describe, summary

KEPT_DIFFERENCES = 20
# The data are half there; they are whole, and what uses them has not been seen well yet.
UNENDED = ("under way", "restored")
PENDING = STATE / "backup.owner.new"
LOG = pathlib.Path("/var/log/mlflow-kit-backup-recovery.log")


def database_of(settings: Settings) -> Database | None:
    """The database that this host backs up, if it does."""
    return Database(settings) if settings.database else None


def host_files(settings: Settings) -> bytes:
    """An archive of the configuration that the settings name, for looking things up: a restore does not need it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for path in [*settings.held["paths"], str(SITE_FILES)]:
            with contextlib.suppress(FileNotFoundError):
                archive.add(path)
    return data.getvalue()


def keep_site_files(settings: Settings) -> None:
    """Bring vault and inventory, encrypted by the vault's password, to the target's folder site/. Raises Failed."""
    for path in sorted(SITE_FILES.glob("*")):
        if settings.directory:
            target = settings.directory / "site"
            try:
                target.mkdir(mode=0o700, exist_ok=True)
                if not (target / path.name).exists() or (target / path.name).read_text() != path.read_text():
                    replace(target / path.name, path.read_text(), 0o600)
            except OSError as error:
                raise Failed(f"{settings.target_words} cannot be written: {error}", bucket.FULL) from error
        else:
            done = settings.rclone("copyto", str(path), f"target:{settings.base}/site/{path.name}")
            if done.returncode:
                raise Failed(f"{settings.target_words} cannot be written: {last(done)}", bucket.FULL)


def refuse_during_restore() -> None:
    """Refuse to copy what is half restored. Raises Failed."""
    under_way = read_state("restore.json")
    if under_way.get("result") == "under way":
        raise Failed(
            f"a restore that was begun at {under_way['started']} has not come to its end",
            "run the same playbooks/restore.yml again; it completes what is left",
        )


def take(settings: Settings, only_bucket: bool) -> dict[str, Any]:
    """Take a backup: the database first, then the bucket, so that what the database names is in the copy."""
    moment, began = now(), time.monotonic()
    before = read_state("backup.json")
    state: dict[str, Any] = {
        "result": "failed",
        "kind": "bucket" if only_bucket else "all",
        "id": moment.strftime(ID),
        "started": iso(moment),
        "target": settings.target_words,
        "local": settings.local(),
        "last_good": before.get("last_good"),
        "last_good_bucket": before.get("last_good_bucket"),
    }
    try:
        _take(settings, only_bucket, state)
        state["result"] = "ok"
        if (after := read_state("restore.json")).get("result") == "restored":
            write_state("restore.json", {**after, "result": "ok", "finished": iso(now())})
    except Failed as error:
        state["error"] = str(error)
        raise
    finally:
        state["finished"] = iso(now())
        state["duration_s"] = round(time.monotonic() - began, 1)
        if state["result"] == "ok":
            facts = ("id", "started", "finished", "duration_s", "database", "bucket")
            good = {name: state[name] for name in facts if name in state}
            state["last_good_bucket"] = good if settings.bucket else None
            if not only_bucket:
                state["last_good"] = good
        write_state("backup.json", state)
    return state


def _take(settings: Settings, only_bucket: bool, state: dict[str, Any]) -> None:
    refuse_during_restore()
    settings.check_owner()
    database = None if only_bucket else database_of(settings)
    # All that can be refused is refused before anything is written.
    settings.need(0, "a backup")
    bucket.catalogs(settings)
    if settings.bucket:
        bucket.reach(settings)
    manifest: dict[str, Any] = {"id": state["id"], "started": state["started"]}
    if database:
        database.reach()
        known = database.backups()
        settings.need(known[-1]["info"]["repository"]["delta"] if known else database.size() // 4, "the database")
        database.check()
        keep_site_files(settings)
        backup = database.backup(int(settings.held["full_days"]))
        prints = database.fingerprint(f"mlflow-kit-{state['id']}")
        database.archived()
        manifest["database"] = {**prints, "label": backup["label"], "version": database.version}
        state["database"] = summary(backup, prints)
        print(describe(state["database"]), flush=True)
    else:
        keep_site_files(settings)
    if settings.bucket:
        moment = now()
        copied = bucket.copy(settings, moment)
        state["bucket"] = vars(copied)
        print(bucket.describe(copied), flush=True)
    if not only_bucket:
        files = host_files(settings)
        bucket.store(settings, f"host/{state['id']}.tar.gz", files)
        bucket.store(settings, f"manifests/{state['id']}.json", json.dumps(manifest).encode())
        state["host_files_bytes"] = len(files)
        _expire(settings, database)


def _expire(settings: Settings, database: Database | None) -> None:
    oldest = None
    if database and (backups := database.backups()):
        oldest = float(backups[0]["timestamp"]["start"])
    cutoff = bucket.cutoff(settings, oldest)
    if settings.bucket:
        dropped = bucket.expire(settings, cutoff, now())
        if dropped:
            print(f"bucket: {dropped} versions were older than backup_retention_days", flush=True)
    for folder, suffix in (("host", ".tar.gz"), ("manifests", ".json")):
        for name in bucket.names(settings, folder, suffix)[:-1]:
            if name < time.strftime(ID, time.gmtime(cutoff)):
                settings.rclone("deletefile", f"copy:{folder}/{name}{suffix}")


def manifests(settings: Settings) -> list[str]:
    """The IDs of the complete backups, oldest first. Raises Failed."""
    return bucket.names(settings, "manifests", ".json")


def drill(settings: Settings) -> dict[str, Any]:
    """Restore the newest backup into a scratch place and compare. Raises Failed for a difference."""
    moment, began = now(), time.monotonic()
    state: dict[str, Any] = {
        "result": "failed",
        "started": iso(moment),
        "differences": 0,
        "target": settings.target_words,
    }
    state["last_good"] = read_state("drill.json").get("last_good")
    try:
        differences = _drill(settings, state)
        state["differences"], state["first_differences"] = len(differences), differences[:KEPT_DIFFERENCES]
        for line in differences[:KEPT_DIFFERENCES]:
            print(f"DIFFERENT: {line}", flush=True)
        if differences:
            raise Failed(
                f"the backup {state['backup']} does not come back as it was: {len(differences)} differences, such as "
                f"{differences[0]}",
                "see the target's disk; take a new backup (playbooks/backup.yml) and drill again; "
                "until that is good, do not count on restoring",
            )
        state["result"] = "ok"
        state["last_good"] = {k: state[k] for k in ("backup", "started", "database", "bucket") if k in state}
    except Failed as error:
        state["error"] = str(error)
        raise
    finally:
        state["finished"], state["duration_s"] = iso(now()), round(time.monotonic() - began, 1)
        write_state("drill.json", state)
    return state


def _drill(settings: Settings, state: dict[str, Any]) -> list[str]:
    settings.check_owner()
    known = manifests(settings)
    if not known:
        raise Failed("there is no backup yet", "take the first: playbooks/backup.yml")
    state["backup"] = known[-1]
    done = settings.rclone("cat", f"copy:manifests/{known[-1]}.json")
    try:
        manifest = json.loads(done.stdout)
    except ValueError:
        raise Failed(f"the manifest {known[-1]} cannot be read: {last(done)}", bucket.TARGET) from None
    differences = []
    if manifest.get("database") and settings.database:
        database = Database(settings)
        found = _drill_database(settings, database, manifest["database"], state)
        differences += compare(manifest["database"]["tables"], found)
    if settings.bucket:
        facts, wrong = bucket.verify(settings, int(settings.held["drill_objects_percent"]))
        state["bucket"], differences = facts, differences + wrong
        print(
            f"bucket: {facts['objects']} objects in {facts['versions']} versions, {facts['read']} read back "
            f"({megabytes(facts['read_bytes'])})",
            flush=True,
        )
    return differences


def _drill_database(settings: Settings, database: Database, wanted: dict[str, Any], state: dict[str, Any]) -> Any:
    scratch = pathlib.Path(settings.held["drill_directory"])
    data = scratch / "data"
    size = next((one["info"]["size"] for one in database.backups() if one["label"] == wanted["label"]), None)
    if size is None:
        raise Failed(f"the backup {wanted['label']} of the database is gone", "take a new one: playbooks/backup.yml")
    database.end(data)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        scratch.chmod(0o711)
        free = shutil.disk_usage(scratch).free
        if free < size + (1 << 30):
            raise Failed(
                f"backup_drill_directory: {scratch} has {megabytes(free)} free, and the database needs "
                f"{megabytes(size + (1 << 30))}",
                "name a larger place in backup_drill_directory and run site.yml",
            )
        call(["install", "-d", "-m", "0700", "-o", "postgres", "-g", "postgres", str(data)])
        began = time.monotonic()
        try:
            database.restore(
                data,
                f"--set={wanted['label']}",
                "--type=name",
                f"--target={wanted['mark']}",
                # That of the backup, which the mark followed at once: a new target has no file about it.
                "--target-timeline=current",
                "--target-action=promote",
                "--archive-mode=off",
            )
            with database.private(data, database.scratch_config(scratch), LOG) as socket:
                found = database.sums(list(wanted["tables"]), socket)
        except NotRecovered as error:
            raise Failed(f"the restored database does not start: {str(error)[-600:]}", bucket.TARGET) from None
        checked = call([str(database.bin / "pg_checksums"), "--check", "-D", str(data)], user="postgres")
        if checked.returncode and b"not enabled" not in checked.stderr:
            raise Failed(f"the restored database has damaged pages: {last(checked)}", bucket.TARGET)
        rows = sum(int(count) for tables in found.values() for count, _ in tables.values())
        state["database"] = {
            "bytes": size,
            "tables": sum(map(len, found.values())),
            "rows": rows,
            "restore_s": round(time.monotonic() - began, 1),
        }
        print(f"database: {megabytes(size)} restored, {rows} rows compared", flush=True)
        return found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def moment_of(text: str, name: str = "restore_time") -> float | None:
    """The time that an operator gave by `name`, in seconds since 1970; None for the latest. Raises Failed."""
    if not text:
        return None
    try:
        moment = seconds(text)
    except ValueError:
        raise Failed(
            f"{name}: found «{text}», expected a time with its zone such as {iso(now())}",
            f"change {name}; a blank between date and time would end the value",
        ) from None
    return moment


def check_restore(settings: Settings, text: str, confirmation: str, timeline: str) -> dict[str, Any]:
    """See that a restore to `text` can work, without changing anything; return what it would do. Raises Failed."""
    moment, database = moment_of(text), database_of(settings)
    settings.check_target()
    owner = settings.owner()
    if not owner:
        raise Failed(
            f"{settings.target_words} holds no backups", "mount the directory that does, or name the right target"
        )
    if timeline and not timeline.isdigit():
        raise Failed(f"restore_timeline: found «{timeline}», expected a number", "change restore_timeline")
    own = owner == settings.own_mark()
    catalogs, known = bucket.catalogs(settings), manifests(settings)
    if not known or (settings.bucket and not catalogs):
        raise Failed(f"{settings.target_words} holds no complete backup", "take one first: playbooks/backup.yml")
    plan: dict[str, Any] = {"to": text or "the latest", "own": own, "backups": len(known)}
    if database:
        plan.update(_check_database(settings, database, moment, own))
    if settings.bucket:
        bucket.reach(settings)
        versions = bucket.Catalog(settings).at(moment)
        plan["objects"], plan["bucket_bytes"] = len(versions), sum(v.size for v in versions.values())
        plan["bucket_copied"] = iso(time.mktime(time.strptime(catalogs[-1], ID)) - time.timezone)
    _check_disk(settings, database, plan)
    plan["holds"] = _holds(settings, database)
    resumed = read_state("restore.json").get("result") in UNENDED
    if plan["holds"] and not resumed and confirmation != settings.held["site"]:
        raise Failed(
            f"this host holds data: {plan['holds']}. The restore puts {plan['to']} in their place",
            f"if that is meant, add -e restore_confirm={settings.held['site']}",
        )
    plan["resumed"] = resumed
    return plan


def _check_database(settings: Settings, database: Database, moment: float | None, own: bool) -> dict[str, Any]:
    backups, info = database.backups(), database.info()
    if not backups:
        raise Failed("pgBackRest's repository holds no backup of the database", "take one first: playbooks/backup.yml")
    version = str(info["db"][-1]["version"])
    if version != database.version:
        raise Failed(
            f"the backups are of PostgreSQL {version}, and this host has {database.version}",
            f"deploy on the Debian that has PostgreSQL {version} (15: Debian 12, 17: Debian 13), or set "
            "postgresql_version",
        )
    first, newest = float(backups[0]["timestamp"]["stop"]), database.last_archived()
    latest = now().timestamp() if own and database_runs(database) else newest
    if moment is not None and not first <= moment <= latest:
        raise Failed(
            f"restore_time: found {iso(moment)}, expected a time from {iso(first)} to {iso(latest)}",
            "change restore_time, or leave it out for the latest",
        )
    return {"database_bytes": backups[-1]["info"]["size"], "from": iso(first), "until": iso(latest)}


def database_runs(database: Database) -> bool:
    """Whether PostgreSQL runs."""
    return call(["systemctl", "is-active", "--quiet", database.unit]).returncode == 0


def _check_disk(settings: Settings, database: Database | None, plan: dict[str, Any]) -> None:
    wanted: dict[int, tuple[int, str]] = {}
    if database:
        there = _tree_size(database.data)
        wanted[database.data.parent.stat().st_dev] = (
            max(plan["database_bytes"] - there, 0) + (1 << 29),
            str(database.data),
        )
    data = settings.bucket and settings.bucket["data_directory"]
    if data and pathlib.Path(data).exists():
        device, there = pathlib.Path(data).stat().st_dev, _tree_size(pathlib.Path(data))
        before = wanted.get(device, (0, ""))[0]
        wanted[device] = (before + max(plan["bucket_bytes"] - there, 0) + (1 << 29), data)
    for size, path in wanted.values():
        free = shutil.disk_usage(pathlib.Path(path).parent).free
        if free < size:
            raise Failed(
                f"the disk of {path} has {megabytes(free)} free, and the restore needs {megabytes(size)}",
                "give it more space",
            )


def _tree_size(path: pathlib.Path) -> int:
    done = call(["du", "--summarize", "--bytes", str(path)])
    return int(done.stdout.split()[0]) if done.stdout.split() else 0


def _holds(settings: Settings, database: Database | None) -> str:
    """What the host holds that a restore would replace, in words; nothing when it is as new."""
    held = []
    if database and database.data.exists():
        if not database_runs(database):
            held.append(f"a database in {database.data} (PostgreSQL does not run, so it was not looked into)")
        elif not database.is_empty():
            held.append("a database with runs, models or experiments")
    if settings.bucket:
        found = bucket.listing(settings, f"source:{settings.bucket['bucket']}")
        if found:
            held.append(f"{len(found)} objects in the bucket {settings.bucket['bucket']}")
    return " and ".join(held)


def begin_restore(settings: Settings, text: str, save: bool) -> None:
    """Save what is there now, so that this can be taken back, and mark the restore as begun. Raises Failed."""
    state = read_state("restore.json")
    if state.get("result") not in UNENDED:
        if save and settings.owner() == settings.own_mark():
            database = database_of(settings)
            if database:
                _reach_to_save(database)
                database.sql(f"SELECT pg_create_restore_point('mlflow-kit-before-restore-{now().strftime(ID)}');")
                state["saved_timeline"] = database.timeline()
                state["saved"] = iso(now())
                database.archived()
            if settings.bucket:
                print(bucket.describe(bucket.copy(settings, now())), flush=True)
        state.update(started=iso(now()), to=text or "the latest")
    state["result"] = "under way"
    write_state("restore.json", state)


def _reach_to_save(database: Database) -> None:
    try:
        database.reach()
    except Failed as error:
        raise Failed(
            f"what is there now cannot be saved before the restore: {error.cause}",
            f"{error.step}; or, if it is worth nothing, add -e restore_save=false",
        ) from None


def restore_database(settings: Settings, text: str, timeline: str) -> None:
    """Put the database of the time `text` in place of what is there; it is stopped before and after. Raises Failed."""
    database = database_of(settings)
    if not database:
        return
    moment, began = moment_of(text), time.monotonic()
    database.stopped()
    line = [f"--target-timeline={timeline}"] if timeline else []
    target = [] if moment is None else ["--type=time", f"--target={_for_postgresql(moment)}", "--target-action=promote"]
    try:
        _recover(database, [*target, *line])
    except NotRecovered as error:
        if not target or not error.too_early:
            raise Failed(
                f"the restored database does not start: {str(error)[-800:]}",
                f"the whole log is {LOG}; run the restore again, or to another restore_time",
            ) from None
        # Nothing was committed between the log's end and that time: its end is the state of that time.
        with_set = [one for one in database.backups() if one["timestamp"]["stop"] <= (moment or 0)]
        _recover(database, [f"--set={with_set[-1]['label']}", *line])
    if owner := settings.owner():
        settings.adopt(owner)
    print(f"database: restored in {time.monotonic() - began:.1f} s", flush=True)


def _for_postgresql(moment: float) -> str:
    """`moment` (seconds since 1970) as PostgreSQL reads it."""
    return iso(moment).replace("T", " ").replace("Z", "+00")


def _recover(database: Database, argv: list[str]) -> None:
    """Restore what differs and let it recover out of every client's sight. Raises Failed, NotRecovered."""
    call(["install", "-d", "-m", "0700", "-o", "postgres", "-g", "postgres", str(database.data)])
    database.restore(database.data, "--delta", *argv)
    with database.private(database.data, database.config, LOG):
        pass


def restore_bucket(settings: Settings, text: str) -> None:
    """Bring the bucket to the time `text`. Raises Failed."""
    if not settings.bucket:
        return
    began = time.monotonic()
    done = bucket.restore(settings, moment_of(text))
    if owner := settings.owner():
        settings.adopt(owner)
    state = read_state("restore.json")
    state["bucket"] = vars(done)
    write_state("restore.json", state)
    print(
        f"bucket: {done.objects} objects, {megabytes(done.bytes)}; {done.sent} sent, {done.removed} newer ones "
        f"removed, in {time.monotonic() - began:.1f} s",
        flush=True,
    )


def restored() -> None:
    """Remember that the data are whole: the same restore may be run again, and backups may go on."""
    write_state("restore.json", {**read_state("restore.json"), "result": "restored"})


def end_restore(settings: Settings) -> dict[str, Any]:
    """Look at what is there now and mark the restore as done. Raises Failed."""
    state, database = read_state("restore.json"), database_of(settings)
    if database:
        found = database.sums(database.names, "/var/run/postgresql")
        rows = sum(int(count) for tables in found.values() for count, _ in tables.values())
        state["database"] = {"bytes": database.size(), "rows": rows, "timeline": database.timeline()}
    state.update(result="ok", finished=iso(now()))
    if "started" in state:
        state["duration_s"] = round(now().timestamp() - seconds(state["started"]))
    write_state("restore.json", state)
    return state


def prepare(settings: Settings, dry: bool) -> dict[str, Any]:
    """Make what the target lacks for this host's backups; return what was made, and what is in the way."""
    made: list[str] = []
    if settings.directory and settings.held["require_mount"]:
        settings.check_target()
    elif settings.directory and not settings.directory.is_dir():
        made.append(f"made {settings.directory}")
        if dry:
            return {"made": made, "foreign": ""}
        settings.directory.mkdir(parents=True)
        settings.directory.chmod(0o711)
    own, owner = settings.own_mark(), settings.owner()
    if owner and owner != own and PENDING.exists() and PENDING.read_text().strip() == owner:
        made.append("marked this host as the target's")
        own = owner
        if not dry:
            settings.adopt(owner)
            PENDING.unlink()
    if not owner and not settings.began_here():
        own = ""  # a new target
    elif owner == own != "" and not settings.began_here() and not dry:
        settings.adopt(own)  # the same backups at another place
    if (owner or own) and owner != own:
        try:
            settings.check_owner()
        except Failed as error:
            return {"made": made, "foreign": str(error)}
    database = database_of(settings)
    repository = settings.directory / "pgbackrest" if settings.directory and database else None
    if repository and not repository.is_dir():
        made.append(f"made {repository}")
        if not dry:
            call(["install", "-d", "-m", "0750", "-o", "postgres", "-g", "postgres", str(repository)])
    if database and not dry:
        found = database.info() if repository is None or (repository / "backup").exists() else {}
        if not found or found["status"]["code"] in (1, 3):
            done = database.pgbackrest("stanza-create", "--log-level-console=error")
            if done.returncode:
                raise Failed(f"pgBackRest could not begin: {last(done)}", "see the target, and run site.yml again")
            made.append("began pgBackRest's repository")
    if not owner:
        made.append("marked the target as this site's")
        if not dry:
            _mark(settings)
    return {"made": made, "foreign": ""}


def _mark(settings: Settings) -> None:
    """Mark target and host as belonging together. The name is chosen before either has it, so this can be repeated."""
    STATE.mkdir(parents=True, exist_ok=True)
    STATE.chmod(0o755)
    if not PENDING.exists():
        replace(PENDING, f"{settings.held['site']}-{now().strftime(ID)}-{os.urandom(4).hex()}\n", 0o600)
    if settings.directory:
        replace(settings.directory / "owner", PENDING.read_text(), 0o600)
    else:
        done = settings.rclone("rcat", f"target:{settings.base}/owner", stdin=PENDING.read_text())
        if done.returncode:
            raise Failed(f"{settings.target_words} cannot be written: {last(done)}", bucket.FULL)
    settings.adopt(PENDING.read_text().strip())
    PENDING.unlink()

"""What a backup does on a real PostgreSQL and a real Swift, and what it does when something is in its way."""

from __future__ import annotations

import json
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

VM = "kit-backup-vm"
ROOT = pathlib.Path(__file__).parents[3]
PLACE = "/var/backups/mlflow-kit"
SECRETS = (
    "scenario-database-key-0123456789",
    "scenario-bucket-key-0123456789",
    "scenario-bucket-salt-0123456789",
    "scenario-s3-key-0123456789abcdef",
)
KEEP = "/root/keep"
HostOf = Callable[[str], Any]


@pytest.fixture
def host(host_of: HostOf) -> Any:
    """The machine of the scenario."""
    return host_of(VM)


def converge(*more: str, check: bool = True) -> str:
    """Run the scenario's converge again with further arguments of ansible-playbook, and return its output."""
    argv = ["molecule", "converge", "-s", "backup", "--", *more]
    done = subprocess.run(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def kit(host: Any, *argv: str, ok: bool = True) -> str:
    """Run mlflow-kit-backup and return what it says; it must succeed, or with `ok=False` fail."""
    done = host.run("mlflow-kit-backup " + " ".join(argv))
    assert (done.rc == 0) is ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return " ".join((done.stdout + done.stderr).split())


def state(host: Any, name: str = "backup") -> dict[str, Any]:
    """A state file."""
    held: dict[str, Any] = json.loads(host.check_output(f"cat /var/lib/mlflow-kit/{name}.json"))
    return held


def sql(host: Any, text: str) -> str:
    """Ask the database."""
    found: str = host.check_output(f'su postgres -c "psql -XAtq -d mlflow -c \\"{text}\\""')
    return found


def rclone(host: Any, command: str, check: bool = True) -> str:
    """Use the remotes of the program itself: source, target and copy. With `check` it must succeed."""
    code = (
        "import sys; sys.path.insert(0, '/usr/local/lib/mlflow-kit-backup')\n"
        "from kit_backup.common import Settings\n"
        f"done = Settings().rclone(*{command.split(' ')!r})\n"
        "sys.stderr.buffer.write(done.stderr); sys.stdout.buffer.write(done.stdout); sys.exit(done.returncode)"
    )
    done = host.run(f'python3 -c "{code}"')
    assert not check or done.rc == 0, done.stdout + done.stderr
    return str(done.stdout)


def put(host: Any, key: str, content: str) -> None:
    """Put an object into the bucket."""
    host.check_output(f"printf %s '{content}' > /root/object")
    rclone(host, f"copyto /root/object source:mlflow/{key}")


def objects(host: Any) -> dict[str, str]:
    """The bucket's objects with their MD5."""
    found = {}
    for line in rclone(host, "md5sum source:mlflow").splitlines():
        digest, _, key = line.partition("  ")
        found[key] = digest
    return found


def now(host: Any) -> str:
    """The machine's time, with a second of silence on both sides."""
    time.sleep(1.1)
    text: str = host.check_output("date -u +%Y-%m-%dT%H:%M:%SZ")
    time.sleep(1.1)
    return text


@pytest.fixture(scope="module")
def filled(host_of: HostOf) -> Any:
    """The machine with a table, some objects and a first backup."""
    host = host_of(VM)
    sql(host, "CREATE TABLE IF NOT EXISTS runs (id int, note text)")
    sql(host, "INSERT INTO runs SELECT n, md5(n::text) FROM generate_series(1, 1000) AS n")
    for number in range(5):
        put(host, f"run-{number}/a+b%20c.txt", f"content {number}")
    kit(host, "run", "backup")
    return host


@pytest.fixture
def whole(filled: Any) -> Iterator[Any]:
    """The same, and after the test the target is as it was."""
    filled.check_output(f"rm -rf {KEEP}; cp -a {PLACE} {KEEP}")
    yield filled
    filled.check_output(f"find {PLACE} -mindepth 1 -delete; cp -a {KEEP}/. {PLACE}/")


def test_the_first_backup_says_what_is_in_it(filled: Any) -> None:
    held = state(filled)
    assert (held["result"], held["kind"], held["database"]["type"]) == ("ok", "all", "full")
    assert (held["database"]["rows"], held["bucket"]["objects"], held["bucket"]["copied"]) == (1000, 5, 5)
    assert held["database"]["bytes"] > 1_000_000 and held["duration_s"] > 0
    listed = filled.check_output(f"mlflow-kit-backup files {held['id']} | tar tz")
    assert {"etc/swift/object.ring.gz", "etc/swift/object.builder", "etc/swift/swift.conf"} <= set(listed.split())
    assert "etc/mlflow-kit-backup/site/note.vault" in listed


def test_the_next_one_copies_what_changed(filled: Any) -> None:
    """An object of another content but the same size is seen; what is gone is set aside."""
    put(filled, "run-0/a+b%20c.txt", "CONTENT 0")
    put(filled, "run-9/new", "new")
    rclone(filled, "deletefile source:mlflow/run-1/a+b%20c.txt")
    kit(filled, "run", "bucket")
    held = state(filled)
    assert held["kind"] == "bucket" and held["last_good"]["id"] < held["id"]
    assert {k: held["bucket"][k] for k in ("objects", "copied", "set_aside")} == {
        "objects": 5,
        "copied": 2,
        "set_aside": 2,
    }
    kit(filled, "run", "backup")
    held = state(filled)
    assert held["database"]["type"] == "diff" and held["bucket"]["copied"] == 0


def test_a_drill_compares_and_clears_up(filled: Any) -> None:
    said = kit(filled, "run", "drill")
    held = state(filled, "drill")
    assert (held["result"], held["database"]["rows"], held["bucket"]["versions"]) == ("ok", 1000, 7)
    assert held["bucket"]["read"] == 7, said
    assert not filled.file("/var/lib/mlflow-kit/drill").exists
    assert filled.run("pgrep -f /var/lib/mlflow-kit/drill").rc == 1


def encrypted(host: Any, name: str) -> str:
    """The file in which the copy keeps `name`."""
    line = rclone(host, f"cryptdecode --reverse copy: {name}")
    return f"{PLACE}/objects/{line.split()[-1]}"


def largest_bundle(host: Any) -> str:
    """The file with most of the database in it."""
    found: str = host.check_output(f"ls -S {PLACE}/pgbackrest/backup/mlflow-kit/*F/bundle/* | head -1")
    return found


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("database", "pgBackRest could not restore"),
        ("object", "current: run-2/a+b%20c.txt cannot be read back"),
        ("object gone", "current: run-2/a+b%20c.txt is missing"),
        ("old version", "a+b%20c.txt cannot be read back"),
        ("count", "public.runs has 1000 rows, and had 999"),
    ],
)
def test_a_damaged_backup_fails_the_drill(whole: Any, what: str, words: str) -> None:
    """Whatever is damaged: the unit fails, so that it is seen, and the scratch is cleared away."""
    flip = "printf X | dd of='{0}' bs=1 seek={1} conv=notrunc status=none"
    if what == "database":
        whole.check_output(flip.format(largest_bundle(whole), 9000))
    elif what == "object":
        whole.check_output(flip.format(encrypted(whole, "current/run-2/a+b%20c.txt"), 50))
    elif what == "object gone":
        whole.check_output(f"rm '{encrypted(whole, 'current/run-2/a+b%20c.txt')}'")
    elif what == "old version":
        folder = rclone(whole, "lsf --dirs-only copy:old").split()[0]
        whole.check_output(flip.format(encrypted(whole, f"old/{folder}run-0/a+b%20c.txt"), 50))
    else:
        name = rclone(whole, "lsf copy:manifests").split()[-1]
        manifest = json.loads(rclone(whole, f"cat copy:manifests/{name}"))
        manifest["database"]["tables"]["mlflow"]["public.runs"][0] = "999"
        whole.check_output(f"printf %s '{json.dumps(manifest)}' > /root/manifest")
        rclone(whole, f"copyto /root/manifest copy:manifests/{name}")
    assert words in kit(whole, "run", "drill", ok=False)
    held = state(whole, "drill")
    assert held["result"] == "failed" and held["last_good"]
    assert whole.run("systemctl is-failed mlflow-kit-drill.service").stdout.strip() == "failed"
    assert not whole.file("/var/lib/mlflow-kit/drill").exists


def test_the_copy_heals_itself(whole: Any) -> None:
    """What somebody took out of the copy is copied again by the next backup."""
    whole.check_output(f"rm '{encrypted(whole, 'current/run-2/a+b%20c.txt')}'")
    kit(whole, "run", "bucket")
    assert state(whole)["bucket"]["copied"] == 1
    kit(whole, "run", "drill")


@pytest.mark.parametrize(
    ("unit", "words", "kind"),
    [
        ("postgresql@*-main", "PostgreSQL did not answer", "backup"),
        ("swift-proxy", "the bucket mlflow does not answer", "backup"),
        ("swift-proxy", "the bucket mlflow does not answer", "bucket"),
    ],
)
def test_what_is_stopped_is_named_and_nothing_is_begun(whole: Any, unit: str, words: str, kind: str) -> None:
    """With the next step; and what was good before is untouched."""
    name = whole.check_output(f"systemctl list-units --plain --no-legend '{unit}.service'").split()[0]
    before, listed = state(whole), whole.check_output(f"find {PLACE} -type f | grep -v /archive/ | sort")
    whole.check_output(f"systemctl stop {name}")
    try:
        said = kit(whole, "run", kind, ok=False)
    finally:
        whole.check_output(f"systemctl start {name}")
    assert words in said and "Next: " in said and name.split(".")[0] in said
    held = state(whole)
    assert held["result"] == "failed" and held["last_good"] == before["last_good"]
    assert whole.check_output(f"find {PLACE} -type f | grep -v /archive/ | sort") == listed
    whole.check_output("sleep 1")
    kit(whole, "run", kind)


def test_a_full_target_is_refused_or_ends_the_backup(whole: Any) -> None:
    """Before it begins where that is foreseen, in the middle where not; the backup before that stays good."""
    sql(
        whole,
        "CREATE TABLE bulk AS SELECT gen_random_uuid() AS a, gen_random_uuid() AS b FROM generate_series(1, 900000)",
    )
    try:
        before = state(whole)["last_good"]
        whole.check_output(f"fallocate -l $(($(df --output=avail -B1 {PLACE} | tail -1) - 20000000)) {PLACE}/filler")
        said = kit(whole, "run", "backup", ok=False)
        assert "pgBackRest could not take the backup" in said and "MB are free in" in said
        assert "see that the target is mounted, has space" in said and "earlier backups are untouched" in said
        assert state(whole)["last_good"] == before
        whole.check_output("head -c 40000000 /dev/urandom > /root/object")
        rclone(whole, "copyto /root/object source:mlflow/big/object")
        said = kit(whole, "run", "bucket", ok=False)
        assert "is too full for 1 new objects of the bucket" in said and "backup_retention_days" in said
        assert state(whole)["last_good"] == before
        # PostgreSQL goes on meanwhile.
        assert sql(whole, "INSERT INTO bulk VALUES (null) RETURNING 1") == "1"
    finally:
        whole.check_output(f"rm -f {PLACE}/filler")
        rclone(whole, "delete source:mlflow/big")
        sql(whole, "DROP TABLE bulk")
    kit(whole, "run", "drill")
    kit(whole, "run", "backup")


def test_a_target_that_lost_its_mount_is_not_filled(filled: Any) -> None:
    """An empty folder where the backups were is not taken for a new beginning."""
    filled.check_output("mount -t tmpfs none /var/backups/mlflow-kit")
    try:
        assert "is it mounted?" in kit(filled, "run", "backup", ok=False)
        assert filled.check_output(f"ls -A {PLACE}") == ""
    finally:
        filled.check_output("umount /var/backups/mlflow-kit")
    kit(filled, "run", "backup")


def test_other_secrets_are_named_and_nothing_is_written(whole: Any) -> None:
    """Under another vault the backups cannot be read, and are not added to."""
    listed = whole.check_output(f"find {PLACE} -type f | grep -v /archive/ | sort")
    converge("-e", "backup_bucket_key=another-bucket-key-0123456789")
    try:
        assert "other secrets than vault_backup_bucket_key" in kit(whole, "run", "backup", ok=False)
    finally:
        converge()
    assert whole.check_output(f"find {PLACE} -type f | grep -v /archive/ | sort") == listed
    out = converge("-e", "backup_database_key=another-database-key-0123456789", check=False)
    assert "vault_backup_database_key is not the one" in " ".join(out.split())
    converge()
    kit(whole, "run", "backup")


def test_restore_to_a_time_and_back(filled: Any) -> None:
    """Database and bucket of that moment, and then, since it was saved, what was there before the restore."""
    put(filled, "run-2/a+b%20c.txt", "before")
    kit(filled, "run", "backup")
    wanted, rows, moment = objects(filled), sql(filled, "SELECT count(*) FROM runs"), now(filled)
    put(filled, "run-2/a+b%20c.txt", "after!")
    put(filled, "run-7/later", "later")
    rclone(filled, "deletefile source:mlflow/run-3/a+b%20c.txt")
    sql(filled, "INSERT INTO runs SELECT n, 'later' FROM generate_series(1, 50) AS n")
    kit(filled, "run", "bucket")  # sees that one is gone, which counts as there until then
    later, then = objects(filled), now(filled)
    said = kit(filled, "check-restore", f"--time='{moment}'", ok=False)
    assert "this host holds data" in said and "-e restore_confirm=scenario" in said
    timeline = sql(filled, "SELECT timeline_id FROM pg_control_checkpoint()")
    restore(filled, moment)
    assert (objects(filled), sql(filled, "SELECT count(*) FROM runs")) == (wanted, rows)
    kit(filled, "restore", f"--time={then}", f"--timeline={timeline}", "--confirm=scenario")
    filled.check_output("systemctl start postgresql@$(ls /etc/postgresql)-main")
    kit(filled, "end-restore")
    assert (objects(filled), sql(filled, "SELECT count(*) FROM runs")) == (later, str(int(rows) + 50))


def test_one_object_comes_back(filled: Any) -> None:
    """Damaged on Swift's disk, or deleted: what S3 serves afterwards is what was stored."""
    put(filled, "run-8/damaged", "what was stored")
    put(filled, "run-8/deleted", "what was there")
    kit(filled, "run", "bucket")
    moment, before = now(filled), objects(filled)
    path = filled.check_output("grep -rl 'what was stored' /srv/swift/d1/objects --include=*.data")
    filled.check_output(f"printf 'WHAT' | dd of={path} conv=notrunc status=none")
    rclone(filled, "deletefile source:mlflow/run-8/deleted")
    # Swift compares while it answers: who reads it first may get what is on the disk, nobody after that.
    read = "md5sum --download source:mlflow/run-8"
    rclone(filled, read, check=False)
    assert "damaged" not in rclone(filled, read, check=False)
    found = filled.check_output("swift-object-info /srv/swift/*/quarantined/objects/*/*.data | grep Path:")
    assert found.strip().endswith("/mlflow/run-8/damaged")
    assert "run-8/damaged is there as it was" in kit(filled, "put-back", "run-8/damaged")
    kit(filled, "run", "bucket")
    assert "the backups hold no «run-8/deleted» of that time" in kit(filled, "put-back", "run-8/deleted", ok=False)
    assert "--time: found «soon», expected a time" in kit(filled, "put-back", "run-8/deleted", "--time=soon", ok=False)
    kit(filled, "put-back", "run-8/deleted", f"--time={moment}")
    assert objects(filled) == before
    filled.check_output("rm -r /srv/swift/*/quarantined/objects")


MOMENTS = (
    "grep -q 'under way' /var/lib/mlflow-kit/restore.json",
    "test -S /run/mlflow-kit-backup/pg/.s.PGSQL.5432",
    "pgrep -f 'rclone (copy copy:|delete)' >/dev/null",
    "pgrep -f 'pgbackrest.* restore' >/dev/null",
)


def restore(host: Any, moment: str) -> None:
    """What playbooks/restore.yml does on the host, killed at several moments and begun again each time."""
    arguments = f"--time={moment} --confirm=scenario"
    host.check_output("rm -f /var/lib/mlflow-kit/restore.json")
    for met in MOMENTS:
        killed(host, f"restore {arguments}", met)
        assert state(host, "restore")["result"] in ("under way", "restored"), host.check_output("cat /root/out")
    assert "run the same playbooks/restore.yml again" in kit(host, "run", "backup", ok=False)
    kit(host, "restore", arguments)
    host.check_output("systemctl start postgresql@$(ls /etc/postgresql)-main")
    kit(host, "end-restore")


def killed(host: Any, arguments: str, met: str) -> None:
    """Begin mlflow-kit-backup and kill it once the condition `met` (of the shell) holds."""
    host.check_output(
        f"mlflow-kit-backup {arguments} >/root/out 2>&1 & p=$!; "
        f"while kill -0 $p 2>/dev/null; do if {met}; then kill -9 $p; break; fi; sleep 0.02; done; wait $p; true"
    )


def test_a_copy_that_is_killed_loses_no_version(filled: Any) -> None:
    """An object is overwritten by another of the same size; the copy is killed in between; both can be had."""
    put(filled, "run-4/a+b%20c.txt", "one")
    kit(filled, "run", "bucket")
    wanted, moment = objects(filled), now(filled)
    put(filled, "run-4/a+b%20c.txt", "two")
    killed(filled, "take --bucket", "pgrep -f 'rclone copy source:mlflow' >/dev/null && sleep 0.3")
    kit(filled, "run", "bucket")
    kit(filled, "run", "drill")
    kit(filled, "restore", f"--time={moment}", "--confirm=scenario")
    filled.check_output("systemctl start postgresql@$(ls /etc/postgresql)-main")
    kit(filled, "end-restore")
    assert objects(filled) == wanted


def test_no_secret_shows(filled: Any) -> None:
    """Neither in what an ordinary user or a log reader sees, nor in the target."""
    out = converge("-vvv", "--diff")
    shown = filled.run(
        "journalctl --no-pager; systemctl cat 'mlflow-kit-*'; ps auxeww; cat /var/lib/mlflow-kit/*; "
        "find /etc /usr/local /run /var/log /var/lib/mlflow-kit -xdev -type f -perm -o=r -exec cat {} + 2>/dev/null; "
        f"grep -ra 'content [0-9]' {PLACE} || true"
    ).stdout_bytes.decode(errors="replace")
    assert len(shown) > 5000 and len(out) > 5000
    assert [secret for secret in SECRETS if secret in shown + out] == []
    assert "content 3" not in shown


def test_bad_settings_are_refused(filled: Any) -> None:
    """On the controller, all at once and by the variables' names."""
    bad = {
        "backup_retention_days": 0,
        "backup_full_days": 400,
        "backup_directory": "relative",
        "backup_drill_directory": "/",
        "backup_s3_bucket": "copies",
        "backup_s3_endpoint": "http://s3.example.org",
        "backup_archive_queue_max": "much",
        "backup_bucket_key": "short",
    }
    out = " ".join(converge("-e", json.dumps(bad), check=False).split())
    assert "configure |" not in out
    named = [f"{name}: found" for name in bad if name not in ("backup_s3_bucket", "backup_bucket_key")]
    named += ["backup_database_key, backup_bucket_key, backup_bucket_salt: found", "expected https"]
    assert [name for name in named if name not in out] == []


def test_it_can_be_switched_off(filled: Any) -> None:
    """Timers and secrets go, backups stay, and it can be switched on again."""
    converge("-e", '{"backup_enabled": false}')
    assert "mlflow-kit" not in filled.check_output("systemctl list-timers --all --no-pager")
    assert not filled.file("/etc/mlflow-kit-backup/settings.json").exists
    assert filled.file(f"{PLACE}/owner").exists
    converge()
    kit(filled, "run", "backup")


TLS_FRONT = """
apt-get install -qy --no-install-recommends nginx-light openssl >/dev/null
mkdir -p /etc/front && cd /etc/front
[ -e ca.crt ] || openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -keyout key \
  -out ca.crt -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 2>/dev/null
cat > nginx.conf <<'END'
events {}
http { server { listen 127.0.0.1:9443 ssl; ssl_certificate /etc/front/ca.crt; ssl_certificate_key /etc/front/key;
  client_max_body_size 0; location / { proxy_pass http://127.0.0.1:8080; proxy_set_header Host $http_host; } } }
END
systemctl stop nginx; systemctl reset-failed front 2>/dev/null; systemctl is-active -q front ||
  systemd-run -q --unit=front nginx -c /etc/front/nginx.conf -g 'daemon off;'
chmod 644 ca.crt
"""


def test_the_target_may_be_an_s3(filled: Any) -> None:
    """Another bucket, over TLS: pgBackRest and rclone write there, a drill reads it, and it has an owner, too."""
    filled.check_output(TLS_FRONT)
    # The program itself makes no buckets.
    rclone(filled, "lsf source:mlflow")
    filled.check_output("RCLONE_CONFIG=/run/mlflow-kit-backup/rclone.conf rclone mkdir source:copies")
    target = {
        "backup_s3_bucket": "copies",
        "backup_s3_prefix": "site",
        "backup_s3_endpoint": "https://127.0.0.1:9443",
        "backup_s3_access_key": "mlflow:backup",
        "backup_s3_secret_key": "scenario-s3-key-0123456789abcdef",
        "backup_ca_file": "/etc/front/ca.crt",
    }
    mark = "/var/lib/mlflow-kit/backup.owner"
    filled.check_output(f"cp {mark} /root/owner")
    try:
        converge("-e", json.dumps(target))
        kit(filled, "run", "backup")
        held = state(filled)
        assert held["result"] == "ok" and held["target"] == "https://127.0.0.1:9443/copies/site"
        put(filled, "run-2/a+b%20c.txt", "another")
        kit(filled, "run", "bucket")
        assert state(filled)["bucket"]["set_aside"] == 1
        kit(filled, "run", "drill")
        names = rclone(filled, "lsf -R --files-only source:copies/site")
        assert "site/note.vault" in names and "pgbackrest/" in names and "a+b" not in names
    finally:
        filled.check_output(f"mv /root/owner {mark}")
        converge()
        rclone(filled, "purge source:copies")
    kit(filled, "run", "backup")

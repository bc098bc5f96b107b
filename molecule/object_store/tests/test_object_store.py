"""The object store as its clients, its operator and an intruder meet it."""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import http.client
import json
import os
import pathlib
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import botocore.client
import botocore.config
import botocore.exceptions
import pytest
from kit import vm

NAME = "kit-object-store-vm"
BUCKET = "mlflow"
PORT = 8080
KEY_A = {"access_key": "mlflow:a", "secret_key": "test-secret-a-0123456789abcdef"}
KEY_B = {"access_key": "mlflow:b", "secret_key": "test-secret-b-0123456789abcdef"}
HASHES = ("test-prefix-0123456789", "test-suffix-0123456789")
ROOT = pathlib.Path(__file__).parents[3]
TRIXIE = os.environ.get("KIT_SUITE", "trixie") == "trixie"
MIB = 1024 * 1024
REFUSED = 403


def address() -> str:
    """The machine's IPv4 address, which may change with a reboot."""
    return vm.addresses(NAME)[0]


def s3(key: dict[str, str] = KEY_A, **options: Any) -> Any:
    """A client as Debian's release needs it: stock boto3 on 13, without new checksums on 12."""
    old = (
        {}
        if TRIXIE
        else dict.fromkeys(("request_checksum_calculation", "response_checksum_validation"), "when_required")
    )
    config = botocore.config.Config(s3={"addressing_style": "path"}, signature_version="s3v4", **old, **options)
    return boto3.client(
        "s3",
        endpoint_url=f"http://{address()}:{PORT}",
        region_name="us-east-1",
        aws_access_key_id=key["access_key"],
        aws_secret_access_key=key["secret_key"],
        config=config,
    )


def once(key: dict[str, str] = KEY_A) -> Any:
    """A client that does not repeat a failed request."""
    return s3(key, retries={"max_attempts": 0}, connect_timeout=5, read_timeout=30)


def status_of(call: Callable[[], Any]) -> int:
    """The HTTP status with which a call is answered."""
    try:
        return int(call()["ResponseMetadata"]["HTTPStatusCode"])
    except botocore.exceptions.ClientError as error:
        return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def fetch(url: str, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None) -> int:
    """The HTTP status of a plain request, as a client without credentials makes it."""
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def deploy(tmp_path: pathlib.Path, *options: str, **variables: Any) -> str:
    """Run the scenario's playbook with other variables and return what it prints, whatever comes of it."""
    extra = tmp_path / "vars.json"
    extra.write_text(json.dumps(variables))
    here = ROOT / "molecule"
    argv = ["ansible-playbook", "-i", f"{here}/_shared/inventory", "-i", f"{here}/object_store/inventory.yml"]
    argv += [f"{here}/object_store/converge.yml", "-e", f"@{extra}", *options]
    environment = {**os.environ, "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1", "PY_COLORS": "0"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, text=True, capture_output=True)
    return done.stdout + done.stderr


def objects(client: Any, bucket: str = BUCKET, prefix: str = "") -> dict[str, int]:
    """Every key of the bucket with its size."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}


def multipart(client: Any, key: str, parts: list[bytes]) -> None:
    """Upload an object in parts, eight at a time."""
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]

    def send(number: int) -> dict[str, Any]:
        part = {"PartNumber": number, "UploadId": upload, "Body": parts[number - 1]}
        return {"PartNumber": number, "ETag": client.upload_part(Bucket=BUCKET, Key=key, **part)["ETag"]}

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = list(pool.map(send, range(1, len(parts) + 1)))
    client.complete_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload, MultipartUpload={"Parts": done})


def segments(host: Any) -> list[str]:
    """Names of the parts that the bucket's multipart objects are made of, which S3 itself does not list."""
    script = (
        "from swift.common.internal_client import InternalClient; "
        "client = InternalClient('/etc/swift/internal-client.conf', 'test', 1); "
        f"print(*(item['name'] for item in client.iter_objects('AUTH_mlflow', '{BUCKET}+segments')), sep='\\n')"
    )
    found = host.check_output(f'cd / && setpriv --reuid=swift --regid=swift --clear-groups python3 -c "{script}"')
    return [line for line in str(found).splitlines() if line]


def wait_for(condition: Callable[[], Any], seconds: float) -> float:
    """Wait until the condition holds and return how long it took (seconds)."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - start


def answers() -> bool:
    """Whether the bucket answers right now."""
    try:
        once().head_bucket(Bucket=BUCKET)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
        return False
    return True


@pytest.fixture(scope="module")
def host(host_of: Callable[[str], Any]) -> Any:
    """The machine."""
    return host_of(NAME)


@pytest.fixture
def client() -> Iterator[Any]:
    """A client; what a test leaves in the bucket is removed after it."""
    yield s3()
    after = s3()  # a reboot may have changed the address
    for key in objects(after):
        after.delete_object(Bucket=BUCKET, Key=key)


def test_damage_is_found_before_anybody_reads_it(host: Any, client: Any) -> None:
    """What the disk has changed is set aside by the weekly reading, and nothing else is."""
    bodies = {f"audit/{name}": f"stored as {name}".encode() for name in ("damaged", "sound")}
    for key, body in bodies.items():
        client.put_object(Bucket=BUCKET, Key=key, Body=body)
    path = host.check_output("grep -rl 'stored as damaged' /srv/swift/*/objects --include=*.data")
    host.check_output(f"printf STORED | dd of={path} conv=notrunc status=none")
    host.check_output("systemctl start object-store-audit.service")
    assert host.check_output("systemctl show --value -p Result object-store-audit") == "success"
    aside = host.check_output("ls /srv/swift/*/quarantined/objects/*/*.data").split()
    assert host.check_output(f"swift-object-info {' '.join(aside)} | grep -c Path:") == "1"
    assert host.check_output(f"swift-object-info {aside[0]} | grep Path:").endswith("/audit/damaged")
    assert status_of(lambda: client.get_object(Bucket=BUCKET, Key="audit/damaged")) == 404
    assert client.get_object(Bucket=BUCKET, Key="audit/sound")["Body"].read() == bodies["audit/sound"]
    client.delete_object(Bucket=BUCKET, Key="audit/damaged")
    host.check_output("rm -r /srv/swift/*/quarantined/objects")


def test_objects_of_every_kind_of_name(client: Any) -> None:
    """Put, get, range, list with prefix, copy, delete; names as MLflow and people make them."""
    names = ["1/ab/artifacts/model/MLmodel", "space and ü/%41+&=.txt", "a//b", "x" * 900]
    for name in names:
        client.put_object(Bucket=BUCKET, Key=name, Body=name.encode(), ContentType="text/plain", Metadata={"who": "me"})
    for name in names:
        found = client.get_object(Bucket=BUCKET, Key=name)
        assert found["Body"].read() == name.encode()
        assert (found["ContentType"], found["Metadata"]) == ("text/plain", {"who": "me"})
    assert client.get_object(Bucket=BUCKET, Key=names[3], Range="bytes=10-19")["Body"].read() == b"x" * 10
    assert sorted(objects(client)) == sorted(names)
    page = client.list_objects_v2(Bucket=BUCKET, Prefix="1/", Delimiter="/")
    assert [item["Prefix"] for item in page["CommonPrefixes"]] == ["1/ab/"]
    client.copy_object(Bucket=BUCKET, Key="copy", CopySource={"Bucket": BUCKET, "Key": names[0]})
    assert client.get_object(Bucket=BUCKET, Key="copy")["Body"].read() == names[0].encode()
    client.delete_object(Bucket=BUCKET, Key="copy")
    assert status_of(lambda: client.head_object(Bucket=BUCKET, Key="copy")) == 404


def test_many_objects_are_deleted_in_one_request(client: Any) -> None:
    """DeleteObjects of current boto3 sends no Content-MD5: Debian 12's Swift would refuse it without the filter."""
    names = [f"many/{number:04}" for number in range(250)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: client.put_object(Bucket=BUCKET, Key=name, Body=b"1"), names))
    assert len(objects(client, prefix="many/")) == 250
    answer = client.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": name} for name in names]})
    assert len(answer["Deleted"]) == 250
    assert not answer.get("Errors")
    assert objects(client, prefix="many/") == {}


def test_multipart_of_more_than_a_thousand_parts(host: Any, client: Any) -> None:
    """Swift's defaults end at 1000 parts; S3 goes to 10000, and deleting the object deletes its parts."""
    parts = [f"{number:05};".encode() for number in range(1, 1002)]
    multipart(client, "parts/1001", parts)
    assert client.get_object(Bucket=BUCKET, Key="parts/1001")["Body"].read() == b"".join(parts)
    upload = client.create_multipart_upload(Bucket=BUCKET, Key="parts/last")["UploadId"]
    last = {"Bucket": BUCKET, "Key": "parts/last", "UploadId": upload}
    assert status_of(lambda: client.upload_part(PartNumber=10000, Body=b"z", **last)) == 200
    assert status_of(lambda: client.upload_part(PartNumber=10001, Body=b"z", **last)) == 400
    client.abort_multipart_upload(**last)
    client.delete_object(Bucket=BUCKET, Key="parts/1001")
    assert segments(host) == []


def test_large_object_arrives_whole(client: Any, tmp_path: pathlib.Path) -> None:
    """A file of 40 MiB goes by boto3's own multipart and comes back equal."""
    source, target = tmp_path / "up", tmp_path / "down"
    source.write_bytes(os.urandom(40 * MIB))
    start = time.monotonic()
    client.upload_file(str(source), BUCKET, "large")
    middle = time.monotonic()
    client.download_file(BUCKET, "large", str(target))
    print(f"40 MiB: up {40 / (middle - start):.0f} MiB/s, down {40 / (time.monotonic() - middle):.0f} MiB/s")
    assert hashlib.sha256(source.read_bytes()).digest() == hashlib.sha256(target.read_bytes()).digest()


def test_aborted_upload_leaves_nothing(host: Any, client: Any) -> None:
    """An aborted multipart upload is gone with its parts."""
    upload = client.create_multipart_upload(Bucket=BUCKET, Key="aborted")["UploadId"]
    client.upload_part(Bucket=BUCKET, Key="aborted", UploadId=upload, PartNumber=1, Body=b"x" * 1000)
    assert [u["Key"] for u in client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]] == ["aborted"]
    client.abort_multipart_upload(Bucket=BUCKET, Key="aborted", UploadId=upload)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)
    assert segments(host) == []


def test_housekeeping_frees_forgotten_parts_and_nothing_else(host: Any, client: Any) -> None:
    """Overwriting a multipart object leaks its parts, an abandoned upload too; objects in use stay whole."""
    whole = [b"kept-%d;" % number for number in range(5)]
    multipart(client, "gc/kept", whole)
    multipart(client, "gc/overwritten", [b"old"] * 5)
    multipart(client, "gc/overwritten", [b"new"] * 3)
    multipart(client, "gc/replaced", [b"old"] * 4)
    client.put_object(Bucket=BUCKET, Key="gc/replaced", Body=b"plain")
    upload = client.create_multipart_upload(Bucket=BUCKET, Key="gc/abandoned")["UploadId"]
    client.upload_part(Bucket=BUCKET, Key="gc/abandoned", UploadId=upload, PartNumber=1, Body=b"x")
    client.put_object(Bucket=BUCKET, Key="gc/not/5", Body=b"looks like a part")
    assert len(segments(host)) == 5 + 5 + 3 + 4 + 2, "the traps are set"
    time.sleep(2.1)  # listings have whole seconds
    command = (
        "cd /; setpriv --reuid=swift --regid=swift --clear-groups python3 "
        "/usr/local/lib/object-store/object_store_maintenance.py --account=AUTH_mlflow --segments-only --expiry="
    )
    assert "segments deleted: 0" in host.check_output(command + "1000"), "all of it may still be under way"
    mark = (
        "from swift.common.internal_client import InternalClient; "
        "client = InternalClient('/etc/swift/internal-client.conf', 'test', 1); "
        f"client.set_container_metadata('AUTH_mlflow', '{BUCKET}', "
        "{'x-container-sysmeta-versions-container': '%s'})"
    )
    host.check_output(f'cd / && python3 -c "{mark % "older"}"')
    assert "segments deleted: 0" in host.check_output(command + "1"), "older versions may be made of these"
    host.check_output(f'cd / && python3 -c "{mark % ""}"')
    said = host.check_output(command + "1")
    assert "abandoned uploads: 3, segments deleted: 11" in said, said
    assert len(segments(host)) == 5 + 3
    assert client.get_object(Bucket=BUCKET, Key="gc/kept")["Body"].read() == b"".join(whole)
    assert client.get_object(Bucket=BUCKET, Key="gc/overwritten")["Body"].read() == b"newnewnew"
    assert client.get_object(Bucket=BUCKET, Key="gc/replaced")["Body"].read() == b"plain"
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)


def test_presigned_urls(client: Any, host: Any) -> None:
    """A presigned URL works as long as it says and for what it says, and is in no log afterwards."""
    params = {"Bucket": BUCKET, "Key": "presigned/ü 1"}
    put = client.generate_presigned_url("put_object", params, ExpiresIn=60)
    get = client.generate_presigned_url("get_object", params, ExpiresIn=60)
    brief = client.generate_presigned_url("get_object", params, ExpiresIn=1)
    assert fetch(put, "PUT", b"signed") == 200
    assert fetch(get) == 200
    assert fetch(get, "DELETE") == REFUSED
    assert fetch(get.replace("presigned/", "presigned%2F../")) in (REFUSED, 404)
    assert fetch(re.sub(r"Signature=.{4}", "Signature=0000", get)) == REFUSED
    assert fetch(get.replace("X-Amz-Expires=60", "X-Amz-Expires=6000")) == REFUSED
    time.sleep(2.1)
    assert fetch(brief) == REFUSED
    signatures = [url.split("X-Amz-Signature=")[1][:64] for url in (put, get, brief)]
    wanted = "|".join(signatures)
    assert host.run(f"journalctl --no-pager -b | grep -cE '{wanted}'").stdout.strip() == "0"
    assert host.run(f"grep -rlE '{wanted}' /var/log --exclude-dir=journal").stdout == ""


def test_only_signed_s3_is_answered(client: Any) -> None:
    """No anonymous request, no wrong key, and no way round to Swift's own API, whose tokens outlive a key."""
    client.put_object(Bucket=BUCKET, Key="guarded", Body=b"x")
    base = f"http://{address()}:{PORT}"
    wrong = {**KEY_A, "secret_key": "wrong-secret-0123456789"}
    stranger = {**KEY_A, "access_key": "mlflow:nobody"}
    assert status_of(lambda: once(wrong).head_bucket(Bucket=BUCKET)) == REFUSED
    assert status_of(lambda: once(stranger).get_object(Bucket=BUCKET, Key="guarded")) == REFUSED
    assert status_of(lambda: once({**KEY_A, "access_key": "other:a"}).list_objects_v2(Bucket=BUCKET)) == REFUSED
    for path in (
        "/",
        f"/{BUCKET}",
        f"/{BUCKET}/guarded",
        "/info",
        "/v1/AUTH_mlflow",
        f"/v1/AUTH_mlflow/{BUCKET}/guarded",
    ):
        assert fetch(base + path) == REFUSED, path
    login = {"X-Auth-User": KEY_A["access_key"], "X-Auth-Key": KEY_A["secret_key"]}
    assert fetch(base + "/auth/v1.0", headers=login) == REFUSED
    assert fetch(base + f"/v1/AUTH_mlflow/{BUCKET}/guarded", headers={"X-Auth-Token": "AUTH_tk0"}) == REFUSED
    assert fetch(base + f"/{BUCKET}/put", "PUT", b"x") == REFUSED
    assert fetch(base + "/healthcheck") == 200


def test_only_s3_answers_from_outside(host: Any) -> None:
    """The storage servers and memcached, which know no authentication, are not reachable."""
    for port in (6200, 6201, 6202, 11211):
        with socket.socket() as probe:
            probe.settimeout(2)
            assert probe.connect_ex((address(), port)) != 0, f"port {port} is open"
    listening = set(re.findall(r"^LISTEN\s+\d+\s+\d+\s+(\S+):(\d+)", host.check_output("ss -ltn"), re.MULTILINE))
    outside = {port for where, port in listening if where not in ("127.0.0.1", "[::1]")}
    assert outside == {"22", "8080"}


def test_only_needed_units_run(host: Any) -> None:
    """Of the 18 units that the packages enable, one node needs four and memcached."""
    wanted = {f"swift-{name}.service" for name in ("account", "container", "object", "proxy")} | {"memcached.service"}
    pattern = "'swift*' 'memcached*' 'rsync*' 'rsyslog*'"
    enabled = host.check_output(
        f"systemctl list-unit-files --state=enabled --no-legend --plain --type=service {pattern}"
    )
    assert {line.split()[0] for line in enabled.splitlines()} == wanted
    active = host.check_output(f"systemctl list-units --state=active --no-legend --plain --type=service {pattern}")
    assert {line.split()[0] for line in active.splitlines()} == wanted
    for timer in ("object-store-maintenance.timer", "object-store-audit.timer"):
        assert host.check_output(f"systemctl is-active {timer}") == "active"


def test_sandbox_holds(host: Any) -> None:
    """The servers cannot write outside their data, and have no rights to win."""
    for unit in ("swift-proxy", "swift-account", "swift-container", "swift-object"):
        pid = host.check_output(f"systemctl show --value -p MainPID {unit}")
        status = host.check_output(f"cat /proc/{pid}/status")
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE), unit
        assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE), unit
        assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE), unit
        mounts = [line.split()[4:6] for line in host.check_output(f"cat /proc/{pid}/mountinfo").splitlines()]
        options = {place: flags.split(",") for place, flags in mounts}
        assert "ro" in options["/"], unit
        assert "rw" in options["/srv/swift"], unit
    score = host.run("systemd-analyze security --no-pager swift-proxy.service swift-object.service").stdout
    levels = [float(found) for found in re.findall(r"Overall exposure level for \S+: ([\d.]+)", score)]
    print(f"systemd-analyze security: {levels}")
    assert all(level < 3 for level in levels)


def test_secrets_are_nowhere_to_be_read(host: Any) -> None:
    """Not in processes, units, the journal, logs, or files that others than root and swift can read."""
    secrets = "|".join((KEY_A["secret_key"], *HASHES))
    # The pattern itself comes on standard input, or the search would find itself.
    feed = f"printf '%s\\n' '{secrets}'"
    for place in ("ps axwwe -o args", "systemctl show 'swift*' 'object-store*' memcached", "journalctl --no-pager -b"):
        found = host.run(
            f"{feed} >/root/pattern; {place} | grep -E -f /root/pattern | grep -v printf; rm /root/pattern"
        )
        assert found.stdout == "", place
    places = "/etc /usr/local /var/log /run/systemd /tmp /var/tmp /srv"
    files = host.run(
        f"{feed} >/root/pattern; grep -rlE -f /root/pattern {places} --exclude-dir=journal; rm /root/pattern"
    )
    assert sorted(files.stdout.split()) == ["/etc/swift/s3-keys.json", "/etc/swift/swift.conf"]
    for name in files.stdout.split():
        assert host.check_output(f"stat -c '%a %U %G' {name}") == "640 root swift"
    assert host.run("setpriv --reuid=nobody --clear-groups ls /srv/swift").rc != 0


def test_ansible_shows_no_secret(tmp_path: pathlib.Path) -> None:
    """Not even at -vvv --diff of a run that changes every file that carries one."""
    said = deploy(tmp_path, "-vvv", "--diff", "--check", object_store_credentials=[KEY_A, KEY_B])
    assert re.search(r"failed=0", said), said[-3000:]
    for secret in (KEY_A["secret_key"], KEY_B["secret_key"], *HASHES):
        assert secret not in said


def test_storage_server_is_asked_again_right_after_its_restart(host: Any, client: Any) -> None:
    """Swift's defaults would leave the one storage server alone for a minute after a few errors."""
    client.put_object(Bucket=BUCKET, Key="restart", Body=b"x")
    host.check_output("systemctl stop swift-object")
    for _ in range(15):
        assert status_of(lambda: once().get_object(Bucket=BUCKET, Key="restart")) >= 500
    host.check_output("systemctl start swift-object")
    took = wait_for(lambda: status_of(lambda: once().get_object(Bucket=BUCKET, Key="restart")) == 200, 5)
    print(f"served again {took:.2f} s after the start")


def test_deferred_listing_is_made_good_by_housekeeping(host: Any, client: Any) -> None:
    """Objects stored while the container server is away are listed after the maintenance unit ran."""
    client.put_object(Bucket=BUCKET, Key="deferred/0", Body=b"x")
    host.check_output("systemctl stop swift-container")
    client.put_object(Bucket=BUCKET, Key="deferred/1", Body=b"kept")
    host.check_output("systemctl start swift-container")
    wait_for(answers, 10)
    assert client.get_object(Bucket=BUCKET, Key="deferred/1")["Body"].read() == b"kept"
    assert list(objects(client, prefix="deferred/")) == ["deferred/0"], "the listing was not deferred"
    start = time.monotonic()
    host.check_output("systemctl start object-store-maintenance.service")
    print(f"housekeeping took {time.monotonic() - start:.1f} s")
    assert sorted(objects(client, prefix="deferred/")) == ["deferred/0", "deferred/1"]
    assert host.check_output("systemctl show --value -p Result object-store-maintenance") == "success"


def test_data_survive_killed_processes_and_a_reboot(host: Any, client: Any) -> None:
    """Every acknowledged object is there after kill -9 of all of Swift, and after the host's restart."""
    body = os.urandom(3 * MIB)
    client.put_object(Bucket=BUCKET, Key="survivor", Body=body)
    multipart(client, "survivor-parts", [body, body[:100]])
    before = host.check_output("systemctl show --value -p MainPID swift-proxy")
    host.check_output("pkill -9 -u swift; pkill -9 memcached")
    took = wait_for(
        lambda: answers() and host.check_output("systemctl show --value -p MainPID swift-proxy") != before, 30
    )
    print(f"served again {took:.1f} s after kill -9")
    assert client.get_object(Bucket=BUCKET, Key="survivor")["Body"].read() == body
    assert sorted(objects(client, prefix="survivor")) == ["survivor", "survivor-parts"]
    client.put_object(Bucket=BUCKET, Key="just-before", Body=b"reboot")
    vm.restart(NAME)
    took = wait_for(answers, 60)
    print(f"served again {took:.1f} s after the boot")
    rebooted = s3()  # the address may be another
    assert rebooted.get_object(Bucket=BUCKET, Key="survivor")["Body"].read() == body
    assert rebooted.get_object(Bucket=BUCKET, Key="survivor-parts")["Body"].read() == body + body[:100]
    assert rebooted.get_object(Bucket=BUCKET, Key="just-before")["Body"].read() == b"reboot"
    test_only_needed_units_run(host)


def rotate(tmp_path: pathlib.Path, credentials: list[dict[str, str]], user: dict[str, str]) -> tuple[int, list[str]]:
    """Deploy other credentials while clients of the key `user` work; return requests and failures, without repeats.

    One client opens a connection for each turn, one keeps its own open throughout.
    """
    stop, failures, count = threading.Event(), [], collections.Counter[str]()

    def load(kept: Any) -> None:
        name = "kept" if kept else "fresh"
        while not stop.is_set():
            try:
                each = kept or once(user)
                each.put_object(Bucket=BUCKET, Key=f"load/{name}", Body=b"x" * 10000)
                each.get_object(Bucket=BUCKET, Key=f"load/{name}")["Body"].read()
                if not kept:
                    each.close()
            except (
                botocore.exceptions.BotoCoreError,
                botocore.exceptions.ClientError,
                http.client.HTTPException,
            ) as error:
                failures.append(f"{name}: {error!r}")
            count[name] += 2

    threads = [threading.Thread(target=load, args=(kept,)) for kept in (None, once(user))]
    for thread in threads:
        thread.start()
    try:
        said = deploy(tmp_path, object_store_credentials=credentials)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert "failed=0" in said, said[-3000:]
    assert min(count.values()) > 10
    return count.total(), failures


def test_keys_overlap_and_leave_without_a_failed_request(host: Any, client: Any, tmp_path: pathlib.Path) -> None:
    """A second key is accepted beside the first; the first, withdrawn, is refused at once; no request fails."""
    client.put_object(Bucket=BUCKET, Key="owned", Body=b"by the account")
    units = "swift-proxy swift-account swift-container swift-object"
    started = f"systemctl show --value -p MainPID -p NRestarts {units}; pgrep -f '[s]wift-proxy-server'"
    ids = host.check_output(started)
    asked, failures = rotate(tmp_path, [KEY_A, KEY_B], KEY_A)
    assert failures == []
    for key in (KEY_A, KEY_B):
        assert s3(key).get_object(Bucket=BUCKET, Key="owned")["Body"].read() == b"by the account"
    old = once(KEY_A).generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "owned"})
    idle = once(KEY_A)
    assert status_of(lambda: idle.head_bucket(Bucket=BUCKET)) == 200  # its connection stays open
    more, failures = rotate(tmp_path, [KEY_B], KEY_B)
    print(f"{asked + more} requests during two rotations, none failed")
    assert failures == []
    assert status_of(lambda: s3(KEY_A).head_bucket(Bucket=BUCKET)) == REFUSED
    assert fetch(old) == REFUSED
    assert status_of(lambda: idle.head_bucket(Bucket=BUCKET)) == REFUSED
    assert s3(KEY_B).get_object(Bucket=BUCKET, Key="owned")["Body"].read() == b"by the account"
    assert host.check_output(started) == ids, "a server was restarted or reloaded for a key"
    assert "failed=0" in deploy(tmp_path, object_store_credentials=[KEY_A])


def test_faulty_proxy_configuration_never_goes_live(host: Any) -> None:
    """A reload of a configuration that does not load fails and leaves the server as it was."""
    conf = "/etc/swift/proxy-server.conf"
    host.check_output(f"cp -p {conf} /root/kept && sed -i 's/egg:swift#slo/egg:swift#nothing/' {conf}")
    try:
        assert host.run("systemctl reload swift-proxy").rc != 0
        assert answers()
    finally:
        host.check_output(f"mv /root/kept {conf}")
    host.check_output("systemctl reload swift-proxy")
    assert answers()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"object_store_hash_prefix": "another-prefix-0123456789"},
            ("object_store_hash_prefix", "fingerprint", "old values"),
        ),
        ({"object_store_part_power": 12}, ("object_store_part_power", "Found: 10", "Expected: 12")),
        ({"object_store_devices": [{"ip": "127.0.0.1", "device": "d2"}]}, ("object_store_devices", "weight 0")),
        (
            {"object_store_bucket": "No_Bucket", "object_store_port": 6200},
            ("object_store_bucket", "object_store_object_port"),
        ),
        ({"object_store_credentials": [KEY_A, {**KEY_B, "access_key": "other:b"}]}, ("one ACCOUNT",)),
        (
            {"object_store_credentials": [{**KEY_A, "secret_key": "has a space in its text"}]},
            ("secret_key of another form",),
        ),
    ],
)
def test_settings_that_lose_data_are_refused(
    host: Any, tmp_path: pathlib.Path, variables: dict[str, Any], words: tuple[str, ...]
) -> None:
    """Each refusal names what was found, what was expected and the variable, and nothing has changed."""
    sums = "cat /etc/swift/*.conf /etc/swift/*.builder | sha256sum"
    before = host.check_output(sums)
    said = re.sub(r"\s+", " ", deploy(tmp_path, **variables))
    assert "failed=1" in said
    assert "changed=0" in said
    for word in words:
        assert word in said
    assert host.check_output(sums) == before
    assert answers()


def test_rings_grow_to_three_nodes_and_shrink_only_when_drained(tmp_path: pathlib.Path) -> None:
    """One device becomes three with three copies; what holds data cannot be taken away by an edit of a list."""
    nodes = [{"ip": f"10.0.0.{number}", "device": "d1", "zone": number} for number in (1, 2, 3)]

    def rings(devices: list[dict[str, Any]], replicas: int) -> dict[str, Any]:
        wish = {
            "directory": "/root/rings",
            "data_directory": "/root/rings/data",
            **dict(zip(("hash_prefix", "hash_suffix"), HASHES, strict=True)),
            "devices": devices,
            "local_ip": "10.0.0.1",
            "ports": {"account": 6202, "container": 6201, "object": 6200},
            "part_power": 8,
            "replicas": replicas,
        }
        inventory = ["-i", f"{ROOT}/molecule/_shared/inventory", "-i", f"{ROOT}/molecule/object_store/inventory.yml"]
        argv = ["ansible", NAME, *inventory, "-M", f"{ROOT}/roles/object_store/library", "-m", "object_store_rings"]
        environment = {
            **os.environ,
            "ANSIBLE_FORCE_COLOR": "0",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
        }
        done = subprocess.run(
            [*argv, "-a", json.dumps(wish)], cwd=ROOT, env=environment, text=True, capture_output=True
        )
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return answer

    try:
        assert rings(nodes[:1], 1)["changed"]
        assert not rings(nodes[:1], 1)["changed"]
        assert rings(nodes, 3)["changed"]
        assert not rings(nodes, 3)["changed"]
        spread = vm.execute(NAME, "swift-ring-builder", "/root/rings/object.builder")
        assert "256 partitions, 3.000000 replicas" in spread
        assert len(re.findall(r"100\.00 +256 ", spread)) == 3, spread
        refused = rings(nodes[:2], 3)
        assert "weight 0" in refused["problem"]
        assert not refused["changed"]
    finally:
        vm.execute(NAME, "rm", "-rf", "/root/rings")


def test_memory(host: Any) -> None:
    """The store is small beside what it replaces: its share of memory, and a bound that notices a leak."""
    script = (
        "for u in memcached swift-account swift-container swift-object swift-proxy; do "
        "m=$(systemctl show --value -p MainPID $u); for p in $m $(pgrep -P $m); do "
        "awk -v u=$u '/^Pss:/{print u, $2}' /proc/$p/smaps_rollup; done; done"
    )
    sizes: dict[str, float] = {}
    for line in host.check_output(script).splitlines():
        unit, kib = line.split()
        sizes[unit] = sizes.get(unit, 0) + int(kib) / 1024
    print(f"PSS {sum(sizes.values()):.0f} MiB: " + ", ".join(f"{unit} {size:.0f}" for unit, size in sizes.items()))
    assert len(sizes) == 5
    assert sum(sizes.values()) < 300

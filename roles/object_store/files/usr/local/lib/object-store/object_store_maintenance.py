"""Housekeeping of one Swift node: what its daemons would do all day, once, and S3's forgotten multipart segments.

Usage: object_store_maintenance.py --account AUTH_NAME --expiry SECONDS [--segments-only]. Exits with 1 when a step
failed, so that its unit shows it.
"""

from __future__ import annotations

import argparse
import calendar
import dataclasses
import re
import subprocess
import sys
import time
from collections.abc import Iterator

from swift.common.internal_client import InternalClient, UnexpectedResponse

# Deferred listings, deferred account sums, then tombstones older than reclaim_age.
DAEMONS = (
    ("object-updater", "object-server"),
    ("container-updater", "container-server"),
    ("account-replicator", "account-server"),
    ("container-replicator", "container-server"),
    ("object-replicator", "object-server"),
)
SUFFIX = "+segments"
# s3api names a segment KEY/UPLOAD/NUMBER and the mark of an unfinished upload KEY/UPLOAD; UPLOAD is the base64 of a
# UUID's text. What looks otherwise is not s3api's and is left alone.
NAME = re.compile(r"(?P<key>.+)/(?P<upload>[A-Za-z0-9_-]{48})(?:/(?P<part>[1-9][0-9]{0,4}))?", re.DOTALL)
UPLOAD_ID = "x-object-sysmeta-s3api-upload-id"
VERSIONS = ("x-container-sysmeta-versions-container", "x-container-sysmeta-versions-location")


@dataclasses.dataclass
class Upload:
    """Segments of one upload as listed: names, total size in bytes, newest time (seconds since 1970)."""

    names: list[str] = dataclasses.field(default_factory=list)
    size: int = 0
    newest: float = 0.0


def uploads(client: InternalClient, account: str, container: str) -> dict[tuple[str, str], Upload]:
    """Return the uploads whose segments or marks are in `container`, by key and upload id."""
    found: dict[tuple[str, str], Upload] = {}
    for item in client.iter_objects(account, container):
        match = NAME.fullmatch(item["name"])
        if match:
            upload = found.setdefault((match["key"], match["upload"]), Upload())
            upload.names.append(item["name"])
            upload.size += item["bytes"]
            moment = calendar.timegm(time.strptime(item["last_modified"][:19], "%Y-%m-%dT%H:%M:%S"))
            upload.newest = max(upload.newest, moment)
    return found


def abandoned(client: InternalClient, account: str, bucket: str, container: str, expiry: float) -> Iterator[Upload]:
    """Yield uploads at least `expiry` seconds old that no object of `bucket` is made of."""
    for (key, upload_id), upload in uploads(client, account, container).items():
        if time.time() - upload.newest < expiry:
            continue
        # All replicas are asked: one that missed the object's last version must not decide.
        path = client.make_path(account, bucket, key)
        response = client.make_request("HEAD", path, {"X-Newest": "true"}, (2, 404))
        made_of = response.headers.get(UPLOAD_ID)
        unknown = response.headers.get("x-static-large-object") and not made_of
        if made_of != upload_id and not unknown:
            yield upload


def collect_segments(client: InternalClient, account: str, expiry: float) -> tuple[int, int, int]:
    """Delete abandoned segments of every bucket; return uploads, segments and bytes freed, and print what failed."""
    counts = [0, 0, 0]
    names = [item["name"] for item in client.iter_containers(account)]
    for container in (name for name in names if name.endswith(SUFFIX)):
        bucket = container.removesuffix(SUFFIX)
        there = client.container_exists(account, bucket)
        if there:
            metadata = client.get_container_metadata(account, bucket)
            if any(metadata.get(header) for header in VERSIONS):
                continue  # older versions are made of segments that no current object names
        for upload in abandoned(client, account, bucket, container, expiry):
            for name in upload.names:
                client.delete_object(account, container, name)
            counts = [counts[0] + 1, counts[1] + len(upload.names), counts[2] + upload.size]
        if not there and not any(True for _ in client.iter_objects(account, container)):
            client.delete_container(account, container)
    return counts[0], counts[1], counts[2]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--account", required=True)
    parser.add_argument("--expiry", type=float, required=True)
    parser.add_argument("--segments-only", action="store_true")
    options = parser.parse_args()
    failed = []
    for daemon, conf in () if options.segments_only else DAEMONS:
        done = subprocess.run([f"/usr/bin/swift-{daemon}", f"/etc/swift/{conf}.conf", "once"], check=False)
        if done.returncode:
            failed.append(f"{daemon}: exit {done.returncode}")
    client = InternalClient("/etc/swift/internal-client.conf", "object-store-maintenance", 3)
    try:
        if client.get_account_info(options.account, acceptable_statuses=(2, 404))[0]:
            freed = collect_segments(client, options.account, options.expiry)
            print(f"abandoned uploads: {freed[0]}, segments deleted: {freed[1]}, bytes freed: {freed[2]}")
    except UnexpectedResponse as error:
        failed.append(f"segments: {error}")
    if failed:
        sys.exit("; ".join(failed))


if __name__ == "__main__":
    main()

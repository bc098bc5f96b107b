"""Write every object of a bucket into one tar archive. Runs in the server's environment, with its settings."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shutil
import sys
import tarfile
import urllib.parse

MARGIN = 200 * 1024 * 1024


def main() -> None:
    """Usage: export_bucket.py TARGET. Prints the number of objects and bytes as JSON."""
    target = pathlib.Path(sys.argv[1])
    for line in pathlib.Path("/etc/mlflow/mlflow.env").read_text().splitlines():
        name, _, value = line.partition("=")
        if name.startswith(("MLFLOW_", "AWS_")):
            os.environ[name] = value.strip('"')
    held = json.loads(pathlib.Path("/etc/mlflow/secrets.json").read_text())
    place = urllib.parse.urlsplit(os.environ.get("MLFLOW_ARTIFACTS_DESTINATION", ""))
    if place.scheme != "s3":
        sys.exit(f"artifacts are not in S3 but at {place.geturl() or 'no place'}: save them yourself")

    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None,
        aws_access_key_id=held.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=held.get("AWS_SECRET_ACCESS_KEY"),
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 3}, connect_timeout=10),
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=place.netloc, Prefix=place.path.lstrip("/"))
    objects = [one for page in pages for one in page.get("Contents", [])]
    size = sum(one["Size"] for one in objects)
    free = shutil.disk_usage(target.parent).free
    if free < size + MARGIN:
        sys.exit(
            f"found {free // 2**20} MB free at {target.parent}; expected {(size + MARGIN) // 2**20} MB for the bucket"
        )
    with tarfile.open(target, "w") as archive:
        for one in objects:
            entry = tarfile.TarInfo(f"{place.netloc}/{one['Key']}")
            entry.size, entry.mtime = one["Size"], int(one["LastModified"].timestamp())
            body = client.get_object(Bucket=place.netloc, Key=one["Key"])["Body"]
            archive.addfile(entry, body if one["Size"] else io.BytesIO())
    print(json.dumps({"objects": len(objects), "bytes": size}))


if __name__ == "__main__":
    main()

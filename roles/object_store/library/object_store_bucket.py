"""Ansible module: wait until S3 answers, make the bucket, and see it through every key.

Requests are signed here (AWS signature version 4) with the standard library, so that the host needs no SDK and no
secret leaves this process.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import http.client
import time

from ansible.module_utils.basic import AnsibleModule

OK, FORBIDDEN, NOT_FOUND, SERVER_ERROR = 200, 403, 404, 500
EMPTY = hashlib.sha256(b"").hexdigest()


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A bucket and where it is served."""

    address: str
    port: int
    name: str
    region: str

    @property
    def host(self) -> str:
        """The Host header."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def authorization(self, method: str, key: dict[str, str], now: str) -> str:
        """Return the Authorization header of an empty request at `now` (YYYYMMDDTHHMMSSZ)."""
        signed = "host;x-amz-content-sha256;x-amz-date"
        headers = f"host:{self.host}\nx-amz-content-sha256:{EMPTY}\nx-amz-date:{now}\n"
        digest = hashlib.sha256("\n".join((method, f"/{self.name}", "", headers, signed, EMPTY)).encode()).hexdigest()
        scope = f"{now[:8]}/{self.region}/s3/aws4_request"
        secret = b"AWS4" + key["secret_key"].encode()
        for part in scope.split("/"):
            secret = hmac.digest(secret, part.encode(), "sha256")
        signature = hmac.digest(secret, f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{digest}".encode(), "sha256").hex()
        return f"AWS4-HMAC-SHA256 Credential={key['access_key']}/{scope}, SignedHeaders={signed}, Signature={signature}"

    def request(self, method: str, key: dict[str, str]) -> int:
        """Send a signed empty request and return its status; 0 when nobody answers."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        headers = {"Host": self.host, "x-amz-date": now, "x-amz-content-sha256": EMPTY, "Content-Length": "0"}
        headers["Authorization"] = self.authorization(method, key, now)
        connection = http.client.HTTPConnection(self.address, self.port, timeout=10)
        try:
            connection.request(method, f"/{self.name}", headers=headers)
            return connection.getresponse().status
        except OSError:
            return 0
        except http.client.HTTPException:
            return SERVER_ERROR
        finally:
            connection.close()


def main() -> None:
    """Run the module; it changes something only when it makes the bucket, and tells what is wrong as `problem`."""
    key = {"access_key": {"type": "str", "required": True}, "secret_key": {"type": "str", "no_log": True}}
    module = AnsibleModule(
        argument_spec={
            "address": {"type": "str", "required": True},
            "port": {"type": "int", "required": True},
            "bucket": {"type": "str", "required": True},
            "region": {"type": "str", "required": True},
            "credentials": {"type": "list", "elements": "dict", "required": True, "options": key},
            "refused": {"type": "list", "elements": "dict", "default": [], "options": key},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    p = module.params
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(p["address"], p["address"])  # noqa: S104
    bucket = Bucket(address, p["port"], p["bucket"], p["region"])
    deadline, changed, problem = time.monotonic() + p["timeout"], False, ""
    for item in p["credentials"]:
        while True:
            status = bucket.request("HEAD", item)
            if status in (OK, FORBIDDEN) or module.check_mode or time.monotonic() > deadline:
                break
            if status == NOT_FOUND:
                changed = True
                bucket.request("PUT", item)
            else:
                time.sleep(0.1)
        changed = changed or (module.check_mode and status in (0, NOT_FOUND))
        if status != OK and not module.check_mode:
            expected = f"expected 200 within {p['timeout']} s (object_store_start_timeout)"
            found = f"answered {status}" if status else "did not answer"
            who = f"key {item['access_key']} of object_store_credentials"
            problem = f"S3 on {address}:{p['port']} {found} for bucket {p['bucket']} and {who}, {expected}"
            break
    for item in [] if problem or module.check_mode else p["refused"]:
        while (status := bucket.request("HEAD", item)) != FORBIDDEN and time.monotonic() < deadline:
            time.sleep(0.1)
        if status != FORBIDDEN:
            problem = f"S3 on {address}:{p['port']} answered {status} to the old key {item['access_key']}, expected 403"
            break
    module.exit_json(changed=changed, problem=problem)


if __name__ == "__main__":
    main()

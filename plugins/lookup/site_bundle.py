"""What a site needs to be set up again when its controller is lost, encrypted by the vault's password.

`lookup('site_bundle', INVENTORY_FOLDER, VAULT_FILE)` gives a mapping of file names to texts: the vault as it is, and
the whole inventory folder as an encrypted archive. The same folder gives the same texts.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import io
import pathlib
import tarfile
from typing import Any

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

HEADER = b"$ANSIBLE_VAULT"


def archive(folder: pathlib.Path) -> bytes:
    """A compressed archive of `folder` that depends on names and contents alone; links stay links."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            # What is being written at this moment, and locks.
            if path.name.startswith(".") or not (path.is_symlink() or path.is_file()):
                continue
            entry = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder)}")
            entry.mode = 0o600
            if path.is_symlink():
                entry.type, entry.linkname = tarfile.SYMTYPE, str(path.readlink())
                tar.addfile(entry)
            else:
                content = path.read_bytes()
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return gzip.compress(data.getvalue(), mtime=0)


class LookupModule(LookupBase):  # type: ignore[misc]  # Ansible ships no types
    """See the module's text. Raises AnsibleLookupError without a vault password."""

    def run(self, terms: list[Any], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[dict[str, str]]:
        """Return one mapping of file names to texts."""
        folder, vault_file = pathlib.Path(str(terms[0])), pathlib.Path(str(terms[1]))
        vault = self._loader._vault
        if not vault.secrets:
            raise AnsibleLookupError("there is no vault password: see vault_password_file in ansible.cfg")
        key = vault.secrets[0][1].bytes

        def encrypted(content: bytes) -> str:
            # The salt comes from key and content, so that the same content gives the same text and no other does.
            salt = hmac.new(key, content, hashlib.sha256).hexdigest()[:32]
            return str(vault.encrypt(content, salt=salt).decode())

        files = {"inventory.tar.gz.vault": encrypted(archive(folder))}
        if vault_file.exists():
            content = vault_file.read_bytes()
            files["vault.yml"] = content.decode() if content.startswith(HEADER) else encrypted(content)
        return [files]

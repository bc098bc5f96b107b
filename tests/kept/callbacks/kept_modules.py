"""Keep what Ansible makes of a module from one run to the next, so that hundreds of runs of tests need not build it.

Ansible parses a module and all that it imports once a run to know what to send. What it has built lies in a folder of
its own temporary directory; here that folder is a link to one that stays, named by all that goes into it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib
from typing import Any

from ansible import constants
from ansible.plugins.callback import CallbackBase
from kit import vm


def _key() -> str:
    made_of = hashlib.sha256()
    for name in ("ansible-core", "ansible"):
        made_of.update(importlib.metadata.version(name).encode())
    folders = [pathlib.Path(one) for one in (*constants.DEFAULT_MODULE_PATH, *constants.DEFAULT_MODULE_UTILS_PATH)]
    for roles in map(pathlib.Path, constants.DEFAULT_ROLES_PATH):
        folders += [*roles.glob("*/library"), *roles.glob("*/module_utils")]
    for folder in sorted(folders):
        for path in sorted(folder.rglob("*.py")):
            made_of.update(path.name.encode() + path.read_bytes())
    return made_of.hexdigest()[:16]


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Link the folder when a run begins; nothing else is called."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "kept_modules"
    CALLBACK_NEEDS_ENABLED = False

    def __init__(self, *args: Any, **more: Any) -> None:
        """Make the link. A run in which the folder is there already keeps its own."""
        super().__init__(*args, **more)
        kept = vm.CACHE / "modules" / _key()
        kept.mkdir(parents=True, exist_ok=True)
        link = pathlib.Path(constants.DEFAULT_LOCAL_TMP) / "ansiballz_cache"
        if not link.exists():
            link.symlink_to(kept)

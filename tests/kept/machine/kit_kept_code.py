"""For the machines of tests: keep what Python compiles out of zip files, from one process to the next.

A module comes to a host as a zip file of sources, which Python compiles anew each time, a good third of what a call
costs there. Python itself keeps compiled code of files only.
"""

import _imp
import marshal
import os
import sys
import zipimport

FOLDER = "/var/cache/kit-code"


def _compile(pathname, source):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    source = zipimport._normalize_line_endings(source)  # type: ignore[attr-defined]
    name = f"{FOLDER}/{sys.implementation.cache_tag}-{_imp.source_hash(len(source), source).hex()}"
    try:
        with open(name, "rb") as file:  # noqa: PTH123
            return marshal.load(file)
    except (OSError, EOFError, ValueError, TypeError):
        pass
    code = compile(source, pathname, "exec", dont_inherit=True)
    try:
        with open(f"{name}.{os.getpid()}", "wb") as file:  # noqa: PTH123
            marshal.dump(code, file)
        os.replace(f"{name}.{os.getpid()}", name)  # noqa: PTH105
    except OSError:
        # Some other user's process, or one that may not write: it goes on without.
        pass
    return code


zipimport._compile_source = _compile  # type: ignore[attr-defined]

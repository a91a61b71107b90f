"""What code a generation was started from: a digest of its files, its distributions and its settings.

Only code counts: a database, a log or a template that changes beside it does not make a respawn refuse to take
part. The walk is bounded, so that an application directory that is somebody's home does not stall a start.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

_CODE = (".py", ".so", ".pyd")
_SKIPPED = frozenset({"__pycache__", "node_modules", "site-packages"})
_MAX_FILES = 5000
_MAX_ENTRIES = 50_000
_Key = tuple[str, int, int, int]

_digests: dict[_Key, bytes] = {}
"""Content digests by path, inode, size and change time: only what changed is read again."""


def fingerprint(app_dir: str, python: str, settings: bytes) -> str:
    """Twelve hexadecimal digits. `app_dir` and `python` are real paths; `settings` stands for everything else.

    Reads files: not for the event loop.
    """
    digest = hashlib.sha256()
    for path, content in files(app_dir).items():
        digest.update(os.fsencode(path) + b"\0" + content)
    for name in distributions(python):
        digest.update(os.fsencode(name) + b"\n")
    digest.update(os.fsencode(app_dir) + b"\0" + os.fsencode(python) + b"\0" + settings)
    return digest.hexdigest()[:12]


def files(app_dir: str) -> dict[str, bytes]:
    """The digest of each code file, by its path in `app_dir`, in the order in which they are found."""
    seen: dict[_Key, bytes] = {}
    found = {}
    for path in _code_files(app_dir):
        content = _content(path, seen)
        if content is not None:
            found[os.path.relpath(path, app_dir)] = content
    _digests.clear()
    _digests.update(seen)
    return found


def _code_files(root: str) -> Iterator[str]:
    files = entries = 0
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(
            name
            for name in subdirectories
            if not name.startswith(".")
            and name not in _SKIPPED
            and not os.path.exists(os.path.join(directory, name, "pyvenv.cfg"))
        )
        entries += len(names) + len(subdirectories)
        for name in sorted(names):
            if name.endswith(_CODE):
                yield os.path.join(directory, name)
                files += 1
        if files >= _MAX_FILES or entries >= _MAX_ENTRIES:
            return


def _content(path: str, seen: dict[_Key, bytes]) -> bytes | None:
    try:
        found = os.stat(path)
        key = (path, found.st_ino, found.st_size, found.st_ctime_ns)
        content = _digests.get(key)
        if content is None:
            content = hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError:
        return None  # gone, or not ours to read: the application can't have it either
    seen[key] = content
    return content


def distributions(python: str) -> list[str]:
    """Names and versions of what is installed beside the interpreter, from the names of their directories."""
    prefix = Path(python).parent.parent
    return sorted(path.name for path in prefix.glob("lib/python3.*/site-packages/*.dist-info"))

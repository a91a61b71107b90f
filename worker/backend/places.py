"""Where the backend keeps what must last: one directory per instance of segue, readable by its user only."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,255}")


class PlaceError(OSError):
    """No directory can be had; the message says which, and why."""


def state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """The directory for what must outlive the process, made if it isn't there (mode 0700).

    ``$STATE_DIRECTORY`` as systemd gives it, else ``$XDG_STATE_HOME/segue/NAME``, else ``~/.local/state/segue/NAME``,
    else, for a user without a home, a private directory under the temp directory. NAME is the instance's.

    Raises `PlaceError` if what was named can't be used, or nothing can.
    """
    name = environ.get("SEGUE_INSTANCE_NAME") or "default"
    if _NAME.fullmatch(name) is None:
        raise PlaceError(f"an instance can't be named {name!r}")
    given = environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return _made(Path(given))
    # the specification has relative paths ignored
    if environ.get("XDG_STATE_HOME", "").startswith("/"):
        return _made(Path(environ["XDG_STATE_HOME"], "segue", name))
    home = environ.get("HOME") or os.path.expanduser("~")
    if os.path.isabs(home) and os.path.isdir(home):
        try:
            return _made(Path(home, ".local", "state", "segue", name))
        except PlaceError:
            pass  # a service user's home is often one that it can't write to
    private = Path(tempfile.gettempdir(), f"segue-state-{os.geteuid()}")
    _check_private(_made(private))
    return _made(private / name)


def _made(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PlaceError(f"{path} can't be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PlaceError(f"{path} can't be written to")
    return path


def _check_private(path: Path) -> None:
    """Under a directory that all may write to, somebody else may have been there first."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PlaceError(f"{path} isn't a directory of this user alone: remove it, or set STATE_DIRECTORY")

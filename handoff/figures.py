"""A worker's figures, in a file beside its private socket: written by the worker, read by anyone who may read it.

A master that wants to know what 32 workers have counted would wait for the slowest, and from one that hangs or has
been killed it would learn nothing. So each worker writes its figures down every half second and when it ends. Whoever
reads them asks nobody, and the file outlives the worker, and the master: nothing that was counted is lost with either.

One line with a checksum, in place: a reader that meets a writer reads again.
"""

from __future__ import annotations

import os
import zlib

import msgspec

from segue.handoff.messages import Figures

SUFFIX = ".figures"
_MAX_BYTES = 64 * 1024
_TRIES = 5


class FiguresFile:
    """The writer's side."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def write(self, figures: Figures) -> None:
        """Raises OSError, on a full disk for instance; what was there stays then, or can't be read."""
        data = msgspec.json.encode(figures)
        os.pwrite(self._fd, b"%08x %b\n" % (zlib.crc32(data), data), 0)

    def close(self) -> None:
        """Give the descriptor back; the file stays."""
        os.close(self._fd)


def read(path: str) -> Figures | None:
    """What is in the file; None if there is none, or nothing that can be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        for _ in range(_TRIES):
            checksum, _, data = os.pread(fd, _MAX_BYTES, 0).partition(b"\n")[0].partition(b" ")
            if checksum == b"%08x" % zlib.crc32(data):
                return msgspec.json.decode(data, type=Figures)
    except (OSError, msgspec.MsgspecError):  # a directory; or it is another version's
        return None
    finally:
        os.close(fd)
    return None

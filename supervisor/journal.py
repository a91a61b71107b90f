"""The journal: the little that must outlive a master and that no worker knows, in one file that can't be broken.

Values by key. Each record says which have changed since the one before it, and stands in a line of its own with a
checksum, written by one call: a record that was torn by a crash or a full disk, or that is missing, is as if it had
never been written. A file that can't be read at all is an empty one. The file is written anew, beside the old one and
then in its place, when it has grown, and after anything that went wrong.

Not flushed to the disk: it lies in the runtime directory, which does not survive a crash of the machine, and what was
written survives a crash of the process.

Rejected: one file that is replaced with every change, which costs a new inode each time and fails as a whole where
an appended record still fits.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Mapping
from typing import Any

import msgspec

FORMAT = 1
COMPACT_BYTES = 512 * 1024
"""A file that has grown beyond this is written anew."""
_MAX_BYTES = 64 * 1024 * 1024
"""More than this is read by nobody: it isn't ours."""


class _Record(msgspec.Struct, frozen=True, omit_defaults=True):
    format: int
    set: dict[str, msgspec.Raw] = {}
    drop: tuple[str, ...] = ()


class Journal:
    """One file, and what is in it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._values: dict[str, bytes] = {}
        self._fd: int | None = None
        self._bytes = 0

    def write(self, values: Mapping[str, Any]) -> str:
        """Let `values` be what is in it. Returns why that failed, or an empty string; the next call tries it again."""
        encoded = {key: msgspec.json.encode(value) for key, value in values.items()}
        changed = {key: data for key, data in encoded.items() if self._values.get(key) != data}
        dropped = tuple(key for key in self._values if key not in encoded)
        if self._fd is not None and not self._is_in_place(self._fd):
            self.close()  # somebody has removed it: the next master would find nothing
        if self._fd is not None and not changed and not dropped:
            return ""
        self._values = encoded
        try:
            if self._fd is None or self._bytes > COMPACT_BYTES:
                self._write_anew()
            else:
                self._bytes += _append(self._fd, encode(changed, dropped))
        except OSError as error:
            self.close()  # what is there may be half a record: the next call writes all of it
            return f"{self._path}: {error.strerror or error}"
        return ""

    def _is_in_place(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self._path))
        except OSError:
            return False

    def _write_anew(self) -> None:
        self.close()
        path = f"{self._path}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)
        try:
            self._bytes = _append(self._fd, encode(self._values))
            os.rename(path, self._path)
        except OSError:
            os.unlink(path)  # what there is no room for takes none
            raise

    def close(self) -> None:
        """Give the descriptor back; the file stays."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _append(fd: int, line: bytes) -> int:
    if os.write(fd, line) != len(line):
        raise OSError("it could only be written in part: the disk is full")
    return len(line)


def encode(values: Mapping[str, bytes], dropped: tuple[str, ...] = ()) -> bytes:
    """One record, as a line. `values` are JSON."""
    record = _Record(FORMAT, {key: msgspec.Raw(data) for key, data in values.items()}, dropped)
    data = msgspec.json.encode(record)
    return b"%08x %b\n" % (zlib.crc32(data), data)


def read(path: str) -> dict[str, bytes]:
    """The values, as JSON; without those of records that are torn or not ours. Never raises."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        with open(fd, "rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError:
        return {}
    values: dict[str, bytes] = {}
    for line in data.split(b"\n"):
        checksum, _, content = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(content):
            continue
        try:
            record = msgspec.json.decode(content, type=_Record)
        except (msgspec.MsgspecError, RecursionError):
            continue
        if record.format != FORMAT:
            continue
        values |= {key: bytes(raw) for key, raw in record.set.items()}
        for key in record.drop:
            values.pop(key, None)
    return values

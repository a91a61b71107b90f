"""Which messages were handled already: a window of the last ones, kept in a file so that the next process knows them.

What a process had handled when it was killed, but not acknowledged, is delivered again. The file is a ring of 8-byte
digests in memory that is mapped: to write one costs no system call, and what is written is there after a `kill -9`.
One process at a time has it: the one that holds the subscription.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import struct
from collections import OrderedDict
from pathlib import Path

_log = logging.getLogger("segue.hsp")

_HEAD = struct.Struct("<8sQQ")
_SLOT = struct.Struct("<Q")
_MAGIC = b"segueHSP"


class Seen:
    """The window."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: OrderedDict[int, None] = OrderedDict()
        self._ring: _Ring | None = None

    def attach(self, path: Path, size: int) -> None:
        """Know what the process before knew, and let the next one know. Without the file it works in this process."""
        if self._ring is not None and (self._ring.path, self._size) == (path, size):
            return  # it is this process that wrote it
        self.detach()
        self._size = size
        try:
            self._ring = _Ring(path, size)
            for digest in self._ring.read():
                self._add(digest)
        except (OSError, ValueError) as error:
            _log.warning("event=hsp-window-not-kept path=%s reason=%s", path, error)

    def learn(self, path: Path) -> None:
        """Know also what another agent has handled, whom this one comes after."""
        try:
            digests = _read(path.read_bytes())
        except (OSError, ValueError, struct.error) as error:
            _log.warning("event=hsp-window-not-learnt path=%s reason=%s", path, error)
            return
        for digest in digests:
            if self.claim(digest):
                self.done(digest)

    def detach(self) -> None:
        """Another process may have it from here on."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    @staticmethod
    def key(sender: str, message_id: str) -> int:
        """What is remembered of a message."""
        digest = hashlib.blake2b(f"{sender}\0{message_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") or 1

    def claim(self, key: int) -> bool:
        """Whether it wasn't seen yet; from here on it was."""
        if key in self._known:
            return False
        self._add(key)
        return True

    def done(self, key: int) -> None:
        """It was handled."""
        if self._ring is not None:
            self._ring.write(key)

    def release(self, key: int) -> None:
        """It wasn't handled after all."""
        self._known.pop(key, None)

    def _add(self, key: int) -> None:
        self._known[key] = None
        if len(self._known) > self._size:
            self._known.popitem(last=False)


class _Ring:
    """The file: head (magic, slots, next one), then the slots; an empty one is 0."""

    def __init__(self, path: Path, slots: int) -> None:
        self.path = path
        length = _HEAD.size + slots * _SLOT.size
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            head = os.pread(descriptor, _HEAD.size, 0)
            fresh = len(head) < _HEAD.size or _HEAD.unpack(head)[:2] != (_MAGIC, slots)
            if fresh:
                os.ftruncate(descriptor, 0)
            # a write into memory for which there is no room on the disk would end the process
            os.posix_fallocate(descriptor, 0, length)
            self._map = mmap.mmap(descriptor, length)
        finally:
            os.close(descriptor)
        self._slots = slots
        if fresh:
            self._next = 0
            _HEAD.pack_into(self._map, 0, _MAGIC, slots, 0)
        else:
            self._next = _HEAD.unpack_from(self._map)[2] % slots

    def read(self) -> list[int]:
        """What is in it, the oldest first."""
        return _read(self._map[:])

    def write(self, key: int) -> None:
        """Add one, over the oldest."""
        _SLOT.pack_into(self._map, _HEAD.size + self._next * _SLOT.size, key)
        self._next = (self._next + 1) % self._slots
        _HEAD.pack_into(self._map, 0, _MAGIC, self._slots, self._next)

    def close(self) -> None:
        """Done with it."""
        with contextlib.suppress(BufferError, ValueError):
            self._map.close()


def _read(data: bytes) -> list[int]:
    magic, slots, next_one = _HEAD.unpack_from(data)
    if magic != _MAGIC or len(data) != _HEAD.size + slots * _SLOT.size:
        raise ValueError("it is no window")
    found = [value for (value,) in _SLOT.iter_unpack(data[_HEAD.size :])]
    return [value for value in found[next_one:] + found[:next_one] if value]

"""What a process could not bring to an end leaves it in a file, from which the next one of the same agent takes it."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import msgspec

from segue.worker.backend.hsp import envelope as envelopes
from segue.worker.backend.hsp.errors import InvalidMessageError
from segue.worker.backend.hsp.outbox import Letter

_log = logging.getLogger("segue.hsp")


class _Kept(msgspec.Struct):
    topic: str
    data: str
    retain: bool


class Spool:
    """Of one agent: `path` is what the names of its files begin with. `instance` is who writes and takes."""

    def __init__(self, path: Path, instance: str) -> None:
        self._path = path
        self._instance = instance

    def leave(self, letters: list[Letter]) -> None:
        """Write them down for whoever comes next. Raises `OSError`."""
        if not letters:
            return
        kept = [_Kept(letter.topic, letter.data.decode(), letter.retain) for letter in letters]
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = self._path.with_name(f"{self._path.name}.{self._instance}.letters")
        begun = target.with_suffix(".begun")
        with open(os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(kept))
        begun.rename(target)

    def take(self, limit: int) -> list[Letter]:
        """What others have left, the oldest first; each is taken by one."""
        found: list[Letter] = []
        with contextlib.suppress(OSError):
            left = sorted(
                self._path.parent.glob(f"{self._path.name}.*.letters"), key=lambda path: path.stat().st_mtime
            )
            for path in left:
                mine = path.with_suffix(f".{self._instance}")
                with contextlib.suppress(FileNotFoundError):  # another worker was first
                    path.rename(mine)
                    found += _read(mine, limit)
                    mine.unlink()
        return found


def _read(path: Path, limit: int) -> list[Letter]:
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=list[_Kept])
        return [
            Letter(
                each.topic,
                envelopes.decode(each.data.encode(), limit),
                each.data.encode(),
                retain=each.retain,
            )
            for each in kept
        ]
    except (OSError, msgspec.MsgspecError, InvalidMessageError) as error:
        _log.error("event=hsp-letters-not-read path=%s reason=%s", path, error)
        return []

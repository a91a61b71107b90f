"""The master's log: one line per thing that happened, ``event key=value …``, on standard error.

A full pipe must not stop the one loop: a line that does not fit is dropped, and the next that does says so.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final

_ATOMIC_BYTES: Final = 4096  # PIPE_BUF: a pipe that polls writable takes this much without blocking, pipe(7)


_LEVELS: Final = {"trace": 5, "debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


class Log:
    """Writes events to a descriptor, never waiting for a reader."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = 2 if sys.stderr is None else sys.stderr.fileno()
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)
        self._dropped = 0
        self.tap: Callable[[str, str, Mapping[str, object]], None] | None = None
        """Is given every event, whatever its level and whether anybody reads this output."""
        self._least = _LEVELS["info"]

    def set_level(self, level: str | None) -> None:
        """Write only events of at least `level` from now on; None: info."""
        self._least = _LEVELS[level or "info"]

    def __call__(self, level: str, event: str, **fields: object) -> None:
        """Log `event`. Several lines in ``output`` follow it, indented."""
        if self.tap is not None:
            self.tap(level, event, fields)
        if _LEVELS[level] < self._least:
            return
        output = str(fields.pop("output", "") or "")
        words = [f"{key}={_quoted(value)}" for key, value in fields.items() if value is not None]
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        lines = [f"{stamp} {level.upper():<7} segue: {event} {' '.join(words)}".rstrip()]
        lines += [f"    | {line}" for line in output.splitlines()]
        if self._dropped:
            lines.insert(
                0, f"{stamp} WARNING segue: {self._dropped} lines were lost: nobody read this output"
            )
        for line in lines:
            self._write(line)

    def _write(self, line: str) -> None:
        data = line.encode(errors="replace")[: _ATOMIC_BYTES - 1] + b"\n"
        try:
            if not any(mask & select.POLLOUT for _, mask in self._poll.poll(0)):
                self._dropped += 1
                return
            os.write(self._fd, data)
            self._dropped = 0
        except OSError:
            self._dropped += 1


def _quoted(value: object) -> str:
    if isinstance(value, float):
        value = round(value, 3)
    text = str(value)
    if not text or any(character.isspace() or character in '"=' for character in text):
        return '"' + text.replace('"', "'").replace("\n", "; ") + '"'
    return text

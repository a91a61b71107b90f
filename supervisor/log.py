"""The master's log: one line per thing that happened, ``event key=value …`` or JSON, on standard error.

A full pipe must not stop the one loop: a line that does not fit is dropped, and the next that does says so.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from segue.handoff import lines

_ATOMIC_BYTES: Final = 4096  # PIPE_BUF: a pipe that polls writable takes this much without blocking, pipe(7)
_PRIORITY_BYTES: Final = 8  # and the newline
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
        self._format = lines.TEXT
        self._journal = lines.is_journal(fd, os.environ)

    def set_format(self, wanted: str) -> None:
        """Write lines as ``text``, ``json`` or, with ``auto``, what suits the place where they go."""
        self._format = lines.chosen(wanted, self._fd)

    def set_level(self, level: str | None) -> None:
        """Write only events of at least `level` from now on; None: info."""
        self._least = _LEVELS[level or "info"]

    def __call__(self, level: str, event: str, **fields: object) -> None:
        """Log `event`. Several lines in ``output`` follow it, indented."""
        if self.tap is not None:
            self.tap(level, event, fields)
        if _LEVELS[level] < self._least:
            return
        written = self._lines(level, event, fields)
        if self._dropped and self._tell_loss():
            self._dropped = 0
        for line in written:
            self._dropped += not self._write(line)

    def _tell_loss(self) -> bool:
        """Whether that found room."""
        reason = f"{self._dropped} lines were lost: nobody read this output, or it had no room"
        [line] = self._lines("warning", "lines-lost", {"reason": reason})
        return self._write(line)

    def mistake(self, _: object, context: Mapping[str, Any]) -> None:
        """An exception that nobody expected: a handler of the event loop's."""
        import traceback

        error = context.get("exception")
        reason = context["message"] + (f": {type(error).__name__}: {error}" if error else "")
        output = "".join(traceback.format_exception(error)) if error else None
        self("error", "mistake-in-segue", reason=reason, output=output)

    def _lines(self, level: str, event: str, fields: Mapping[str, object]) -> list[str]:
        fields = {key: _rounded(value) for key, value in fields.items() if value is not None}
        if self._format == lines.JSON:
            told = {key: value for key, value in fields.items() if value != ""}
            written = [_fitting(level, {"event": event} | told)]
        else:
            output = str(fields.pop("output", "") or "")
            words = [f"{key}={lines.quoted(value)}" for key, value in fields.items()]
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            written = [f"{stamp} {level.upper():<7} segue: {event} {' '.join(words)}".rstrip()]
            written += [f"    | {line}" for line in output.splitlines()]
        return [lines.with_priority(line, level) for line in written] if self._journal else written

    def _write(self, line: str) -> bool:
        """Whether there was room for it."""
        data = line.encode(errors="replace")[: _ATOMIC_BYTES - 1] + b"\n"
        try:
            if not any(mask & select.POLLOUT for _, mask in self._poll.poll(0)):
                return False
            os.write(self._fd, data)
        except OSError:
            return False
        return True


def _fitting(level: str, fields: dict[str, object]) -> str:
    """A line of JSON that isn't cut: of the longest text its end stays, where the reason stands."""
    now = time.time()
    while (
        len((line := lines.json_line(now, level, "segue", fields)).encode()) > _ATOMIC_BYTES - _PRIORITY_BYTES
    ):
        key = max(fields, key=lambda key: len(str(fields[key])))
        text = str(fields[key])
        fields = fields | {key: "…" + text[len(text) // 4 + 1 :]}
    return line


def _rounded(value: object) -> object:
    return round(value, 3) if isinstance(value, float) else value

"""The last events of the master's log, kept for whoever asks: a terminal, a page, a script that comes back.

They have numbers, so that who has lost the connection goes on where it was. A number says which master wrote it, and
which of its events it is: ``3-41``. The ring is bounded in events and in bytes, and outlives an upgrade of the master in
a memory file; after a crash it begins anew, under a higher first number.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import msgspec

from segue.handoff.lines import sayable

KEPT = 500
_MAX_OUTPUT_CHARS = 8 * 1024
PING_S = 15.0
"""A stream on which nothing happens says so this often, so that a peer that is gone is found out."""

Number = tuple[int, int]
"""Of the master, and of its event."""
NUMBER = "[0-9]{1,18}-[0-9]{1,18}"
"""How it is written."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the log."""

    id: str
    time: float
    """Unix time."""
    level: str
    event: str
    fields: dict[str, Any]
    output: str = ""
    """What a process printed that did not start."""


class Ring:
    """The ring."""

    def __init__(self, epoch: int, inherited: int | None = None) -> None:
        """`inherited` is the descriptor of what `pass_on` wrote; it is closed."""
        self._epoch, self._count = epoch, 0
        self._kept: deque[tuple[Number, bytes]] = deque(maxlen=KEPT)
        self._changed = asyncio.Event()
        self._closed = False
        if inherited is not None:
            self._restore(inherited)

    def add(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        """Keep one; the oldest goes."""
        self._count += 1
        number = (self._epoch, self._count)
        output = sayable(str(fields.get("output") or "")[-_MAX_OUTPUT_CHARS:])
        shown = {key: _plain(value) for key, value in fields.items() if key != "output" and value is not None}
        line = Event(write_number(number), round(time.time(), 3), level, event, shown, output)
        self._kept.append((number, msgspec.json.encode(line)))
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def changed(self) -> asyncio.Event:
        """Set with the next one."""
        return self._changed

    def close(self) -> None:
        """Let everybody who follows have the rest, and end."""
        self._closed = True
        self._notify()

    def after(self, number: Number | None) -> list[tuple[Number, bytes]]:
        """Those that came after `number`, or all; each as a JSON document."""
        return [(n, line) for n, line in self._kept if number is None or n > number]

    async def stream(self, number: Number | None, count: int) -> AsyncIterator[bytes]:
        """As server-sent events: the last `count` after `number`, and then all that come."""
        for n, line in self.after(number)[-count:] if count else ():
            number = n
            yield _server_sent(n, line)
        if number is None:
            number = (self._epoch, self._count)
        yield b": listening\n\n"
        while True:
            changed = self._changed
            for n, line in self.after(number):
                number = n
                yield _server_sent(n, line)
            if self._closed:
                return
            try:
                async with asyncio.timeout(PING_S):
                    await changed.wait()
            except TimeoutError:
                yield b": nothing new\n\n"

    def pass_on(self) -> int:
        """Write them into a memory file, for the next master of this process; its descriptor."""
        fd = os.memfd_create("segue-events", os.MFD_CLOEXEC)
        with open(os.dup(fd), "wb") as file:
            file.writelines(line + b"\n" for _, line in self._kept)
        return fd

    def _restore(self, fd: int) -> None:
        with open(fd, "rb") as file:
            file.seek(0)
            lines: Iterable[bytes] = file.read().splitlines()
        for line in lines:
            try:
                number = read_number(msgspec.json.decode(line, type=Event).id)
            except (ValueError, msgspec.MsgspecError):
                continue  # of another version
            if number < (self._epoch, 0):
                self._kept.append((number, line))


def write_number(number: Number) -> str:
    """As an event's ``id``."""
    return f"{number[0]}-{number[1]}"


def read_number(text: str) -> Number:
    """What `write_number` wrote. Raises `ValueError`."""
    if re.fullmatch(NUMBER, text) is None:
        raise ValueError(f"an event's number looks like 1-23, not {text!r}")
    epoch, _, count = text.partition("-")
    return int(epoch), int(count)


def _server_sent(number: Number, line: bytes) -> bytes:
    return b"id: %b\ndata: %b\n\n" % (write_number(number).encode(), line)


def _plain(value: object) -> object:
    if isinstance(value, float):
        return round(value, 3)
    return value if isinstance(value, (bool, int)) else sayable(str(value))

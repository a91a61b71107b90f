"""What a server writes to its standard error: its last lines are the reason why it didn't start."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from typing import TextIO

_log = logging.getLogger("segue.mcp")

_LINES = 5
_MAX_LINE = 500


class Said:
    """A pipe for a child's standard error; read on the loop until the child, and all that it started, have closed it."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._partial = b""
        self._loop = asyncio.get_running_loop()
        self._read, write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        self.file: TextIO = os.fdopen(write, "w")
        """What the child is given; to be closed when it has been."""
        self._loop.add_reader(self._read, self._on_readable)

    @property
    def last(self) -> str:
        """The last lines, in one."""
        self._drain()
        return " | ".join(self._lines)

    def close(self) -> None:
        """Read what is there, and no more."""
        if not self.file.closed:
            self.file.close()
        self._drain()
        self._stop()

    def _drain(self) -> None:
        while self._read >= 0 and self._on_readable():
            pass

    def _stop(self) -> None:
        if self._read >= 0:
            self._loop.remove_reader(self._read)
            os.close(self._read)
            self._read = -1

    def _on_readable(self) -> bool:
        """Read once; returns whether there was something."""
        try:
            data = os.read(self._read, 65536)
        except BlockingIOError:
            return False
        if not data:
            self._line(self._partial)
            self._stop()
            return False
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-_MAX_LINE:]
        for line in lines:
            self._line(line)
        return True

    def _line(self, line: bytes) -> None:
        text = line[:_MAX_LINE].decode(errors="replace").strip()
        if text:
            self._lines.append(text)
            _log.debug("event=mcp-server-said server=%s line=%s", self._server, text)

"""When a socket can be read and written, told by an epoll of its own that the loop watches.

uvloop closes its handle of a socket that is reset (libuv takes POLLERR for a bad descriptor), and tells nobody: what had
arrived before is never read, the connection counts as alive until its keepalive is over, and the closed handle stays in the
way of the next socket of that number. An epoll within the loop's epoll is only ever readable.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable

_READ = select.EPOLLIN | select.EPOLLRDHUP


class Readiness:
    """Of one socket. All its verbs belong to the thread of the loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, read: Callable[[], object], write: Callable[[], object]
    ) -> None:
        """`read` is also called when the other side has closed or reset it."""
        self._loop = loop
        self._read = read
        self._write = write
        self._epoll: select.epoll | None = None
        self._number = -1

    def watch(self, sock: socket.socket) -> None:
        """Begin; one that is closed already isn't watched."""
        if sock.fileno() < 0:
            return
        self.close()
        self._epoll, self._number = select.epoll(), sock.fileno()
        self._epoll.register(self._number, _READ)
        self._loop.add_reader(self._epoll.fileno(), self._ready)

    def want_to_write(self, wanted: bool) -> None:
        """Say, or don't say any more, when it can be written."""
        if self._epoll is not None:
            with contextlib.suppress(OSError):  # it is gone
                self._epoll.modify(self._number, _READ | (select.EPOLLOUT if wanted else 0))

    def close(self) -> None:
        """End, before the socket is closed: a copy of it would go on being told of."""
        epoll, self._epoll = self._epoll, None
        if epoll is not None:
            self._loop.remove_reader(epoll.fileno())
            epoll.close()

    def _ready(self) -> None:
        if self._epoll is None:
            return
        for _, events in self._epoll.poll(0):
            if events & ~select.EPOLLOUT:
                self._read()
            if events & select.EPOLLOUT and self._epoll is not None:
                self._write()

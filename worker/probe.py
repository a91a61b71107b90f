"""The private socket on which the application of one worker can be asked, whether that worker serves the public or not.

A generation that is staged accepts nothing yet; this is how it can be looked at before it is promoted, and a parked one
before it is taken back. The same protocols run the same application, but with a server state of their own: what comes in
here is no public traffic. It does not count, does not move, and keeps no worker from being drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable

from segue.worker.responses import PRIVATE
from segue.worker.uvicorn_internals import Http

_log = logging.getLogger("segue.worker")

_BACKLOG = 64


class Probe:
    """One worker's."""

    def __init__(self, http: Http, path: str | None, loop: asyncio.AbstractEventLoop) -> None:
        self.http = http
        """Its connections are those of this socket alone."""
        self._path = path
        self._loop = loop
        self._server: asyncio.AbstractServer | None = None

    @property
    def path(self) -> str | None:
        """Where it listens; None while it doesn't."""
        return self._path if self._server is not None else None

    @property
    def is_empty(self) -> bool:
        """Whether nobody is being answered."""
        return not self.http.state.connections and not self.http.state.tasks

    async def open(self) -> None:
        """Listen, for this user only. A worker that can't be asked can still serve: that is said, and no more."""
        if self._path is None:
            return
        try:
            sock = _bind(self._path)
        except OSError as error:
            _log.warning("event=no-probe path=%s reason=%r", self._path, str(error))
            return
        factory: Callable[[], asyncio.Protocol] = self.http.factory(PRIVATE)
        self._server = await self._loop.create_unix_server(factory, sock=sock, backlog=_BACKLOG)

    def close(self) -> None:
        """Listen no more. Connections stay: they end with those of the public."""
        if self._server is not None and self._path is not None:
            self._server.close()
            self._server = None
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def _bind(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock

"""The end of a worker that stops: what is in flight is finished, and cut when the time is up."""

from __future__ import annotations

import asyncio
import logging

from segue.worker.drain import Drain, cut
from segue.worker.intake import Intake
from segue.worker.probe import Probe
from segue.worker.uvicorn_internals import (
    Http,
    Protocol,
    close,
    is_busy,
    is_unsent,
    open_cycles,
    shut_down,
)

_log = logging.getLogger("segue.worker")

_SWEEP_S = 0.05
_LINGER_S = 3.0
"""How long a connection that was closed may take to be gone."""


class Ending:
    """Of the connections of one worker, the public ones and those of its probe. Its intake is closed already."""

    def __init__(self, http: Http, probe: Probe, intake: Intake, drain: Drain) -> None:
        self._https = (http, probe.http)
        self._probe, self._intake, self._drain = probe, intake, drain
        self._loop = asyncio.get_running_loop()
        self._parted: dict[Protocol, float] = {}
        """When a connection was told to close."""

    async def finish(self, timeout_s: float) -> bool:
        """Wait until all is finished, and return True; after `timeout_s` seconds cut what is left, and return False."""
        deadline = self._loop.time() + timeout_s
        for http, connection in self._connections():
            if http.is_websocket(connection):
                shut_down(connection)
            else:
                http.announce_close(connection)
        first = True
        while not self._is_empty and self._loop.time() < deadline:
            # a request that is in the socket already is read in the first pause, and still answered
            await asyncio.sleep(min(_SWEEP_S, max(0.0, deadline - self._loop.time())))
            for http, connection in self._connections():
                self._close_if_idle(http, connection, first)
            first = False
        if self._is_empty:
            return True
        for http in self._https:
            _log.warning(
                "event=stop-timeout connections=%d tasks=%d timeout_s=%g private=%d",
                len(http.state.connections),
                len(http.state.tasks),
                timeout_s,
                http is self._probe.http,
            )
            await cut(http)
        return False

    def _close_if_idle(self, http: Http, connection: Protocol, first: bool) -> None:
        if http.is_websocket(connection):
            shut_down(connection)
        elif is_busy(connection):
            http.announce_close(connection)
            for cycle in open_cycles(connection):
                if cycle.response_started:
                    cycle.keep_alive = False  # too late for the header
        elif first or not self._intake.pending:
            shut_down(connection)
            parted = self._parted.setdefault(connection, self._loop.time())
            if self._loop.time() - parted > _LINGER_S and not is_unsent(connection):
                close(connection, abort=True)  # TLS waits half a minute for the other side's farewell

    @property
    def _is_empty(self) -> bool:
        return self._drain.is_empty and self._probe.is_empty

    def _connections(self) -> list[tuple[Http, Protocol]]:
        return [(http, each) for http in self._https for each in http.state.connections]

"""Draining: everything that a worker has comes to its end, by moving, by finishing, or at the deadline.

Connections that can move are the business of `segue.worker.handover`. This module sees to the others: those that
can't move are told (`Connection: close` on the next response, GOAWAY) and closed when they stay silent; WebSockets and
streams go on until the deadline. A connection that could move but can't be sent is never closed for that.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from segue.worker.handover import Handover
from segue.worker.intake import Intake
from segue.worker.uvicorn_internals import (
    Http,
    Protocol,
    close,
    go_away,
    is_busy,
    is_multiplexed,
    is_unsent,
    shut_down,
)

_log = logging.getLogger("segue.worker")

_SWEEP_S = 0.02
_SLOW_SWEEP_S = 0.1
_EAGER_FOR_S = 2.0
_WEBSOCKETS_SPREAD_S = 3.0
_CLOSES_PER_TURN = 50
_LINGER_S = 3.0
_NOTICE_S = 1.0
"""How long requests may be on their way when HTTP/2's GOAWAY is sent; they are still answered."""
_SETTLE_S = 1.0
"""How long cancelled tasks have to end, and closed connections to be written out."""


class Drain:
    """One worker's draining; may be begun and ended any number of times."""

    def __init__(
        self,
        http: Http,
        intake: Intake,
        relay_write: socket.socket,
        loop: asyncio.AbstractEventLoop,
        idle_grace_s: float,
    ) -> None:
        self._http = http
        self._intake = intake
        self._loop = loop
        self._idle_grace_s = idle_grace_s
        self._told: dict[Protocol, float] = {}
        """Connections that can't move, and when they are closed if they are silent still."""
        self._multiplexed: dict[Protocol, float] = {}
        """HTTP/2 connections, and when they get GOAWAY though streams are open: some clients drop those then."""
        self._leaving: dict[Protocol, float] = {}
        """Those with GOAWAY, and from when on they are closed in the first moment without an open stream."""
        self._task: asyncio.Task[None] | None = None
        self.handover = Handover(http, relay_write, loop, self.tell)
        self.closed = 0

    def start(
        self, listeners: frozenset[str] | None, timeout_s: float | None, drained: Callable[[], None]
    ) -> None:
        """Begin, and call `drained` once nothing is left. Without `timeout_s` nothing busy is ever cut."""
        self.stop()
        self.handover.start(listeners)
        self._task = self._loop.create_task(self._run(timeout_s, drained))

    def stop(self) -> None:
        """End the drain: what is still here is served on as if nothing had been."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self.handover.stop()
        for protocol in self._told:
            self._http.retract_close(protocol)
        self._told.clear()
        self._multiplexed.clear()
        self._leaving.clear()

    def tell(self, protocol: Protocol) -> None:
        """Let this connection know that it should leave."""
        if protocol in self._told or self._http.is_websocket(protocol):
            return
        if is_multiplexed(protocol):
            if protocol not in self._leaving:
                self._multiplexed.setdefault(protocol, self._loop.time() + self._idle_grace_s)
            return
        self._told[protocol] = self._loop.time() + self._idle_grace_s
        self._http.announce_close(protocol)

    @property
    def is_empty(self) -> bool:
        """Whether no connection, accepted or not yet, and no task is left."""
        return not self._http.state.connections and not self._http.state.tasks and not self._intake.pending

    async def _run(self, timeout_s: float | None, drained: Callable[[], None]) -> None:
        started = self._loop.time()
        deadline = None if timeout_s is None else started + timeout_s
        while not self.is_empty:
            now = self._loop.time()
            if deadline is not None and now >= deadline:
                await self._cut()
                deadline = None
                continue
            self.handover.sweep()
            await self._close_silent(now)
            await asyncio.sleep(_SWEEP_S if now - started < _EAGER_FOR_S else _SLOW_SWEEP_S)
        drained()

    async def _close_silent(self, now: float) -> None:
        """Close what has been told, its grace over, and is silent; HTTP/2: has no open stream."""
        for protocol, until in list(self._multiplexed.items()):
            if until <= now or not is_busy(protocol):
                del self._multiplexed[protocol]
                self._leaving[protocol] = now + _NOTICE_S
                go_away(protocol)
        due: list[Protocol] = []
        for told in (self._told, self._leaving):
            for protocol, until in told.items():  # in the order of their times
                if until > now:
                    break
                due.append(protocol)
        for number, protocol in enumerate(due):
            if protocol not in self._http.state.connections:
                self._told.pop(protocol, None)
                self._leaving.pop(protocol, None)
            elif is_busy(protocol) or is_unsent(protocol):
                if protocol in self._told:  # it isn't silent: its grace begins anew, at the end of the order
                    del self._told[protocol]
                    self._told[protocol] = now + self._idle_grace_s
            else:
                self.closed += 1
                self._told.pop(protocol, None)
                self._leaving.pop(protocol, None)
                shut_down(protocol)
                # TLS waits half a minute for the other side's farewell
                self._loop.call_later(_LINGER_S, close, protocol, True)
                if number % _CLOSES_PER_TURN == 0:
                    await asyncio.sleep(0)

    async def _cut(self) -> None:
        """The deadline has passed."""
        websockets = [each for each in self._http.state.connections if self._http.is_websocket(each)]
        busy = [each for each in self._http.state.connections if each not in websockets and is_busy(each)]
        tasks = len(self._http.state.tasks)
        _log.warning("event=drain-deadline websockets=%d busy=%d tasks=%d", len(websockets), len(busy), tasks)
        for websocket in websockets:
            if websocket in self._http.state.connections:
                self.closed += 1
                shut_down(websocket)
                # their clients come back: not all in the same moment
                await asyncio.sleep(min(0.05, _WEBSOCKETS_SPREAD_S / len(websockets)))
        self.closed += await cut(self._http, keep=self._can_still_move)

    def _can_still_move(self, protocol: Protocol) -> bool:
        return not self._http.is_websocket(protocol) and self.handover.movable(protocol)


async def cut(http: Http, keep: Callable[[Protocol], bool] | None = None) -> int:
    """Cancel what still runs and close what is open, except what is idle and `keep` says to; how many were closed."""
    for task in list(http.state.tasks):
        # an application that hasn't answered yet is answered for with 500, as by uvicorn
        task.cancel(msg="Task cancelled, its worker is being replaced")
    if http.state.tasks:
        await asyncio.wait(http.state.tasks, timeout=_SETTLE_S)
    left = [each for each in http.state.connections if is_busy(each) or keep is None or not keep(each)]
    for connection in left:
        close(connection)
    if left:
        await asyncio.sleep(0)
        for _ in range(int(_SETTLE_S / _SWEEP_S)):
            if http.state.connections.isdisjoint(left):
                break
            await asyncio.sleep(_SWEEP_S)
        for connection in left:
            if connection in http.state.connections:
                close(connection, abort=True)
        await asyncio.sleep(0)
    return len(left)

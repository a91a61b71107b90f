"""Handing connections over: sending each into the relay at a moment at which nothing of it is in this process.

Idle connections go at once, many descriptors in a message, and each busy one once its response is out: a callback
on its response is attached only now, so a request costs nothing extra while no handover is on. From that callback until
it has moved nothing more of it is read: its client's next request is for the next generation. One batch is one
synchronous step: pause reading, prove (`segue.worker.idle`), send, and only when that has succeeded drop our own copy,
without a FIN, since the relay holds the connection. When sending fails nothing has happened; it is tried again later.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable

from segue.handoff import descriptors, relay
from segue.worker.idle import Verdict, judge, proof_for
from segue.worker.uvicorn_internals import Http, Protocol, unwatch_responses, watch_responses

_log = logging.getLogger("segue.worker")

_TURN_S = 0.001
"""After so long a turn begins no further batch; closing what was sent takes about as long again."""
_LARGEST_BATCH = 80
"""With more, a turn comes near 5 ms of CPU."""
_SHARE = 16
"""A message holds at most this part of what is left, so that the readers' shares come out even."""
_RETRY_S = 0.01
_MAX_RETRY_S = 0.1


class Handover:
    """Sends connections away while it is on."""

    def __init__(
        self,
        http: Http,
        relay_write: socket.socket,
        loop: asyncio.AbstractEventLoop,
        unmovable: Callable[[Protocol], None],
    ) -> None:
        self._http = http
        self._relay = relay_write
        self._loop = loop
        self._unmovable = unmovable
        """Told of each connection that can't be proven to hold nothing."""
        self._proof = proof_for(http.config.http_protocol_class)
        self._on = False
        self._listeners: frozenset[str] | None = None
        self._offered: deque[Protocol] = deque()
        self._seen: set[Protocol] = set()
        self._held: set[Protocol] = set()
        """Answered, and not read until the next turn, in which they move: what comes for them waits in the kernel."""
        self._unflushed: list[Protocol] = []
        """To be looked at in the next sweep: their clients read slowly, and there may be thousands of them."""
        self._scheduled: asyncio.Handle | None = None
        self._retry_s = _RETRY_S
        self._largest = min(_LARGEST_BATCH, relay.max_batch(descriptors.limit()))
        self._started = 0.0
        self._swept = False
        self._wrong: set[str] = set()
        self.sent = 0
        self.sending_s: float | None = None
        self.max_stall_s = 0.0
        self.cpu_s = 0.0

    def start(self, listeners: frozenset[str] | None) -> None:
        """Begin; only connections of `listeners` move (None: all)."""
        self._on = True
        self._listeners = listeners
        self._started = time.monotonic()
        self._swept = False
        self.sending_s = None
        self._retry_s = _RETRY_S
        self._seen.clear()
        self.sweep()

    def stop(self) -> None:
        """Send nothing more; connections that are still here stay as they are."""
        self._on = False
        self._read_on()
        self._offered.clear()
        self._unflushed.clear()
        for protocol in self._seen:
            unwatch_responses(protocol)
        self._seen.clear()
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None

    def sweep(self) -> None:
        """Look at the connections that have come since the last sweep, and at what had not been flushed then."""
        connections = self._http.state.connections
        self._seen &= connections
        new = connections - self._seen
        self._seen |= new
        self._offered.extend(new)
        self._offered.extend(self._unflushed)
        self._unflushed.clear()
        if self._offered:
            self._schedule()
        elif not self._swept:
            self._finish_sweep()

    def offer(self, protocol: Protocol) -> None:
        """A response of this connection is out: it may be able to move."""
        if not self._on:
            return
        if self._judge(protocol) is Verdict.IDLE and not self._refused:
            # the rest of this turn of the loop may last: what arrives meanwhile would be served here once more
            protocol.transport.pause_reading()
            self._held.add(protocol)
            self._offered.appendleft(protocol)
        else:
            self._offered.append(protocol)
        self._schedule()

    def movable(self, protocol: Protocol) -> bool:
        """Whether it would move if it were idle."""
        return self._proof is not None and (
            self._listeners is None or getattr(protocol, "segue_listener", None) in self._listeners
        )

    @property
    def _refused(self) -> bool:
        """Whether the relay took nothing the last time, so that it may be a while until it does."""
        return self._retry_s > _RETRY_S

    def _read_on(self) -> None:
        """Serve on what is held."""
        for protocol in self._held:
            protocol.transport.resume_reading()
        self._held.clear()

    def _schedule(self, delay_s: float = 0.0) -> None:
        if self._scheduled is None:
            if delay_s:
                self._scheduled = self._loop.call_later(delay_s, self._turn)
            else:
                self._scheduled = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = None
        if not self._on:
            return
        started, cpu = time.perf_counter(), time.thread_time()
        refusal: relay.Refusal | None = None
        while self._offered and refusal is None and time.perf_counter() - started < _TURN_S:
            refusal = self._send_batch()
        # runs after the transports' own callbacks of what was sent, so that those are counted too
        self._loop.call_soon(self._turned, started, cpu)
        if refusal is None:
            self._retry_s = _RETRY_S
            if self._offered:
                self._loop.call_soon(self._schedule)
            elif not self._swept:
                self._finish_sweep()
        else:
            if refusal not in {relay.Refusal.FULL, relay.Refusal.TOO_MANY}:
                self._complain(refusal.value)
            self._read_on()
            self._schedule(self._retry_s)
            self._retry_s = min(_MAX_RETRY_S, self._retry_s * 2)

    def _turned(self, started: float, cpu: float) -> None:
        self.max_stall_s = max(self.max_stall_s, time.perf_counter() - started)
        self.cpu_s += time.thread_time() - cpu

    def _finish_sweep(self) -> None:
        self._swept = True
        self.sending_s = time.monotonic() - self._started

    def _send_batch(self) -> relay.Refusal | None:
        """Gather what is idle of one listener, up to a batch, and send it."""
        size = min(self._largest, max(1, len(self._offered) // _SHARE))
        batch: list[Protocol] = []
        fds: list[int] = []
        name: str | None = None
        judged = 0
        while self._offered and len(batch) < size and judged < 4 * _LARGEST_BATCH:
            protocol = self._offered[0]
            listener: str = getattr(protocol, "segue_listener", "")
            if batch and listener != name:
                break
            self._offered.popleft()
            judged += 1
            if not self._is_idle(protocol):
                continue
            name = listener
            protocol.transport.pause_reading()
            batch.append(protocol)
            fds.append(protocol.transport.get_extra_info("socket").fileno())
        if not batch or name is None:
            return None
        now = self._loop.time()
        timers = [_remaining_ms(protocol, now) for protocol in batch]
        try:
            refusal = relay.send(self._relay, name, fds, timers)
        except OSError as error:
            self._complain(str(error))
            refusal = relay.Refusal.FULL
        if refusal is None:
            for protocol in batch:
                _let_go(protocol)
                # not left to the next sweep: thousands would be freed in one go there (8 ms were measured)
                self._seen.discard(protocol)
            self.sent += len(batch)
            return None
        for protocol in batch:
            protocol.transport.resume_reading()
        if refusal is relay.Refusal.TOO_BIG and self._largest > 1:
            self._largest //= 2
            refusal = None
        self._offered.extendleft(reversed(batch))
        return refusal

    def _is_idle(self, protocol: Protocol) -> bool:
        """Whether it moves now; sees to it that it is offered again if it may later."""
        if protocol in self._held:
            self._held.remove(protocol)
            protocol.transport.resume_reading()
        if self._http.is_websocket(protocol):
            return False
        if not self.movable(protocol):
            self._unmovable(protocol)
            return False
        verdict = self._judge(protocol)
        if verdict is Verdict.NEVER:
            self._unmovable(protocol)
        elif verdict is Verdict.UNFLUSHED:
            self._unflushed.append(protocol)
        elif verdict is Verdict.BUSY and "on_response_complete" not in vars(protocol):
            watch_responses(protocol, self.offer)
        return verdict is Verdict.IDLE

    def _judge(self, protocol: Protocol) -> Verdict:
        known = type(protocol) is self._http.config.http_protocol_class
        return judge(protocol, self._proof if known else None)

    def _complain(self, reason: str) -> None:
        if reason not in self._wrong:
            self._wrong.add(reason)
            _log.error("event=handover-refused reason=%r", reason)


def _remaining_ms(protocol: Protocol, now: float) -> int:
    timer = protocol.timeout_keep_alive_task
    return relay.NO_TIMER if timer is None else max(0, int((timer.when() - now) * 1000))


def _let_go(protocol: Protocol) -> None:
    """Forget a connection that is on its way: it stays open, since the relay holds it."""
    timer = protocol.timeout_keep_alive_task
    if timer is not None:
        timer.cancel()
        protocol.timeout_keep_alive_task = None
    protocol.transport.abort()

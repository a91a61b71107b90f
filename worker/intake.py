"""How connections come in: accepted from the listeners, and adopted from the relay.

Both are read on the event loop with `add_reader`, a few at a time, so that workers which share the load share the
connections too, and so that no turn of the loop lasts long. To stop is to stop reading: the queue belongs to the
kernel's socket, and nobody in it notices. When descriptors run short nothing is closed either; clients wait in that
queue, other workers take them.

Rejected: `loop.create_server`, which accepts up to its whole backlog in one turn and closes the listener with it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping

import msgspec

from segue.handoff import descriptors, relay
from segue.handoff.messages import ListenerInfo
from segue.worker.collector import Collector
from segue.worker.uvicorn_internals import Http, Protocol

_log = logging.getLogger("segue.worker")

ACCEPTS_PER_TURN = 8
ADOPTS_PER_TURN = 12
_BURST = 200
"""Connections adopted in a row that make it worth while to let the garbage collector rest."""
_BURST_GAP_S = 0.1
_COURTESY_S = 8e-6
"""How long to wait before the next message of the relay, per connection adopted in this burst."""
_MAX_COURTESY_S = 0.004
_PAUSE_S = 0.2
"""How long to wait when descriptors or memory run short."""
_COMPLAIN_EVERY_S = 60.0
_MIN_KEEP_ALIVE_S = 1.0
_TRANSIENT = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_PER_CONNECTION = {
    errno.ECONNABORTED,
    errno.EPROTO,
    errno.ENETDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EPERM,
}
"""accept(2): errors of the connection that was to be accepted, not of the listener."""


class PublicListener(msgspec.Struct, frozen=True):
    """An inherited listening socket. It stays open for as long as the worker lives."""

    info: ListenerInfo
    sock: socket.socket


class _Adopted(msgspec.Struct, frozen=True):
    fd: int
    listener: PublicListener
    keep_alive_ms: int


class Intake:
    """Accepts and adopts while it is open; can be opened and closed any number of times."""

    def __init__(
        self,
        http: Http,
        listeners: Mapping[str, PublicListener],
        relay_read: socket.socket,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._http = http
        self._listeners = dict(listeners)
        self._relay = relay_read
        self._loop = loop
        self._factories = {name: http.factory(name) for name in listeners}
        self._open = False
        self._relay_read = False
        self._adopting = False
        self._paused: asyncio.TimerHandle | None = None
        self._made: set[asyncio.Task[None]] = set()
        self._unpacked: deque[_Adopted] = deque()
        self._collector = Collector(loop)
        self._burst = 0
        self._adopted_at = 0.0
        self._complained = -_COMPLAIN_EVERY_S
        self.alone = False
        """Whether no other worker reads the relay: then there is nobody to leave anything to."""
        self.accepted = 0
        self.adopted = 0
        self.max_stall_s = 0.0

    @property
    def pending(self) -> int:
        """Connections taken but not yet made known to the server."""
        return len(self._made) + len(self._unpacked)

    @property
    def addresses(self) -> list[str]:
        """Where it accepts now."""
        return [listener.info.address for listener in self._listeners.values()] if self._open else []

    def open(self) -> None:
        """Accept and adopt from now on."""
        if not self._open:
            self._open = True
            self._read_listeners()
            if not self._unpacked:
                self._read_relay()

    def close(self) -> None:
        """Take nothing more. What was taken already is still made; see `pending`."""
        self._open = False
        self._leave_listeners()
        self._leave_relay()
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None

    def _read_listeners(self) -> None:
        for listener in self._listeners.values():
            self._loop.add_reader(listener.sock.fileno(), self._accept, listener)

    def _leave_listeners(self) -> None:
        for listener in self._listeners.values():
            self._loop.remove_reader(listener.sock.fileno())

    def _read_relay(self) -> None:
        if not self._relay_read:
            self._relay_read = True
            self._loop.add_reader(self._relay.fileno(), self._adopt)

    def _leave_relay(self) -> None:
        if self._relay_read:
            self._relay_read = False
            self._loop.remove_reader(self._relay.fileno())

    def _pause(self, why: str) -> None:
        """Leave whoever connects to the kernel's queues and to other workers for a moment."""
        self._leave_listeners()
        self._complain(why)
        if self._paused is not None:
            self._paused.cancel()
        self._paused = self._loop.call_later(_PAUSE_S, self._resume)

    def _resume(self) -> None:
        if not self._open:
            return
        if descriptors.spare() <= 0:
            self._paused = self._loop.call_later(_PAUSE_S, self._resume)
            return
        self._paused = None
        self._read_listeners()

    def _return_to_relay(self) -> None:
        if self._open and not self._adopting:
            self._read_relay()

    def _complain(self, why: str) -> None:
        now = time.monotonic()
        if now - self._complained > _COMPLAIN_EVERY_S:
            self._complained = now
            _log.warning(
                "event=intake-paused reason=%r connections=%d", why, len(self._http.state.connections)
            )

    # Accepting

    def _accept(self, listener: PublicListener) -> None:
        if descriptors.spare() <= 0:
            self._pause("few descriptors are left")
            return
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = listener.sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _PER_CONNECTION:
                    continue
                if error.errno not in _TRANSIENT:
                    _log.error("event=accept-failed listener=%s reason=%r", listener.info.address, str(error))
                self._pause(str(error))
                return
            sock.setblocking(False)
            self.accepted += 1
            self._make(sock, self._factories[listener.info.name], tls=True)

    def _make(self, sock: socket.socket, factory: Callable[[], Protocol], tls: bool) -> None:
        task = self._loop.create_task(self._connect(sock, factory, tls))
        self._made.add(task)
        task.add_done_callback(self._made.discard)

    async def _connect(self, sock: socket.socket, factory: Callable[[], Protocol], tls: bool) -> None:
        context = self._http.config.ssl if tls else None
        try:
            await self._loop.connect_accepted_socket(factory, sock, ssl=context)
        except (OSError, TimeoutError) as error:
            # a failed TLS handshake, or a client that has left; asyncio's own servers say nothing of it either
            _log.debug("event=connection-failed reason=%r", str(error))
            sock.close()
        except BaseException:
            sock.close()
            raise

    # Adopting

    def _adopt(self) -> None:
        if self._adopting:
            return
        spare = descriptors.spare_to_adopt()
        if spare < relay.needed_room(self._relay, spare):
            self._complain("no room for a message of descriptors")
            self._leave_relay()
            self._loop.call_later(_PAUSE_S, self._return_to_relay)
            return
        try:
            parcel = relay.receive(self._relay)
        except relay.MalformedParcelError as error:
            _log.error("event=relay-malformed reason=%r", str(error))
            return
        except (relay.RelayClosedError, OSError) as error:
            _log.error("event=relay-lost reason=%r", str(error))
            self._leave_relay()
            return
        if parcel is None:
            return
        if parcel.lost:
            _log.error("event=relay-truncated lost=%d", parcel.lost)
        listener = self._listeners.get(parcel.header.listener)
        if listener is None:
            _log.warning(
                "event=not-adopted listener=%s connections=%d", parcel.header.listener, len(parcel.fds)
            )
            relay.close_all(parcel.fds)
            return
        self._unpacked.extend(
            _Adopted(fd, listener, milliseconds)
            for fd, milliseconds in zip(parcel.fds, parcel.header.keep_alive_ms, strict=False)
        )
        now = self._loop.time()
        self._burst = len(parcel.fds) + (self._burst if now - self._adopted_at < _BURST_GAP_S else 0)
        self._adopted_at = now
        if self._burst >= _BURST:
            self._collector.rest()
        self._adopting = True
        # the next message is left to others until this one is done
        self._leave_relay()
        self._adopt_some()

    def _adopt_some(self) -> None:
        """Make a few connections and let the loop run, until none is left."""
        started = time.perf_counter()
        for _ in range(min(ADOPTS_PER_TURN, len(self._unpacked))):
            adopted = self._unpacked.popleft()
            self._make_adopted(adopted)
        # runs in the next turn, after the connections themselves have been made
        self._loop.call_soon(self._turned, started)

    def _turned(self, started: float) -> None:
        self.max_stall_s = max(self.max_stall_s, time.perf_counter() - started)
        if self._unpacked:
            self._adopt_some()
            return
        # whoever has taken much lately lets the others go first, else the one with a free core takes most
        courtesy_s = 0.0 if self.alone else min(_MAX_COURTESY_S, self._burst * _COURTESY_S)
        self._loop.call_later(courtesy_s, self._next_message)

    def _next_message(self) -> None:
        self._adopting = False
        self._return_to_relay()

    def _make_adopted(self, adopted: _Adopted) -> None:
        listener = adopted.listener.sock
        try:
            sock = socket.socket(listener.family, listener.type, listener.proto, fileno=adopted.fd)
        except OSError as error:
            _log.error("event=not-adopted reason=%r", str(error))
            relay.close_all([adopted.fd])
            return
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != listener.type:
            _log.error("event=not-adopted reason='it is no stream'")
            sock.close()
            return
        sock.setblocking(False)
        self.adopted += 1
        name = adopted.listener.info.name
        factory = self._factories[name]
        if adopted.keep_alive_ms != relay.NO_TIMER:
            factory = self._http.adopting_factory(name, max(_MIN_KEEP_ALIVE_S, adopted.keep_alive_ms / 1000))
        # it was accepted without TLS: one with it can't have been sent
        self._make(sock, factory, tls=False)

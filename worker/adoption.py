"""The place where the next master finds this worker, and whose commands it obeys.

A worker that loses its master goes on. When another one connects, it is told what this worker is and given copies of
the sockets that must not be lost; its lifeline takes the place of the old one. Every master has a higher number, its
*epoch*, than those before it: what a lower one commands is refused, so that a master that was stopped and wakes after
another has taken over does no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import msgspec

from segue.handoff import adoption
from segue.handoff.messages import ListenerInfo, WorkerMode, WorkerSpec

if TYPE_CHECKING:
    from segue.worker.services.hosted import (
        Hosted,
    )  # before the application, only what a start needs is imported

_log = logging.getLogger("segue.worker")

_MOST_CONNECTIONS = 8
"""There is one master, and perhaps another that wakes late."""


class Adoptable(Protocol):
    """What is told of a worker, and done to it, when it is adopted."""

    mode: WorkerMode
    services: Hosted

    @property
    def operator_drain(self) -> str | None:
        """The operator's drain."""

    @property
    def relay(self) -> tuple[socket.socket, socket.socket]:
        """Its read end and its write end."""

    @property
    def listeners(self) -> Mapping[ListenerInfo, socket.socket]:
        """The public ones, whether it accepts or not."""

    def take_lifeline(self, fd: int) -> None:
        """Another master's life is watched from now on."""


class Adoption:
    """One worker's."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Bind the socket, so that a master finds this process from its first moments on. Raises OSError."""
        self.epoch = spec.epoch
        """The highest that a master has had."""
        self._spec = spec
        self._socket = adoption.listen(spec.adoption_path) if spec.adoption_path else None
        self._connections: dict[socket.socket, None] = {}
        """In the order of their coming."""
        self._worker: Adoptable | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve(self, worker: Adoptable) -> None:
        """Answer masters from now on."""
        self._worker, self._loop = worker, asyncio.get_running_loop()
        if self._socket is not None:
            self._loop.add_reader(self._socket.fileno(), self.poll)

    def close(self) -> None:
        """Be found no more."""
        for connection in list(self._connections):
            self._drop(connection)
        if self._socket is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
            with contextlib.suppress(OSError):
                os.unlink(str(self._spec.adoption_path))

    def obey(self, epoch: str | None) -> str | None:
        """Why a command of the master of this epoch is refused; None if it isn't. Without an epoch it is a person's."""
        if epoch is None or not epoch.isdecimal() or int(epoch) >= self.epoch:
            return None
        return f"another master has taken over (epoch {self.epoch}, this one is {epoch})"

    def poll(self) -> None:
        """Answer every master that has connected and said what it wants."""
        while self._socket is not None and self._loop is not None:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                break
            connection.setblocking(False)
            while len(self._connections) >= _MOST_CONNECTIONS:  # the oldest has had its time to say something
                self._drop(next(iter(self._connections)))
            self._connections[connection] = None
            self._loop.add_reader(connection.fileno(), self._read, connection)
        for connection in list(self._connections):
            self._read(connection)

    def _read(self, connection: socket.socket) -> None:
        try:
            _, uid = adoption.peer(connection)
            received = adoption.receive_offer(connection)
        except adoption.MalformedError as error:
            _log.error("event=adoption-malformed reason=%r", str(error))
            self._drop(connection)
            return
        except OSError:
            self._drop(connection)
            return
        if received is None:
            return
        offer, fds = received
        try:
            self._answer(connection, uid, offer, fds)
        finally:
            adoption.close_all(fds)
            self._drop(connection)

    def _answer(self, connection: socket.socket, uid: int, offer: adoption.Offer, fds: list[int]) -> None:
        worker = self._worker
        assert worker is not None
        refusal = self._refusal(uid, offer, fds)
        acceptance = self._describe(worker)
        if refusal:
            _log.warning("event=not-adopted reason=%r", refusal)
            acceptance = msgspec.structs.replace(acceptance, error=refusal, listeners=())
            handles: list[int] = []
        else:
            self.epoch = offer.epoch
            worker.take_lifeline(fds.pop())
            sockets = [*worker.relay, *worker.listeners.values()]
            handles = [sock.fileno() for sock in sockets]
            _log.warning("event=adopted epoch=%d mode=%s", offer.epoch, worker.mode)
        with contextlib.suppress(OSError):  # the master has gone again, or waits no longer
            adoption.send(connection, acceptance, handles)

    def _refusal(self, uid: int, offer: adoption.Offer, fds: list[int]) -> str:
        if uid not in {os.geteuid(), 0}:
            return f"user {uid} may not adopt a worker of user {os.geteuid()}"
        if offer.version != adoption.VERSION or len(fds) != 1 or not adoption.is_pipe(fds[0]):
            return f"an offer of version {offer.version} with {len(fds)} descriptors"
        if offer.identity and offer.identity != self._spec.identity:
            return "it belongs to another instance"
        return self.obey(str(offer.epoch)) or ""

    def _describe(self, worker: Adoptable) -> adoption.Acceptance:
        standing = worker.services.standing()
        return adoption.Acceptance(
            version=adoption.VERSION,
            pid=os.getpid(),
            start_time=adoption.start_time(os.getpid()) or 0,
            identity=self._spec.identity,
            generation=self._spec.generation,
            worker=self._spec.worker,
            mode=worker.mode,
            fingerprint=self._spec.fingerprint,
            listeners=tuple(worker.listeners),
            handover_s=worker.services.handover_s,
            services_active=standing.active,
            lead=standing.lead,
            versions=standing.versions,
            operator_drain=worker.operator_drain,
        )

    def _drop(self, connection: socket.socket) -> None:
        if connection in self._connections:
            del self._connections[connection]
            assert self._loop is not None
            self._loop.remove_reader(connection.fileno())
            connection.close()

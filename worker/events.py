"""What an application may know of its worker's place in a change of generations.

`segue.draining` and `segue.activated` are two flags of the process. They can be read at import time, before any event
loop runs, from any thread, and awaited in any event loop. Outside segue (plain uvicorn, a test) nothing ever
sets them.
"""

from __future__ import annotations

import asyncio
import threading
from typing import final


@final
class Flag:
    """A condition that can be asked, and awaited like `asyncio.Event`, in any thread and any event loop.

    ``if segue.draining:`` and ``segue.draining.is_set()`` ask; ``await segue.draining.wait()`` waits until it is set.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._set = False
        self._lock = threading.Lock()
        self._waiters: set[asyncio.Future[None]] = set()

    def is_set(self) -> bool:
        """Whether it is so now."""
        return self._set

    def __bool__(self) -> bool:
        return self._set

    def __repr__(self) -> str:
        return f"<segue.{self._name}: {'set' if self._set else 'not set'}>"

    async def wait(self) -> bool:
        """Return True as soon as it is so."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._set:
                return True
            self._waiters.add(future)
        try:
            await future
        finally:
            with self._lock:
                self._waiters.discard(future)
        return True

    def _raise(self) -> None:
        with self._lock:
            self._set = True
            waiters, self._waiters = self._waiters, set()
        for future in waiters:
            try:
                future.get_loop().call_soon_threadsafe(_wake, future)
            except RuntimeError:  # that loop has been closed, and its waiter with it
                continue

    def _lower(self) -> None:
        self._set = False


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


draining = Flag("draining")
"""Set while this worker is draining or stopping: finish long answers, tell subscribers to come again.
Cleared when the worker is activated again (a rollback)."""

activated = Flag("activated")
"""Set while this worker's generation is the one that serves. What must run only once (a consumer, a scheduler)
waits for it in its lifespan task; it is cleared when the generation is handed over."""


@final
class WorkerInfo:
    """``scope["state"]["segue"]``, in the lifespan scope and in that of every request."""

    __slots__ = ("activated", "draining", "generation", "worker")

    def __init__(self, generation: int, worker: int) -> None:
        self.generation = generation
        """The generation's number."""
        self.worker = worker
        """The worker's number in its generation, from 1."""
        self.draining = draining
        self.activated = activated

    def __repr__(self) -> str:
        return f"<segue generation={self.generation} worker={self.worker}>"


class Stage:
    """Sets both flags; only the worker itself does."""

    @staticmethod
    def activate() -> None:
        """Serve."""
        draining._lower()
        activated._raise()

    @staticmethod
    def hand_over() -> None:
        """Take no new work, and be ready to go on."""
        activated._lower()

    @staticmethod
    def drain() -> None:
        """Finish what there is."""
        activated._lower()
        draining._raise()

"""One built object of a service, and the leases on it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from types import TracebackType
from typing import Any, Generic, TypeVar, final

from segue.worker.services.errors import not_running

T = TypeVar("T")


@final
class Instance(Generic[T]):
    """An object that a factory has made, with what is known of it. Its leases may be taken in any thread.

    They are counted without a lock: a lease may be returned by the garbage collector or in a signal handler, and so in
    the middle of whatever its thread was about to do here.
    """

    __slots__ = (
        "_idle",
        "_leases",
        "_loop",
        "active",
        "closing",
        "degraded",
        "settings",
        "since",
        "value",
        "version",
    )

    def __init__(self, value: T, settings: Any, version: int, loop: asyncio.AbstractEventLoop) -> None:
        self.value = value
        self.settings = settings
        self.version = version
        self.active = False
        """It may be taking work: `activate` was tried last, or `deactivate` has failed."""
        self.closing: asyncio.Task[str | None] | None = None
        """How it is being, or has been, closed; its result says why that failed."""
        self.degraded: str | None = None
        """Why it can't do all that it should."""
        self.since = time.time()
        self._loop = loop
        self._leases: deque[None] = deque()
        self._idle: asyncio.Event | None = None

    @property
    def leases(self) -> int:
        """How many pieces of work depend on it."""
        return len(self._leases)

    def acquire(self) -> None:
        """One more piece of work depends on it."""
        self._leases.append(None)

    def release(self) -> None:
        """One less."""
        self._leases.pop()
        idle = self._idle
        if idle is not None and not self._leases:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(idle.set)

    async def unleased(self, timeout_s: float) -> bool:
        """Wait until nobody holds a lease; False when `timeout_s` seconds weren't enough."""
        # first the event, then the look at the leases; who returns the last one does it the other way round
        idle = self._idle = self._idle or asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                while self._leases:
                    idle.clear()
                    await idle.wait()
        except TimeoutError:
            return not self._leases
        return True


class Slot(Generic[T]):
    """Where a service's current instance is: the one reference that a swap moves."""

    __slots__ = ("current", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.current: Instance[T] | None = None


@final
class Lease(Generic[T]):
    """``with service.lease() as instance:`` pins the instance: it isn't closed before the block ends."""

    __slots__ = ("_instance", "_slot")

    def __init__(self, slot: Slot[T]) -> None:
        self._slot = slot
        self._instance: Instance[T] | None = None

    def __enter__(self) -> T:
        if self._instance is not None:
            raise RuntimeError("a lease is taken once; ask for another one")
        while True:
            instance = self._slot.current
            if instance is None:
                raise not_running(self._slot.name)
            instance.acquire()
            # in another thread than the loop's the reference may have moved in between
            if instance is self._slot.current:
                self._instance = instance
                return instance.value
            instance.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._instance is not None:
            self._instance.release()
            self._instance = None

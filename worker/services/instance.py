"""One built object of a service, and the leases on it."""

from __future__ import annotations

import asyncio
import threading
import time
from types import TracebackType
from typing import Any, Generic, TypeVar, final

from segue.worker.services.errors import not_running

T = TypeVar("T")


@final
class Instance(Generic[T]):
    """An object that a factory has made, with what is known of it. Its leases may be taken in any thread."""

    __slots__ = (
        "_idle",
        "_lock",
        "_loop",
        "active",
        "closed",
        "degraded",
        "leases",
        "settings",
        "since",
        "value",
        "version",
    )

    def __init__(self, value: T, settings: Any, version: int, loop: asyncio.AbstractEventLoop) -> None:
        self.value = value
        self.settings = settings
        self.version = version
        self.leases = 0
        self.active = False
        """`activate` was tried last, not `deactivate`: it may be taking work."""
        self.closed = False
        self.degraded: str | None = None
        """Why it can't do all that it should."""
        self.since = time.time()
        self._loop = loop
        self._lock = threading.Lock()
        self._idle: asyncio.Event | None = None

    def acquire(self) -> None:
        """One more piece of work depends on it."""
        with self._lock:
            self.leases += 1

    def release(self) -> None:
        """One less."""
        with self._lock:
            self.leases -= 1
            idle = self._idle if self.leases == 0 else None
        if idle is not None:
            self._loop.call_soon_threadsafe(idle.set)

    async def unleased(self, timeout_s: float) -> bool:
        """Wait until nobody holds a lease; False when `timeout_s` seconds weren't enough."""
        with self._lock:
            if self.leases == 0:
                return True
            self._idle = idle = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await idle.wait()
        except TimeoutError:
            return False
        return True


class Slot(Generic[T]):
    """Where a service's current instance is: the one reference that a swap moves."""

    __slots__ = ("current", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.current: Instance[T] | None = None

    def lease(self) -> Lease[T]:
        """A lease that is taken when its block begins."""
        return Lease(self)


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

"""Threads for what may block: so many at once, each piece of work with a deadline, and none of it in the way of the rest.

A thread can't be stopped from outside. One whose work goes on after its deadline is abandoned: it no longer counts, so that
another one takes its place, and it ends with its work. How many of them one owner may have is the owner's matter.
`concurrent.futures` won't do: its threads are waited for when the process ends, so that one that hangs would keep it.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Literal, Protocol, TypeVar

T = TypeVar("T")

_IDLE_S = 10.0
"""A thread without work ends after so long."""


class DeadlineError(TimeoutError):
    """The work was not done in time."""


class Owner(Protocol):
    """Whose work it is."""

    hanging: int
    """How much of it goes on after its deadline."""


class _Job(Generic[T]):
    def __init__(self, work: Callable[[], T], owner: Owner, loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.owner = owner
        self.context = contextvars.copy_context()
        self.loop = loop
        self.outcome: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()
        self.state: Literal["waiting", "running", "abandoned", "done"] = "waiting"
        self.timer: asyncio.TimerHandle | None = None

    def finish(self, value: T | None, error: BaseException | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if not self.outcome.done():
            self.outcome.set_result((value, error))


class Threads:
    """A pool that needs no closing: threads without work end, and none keeps the process."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.abandoned = 0
        """How many threads are still at work that nobody waits for."""
        self._changed = threading.Condition()
        self._waiting: deque[_Job[Any]] = deque()
        self._living = 0
        self._idle = 0

    async def run(self, work: Callable[[], T], deadline_s: float, owner: Owner) -> T:
        """What `work` returns or raises. Raises `DeadlineError` after `deadline_s` seconds, waiting included.

        If whoever waits is cancelled, work that hasn't begun doesn't, and the other keeps its deadline.
        """
        loop = asyncio.get_running_loop()
        job = _Job(work, owner, loop)
        job.timer = loop.call_later(deadline_s, self._expire, job, deadline_s)
        with self._changed:
            self._waiting.append(job)
            self._staff()
        try:
            value, error = await job.outcome
        except asyncio.CancelledError:
            self._withdraw(job)
            raise
        if error is not None:
            raise error
        return value  # type: ignore[return-value] # without an error it is what the work returned

    def _staff(self) -> None:
        """Wake a thread, or start one more. Held: the lock."""
        if len(self._waiting) > self._idle and self._living < self.limit:
            self._living += 1
            try:
                threading.Thread(target=self._work, name="tool", daemon=True).start()
            except RuntimeError:  # the system gives no more threads: those that there are take it in turn
                self._living -= 1
        self._changed.notify()

    def _withdraw(self, job: _Job[Any]) -> None:
        with self._changed:
            if job.state == "waiting":
                self._waiting.remove(job)
                job.state = "done"

    def _expire(self, job: _Job[Any], deadline_s: float) -> None:
        with self._changed:
            if job.state == "done":
                return
            if job.state == "running":
                job.state = "abandoned"
                job.owner.hanging += 1
                self.abandoned += 1
                self._living -= 1
                if self._waiting:
                    self._staff()
                reason = f"it took longer than {deadline_s:g} s"
            else:
                self._waiting.remove(job)
                job.state = "done"
                reason = f"no thread was free for it within {deadline_s:g} s"
        job.finish(None, DeadlineError(reason))

    def _work(self) -> None:
        while (job := self._next()) is not None:
            value, error = None, None
            try:
                value = job.context.run(job.work)
            except BaseException as raised:  # noqa: BLE001 - SystemExit, too, is the work's, not the thread's
                error = raised
            with self._changed:
                abandoned = job.state == "abandoned"
                job.state = "done"
                if abandoned:
                    job.owner.hanging -= 1
                    self.abandoned -= 1
                    return
            try:
                job.loop.call_soon_threadsafe(job.finish, value, error)
            except RuntimeError:  # the loop is closed: the process ends
                return
            del job, value, error  # an idle thread must not keep what it worked on

    def _next(self) -> _Job[Any] | None:
        with self._changed:
            while not self._waiting:
                self._idle += 1
                woken = self._changed.wait(_IDLE_S)
                self._idle -= 1
                if not woken and not self._waiting:
                    self._living -= 1
                    return None
            job = self._waiting.popleft()
            job.state = "running"
            return job

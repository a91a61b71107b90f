"""What this agent has asked others for, and waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from segue.worker.backend.hsp.errors import HSPError
from segue.worker.backend.hsp.payloads import TaskResult


class Requests:
    """Of one connector."""

    def __init__(self, answered: Callable[[str, bool, float], object]) -> None:
        """`answered` is told who has answered, whether with a result, and after how many seconds."""
        self._answered = answered
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._begun: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def expect(self, request_id: str) -> asyncio.Future[dict[str, Any]]:
        """The result of a request, once it comes."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        self._begun[request_id] = time.monotonic()
        return future

    def forget(self, request_id: str) -> None:
        """Nobody waits for it any more."""
        future = self._waiting.pop(request_id, None)
        self._begun.pop(request_id, None)
        if future is not None and not future.cancel() and not future.cancelled():
            future.exception()  # it may have failed with nobody looking

    def resolve(self, result: TaskResult) -> None:
        """A result has come. The first one counts: a request may be worked on twice after a crash."""
        future = self._waiting.get(result.request_id)
        if future is None or future.done():
            return
        ok = result.status == "success"
        self._answered(result.executing_ai_id, ok, time.monotonic() - self._begun[result.request_id])
        if ok:
            future.set_result(result.payload)
        else:
            status = 404 if result.status == "rejected" else 502
            future.set_exception(
                HSPError(status, f"{result.executing_ai_id}: {result.error or result.status}")
            )

    def fail(self, request_id: str, error: HSPError) -> None:
        """It won't come."""
        future = self._waiting.get(request_id)
        if future is not None and not future.done():
            future.set_exception(error)

    def fail_all(self, error: HSPError) -> None:
        """None will come."""
        for request_id in list(self._waiting):
            self.fail(request_id, error)

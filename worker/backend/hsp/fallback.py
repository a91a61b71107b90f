"""What stands for the broker while there is none: messages go round in the process, to this agent alone."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from segue.worker.backend.hsp.topics import Topics, matches

_log = logging.getLogger("segue.hsp")


class Fallback:
    """Delivers in order, one message after the other."""

    def __init__(self, topics: Topics, receive: Callable[[str, bytes, bool], Awaitable[object]]) -> None:
        self.delivered = 0
        """How many messages have found somebody."""
        self._filters = (*topics.stream, *topics.private)
        self._receive = receive
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._pump: asyncio.Task[None] | None = None

    def deliver(self, topic: str, data: bytes) -> None:
        """Take a message; it is handled soon, if this agent listens to its topic."""
        if not any(matches(each, topic) for each in self._filters):
            return
        self._waiting.append((topic, data))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._deliver())

    async def _deliver(self) -> None:
        while self._waiting:
            topic, data = self._waiting.popleft()
            self.delivered += 1
            try:
                await self._receive(topic, data, False)
            except Exception:  # noqa: BLE001 - the next message is handled all the same
                _log.exception("event=hsp-receive-failed")

    async def close(self) -> None:
        """Handle what was taken."""
        if self._pump is not None and not self._pump.done():
            await asyncio.wait({self._pump})

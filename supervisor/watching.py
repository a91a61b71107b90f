"""The status as it changes, for pages that stay open: ``GET /api/v1/hot/watch``.

All who watch share one look every two seconds, and one soon after something has happened; while nobody watches, nobody
looks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

LOOK_S = 2.0
SOON_S = 0.15
"""Not sooner after the last look: one thing that happens seldom comes alone."""


class Watching:
    """Those who watch, and what they are shown."""

    def __init__(
        self, look: Callable[[], Awaitable[dict[str, Any]]], happened: Callable[[], asyncio.Event]
    ) -> None:
        """`happened` gives an event that is set when there is something new to see."""
        self._look, self._happened = look, happened
        self._watchers = 0
        self._shown = b""
        self._new = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    async def stream(self) -> AsyncIterator[bytes]:
        """As server-sent events, until whoever watches leaves."""
        self._watchers += 1
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._keep_looking())
        elif self._shown:
            yield self._shown
        try:
            while True:
                await self._new.wait()
                yield self._shown
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._looking.cancel()
                self._looking, self._shown = None, b""

    async def _keep_looking(self) -> None:
        while True:
            happened = self._happened()
            document = await self._look()
            self._shown = b"event: status\ndata: %b\n\n" % msgspec.json.encode(document)
            self._new.set()
            self._new = asyncio.Event()
            await asyncio.sleep(SOON_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S - SOON_S):
                    await happened.wait()

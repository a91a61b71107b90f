"""The status as it changes, for pages that stay open: ``GET /api/v1/hot/watch``.

All who watch share one look every two seconds, and one soon after something has happened; while nobody watches, nobody
looks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec

LOOK_S = 2.0
SOON_S = 0.15
"""Not sooner after the last look: one thing that happens seldom comes alone."""


class Watching:
    """Those who watch, and what they are shown."""

    def __init__(
        self,
        look: Callable[[], Awaitable[dict[str, Any]]],
        for_all: Callable[[dict[str, Any]], dict[str, Any]],
        happened: Callable[[], asyncio.Event],
    ) -> None:
        """`for_all` is what of it everybody may see; `happened` gives an event that is set when there is something new."""
        self._look, self._for_all, self._happened = look, for_all, happened
        self._watchers = 0
        self._seen: dict[str, Any] | None = None
        self._shown: dict[bool, bytes] = {}
        """It as it is sent, by whether all of it is."""
        self._new = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    async def stream(self, trusted: bool) -> AsyncGenerator[bytes, None]:
        """As server-sent events, until whoever watches leaves."""
        self._watchers += 1
        try:
            if self._looking is None:
                self._looking = asyncio.get_running_loop().create_task(self._keep_looking())
                self._looking.add_done_callback(self._on_end)
            elif self._seen is not None:
                yield self._piece(self._seen, trusted)
            looking = self._looking
            while self._looking is looking:
                await self._new.wait()
                if self._seen is not None:
                    yield self._piece(self._seen, trusted)
        finally:
            self._watchers -= 1
            if not self._watchers and self._looking is not None:
                self._looking.cancel()
                self._looking, self._seen = None, None

    def _piece(self, seen: dict[str, Any], trusted: bool) -> bytes:
        """Encoded once for all who see the same."""
        if trusted not in self._shown:
            document = seen if trusted else self._for_all(seen)
            self._shown[trusted] = b"event: status\ndata: %b\n\n" % msgspec.json.encode(document)
        return self._shown[trusted]

    def _on_end(self, looking: asyncio.Task[None]) -> None:
        """If it broke, who watches is let go, and comes back to another look: else a page would show what was for ever."""
        if looking.cancelled() or (error := looking.exception()) is None:
            return
        context = {"message": "the status can't be told", "exception": error}
        looking.get_loop().call_exception_handler(context)
        if self._looking is looking:
            self._looking, self._seen = None, None
            self._new.set()
            self._new = asyncio.Event()

    async def _keep_looking(self) -> None:
        while True:
            happened = self._happened()
            self._seen = await self._look()
            self._shown.clear()
            self._new.set()
            self._new = asyncio.Event()
            await asyncio.sleep(SOON_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S - SOON_S):
                    await happened.wait()

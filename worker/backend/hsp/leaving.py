"""Sessions on their way out of the broker: before one is gone, nobody may use its name again, or lose what is new in it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

Name = tuple[Any, ...]
"""Of a session: its broker, and the client id there."""


class Leaving:
    """Of one process."""

    def __init__(self) -> None:
        self._going: dict[Name, asyncio.Task[None]] = {}

    def begin(self, name: Name, ending: Coroutine[Any, Any, None]) -> None:
        """Have a session end beside, after what is under way with it."""
        before = self._going.get(name)

        async def end() -> None:
            if before is not None:
                await asyncio.wait({before})
            await ending

        going = self._going[name] = asyncio.create_task(end())
        going.add_done_callback(lambda _: self._ended(name, going))

    def _ended(self, name: Name, going: asyncio.Task[None]) -> None:
        if self._going.get(name) is going:
            del self._going[name]

    async def gone(self, name: Name) -> None:
        """Wait until it may be used."""
        while (going := self._going.get(name)) is not None:
            await asyncio.wait({going})

    async def all_gone(self) -> None:
        """Wait until all have ended."""
        while self._going:
            await asyncio.wait(set(self._going.values()))

"""Listening to a client whose request waits, without keeping from the application what the client says.

That a client has left is told by an ASGI message (``http.disconnect``, ``websocket.disconnect``), and messages come
through one `receive`, the parts of a body before it. So whoever waits for the one reads the others too, and has to say them
again. The call of `receive` that is open when the waiting ends is not cancelled, since what it has taken from the
server could get lost on its way through a middleware: the application awaits the same call.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Message, Receive

BUFFER_BYTES = 64 * 1024
"""Once this much has been said nobody listens until the waiting is over; the client is slowed down by the server."""
_MESSAGE_BYTES = 128
"""What a message counts for beside its content: many small ones take room, too, and a `receive` that never waits,
as in some tests of applications, would be listened to for ever."""


class Replay:
    """Is itself a `receive`: first what was heard meanwhile, then what comes."""

    def __init__(self, receive: Receive, left: Callable[[], None]) -> None:
        """Begin to listen (needs a running loop); `left` is called if the client leaves."""
        self._receive = receive
        self._left = left
        self._heard: deque[Message] = deque()
        self._listening = True
        self._task: asyncio.Task[None] | None = asyncio.get_running_loop().create_task(self._listen())
        self._task.add_done_callback(_look)

    def stop(self) -> None:
        """Listen no longer: the waiting is over."""
        self._listening = False

    def close(self) -> None:
        """Drop everything: the application has ended, and nobody reads any more."""
        if self._task is not None:
            self._task.cancel()

    async def __call__(self) -> Message:
        """The next message; raises what the original `receive` raises, where it does."""
        if not self._heard and self._task is not None and not self._task.done():
            await asyncio.wait({self._task})
        if self._heard:
            return self._heard.popleft()
        task, self._task = self._task, None
        if task is not None:
            task.result()
        return await self._receive()

    async def _listen(self) -> None:
        size = 0
        while self._listening and size < BUFFER_BYTES:
            message = await self._receive()
            self._heard.append(message)
            if message["type"].endswith(".disconnect"):
                self._left()
                return
            content = message.get("body") or message.get("bytes") or message.get("text") or b""
            size += _MESSAGE_BYTES + len(content)


def _look(task: asyncio.Task[None]) -> None:
    """An error counts as seen even if the application never reads as far."""
    if not task.cancelled():
        task.exception()

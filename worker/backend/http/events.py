"""Server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from starlette.responses import StreamingResponse


def event(name: str | None, value: Any) -> bytes:
    """One event with `value` as JSON."""
    data = msgspec.json.encode(value)
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + data + b"\n\n"


class Events(StreamingResponse):
    """An answer that is a stream of events; `close` is called when it has ended, or the client has left."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        super().__init__(pieces, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._pieces, self._close = pieces, close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        try:
            async with contextlib.aclosing(self._pieces):
                await super().__call__(scope, receive, send)
        finally:
            self._close()

"""The smallest application: plain ASGI."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

GREETING = "hello"

Message = MutableMapping[str, Any]


async def app(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    """Greet, and say which process it was."""
    if scope["type"] != "http":
        raise NotImplementedError(
            scope["type"]
        )  # neither lifespan nor WebSockets: the server goes on without
    body = f"{GREETING} from process {os.getpid()}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})

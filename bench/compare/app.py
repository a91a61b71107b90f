"""The application that all servers serve: that of the bench, with WebSockets, and with ways to be broken.

The file that is deployed is written by `bench.compare.code`: it says which version this is and how it starts. What is
broken outside of the code (a broker that is down) is a file by the name of ``BROKER_DOWN``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bench import app as measured

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
BROKER_DOWN = "broker-down"


def make(version: int, *, start_s: float, fails: bool = False, hangs: bool = False) -> Any:
    """An application of this version: its start takes `start_s` seconds, or fails, or never ends."""
    measured.START_S = start_s
    who = [(b"x-version", str(version).encode()), (b"x-pid", str(os.getpid()).encode())]
    measured.WHO[:] = who
    measured.PONG_HEADERS[2:] = who

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await echo(receive, send, version)
        elif scope["type"] == "lifespan" and (fails or hangs or os.path.exists(BROKER_DOWN)):
            await receive()
            if hangs:
                await asyncio.sleep(3600)
            # as frameworks do: what is only raised here is taken for an application without lifespan
            why = "the new version can't start" if fails else "the broker is down"
            await send({"type": "lifespan.startup.failed", "message": why})
            raise RuntimeError(why)
        else:
            await measured.app(scope, receive, send)

    return app


async def echo(receive: Receive, send: Send, version: int) -> None:
    """Send back what comes, behind the version."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": f"{version} {message.get('text')}"})

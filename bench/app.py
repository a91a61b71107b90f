"""The application that is measured: plain ASGI, so that what is seen is the server.

It takes a second to start, half of it CPU, like an application with imports and a model to load;
``BENCH_START_S`` says otherwise. Where ``BENCH_STARTED_DIR`` names a directory, each process writes into it, under
its pid, when its start-up was complete (seconds of the monotonic clock).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import urllib.parse
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

START_S = float(os.environ.get("BENCH_START_S", "1"))
STARTED_DIR = os.environ.get("BENCH_STARTED_DIR")

WHO = [(b"x-version", os.environ.get("BENCH_VERSION", "1").encode()), (b"x-pid", str(os.getpid()).encode())]
PONG = b"pong"
PONG_HEADERS = [(b"content-type", b"text/plain"), (b"content-length", b"4"), *WHO]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer ``/ping``, ``/work?ms=``, ``/echo`` and ``/sse?n=&ms=``."""
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    if scope["type"] != "http":
        raise ValueError(f"this application speaks HTTP only, not {scope['type']}")
    path = scope["path"]
    if path == "/ping":
        await send({"type": "http.response.start", "status": 200, "headers": PONG_HEADERS})
        await send({"type": "http.response.body", "body": PONG})
    elif path == "/work":
        await asyncio.sleep(number(scope, "ms", 5) / 1000)
        await answer(send, b"worked")
    elif path == "/echo":
        body = await read(receive)
        await answer(send, body, extra=[(b"x-sha", hashlib.sha256(body).hexdigest().encode())])
    elif path == "/sse":
        await stream(
            receive, send, count=int(number(scope, "n", 20)), pause_s=number(scope, "ms", 100) / 1000
        )
    else:
        await answer(send, b"there is nothing here", status=404)


async def answer(
    send: Send, body: bytes, status: int = 200, extra: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Send one whole response."""
    headers = [(b"content-length", str(len(body)).encode()), *WHO, *(extra or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read(receive: Receive) -> bytes:
    """The request's body."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


async def stream(receive: Receive, send: Send, count: int, pause_s: float) -> None:
    """Send `count` events, one every `pause_s` seconds, and a last one by which a client knows that none is missing."""
    await read(receive)
    gone = asyncio.ensure_future(receive())
    headers = [(b"content-type", b"text/event-stream"), *WHO]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for event in range(count):
        if gone.done():
            return
        await send({"type": "http.response.body", "body": b"data: %d\n\n" % event, "more_body": True})
        await asyncio.sleep(pause_s)
    gone.cancel()
    await send({"type": "http.response.body", "body": b"data: done\n\n"})


def number(scope: Scope, name: str, default: float) -> float:
    """A number from the query string."""
    query = urllib.parse.parse_qs(scope["query_string"].decode("ascii"))
    return float(query[name][0]) if name in query else default


async def lifespan(receive: Receive, send: Send) -> None:
    """Start up and shut down."""
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            burn(START_S / 2)
            await asyncio.sleep(START_S / 2)
            if STARTED_DIR:
                tell_started(STARTED_DIR)
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await send({"type": "lifespan.shutdown.complete"})
            return


def burn(cpu_s: float) -> None:
    """Compute for `cpu_s` seconds of CPU time."""
    end = time.process_time() + cpu_s
    while time.process_time() < end:
        hashlib.sha256(b"0" * 4096).digest()


def tell_started(directory: str) -> None:
    """Write down when this process had started, in one step."""
    path = os.path.join(directory, str(os.getpid()))
    with open(path + ".new", "w") as file:
        file.write(repr(time.monotonic()))
    os.replace(path + ".new", path)

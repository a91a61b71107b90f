"""The application of `bench.services`: a service with a stream that leases it."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec

import segue

services = segue.Services()


class Settings(msgspec.Struct):
    tag: str = "0"


class Model:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.closed = False

    async def close(self) -> None:
        self.closed = True


model = services.declare("model", Model, settings=Settings)


async def serve(scope: Any, receive: Any, send: Any) -> None:
    """Answer ``/ping`` and ``/stream?n=&ms=``: lines with the instance's tag, and ``gone`` after it was closed."""
    if scope["type"] != "http":
        return
    headers = [(b"x-pid", str(os.getpid()).encode())]
    if scope["path"] == "/ping":
        headers.append((b"content-length", b"4"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"pong"})
        return
    query = dict(pair.split(b"=") for pair in scope["query_string"].split(b"&"))
    with model.lease() as leased:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(int(query[b"n"])):
            said = b"gone\n" if leased.closed else f"{leased.settings.tag}\n".encode()
            await send({"type": "http.response.body", "body": said, "more_body": True})
            await asyncio.sleep(float(query[b"ms"]) / 1000)
        await send({"type": "http.response.body", "body": b"end\n"})


app = services.wrap(serve)

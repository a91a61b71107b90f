"""The application of `bench.hsp`: an agent that writes down each numbered fact that it is given, in order.

A line has its topic and number, which process was given it, and when (microseconds of a clock that all processes share).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import segue
from segue.worker.backend.hsp.connector import HSPConnector
from segue.worker.backend.hsp.envelope import FACT, Envelope
from segue.worker.backend.hsp.settings import HSPSettings

services = segue.Services()
_received = os.open(
    Path(__file__).parent / "received", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
)


def _write_down(message: Envelope) -> None:
    if "number" in message.payload:
        fact = message.payload["topic"], message.payload["number"]
        os.write(_received, b"%d %d %d %d\n" % (*fact, os.getpid(), time.monotonic_ns() // 1000))


def _make(settings: HSPSettings, previous: HSPConnector | None = None) -> HSPConnector:
    connector = HSPConnector(settings, previous)
    if previous is None:
        connector.on(FACT, _write_down)
    return connector


services.declare("hsp", _make, settings=HSPSettings, per="generation")


async def serve(scope: Any, receive: Any, send: Any) -> None:
    """Answer ``pong``."""
    if scope["type"] != "http":
        return
    headers = [(b"x-pid", str(os.getpid()).encode()), (b"content-length", b"4")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"pong"})


app = services.wrap(serve)

"""The application that is measured, which answers everything with 500 once it is told to, by a file with its pid."""

from __future__ import annotations

import importlib
import os
from typing import Any

_healthy = importlib.import_module("app")  # it lies beside this file where it is served
BAD = os.path.join(os.environ["BENCH_STARTED_DIR"], f"bad-{os.getpid()}")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """As `bench.app`, or 500."""
    if scope["type"] == "http" and os.path.exists(BAD):
        await _healthy.answer(send, b"", status=500)
    else:
        await _healthy.app(scope, receive, send)

"""Warming up: requests inside the process, before anyone else's, that must succeed."""

from __future__ import annotations

import asyncio
import logging
import urllib.parse
from typing import Any

import uvicorn

from segue.handoff.messages import ListenerInfo
from segue.worker.lifespan import StartFailed, describe

_log = logging.getLogger("uvicorn.error")
_SETTLE_S = 1.0
"""How long to wait, after an answer of 5xx, for the exception behind it."""


async def warm_up(
    config: uvicorn.Config,
    path: str,
    state: dict[str, Any],
    listener: ListenerInfo | None,
    tasks: set[asyncio.Task[None]],
) -> None:
    """Send ``GET path`` to the application and wait for its whole answer.

    What goes on after the answer (a background task) is put into `tasks`. Raises `StartFailed` on an exception, a
    status of 5xx, or when there is no answer.
    """
    statuses: list[int] = []
    answered = asyncio.Event()
    request: list[dict[str, Any]] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if request:
            return request.pop()
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        elif message["type"] == "http.response.body" and statuses and not message.get("more_body", False):
            answered.set()

    async def run() -> None:
        app: Any = config.loaded_app
        await app(_scope(config, path, state, listener), receive, send)

    task = asyncio.get_running_loop().create_task(run())
    waiter = asyncio.ensure_future(answered.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if statuses and statuses[0] >= 500 and not task.done():
            await asyncio.wait({task}, timeout=_SETTLE_S)
    except asyncio.CancelledError:
        task.cancel()
        raise
    finally:
        waiter.cancel()
    if not task.done():
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    raised = task.exception() if task.done() and not task.cancelled() else None
    status = f" answered {statuses[0]}" if statuses else ""
    if raised is not None:
        _log.error("Exception in ASGI application\n", exc_info=raised)
        raise StartFailed(f"warm-up of {path} failed:{status and status + ':'} {describe(raised)}")
    if statuses and statuses[0] >= 500:
        raise StartFailed(f"warm-up of {path} failed: it{status}")
    if not answered.is_set():
        raise StartFailed(f"warm-up of {path} failed: the application gave no answer")


def _scope(
    config: uvicorn.Config, path: str, state: dict[str, Any], listener: ListenerInfo | None
) -> dict[str, Any]:
    target = urllib.parse.urlsplit(path)
    host, server = "localhost", ("127.0.0.1", 0)
    if listener is not None and listener.family != "unix":
        name, _, port = listener.address.rpartition(":")
        host, server = listener.address, (name.strip("[]"), int(port))
    return {
        "type": "http",
        "asgi": {"version": config.asgi_version, "spec_version": "2.3"},
        "http_version": "1.1",
        "server": server,
        "client": ("127.0.0.1", 0),
        "scheme": "https" if config.is_ssl else "http",
        "method": "GET",
        "root_path": config.root_path,
        "path": config.root_path + urllib.parse.unquote(target.path),
        "raw_path": (config.root_path + target.path).encode(),
        "query_string": target.query.encode(),
        "headers": [(b"host", host.encode()), (b"user-agent", b"segue-warm-up"), (b"accept", b"*/*")],
        "state": state.copy(),
    }

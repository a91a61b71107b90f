"""The ASGI lifespan, with one rule that uvicorn's own doesn't have: a start-up that raises is a failed start.

With ``lifespan="auto"`` uvicorn takes any exception for "lifespan unsupported" and goes on to serve. Here that is
believed only of an application that raised without ever asking what the matter was: one that has received
``lifespan.startup`` supports the protocol, and what it raises then is the reason of a refused start.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import uvicorn

_log = logging.getLogger("uvicorn.error")
_SETTLE_S = 1.0
"""How long to wait, after a reported failure, for the exception behind it."""


class StartFailed(Exception):  # noqa: N818 - it is what happened, and reads so
    """A worker can't start; the message is one line for a person."""


def describe(error: BaseException) -> str:
    """An exception in one line, with the first of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Lifespan:
    """Start-up and shutdown of one application."""

    def __init__(self, config: uvicorn.Config) -> None:
        self._config = config
        self.state: dict[str, Any] = {}
        """Copied into the scope of every request."""
        self.started = False
        """Start-up has succeeded, shutdown is still due."""
        self._task: asyncio.Task[None] | None = None
        self._messages: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        self._asked = False
        self._start_reported = asyncio.Event()
        self._shutdown_reported = asyncio.Event()
        self._failure: str | None = None

    async def startup(self) -> None:
        """Run the application's start-up. Raises `StartFailed`."""
        if self._config.lifespan == "off":
            return
        _log.info("Waiting for application startup.")
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._messages.put_nowait({"type": "lifespan.startup"})
        reported = asyncio.ensure_future(self._start_reported.wait())
        try:
            await asyncio.wait({self._task, reported}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._end()
            raise
        finally:
            reported.cancel()
        if self._failure is not None:
            if not self._task.done():
                await asyncio.wait({self._task}, timeout=_SETTLE_S)
            raised = None if not self._task.done() or self._task.cancelled() else self._task.exception()
            await self._end()
            self._fail(describe(raised) if raised is not None else self._failure)
        if self._task.done() and not self._start_reported.is_set():
            raised = None if self._task.cancelled() else self._task.exception()
            if raised is not None and (self._asked or self._config.lifespan == "on"):
                _log.error("Exception in 'lifespan' protocol\n", exc_info=raised)
                self._fail(describe(raised))
            _log.info("ASGI 'lifespan' protocol appears unsupported.")
            return
        self.started = True
        self._task.add_done_callback(_log_late)
        _log.info("Application startup complete.")

    async def shutdown(self, timeout_s: float) -> bool:
        """Run the application's shutdown; False if it failed or took longer than `timeout_s`."""
        if not self.started or self._task is None:
            return True
        self.started = False
        if self._task.done():
            return self._task.cancelled() or self._task.exception() is None
        _log.info("Waiting for application shutdown.")
        self._messages.put_nowait({"type": "lifespan.shutdown"})
        reported = asyncio.ensure_future(self._shutdown_reported.wait())
        done, _ = await asyncio.wait(
            {self._task, reported}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        reported.cancel()
        if not done:
            _log.error("Application shutdown took longer than %g s and was cut", timeout_s)
        if self._failure is not None:
            _log.error("Application shutdown failed: %s", self._failure)
        await self._end()
        return bool(done) and self._failure is None

    async def _end(self) -> None:
        """Let the application's task come to its end, with force if it doesn't."""
        if self._task is None or self._task.done():
            return
        await asyncio.wait({self._task}, timeout=0.1)
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=_SETTLE_S)

    def _fail(self, reason: str) -> None:
        _log.error("Application startup failed. Exiting.")
        raise StartFailed(f"start-up of the application failed: {reason}")

    async def _run(self) -> None:
        scope = {
            "type": "lifespan",
            "asgi": {"version": self._config.asgi_version, "spec_version": "2.0"},
            "state": self.state,
        }
        app: Any = self._config.loaded_app
        await app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, str]:
        self._asked = True
        return await self._messages.get()

    async def _send(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "lifespan.startup.complete" if not self._start_reported.is_set():
                self._start_reported.set()
            case "lifespan.startup.failed" if not self._start_reported.is_set():
                self._failed(message)
                self._start_reported.set()
            case "lifespan.shutdown.complete" if self._start_reported.is_set():
                self._shutdown_reported.set()
            case "lifespan.shutdown.failed" if self._start_reported.is_set():
                self._failed(message)
                self._shutdown_reported.set()
            case kind:
                raise RuntimeError(f"Got invalid state transition on lifespan protocol: {kind}")

    def _failed(self, message: dict[str, Any]) -> None:
        text = str(message.get("message") or "")
        if text:
            _log.error(text)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        # frameworks send the whole traceback, whose last line is the exception
        self._failure = lines[-1] if lines else "it gave no reason"


def _log_late(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("Exception in 'lifespan' protocol\n", exc_info=error)

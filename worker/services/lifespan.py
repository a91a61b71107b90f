"""An ASGI application with services around its own lifespan, whether it has one or not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from segue.worker.lifespan import describe

_Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class Wrapped:
    """Runs `around` from before the application's start-up until after its shutdown; all else is handed through."""

    def __init__(self, around: AbstractAsyncContextManager[Any], app: _Asgi) -> None:
        self._around, self._app = around, app
        # uvicorn takes an object for ASGI 3 if its __call__ is a coroutine function; the one below isn't, so that a
        # request costs no coroutine more
        vars(self)["__call__"] = self._lifespan

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        """ASGI."""
        if scope["type"] != "lifespan":
            return self._app(scope, receive, send)
        return self._lifespan(scope, receive, send)

    async def _lifespan(self, scope: Any, receive: Any, send: Any) -> None:
        startup = await receive()
        try:
            await self._around.__aenter__()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": describe(error)})
            raise
        last: dict[str, Any] | None = None
        try:
            last = await self._inner(scope, startup, receive, send)
        finally:
            await self._around.__aexit__(None, None, None)
        await send(last)

    async def _inner(self, scope: Any, startup: Any, receive: Any, send: Any) -> dict[str, Any]:
        """Run the application's own lifespan; returns the last message, which is sent when all has been closed."""
        first = [startup]
        sent: list[dict[str, Any]] = []
        last: dict[str, Any] = {"type": "lifespan.shutdown.complete"}

        async def receive_() -> Any:
            return first.pop() if first else await receive()

        async def send_(message: dict[str, Any]) -> None:
            nonlocal last
            sent.append(message)
            if message["type"].startswith("lifespan.shutdown."):
                last = message
            else:
                await send(message)

        try:
            await self._app(scope, receive_, send_)
        except Exception:
            if not first or sent:
                raise  # it has asked for the start-up: it has a lifespan, and that has failed
        if not sent:  # it has none
            await send({"type": "lifespan.startup.complete"})
            await receive()
        return last

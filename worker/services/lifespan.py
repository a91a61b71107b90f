"""An ASGI application with services around its own lifespan, whether it has one or not."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from segue.worker.lifespan import describe

_log = logging.getLogger("segue.services")
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
        own = _Own(startup, receive, send)
        try:
            await own.run(self._app, scope)
        finally:
            await self._around.__aexit__(None, None, None)
            if own.last is not None:
                await send(own.last)


class _Over(BaseException):
    """Ends an application that asks for more after its last message: there won't be any."""


class _Own:
    """The application's own lifespan, if it has one.

    Its last message, that it is shut down or could not start, is kept back: the server ends the process on it.
    """

    def __init__(self, startup: Any, receive: Any, send: Any) -> None:
        self.last: dict[str, Any] | None = None
        self._first = [startup]
        self._started = False
        self._shutdown = False
        self._receive, self._send = receive, send

    async def run(self, app: _Asgi, scope: Any) -> None:
        """Returns, or raises what it raises, once the server wants the application shut down, or it can't start."""
        failure: Exception | None = None
        try:
            await app(scope, self._next, self._say)
        except _Over:
            pass
        except Exception as error:
            if self._started:
                # the server goes on to serve, and so the services go on
                _log.exception("event=lifespan-failed")
            elif self._asked or self.last is not None:
                # it has asked for the start-up: it has a lifespan, and that has failed
                self.last = self.last or {"type": "lifespan.startup.failed", "message": describe(error)}
                raise
            failure = error if self._started else None
        if self.last is not None:
            return
        if not self._started:  # it has none
            await self._say({"type": "lifespan.startup.complete"})
        while not self._shutdown:
            await self._next()
        self.last = {"type": "lifespan.shutdown.complete"}
        if failure is not None:
            self.last = {"type": "lifespan.shutdown.failed", "message": describe(failure)}

    @property
    def _asked(self) -> bool:
        return not self._first

    async def _next(self) -> Any:
        if self.last is not None:
            raise _Over
        if self._first:
            return self._first.pop()
        message = await self._receive()
        self._shutdown = self._shutdown or message["type"] == "lifespan.shutdown"
        return message

    async def _say(self, message: dict[str, Any]) -> None:
        if message["type"] == "lifespan.startup.complete":
            self._started = True
            await self._send(message)
        else:
            self.last = message

"""`segue.reject_if_draining`: how an application marks what an operator's drain refuses or holds.

One object with three uses, told apart by what it is called with:

- a FastAPI dependency: ``dependencies=[Depends(reject_if_draining)]``, of an application, a router or an endpoint;
- a decorator of a Starlette endpoint, a function or a method, for HTTP or a WebSocket;
- a wrapper of an ASGI application, ``app = reject_if_draining(app)`` or ``add_middleware(reject_if_draining)``: marks
  everything but GET, HEAD and OPTIONS, lifespan, health paths and the hot endpoints.

Called with a request it has to be a coroutine function, else it has to return what it made: no function can be both, and
frameworks look before they call. They look at ``thing.__call__``, which finds an attribute of the instance, while a
call looks at the class. So each of the two objects here has an ordinary ``__call__`` for calls and, in the instance,
a coroutine function that does the same, for looks. (`inspect.markcoroutinefunction` would say so in one line, from
Python 3.12 on; a `functools.partial` is looked through by some versions of FastAPI and uvicorn and not by others.)
The parameter is called ``request`` and is an `HTTPConnection`: FastAPI passes a WebSocket, too. Its signature is made
when somebody asks, so that importing this imports no framework.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, ParamSpec, overload

import msgspec

from segue.handoff.http import PROBLEM, problem
from segue.handoff.messages import HOT
from segue.worker.replay import Replay
from segue.worker.responses import mark_own

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection, Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.websockets import WebSocket

    from segue.worker.gate import Gate

P = ParamSpec("P")

RETRY_AFTER_S = 5
HEALTH_PATHS = frozenset({"/livez", "/readyz", "/healthz"})
HARMLESS = frozenset({"GET", "HEAD", "OPTIONS"})
CLIENT_LEFT = 499
"""Nobody reads it; what stands between here and the server gets an answer, and no error, to end the request with."""
TRY_AGAIN_LATER = 1013
"""The close code of a WebSocket where the server can't refuse a handshake with a status of its own."""

_PASSED = "segue.passed"
"""In the scope of a request that has waited: who is marked twice waits once."""
_USES = (
    "reject_if_draining takes an ASGI application or a Starlette endpoint, def endpoint(request); "
    "with FastAPI write Depends(reject_if_draining)"
)


class Refusal(msgspec.Struct, frozen=True):
    """Why a request doesn't go on, and the status that says so."""

    detail: str
    status: int = 503

    @property
    def body(self) -> bytes:
        """A problem document (RFC 9457); nothing for a client that has left."""
        return b"" if self.status == CLIENT_LEFT else problem(self.status, self.detail).body

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        return (
            {} if self.status == CLIENT_LEFT else {"retry-after": str(RETRY_AFTER_S), "content-type": PROBLEM}
        )


class RejectIfDraining:
    """Mark what is refused with 503, or waits, while an operator drains the service.

    ``Depends(reject_if_draining)`` in FastAPI, ``@reject_if_draining`` on a Starlette endpoint, or ``app =
    reject_if_draining(app)`` around any ASGI application, which then still answers GET, HEAD and OPTIONS.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        vars(self)["__call__"] = self._depend

    @property
    def __signature__(self) -> inspect.Signature:
        """What FastAPI fills in."""
        from starlette.requests import HTTPConnection

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter("request", kind, annotation=HTTPConnection)])

    @overload
    def __call__(self, request: HTTPConnection) -> Coroutine[Any, Any, None]: ...
    @overload
    def __call__(self, request: Callable[[Scope, Receive, Send], Awaitable[None]], /) -> ASGIApp: ...
    @overload
    def __call__(
        self, request: Callable[P, Awaitable[Response]], /
    ) -> Callable[P, Coroutine[Any, Any, Response]]: ...
    @overload
    def __call__(
        self, request: Callable[P, Awaitable[None]], /
    ) -> Callable[P, Coroutine[Any, Any, None]]: ...
    @overload
    def __call__(self, request: Callable[P, Response], /) -> Callable[P, Coroutine[Any, Any, Response]]: ...
    def __call__(self, request: Any) -> Any:
        """Mark an application or an endpoint; or, given a request, return when it may go on.

        Raises starlette's HTTPException for a request that may not; TypeError for what isn't one of the three.
        """
        if not callable(request):
            return self._depend(request)
        return self._endpoint(request) if _is_endpoint(request) else _Marked(request, self._gate)

    async def _depend(self, request: Any) -> None:
        if self._gate.open:
            return
        refusal = await self._wait(request)
        if refusal is not None:
            raise _exception(refusal, request.scope)

    def _endpoint(self, endpoint: Callable[..., Any]) -> Callable[..., Any]:
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import Request
        from starlette.responses import Response
        from starlette.websockets import WebSocket

        kinds = (Request, WebSocket)
        if inspect.isgeneratorfunction(endpoint) or inspect.isasyncgenfunction(endpoint):
            raise TypeError(f"{endpoint!r} is a generator: {_USES}")
        is_async = inspect.iscoroutinefunction(endpoint)

        @functools.wraps(endpoint)
        async def marked(*args: Any, **kwargs: Any) -> Any:
            # looked for even when nothing drains: a wrong use fails when it is tried, not on the day of a drain
            request = next((each for each in (*args, *kwargs.values()) if isinstance(each, kinds)), None)
            if request is None:
                raise TypeError(f"{endpoint!r} was called without a request: {_USES}")
            refusal = None if self._gate.open else await self._wait(request)
            if refusal is None:
                if is_async:
                    return await endpoint(*args, **kwargs)
                return await run_in_threadpool(endpoint, *args, **kwargs)
            if request.scope["type"] == "websocket":
                return await _refuse(refusal, request.scope, request._send)
            return Response(refusal.body, refusal.status, refusal.headers)

        return marked

    async def _wait(self, request: Request | WebSocket) -> Refusal | None:
        refusal, receive = await _ask(self._gate, request.scope, request._receive)
        # whoever reads the body later, an exception handler for instance, reads it from here
        request._receive = receive
        return refusal


class _Marked:
    """An ASGI application that is marked."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate
        vars(self)["__call__"] = self._call

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if self._gate.open:
            return self._app(scope, receive, send)
        return self._pass(scope, receive, send)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_free(scope):
            await self._app(scope, receive, send)
            return
        refusal, receive = await _ask(self._gate, scope, receive)
        try:
            if refusal is None:
                await self._app(scope, receive, send)
            else:
                await _refuse(refusal, scope, send)
        finally:
            if isinstance(receive, Replay):
                receive.close()

    def _is_free(self, scope: Scope) -> bool:
        if scope["type"] not in {"http", "websocket"} or scope.get("method") in HARMLESS:
            return True
        # as the client wrote it, and as the application sees it below its root path
        paths = {scope["path"], scope["path"].removeprefix(scope.get("root_path", ""))}
        if not paths.isdisjoint({*HEALTH_PATHS, self._gate.health_path}):
            return True
        return any(path == HOT or path.startswith(HOT + "/") for path in paths)


async def _ask(gate: Gate, scope: Scope, receive: Receive) -> tuple[Refusal | None, Receive]:
    """Return when it is known whether the request goes on, with the `receive` from which it reads then."""
    if _PASSED in scope:
        return None, receive
    place = gate.enter()
    if place.done():
        refusal = place.result()
        if refusal is not None:
            mark_own(scope)
        return refusal, receive
    replay = Replay(receive, functools.partial(gate.leave, place))
    try:
        refusal = await place
    except BaseException:  # cancelled
        gate.leave(place)
        replay.close()
        raise
    replay.stop()
    if refusal is None:
        scope[_PASSED] = True
    else:
        mark_own(scope)
    return refusal, replay


async def _refuse(refusal: Refusal, scope: Scope, send: Send) -> None:
    """Answer for the application."""
    headers = [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
    headers.append((b"content-length", str(len(refusal.body)).encode()))
    kind = "http.response"
    if scope["type"] == "websocket":
        if refusal.status == CLIENT_LEFT:
            return
        kind = "websocket.http.response"
        if not _can_refuse(scope):
            await send({"type": "websocket.close", "code": TRY_AGAIN_LATER, "reason": refusal.detail})
            return
    try:
        await send({"type": f"{kind}.start", "status": refusal.status, "headers": headers})
        await send({"type": f"{kind}.body", "body": refusal.body})
    except OSError:  # a server may say so if there is no client any more
        if refusal.status != CLIENT_LEFT:
            raise


def _can_refuse(scope: Scope) -> bool:
    """Whether a WebSocket handshake can be answered with a status."""
    return "websocket.http.response" in (scope.get("extensions") or {})


def _exception(refusal: Refusal, scope: Scope) -> Exception:
    """What a dependency raises: the application's own handler makes the answer."""
    from starlette.exceptions import HTTPException, WebSocketException

    if scope["type"] == "websocket" and not _can_refuse(scope):
        return WebSocketException(TRY_AGAIN_LATER, refusal.detail)
    # FastAPI's handler writes {"detail": …}, which is a problem document; starlette's writes the bare text
    makers = type(scope.get("app")).__mro__
    is_json = any(each.__module__.partition(".")[0] == "fastapi" for each in makers)
    detail = refusal.detail if is_json else refusal.body.decode()
    return HTTPException(refusal.status, detail, refusal.headers)


def _is_endpoint(marked: Callable[..., Any]) -> bool:
    """Whether it is an endpoint, not an ASGI application; raises TypeError if it can't be either."""
    function = marked
    while isinstance(function, functools.partial):
        function = function.func
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        return False
    names = list(inspect.signature(marked).parameters)
    if names[:1] == ["self"]:
        del names[0]
    elif len(names) == 3 and not {"request", "websocket"} & set(names):
        return False
    if len(names) == 1 or {"request", "websocket"} & set(names):
        return True
    raise TypeError(f"{marked!r} can't be marked: {_USES}")

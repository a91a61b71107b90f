"""An endpoint as data: what it takes and answers, from which both the route and its documentation are made."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from segue.worker.backend.errors import ToldError
from segue.worker.gate import reject_if_draining

MAX_BODY_BYTES = 4 * 1024 * 1024
_T = TypeVar("_T")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """One method of one path."""

    method: str
    path: str
    handler: Handler
    summary: str
    takes: type | None = None
    """The type of the JSON body."""
    answers: type | None = None
    """The type of the JSON answer."""
    status: int = 200
    """Of that answer."""
    query: type | None = None
    """The type of the query parameters."""
    makes_work: bool = False
    """Rejected or held while an operator drains the service."""
    streams: bool = False
    """May answer with server-sent events instead."""
    errors: Callable[[ToldError], Response] | None = None
    """How an error is answered, if not as a problem document."""

    def route(self) -> Route:
        """For Starlette."""
        handler = self.handler
        told = self.errors or problem_response

        async def endpoint(request: Request) -> Response:
            try:
                if self.makes_work:
                    _refuse_other_sites(request)
                return await handler(request)
            except ToldError as error:
                return told(error)
            except ClientDisconnect:
                return Response(status_code=499)

        endpoint.__name__ = self.name
        marked: Any = reject_if_draining(endpoint) if self.makes_work else endpoint
        return Route(self.path, marked, methods=[self.method], name=self.name)

    @property
    def name(self) -> str:
        """Unique: ``post_api_v1_chat``."""
        words = self.path.replace("{", "").replace("}", "").replace(":path", "")
        return (
            self.method.lower() + "_" + words.strip("/").replace("/", "_").replace(".", "_").replace("-", "_")
        )


def _refuse_other_sites(request: Request) -> None:
    """Browsers send requests for any page that is open in them, and say so: a service on loopback isn't open to all pages."""
    if request.headers.get("sec-fetch-site") == "cross-site":
        raise ToldError(403, "requests from pages of other sites aren't answered")


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns, for a request whose body has been read.

    If the client leaves first, `work` is cancelled; raises `ClientDisconnect` then.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def body(request: Request, kind: type[_T]) -> _T:
    """The JSON body as `kind`. Raises `ToldError` (400, 413)."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MAX_BODY_BYTES:
            raise ToldError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
    try:
        return msgspec.json.decode(bytes(data) or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise ToldError(400, f"the body isn't what this takes: {error}") from error


def query(request: Request, kind: type[_T]) -> _T:
    """The query parameters as `kind`. Raises `ToldError` (400)."""
    try:
        return msgspec.convert(dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        raise ToldError(400, f"the query isn't what this takes: {error}") from error


def answer(value: Any, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def problem_response(error: ToldError) -> Response:
    """A problem document (RFC 9457)."""
    document = {"type": "about:blank", "title": error.title, "status": error.status, "detail": str(error)}
    return Response(
        msgspec.json.encode(document | error.members), error.status, media_type="application/problem+json"
    )

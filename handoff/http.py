"""HTTP with JSON between processes: what is asked, what is answered, and who answers.

It is spoken on control sockets, by master and worker alike (`segue.handoff.http_server`, `segue.handoff.http_client`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec

JSON = "application/json"
PROBLEM = "application/problem+json"


class Request(msgspec.Struct, frozen=True):
    """One request, read whole."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    peer_uid: int | None
    """User at the other end of a Unix socket (SO_PEERCRED, unix(7)); None over TCP."""
    peer_pid: int | None
    peer_groups: frozenset[int] = frozenset()
    """Groups of that user (SO_PEERGROUPS), its own included."""
    trusted: bool = True
    """False for who may only read what is open to all."""


class Response(msgspec.Struct, frozen=True):
    """One answer."""

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()
    stream: AsyncIterator[bytes] | None = None
    """Instead of `body`: what is sent piece by piece, until it ends or the caller leaves."""

    def json(self) -> Any:
        """The body decoded; raises `msgspec.DecodeError` when it isn't JSON."""
        return msgspec.json.decode(self.body)


Handler = Callable[[Request], Awaitable[Response]]


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with `value` as JSON."""
    return Response(status, msgspec.json.encode(value) + b"\n", JSON, tuple((headers or {}).items()))


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> Response:
    """Answer with a problem document (RFC 9457); `members` are its extension members."""
    document = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    body = msgspec.json.encode(document | members) + b"\n"
    return Response(status, body, PROBLEM, tuple((headers or {}).items()))


class Router:
    """Finds the handler of a request. A path that ends in ``/*`` takes one more segment, found in ``query["*"]``."""

    def __init__(self, routes: Mapping[tuple[str, str], Handler]) -> None:
        self._routes = dict(routes)
        self._paths = sorted({path for _, path in routes})

    async def __call__(self, request: Request) -> Response:
        """Answer `request`: 404 and 405 name what there is."""
        path, extra = request.path, {}
        if not any(known == path for known in self._paths):
            parent, _, last = path.rpartition("/")
            if last and f"{parent}/*" in self._paths:
                path, extra = f"{parent}/*", {"*": last}
        if path not in self._paths:
            return problem(404, f"there is no {request.path} here", known=self._paths)
        handler = self._routes.get((request.method, path))
        if handler is None and request.method == "HEAD":
            handler = self._routes.get(("GET", path))
        if handler is None:
            allowed = sorted(method for method, known in self._routes if known == path)
            return problem(405, f"{request.path} takes {', '.join(allowed)}", {"Allow": ", ".join(allowed)})
        if extra:
            request = msgspec.structs.replace(request, query=request.query | extra)
        return await handler(request)

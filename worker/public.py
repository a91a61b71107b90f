"""What segue itself answers on the public listener, if the operator wants any of it.

One wrapper around the application with one comparison per request; without `health_path` and token there is none.
"""

from __future__ import annotations

import hashlib
import hmac
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

from segue.handoff.http import Response, json_response, problem
from segue.handoff.http_client import CallError, call
from segue.handoff.messages import HOT
from segue.worker.responses import mark_own

_MAX_BODY_BYTES = 64 * 1024
_DEFAULT_WAIT_S = 300.0
_ASKED_BY = {"X-Segue-Asked-By": "public listener"}
_EXTRA_S = 10.0
"""How much longer than ``?wait=`` the answer may take."""

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]


def wrap(
    app: Application,
    root_path: str,
    health_path: str | None,
    token: str | None,
    master_socket: str,
    unhealthy: Callable[[], str | None],
) -> Application:
    """Answer `health_path` (503 with what `unhealthy` returns) and, with `token`, the hot endpoints before `app`."""
    if health_path is None and token is None:
        return app
    health = None if health_path is None else root_path + health_path
    hot = root_path + HOT
    prefixes = tuple(prefix for prefix, wanted in ((health, health_path), (hot, token)) if prefix and wanted)
    digest = b"" if token is None else token_digest(token)

    async def own(scope: Any, receive: Receive, send: Send) -> None:
        mark_own(scope)
        path: str = scope["path"]
        if path == health:
            reason = unhealthy()
            status = {"status": "ok"} if reason is None else {"status": "unavailable", "reason": reason}
            await answer(send, json_response(status, 200 if reason is None else 503))
        else:
            refusal = await drained_body(receive) or from_a_page(scope) or unauthorized(scope, digest)
            inner = path[len(root_path) :]
            await answer(send, refusal or await pass_on(scope, inner, master_socket))

    def ours(path: str) -> bool:
        return path == health or (token is not None and (path == hot or path.startswith(hot + "/")))

    def wrapped(scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        # not a coroutine function: what is not ours costs no coroutine of its own
        path = scope.get("path", "")
        if path.startswith(prefixes) and ours(path) and scope["type"] == "http":
            return own(scope, receive, send)
        return app(scope, receive, send)

    return wrapped


async def drained_body(receive: Receive) -> Response | None:
    """Read a request's body, which no endpoint needs; a refusal if it is too long."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
        if size > _MAX_BODY_BYTES:
            return problem(413, f"a body over {_MAX_BODY_BYTES} bytes")
    return None


def from_a_page(scope: Any) -> Response | None:
    """A refusal of what a page has made a browser send: the dashboard isn't served here."""
    if any(name == b"origin" for name, _ in scope["headers"]):
        return problem(403, "requests of web pages are refused here (they have an Origin)")
    return None


def unauthorized(scope: Any, digest: bytes) -> Response | None:
    """A refusal unless the request bears the token of which `digest` is `token_digest`."""
    authorization = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token_digest(given.strip()), digest):
        return problem(401, "this needs the bearer token", {"WWW-Authenticate": "Bearer"})
    return None


async def pass_on(scope: Any, path: str, master_socket: str) -> Response:
    """Let the master answer the request, whose path on its control socket is `path`."""
    method: str = scope["method"]
    readable = path == f"{HOT}/status" or path.startswith(f"{HOT}/operations/")
    if method != "POST" and not (method == "GET" and readable):
        return problem(
            405, f"{method} {path} isn't passed on: GET takes status and operations/ID, the rest is POST"
        )
    query = scope["query_string"].decode("latin-1")
    scope["query_string"] = (
        b""  # settings of services may be secret, and the access log comes after the answer
    )
    try:
        wait_s = float(dict(urllib.parse.parse_qsl(query)).get("wait", _DEFAULT_WAIT_S))
    except ValueError:
        return problem(400, "wait takes seconds")
    target = urllib.parse.quote(path) + (f"?{query}" if query else "")
    try:
        timeout_s = max(0.0, wait_s) + _EXTRA_S
        return await call(master_socket, method, target, timeout_s=timeout_s, headers=_ASKED_BY)
    except CallError as error:
        return problem(503, f"the master doesn't answer: {error}")


async def answer(send: Send, response: Response) -> None:
    """Send a whole response."""
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in response.headers
        if name.lower() not in {"connection", "content-length", "content-type", "transfer-encoding"}
    ]
    headers += [
        (b"content-type", response.content_type.encode("latin-1")),
        (b"content-length", str(len(response.body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


def token_digest(text: str) -> bytes:
    """What is compared instead of a token: of one length, whatever the token's."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()

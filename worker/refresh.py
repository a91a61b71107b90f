"""In development mode open pages reload themselves: a page that is sent gets a line that follows the generation.

The line, a script after the end of the page, opens a stream that says which generation it is connected to. The worker ends
the stream when it drains; the browser connects again by itself, to the next generation, and the page reloads. What is no
page of this application's own (compressed, a part, an answer to HEAD, without a body) is passed on as it is. A page whose
content security policy forbids scripts of its own origin is not reloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from segue.worker.events import draining
from segue.worker.responses import mark_own

SCRIPT, STREAM = "/.segue/refresh.js", "/.segue/refresh"
_RECONNECT_MS = 100
_JAVASCRIPT = b"""(() => {
  const script = document.currentScript, key = "segue-refresh";
  const source = new EventSource(script.src.replace(/[.]js$/, ""));
  source.onmessage = (event) => {
    const now = event.data + " " + location.href;
    if (event.data === script.dataset.generation || sessionStorage.getItem(key) === now) return;
    sessionStorage.setItem(key, now); // once only, should the browser have the old page from a cache
    source.close();
    location.reload();
  };
  addEventListener("pagehide", () => source.close());
})();
"""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Receive, Send], Awaitable[None]]


def wrap(app: Application, root_path: str, generation: int) -> Application:
    """Let the pages of `app` follow on `generation`."""
    script, stream = root_path + SCRIPT, root_path + STREAM
    line = f'\n<script src="{script}" data-generation="{generation}" defer></script>\n'.encode()

    async def wrapped(scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
        elif scope["path"] == script:
            mark_own(scope)
            await _answer(send, b"text/javascript", _JAVASCRIPT)
        elif scope["path"] == stream:
            mark_own(scope)
            await _stream(receive, send, generation)
        elif scope["method"] == "HEAD":
            await app(scope, receive, send)
        else:
            await app(scope, receive, _Page(send, line))

    return wrapped


class _Page:
    """Passes a response on, with one line more if it is a page."""

    def __init__(self, send: Send, line: bytes) -> None:
        self._send, self._line = send, line
        self._is_page = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_page = _is_page(message)
            if self._is_page:
                headers = [
                    (name, str(int(value) + len(self._line)).encode())
                    if name.lower() == b"content-length"
                    else (name, value)
                    for name, value in message.get("headers", ())
                ]
                message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and self._is_page and not message.get("more_body"):
            message = {**message, "body": message.get("body", b"") + self._line}
        await self._send(message)


def _is_page(start: Message) -> bool:
    headers = {name.lower(): value for name, value in start.get("headers", ())}
    return (
        headers.get(b"content-type", b"").lower().startswith(b"text/html")
        and headers.get(b"content-encoding", b"identity") == b"identity"
        and headers.get(b"content-length", b"0").isdigit()
        and start["status"] not in {204, 206, 304}
    )


async def _answer(send: Send, content_type: bytes, body: bytes) -> None:
    headers = [
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(receive: Receive, send: Send, generation: int) -> None:
    """Say which generation this is, and end when it drains or the page is gone."""
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    first = b"retry: %d\ndata: %d\n\n" % (_RECONNECT_MS, generation)
    await send({"type": "http.response.body", "body": first, "more_body": True})

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    waiting = {asyncio.ensure_future(gone()), asyncio.ensure_future(draining.wait())}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()
    await send({"type": "http.response.body", "body": b""})

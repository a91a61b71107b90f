"""A server that is compatible with OpenAI's API, in a process of its own, with faults on demand.

The path says how it behaves: ``/FAULT/v1/chat/completions`` (``/ok/v1`` for none); ``/FAULTxN/v1`` does so for the first N
requests only. What it was asked is at ``/seen``, and ``/wait?what=cancelled&count=1`` answers once so much has happened.
With ``/held/v1`` the n-th answer to a message that says "hold" stops in the middle until ``/release`` was asked for n times.

`python tests/openai_server.py FD` serves the listening socket that it inherits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

FOREVER_S = 600
PAUSES_S = {"paced": 0.03, "leisurely": 0.15}
"""Between two words."""


class OpenAIServer:
    """The running server, seen from a test."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port = port
        self.process = process

    def url(self, fault: str = "ok") -> str:
        """A base URL that behaves so."""
        return f"http://127.0.0.1:{self.port}/{fault}/v1"

    def seen(self) -> list[dict[str, Any]]:
        """The requests for completions, in order: path, body, authorization."""
        requests: list[dict[str, Any]] = self._get("/seen")["requests"]
        return requests

    def count(self, what: str) -> int:
        """How often something has happened: requests, finished, cancelled, models."""
        return int(self._get("/seen")["counts"].get(what, 0))

    def wait(self, what: str, count: int) -> None:
        """Until it has happened so often."""
        self._get(f"/wait?what={what}&count={count}")

    def release(self) -> None:
        """Let the next held answer go on."""
        self._get("/release")

    def _get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            found: dict[str, Any] = json.load(response)
            return found


@contextlib.contextmanager
def openai_server() -> Iterator[OpenAIServer]:
    """Run one."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        descriptor = listener.fileno()
        process = subprocess.Popen([sys.executable, __file__, str(descriptor)], pass_fds=[descriptor])
        port = listener.getsockname()[1]
    try:
        running = OpenAIServer(port, process)
        running.seen()  # from here on it takes no longer to answer than it says
        yield running
    finally:
        process.kill()
        process.wait()


def refused_url() -> str:
    """Where nobody listens."""
    from bench.ports import free_port  # which the server itself can't import

    return f"http://127.0.0.1:{free_port()}/v1"


# ------------------------------------------------------------------------------------------------------- the server


class _App:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.changed = asyncio.Condition()
        self.asked: Counter[str] = Counter()

    async def happened(self, what: str) -> None:
        async with self.changed:
            self.counts[what] += 1
            self.changed.notify_all()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        if path == "/seen":
            await _json(send, {"requests": self.requests, "counts": self.counts})
        elif path == "/release":
            await self.happened("released")
            await _json(send, {})
        elif path == "/wait":
            query = dict(pair.split("=") for pair in scope["query_string"].decode().split("&"))
            async with self.changed:
                await self.changed.wait_for(lambda: self.counts[query["what"]] >= int(query["count"]))
            await _json(send, {})
        else:
            fault, _, rest = path.lstrip("/").partition("/v1/")
            if rest == "models":
                await self.happened("models")
                await self.models(fault, send)
            else:
                headers = {key.decode(): value.decode() for key, value in scope["headers"]}
                await self.complete(fault, headers, json.loads(body), receive, send)

    async def models(self, fault: str, send: Any) -> None:
        if fault.startswith("500"):
            await _json(send, {"error": {"message": "broken"}}, 500)
        elif fault == "401":
            await _json(send, {"error": {"message": "wrong key"}}, 401)
        elif fault == "html":
            await _html(send)
        elif fault == "silent":
            await asyncio.sleep(FOREVER_S)
        else:
            await _json(send, {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "us"}]})

    async def complete(
        self, fault: str, headers: dict[str, str], body: dict[str, Any], receive: Any, send: Any
    ) -> None:
        await self.happened("requests")
        self.requests.append({"fault": fault, "body": body, "authorization": headers.get("authorization")})
        limited = re.fullmatch(r"(.+)x(\d+)", fault)
        if limited:
            self.asked[fault] += 1
            fault = limited[1] if self.asked[fault] <= int(limited[2]) else "ok"
        if fault == "indiscreet":
            await _json(send, {"error": {"message": f"bad credentials: {headers['authorization']}"}}, 401)
            return
        if fault.isdigit():
            extra = [(b"retry-after", b"0.01")] if fault == "429" else []
            await _json(send, {"error": {"message": f"told to say {fault}"}}, int(fault), extra)
            return
        if fault == "429later":
            await _json(send, {"error": {"message": "later"}}, 429, [(b"retry-after", b"3600")])
            return
        if fault == "html":
            await _html(send)
            return
        answering = asyncio.ensure_future(self.answer(fault, body, send))
        leaving = asyncio.ensure_future(_left(receive))
        done, _ = await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering not in done:
            answering.cancel()
            await self.happened("cancelled")
            return
        leaving.cancel()
        if answering.exception() is None:
            await self.happened("finished")
        else:
            raise ConnectionResetError("cut off on purpose")

    async def answer(self, fault: str, body: dict[str, Any], send: Any) -> None:
        if fault == "silent":  # not even a status
            await asyncio.sleep(FOREVER_S)
        event = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": event})
        await _piece(send, body, {"role": "assistant", "content": ""})
        if fault == "slow":  # a first token that never comes
            await asyncio.sleep(FOREVER_S)
        if fault == "garbage":
            await _bytes(send, b"data: {not json\n\n")
            return
        if fault == "shapes":
            await _bytes(send, b'data: {"choices": 7}\n\n')
            return
        if fault == "told":
            await _bytes(send, b'data: {"error": {"message": "out of memory"}}\n\n')
            return
        if fault == "nothing":
            await _bytes(send, b"")
            return
        if fault.startswith("empty") and (fault == "empty" or body.get("temperature") != 0.9):
            await _piece(send, body, {}, "stop")
            await _end(send)
            return
        if fault == "loop":
            await _piece(send, body, {"content": "I would be glad to help you with that, of course. " * 6})
            await _piece(send, body, {}, "stop")
            await _end(send)
            return
        if body.get("tools") and body["messages"][-1]["role"] == "user" and fault in {"tool", "tools"}:
            await self.call_tool(body, send)
            return
        if fault == "tools" and body.get("tools"):  # never enough of them
            await self.call_tool(body, send)
            return
        last = body["messages"][-1]
        count = re.search(r"count to (\d+)", last["content"] or "")
        words = (
            [f"{number} " for number in range(int(count[1]))] if count else ["You ", "said ", last["content"]]
        )
        for number, word in enumerate(words):
            if fault == "cut" and number == 2:
                raise ConnectionResetError
            if fault == "endless" and number == 2:
                await asyncio.sleep(FOREVER_S)
            if fault == "held" and number == len(words) // 2 and "hold" in last["content"]:
                await self.held()
            await _piece(send, body, {"content": word})
            await asyncio.sleep(next((s for name, s in PAUSES_S.items() if fault.startswith(name)), 0.002))
        if fault == "unfinished":
            await _bytes(send, b"")
            return
        await _piece(
            send, body, {}, "stop", {"prompt_tokens": 3, "completion_tokens": len(words), "total_tokens": 0}
        )
        await _end(send)

    async def held(self) -> None:
        await self.happened("held")
        number = self.counts["held"]
        async with self.changed:
            await self.changed.wait_for(lambda: self.counts["released"] >= number)

    async def call_tool(self, body: dict[str, Any], send: Any) -> None:
        name = body["tools"][0]["function"]["name"]
        first = {"index": 0, "id": "c1", "type": "function", "function": {"name": name, "arguments": ""}}
        await _piece(send, body, {"tool_calls": [first]})
        for part in ('{"expression":', ' "2*21"}'):
            await _piece(send, body, {"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
        await _piece(send, body, {}, "tool_calls")
        await _end(send)


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _piece(
    send: Any,
    body: dict[str, Any],
    delta: dict[str, Any],
    finish: str | None = None,
    usage: dict[str, int] | None = None,
) -> None:
    document = {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    if usage:
        document["usage"] = usage
    await _bytes(send, b"data: " + json.dumps(document).encode() + b"\n\n", more=True)


async def _end(send: Any) -> None:
    await _bytes(send, b"data: [DONE]\n\n")


async def _bytes(send: Any, data: bytes, more: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def _html(send: Any) -> None:
    html = [(b"content-type", b"text/html")]
    await send({"type": "http.response.start", "status": 200, "headers": html})
    await _bytes(send, b"<html>Welcome to nginx!</html>")


async def _json(
    send: Any, value: Any, status: int = 200, extra: list[tuple[bytes, bytes]] | None = None
) -> None:
    headers = [(b"content-type", b"application/json"), *(extra or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await _bytes(send, json.dumps(value).encode())


def main() -> None:
    import uvicorn

    config = uvicorn.Config(_App(), fd=int(sys.argv[1]), log_level="critical", lifespan="off", ws="none")
    uvicorn.Server(config).run()


if __name__ == "__main__":
    # the folder of this file has modules whose names mustn't be taken for others
    sys.path[:] = [
        path
        for path in sys.path
        if os.path.abspath(path or ".") != os.path.dirname(os.path.abspath(__file__))
    ]
    main()

"""The built-in backend: how fast it starts, and what becomes of answers and calls while its parts are swapped.

The model is asked over HTTP through the official client, as any provider is: a second instance of the backend, whose
offline responder answers, stands in for it.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.figures import Figure, Measured
from bench.servers import RELOAD_TIMEOUT_S, START_TIMEOUT_S, Bench, Segue, wait_for
from bench.servers import segue as instance

STREAMS = 50
CALLS = 100
PAUSE_S = 0.02
"""Between two tokens."""
_TOOL = """
import asyncio, time

def in_thread(number: int) -> dict:
    "Say which version of the file this is."
    time.sleep(0.002)
    return {{"number": number, "version": {0}}}

async def on_loop(number: int) -> dict:
    "Say which version of the file this is."
    await asyncio.sleep(0.002)
    return {{"number": number, "version": {0}}}
"""

FIGURES = [
    Figure("start", "a worker with nothing configured: reload asked → serving (slowest)", "ms", 1000, "<"),
    Figure("serve", "  segue serve, exec → first answer (median)", "ms"),
    Figure("broken", "100 swaps of llm under 50 token streams, 2 workers: streams broken", "", 0),
    Figure("refused", "  swaps refused", "", 0),
    Figure("streams", "  streams that ended whole", "", sense=">="),
    Figure("swap_ms", "  one swap in all workers under that load (median)", "ms", digits=1),
    Figure("failed", "50 reloads of tools under 100 concurrent calls, 2 workers: calls failed", "", 0),
    Figure("tools_refused", "  reloads refused", "", 0),
    Figure("calls", "  calls that were answered", "", sense=">="),
    Figure("tools_ms", "  one reload in all workers under that load (median)", "ms", digits=1),
]


def measure(bench: Bench) -> Measured:
    """One run."""
    starts, swaps, reloads = (2, 10, 5) if bench.quick else (10, 100, 50)
    bench.say("backend: starts")
    found = _starts(bench, starts)
    bench.say("backend: swaps of llm under token streams")
    streams = _under_streams(bench, swaps)
    bench.say("backend: reloads of tools under calls")
    calls = _under_calls(bench, reloads)
    bench.details.append({"backend": {"streams": streams.failures[:20], "calls": calls.failures[:20]}})
    return found | {
        "broken": len(streams.failures),
        "refused": streams.refused,
        "streams": streams.good,
        "swap_ms": statistics.median(streams.seconds) * 1000,
        "failed": len(calls.failures),
        "tools_refused": calls.refused,
        "calls": calls.good,
        "tools_ms": statistics.median(calls.seconds) * 1000,
    }


def _starts(bench: Bench, count: int) -> Measured:
    workers, serves = [], []
    for _ in range(3):
        with instance(bench, app=None) as server:
            serves.append(_first_answer(server) - server.launched)
            for _ in range(count):
                begun = time.monotonic()
                operation = server.reload()
                workers.append(time.monotonic() - begun)
                server.wait_drained(operation)
    return {"start": max(workers) * 1000, "serve": statistics.median(serves) * 1000}


def _first_answer(server: Segue) -> float:
    def answers() -> bool:
        try:
            asyncio.run(_once(server.port))
        except (OSError, asyncio.IncompleteReadError):
            return False
        return True

    return wait_for(answers, START_TIMEOUT_S, 0.005, lambda: f"no answer:\n{server.tail()}")


async def _once(port: int) -> None:
    async with _Connection(port) as connection:
        await connection.ask("GET", "/api/v1/about")


# ------------------------------------------------------------------------------------------------------------- load


@dataclass
class _Tally:
    """What became of the answers and of who asked for changes."""

    good: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class _Connection:
    """One that is kept: whoever closes it has broken what was going on."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> _Connection:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, method: str, path: str, document: Any = None) -> tuple[int, bytes]:
        """One request: status and body."""
        body = b"" if document is None else json.dumps(document).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        status = int(answer.split(" ", 2)[1])
        if "transfer-encoding: chunked" in answer:
            return status, b"".join([piece async for piece in self._pieces()])
        length = int(answer.partition("content-length: ")[2].partition("\r\n")[0])
        return status, await self._reader.readexactly(length)

    async def _pieces(self) -> AsyncIterator[bytes]:
        while size := int(await self._reader.readline(), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)


async def _load(
    port: int,
    clients: int,
    request: Callable[[int], tuple[str, Any]],
    is_good: Callable[[int, bytes], bool],
    changes: int,
    change: Callable[[int], Any],
) -> _Tally:
    """`clients` ask one thing after the other, each on its connection, until all changes have been made."""
    tally, ended = _Tally(), asyncio.Event()

    async def client(number: int) -> None:
        while not ended.is_set():
            try:
                async with _Connection(port) as connection:
                    while not ended.is_set():
                        path, document = request(number)
                        status, body = await connection.ask("POST", path, document)
                        if status == 200 and is_good(number, body):
                            tally.good += 1
                        else:
                            tally.failures.append(f"{status} {body[-500:]!r}")
            except (OSError, asyncio.IncompleteReadError) as error:
                tally.failures.append(f"{type(error).__name__}: {error}")

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    for number in range(changes):
        begun = time.perf_counter()
        try:
            await asyncio.to_thread(change, number)
        except Exception as error:
            tally.refused += 1
            tally.failures.append(str(error))
        else:
            tally.seconds.append(time.perf_counter() - begun)
    ended.set()
    await asyncio.gather(*tasks)
    return tally


def _under_streams(bench: Bench, swaps: int) -> _Tally:
    slow = {"SEGUE_SERVICES__LLM__OFFLINE_PAUSE_S": str(PAUSE_S)}
    asked = {"model": "offline", "stream": True, "messages": [{"role": "user", "content": "who are you?"}]}
    with instance(bench, app=None, environ=slow) as model:
        _first_answer(model)
        provider = {
            "SEGUE_SERVICES__LLM__BASE_URL": f"http://127.0.0.1:{model.port}/v1",
            "SEGUE_SERVICES__LLM__MODEL": "offline",
        }
        with instance(bench, app=None, workers=2, environ=provider) as server:
            _first_answer(server)
            expected = _said(asyncio.run(_post(server.port, "/v1/chat/completions", asked)))
            return asyncio.run(
                _load(
                    server.port,
                    STREAMS,
                    lambda _: ("/v1/chat/completions", asked),
                    lambda _, body: bool(expected) and _said(body) == expected,
                    swaps,
                    lambda _: server.ask("POST", "/reload/llm", RELOAD_TIMEOUT_S),
                )
            )


def _said(body: bytes) -> str:
    """The text of a stream of completions; empty unless it has come to its end."""
    events = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return ""
    choices = [choice for event in events[:-1] for choice in json.loads(event).get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def _post(port: int, path: str, document: Any) -> bytes:
    async with _Connection(port) as connection:
        return (await connection.ask("POST", path, document))[1]


def _under_calls(bench: Bench, reloads: int) -> _Tally:
    directory = Path(bench.directory, "tools")
    directory.mkdir(exist_ok=True)
    (directory / "versions.py").write_text(_TOOL.format(0))

    def request(number: int) -> tuple[str, Any]:
        return f"/api/v1/tools/{('in_thread', 'on_loop')[number % 2]}", {"arguments": {"number": number}}

    def is_good(number: int, body: bytes) -> bool:
        answer = json.loads(body)
        return bool(answer["ok"]) and json.loads(answer["text"])["number"] == number

    def change(number: int) -> None:
        (directory / "versions.py").write_text(_TOOL.format(number + 1))
        server.ask("POST", "/reload/tools", RELOAD_TIMEOUT_S)

    environ = {"SEGUE_SERVICES__TOOLS__DIRECTORY": str(directory)}
    with instance(bench, app=None, workers=2, environ=environ) as server:
        _first_answer(server)
        return asyncio.run(_load(server.port, CALLS, request, is_good, reloads, change))

"""Single workers, without a master: each test plays it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from worker_harness import Bench

APP = """
import asyncio, os, sys, threading
import segue
GATE = os.environ.get("GATE")

async def respond(send, body, status=200, headers=()):
    await send({"type": "http.response.start", "status": status,
                "headers": [(b"content-length", str(len(body)).encode()), (b"x-pid", str(os.getpid()).encode()), *headers]})
    await send({"type": "http.response.body", "body": body})

async def read(receive):
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message["body"]
        if not message["more_body"]:
            return body

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        print("application starts", flush=True)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print("application ends", flush=True)
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        return
    path = scope["path"]
    if path == "/early":
        await respond(send, b"early")
    elif path == "/wait":
        with open(scope["query_string"].decode()) as fifo:
            fifo.read()
        await respond(send, b"waited")
    elif path == "/slow":
        await asyncio.sleep(float(scope["query_string"]))
        await respond(send, b"slow")
    elif path == "/background":
        await respond(send, b"background")
        name = scope["query_string"].decode()
        while not os.path.exists(name):
            await asyncio.sleep(0.01)
        with open(name + ".done", "w") as file:
            file.write("done")
    elif path == "/boom":
        raise RuntimeError("boom")
    elif path == "/five":
        await respond(send, b"", 503)
    elif path == "/state":
        info = scope["state"]["segue"]
        text = f"{info.generation} {info.worker} {bool(info.draining)} {segue.draining.is_set()} {bool(segue.activated)}"
        await respond(send, text.encode())
    elif path == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not segue.draining:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"end"})
    else:
        body = await read(receive)
        if body is not None:
            await respond(send, f"{scope['method']} {path} ".encode() + body)
"""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path, APP) as bench:
        yield bench


def test_a_worker_accepts_nothing_until_it_is_activated_and_serves_then(bench: Bench) -> None:
    worker = bench.spawn().wait_ready()
    client = bench.client()
    client.send(b"GET /hello HTTP/1.1\r\nHost: test\r\n\r\n")
    assert worker.status().mode == "ready"
    assert worker.status().connections == 0
    assert worker.call("GET", "/readyz")[0] == 503
    worker.activate()
    answer = client.read()
    assert (answer.status, answer.text) == (200, "GET /hello ")
    assert worker.call("GET", "/readyz")[0] == 200
    assert client.ask("/state").text == "1 1 False False True"
    assert worker.stop() == 0

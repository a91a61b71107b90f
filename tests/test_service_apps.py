"""Services in applications as people write them, alone under uvicorn: FastAPI, Starlette, plain ASGI, and the router."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scenario import DEADLINE_S, ROOT, Output
from worker_harness import Bench, UnixConnection

import segue

TOKEN = "a-token-of-the-test"

SERVICES = """
import asyncio, os, threading
import msgspec
import segue

class Settings(msgspec.Struct):
    currency: str = "EUR"
    token: segue.Secret = segue.Secret("")

class Prices:
    def __init__(self, settings: Settings):
        self.settings = settings
        self.closed = False

    def start(self):
        print("start", self.settings.currency, flush=True)

    def health(self):
        if self.settings.currency == "XXX":
            raise ValueError("nobody takes XXX")

    def activate(self):
        print("activate", self.settings.currency, flush=True)

    def close(self):
        self.closed = True
        print("close", self.settings.currency, flush=True)

    def show(self):
        return self.settings.currency + (" of a closed list" if self.closed else "")

class Quotes:
    def __init__(self, prices: Prices):
        self.prices = prices

services = segue.Services()
prices = services.declare("prices", Prices, settings=Settings)
quotes = services.declare("quotes", Quotes, requires=[prices])
go = asyncio.Event()
go_thread = threading.Event()
"""

FASTAPI = (
    SERVICES
    + f"""
from typing import Annotated
from fastapi import Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse

app = FastAPI(lifespan=services.lifespan)
app.mount("/api/v1/hot", services.router(token="{TOKEN}"))
app.mount("/open", services.router(allow_unauthenticated=True))
Listed = Annotated[Prices, Depends(prices)]

@app.get("/")
async def index(listed: Listed, quoted: Annotated[Quotes, Depends(quotes)]):
    return [listed.show(), quoted.prices.show(), prices.version]

@app.get("/sync")
def sync(listed: Listed):
    print("in the thread", flush=True)
    go_thread.wait()
    return listed.show()

@app.get("/stream")
async def stream(listed: Listed):
    async def chunks():
        yield "begun " + listed.show() + "\\n"
        await go.wait()
        yield "ended " + listed.show() + "\\n"
    return StreamingResponse(chunks(), media_type="text/plain")

@app.websocket("/ws")
async def ws(socket: WebSocket, listed: Listed):
    await socket.accept()
    async for _ in socket.iter_text():
        await socket.send_text(listed.show())

@app.post("/go")
async def let_go():
    go.set()
    go_thread.set()

@app.post("/order", dependencies=[Depends(segue.reject_if_draining)])
async def order():
    return "ordered"
"""
)

STARLETTE = (
    SERVICES
    + """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route

async def index(request):
    with prices.lease() as listed:
        return PlainTextResponse(listed.show() + " " + services["quotes"].current.prices.show())

async def stream(request):
    async def chunks():
        with prices.lease() as listed:
            yield "begun " + listed.show() + "\\n"
            await go.wait()
            yield "ended " + listed.show() + "\\n"
    return StreamingResponse(chunks(), media_type="text/plain")

async def let_go(request):
    go.set()
    return PlainTextResponse("")

app = Starlette(
    lifespan=services.lifespan,
    routes=[
        Route("/", index),
        Route("/stream", stream),
        Route("/go", let_go, methods=["POST"]),
        Mount("/open", services.router(allow_unauthenticated=True)),
    ],
)
"""
)

ASGI = (
    SERVICES
    + """
hot = services.router(allow_unauthenticated=True)

async def answer(scope, receive, send):
    if scope["path"] in ("/status", "/reload/prices"):
        return await hot(scope, receive, send)
    body = prices.current.show().encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""
)

WITHOUT_LIFESPAN = {
    "raises": """
async def inner(scope, receive, send):
    assert scope["type"] == "http"
    await answer(scope, receive, send)
""",
    "returns": """
async def inner(scope, receive, send):
    if scope["type"] == "http":
        await answer(scope, receive, send)
""",
    "asks and returns": """
async def inner(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
    else:
        await answer(scope, receive, send)
""",
}

LIFESPAN = {
    "proper": """
async def inner(scope, receive, send):
    if scope["type"] != "lifespan":
        return await answer(scope, receive, send)
    await receive()
    print("app starts with", prices.current.show(), flush=True)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    print("app ends with", prices.current.show(), flush=True)
    await send({"type": "lifespan.shutdown.complete"})
""",
    "asks for more": """
async def inner(scope, receive, send):
    if scope["type"] != "lifespan":
        return await answer(scope, receive, send)
    while True:
        message = await receive()
        print("app", message["type"].removeprefix("lifespan.").replace("startup", "starts with EUR")
            .replace("shutdown", "ends with EUR"), flush=True)
        await send({"type": message["type"] + ".complete"})
""",
    "ends early": """
async def inner(scope, receive, send):
    if scope["type"] != "lifespan":
        return await answer(scope, receive, send)
    await receive()
    print("app starts with", prices.current.show(), flush=True)
    await send({"type": "lifespan.startup.complete"})
    print("app ends with", prices.current.show(), flush=True)
""",
    "breaks off": """
async def inner(scope, receive, send):
    if scope["type"] != "lifespan":
        return await answer(scope, receive, send)
    await receive()
    print("app starts with", prices.current.show(), flush=True)
    await send({"type": "lifespan.startup.complete"})
    print("app ends with", prices.current.show(), flush=True)
    raise RuntimeError("broken off")
""",
}

FAILING = {
    "says so": """
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no disk"})
""",
    "says so and asks for more": """
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no disk"})
    await receive()
""",
    "raises": """
    await receive()
    raise OSError("no disk")
""",
}

WRAP = "\napp = services.wrap(inner)\n"


class Server:
    """A plain uvicorn."""

    def __init__(self, process: subprocess.Popen[bytes], output: Output) -> None:
        self.process, self.output = process, output
        self.port = 0
        self._connections = contextlib.ExitStack()

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        self._connections.callback(connection.close)
        return connection

    def close(self) -> None:
        self._connections.close()
        self.process.kill()
        self.process.wait()
        self.output.join()

    def ask(self, method: str, target: str, token: str | None = None) -> tuple[int, Any]:
        connection = self.connect()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection.request(method, target, headers=headers)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        with contextlib.suppress(ValueError):
            return response.status, json.loads(body)
        return response.status, body.decode()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(DEADLINE_S)
        self.output.join()
        return status


@contextlib.contextmanager
def uvicorn(directory: Path, code: str, *arguments: str, **environ: str) -> Iterator[Server]:
    (directory / "shop.py").write_text(textwrap.dedent(code))
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "shop:app", "--port", "0", *arguments],
        cwd=directory,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
    )
    os.close(theirs)
    server = Server(process, Output(ours))
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def serving(directory: Path, code: str, *arguments: str, **environ: str) -> Iterator[Server]:
    with uvicorn(directory, code, *arguments, **environ) as server:
        line = server.output.wait_for(r"running on http://127\.0\.0\.1:\d+")[0]
        server.port = int(line.rpartition(":")[2])
        yield server


# ------------------------------------------------------------------------------------------------------ FastAPI


def test_fastapi_gives_the_current_instance_and_a_stream_keeps_its_own_to_its_end(tmp_path: Path) -> None:
    with serving(tmp_path, FASTAPI) as server:
        assert server.ask("GET", "/") == (200, ["EUR", "EUR", 1])
        stream = server.connect()
        stream.request("GET", "/stream")
        response = stream.getresponse()
        assert response.readline() == b"begun EUR\n"
        in_thread: list[tuple[int, Any]] = []
        thread = threading.Thread(target=lambda: in_thread.append(server.ask("GET", "/sync")))
        thread.start()
        server.output.wait_for("in the thread")

        status, report = server.ask("POST", "/api/v1/hot/reload/prices?currency=USD", TOKEN)
        assert status == 200, report
        assert (report["version"], report["rewired"], report["leases_out"]) == (2, ["quotes"], 2)
        assert server.ask("GET", "/") == (200, ["USD", "USD", 2])
        status, report = server.ask("GET", "/api/v1/hot/status", TOKEN)
        service = report["services"]["prices"]
        assert (service["version"], service["leases"]) == (2, 0)
        assert [(each["version"], each["leases"]) for each in service["retiring"]] == [(1, 2)]
        assert "close EUR" not in server.output.text

        server.ask("POST", "/go")
        assert response.read() == b"ended EUR\n"
        thread.join(DEADLINE_S)
        assert in_thread == [(200, "EUR")]
        server.output.wait_for("close EUR")
        server.stop()
        assert server.output.text.index("close EUR") < server.output.text.index("close USD")


def test_fastapi_gives_a_web_socket_its_instance_for_as_long_as_it_lasts(tmp_path: Path) -> None:
    import websockets.sync.client

    with serving(tmp_path, FASTAPI) as server:
        with websockets.sync.client.connect(f"ws://127.0.0.1:{server.port}/ws") as socket:
            socket.send("?")
            assert socket.recv() == "EUR"
            status, report = server.ask("POST", "/open/reload/prices?currency=USD")
            assert (status, report["leases_out"]) == (200, 1)
            socket.send("?")
            assert socket.recv() == "EUR"
        server.output.wait_for("close EUR")


def test_a_client_that_leaves_its_stream_gives_the_lease_back(tmp_path: Path) -> None:
    with serving(tmp_path, FASTAPI) as server:
        stream = server.connect()
        stream.request("GET", "/stream")
        response = stream.getresponse()
        assert response.readline() == b"begun EUR\n"
        status, report = server.ask("POST", "/open/reload/prices?currency=USD")
        assert (status, report["leases_out"]) == (200, 1)
        response.close()
        stream.close()
        server.output.wait_for("close EUR")


# --------------------------------------------------------------------------------------- Starlette and plain ASGI


def test_starlette(tmp_path: Path) -> None:
    with serving(tmp_path, STARLETTE) as server:
        assert server.ask("GET", "/") == (200, "EUR EUR")
        stream = server.connect()
        stream.request("GET", "/stream")
        response = stream.getresponse()
        assert response.readline() == b"begun EUR\n"
        assert server.ask("POST", "/open/reload/prices?currency=USD")[0] == 200
        assert server.ask("GET", "/") == (200, "USD USD")
        assert "close EUR" not in server.output.text
        server.ask("POST", "/go")
        assert response.read() == b"ended EUR\n"
        server.output.wait_for("close EUR")


@pytest.mark.parametrize("how", WITHOUT_LIFESPAN)
@pytest.mark.parametrize("lifespan", ["auto", "on"])
def test_plain_asgi_without_a_lifespan_of_its_own(tmp_path: Path, how: str, lifespan: str) -> None:
    with serving(tmp_path, ASGI + WITHOUT_LIFESPAN[how] + WRAP, "--lifespan", lifespan) as server:
        assert server.ask("GET", "/") == (200, "EUR")
        assert server.ask("POST", "/reload/prices?currency=USD")[0] == 200
        assert server.ask("GET", "/") == (200, "USD")
        server.stop()
        assert "close USD" in server.output.text
        assert "Application shutdown complete" in server.output.text
        assert "Traceback" not in server.output.text


@pytest.mark.parametrize("how", LIFESPAN)
def test_plain_asgi_with_a_lifespan_of_its_own_within_that_of_the_services(tmp_path: Path, how: str) -> None:
    with serving(tmp_path, ASGI + LIFESPAN[how] + WRAP) as server:
        # services go on though the application's own lifespan may have ended
        assert server.ask("GET", "/") == (200, "EUR")
        server.stop()
        text = server.output.text
        order = ["start EUR", "app starts with EUR", "app ends with EUR", "close EUR"]
        places = [text.index(each) for each in order]
        assert places == sorted(places), text
        failed = "Application shutdown failed" in text
        assert failed is (how == "breaks off")
        assert ("broken off" in text) is failed


@pytest.mark.parametrize("how", FAILING)
def test_a_start_up_of_the_application_that_fails_closes_the_services_first(tmp_path: Path, how: str) -> None:
    inner = f"""
async def inner(scope, receive, send):
    if scope["type"] != "lifespan":
        return await answer(scope, receive, send)
{FAILING[how]}
"""
    with uvicorn(tmp_path, ASGI + inner + WRAP) as server:
        assert server.process.wait(DEADLINE_S) == 3
        server.output.join()
        assert "no disk" in server.output.text
        assert server.output.text.index("close EUR") < server.output.text.index("Application startup failed")


@pytest.mark.parametrize("code", [FASTAPI, ASGI + WITHOUT_LIFESPAN["raises"] + WRAP])
def test_services_that_can_not_start_keep_uvicorn_from_starting_and_say_why(
    tmp_path: Path, code: str
) -> None:
    (tmp_path / "segue.toml").write_text("[services.prices]\nprice = 3\n")
    with uvicorn(tmp_path, code) as server:
        assert server.process.wait(DEADLINE_S) == 3
        server.output.join()
        assert "service 'prices' has no setting price" in server.output.text


def test_without_a_lifespan_the_error_says_what_to_do(tmp_path: Path) -> None:
    with serving(tmp_path, FASTAPI, "--lifespan", "off") as server:
        assert server.ask("GET", "/")[0] == 500
        server.output.wait_for(r"FastAPI\(lifespan=services\.lifespan\)")


# --------------------------------------------------------------------------------------------------- the router


def test_a_router_without_a_token_has_to_be_asked_for() -> None:
    services = segue.Services()
    for arguments in ({}, {"token": ""}, {"token": " "}, {"token": "", "allow_unauthenticated": True}):
        with pytest.raises(ValueError, match=r"token"):
            services.router(**arguments)
    services.router(allow_unauthenticated=True)
    services.router(token=TOKEN)


def test_the_router_swaps_and_says_why_not(tmp_path: Path) -> None:
    hot = "/api/v1/hot"
    with serving(tmp_path, FASTAPI) as server:
        for token in (None, "", "wrong", TOKEN + "x"):
            assert server.ask("GET", f"{hot}/status", token)[0] == 401
            assert server.ask("POST", f"{hot}/reload/prices?currency=USD", token)[0] == 401
        assert server.ask("GET", "/")[1] == ["EUR", "EUR", 1]

        status, answer = server.ask("POST", f"{hot}/reload/nothing", TOKEN)
        assert (status, answer["known"]) == (404, ["prices", "quotes"])
        status, answer = server.ask("POST", f"{hot}/reload/prices?colour=red", TOKEN)
        assert (status, answer["detail"]) == (
            400,
            "service 'prices' takes no colour; it takes currency, token",
        )
        status, answer = server.ask("POST", f"{hot}/reload/prices?currency=XXX", TOKEN)
        assert (status, "ValueError" in answer["detail"]) == (409, True)
        assert server.ask("GET", "/")[1] == ["EUR", "EUR", 1]
        assert server.ask("POST", f"{hot}/nothing", TOKEN)[0] == 404
        assert server.ask("GET", f"{hot}/reload/prices", TOKEN)[0] == 405

        secret = "hunter2-hunter2"
        status, answer = server.ask("POST", f"{hot}/reload/prices?token={secret}&wait=5", TOKEN)
        assert (status, answer["version"]) == (200, 2)
        assert secret not in json.dumps(answer)
        assert secret not in json.dumps(server.ask("GET", f"{hot}/status", TOKEN))
        server.output.wait_for('POST /api/v1/hot/reload/prices HTTP/1.1" 200')
        server.stop()
        assert secret not in server.output.text


def test_the_router_drains(tmp_path: Path) -> None:
    with serving(tmp_path, FASTAPI) as server:
        assert server.ask("POST", "/order") == (200, "ordered")
        status, answer = server.ask("POST", "/open/drain/start?mode=sideways")
        assert (status, answer["known"]) == (400, ["reject", "queue"])
        assert server.ask("POST", "/open/drain/start") == (200, {"draining": True, "drain_mode": "reject"})
        assert server.ask("POST", "/order")[0] == 503
        assert server.ask("GET", "/")[0] == 200
        assert server.ask("GET", "/open/status")[1]["drain_mode"] == "reject"
        server.ask("POST", "/open/drain/start?mode=queue")
        held = server.connect()
        held.request("POST", "/order")
        assert server.ask("GET", "/open/status")[1]["draining"] is True
        assert server.ask("POST", "/open/drain/stop") == (200, {"draining": False, "drain_mode": None})
        assert held.getresponse().status == 200
        assert server.ask("GET", "/open/status")[1]["services_initialized"] == {
            "prices": True,
            "quotes": True,
        }


def test_settings_come_from_the_environment_of_uvicorn(tmp_path: Path) -> None:
    with serving(tmp_path, FASTAPI, SEGUE_SERVICES__PRICES__CURRENCY="CHF") as server:
        assert server.ask("GET", "/")[1] == ["CHF", "CHF", 1]


def test_the_example_works_alone(tmp_path: Path) -> None:
    with serving(tmp_path, "from examples.quotes.app import app\n") as server:
        assert server.ask("GET", "/quote/tea") == (200, {"quote": "tea costs 4.00 EUR"})
        assert server.ask("POST", "/orders/tea") == (200, {"ordered": "tea", "price": "4.00 EUR"})
        assert server.ask("GET", "/quotes/nothing")[0] == 404
        status, text = server.ask("GET", "/quotes/coffee?times=1&pause=0")
        assert (status, text) == (200, "data: 6.50 EUR\n\ndata: end\n\n")


# ------------------------------------------------------------------------------------------------ under a worker


def test_a_worker_activates_swaps_and_ends_the_services_as_it_is_told(tmp_path: Path) -> None:
    code = FASTAPI.replace("settings=Settings)", 'settings=Settings, per="generation", handover_timeout=17)')
    with Bench(tmp_path, code) as bench:
        worker = bench.spawn(
            spec={"services": {"prices": {"version": 3, "choices": {"currency": "CHF"}}}}
        ).wait_ready()
        assert worker.wait_for("X_SEGUE_HANDOVER") == "17"
        hot = "/api/v1/hot"

        def service() -> Any:
            return worker.call("GET", f"{hot}/status")[1]["services"]["prices"]

        def phase(which: str, **order: Any) -> tuple[int, Any]:
            connection = UnixConnection(worker.control)
            connection.request("POST", f"{hot}/swap/{which}", body=json.dumps({"swap": 1, **order}))
            response = connection.getresponse()
            answer = json.loads(response.read())
            connection.close()
            return response.status, answer

        assert (service()["version"], service()["active"]) == (3, False)
        assert worker.call("POST", f"{hot}/services/activate?lead=0")[0] == 200
        assert service()["active"] is False
        assert worker.call("POST", f"{hot}/services/activate?lead=1")[0] == 200
        assert service()["active"] is True

        order = {"service": "prices", "query": {"token": "t"}, "version": 4, "choices": {"currency": "CHF"}}
        status, report = phase("prepare", **order)
        assert (status, report["choices"]) == (200, {"currency": "CHF", "token": "t"})
        assert phase("abort") == (200, {})
        assert phase("commit")[0] == 409
        assert phase("prepare", **order)[0] == 200
        status, report = phase("commit")
        assert (status, report["version"], report["rewired"]) == (200, 4, ["quotes"])
        assert phase("commit") == (200, report)
        assert (service()["version"], service()["active"]) == (4, True)

        assert phase("prepare", **order | {"version": 5})[0] == 200
        assert worker.call("POST", f"{hot}/services/deactivate")[0] == 200
        assert service()["active"] is False
        assert worker.stop() == 0
        printed = os.pread(bench.stdout, 1 << 20, 0).decode()
        # the one that was aborted, the old one, the one that was still waiting, and the current one
        assert (worker.output + printed).count("close CHF") == 4

"""The operator's drain as an application sees it: real applications, uvicorn's servers and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import inspect
import itertools
import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Annotated, Any

import msgspec
import pytest
import uvicorn
import uvloop
import websockets.asyncio.client
import websockets.exceptions
from fastapi import Body, Depends, FastAPI, WebSocket
from fastapi import Request as FastAPIRequest
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from segue.worker import gate as singletons
from segue.worker.gate import Gate
from segue.worker.reject import RejectIfDraining
from segue.worker.replay import BUFFER_BYTES, Replay

WAIT_S = 30.0
PROBLEM = "application/problem+json"
MEGABYTE = bytes(range(256)) * 4096

Main = Callable[[], Coroutine[Any, Any, None]]


# What the tests are written in


def play(main: Main, loop: str = "asyncio") -> None:
    """Run a test's story: server and clients share one event loop."""
    factory = uvloop.new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.wait_for(main(), WAIT_S))
        # a task that was forgotten complains now
        gc.collect()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until it is so."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0)


async def turns(count: int = 20) -> None:
    """Let the loop turn, for what must not happen."""
    for _ in range(count):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def served(app: Any, **settings: Any) -> AsyncIterator[int]:
    """Serve `app` with uvicorn; yields the port."""
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, **{"log_config": None, "access_log": False} | settings))
    task = asyncio.create_task(server.serve([sock]))
    await until(lambda: server.started or task.done())
    try:
        yield port
    finally:
        server.should_exit = True
        await task


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: bytes

    def assert_refused(self, detail: str) -> None:
        """It is a 503 that says when to come again, and a problem document."""
        assert self.status == 503, self
        assert int(self.headers["retry-after"]) > 0
        assert self.headers["content-type"] == PROBLEM
        document = json.loads(self.body)
        assert detail in document["detail"]
        assert document.get("status", 503) == 503
        assert document.get("type", "about:blank") == "about:blank"
        assert set(document) <= {"type", "title", "status", "detail"}


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, method: str, target: str, body: bytes = b"", length: int | None = None) -> None:
        """Ask; with a larger `length` than that of `body` the rest of it is still to come."""
        head = f"{method} {target} HTTP/1.1\r\nhost: test\r\n"
        if body or length:
            head += f"content-type: application/octet-stream\r\ncontent-length: {length or len(body)}\r\n"
        self.writer.write(head.encode() + b"\r\n" + body)

    async def answer(self, method: str = "POST") -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {}
        for line in head[1:-2]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = b""
        if method == "HEAD":
            pass
        elif headers.get("transfer-encoding") == "chunked":
            while chunk := await self.chunk():
                body += chunk
        else:
            body = await self.reader.readexactly(int(headers["content-length"]))
        return Answer(int(head[0].split()[1]), headers, body)

    async def chunk(self) -> bytes:
        size = int((await self.reader.readuntil(b"\r\n")).strip(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def ask(self, method: str, target: str, body: bytes = b"") -> Answer:
        self.send(method, target, body)
        return await self.answer(method)

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class Clients:
    """The clients of one server; they are closed at the end."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._all: list[Client] = []

    async def one(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22))
        self._all.append(client)
        return client

    async def many(self, count: int) -> list[Client]:
        return [await self.one() for _ in range(count)]

    async def close(self) -> None:
        for client in self._all:
            await client.close()


class Site:
    """An application with marked endpoints, and what it has seen."""

    def __init__(self, use: str, mark: RejectIfDraining) -> None:
        self.seen: list[str] = []
        self.go_on = asyncio.Event()
        self.app: Any = getattr(self, f"_{use}")(mark)

    async def work(self, request: Request) -> Response:
        """Read the body itself; answer its digest."""
        self.seen.append(request.url.query)
        return PlainTextResponse(hashlib.sha256(await request.body()).hexdigest())

    async def stream(self, request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"begun"
            await self.go_on.wait()
            yield b"ended"

        return StreamingResponse(parts())

    def _dependency(self, mark: RejectIfDraining) -> ASGIApp:
        """The endpoint takes the request and reads the body itself."""
        app = FastAPI(dependencies=[Depends(mark)])

        @app.post("/work")
        async def work(request: FastAPIRequest) -> Response:
            return await self.work(request)

        @app.post("/stream")
        async def stream(request: FastAPIRequest) -> Response:
            return await self.stream(request)

        return app

    def _dependency_with_body(self, mark: RejectIfDraining) -> ASGIApp:
        """FastAPI reads the body before it calls dependencies."""
        app = FastAPI()

        @app.post("/work")
        async def work(
            request: FastAPIRequest,
            body: Annotated[bytes, Body(media_type="application/octet-stream")] = b"",
            marked: None = Depends(mark),
        ) -> Response:
            assert marked is None
            self.seen.append(request.url.query)
            return PlainTextResponse(hashlib.sha256(body).hexdigest())

        @app.post("/stream", dependencies=[Depends(mark)])
        async def stream(request: FastAPIRequest) -> Response:
            return await self.stream(request)

        return app

    def _decorator(self, mark: RejectIfDraining) -> ASGIApp:
        return Starlette(
            routes=[
                Route("/work", mark(self.work), methods=["POST"]),
                Route("/stream", mark(self.stream), methods=["POST"]),
            ]
        )

    def _method(self, mark: RejectIfDraining) -> ASGIApp:
        site = self

        class Work(HTTPEndpoint):
            @mark
            async def post(self, request: Request) -> Response:
                return await site.work(request)

        class Stream(HTTPEndpoint):
            @mark
            async def post(self, request: Request) -> Response:
                return await site.stream(request)

        return Starlette(routes=[Route("/work", Work), Route("/stream", Stream)])

    def _wrapper(self, mark: RejectIfDraining) -> ASGIApp:
        return mark(self._plain())

    def _middleware(self, mark: RejectIfDraining) -> ASGIApp:
        """Between two middlewares that pass messages on through queues and tasks of their own."""

        class Passing(BaseHTTPMiddleware):
            async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
                return await call_next(request)

        return self._plain([Middleware(Passing), Middleware(mark), Middleware(Passing)])

    def _plain(self, middleware: list[Middleware] | None = None) -> ASGIApp:
        every = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]
        return Starlette(
            routes=[
                Route("/stream", self.stream, methods=["POST"]),
                Route("/{path:path}", self.work, methods=every),
            ],
            middleware=middleware,
        )


USES = ("dependency", "dependency_with_body", "decorator", "method", "wrapper", "middleware")
every_use = pytest.mark.parametrize("use", USES)
use_before_the_body = pytest.mark.parametrize("use", [use for use in USES if use != "dependency_with_body"])
"""FastAPI reads a declared body before it asks its dependencies."""
every_stack = pytest.mark.parametrize("http", ["httptools", "h11"])
every_loop = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a server or the event loop complains of happens unnoticed."""
    yield
    loud = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING]
    assert not loud


@pytest.fixture
def gate() -> Gate:
    """One that nobody else uses."""
    return Gate()


@pytest.fixture
def mark(gate: Gate) -> RejectIfDraining:
    return RejectIfDraining(gate)


@contextlib.asynccontextmanager
async def visited(use: str, mark: RejectIfDraining, **settings: Any) -> AsyncIterator[tuple[Site, Clients]]:
    """A served site, and its clients."""
    site = Site(use, mark)
    async with served(site.app, **settings) as port:
        clients = Clients(port)
        try:
            yield site, clients
        finally:
            await clients.close()


def digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


# Without a drain, and with one that rejects


@every_use
def test_without_a_drain_all_pass(use: str, gate: Gate, mark: RejectIfDraining) -> None:
    async def story() -> None:
        async with visited(use, mark) as (site, clients):
            client = await clients.one()
            for number in range(3):
                answer = await client.ask("POST", f"/work?{number}", b"body")
                assert (answer.status, answer.body) == (200, digest(b"body"))
            assert site.seen == ["0", "1", "2"]

    play(story)
    assert (gate.queued_total, gate.rejected_total) == (0, 0)


@every_use
@every_stack
def test_a_drain_that_rejects_answers_503_and_the_application_sees_nothing(
    use: str, http: str, gate: Gate, mark: RejectIfDraining
) -> None:
    async def story() -> None:
        async with visited(use, mark, http=http) as (site, clients):
            client = await clients.one()
            gate.set_mode("reject")
            for _ in range(3):
                answer = await client.ask("POST", "/work", b"body")
                answer.assert_refused("the service is draining; try again later")
            assert site.seen == []
            gate.set_mode(None)
            # on the same connection
            assert (await client.ask("POST", "/work", b"body")).body == digest(b"body")

    play(story)
    assert gate.rejected_total == 3


@every_use
@pytest.mark.parametrize("mode", ["reject", "queue"])
def test_a_stream_in_flight_goes_on(use: str, mode: str, gate: Gate, mark: RejectIfDraining) -> None:
    async def story() -> None:
        async with visited(use, mark) as (site, clients):
            client = await clients.one()
            client.send("POST", "/stream")
            await client.reader.readuntil(b"\r\n\r\n")
            assert await client.chunk() == b"begun"
            gate.set_mode(mode)
            site.go_on.set()
            assert await client.chunk() == b"ended"
            assert await client.chunk() == b""

    play(story)


def test_nothing_but_the_two_modes_is_taken(gate: Gate) -> None:
    with pytest.raises(ValueError, match="reject or queue, not 'handover'"):
        gate.set_mode("handover")
    assert gate.open


# A drain that queues


@every_use
@every_loop
def test_a_hundred_held_requests_are_served_in_the_order_in_which_they_came(
    use: str, loop: str, gate: Gate, mark: RejectIfDraining
) -> None:
    async def story() -> None:
        async with visited(use, mark) as (site, clients):
            gate.set_mode("queue")
            everybody = await clients.many(100)
            for number, client in enumerate(everybody):
                client.send("POST", f"/work?{number}", b"%d" % number)
                await until(lambda number=number: gate.waiting == number + 1)  # type: ignore[misc]
            assert site.seen == []
            gate.set_mode(None)
            for number, client in enumerate(everybody):
                answer = await client.answer()
                assert (answer.status, answer.body) == (200, digest(b"%d" % number))
            assert site.seen == [str(number) for number in range(100)]

    play(story, loop)
    assert (gate.waiting, gate.queued_total, gate.open) == (0, 100, True)


def test_those_who_come_while_others_are_let_go_do_not_overtake_them(
    gate: Gate, mark: RejectIfDraining
) -> None:
    async def story() -> None:
        async with visited("wrapper", mark) as (site, clients):
            gate.set_mode("queue")
            everybody = await clients.many(200)
            for number, client in enumerate(everybody[:150]):
                client.send("POST", f"/work?{number}")
                await until(lambda number=number: gate.waiting == number + 1)  # type: ignore[misc]
            for number, client in enumerate(everybody[150:], 150):  # in the sockets when the drain ends
                client.send("POST", f"/work?{number}")
            gate.set_mode(None)
            assert not gate.open
            for client in everybody:
                assert (await client.answer()).status == 200
            assert site.seen[:150] == [str(number) for number in range(150)]
            assert sorted(site.seen[150:]) == [str(number) for number in range(150, 200)]

    play(story)
    assert gate.open


def test_not_even_one_whose_task_is_about_to_run_overtakes_the_last_held(
    gate: Gate, mark: RejectIfDraining
) -> None:
    served: list[str] = []

    async def story() -> None:
        app = mark(recording(served))
        gate.set_mode("queue")
        held = [asyncio.create_task(post(app, f"/{number}")) for number in range(3)]
        await until(lambda: gate.waiting == 3)
        gate.set_mode(None)
        late: list[asyncio.Task[None]] = []
        while not gate.open:  # one more in every turn of the loop
            late.append(asyncio.create_task(post(app, f"/late{len(late)}")))
            await asyncio.sleep(0)
        await asyncio.gather(*held, *late)
        assert late
        assert served[:3] == ["/0", "/1", "/2"]
        # though somebody came in every turn it has opened
        assert len(served) == 3 + len(late)

    play(story)


def test_a_thousand_are_let_go_over_several_turns_of_the_loop(gate: Gate, mark: RejectIfDraining) -> None:
    served: list[str] = []

    async def story() -> None:
        app = mark(recording(served))
        gate.set_mode("queue")
        held = [asyncio.create_task(post(app, f"/{number}")) for number in range(1000)]
        await until(lambda: gate.waiting == 1000)
        gate.set_mode(None)
        steps = [0]
        while not gate.open:
            await asyncio.sleep(0)
            steps.append(len(served))
        await asyncio.gather(*held)
        assert max(after - before for before, after in itertools.pairwise(steps)) <= 200
        assert served == [f"/{number}" for number in range(1000)]

    play(story)


@every_use
@every_stack
def test_a_body_posted_while_its_request_waits_arrives_whole(
    use: str, http: str, gate: Gate, mark: RejectIfDraining
) -> None:
    async def story() -> None:
        async with visited(use, mark, http=http) as (_, clients):
            gate.set_mode("queue")
            large, slow, none = await clients.many(3)
            large.send("POST", "/work?large", MEGABYTE)
            await until(lambda: gate.waiting == 1)
            if use != "dependency_with_body":  # there FastAPI waits for it first
                slow.send("POST", "/work?slow", b"first ", 12)
                await until(lambda: gate.waiting == 2)
            none.send("POST", "/work?none")
            await until(lambda: gate.waiting == 3 - (use == "dependency_with_body"))
            await turns()
            gate.set_mode(None)
            assert (await large.answer()).body == digest(MEGABYTE)
            assert (await none.answer()).body == digest(b"")
            if use != "dependency_with_body":
                await turns()
                slow.writer.write(b"second")
                assert (await slow.answer()).body == digest(b"first second")
            # the connections have kept their places in the stream of bytes
            for client in (large, none):
                assert (await client.ask("POST", "/work", b"again")).body == digest(b"again")

    play(story)


def test_a_body_is_still_there_for_whoever_reads_it_after_the_endpoint_has_returned(
    gate: Gate, mark: RejectIfDraining
) -> None:
    async def echo(request: Request) -> Response:
        return StreamingResponse(request.stream())

    async def story() -> None:
        async with served(Starlette(routes=[Route("/", mark(echo), methods=["POST"])])) as port:
            clients = Clients(port)
            client = await clients.one()
            gate.set_mode("queue")
            client.send("POST", "/", b"0123", 8)
            await until(lambda: gate.waiting == 1)
            gate.set_mode(None)
            await turns()
            client.writer.write(b"4567")
            assert (await client.answer()).body == b"01234567"
            await clients.close()

    play(story)


@every_use
def test_the_queue_has_a_limit(use: str, gate: Gate, mark: RejectIfDraining) -> None:
    async def story() -> None:
        async with visited(use, mark) as (site, clients):
            gate.configure(3, 30.0, None)
            gate.set_mode("queue")
            everybody = await clients.many(4)
            for number, client in enumerate(everybody[:3]):
                client.send("POST", f"/work?{number}")
                await until(lambda number=number: gate.waiting == number + 1)  # type: ignore[misc]
            (await everybody[3].ask("POST", "/work?3")).assert_refused("3 requests wait already")
            gate.set_mode(None)
            for client in everybody[:3]:
                assert (await client.answer()).status == 200
            assert site.seen == ["0", "1", "2"]

    play(story)
    assert (gate.queued_total, gate.rejected_total) == (3, 1)


@every_use
def test_nobody_waits_for_longer_than_the_timeout(use: str, gate: Gate, mark: RejectIfDraining) -> None:
    async def story() -> None:
        async with visited(use, mark) as (site, clients):
            gate.configure(1, 0.05, None)
            gate.set_mode("queue")
            client = await clients.one()
            for _ in range(2):
                answer = await client.ask("POST", "/work", b"body")
                answer.assert_refused("this request has waited for 0.05 s")
            assert site.seen == []

    play(story)
    assert (gate.waiting, gate.queued_total, gate.timed_out_total, gate.rejected_total) == (0, 2, 2, 0)


@every_use
@every_stack
@every_loop
def test_a_client_that_leaves_gives_its_place_up_and_the_application_never_sees_it(
    use: str, http: str, loop: str, gate: Gate, mark: RejectIfDraining
) -> None:
    async def story() -> None:
        async with visited(use, mark, http=http) as (site, clients):
            gate.configure(3, 30.0, None)
            gate.set_mode("queue")
            everybody = await clients.many(4)
            for number, client in enumerate(everybody[:3]):
                client.send("POST", f"/work?{number}", b"body")
                await until(lambda number=number: gate.waiting == number + 1)  # type: ignore[misc]
            await everybody[1].close()
            await until(lambda: gate.waiting == 2)
            everybody[3].send("POST", "/work?3", b"body")
            await until(lambda: gate.waiting == 3)
            gate.set_mode(None)
            for number in (0, 2, 3):
                assert (await everybody[number].answer()).body == digest(b"body")
            assert site.seen == ["0", "2", "3"]

    play(story, loop)
    assert (gate.left_total, gate.queued_total, gate.rejected_total) == (1, 4, 0)


@use_before_the_body
def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_too(
    use: str, gate: Gate, mark: RejectIfDraining
) -> None:
    async def story() -> None:
        async with visited(use, mark) as (site, clients):
            gate.set_mode("queue")
            client = await clients.one()
            client.send("POST", "/work", b"a beginning", 100)
            await until(lambda: gate.waiting == 1)
            await client.close()
            await until(lambda: gate.waiting == 0)
            gate.set_mode(None)
            await turns()
            assert site.seen == []

    play(story)
    assert gate.left_total == 1


@use_before_the_body
def test_a_client_that_leaves_after_the_wait_is_noticed_as_ever(
    use: str, gate: Gate, mark: RejectIfDraining
) -> None:
    async def story() -> None:
        site = Site(use, mark)
        noticed = asyncio.Event()

        async def work(request: Request) -> Response:
            try:
                await request.body()
            except ClientDisconnect:
                noticed.set()
            return Response()

        site.work = work  # type: ignore[method-assign]
        site.app = getattr(site, f"_{use}")(mark)
        async with served(site.app) as port:
            clients = Clients(port)
            gate.set_mode("queue")
            client = await clients.one()
            client.send("POST", "/work", b"a beginning", 100)
            await until(lambda: gate.waiting == 1)
            gate.set_mode(None)
            await until(lambda: gate.open)
            await client.close()
            await noticed.wait()

    play(story)


# Changes of mind


@every_use
def test_who_waits_is_rejected_when_the_drain_is_changed_to_reject(
    use: str, gate: Gate, mark: RejectIfDraining
) -> None:
    async def story() -> None:
        async with visited(use, mark) as (site, clients):
            gate.set_mode("queue")
            everybody = await clients.many(40)
            for number, client in enumerate(everybody):
                client.send("POST", "/work")
                await until(lambda number=number: gate.waiting == number + 1)  # type: ignore[misc]
            gate.set_mode("reject")
            for client in everybody:
                (await client.answer()).assert_refused("the service is draining; try again later")
            assert site.seen == []
            gate.set_mode(None)
            assert (await everybody[0].ask("POST", "/work")).status == 200

    play(story)
    assert gate.rejected_total == 40


@every_use
def test_a_process_that_stops_answers_503_to_who_waits_and_who_comes(
    use: str, gate: Gate, mark: RejectIfDraining
) -> None:
    async def story() -> None:
        async with visited(use, mark) as (site, clients):
            gate.set_mode("queue")
            client, late = await clients.many(2)
            client.send("POST", "/work")
            await until(lambda: gate.waiting == 1)
            gate.shut()
            (await client.answer()).assert_refused("the service is stopping; try again later")
            gate.set_mode(None)  # too late
            (await late.ask("POST", "/work")).assert_refused("the service is stopping; try again later")
            assert site.seen == []

    play(story)
    assert gate.rejected_total == 2


def test_a_drain_that_begins_anew_while_others_are_let_go_holds_the_rest(
    gate: Gate, mark: RejectIfDraining
) -> None:
    served: list[str] = []

    async def story() -> None:
        app = mark(recording(served))
        gate.set_mode("queue")
        held = [asyncio.create_task(post(app, f"/{number}")) for number in range(100)]
        await until(lambda: gate.waiting == 100)
        gate.set_mode(None)
        await until(lambda: gate.waiting < 100)
        gate.set_mode("queue")
        await turns()
        assert 0 < gate.waiting < 100
        held.append(asyncio.create_task(post(app, "/100")))
        await turns()
        gate.set_mode(None)
        await asyncio.gather(*held)
        assert served == [f"/{number}" for number in range(101)]

    play(story)
    assert gate.open


def test_a_cancelled_request_gives_its_place_up(gate: Gate, mark: RejectIfDraining) -> None:
    served: list[str] = []

    async def story() -> None:
        app = mark(recording(served))
        gate.set_mode("queue")
        before = asyncio.all_tasks()
        first, second = (asyncio.create_task(post(app, path)) for path in ("/1", "/2"))
        await until(lambda: gate.waiting == 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (gate.waiting, gate.left_total) == (1, 1)
        gate.set_mode(None)
        await second
        assert served == ["/2"]
        assert asyncio.all_tasks() == before

    play(story)


# Who is marked


def test_the_wrapper_lets_reading_health_and_the_hot_endpoints_through(
    gate: Gate, mark: RejectIfDraining
) -> None:
    free = ["/livez", "/readyz", "/healthz", "/up", "/api/v1/hot", "/api/v1/hot/status"]
    marked = ["/work", "/livez/", "/upper", "/api/v1/hotel"]

    async def story() -> None:
        async with visited("wrapper", mark) as (_, clients):
            gate.configure(10, 30.0, "/up")
            client = await clients.one()
            for mode in ("reject", "queue"):
                gate.set_mode(mode)
                for method in ("GET", "HEAD", "OPTIONS"):
                    assert (await client.ask(method, "/work")).status == 200
                for path in free:
                    assert (await client.ask("POST", path)).status == 200
            gate.set_mode("reject")
            for path in marked:
                (await client.ask("POST", path)).assert_refused("draining")
            for method in ("PUT", "DELETE"):
                (await client.ask(method, "/work")).assert_refused("draining")

    play(story)


def test_below_a_root_path_the_wrapper_knows_the_same_paths(gate: Gate, mark: RejectIfDraining) -> None:
    async def story() -> None:
        async with visited("wrapper", mark, root_path="/shop") as (_, clients):
            gate.configure(10, 30.0, "/up")
            gate.set_mode("reject")
            client = await clients.one()
            for path in ("/livez", "/up", "/api/v1/hot/status"):
                assert (await client.ask("POST", path)).status == 200
            (await client.ask("POST", "/work")).assert_refused("draining")

    play(story)


def test_the_wrapper_passes_lifespan_on(gate: Gate, mark: RejectIfDraining) -> None:
    started: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        started.append("start")
        yield
        started.append("end")

    async def story() -> None:
        gate.set_mode("reject")
        async with served(mark(Starlette(lifespan=lifespan)), lifespan="on"):
            assert started == ["start"]
        assert started == ["start", "end"]

    play(story)


def test_without_a_drain_the_wrapper_returns_the_coroutine_of_the_application_itself(
    mark: RejectIfDraining,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    async def nothing(*_: Any) -> Any: ...

    coroutine = mark(app)({"type": "http"}, nothing, nothing)
    assert inspect.iscoroutine(coroutine)
    assert coroutine.cr_code is app.__code__
    coroutine.close()


def test_who_is_marked_twice_waits_once(gate: Gate, mark: RejectIfDraining) -> None:
    async def story() -> None:
        site = Site("dependency", mark)
        async with served(mark(site.app)) as port:
            clients = Clients(port)
            gate.set_mode("queue")
            everybody = await clients.many(40)
            for number, client in enumerate(everybody):
                client.send("POST", f"/work?{number}", b"body")
                await until(lambda number=number: gate.waiting == number + 1)  # type: ignore[misc]
            gate.set_mode(None)
            for client in everybody:
                assert (await client.answer()).body == digest(b"body")
            assert site.seen == [str(number) for number in range(40)]
            await clients.close()

    play(story)
    assert gate.queued_total == 40


def test_a_sync_endpoint_goes_on_running_in_a_thread(gate: Gate, mark: RejectIfDraining) -> None:
    threads: list[threading.Thread] = []

    @mark
    def page(request: Request) -> Response:
        """What it says."""
        threads.append(threading.current_thread())
        return PlainTextResponse(request.url.path)

    class Pages(HTTPEndpoint):
        @mark
        def post(self, request: Request) -> Response:
            threads.append(threading.current_thread())
            return PlainTextResponse(request.url.path)

    async def story() -> None:
        app = Starlette(routes=[Route("/function", page, methods=["POST"]), Route("/method", Pages)])
        async with served(app) as port:
            clients = Clients(port)
            client = await clients.one()
            for path in ("/function", "/method"):
                gate.set_mode("reject")
                (await client.ask("POST", path)).assert_refused("draining")
                gate.set_mode("queue")
                client.send("POST", path)
                await until(lambda: gate.waiting == 1)
                gate.set_mode(None)
                assert (await client.answer()).body == path.encode()
            await clients.close()

    play(story)
    assert len(threads) == 2
    assert threading.main_thread() not in threads
    assert (page.__name__, page.__doc__) == ("page", "What it says.")


def test_a_fastapi_endpoint_that_takes_the_request_may_be_decorated(
    gate: Gate, mark: RejectIfDraining
) -> None:
    app = FastAPI()

    @app.post("/items/{item}")
    @mark
    async def item(item: int, request: FastAPIRequest) -> Response:
        return PlainTextResponse(str(item))

    async def story() -> None:
        async with served(app) as port:
            clients = Clients(port)
            client = await clients.one()
            assert (await client.ask("POST", "/items/5")).body == b"5"
            gate.set_mode("reject")
            (await client.ask("POST", "/items/5")).assert_refused("draining")
            await clients.close()

    play(story)


def test_a_dependency_of_one_endpoint_leaves_the_others_alone_and_out_of_the_schema(
    gate: Gate, mark: RejectIfDraining
) -> None:
    app = FastAPI()

    @app.post("/marked", dependencies=[Depends(mark)])
    def marked() -> str:
        return "marked"

    @app.post("/free")
    def free() -> str:
        return "free"

    assert "parameters" not in app.openapi()["paths"]["/marked"]["post"]

    async def story() -> None:
        async with served(app) as port:
            clients = Clients(port)
            client = await clients.one()
            gate.set_mode("reject")
            (await client.ask("POST", "/marked")).assert_refused("draining")
            assert (await client.ask("POST", "/free")).body == b'"free"'
            gate.set_mode(None)
            assert (await client.ask("POST", "/marked")).body == b'"marked"'
            await clients.close()

    play(story)


def test_a_starlette_endpoint_may_await_it(gate: Gate, mark: RejectIfDraining) -> None:
    async def endpoint(request: Request) -> Response:
        if request.url.query == "marked":
            await mark(request)
        return PlainTextResponse("passed")

    async def story() -> None:
        async with served(Starlette(routes=[Route("/", endpoint)])) as port:
            clients = Clients(port)
            client = await clients.one()
            gate.set_mode("reject")
            (await client.ask("GET", "/?marked")).assert_refused("draining")
            assert (await client.ask("GET", "/")).body == b"passed"
            await clients.close()

    play(story)


def test_what_it_cannot_mark_it_refuses_at_once(mark: RejectIfDraining) -> None:
    async def item(item_id: int, color: str) -> Response: ...  # type: ignore[empty-body]

    async def stream(request: Request) -> AsyncIterator[bytes]:
        yield b""

    async def lonely(item_id: int) -> Response: ...  # type: ignore[empty-body]

    with pytest.raises(TypeError, match=r"can't be marked: .* write Depends\(reject_if_draining\)"):
        mark(item)
    with pytest.raises(TypeError, match="is a generator"):
        mark(stream)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="without a request"):
        asyncio.run(mark(lonely)(item_id=1))


def test_applications_of_every_shape_are_told_from_endpoints(mark: RejectIfDraining) -> None:
    async def function(scope: Scope, receive: Receive, send: Send) -> None: ...

    class Class:
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...

        async def method(self, scope: Scope, receive: Receive, send: Send) -> None: ...

    apps: list[ASGIApp] = [function, Class(), Class().method, Starlette(), FastAPI(), mark(function)]
    for app in apps:
        marked = mark(app)
        assert marked is not app
        config = uvicorn.Config(marked, log_config=None)
        config.load()
        assert config.interface == "asgi3", app


def test_an_application_gets_the_one_of_its_process() -> None:
    assert isinstance(singletons.gate, Gate)
    assert singletons.gate.open
    assert isinstance(singletons.reject_if_draining, RejectIfDraining)


def test_importing_it_imports_no_framework() -> None:
    code = "import sys, segue.worker.gate; print({'starlette', 'fastapi', 'anyio'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"


# WebSockets


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(await websocket.receive_text())
    await websocket.close()


def websocket_site(use: str, mark: RejectIfDraining) -> ASGIApp:
    if use == "dependency":
        app = FastAPI(dependencies=[Depends(mark)])
        app.websocket("/")(echo)
        return app
    if use == "decorator":
        return Starlette(routes=[WebSocketRoute("/", mark(echo))])
    return mark(Starlette(routes=[WebSocketRoute("/", echo)]))


websocket_uses = pytest.mark.parametrize("use", ["dependency", "decorator", "wrapper"])


@websocket_uses
def test_a_websocket_handshake_is_refused_with_503(
    use: str, gate: Gate, mark: RejectIfDraining, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with served(websocket_site(use, mark)) as port:
            gate.set_mode("reject")
            with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
                await websockets.asyncio.client.connect(f"ws://127.0.0.1:{port}/", proxy=None)
            response = refused.value.response
            headers = {name.lower(): value for name, value in response.headers.raw_items()}
            assert response.body is not None
            Answer(response.status_code, headers, bytes(response.body)).assert_refused("draining")

    play(story)
    # uvicorn complains of every handshake that is refused with a response, whoever refuses it
    assert {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING} <= {
        "ASGI callable returned without completing handshake."
    }
    caplog.clear()


@websocket_uses
def test_a_websocket_handshake_waits_and_loses_nothing(use: str, gate: Gate, mark: RejectIfDraining) -> None:
    async def story() -> None:
        async with served(websocket_site(use, mark)) as port:
            gate.set_mode("queue")
            connecting = asyncio.create_task(
                websockets.asyncio.client.connect(f"ws://127.0.0.1:{port}/", proxy=None).__aenter__()
            )
            await until(lambda: gate.waiting == 1)
            gate.set_mode(None)
            connection = await connecting
            await connection.send("hello")
            assert await connection.recv() == "hello"
            await connection.wait_closed()

    play(story)


@websocket_uses
def test_a_websocket_client_that_leaves_gives_its_place_up(
    use: str, gate: Gate, mark: RejectIfDraining
) -> None:
    async def story() -> None:
        async with served(websocket_site(use, mark)) as port:
            gate.set_mode("queue")
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"GET / HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            await until(lambda: gate.waiting == 1)
            writer.close()
            await until(lambda: gate.waiting == 0)

    play(story)
    assert gate.left_total == 1


@websocket_uses
def test_where_a_server_cannot_refuse_a_handshake_the_websocket_is_closed(
    use: str, gate: Gate, mark: RejectIfDraining
) -> None:
    sent: list[Message] = []

    async def story() -> None:
        async def send(message: Message) -> None:
            sent.append(message)

        gate.set_mode("reject")
        scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b"", "subprotocols": []}
        await websocket_site(use, mark)(scope, saying({"type": "websocket.connect"}), send)

    play(story)
    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1013)]


# Listening while a request waits


def saying(*messages: Message) -> Receive:
    """A `receive` that says these, and then nothing."""
    left = list(messages)

    async def receive() -> Message:
        if left:
            return left.pop(0)
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    return receive


def body(content: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": content, "more_body": more}


def recording(served: list[str]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        served.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return app


async def post(app: ASGIApp, path: str, receive: Receive | None = None) -> None:
    async def send(message: Message) -> None:
        await asyncio.sleep(0)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    await app(scope, receive or saying(body(b"")), send)


def never() -> None:
    raise AssertionError("it hasn't left")


def test_what_was_heard_is_said_again_in_order_and_the_open_call_is_taken_over() -> None:
    async def story() -> None:
        messages: asyncio.Queue[Message] = asyncio.Queue()
        replay = Replay(messages.get, never)
        messages.put_nowait(body(b"1", more=True))
        messages.put_nowait(body(b"2", more=True))
        await turns()
        replay.stop()
        # as starlette's is_disconnected() does: a call that is given up loses nothing
        heard = [(await replay())["body"], (await replay())["body"]]
        given_up = asyncio.create_task(next_of(replay))
        await turns()
        given_up.cancel()
        await turns()
        messages.put_nowait(body(b"3", more=True))
        await turns()
        messages.put_nowait(body(b"4"))
        heard += [(await replay())["body"], (await replay())["body"]]
        assert heard == [b"1", b"2", b"3", b"4"]
        assert given_up.cancelled()

    play(story)


async def next_of(receive: Receive) -> Message:
    return await receive()


def test_no_more_than_some_is_buffered() -> None:
    for part in (b"x" * 1000, b""):

        async def story(part: bytes = part) -> None:
            taken = 0

            async def receive() -> Message:
                nonlocal taken
                taken += 1
                return body(part, more=True)

            replay = Replay(receive, never)
            await turns()
            assert taken * len(part) <= BUFFER_BYTES + 1000
            assert 1 < taken <= 1000
            for _ in range(taken):
                assert (await replay())["body"] == part
            assert taken < 1000
            await replay()
            assert taken > 1

        play(story)


def test_a_receive_that_never_waits_is_not_listened_to_for_ever() -> None:
    async def story() -> None:
        async def receive() -> Message:
            return body(b"")

        replay = Replay(receive, never)
        await turns()
        assert await replay() == body(b"")

    play(story)


def test_an_error_of_receive_comes_where_it_would_have_come() -> None:
    async def story() -> None:
        said = saying(body(b"1", more=True))
        failures = [False, True]

        async def receive() -> Message:
            if failures.pop(0):
                raise RuntimeError("too large")
            return await said()

        left: list[bool] = []
        replay = Replay(receive, lambda: left.append(True))
        await turns()
        assert (await replay())["body"] == b"1"
        with pytest.raises(RuntimeError, match="too large"):
            await replay()
        assert not left

    play(story)


def test_an_error_of_receive_that_nobody_asks_for_disturbs_nobody(gate: Gate, mark: RejectIfDraining) -> None:
    async def endpoint(_: Request) -> Response:
        return PlainTextResponse("passed")

    async def story() -> None:
        async def receive() -> Message:
            raise RuntimeError("too large")

        gate.set_mode("queue")
        request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
        task = asyncio.create_task(mark(endpoint)(request))
        del request
        await until(lambda: gate.waiting == 1)
        await turns()
        assert gate.waiting == 1
        gate.set_mode(None)
        assert (await task).body == b"passed"

    play(story)


def test_types(mark: RejectIfDraining) -> None:
    """What type checkers make of it; mypy reads this test."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    async def asynchronous(request: Request) -> PlainTextResponse:
        return PlainTextResponse()

    def synchronous(request: Request) -> Response:
        return Response()

    wrapped: ASGIApp = mark(app)
    first: Callable[[Request], Awaitable[Response]] = mark(asynchronous)
    second: Callable[[Request], Awaitable[Response]] = mark(synchronous)
    third: Callable[[WebSocket], Awaitable[None]] = mark(echo)
    routes = [Mount("/app", wrapped), Route("/1", first), Route("/2", second), WebSocketRoute("/3", third)]
    middleware = Starlette(routes=routes)
    middleware.add_middleware(mark)
    assert isinstance(mark(Starlette()), Callable)  # type: ignore[arg-type]

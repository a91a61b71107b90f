"""Single workers, without a master: each test plays it."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worker_harness import Bench, Client

from segue.handoff import relay
from segue.handoff.messages import HOT, NotifyKey, RecycleLimits, WorkerMode
from segue.handoff.notify import Notifier, NotifySocket
from segue.worker.telling import Telling

APP = """
import asyncio, os, sys, threading
import segue
GATE = os.environ.get("GATE")
hoard = []

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
    elif path == "/until":
        while not os.path.exists(scope["query_string"]):
            await asyncio.sleep(0.01)
        await respond(send, b"at last")
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
    elif path == "/held":  # answers when the file is there; what it does then keeps the loop until that is gone
        name = scope["query_string"].decode()
        while not os.path.exists(name):
            await asyncio.sleep(0.01)
        await respond(send, b"held")
        while os.path.exists(name):
            pass
    elif path == "/hoard":
        hoard.append(b"x" * int(scope["query_string"]))
        await respond(send, b"")
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


STACKS = [(http, loop) for http in ("httptools", "h11") for loop in ("uvloop", "asyncio")]


@pytest.mark.parametrize(("http", "loop"), STACKS)
@pytest.mark.parametrize("family", ["inet", "inet6", "unix"])
def test_keep_alive_connections_live_on_in_the_next_generation(
    tmp_path: Path, http: str, loop: str, family: str
) -> None:
    with Bench(tmp_path, APP, family) as bench:
        old = bench.spawn(http=http, loop=loop).wait_ready().activate()
        clients = [bench.client() for _ in range(60)]
        for client in clients[:40]:
            assert client.ask("/").headers["x-pid"] == str(old.pid)
        new = bench.spawn(http=http, loop=loop).wait_ready().activate()
        busy = clients[:5]
        for client in busy:
            client.send(b"GET /slow?0.2 HTTP/1.1\r\nHost: test\r\n\r\n")
        old.hand_over()
        for client in busy:
            answer = client.read()
            assert answer.text == "slow"
            assert "connection" not in answer.headers
        for client in clients:
            answer = client.ask("/again", b"body")
            assert answer.headers["x-pid"] == str(new.pid)
            assert answer.text == "POST /again body"
        status = old.status()
        assert (status.mode, status.connections, status.tasks, status.closed) == ("drained", 0, 0, 0)
        assert status.handed_over == new.status().adopted
        assert old.stop() == 0
        assert new.stop() == 0


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: t\r\n\r\n"
HOSTILE = (
    b"POST /one HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED)
    + SMUGGLED
    + b"POST /two HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"5\r\nGET /\r\n%x;x=y\r\n%b\r\n0\r\nX-Trailer: GET / HTTP/1.1\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
    + b"GET /three HTTP/1.1\r\nHost: t\r\n\r\nGET /four HTTP/1.1\r\nHost: t\r\n\r\n"
)


@pytest.mark.parametrize(("http", "loop"), STACKS)
def test_a_move_at_every_byte_of_a_hostile_stream_changes_no_answer(
    bench: Bench, http: str, loop: str
) -> None:
    one = bench.spawn(http=http, loop=loop).wait_ready().activate()
    other = bench.spawn(http=http, loop=loop).wait_ready()
    unmoved = bench.client()
    unmoved.send(HOSTILE)
    expected = [unmoved.read() for _ in range(4)]
    assert [answer.status for answer in expected] == [200] * 4
    expected_texts = [answer.text for answer in expected]
    assert [text.split()[1] for text in expected_texts] == ["/one", "/two", "/three", "/four"]
    # all splits travel at once, each on its own connection: one half before the move, one after
    clients = [bench.client() for _ in range(len(HOSTILE) + 1)]
    for split, client in enumerate(clients):
        client.send(HOSTILE[:split])
    for client in clients[len(HOSTILE) - 40 :]:
        client.read()  # by now the worker has read all that came before
    other.activate()
    one.hand_over(wait=False)
    for split, client in enumerate(clients):
        client.send(HOSTILE[split:])
        read = 1 if split >= len(HOSTILE) - 40 else 0
        assert [client.read().text for _ in range(4 - read)] == expected_texts[read:], split
    one.wait_for("X_SEGUE_STATE", "drained")
    assert one.status().closed == 0
    for client in clients:
        assert client.ask("/last").text == "GET /last "
    assert one.stop() == 0
    assert other.stop() == 0


def answered_early(client: Client) -> Client:
    """It has its answer, and its worker waits for the rest of the body."""
    client.send(
        b"POST /early HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED[:7]
    )
    assert client.read().text == "early"
    return client


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_a_request_answered_before_its_body_never_moves_and_is_told_with_its_next_answer(
    bench: Bench, http: str
) -> None:
    old = bench.spawn(http=http, spec={"idle_grace_s": 3600.0}).wait_ready().activate()
    answered_early(bench.client())
    late = answered_early(bench.client())
    new = bench.spawn(http=http).wait_ready().activate()
    old.hand_over(wait=False)
    while old.status().sending_s is None:
        pass
    late.send(SMUGGLED[7:])
    answer = late.ask("/next")
    assert answer.text == "GET /next "
    assert answer.headers["x-pid"] == str(old.pid)
    assert answer.headers["connection"] == "close"
    assert late.is_closed()
    while old.status().connections != 1:  # the one that is silent has its grace
        pass
    assert old.status().mode == "draining"
    assert new.status().adopted == 0
    assert old.stop() == 0
    assert new.stop() == 0


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_a_request_answered_before_its_body_is_closed_after_its_grace(bench: Bench, http: str) -> None:
    old = bench.spawn(http=http).wait_ready().activate()
    silent = answered_early(bench.client())
    new = bench.spawn(http=http).wait_ready().activate()
    old.hand_over(wait=False)
    assert silent.is_closed()
    old.wait_for("X_SEGUE_STATE", "drained")
    assert new.status().adopted == 0
    assert old.stop() == 0
    assert new.stop() == 0


def test_keep_alive_time_is_carried_over_three_handovers(bench: Bench) -> None:
    """Read from what the last one sends, which nobody takes."""
    first = bench.spawn(timeout_keep_alive=600).wait_ready().activate()
    idle, fresh, talking = bench.client(), bench.client(), bench.client()
    asked = time.monotonic()
    idle.ask()
    talking.ask()
    answered = time.monotonic()
    others = [bench.spawn(timeout_keep_alive=600).wait_ready() for _ in range(3)]
    moved = time.monotonic()
    for old, new in itertools.pairwise([first, *others]):
        new.activate()
        old.hand_over()
    asked_again = time.monotonic()
    talking.ask()
    others[-1].hand_over()
    ended = time.monotonic()
    left_s: dict[Any, float] = {}
    while (parcel := relay.receive(bench.relay_read)) is not None:
        for fd, milliseconds in zip(parcel.fds, parcel.header.keep_alive_ms, strict=True):
            with socket.socket(fileno=fd) as sock:
                left_s[sock.getpeername()] = milliseconds / 1000
    rounding_s = 0.05
    spent_s = 600 - left_s[idle.sock.getsockname()]
    assert moved - answered - rounding_s <= spent_s <= ended - asked + rounding_s
    # what had said nothing has no timer, as under uvicorn; what spoke again has a new one
    assert left_s[fresh.sock.getsockname()] == relay.NO_TIMER / 1000
    assert 0 <= 600 - left_s[talking.sock.getsockname()] <= ended - asked_again + rounding_s
    for worker in (first, *others):
        assert worker.stop() == 0


def test_a_connection_is_closed_when_what_is_left_of_its_keep_alive_time_is_over(bench: Bench) -> None:
    worker = bench.spawn(timeout_keep_alive=600).wait_ready()
    client = bench.client()
    accepted, _ = bench.listener.accept()
    sent = time.monotonic()
    assert relay.send(bench.relay_write, bench.info.name, [accepted.fileno()], [1500]) is None
    accepted.close()
    worker.activate()
    assert client.is_closed()
    assert time.monotonic() - sent > 1.4
    assert worker.stop() == 0


@pytest.mark.parametrize(("http", "loop"), STACKS)
def test_the_next_request_after_a_response_is_for_the_next_generation(
    bench: Bench, tmp_path: Path, http: str, loop: str
) -> None:
    """Also when it has come before the old one's loop could look at its connections again."""
    old = bench.spawn(http=http, loop=loop).wait_ready().activate()
    gate = tmp_path / "gate"
    client = bench.client()
    client.send(f"GET /held?{gate} HTTP/1.1\r\nHost: t\r\n\r\n".encode())
    while old.status().in_flight != 1:
        pass
    new = bench.spawn(http=http, loop=loop).wait_ready().activate()
    old.hand_over(wait=False)
    gate.touch()
    assert client.read().text == "held"
    client.send(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
    gate.unlink()
    assert client.read().headers["x-pid"] == str(new.pid)
    old.wait_for("X_SEGUE_STATE", "drained")
    assert old.stop() == 0
    assert new.stop() == 0


def test_a_background_task_outlives_the_move_of_its_connection(bench: Bench, tmp_path: Path) -> None:
    old = bench.spawn().wait_ready().activate()
    gate = tmp_path / "gate"
    client = bench.client()
    assert client.ask(f"/background?{gate}").text == "background"
    new = bench.spawn().wait_ready().activate()
    old.hand_over(wait=False)
    while (status := old.status()).connections:
        pass
    assert client.ask("/").headers["x-pid"] == str(new.pid)
    assert (status.mode, status.connections, status.tasks) == ("draining", 0, 1)
    gate.touch()
    old.wait_for("X_SEGUE_STATE", "drained")
    assert (tmp_path / "gate.done").exists()
    assert old.stop() == 0
    assert new.stop() == 0


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_nothing_is_lost_while_nobody_reads_the_relay(bench: Bench, http: str) -> None:
    old = bench.spawn(http=http).wait_ready().activate()
    clients = [bench.client() for _ in range(700)]
    for client in clients:
        client.ask()
    new = bench.spawn(http=http).wait_ready()
    # one descriptor a message fills the relay long before all are sent
    bench.relay_write.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    old.hand_over(wait=False)
    kept = 0
    for client in clients[:300]:
        client.send(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
    left = old.status().connections
    assert 0 < left < 700
    new.activate()
    for client in clients[:300]:
        kept += client.read().headers["x-pid"] == str(old.pid)
    old.wait_for("X_SEGUE_STATE", "drained")
    for client in clients:
        assert client.ask().headers["x-pid"] == str(new.pid)
    assert old.status().closed == 0
    assert old.stop() == 0
    assert new.stop() == 0


def test_a_draining_worker_can_be_activated_again(bench: Bench, tmp_path: Path) -> None:
    old = bench.spawn(spec={"idle_grace_s": 3600.0}).wait_ready().activate()
    streaming, talking, early = bench.client(), bench.client(), bench.client()
    early.send(b"POST /early HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\n")
    early.read()
    talking.send(f"GET /until?{tmp_path}/enough HTTP/1.1\r\nHost: t\r\n\r\n".encode())
    while old.status().in_flight != 1:
        pass
    old.hand_over(wait=False)
    assert old.command("drain/stop?mode=handover").mode == "active"
    (tmp_path / "enough").touch()
    assert talking.read().text == "at last"
    assert talking.ask("/state").text == "1 1 False False True"
    early.send(b"12345")
    assert "connection" not in early.ask("/").headers
    assert streaming.ask("/").headers["x-pid"] == str(old.pid)
    # and from drained
    new = bench.spawn().wait_ready().activate()
    old.hand_over()
    assert old.activate().status().mode == "active"
    new.hand_over()
    assert talking.ask("/state").text == "1 1 False False True"
    assert new.stop() == 0
    assert old.stop() == 0


def test_bad_commands_are_refused_with_what_is_known(bench: Bench) -> None:
    worker = bench.spawn().wait_ready()
    assert worker.call("POST", "/api/v1/hot/drain/start?mode=nonsense")[1]["known"] == [
        "handover",
        "reject",
        "queue",
    ]
    assert worker.call("POST", "/api/v1/hot/drain/start?mode=nonsense")[0] == 400
    assert worker.call("POST", "/api/v1/hot/drain/start?mode=handover&timeout=soon")[0] == 400
    assert worker.call("POST", "/api/v1/hot/stop?timeout=-1")[0] == 400
    status, body = worker.call("POST", "/api/v1/hot/reload")
    assert status == 409
    assert body["master"].endswith("/master")
    assert worker.call("GET", "/nothing")[0] == 404
    worker.activate()
    assert worker.command("drain/start?mode=reject").draining
    assert worker.status().mode == "active"
    assert worker.call("GET", "/readyz")[0] == 503
    assert not worker.command("drain/stop").draining
    assert worker.call("GET", "/readyz")[0] == 200
    assert worker.stop() == 0


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "import": (
        "import redis_that_is_not_there",
        {},
        "import of shop failed: ModuleNotFoundError: No module named 'redis_that",
    ),
    "syntax": ("def", {}, "import of shop failed: SyntaxError"),
    "exit": ("import sys; sys.exit(9)", {}, "import of shop failed: it called sys.exit(9)"),
    "attribute": ("", {}, "import of shop failed: AttributeError: module 'shop' has no attribute 'app'"),
    "factory": (
        "def app(): raise TypeError('no such option')",
        {"factory": True},
        "TypeError: no such option",
    ),
    "log": (
        "app = None",
        {"log_config": "/nowhere.yaml"},
        "log-config /nowhere.yaml can't be used: FileNotFoundError",
    ),
    "startup": (
        "async def app(scope, receive, send):\n await receive()\n raise RuntimeError('no database')",
        {},
        "start-up of the application failed: RuntimeError: no database",
    ),
    "reported": (
        (
            "async def app(scope, receive, send):\n await receive()\n"
            " await send({'type': 'lifespan.startup.failed', 'message': 'Traceback\\nOSError: no disk'})"
        ),
        {},
        "start-up of the application failed: OSError: no disk",
    ),
    "on": (
        "async def app(scope, receive, send):\n raise KeyError('lifespan')",
        {"lifespan": "on"},
        "start-up of the application failed: KeyError: 'lifespan'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_failed_start_says_where_and_why(tmp_path: Path, kind: str) -> None:
    code, options, reason = BROKEN[kind]
    with Bench(tmp_path, code or "other = 1") as bench:
        worker = bench.spawn(**options)
        said = worker.wait_for("X_SEGUE_FAILED")
        assert reason in said
        assert worker.wait() == 3
        assert said in worker.output
        if kind not in {"reported", "attribute"}:
            assert "Traceback" in worker.output or kind == "on"


def test_an_application_without_lifespan_is_served(tmp_path: Path) -> None:
    app = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""
    with Bench(tmp_path, app) as bench:
        worker = bench.spawn().wait_ready().activate()
        assert bench.client().ask().text == "ok"
        assert worker.stop() == 0


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/boom", "warm-up of /boom failed: RuntimeError: boom"),
        ("/five", "warm-up of /five failed: it answered 503"),
    ],
)
def test_a_failed_warm_up_is_a_failed_start_and_the_application_is_shut_down(
    bench: Bench, path: str, reason: str
) -> None:
    worker = bench.spawn(spec={"warm_up": ("/fine", path)})
    assert worker.wait_for("X_SEGUE_FAILED") == reason
    assert worker.wait() == 3
    assert "application ends" in worker.output


def test_a_check_starts_and_ends_the_application_without_serving(bench: Bench) -> None:
    worker = bench.spawn(spec={"check_only": True, "warm_up": ("/fine",)})
    assert worker.wait() == 0
    assert "application ends" in worker.output


@pytest.mark.parametrize("ws", ["websockets-sansio", "websockets"])
def test_websockets_end_with_1012_at_the_deadline_and_busy_requests_are_answered(
    bench: Bench, ws: str
) -> None:
    old = bench.spawn(ws=ws).wait_ready().activate()
    socket, slow = bench.client(), bench.client()
    socket.send(
        b"GET /ws HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert socket.read().status == 101
    slow.send(b"GET /slow?60 HTTP/1.1\r\nHost: t\r\n\r\n")
    while old.status().in_flight != 1:
        pass
    old.hand_over(timeout=0.5)
    assert socket.file.read(4) == b"\x88\x02" + (1012).to_bytes(2, "big")
    assert slow.read().status == 500
    assert old.status().closed >= 1
    assert old.stop() == 0


def test_a_stop_answers_what_is_busy_and_closes_what_is_idle(bench: Bench, tmp_path: Path) -> None:
    worker = bench.spawn().wait_ready().activate()
    idle, busy, stream = bench.client(), bench.client(), bench.client()
    idle.ask()
    busy.send(f"GET /until?{tmp_path}/enough HTTP/1.1\r\nHost: t\r\n\r\n".encode())
    stream.send(b"GET /stream HTTP/1.1\r\nHost: t\r\n\r\n")
    while worker.status().in_flight != 2:
        pass
    assert worker.command("stop?timeout=60").mode == "stopping"
    worker.wait_for("STOPPING")
    (tmp_path / "enough").touch()
    answer = busy.read()
    assert (answer.text, answer.headers["connection"]) == ("at last", "close")
    assert stream.read().text.endswith("xend")
    assert idle.is_closed()
    assert worker.wait() == 0
    assert not Path(worker.control).exists()


def test_a_stop_that_had_to_cut_says_so(bench: Bench) -> None:
    worker = bench.spawn().wait_ready().activate()
    client = bench.client()
    client.send(b"GET /slow?60 HTTP/1.1\r\nHost: t\r\n\r\n")
    while worker.status().in_flight != 1:
        pass
    assert worker.stop(timeout=0.3) == 1


def test_sigterm_is_a_graceful_stop_and_what_is_for_the_master_is_nothing(bench: Bench) -> None:
    import signal

    worker = bench.spawn().wait_ready().activate()
    for number in (
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGTTIN,
        signal.SIGTTOU,
    ):
        worker.process.send_signal(number)
        assert worker.status().mode == "active"
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 0


def test_a_worker_that_waits_ends_with_its_master_and_one_that_serves_goes_on(
    bench: Bench, tmp_path: Path
) -> None:
    active = bench.spawn().wait_ready().activate()
    draining = bench.spawn().wait_ready().activate()
    waiting = bench.spawn().wait_ready()
    client = bench.client()
    client.send(f"GET /until?{tmp_path}/enough HTTP/1.1\r\nHost: t\r\n\r\n".encode())
    while active.status().in_flight + draining.status().in_flight != 1:
        pass
    leaving, staying = (draining, active) if draining.status().in_flight else (active, draining)
    leaving.hand_over(wait=False)
    bench.lose_master()
    assert waiting.wait() == 4
    (tmp_path / "enough").touch()
    assert client.read().text == "at last"
    assert leaving.wait() == 0
    assert client.ask().headers["x-pid"] == str(staying.pid)
    assert staying.status().mode == "active"
    assert staying.stop() == 0


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_small_descriptor_limits_lose_no_connection(bench: Bench, http: str) -> None:
    old = bench.spawn(http=http, prlimit="256").wait_ready().activate()
    clients = [bench.client() for _ in range(250)]
    for client in clients[:150]:
        assert client.ask().status == 200
    for client in clients[150:]:
        client.send(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
    assert old.status().connections <= 256
    new = [bench.spawn(http=http, prlimit="256").wait_ready().activate() for _ in range(2)]
    old.hand_over()
    for client in clients[150:]:
        assert client.read().status == 200
    pids = {client.ask().headers["x-pid"] for client in clients}
    assert pids == {str(worker.pid) for worker in new}
    assert sum(worker.status().connections for worker in new) == 250
    for worker in [old, *new]:
        assert worker.stop() == 0


def test_health_and_the_hot_endpoints_stand_on_the_public_listener_if_asked_for(bench: Bench) -> None:
    worker = bench.spawn(spec={"health_path": "/health", "token": "secret"}).wait_ready().activate()
    client = bench.client()
    assert client.ask("/health").status == 200
    assert client.ask("/healthy").text == "GET /healthy "
    worker.command("drain/start?mode=reject")
    assert client.ask("/health").status == 503
    answer = client.ask("/api/v1/hot/status")
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    client.send(b"GET /api/v1/hot/status HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer secret\r\n\r\n")
    assert client.read().status == 503  # there is no master
    assert client.ask("/other").status == 200
    assert worker.stop() == 0


def test_the_environment_is_clean_before_the_application_is_imported(tmp_path: Path) -> None:
    app = """
import os
bad = [key for key in os.environ if key.startswith(("LISTEN_", "WATCHDOG_", "SEGUE_FDS", "NOTIFY"))]
assert not bad, bad
for fd in range(3, 11):
    assert not os.get_inheritable(fd)
async def app(scope, receive, send):
    raise KeyError
"""
    with Bench(tmp_path, app) as bench:
        worker = bench.spawn(
            environ={"WATCHDOG_USEC": "1", "NOTIFY_SOCKET": "/x", "WATCHDOG_PID": "1"}
        ).wait_ready()
        assert worker.stop() == 0


def test_boot_output_reaches_stdout_and_stays_small(tmp_path: Path) -> None:
    import os

    app = """
import os, time
for _ in range(60):
    print("x" * 100_000)
    while os.fstat(1).st_blocks * 512 > 2 << 20:  # until what is old has been given back
        time.sleep(0.01)
print("the end of the import")
async def app(scope, receive, send):
    raise KeyError
"""
    with Bench(tmp_path, app) as bench:
        worker = bench.spawn().wait_ready()
        assert os.fstat(worker._output).st_blocks * 512 < 3 << 20
        # a worker that is kept from its work for a second is ready before all of it has been passed on
        while b"the end of the import" not in (text := os.pread(bench.stdout, 8 << 20, 0)):
            pass
        assert len(text) < 4 << 20
        assert worker.stop() == 0


def test_a_stdout_that_nobody_reads_does_not_hang_readiness(bench: Bench) -> None:
    os.close(bench.stdout)
    reader, bench.stdout = os.pipe()
    os.set_blocking(bench.stdout, False)
    try:
        while True:
            os.write(bench.stdout, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(bench.stdout, True)
    worker = bench.spawn(log_level="critical", dev=False).wait_ready().activate()
    assert bench.client().ask("/state").status == 200
    os.close(reader)
    worker.stop()


def test_a_worker_asks_to_be_recycled_after_its_requests(bench: Bench) -> None:
    worker = bench.spawn(spec={"recycle": RecycleLimits(requests=3)}).wait_ready().activate()
    client = bench.client()
    for _ in range(4):
        client.ask()
    assert worker.wait_for("X_SEGUE_RECYCLE").endswith("(limit-max-requests)")
    assert client.ask().status == 200
    assert worker.stop() == 0


def test_a_worker_asks_to_be_recycled_when_it_uses_too_much_memory(bench: Bench) -> None:
    limits = RecycleLimits(rss_bytes=180 << 20)
    worker = bench.spawn(spec={"recycle": limits}).wait_ready().activate()
    client = bench.client()
    assert client.ask("/hoard?200000000").status == 200
    assert worker.wait_for("X_SEGUE_RECYCLE").endswith("MiB (max-worker-rss)")
    assert worker.stop() == 0


def test_a_memory_limit_below_what_a_worker_starts_with_is_put_aside_and_said(bench: Bench) -> None:
    limits = RecycleLimits(rss_bytes=1 << 20, age_s=2.0)
    worker = bench.spawn(spec={"recycle": limits}).wait_ready().activate()
    assert worker.wait_for("X_SEGUE_RECYCLE").endswith("(max-worker-age)")  # the other came first, if at all
    assert "event=max-worker-rss-ignored" in os.pread(bench.stdout, 1 << 16, 0).decode()
    assert worker.stop() == 0


def test_a_worker_that_does_not_serve_asks_for_nothing(bench: Bench) -> None:
    worker = bench.spawn(spec={"recycle": RecycleLimits(age_s=0.1)}).wait_ready()
    for _ in range(3):
        worker.messages.clear()
        worker.wait_for("READY")
    assert all("X_SEGUE_RECYCLE" not in message for message in worker.messages)
    worker.activate()
    worker.wait_for("X_SEGUE_RECYCLE")
    assert worker.stop() == 0


def test_the_private_socket_serves_the_application_from_ready_to_the_end(bench: Bench) -> None:
    path = bench.directory / "probe"
    worker = bench.spawn(spec={"probe_path": str(path)}, limit_concurrency=50).wait_ready()
    assert worker.status().probe == str(path)
    assert path.stat().st_mode & 0o777 == 0o600
    probe = bench.client(f"unix:{path}")
    assert probe.ask("/state").text == "1 1 False False False"  # staged: not activated
    worker.activate()
    assert probe.ask("/echo", b"body").text == "POST /echo body"
    public = bench.client()
    assert public.ask("/hello").status == 200
    status = worker.status()
    assert (status.connections, status.requests_total) == (1, 1)  # what is private does not count
    public.close()
    worker.hand_over()  # nor does it keep the worker from being drained
    assert probe.ask("/state").text == "1 1 True True False"
    assert worker.command("park?for=60").mode == "parked"
    assert probe.ask("/hello").status == 200
    worker.command("drain/stop")
    probe.send(b"GET /stream HTTP/1.1\r\nHost: test\r\n\r\n")
    assert probe.file.readline().startswith(b"HTTP/1.1 200")  # it has begun
    worker.command("stop?timeout=60")
    assert probe.file.read().endswith(b"3\r\nend\r\n0\r\n\r\n")  # and comes to its end
    assert worker.wait() == 0
    assert not path.exists()


@pytest.mark.parametrize(("http", "loop"), STACKS)
def test_a_parked_worker_is_active_again_at_once(bench: Bench, http: str, loop: str) -> None:
    old = bench.spawn(http=http, loop=loop).wait_ready().activate()
    client = bench.client()
    assert client.ask().headers["x-pid"] == str(old.pid)
    new = bench.spawn(http=http, loop=loop).wait_ready().activate()
    old.hand_over()
    assert old.command("park?for=60").mode == "parked"
    old.wait_for("X_SEGUE_STATE", "parked")
    assert "WATCHDOG" in old.messages[-1]  # it only lives
    assert client.ask().headers["x-pid"] == str(new.pid)
    old.activate()  # that it is milliseconds is measured by the bench
    new.hand_over()
    assert client.ask().headers["x-pid"] == str(old.pid)
    assert client.ask("/state").text == "1 1 False False True"
    for worker in (old, new):
        assert worker.stop() == 0


def test_only_a_drained_worker_can_be_parked(bench: Bench) -> None:
    worker = bench.spawn().wait_ready().activate()
    status, problem = worker.call("POST", f"{HOT}/park?for=60")
    assert (status, problem["mode"]) == (409, "active")
    worker.hand_over()
    assert worker.command("park?for=60").mode == "parked"
    assert worker.command("drain/stop").mode == "active"
    assert worker.stop() == 0


def test_a_parked_worker_outlives_its_master_for_its_time_only(bench: Bench) -> None:
    worker = bench.spawn().wait_ready().activate()
    worker.hand_over()
    worker.command("park?for=1")
    bench.lose_master()
    assert worker.wait() == 0


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_tls_connections_are_told_and_closed_when_silent(bench: Bench, tmp_path: Path, http: str) -> None:
    import ssl

    import trustme

    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "pem"))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    options: dict[str, Any] = {"http": http, "ssl_certfile": str(tmp_path / "pem")}
    old = bench.spawn(**options).wait_ready().activate()
    talking, silent = bench.client(), bench.client()
    for client in (talking, silent):
        client.file.close()
        client.sock = trusting.wrap_socket(client.sock, server_hostname="localhost")
        client.file = client.sock.makefile("rb")
        assert "connection" not in client.ask().headers
    talking.send(f"GET /until?{tmp_path}/enough HTTP/1.1\r\nHost: t\r\n\r\n".encode())
    while old.status().in_flight != 1:
        pass
    new = bench.spawn(**options).wait_ready().activate()
    old.hand_over(wait=False)
    (tmp_path / "enough").touch()
    answer = talking.read()
    assert (answer.text, answer.headers["connection"]) == ("at last", "close")
    talking.close()
    assert silent.sock.recv(1) == b""
    old.wait_for("X_SEGUE_STATE", "drained")
    assert old.status().handed_over == 0
    for worker in (old, new):
        assert worker.stop() == 0


def test_connections_of_a_listener_that_goes_away_are_told_with_their_next_answer(bench: Bench) -> None:
    old = bench.spawn(spec={"idle_grace_s": 3600.0}).wait_ready().activate()
    talking = bench.client()
    talking.ask()
    old.hand_over(wait=False, listeners="another")
    while old.status().sending_s is None:
        pass
    assert talking.ask().headers["connection"] == "close"
    assert talking.is_closed()
    old.wait_for("X_SEGUE_STATE", "drained")
    assert old.status().handed_over == 0
    assert old.stop() == 0


def test_connections_of_a_listener_that_goes_away_are_closed_when_they_are_silent(bench: Bench) -> None:
    old = bench.spawn().wait_ready().activate()
    silent = bench.client()
    silent.ask()
    old.hand_over(wait=False, listeners="another")
    assert silent.is_closed()
    old.wait_for("X_SEGUE_STATE", "drained")
    assert old.status().handed_over == 0
    assert old.stop() == 0


def test_a_heartbeat_that_found_no_room_is_repeated_soon(tmp_path: Path) -> None:
    """A master that stood still would else take a worker for silent whose message was not taken."""
    receiver = NotifySocket(str(tmp_path / "n"))
    sender = Notifier(receiver.path)
    while sender.send({"filler": 1}):
        pass
    assert sender.full

    async def tell() -> None:
        telling = Telling(receiver.path, heartbeat_s=3600.0)
        telling.mode(WorkerMode.ACTIVE)
        assert {tuple(each.fields) for each in receiver.receive()} == {("filler",)}
        readable = asyncio.Event()
        asyncio.get_running_loop().add_reader(receiver.fileno(), readable.set)
        async with asyncio.timeout(30):
            await readable.wait()
        [told] = receiver.receive()
        assert told.fields["WATCHDOG"] == "1"
        telling.close()

    asyncio.run(tell())
    sender.close()
    receiver.close()


def test_why_a_start_has_failed_is_told_though_the_master_stands_still_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = NotifySocket(str(tmp_path / "n"))
    beats = Notifier(receiver.path)
    while beats.send({"WATCHDOG": 1}):
        pass
    assert beats.full
    pauses: list[float] = []
    heard: list[dict[str, str]] = []

    def passes(seconds: float) -> None:
        pauses.append(seconds)
        if sum(pauses) >= 10.0:
            heard.extend(each.fields for each in receiver.receive())

    monkeypatch.setattr(time, "sleep", passes)
    telling = Telling(receiver.path, 3.0)
    telling.failed("no database")
    heard += [each.fields for each in receiver.receive()]
    assert [each[NotifyKey.FAILED] for each in heard if NotifyKey.FAILED in each] == ["no database"]
    receiver.close()
    pauses.clear()
    telling.failed("no database")  # nobody will ever read it
    assert sum(pauses) < 2.0
    telling.close()
    beats.close()

"""What a worker counts: each response once, when it is out whole, by status class and duration."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h2.config
import h2.connection
import pytest
from worker_harness import Bench, Client, Worker

from segue.handoff.figures import read
from segue.handoff.messages import LATENCY_BOUNDS_S, Counts, WorkerStatus

APP = """
import asyncio, gc, os, sys
import segue
FIFO = os.environ.get("FIFO")

async def respond(send, status=200, body=b"done"):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

async def marked(scope, receive, send):
    await respond(send)

marked = segue.reject_if_draining(marked)

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": kind + ".complete"})
            if kind == "lifespan.shutdown":
                return
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        return
    name, _, value = scope["path"][1:].partition("/")
    if name == "status":
        await respond(send, int(value))
    elif name == "raise":
        raise RuntimeError("as asked")
    elif name == "too-short":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": b"short"})
    elif name == "sleep":
        await asyncio.sleep(float(value))
        await respond(send)
    elif name == "read":
        more = True
        while more:
            more = (await receive())["more_body"]
        await respond(send)
    elif name == "wait":
        await asyncio.to_thread(lambda: open(FIFO).read())
        await respond(send)
    elif name == "stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(int(value)):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        if value == "1":
            while (await receive())["type"] != "http.disconnect":
                pass
            with open(FIFO, "w") as fifo:
                fifo.write("it has left")
        await send({"type": "http.response.body", "body": b""})
    elif name == "marked":
        await marked(scope, receive, send)
    elif name == "protocols":
        if value == "forget":
            gc.disable()
        names = [type(each).__name__ for each in gc.get_objects()]
        await respond(send, body=b"%d" % names.count(os.environ["PROTOCOL"]))
    elif name == "cycle":
        found = [module.RequestResponseCycle for key, module in sys.modules.items() if key.endswith("_impl")
                 and hasattr(module, "RequestResponseCycle")]
        await respond(send, body=repr([len(each.__mro__) for each in found]).encode())
"""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path, APP) as bench:
        yield bench


@pytest.fixture(params=["httptools", "h11", "zttp"])
def worker(bench: Bench, request) -> Worker:
    return bench.spawn(http=request.param, spec={"health_path": "/healthz"}).wait_ready().activate()


def counts(worker: Worker) -> Counts:
    found = worker.status().counts
    assert found is not None
    return found


def wait_until(worker: Worker, holds: Callable[[WorkerStatus], bool]) -> WorkerStatus:
    """For what the worker learns from the network, of which no message tells."""
    deadline = time.monotonic() + 20
    while not holds(status := worker.status()):
        assert time.monotonic() < deadline, status
        select.select([], [], [], 0.01)
    return status


def upgrade(client: Client) -> None:
    client.send(
        b"GET /ws HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert client.read().status == 101


def test_each_response_is_counted_once_by_its_class(bench, worker) -> None:
    client = bench.client()
    for status in (200, 201, 203, 302, 404, 404, 404, 503):
        assert client.ask(f"/status/{status}").status == status
    assert client.ask("/healthz").status == 200
    assert client.ask("/raise").status == 500
    found = counts(worker)
    assert found.responses == {"1xx": 0, "2xx": 4, "3xx": 1, "4xx": 3, "5xx": 2}
    assert found.rejected == found.aborted == found.websockets == 0
    assert sum(found.latency) == found.requests == 10
    assert (found.accepted, found.adopted) == (1, 0)


def test_how_long_a_response_took_is_in_its_bucket(bench, worker) -> None:
    client = bench.client()
    began = time.monotonic()
    client.ask("/sleep/0.06")
    found = counts(worker)
    # Not before: the worker stops its watch after the bytes are written, and the client may have read them by then.
    most = time.monotonic() - began
    bucket = next(place for place, count in enumerate(found.latency) if count)
    assert LATENCY_BOUNDS_S[bucket - 1] < found.latency_s <= LATENCY_BOUNDS_S[bucket]
    assert 0.06 <= found.latency_s <= most


def test_a_stream_counts_when_it_has_ended(bench, worker) -> None:
    client = bench.client()
    client.ask("/stream/100")
    assert counts(worker).responses["2xx"] == 1


def test_pipelined_requests_count_one_by_one(bench, worker) -> None:
    client = bench.client()
    paths = ("/sleep/0.05", "/status/404", "/status/302", "/status/200")
    client.send(b"".join(f"GET {path} HTTP/1.1\r\nHost: t\r\n\r\n".encode() for path in paths))
    assert [client.read().status for _ in paths] == [200, 404, 302, 200]
    assert counts(worker).responses == {"1xx": 0, "2xx": 2, "3xx": 1, "4xx": 1, "5xx": 0}
    assert counts(worker).aborted == 0


def test_an_interim_100_is_no_response(bench, worker) -> None:
    client = bench.client()
    client.send(b"POST /read HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
    assert client.read().status == 100
    client.send(b"body")
    assert client.read().status == 200
    assert counts(worker).responses == {"1xx": 0, "2xx": 1, "3xx": 0, "4xx": 0, "5xx": 0}


def test_an_answer_before_the_body_counts(bench, worker) -> None:
    client = bench.client()
    client.send(b"POST /status/413 HTTP/1.1\r\nHost: t\r\nContent-Length: 1000000\r\n\r\n")
    assert client.read().status == 413
    assert counts(worker).responses["4xx"] == 1


def test_what_is_no_http_counts_as_4xx_and_takes_no_time(bench, worker) -> None:
    client = bench.client()
    client.send(b"\x16\x03\x01 nonsense\r\n\r\n")
    assert client.read().status == 400
    found = counts(worker)
    assert (found.responses["4xx"], sum(found.latency), found.aborted) == (1, 0, 0)


def test_a_client_that_leaves_in_the_middle_is_no_response(bench, tmp_path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for http in ("httptools", "h11"):
        worker = bench.spawn(http=http, environ={"FIFO": str(tmp_path / "fifo")}).wait_ready().activate()
        client = bench.client()
        client.send(b"GET /stream/1 HTTP/1.1\r\nHost: t\r\n\r\n")
        client.sock.recv(100)
        assert counts(worker).aborted == 0
        client.close()
        assert (tmp_path / "fifo").read_text() == "it has left"
        status = wait_until(worker, lambda status: status.tasks == 0 and not status.connections)
        assert status.counts is not None
        assert (status.counts.aborted, status.responses["2xx"], status.in_flight) == (1, 0, 0)
        assert worker.stop() == 0


def test_an_application_that_breaks_off_gives_no_response(bench, worker) -> None:
    client = bench.client()
    client.send(b"GET /too-short HTTP/1.1\r\nHost: t\r\n\r\n")
    while client.sock.recv(1000):
        pass
    found = counts(worker)
    assert (found.responses["2xx"], found.responses["5xx"], found.aborted) == (0, 0, 1)


def test_what_segue_refuses_is_told_apart_from_the_applications_errors(bench, worker) -> None:
    client = bench.client()
    assert client.ask("/marked", b"").status == 200
    worker.command("drain/start?mode=reject")
    assert client.ask("/marked", b"").status == 503
    assert client.ask("/healthz").status == 503
    assert client.ask("/status/503").status == 503
    status = worker.status()
    assert (status.responses["5xx"], status.rejected) == (1, 2)
    assert status.counts is not None
    assert status.counts.refused == 1
    assert sum(status.counts.latency) == 4


@pytest.mark.parametrize("ws", ["websockets-sansio", "websockets"])
@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_websockets_have_a_count_of_their_own(bench, http, ws) -> None:
    worker = bench.spawn(http=http, ws=ws).wait_ready().activate()
    clients = [bench.client(), bench.client()]
    for client in clients:
        upgrade(client)
    status = worker.status()
    assert status.counts is not None
    assert (status.websockets, status.counts.websockets) == (2, 2)
    assert (sum(status.responses.values()), status.counts.aborted) == (0, 0)
    clients[0].sock.close()
    clients[0].file.close()
    wait_until(worker, lambda status: status.websockets == 1)
    assert counts(worker).websockets == 2


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_a_response_that_ends_during_a_handover_counts(bench, tmp_path, http) -> None:
    os.mkfifo(tmp_path / "fifo")
    environ = {"FIFO": str(tmp_path / "fifo")}
    old = bench.spawn(http=http, environ=environ).wait_ready().activate()
    client = bench.client()
    client.send(b"GET /wait HTTP/1.1\r\nHost: t\r\n\r\n")
    wait_until(old, lambda status: status.in_flight == 1)
    new = bench.spawn(http=http, environ=environ).wait_ready().activate()
    old.hand_over(wait=False)
    (tmp_path / "fifo").write_text("go on")
    assert client.read().status == 200
    old.wait_for("X_SEGUE_STATE", "drained")
    found = counts(old)
    assert (found.responses["2xx"], found.aborted, found.handed_over) == (1, 0, 1)
    assert client.ask("/status/200").status == 200
    found = counts(new)
    assert (found.responses["2xx"], found.aborted, found.adopted) == (1, 0, 1)


def test_the_figures_are_written_down_and_outlive_the_worker(bench, tmp_path) -> None:
    path = str(tmp_path / "g1w1.figures")
    worker = bench.spawn(spec={"figures_path": path}).wait_ready().activate()
    client = bench.client()
    client.ask("/status/404")
    found = wait_until(
        worker, lambda _: (found := read(path)) is not None and found.counts.responses["4xx"] == 1
    )
    assert found.connections == 1
    client.ask("/status/404")
    client.close()
    assert worker.stop() == 0
    left = read(path)
    assert left is not None
    assert (left.pid, left.mode, left.connections) == (worker.pid, "stopping", 0)
    assert left.counts.responses["4xx"] == 2


def test_figures_that_cannot_be_written_are_said_to_be_and_hurt_nobody(bench, tmp_path) -> None:
    worker = bench.spawn(spec={"figures_path": str(tmp_path / "nowhere" / "figures")}).wait_ready().activate()
    assert "event=figures-not-written" in worker.output
    assert bench.client().ask("/status/200").status == 200
    os.symlink("/dev/full", tmp_path / "g2w1.figures")
    assert read(str(tmp_path / "g2w1.figures")) is None


def test_without_request_metrics_uvicorn_is_as_it_is(bench) -> None:
    worker = bench.spawn(spec={"request_metrics": False}).wait_ready().activate()
    client = bench.client()
    assert client.ask("/cycle").text == "[2]"
    upgrade(bench.client())
    found = counts(worker)
    assert (found.responses, found.latency, found.aborted, found.websockets) == ({}, (), 0, 0)
    assert found.requests == 1
    counted = bench.spawn().wait_ready()
    worker.hand_over(wait=False)
    counted.activate()
    assert bench.client().ask("/cycle").text == "[3]"


@pytest.mark.parametrize(
    ("http", "protocol"),
    [("httptools", "HttpToolsProtocol"), ("h11", "H11Protocol"), ("zttp", "ZttpProtocol")],
)
def test_a_connection_that_has_gone_needs_no_garbage_collector(bench, http, protocol) -> None:
    found = []
    for metrics in (False, True):
        with Bench(bench.app_dir, APP) as own:
            environ = {"PROTOCOL": protocol}
            worker = own.spawn(http=http, environ=environ, spec={"request_metrics": metrics}).wait_ready()
            worker.activate()
            asking = own.client()
            asking.ask("/protocols/forget")
            for _ in range(20):
                client = own.client()
                client.ask("/status/200")
                client.close()
            wait_until(worker, lambda status: status.connections == 1)
            found.append(int(asking.ask("/protocols").text))
            assert worker.stop() == 0
    assert found[1] <= found[0]


def test_http2_streams_count_and_so_does_one_that_is_reset(bench) -> None:
    worker = bench.spawn(http="zttp", http2=True).wait_ready().activate()
    client = bench.client()
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    connection.initiate_connection()
    ended = 0

    def ask(path: str) -> int:
        stream = connection.get_next_available_stream_id()
        headers = [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", "t")]
        connection.send_headers(stream, headers, end_stream=True)
        client.send(connection.data_to_send())
        return stream

    ask("/status/404")
    ask("/status/200")
    hanging = ask("/sleep/1000")
    while ended < 2:
        ended += sum(
            type(event).__name__ == "StreamEnded"
            for event in connection.receive_data(client.sock.recv(65536))
        )
    wait_until(worker, lambda status: status.in_flight == 1)
    connection.reset_stream(hanging)
    client.send(connection.data_to_send())
    status = wait_until(worker, lambda status: status.in_flight == 0)
    assert status.counts is not None
    assert status.responses == {"1xx": 0, "2xx": 1, "3xx": 0, "4xx": 1, "5xx": 0}
    assert status.counts.aborted == 1


def test_a_protocol_that_cannot_be_counted_is_served_and_said_to_be(bench, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "import asyncio\n"
        "class Mine(asyncio.Protocol):\n"
        "    def __init__(self, config, server_state, app_state, _loop=None):\n"
        "        self.state, self.transport = server_state, None\n"
        "    def connection_made(self, transport):\n"
        "        self.transport = transport\n"
        "        self.state.connections.add(self)\n"
        "    def connection_lost(self, exc):\n"
        "        self.state.connections.discard(self)\n"
        "    def data_received(self, data):\n"
        "        self.transport.write(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nme')\n"
        "    def shutdown(self):\n"
        "        self.transport.close()\n"
    )
    worker = bench.spawn(http="mine:Mine").wait_ready().activate()
    assert bench.client().ask("/").text == "me"
    assert counts(worker).responses == {}
    assert "event=not-counted" in worker.output


def test_the_event_loops_lag_is_seen(tmp_path) -> None:
    with Bench(
        tmp_path,
        "import time\nasync def app(scope, receive, send):\n    time.sleep(float(scope['path'][1:]))\n",
    ) as own:
        worker = own.spawn(lifespan="off").wait_ready().activate()
        client = own.client()
        client.send(b"GET /1.2 HTTP/1.1\r\nHost: t\r\n\r\n")
        client.read()
        assert wait_until(worker, lambda status: status.loop_lag_s > 0.5).loop_lag_s < 20

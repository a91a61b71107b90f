"""Rare ways to be served and to be stopped: HTTP/2, other protocols, deadlines, and what a reload reads again."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import ssl
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import pytest
import trustme
from scenario import DEADLINE_S, HOT, Client, NotStarted, Segue, supervised, unix_call
from uvicorn.protocols.http.zttp_h2_impl import ZttpH2Protocol

from segue.worker.uvicorn_internals import is_multiplexed

PATIENT = ("--http", "zttp", "--http2")


def alone(master: Segue) -> None:
    """Wait until the old generations have ended."""
    master.wait_status(lambda s: len(s["generations"]) == 1)


# What a reload reads again


def test_a_reload_reads_the_env_file_again(application, tmp_path) -> None:
    variables = tmp_path / "shop.env"
    variables.write_text("SHOP_BROKER=one\n")
    code = """
        import os
        async def app(scope, receive, send):
            if scope["type"] == "http":
                body = os.environ.get("SHOP_BROKER", "none").encode()
                headers = [(b"content-length", str(len(body)).encode())]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": body})
    """
    with (
        supervised("shop:app", "--env-file", str(variables), cwd=application(code=code)) as master,
        Client(master.port) as client,
    ):
        assert client.get("/")[2] == b"one"
        variables.write_text("SHOP_BROKER=two\n")
        master.reload("--wait", "drained")
        assert client.get("/")[2] == b"two"
        variables.unlink()
        gone = master.command("reload")
        assert gone.returncode == 1
        assert str(variables) in gone.stderr
        assert client.get("/")[2] == b"two"
        master.stop()


def test_a_reload_reads_the_log_configuration_again(application, tmp_path) -> None:
    configuration = tmp_path / "log.json"

    def write(name: str, level: str = "INFO") -> Path:
        log: Path = tmp_path / f"{name}.log"
        handler = {"class": "logging.FileHandler", "filename": str(log), "formatter": "plain"}
        configuration.write_text(
            json.dumps(
                {
                    "version": 1,
                    "disable_existing_loggers": False,
                    "formatters": {"plain": {"format": f"{name} %(message)s"}},
                    "handlers": {"file": handler},
                    "loggers": {"uvicorn.access": {"handlers": ["file"], "level": level}},
                }
            )
        )
        return log

    first = write("first")
    with (
        supervised("shop:app", "--log-config", str(configuration), cwd=application("1")) as master,
        Client(master.port) as client,
    ):
        client.get("/one")
        assert "/one" in first.read_text()
        second = write("second")
        master.reload("--wait", "drained")
        client.get("/two")
        assert "/two" not in first.read_text()
        assert second.read_text().startswith("second ")
        assert "/two" in second.read_text()
        write("third", level="LOUD")
        refused = master.command("reload")
        assert refused.returncode == 1
        assert "LOUD" in refused.stderr
        client.get("/three")
        assert "/three" in second.read_text()
        master.stop()


def test_a_reload_reads_the_token_file_again(application, tmp_path) -> None:
    token_file = tmp_path / "token"

    def status(port: int, token: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        try:
            connection.request("GET", f"{HOT}/status", headers={"Authorization": f"Bearer {token}"})
            return connection.getresponse().status
        finally:
            connection.close()

    old, new = "the-first-token-0123456789-abcdef", "the-second-token-0123456789-abcdef"
    token_file.write_text(old)
    token_file.chmod(0o600)
    with supervised("shop:app", "--token-file", str(token_file), cwd=application("1")) as master:
        port = master.port
        assert (status(port, old), status(port, new)) == (200, 401)
        token_file.write_text(new)
        master.reload("--wait", "drained")
        assert (status(port, old), status(port, new)) == (401, 200)
        token_file.unlink()
        refused = master.command("reload")
        assert refused.returncode == 1
        assert str(token_file) in refused.stderr
        assert (status(port, old), status(port, new)) == (401, 200)
        master.stop()


def test_worker_count_timeouts_and_warm_up_apply_with_a_reload(application) -> None:
    directory = application("1")
    settings = directory / "segue.toml"
    settings.write_text('workers = 1\nready-timeout = 60\nwarm-up = ["/"]\n')
    with supervised("shop:app", cwd=directory) as master, Client(master.port) as client:
        settings.write_text(
            'workers = 2\nready-timeout = 50\nwarm-up = ["/", "/work?ms=1"]\ndrain-timeout = 1\n'
        )
        application("2")
        master.reload("--wait", "drained")
        assert len(master.worker_pids()) == 2
        running = master.call("GET", f"{HOT}/config")[1]
        assert "drain-timeout" in json.dumps(running) or "drain_timeout" in json.dumps(running)
        # the new warm-up takes longer than the new ready-timeout
        settings.write_text('workers = 2\nready-timeout = 15\nwarm-up = ["/work?ms=3600000"]\n')
        refused = master.command("reload")
        assert refused.returncode == 1
        assert "not ready within 15 s (ready-timeout)" in refused.stderr
        assert "warm-up" in refused.stderr
        # generation 2 drains by the deadline that it was started with
        settings.write_text("workers = 1\n")
        with Client(master.port) as stuck:
            stuck.connection.request("GET", "/work?ms=3600000")
            master.wait_status(lambda s: in_flight(s) == 1)
            application("3")
            master.reload("--wait", "drained")
            assert stuck.connection.getresponse().status == 500
        assert len(master.worker_pids()) == 1
        assert client.get("/")[2] == b"3"
        master.stop()


def in_flight(document: dict[str, Any]) -> int:
    return sum(w["in_flight"] or 0 for g in document["generations"] for w in g["workers"])


# Deadlines and stops


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_a_request_that_is_stuck_is_cut_at_the_drain_deadline(application, parser) -> None:
    flags = ("--http", parser, "--drain-timeout", "1", "--probation", "0")
    with supervised("shop:app", *flags, cwd=application("1")) as master:
        with Client(master.port) as idle, Client(master.port) as stuck:
            assert idle.get("/")[2] == b"1"
            stuck.connection.request("GET", "/work?ms=3600000")
            master.wait_status(lambda s: in_flight(s) == 1)
            application("2")
            master.reload("--wait", "drained")
            assert stuck.connection.getresponse().status == 500
            assert idle.get("/")[2] == b"2"
        master.output.wait_for("drain-deadline")
        assert [g["id"] for g in master.status()["generations"]] == [2]
        master.stop()


def test_a_request_that_can_not_be_cancelled_is_cut_with_its_process(application, tmp_path) -> None:
    with supervised(
        "shop:app", "--drain-timeout", "1", "--timeout-graceful-shutdown", "1", cwd=application("1")
    ) as master:
        with Client(master.port) as stuck:
            stuck.connection.request("GET", f"/block?s=3600&begun={tmp_path}/begun")
            master.wait_status(lambda _: (tmp_path / "begun").exists())
            application("2")
            master.reload()
            alone(master)
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                stuck.connection.getresponse()
        with Client(master.port) as client:
            assert client.get("/")[2] == b"2"
        master.stop()


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_a_graceful_stop_lets_a_stream_end_whole(application, tmp_path, parser) -> None:
    with supervised("shop:app", "--http", parser, cwd=application("1")) as master:
        with Client(master.port) as client:
            client.connection.request("GET", f"/sse?ms=100&until={tmp_path}/enough")
            stream = client.connection.getresponse()
            assert stream.readline() == b"data: 0\n"
            master.signal(signal.SIGTERM)
            master.wait_notified("STOPPING", "1")
            (tmp_path / "enough").touch()
            assert stream.read().endswith(b"data: done\n\n")
        assert master.wait_exit() == 0


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_a_graceful_stop_cuts_a_stream_that_does_not_end_and_says_so(application, parser) -> None:
    with supervised(
        "shop:app", "--http", parser, "--timeout-graceful-shutdown", "1", cwd=application("1")
    ) as master:
        with Client(master.port) as client:
            client.connection.request("GET", "/sse?n=100000&ms=100")
            stream = client.connection.getresponse()
            assert stream.readline() == b"data: 0\n"
            master.signal(signal.SIGTERM)
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                stream.read()
        assert master.wait_exit() == 1
        assert "stop-timeout" in master.output.text


STARTING = """
    import asyncio
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            print("the start-up has begun", flush=True)
            open({mark!r}, "w").close()
            {wait}
"""


@pytest.mark.parametrize("wait", ["await asyncio.sleep(3600)", "import time; time.sleep(3600)"])
@pytest.mark.parametrize(
    "who",
    [
        "master",
        "worker",
    ],
)
def test_sigterm_during_start_up_ends_it(application, tmp_path, wait, who) -> None:
    """Of the master: a stop before anything served. Of a worker alone: a failed start."""
    mark = tmp_path / "mark"
    code = STARTING.format(mark=str(mark), wait=wait)
    flags = ["--timeout-graceful-shutdown", "1"]
    if who == "worker" and "time" in wait:  # it hears nothing: that ends it
        flags += ["--ready-timeout", "15"]
    master = Segue("shop:app", *flags, cwd=application(code=code))
    try:
        found = master.output.wait_for(r"worker-spawned generation=1 worker=1 pid=(\d+)")[0]
        master.wait_status(lambda _: mark.exists())
        if who == "master":
            master.signal(signal.SIGTERM)
        else:
            os.kill(int(found.rpartition("=")[2]), signal.SIGTERM)
        status = master.wait_exit()
        assert status == (1 if who == "master" else 3), master.output.text
    finally:
        master.close()


def test_sigterm_during_the_start_up_of_a_reload_stops_everything_cleanly(application, tmp_path) -> None:
    mark = tmp_path / "mark"
    with supervised("shop:app", cwd=application("1")) as master:
        application(code=STARTING.format(mark=str(mark), wait="await asyncio.sleep(3600)"))
        answers: list[tuple[int, Any]] = []
        asking = threading.Thread(target=lambda: answers.append(master.call("POST", f"{HOT}/reload")))
        asking.start()
        master.wait_status(lambda _: mark.exists())
        with Client(master.port) as client:
            client.connection.request("GET", f"/work?until={tmp_path}/enough")
            master.wait_status(lambda s: in_flight(s) == 1)
            master.signal(signal.SIGTERM)
            master.wait_notified("STOPPING", "1")
            (tmp_path / "enough").touch()
            assert client.connection.getresponse().read() == b"1"
        asking.join()
        assert answers[0][0] == 409
        assert "stop" in answers[0][1]["detail"]
        assert master.wait_exit() == 0


# HTTP/2 and other protocols


class H2:
    """One HTTP/2 connection. `h2` writes its frames; it reads none after a GOAWAY, so they are read here."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(DEADLINE_S)
        self._state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._state.initiate_connection()
        self._received = b""
        self.bodies: dict[int, bytes] = {}
        self.ended: list[int] = []
        self.goaways: list[int] = []
        self.closed = False
        self._sock.sendall(self._state.data_to_send())

    def get(self, path: str) -> int:
        """Open a stream."""
        stream = int(self._state.get_next_available_stream_id())
        headers = [(":method", "GET"), (":path", path), (":authority", "localhost"), (":scheme", "https")]
        self._state.send_headers(stream, headers, end_stream=True)
        self._sock.sendall(self._state.data_to_send())
        return stream

    def until(self, condition: Callable[[], Any]) -> None:
        """Read until `condition` holds."""
        while not condition():
            assert not self.closed, "the server closed the connection"
            data = self._sock.recv(65536)
            self.closed = not data
            self._received += data
            while len(self._received) >= 9 + (length := int.from_bytes(self._received[:3])):
                kind, flags = self._received[3], self._received[4]
                stream = int.from_bytes(self._received[5:9])
                payload, self._received = self._received[9 : 9 + length], self._received[9 + length :]
                self._on_frame(kind, flags, stream, payload)

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        assert kind != 3, f"stream {stream} was reset"
        if kind == 7:
            assert payload[4:8] == b"\0\0\0\0", "GOAWAY with an error"
            self.goaways.append(int.from_bytes(payload[:4]))
        elif kind == 0:
            self.bodies[stream] = self.bodies.get(stream, b"") + payload
        if kind in {0, 1} and flags & 1:
            self.ended.append(stream)

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def certificate(tmp_path) -> tuple[ssl.SSLContext, tuple[str, ...]]:
    """A client's context that trusts it, and the flags to serve it."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    key, chain = tmp_path / "key.pem", tmp_path / "cert.pem"
    issued.private_key_pem.write_to_path(key)
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context, ("--ssl-keyfile", str(key), "--ssl-certfile", str(chain))


@pytest.fixture(params=["alpn", "prior-knowledge"])
def http2(request, certificate) -> Iterator[tuple[Callable[[int], H2], tuple[str, ...]]]:
    """How to connect, and the flags to serve it."""
    context, flags = certificate
    opened: list[H2] = []

    def connect(port: int) -> H2:
        sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        if request.param == "alpn":
            context.set_alpn_protocols(["h2"])
            sock = context.wrap_socket(sock, server_hostname="localhost")
            assert sock.selected_alpn_protocol() == "h2"
        opened.append(H2(sock))
        return opened[-1]

    yield connect, (*PATIENT, *(flags if request.param == "alpn" else ()))
    for connection in opened:
        connection.close()


def test_http2_is_told_goaway_on_a_reload_and_open_streams_end_whole(application, http2) -> None:
    """GOAWAY waits for a moment without an open stream: some clients, `h2` among them, drop what is open then."""
    connect, flags = http2
    # what is on its way has a second, which this test may miss
    late = "from segue.worker import drain\ndrain._NOTICE_S = 10.0\n"
    with supervised("shop:app", *flags, cwd=application("1", prelude=late)) as master:
        busy, idle = connect(master.port), connect(master.port)
        first = idle.get("/")
        idle.until(lambda: first in idle.ended)
        stream = busy.get("/sse?n=15&ms=100")
        busy.until(lambda: stream in busy.bodies)
        application("2")
        master.reload()
        idle.until(lambda: idle.goaways)
        late = idle.get("/")  # it was on its way when the server said so
        assert late <= idle.goaways[0]
        idle.until(lambda: idle.closed)
        assert idle.bodies[late] == b"1"
        assert idle.goaways[-1] == late
        busy.until(lambda: busy.goaways)
        assert stream in busy.ended
        assert busy.bodies[stream].endswith(b"data: done\n\n")
        busy.until(lambda: busy.closed)
        again = connect(master.port)
        stream = again.get("/")
        again.until(lambda: stream in again.ended)
        assert again.bodies[stream] == b"2"
        again.close()
        alone(master)
        master.stop()


def test_an_http2_connection_that_is_always_busy_gets_goaway_after_idle_grace(
    application, tmp_path, http2
) -> None:
    connect, flags = http2
    with supervised("shop:app", *flags, "--idle-grace", "1", cwd=application("1")) as master:
        busy = connect(master.port)
        stream = busy.get(f"/sse?ms=100&until={tmp_path}/enough")
        busy.until(lambda: stream in busy.bodies)
        application("2")
        master.reload()
        busy.until(lambda: busy.goaways)
        assert stream not in busy.ended
        (tmp_path / "enough").touch()
        busy.until(lambda: stream in busy.ended)
        assert busy.bodies[stream].endswith(b"data: done\n\n")
        busy.until(lambda: busy.closed)
        alone(master)
        master.stop()


def test_a_graceful_stop_lets_http2_streams_end_whole(application, tmp_path, http2) -> None:
    connect, flags = http2
    with supervised("shop:app", *flags, cwd=application("1")) as master:
        connection = connect(master.port)
        stream = connection.get(f"/sse?ms=100&until={tmp_path}/enough")
        connection.until(lambda: stream in connection.bodies)
        master.signal(signal.SIGTERM)
        master.wait_notified("STOPPING", "1")
        (tmp_path / "enough").touch()
        connection.until(lambda: connection.closed)
        assert connection.bodies[stream].endswith(b"data: done\n\n")
        assert connection.goaways
        assert master.wait_exit() == 0


def test_what_marks_http2_in_uvicorn_is_there() -> None:
    import inspect

    source = inspect.getsource(ZttpH2Protocol)
    for text in ("self.shutdown_requested = False", "self.conn.close()", "def flush(self)", "self.cycles["):
        assert text in source

    class Http2:
        shutdown_requested = False

    assert is_multiplexed(Http2())
    assert not is_multiplexed(logging)


CUSTOM = """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    class Mine(HttpToolsProtocol):
        pass
"""


@pytest.mark.parametrize("kind", ["zttp", "zttp-with-http2", "custom"])
def test_a_protocol_without_a_proof_is_told_to_close_and_never_moved(application, tmp_path, kind) -> None:
    directory = application("1")
    (directory / "mine.py").write_text(textwrap.dedent(CUSTOM))
    flags = {"zttp": PATIENT[:2], "zttp-with-http2": PATIENT, "custom": ("--http", "mine:Mine")}[kind]
    env = {"PYTHONPATH": f"{directory}:{Path(__file__).parent.parent}"}
    with supervised("shop:app", *flags, "--idle-grace", "15", cwd=directory, env=env) as master:
        asking, silent, busy = (
            http.client.HTTPConnection("127.0.0.1", master.port, timeout=DEADLINE_S) for _ in range(3)
        )
        for connection in (asking, silent, busy):
            connection.request("GET", "/")
            response = connection.getresponse()
            assert response.getheader("connection") is None
            assert response.read() == b"1"
        busy.request("GET", f"/work?until={tmp_path}/enough")
        master.wait_status(lambda s: in_flight(s) == 1)
        control = master.current()["workers"][0]["control"]
        application("2")
        code, document = master.call("POST", f"{HOT}/reload")
        assert code == 200, document
        # each connection is told, or left alone, which the reload doesn't wait for
        while (old := unix_call(control, "GET", f"{HOT}/status")[1])["sending_s"] is None:
            pass
        assert old["connections"] == 3
        asking.request("GET", "/")  # within its grace
        (tmp_path / "enough").touch()
        for connection in (busy, asking):
            response = connection.getresponse()
            assert response.getheader("connection") == "close"
            assert response.read() == b"1"
        assert silent.sock is not None
        assert silent.sock.recv(1) == b""
        alone(master)
        for connection in (asking, silent, busy):
            connection.close()
        with Client(master.port) as client:
            assert client.get("/")[2] == b"2"
        master.stop()


def test_a_stop_before_anything_served_is_no_success(application, tmp_path) -> None:
    mark = tmp_path / "mark"
    code = STARTING.format(mark=str(mark), wait="await asyncio.sleep(3600)")
    master = Segue("shop:app", cwd=application(code=code))
    try:
        master.output.wait_for("worker-spawned generation=1")
        done = master.command("stop")
        assert done.returncode == 1
        with pytest.raises(NotStarted) as caught:
            master.wait_ready()
        assert caught.value.status == 1
    finally:
        master.close()

"""Applications as people write them: from PyPI unmodified, and FastAPI with everything that a reload could break."""

from __future__ import annotations

import json
import os
import ssl
import tempfile
import threading
from pathlib import Path

import pytest
import trustme
import websockets.exceptions
import websockets.sync.client
from conftest import APP
from scenario import DEADLINE_S, Client, Load, supervised

from bench.users import unprivileged

FASTAPI = """
import asyncio, os
from contextlib import asynccontextmanager
from fastapi import BackgroundTasks, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
import segue

VERSION = "{version}"
done = {done!r}

@asynccontextmanager
async def lifespan(app):
    app.state.llm = object()
    yield
    with open(done, "a") as log:
        log.write(f"shutdown {{VERSION}}\\n")

app = FastAPI(lifespan=lifespan)

@app.get("/")
async def index():
    return {{"version": VERSION, "pid": os.getpid()}}

async def later(seconds):
    await asyncio.sleep(seconds)
    with open(done, "a") as log:
        log.write(f"task {{VERSION}}\\n")

@app.post("/order")
async def order(tasks: BackgroundTasks, seconds: float = 1.0):
    tasks.add_task(later, seconds)
    return {{"version": VERSION}}

@app.get("/stream")
async def stream(n: int = 20):
    async def chunks():
        for number in range(n):
            yield f"{{VERSION}} {{number}}\\n"
            await asyncio.sleep(0.05)
    return StreamingResponse(chunks(), media_type="text/plain")

@app.websocket("/ws")
async def ws(socket: WebSocket):
    await socket.accept()
    while True:
        text = await socket.receive_text()
        await socket.send_text(f"{{VERSION}} {{text}} draining={{bool(segue.draining)}}")

@app.websocket("/ws-polite")
async def polite(socket: WebSocket):
    await socket.accept()
    await socket.send_text(VERSION)
    await socket.scope["state"]["segue"].draining.wait()
    await socket.send_text("going away")
    await socket.close(1000)
"""


def write(directory: Path, version: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "shop.py").write_text(FASTAPI.format(version=version, done=str(directory / "done")))
    return directory


def test_an_application_from_pypi_is_served_unmodified(tmp_path) -> None:
    with supervised("--factory", "prometheus_client:make_asgi_app", cwd=tmp_path) as master:
        with Client(master.port) as client:
            assert b"python_info" in client.get("/metrics")[2]
            master.reload("--wait", "drained")
            assert b"python_info" in client.get("/metrics")[2]
        master.stop()


def test_the_built_in_application_is_served_without_one(tmp_path) -> None:
    with supervised(cwd=tmp_path) as master, Client(master.port) as client:
        status, headers, body = client.get("/")
        assert status == 200
        assert "text/html" in headers["content-type"]
        assert b"segue" in body
        assert client.get("/ping")[0] == 200
        master.stop()


def test_a_fastapi_application_is_reloaded_around_everything_it_does(tmp_path) -> None:
    """A background task, a stream and a WebSocket end on the code on which they began; connections move on."""
    directory = write(tmp_path / "code", "1")
    with supervised("shop:app", cwd=directory) as master, Client(master.port) as client:
        url = f"ws://127.0.0.1:{master.port}/ws"
        with websockets.sync.client.connect(url) as socket, Client(master.port) as streaming:
            socket.send("a")
            assert socket.recv() == "1 a draining=False"
            streaming.connection.request("GET", "/stream?n=40")
            stream = streaming.connection.getresponse()
            assert stream.readline() == b"1 0\n"
            assert json.loads(client.get("/order?seconds=1.5", method="POST")[2]) == {"version": "1"}
            write(directory, "2")
            master.reload()
            # a request that overtakes the move is still answered by the old code
            master.wait_status(lambda _: client.json("/")["version"] == "2")
            socket.send("b")
            assert socket.recv() == "1 b draining=True"
            assert stream.read().endswith(b"1 39\n")
            master.wait_status(
                lambda _: streaming.json("/")["version"] == "2"
            )  # the same connection, after its stream
        done = directory / "done"
        master.wait_status(lambda s: len(s["generations"]) == 1)
        assert done.read_text() == "task 1\nshutdown 1\n"
        master.stop()
        assert done.read_text().endswith("shutdown 2\n")


def test_a_websocket_is_told_and_then_closed_with_1012_at_the_deadline(tmp_path) -> None:
    directory = write(tmp_path / "code", "1")
    with supervised("shop:app", "--drain-timeout", "2", cwd=directory) as master:
        base = f"ws://127.0.0.1:{master.port}"
        with (
            websockets.sync.client.connect(f"{base}/ws") as stubborn,
            websockets.sync.client.connect(f"{base}/ws-polite") as polite,
        ):
            assert polite.recv() == "1"
            stubborn.send("a")
            stubborn.recv()
            write(directory, "2")
            master.reload()
            assert polite.recv(DEADLINE_S) == "going away"
            with pytest.raises(websockets.exceptions.ConnectionClosed) as caught:
                stubborn.recv(DEADLINE_S)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1012
        master.wait_status(lambda s: len(s["generations"]) == 1)
        master.stop()


def test_an_application_learns_that_its_generation_was_activated(tmp_path) -> None:
    (tmp_path / "shop.py").write_text(
        "import asyncio, segue\n"
        "async def app(scope, receive, send):\n"
        "    if scope['type'] == 'lifespan':\n"
        "        await receive()\n"
        "        assert not segue.activated.is_set()\n"
        "        task = asyncio.ensure_future(segue.activated.wait())\n"
        "        task.add_done_callback(lambda _: print('scheduler starts', flush=True))\n"
        "        await send({'type': 'lifespan.startup.complete'})\n"
        "        await receive()\n"
        "        await send({'type': 'lifespan.shutdown.complete'})\n"
    )
    with supervised("shop:app", cwd=tmp_path) as master:
        master.output.wait_for("scheduler starts")
        text = master.output.text
        assert text.index("worker-ready") < text.index("scheduler starts")
        master.stop()


@pytest.mark.parametrize("family", ["unix", "v6"])
def test_connections_move_on_every_kind_of_listener(application, tmp_path, family) -> None:
    import http.client
    import socket

    path = tmp_path / "public.sock"
    bind = f"unix:{path}" if family == "unix" else "[::1]:0"
    with supervised("shop:app", "--bind", bind, cwd=application("1"), bind=False) as master:
        sock = socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET6, socket.SOCK_STREAM)
        sock.settimeout(DEADLINE_S)
        sock.connect(str(path) if family == "unix" else ("::1", master.port))
        connection = http.client.HTTPConnection("localhost")
        connection.sock = sock
        for version in ("1", "2", "3"):
            application(version)
            if version != "1":
                master.reload("--wait", "drained")
            connection.request("GET", "/")
            assert connection.getresponse().read() == version.encode()
            assert connection.sock is sock
        connection.close()
        master.stop()


def test_tls_connections_are_told_to_close_and_the_certificate_is_read_again(application, tmp_path) -> None:
    import http.client

    authority = trustme.CA()
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"

    def issue() -> bytes:
        issued = authority.issue_cert("localhost")
        issued.private_key_pem.write_to_path(key)
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())

    context = ssl.create_default_context()
    authority.configure_trust(context)
    first = issue()
    flags = ("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate))
    with supervised("shop:app", *flags, cwd=application("1")) as master:
        port = master.port

        def connect() -> http.client.HTTPSConnection:
            connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=DEADLINE_S)
            connection.request("GET", "/")
            assert connection.getresponse().read() in {b"1", b"2"}
            return connection

        connection = connect()
        assert connection.sock.getpeercert(binary_form=True) == first
        second = issue()
        application("2")
        master.reload()
        # the old generation hears of it after whoever asked; by then it has told its connections
        master.wait_status(lambda s: s["generations"][0]["workers"][0].get("sending_s") is not None)
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.getheader("connection") == "close"
        assert response.read() == b"1"
        connection.close()
        again = connect()
        assert again.sock.getpeercert(binary_form=True) == second
        again.close()
        master.wait_status(lambda s: len(s["generations"]) == 1)
        master.stop()


def test_silent_tls_connections_are_closed_after_idle_grace(application, tmp_path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    issued.private_key_pem.write_to_path(key)
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    flags = ("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--idle-grace", "1")
    with supervised("shop:app", *flags, cwd=application("1")) as master:
        import socket

        with (
            socket.create_connection(("127.0.0.1", master.port)) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            sock.settimeout(DEADLINE_S)
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"\r\n\r\n1"):
                answer += sock.recv(65536)
            master.reload()
            assert sock.recv(65536) == b""
        master.wait_status(lambda s: len(s["generations"]) == 1)
        master.stop()


def test_an_unprivileged_master_with_few_descriptors_loses_nothing() -> None:
    """Descriptors in flight count against the user's limit; what can't be sent stays where it is."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    with tempfile.TemporaryDirectory(prefix="segue-u-") as temporary:
        directory = Path(temporary)
        directory.chmod(0o755)
        nobody = unprivileged(directory)
        code = directory / "code"
        code.mkdir()
        (code / "shop.py").write_text(APP.format(version="1"))
        with supervised("shop:app", "--no-access-log", cwd=code, nofile=160, interpreter=nobody) as master:
            with Load(master.port, "--keepalive", "80", "--newconn", "2", "--sse", "1") as load:
                for version in ("2", "3", "4"):
                    (code / "shop.py").write_text(APP.format(version=version))
                    master.reload("--wait", "drained")
                load.nothing_lost()
            master.stop()


def test_many_streams_end_whole_over_reloads(tmp_path) -> None:
    directory = write(tmp_path / "code", "1")
    with supervised("shop:app", cwd=directory) as master:
        port = master.port
        results: list[bytes] = []

        def read() -> None:
            with Client(port) as client:
                results.append(client.get("/stream?n=60")[2])

        threads = [threading.Thread(target=read) for _ in range(20)]
        for thread in threads:
            thread.start()
        for version in ("2", "3"):
            write(directory, version)
            master.reload()
        for thread in threads:
            thread.join()
        assert len(results) == 20
        for body in results:
            lines = body.decode().splitlines()
            assert len(lines) == 60
            assert len({line.split()[0] for line in lines}) == 1
        master.stop()

"""Who may do what, and what strangers and nonsense get: docs/security.md, promise by promise."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import grp
import http.client
import json
import os
import select
import signal
import socket
import stat
import subprocess
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario import (
    DEADLINE_S,
    HOT,
    ROOT,
    TOKEN,
    Segue,
    environment,
    free_port,
    made_directory,
    segue,
    supervised,
    unix_call,
)

from segue.handoff import adoption, http_client, http_server, relay
from segue.handoff.browser import misdirected
from segue.handoff.http import Handler, Request, Response, json_response
from segue.handoff.notify import NotifySocket
from segue.supervisor.control_reads import MAX_FOLLOWERS

RELOAD = f"{HOT}/reload"


def call(address: str | int, method: str, target: str, **headers: str) -> tuple[int, Any]:
    """A request to a Unix socket or a port, with exactly these headers beside its Host."""
    connection = http.client.HTTPConnection("127.0.0.1", 0, timeout=60)
    connection.sock = dial(address)
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    fields.setdefault("Host", "127.0.0.1" if isinstance(address, str) else f"127.0.0.1:{address}")
    try:
        connection.putrequest(method, target, skip_host=True)
        for name, value in fields.items():
            connection.putheader(name, value)
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        with connection.getresponse() as response:
            body = response.read()
        return response.status, json.loads(body) if body.startswith((b"{", b"[")) else body
    finally:
        connection.close()


def dial(address: str | int) -> socket.socket:
    if isinstance(address, int):
        return socket.create_connection(("127.0.0.1", address), timeout=60)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address)
    sock.settimeout(60)
    return sock


# ------------------------------------------------------------------------------------------------------ pages of others


def test_a_request_with_an_origin_is_refused_on_every_listener(application, token_file) -> None:
    port = free_port()
    flags = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    with supervised("shop:app", *flags, cwd=application("1")) as master:
        bearer = f"Bearer {TOKEN}"
        worker = master.current()["workers"][0]["control"]
        for address in (master.control, worker, port, master.port):
            for origin in ("http://evil.example", "null", "http://127.0.0.1", f"http://127.0.0.1:{port}"):
                code, document = call(address, "POST", RELOAD, Origin=origin, Authorization=bearer)
                assert code == 403, (address, origin)
                assert "Origin" in document["detail"]
                assert call(address, "GET", f"{HOT}/status", Origin=origin, Authorization=bearer)[0] == 403
        assert master.status()["current"] == 1
        assert call(port, "POST", RELOAD, Authorization=bearer)[0] == 200
        master.stop()


def test_admin_answers_under_its_own_names_only(application) -> None:
    port = free_port()
    with supervised("shop:app", "--admin", f"127.0.0.1:{port}", cwd=application("1")) as master:
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
        ):
            code, document = call(port, "GET", f"{HOT}/status", Host=host)
            assert code == 421, host
            assert host in document["detail"]
        for host in (
            "localhost",
            f"LOCALHOST:{port}",
            "127.0.0.1",
            f"[::1]:{port}",
            "segue.localhost",
            "10.1.2.3",
        ):
            assert call(port, "GET", f"{HOT}/status", Host=host)[0] == 200, host
        master.stop()


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_host_is_too_odd_to_be_judged(host: str) -> None:
    request = Request("GET", "/", {}, {"host": host}, b"", None, None)
    refusal = misdirected(request, {"admin.example"})
    assert refusal is None or refusal.status == 421


# ---------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 8_000, 431),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1100000\r\n\r\n" + b"a" * 1_100_000, 413),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"100001\r\n" + b"a" * 0x100001, 413),
        (b"GET //[ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /?" + b"a&" * 300 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /?" + b"a=1&" * 300 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
    ],
    ids=["long header", "many headers", "long target", "long body", "chunked body", "bad target", "empty fields",
         "many fields", "TLS", "no host"],
)  # fmt: skip
def test_what_is_too_much_or_no_request_gets_a_problem_document(
    running: Segue, sent: bytes, code: int
) -> None:
    worker = running.current()["workers"][0]["control"]
    for address in (running.control, worker):
        with dial(address) as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(sent)  # it may be refused before it has come whole
            with contextlib.closing(http.client.HTTPResponse(sock)) as answer:
                answer.begin()
                assert answer.status == code, address
                assert answer.getheader("content-type") == "application/problem+json"
                assert json.loads(answer.read())["status"] == code
    assert running.status()["ready"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segue]:
    """One instance for all that must not harm it."""
    mark = "TEST_MARK_OF_SEGUE"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(mark, "security")
        directory = tmp_path_factory.mktemp("code")
        (directory / "app.py").write_text(
            "async def app(scope, receive, send):\n"
            "    await send({'type': 'http.response.start', 'status': 200, 'headers': []})\n"
            "    await send({'type': 'http.response.body', 'body': b'1'})\n"
        )
        with supervised("app:app", "--lifespan", "off", cwd=directory) as master:
            yield master
            master.stop()


def test_idle_connections_keep_nobody_out_and_the_oldest_makes_room(running: Segue) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(dial(running.control))
        for _ in range(http_server.MAX_CONNECTIONS + 20):
            stack.enter_context(dial(running.control))
        assert call(running.control, "GET", "/livez")[0] == 200
        with contextlib.closing(http.client.HTTPResponse(first)) as answer:
            answer.begin()
            assert answer.status == 503
            assert str(http_server.MAX_CONNECTIONS) in json.loads(answer.read())["detail"]
    assert running.wait_status(lambda document: document["ready"])


def test_a_body_is_not_waited_for_of_who_may_not_ask_anyway(application, token_file) -> None:
    port = free_port()
    flags = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    with supervised("shop:app", *flags, cwd=application("1")) as master:
        with dial(port) as sock:
            head = f"POST {RELOAD} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
            sock.sendall(head.encode())
            assert sock.recv(1000).startswith(b"HTTP/1.1 401")
        assert call(port, "HEAD", f"{HOT}/status") == (200, b"")
        master.stop()


@contextlib.asynccontextmanager
async def server_of(handler: Handler, sock: socket.socket) -> AsyncIterator[tuple[http_server.Server, str]]:
    """The server in this process, on `sock`."""
    path = os.path.join(made_directory("segue-s-"), "s")
    sock.bind(path)
    server = http_server.Server(sock, handler)
    try:
        yield server, path
    finally:
        server.close()


@contextlib.asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    """The server in this process, with limits cut short, on a socket of its own."""
    async with server_of(handler, socket.socket(socket.AF_UNIX)) as (_, path):
        yield path


async def nothing(_: Request) -> Response:
    return json_response({})


class Scarce(socket.socket):
    """No descriptor is left for the first who comes."""

    refused = 0

    def accept(self) -> Any:
        if not self.refused:
            self.refused += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_who_comes_while_no_descriptor_is_left_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> list[str]:
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(str(context)))
        async with server_of(nothing, Scarce(socket.AF_UNIX)) as (_, path):
            assert (await http_client.call(path, "GET", "/", timeout_s=DEADLINE_S)).status == 200
        return told

    monkeypatch.setattr(http_server, "_ACCEPT_PAUSE_S", 0.05)
    [told] = asyncio.run(scenario())
    assert "Too many open files" in told


def test_a_server_that_is_held_answers_who_is_there_and_then_who_has_come_since() -> None:
    async def scenario() -> None:
        begun, go = asyncio.Event(), asyncio.Event()

        async def handler(request: Request) -> Response:
            begun.set()
            await go.wait()
            return json_response({})

        async with server_of(handler, socket.socket(socket.AF_UNIX)) as (server, path):

            async def ask() -> int:
                return (await http_client.call(path, "GET", "/", timeout_s=DEADLINE_S)).status

            first = asyncio.create_task(ask())
            await begun.wait()
            held = asyncio.create_task(server.hold(DEADLINE_S))
            await asyncio.sleep(0)
            begun.clear()
            second = asyncio.create_task(ask())
            for _ in range(100):
                await asyncio.sleep(0)
            assert not held.done()
            go.set()
            assert await first == 200
            await held
            assert not second.done()
            assert not begun.is_set()
            server.accept()
            assert await second == 200

    asyncio.run(scenario())


def test_a_request_that_does_not_come_whole_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> tuple[bytes, bytes]:
        answers = []
        async with served(nothing) as path:
            for sent in (b"GET / HTTP/1.1\r\nHos", b""):
                reader, writer = await asyncio.open_unix_connection(path)
                writer.write(sent)
                answers.append(await reader.read())
                writer.close()
        return answers[0], answers[1]

    monkeypatch.setattr(http_server, "READ_TIMEOUT_S", 0.2)
    slow, silent = asyncio.run(scenario())
    assert slow.startswith(b"HTTP/1.1 408")
    assert silent == b""


def test_who_takes_none_of_an_answer_holds_no_connection_whatever_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def handler(request: Request) -> Response:
        return Response(200, bytes(int(request.query["size"])))

    async def scenario() -> list[int]:
        held = []
        loop = asyncio.get_running_loop()
        async with served(handler) as path:
            for size in range(
                0, 512 * 1024, 32 * 1024
            ):  # more than the kernel takes of it: by a little, or by much
                with dial(path) as sock:
                    sock.sendall(
                        f"GET /?size={size} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
                    )
                    poll = select.poll()
                    poll.register(sock, 0)  # the other end has closed it: nothing is read here
                    if not await loop.run_in_executor(None, poll.poll, DEADLINE_S * 1000):
                        held.append(size)
        return held

    monkeypatch.setattr(http_server, "WRITE_TIMEOUT_S", 0.2)
    assert asyncio.run(scenario()) == []


def test_who_sends_many_requests_at_once_takes_turns_with_others() -> None:
    async def scenario() -> list[str]:
        asked: list[str] = []

        async def handler(request: Request) -> Response:
            asked.append(request.path)
            return json_response({})

        async with served(handler) as path:
            greedy, other = [await asyncio.open_unix_connection(path) for _ in range(2)]
            greedy[1].write(b"GET /greedy HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
            other[1].write(b"GET /other HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            await other[0].read()
            greedy[1].close()
            other[1].close()
        return asked

    asked = asyncio.run(scenario())
    assert "/greedy" in asked
    assert asked.index("/other") < 100


def test_what_is_followed_ends_when_the_connection_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.Event().wait()

    async def handler(_: Request) -> Response:
        return Response(200, stream=pieces())

    async def scenario() -> bytes:
        async with served(handler) as path:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(60):
                answer = await reader.read()
            writer.close()
            return answer

    monkeypatch.setattr(http_server, "MAX_AGE_S", 0.2)
    answer = asyncio.run(scenario())
    assert b"first" in answer
    assert answer.endswith(b"\r\n0\r\n\r\n"), "it ends as it should, and isn't broken off"


def test_who_follows_without_a_token_keeps_nobody_out_who_has_it(application, token_file) -> None:
    port = free_port()
    flags = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    watch = f"GET {HOT}/watch HTTP/1.1\r\nHost: localhost\r\n".encode()
    bearer = f"Authorization: Bearer {TOKEN}\r\n".encode()
    with supervised("shop:app", *flags, cwd=application("1")) as master, contextlib.ExitStack() as stack:

        def follow(address: str | int, head: bytes) -> bytes:
            sock = stack.enter_context(dial(address))
            sock.sendall(head + b"\r\n")
            return sock.recv(12)

        for _ in range(MAX_FOLLOWERS):
            assert follow(port, watch) == b"HTTP/1.1 200"
        assert follow(port, watch) == b"HTTP/1.1 503"
        assert follow(port, watch + bearer) == b"HTTP/1.1 200"
        assert follow(master.control, watch) == b"HTTP/1.1 200"
        stack.close()
        master.stop()


def test_of_many_who_begin_to_follow_at_once_no_more_than_may_are_let_in(application) -> None:
    port, too_many = free_port(), 30
    watch = f"GET {HOT}/watch HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with (
        supervised("shop:app", "--admin", f"127.0.0.1:{port}", cwd=application("1")) as master,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(3):
            assert call(port, "HEAD", f"{HOT}/watch")[0] == 200  # which follows nothing
        socks = [stack.enter_context(dial(port)) for _ in range(MAX_FOLLOWERS + too_many)]
        master.signal(signal.SIGSTOP)
        for sock in socks:
            sock.sendall(watch)
        master.signal(signal.SIGCONT)
        answers = Counter(sock.recv(12) for sock in socks)
        assert answers == {b"HTTP/1.1 200": MAX_FOLLOWERS, b"HTTP/1.1 503": too_many}
        stack.close()
        master.stop()


# ------------------------------------------------------------------------------------------------------------- who may


def test_a_group_that_is_allowed_controls_the_instance_and_another_does_not(application) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    allowed, other = 60_001, 60_002
    runtime = os.path.join(made_directory("segue-g-"), "run")
    os.chmod(os.path.dirname(runtime), 0o755)
    with supervised(
        "shop:app", "--control-group", str(allowed), cwd=application("1"), runtime_dir=runtime
    ) as master:
        assert stat.S_IMODE(os.stat(master.control).st_mode) == 0o660
        assert os.stat(master.control).st_gid == allowed
        assert stat.S_IMODE(os.stat(master.directory).st_mode) == 0o750
        for name in os.listdir(master.directory):
            if name not in {"control.sock", "master.lock"}:
                mode = os.stat(os.path.join(master.directory, name)).st_mode
                assert stat.S_IMODE(mode) == 0o600, name
        member = status_as(master, gid=other, groups=[allowed])
        assert member.returncode == 0, member.stderr
        assert json.loads(member.stdout)["current"] == 1
        stranger = status_as(master, gid=other, groups=[])
        assert stranger.returncode == 5
        assert "permission denied" in stranger.stderr
        master.stop()


def status_as(master: Segue, gid: int, groups: list[int]) -> subprocess.CompletedProcess[str]:
    """`curl` as a stranger of these groups; the command itself needs an interpreter that the stranger can read."""
    done = subprocess.run(
        ["curl", "-sS", "--fail-with-body", "--unix-socket", master.control, f"http://localhost{HOT}/status"],
        user=60_003,
        group=gid,
        extra_groups=groups,
        capture_output=True,
        text=True,
        env=environment(),
        cwd="/",
        check=False,
    )
    if done.returncode == 7:
        done.returncode, done.stderr = 5, "permission denied"
    return done


def test_a_group_that_does_not_exist_is_named(application) -> None:
    done = segue("serve", "shop:app", "--control-group", "nobody-has-this", cwd=application("1"))
    assert done.returncode == 2
    assert "control-group" in done.stderr
    assert "nobody-has-this" in done.stderr
    assert "nobody-has-this" not in {each.gr_name for each in grp.getgrall()}


def test_a_runtime_directory_of_somebody_else_is_refused(application) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    directory = made_directory("segue-o-")
    os.chown(directory, 60_003, -1)
    done = segue("serve", "shop:app", "--runtime-dir", directory, cwd=application("1"))
    assert done.returncode == 5
    assert "60003" in done.stderr


def test_commands_do_not_look_into_a_place_in_the_temporary_directory_that_others_can_write_to() -> None:
    temporary = made_directory("segue-o-")
    place = Path(temporary, f"segue-{os.geteuid()}")
    (place / "nobodys").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place / "nobodys" / "g1w1.sock"))
        place.chmod(0o777)
        done = segue(
            "status", "--name", "nobodys", TMPDIR=temporary, XDG_RUNTIME_DIR="", RUNTIME_DIRECTORY=""
        )
    assert done.returncode == 5
    assert f"{place} can be written to by others" in done.stderr


def test_who_pretends_to_be_a_worker_of_another_process_does_not_have_it_ended() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can end what others have started")
    runtime = made_directory("segue-o-")
    directory = Path(runtime, "default")
    directory.mkdir()
    asked: list[bytes] = []

    def pretend(listener: socket.socket, pid: int) -> None:
        document = json.dumps({"pid": pid}).encode()
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                asked.append(sock.recv(65536).split(b" HTTP")[0])
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(document), document))
                sock.close()

    with (
        subprocess.Popen(["sleep", "600"], env=environment()) as victim,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        try:
            listener.bind(str(directory / "g1w1.sock"))
            listener.listen()
            os.chown(directory, 60_004, -1)
            threading.Thread(target=pretend, args=(listener, victim.pid), daemon=True).start()
            done = segue("stop", "--now", "--runtime-dir", runtime)
            assert done.returncode == 0, done.stderr
            assert asked == [f"GET {HOT}/status".encode(), f"POST {HOT}/stop?timeout=0".encode()]
            assert victim.poll() is None
        finally:
            victim.kill()
            listener.shutdown(socket.SHUT_RDWR)


def test_the_token_is_nowhere_but_in_its_file(application, token_file) -> None:
    with supervised("shop:app", "--token-file", str(token_file), cwd=application("1")) as master:
        call(master.port, "POST", RELOAD, Authorization=f"Bearer {TOKEN}x")
        call(master.port, "POST", RELOAD, Authorization=f"Bearer {TOKEN}")
        seen = [json.dumps(master.status()), master.command("config", "--running").stdout, master.output.text]
        pids = [master.process.pid, *master.worker_pids()]
        for pid in pids:
            seen.append(Path(f"/proc/{pid}/cmdline").read_text())
            seen.append(Path(f"/proc/{pid}/environ").read_text())
        seen.append(Path(master.directory, "journal").read_text())
        assert not [text for text in seen if TOKEN in text]
        master.stop()


def test_what_a_caller_says_cannot_pass_for_a_line_of_the_log_or_steer_a_terminal() -> None:
    with supervised("app:app", "--log-format", "text", cwd=ROOT / "examples" / "quotes") as master:
        said = quote("\x1b[2J\x9b2J\r\n2026-01-01 ERROR segue: made up\x85\u2028\u202e")
        assert master.call("POST", f"{HOT}/reload/prices?{said}=1")[0] == 400
        for who in ("\x9b2J", "x" * 5000):
            headers = {"X-Segue-Asked-By": who}
            assert unix_call(master.control, "POST", f"{HOT}/drain/stop", headers=headers)[0] == 200
        (line,) = master.output.wait_for(".*made up.*")
        assert r"\x1b[2J" in line
        read = master.command("events").stdout
        assert "made up" in read
        for text in (master.output.text, read):
            assert not [
                line for line in text.split("\n") if not line.isprintable() or line.startswith("2026-01-01")
            ]
            assert "x" * 200 not in text
        master.stop()


# ------------------------------------------------------------------------------- what processes say to each other

junk = st.one_of(
    st.binary(max_size=300),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=12), inner, max_size=6)
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=400), min_size=1, max_size=5))
def test_no_datagram_is_too_odd_for_the_master(messages: list[bytes]) -> None:
    path = os.path.join(made_directory("segue-f-"), "n")
    receiver = NotifySocket(path)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            for message in messages:
                sender.sendto(message, path)
            for notification in receiver.receive():
                assert notification.pid == os.getpid()
                assert all("=" not in key for key in notification.fields)
    finally:
        receiver.close()


@settings(max_examples=300, deadline=None)
@given(junk, st.integers(0, 3))
def test_no_message_in_the_relay_is_too_odd_and_none_leaks_a_descriptor(data: bytes, count: int) -> None:
    read, write = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = len(os.listdir("/proc/self/fd"))
    try:
        fds = array.array("i", [read.fileno()] * count)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if count else []
        write.sendmsg([data], rights)
        relay.needed_room(read, 10)
        with contextlib.suppress(relay.MalformedParcelError, relay.RelayClosedError):
            parcel = relay.receive(read)
            assert parcel is not None
            relay.close_all(parcel.fds)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        read.close()
        write.close()


@settings(max_examples=300, deadline=None)
@given(junk, st.integers(0, 3), st.booleans())
def test_no_message_about_adoption_is_too_odd_and_none_leaks_a_descriptor(
    data: bytes, count: int, offer: bool
) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = len(os.listdir("/proc/self/fd"))
    try:
        fds = array.array("i", [here.fileno()] * count)
        there.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if count else [])
        receive = adoption.receive_offer if offer else adoption.receive_acceptance
        with contextlib.suppress(adoption.MalformedError, OSError):
            received = receive(here)
            if received is not None:
                adoption.close_all(received[1])
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        here.close()
        there.close()


def test_nonsense_from_a_living_worker_harms_nothing(application) -> None:
    """What it could send if it were taken over: the master reads on, and the others serve."""
    code = """
    import os, socket, threading

    async def app(scope, receive, send):
        if scope["type"] == "http":
            path = os.path.join(os.environ["NONSENSE"], "notify.sock")
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                for text in (b"READY=1\\nX_SEGUE_HANDOVER=nan", b"X_SEGUE_STATE=" + b"x" * 5000, b"\\xff\\xfe=1",
                             b"X_SEGUE_HANDOVER=1e999\\nREADY=1", b"X_SEGUE_PHASE=\\x1b[31m", b"=", b"WATCHDOG"):
                    sock.sendto(text, path)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"sent"})
    """
    runtime = made_directory("segue-x-")
    with supervised(
        "shop:app", "--lifespan", "off", cwd=application(code=code), runtime_dir=runtime,
        env={"NONSENSE": os.path.join(runtime, "default")},
    ) as master:  # fmt: skip
        assert call(master.port, "GET", "/")[1] == b"sent"
        master.reload()
        assert "Traceback" not in master.output.text
        master.stop()


def test_the_page_on_security_names_every_socket() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    for name in (
        "control.sock",
        "notify.sock",
        ".adopt",
        ".http",
        "--admin",
        "--token-file",
        "--control-group",
        "journal",
    ):
        assert name in text, name

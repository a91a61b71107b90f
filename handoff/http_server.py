"""HTTP/1.1 on control sockets: one small server, for master and worker alike.

The parser is h11. A web framework would do more, but the master lives for years beside every service and
this is all that it needs of HTTP. A caller that leaves cancels nothing: what it asked for goes on.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import socket
import struct
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from http import HTTPStatus
from typing import Any

import h11
import msgspec

from segue.handoff.http import Handler, Request, Response, problem

MAX_HEAD_BYTES = 32 * 1024
"""Of a request's target and headers together."""
MAX_HEADERS = 200
MAX_BODY_BYTES = 1024 * 1024
READ_TIMEOUT_S = 30.0
"""How long a caller may take to send its next request whole."""
WRITE_TIMEOUT_S = 30.0
"""How long a caller may take to make room for more of its answer."""
MAX_CONNECTIONS = 256
"""On one socket at a time, callers that wait for an outcome included."""
MAX_AGE_S = 3600.0
"""An older connection is closed with its next answer, and what it follows ends: whoever wants more asks again."""
LINGER_S = 2.0
"""How long, and how much, is still read of a request that was refused before its end."""
LINGER_BYTES = 4 * 1024 * 1024
MAX_FIELDS = 200
"""Query parameters."""
MAX_GROUPS = 256
"""Of a peer, that can be looked at: Python's getsockopt has room for so many."""
_BACKLOG = 100
_ACCEPT_PAUSE_S = 1.0
"""After a try that failed, for want of a descriptor say."""
_READ_BYTES = 64 * 1024
_SO_PEERGROUPS = 59
"""unix(7); Python has no name for it."""

Admit = Callable[[Request], Response | None]
"""Refuses a request by its head, before its body is waited for; None lets it in."""


class _Peer(msgspec.Struct, frozen=True):
    pid: int | None = None
    uid: int | None = None
    groups: frozenset[int] = frozenset()


class Server:
    """Answers requests on one bound stream socket. Made inside a running event loop.

    Where as many connections are open as may be, the one that has waited longest for a request makes room: so nobody
    who only holds connections keeps others out. If none waits, the new one is refused.
    """

    def __init__(self, sock: socket.socket, handler: Handler, admit: Admit | None = None) -> None:
        """`sock` is closed with it."""
        self._sock, self._handler, self._admit = sock, handler, admit
        self._loop = asyncio.get_running_loop()
        self._callers = _Callers()
        self._tasks: set[asyncio.Task[None]] = set()
        sock.setblocking(False)
        sock.listen(_BACKLOG)
        self.accept()

    def accept(self) -> None:
        """Begin, also again."""
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock, self._on_acceptable)

    async def hold(self, timeout_s: float) -> None:
        """Leave those who come in the kernel's queue, and wait until those who have asked have their answer.

        Also for who has come and not asked yet. Who waits for an outcome may wait for longer: `timeout_s` is the limit.
        """
        self._loop.remove_reader(self._sock)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._callers.quiet.wait()

    def close(self) -> None:
        """Accept nobody any more. Connections go on."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _on_acceptable(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            self._loop.remove_reader(self._sock)
            self._loop.call_later(_ACCEPT_PAUSE_S, self.accept)
            context = {"message": "a connection to a control socket waits to be accepted", "exception": error}
            self._loop.call_exception_handler(context)
            return
        # not left to asyncio, which before Python 3.12 prints a traceback for each connection that its process ends
        task = self._loop.create_task(self._connected(sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._callers.left)
        task.add_done_callback(_tell_failure)
        self._callers.asked(task)

    async def _connected(self, sock: socket.socket) -> None:
        connect = asyncio.open_unix_connection if sock.family == socket.AF_UNIX else asyncio.open_connection
        with contextlib.suppress(ConnectionError, TimeoutError):
            caller = _Caller(*await connect(sock=sock), self._callers)
            try:
                if len(self._tasks) > MAX_CONNECTIONS and not self._callers.make_room():
                    await caller.refuse(problem(503, _TOO_MANY))
                else:
                    await _serve_connection(caller, self._handler, self._admit)
            finally:
                caller.writer.close()


def _tell_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        context = {"message": "a connection was given up", "exception": error}
        task.get_loop().call_exception_handler(context)


_TOO_MANY = f"{MAX_CONNECTIONS} connections are open already"


class _Callers:
    """What the connections of one socket are at, by their tasks."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Task[Any], None] = {}
        """For a request, the longest first."""
        self._asking: set[asyncio.Task[Any]] = set()
        self.quiet = asyncio.Event()
        """Set while none has an answer to come."""
        self.quiet.set()

    def asked(self, task: asyncio.Task[Any]) -> None:
        """An answer is due; or, of one that has just come, a request."""
        self._asking.add(task)
        self.quiet.clear()

    def answered(self, task: asyncio.Task[Any]) -> None:
        """It has its answer."""
        self._asking.discard(task)
        if not self._asking:
            self.quiet.set()

    def left(self, task: asyncio.Task[Any]) -> None:
        """It has ended."""
        self._waiting.pop(task, None)
        self.answered(task)

    @contextlib.contextmanager
    def waiting(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """For a request; it may have to make room for others."""
        self._waiting[task] = None
        try:
            yield
        finally:
            self._waiting.pop(task, None)

    def make_room(self) -> bool:
        """Whether one could be asked to."""
        longest = next(iter(self._waiting), None)
        if longest is None:
            return False
        del self._waiting[longest]
        longest.cancel(_TOO_MANY)
        return True


class _Caller:
    """One connection."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        callers: _Callers,
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[Any] = task
        self.reader, self.writer = reader, writer
        # an answer counts as taken once all of it is with the kernel: else its last part would be waited for without an end
        writer.transport.set_write_buffer_limits(high=0)
        self.connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self.peer = _peer(writer)
        self.callers = callers

    async def next_request(self, admit: Admit | None) -> Request | None:
        """The next one, whole; None at the end of the connection. Meanwhile it may have to make room."""
        try:
            with self.callers.waiting(self.task):
                async with asyncio.timeout(READ_TIMEOUT_S):
                    return await _read_request(self.reader, self.writer, self.connection, self.peer, admit)
        except asyncio.CancelledError as cancelled:
            if cancelled.args != (_TOO_MANY,):
                raise
            self.task.uncancel()
            raise RefusedError(problem(503, _TOO_MANY)) from None

    async def refuse(self, response: Response) -> None:
        """Say so and hang up. What the caller still sends is read for a moment, else it would never see the answer."""
        if self.connection.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            return
        await _write(self.writer, self.connection, response, close=True)
        if self.writer.can_write_eof():
            self.writer.write_eof()
        left = LINGER_BYTES
        async with asyncio.timeout(LINGER_S):
            while left > 0 and (data := await self.reader.read(_READ_BYTES)):
                left -= len(data)


class RefusedError(Exception):
    """A request that is answered before it has come whole, after which the connection ends."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


async def _serve_connection(caller: _Caller, handler: Handler, admit: Admit | None) -> None:
    connection, writer = caller.connection, caller.writer
    until = time.monotonic() + MAX_AGE_S
    while True:
        try:
            request = await caller.next_request(admit)
        except h11.RemoteProtocolError as error:
            await caller.refuse(problem(error.error_status_hint or 400, str(error)))
            return
        except RefusedError as refused:
            await caller.refuse(refused.response)
            return
        except TimeoutError:
            if connection.their_state is not h11.IDLE or connection.trailing_data[0]:
                await caller.refuse(
                    problem(408, f"the request did not come whole within {READ_TIMEOUT_S:g} s")
                )
            return
        if request is None:
            return
        caller.callers.asked(caller.task)
        try:
            response = await handler(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end without an answer
            # the caller gets an answer, and the log the traceback
            context = {"message": f"{request.method} {request.path} failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            response = problem(500, f"a mistake in segue: {type(error).__name__}; its log says more")
        head_only = request.method == "HEAD"
        if response.stream is not None and not head_only:
            caller.callers.answered(caller.task)  # there is no end of it to be waited for
            await _stream(caller.reader, writer, connection, response, response.stream, until)
            return
        await _write(writer, connection, response, close=time.monotonic() >= until, head_only=head_only)
        if connection.our_state is h11.MUST_CLOSE or connection.their_state is h11.MUST_CLOSE:
            return
        caller.callers.answered(caller.task)
        connection.start_next_cycle()
        # requests that are here already wait for nothing: others have their turn between them
        await asyncio.sleep(0)


async def _drain(writer: asyncio.StreamWriter) -> None:
    """Raises `TimeoutError`, after which nothing more is sent to a caller that does not read."""
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await writer.drain()
    except TimeoutError:
        writer.transport.abort()
        raise


async def _read_request(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    connection: h11.Connection,
    peer: _Peer,
    admit: Admit | None,
) -> Request | None:
    request: Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                go_on = connection.send(h11.InformationalResponse(status_code=100, headers=[]))
                writer.write(go_on or b"")
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Request):
            # h11 limits what has not come whole, and a large head may come in one piece
            if len(event.headers) > MAX_HEADERS:
                raise h11.RemoteProtocolError(f"over {MAX_HEADERS} headers", error_status_hint=431)
            if (
                len(event.target) + sum(len(name) + len(value) for name, value in event.headers)
                > MAX_HEAD_BYTES
            ):
                raise h11.RemoteProtocolError(f"a head over {MAX_HEAD_BYTES} bytes", error_status_hint=431)
            request = _request(event, peer)
            refusal = None if admit is None else admit(request)
            if refusal is not None:
                raise RefusedError(refusal)
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY_BYTES:
                raise h11.RemoteProtocolError(f"a body over {MAX_BODY_BYTES} bytes", error_status_hint=413)
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return msgspec.structs.replace(request, body=bytes(body))
        else:
            return None


def _request(head: h11.Request, peer: _Peer) -> Request:
    try:
        target = urllib.parse.urlsplit(head.target.decode("ascii"))
        pairs = urllib.parse.parse_qsl(target.query, keep_blank_values=True, max_num_fields=MAX_FIELDS)
        query = dict(pairs)
        if len(query) < len(pairs):
            twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
            raise ValueError(f"?{twice}= is there more than once")
    except ValueError as error:
        raise h11.RemoteProtocolError(f"a target that can't be read: {error}") from error
    return Request(
        method=head.method.decode("ascii"),
        path=urllib.parse.unquote(target.path),
        query=query,
        headers={name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers},
        body=b"",
        peer_uid=peer.uid,
        peer_pid=peer.pid,
        peer_groups=peer.groups,
    )


async def _write(
    writer: asyncio.StreamWriter,
    connection: h11.Connection,
    response: Response,
    close: bool = False,
    head_only: bool = False,
) -> None:
    headers = [
        *response.headers,
        ("Content-Length", str(len(response.body))),
        ("Content-Type", response.content_type),
    ]
    if close:
        headers.append(("Connection", "close"))
    try:
        reason = HTTPStatus(response.status).phrase
    except ValueError:
        reason = ""
    head = h11.Response(status_code=response.status, headers=headers, reason=reason.encode())
    writer.write(connection.send(head) or b"")
    if not head_only:
        writer.write(connection.send(h11.Data(data=response.body)) or b"")
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    await _drain(writer)


async def _stream(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    connection: h11.Connection,
    response: Response,
    pieces: AsyncIterator[bytes],
    until: float,
) -> None:
    """Send what comes for as long as somebody is there to read it, and not for ever; the connection ends with it."""
    headers = [*response.headers, ("Content-Type", response.content_type), ("Connection", "close")]
    writer.write(connection.send(h11.Response(status_code=response.status, headers=headers)) or b"")
    await _drain(writer)

    async def send() -> None:
        async for piece in pieces:
            writer.write(connection.send(h11.Data(data=piece)) or b"")
            await _drain(writer)

    async def read() -> None:
        while await reader.read(_READ_BYTES):
            pass  # whatever else it sends

    sending, gone = asyncio.ensure_future(send()), asyncio.ensure_future(read())
    try:
        left = max(0.0, until - time.monotonic())
        await asyncio.wait({sending, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
    finally:
        ended = sending.done() or not gone.done()
        sending.cancel()
        gone.cancel()
        await asyncio.gather(sending, gone, return_exceptions=True)
    if ended:
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await _drain(writer)


def _peer(writer: asyncio.StreamWriter) -> _Peer:
    sock = writer.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return _Peer()
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", credentials)
    groups = array.array("I")
    with contextlib.suppress(OSError):  # more than there is room for
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, MAX_GROUPS * groups.itemsize))
    return _Peer(pid, uid, frozenset({gid, *groups}))

"""All that segue knows of uvicorn's inside, and nothing of it anywhere else but in `segue.worker.idle` and `.responses`.

uvicorn's protocols are used as they are: none is subclassed, so a request runs through exactly the code that it runs
through under `uvicorn`. What is read or set on them is listed in `_EXPECTED`; `check_contract` says clearly when
a release has it no longer. Tested with uvicorn 0.54 (see the bounds in pyproject.toml).
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import inspect
import termios
import time
from collections.abc import Callable, Collection, Iterator
from email.utils import formatdate
from typing import Any, TypeAlias

import h11
import uvicorn
from uvicorn.server import ServerState

Protocol: TypeAlias = Any
"""One connection's protocol object of uvicorn (or of whoever wrote the class that ``http=`` names)."""
Cycle: TypeAlias = Any
"""uvicorn's RequestResponseCycle: one request and its response."""

CLOSE_HEADER = (b"connection", b"close")
_HIGHEST_STREAM = 2**31 - 1

_EXPECTED: dict[str, tuple[str, ...]] = {
    "connections": ("self.connections.add(self)", "self.connections.discard(self)"),
    "server_state": (
        "default_headers=self.server_state.default_headers",
        "self.server_state.total_requests += 1",
    ),
    "on_response_complete": ("on_response=self.on_response_complete",),
    "timeout_keep_alive_task": ("self.timeout_keep_alive_task: ", "self.timeout_keep_alive_handler"),
    "flow": ("self.flow.resume_reading()", "self.flow.pause_reading()"),
    "ws_protocol_class": ("self.ws_protocol_class(", "server_state=self.server_state"),
    "cycle": ("self.cycle.more_body = False", "self.cycle.response_complete"),
    "transport": ("self.transport = transport",),
}
_EXPECTED_ONLY: dict[str, tuple[str, ...]] = {
    "HttpToolsProtocol": (
        "self.scope = {",
        "scope=self.scope",
        "self.pipeline.appendleft(",
        "self.parser.should_upgrade()",
    ),
    "H11Protocol": ("self.conn.start_next_cycle()", "self.conn.our_state", "self.scope = {"),
}


def check_contract(protocol_class: type) -> list[str]:
    """What `protocol_class` lacks of what we read and set; an empty list when all is there.

    Looks at the source, since what matters is where uvicorn itself sets and reads these attributes.
    """
    source = inspect.getsource(protocol_class)
    expected = [text for texts in _EXPECTED.values() for text in texts]
    expected += _EXPECTED_ONLY.get(protocol_class.__name__, ())
    return [f"{protocol_class.__name__} has no {text!r}" for text in expected if text not in source]


class ClosingState:
    """A stand-in for uvicorn's ServerState on connections that can't move: their next response says so.

    A protocol reads ``server_state.default_headers`` anew for each request. One instance serves all connections.
    """

    def __init__(self, state: ServerState) -> None:
        self.state = state

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """uvicorn's, with ``Connection: close``."""
        return [*self.state.default_headers, CLOSE_HEADER]

    @property
    def total_requests(self) -> int:
        """The real state's: responses are counted on what the protocol has."""
        return self.state.total_requests

    @total_requests.setter
    def total_requests(self, value: int) -> None:
        self.state.total_requests = value

    @property
    def connections(self) -> set[Any]:
        """The real state's."""
        return self.state.connections

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """The real state's."""
        return self.state.tasks


class Http:
    """Makes uvicorn's protocols and does to them what uvicorn's own server would."""

    def __init__(
        self, config: uvicorn.Config, app_state: dict[str, Any], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.config = config
        self.state = ServerState()
        self.closing_state = ClosingState(self.state)
        self._app_state = app_state
        self._loop = loop

    def factory(self, listener: str) -> Callable[[], Protocol]:
        """What makes the protocol of a connection that `listener` has accepted."""
        make, config, state, app_state, loop = (
            self.config.http_protocol_class,
            self.config,
            self.state,
            self._app_state,
            self._loop,
        )

        def create() -> Protocol:
            protocol: Protocol = make(config=config, server_state=state, app_state=app_state, _loop=loop)  # type: ignore[call-arg]
            protocol.segue_listener = listener
            return protocol

        return create

    def adopting_factory(self, listener: str, keep_alive_s: float) -> Callable[[], Protocol]:
        """The same for an adopted connection, of whose keep-alive time `keep_alive_s` seconds are left.

        The timer is armed before the connection is made, so that data which is already there cancels it.
        """
        create = self.factory(listener)

        def adopt() -> Protocol:
            protocol = create()
            handler = getattr(protocol, "timeout_keep_alive_handler", None)
            if handler is not None:
                protocol.timeout_keep_alive_task = self._loop.call_later(keep_alive_s, handler)
            return protocol

        return adopt

    def refresh_headers(self) -> None:
        """Rebuild the default headers, as uvicorn does each second."""
        date = [(b"date", formatdate(time.time(), usegmt=True).encode())] if self.config.date_header else []
        self.state.default_headers = date + self.config.encoded_headers

    def is_websocket(self, protocol: Protocol) -> bool:
        """Whether this connection has been upgraded."""
        websocket = self.config.ws_protocol_class
        return isinstance(websocket, type) and isinstance(protocol, websocket)

    def announce_close(self, protocol: Protocol) -> None:
        """Let the next response on this connection carry ``Connection: close``, and close it then."""
        if getattr(protocol, "server_state", None) is not self.state:
            return
        protocol.server_state = self.closing_state
        websocket = getattr(protocol, "ws_protocol_class", None)
        if websocket is not None:
            # an upgrade is answered from the same default headers, and must not carry that one
            protocol.ws_protocol_class = functools.partial(_upgraded, websocket, self.state)
        for cycle in open_cycles(protocol):
            if not cycle.response_started:
                cycle.default_headers = self.closing_state.default_headers

    def retract_close(self, protocol: Protocol) -> None:
        """Undo `announce_close`, where the header isn't out yet."""
        if getattr(protocol, "server_state", None) is not self.closing_state:
            return
        protocol.server_state = self.state
        websocket = getattr(protocol, "ws_protocol_class", None)
        if isinstance(websocket, functools.partial):
            protocol.ws_protocol_class = websocket.args[0]
        for cycle in open_cycles(protocol):
            if not cycle.response_started:
                cycle.default_headers = self.state.default_headers


def _upgraded(websocket: Callable[..., Protocol], state: ServerState, **arguments: Any) -> Protocol:
    arguments["server_state"] = state
    return websocket(**arguments)


def open_cycles(protocol: Protocol) -> Iterator[Cycle]:
    """The unanswered requests of a connection that can be reached from it (all but one that others wait behind)."""
    cycles = [cycle for cycle, _ in getattr(protocol, "pipeline", ())]
    last = getattr(protocol, "cycle", None)
    if last is not None and last not in cycles:
        cycles.append(last)
    cycles += getattr(protocol, "cycles", {}).values()
    return (cycle for cycle in cycles if not cycle.response_complete)


def in_flight(connections: Collection[Protocol]) -> int:
    """How many of `connections` have an unanswered request (fast: a status must not hold 10,000 of them up)."""
    count = 0
    for protocol in connections:
        cycle = getattr(protocol, "cycle", None)
        if cycle is not None:
            count += not cycle.response_complete
        elif cycles := getattr(protocol, "cycles", None):
            count += len(cycles)
    return count


def watch_responses(protocol: Protocol, completed: Callable[[Protocol], None]) -> None:
    """Call `completed` after each response of this connection, from the one that is under way on."""
    original = protocol.on_response_complete

    def on_response_complete() -> None:
        original()
        completed(protocol)

    protocol.on_response_complete = on_response_complete
    for cycle in open_cycles(protocol):
        cycle.on_response = on_response_complete


def unwatch_responses(protocol: Protocol) -> None:
    """Undo `watch_responses` for requests that come from now on."""
    protocol.__dict__.pop("on_response_complete", None)


def is_busy(protocol: Protocol) -> bool:
    """Whether a request is being received or answered. What arrives after an early answer doesn't count."""
    if any(True for _ in open_cycles(protocol)):
        return True
    cycle, scope = getattr(protocol, "cycle", None), getattr(protocol, "scope", None)
    if hasattr(protocol, "parser"):  # httptools: the head of a request has begun to arrive
        return scope is not None and (cycle is None or cycle.scope is not scope)
    connection = getattr(protocol, "conn", None)
    if isinstance(connection, h11.Connection):
        return connection.their_state is h11.IDLE and bool(connection.trailing_data[0])
    return False


def is_unsent(protocol: Protocol) -> bool:
    """Whether something that was written hasn't reached the other side yet.

    The kernel's queue is asked too: under TLS asyncio's transport doesn't count what waits below it, but as long as
    something does, that queue isn't empty (SIOCOUTQ, tcp(7)).
    """
    transport = protocol.transport
    if transport is None:
        return False
    sock = transport.get_extra_info("socket")
    try:
        if transport.get_write_buffer_size() > 0:
            return True
        queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)) if sock is not None else bytes(4)
    except (OSError, ValueError, AttributeError):  # it has just been closed
        return False
    return any(queued)


def is_multiplexed(protocol: Protocol) -> bool:
    """Whether it is HTTP/2."""
    return hasattr(protocol, "shutdown_requested")


def go_away(protocol: Protocol) -> None:
    """Ask an HTTP/2 client to open no more streams here; those that are open, or on their way, are answered.

    uvicorn's own `shutdown` says it only once no stream is open, and answers what comes before with 503. A first
    GOAWAY with the highest stream number is the graceful way (RFC 9113, section 6.8).
    """
    transport = protocol.transport
    if transport is not None and not transport.is_closing():
        protocol.conn.close(0, _HIGHEST_STREAM)
        protocol.flush()


def shut_down(protocol: Protocol) -> None:
    """End a connection gracefully as uvicorn does: at once when idle, WebSockets with code 1012."""
    shutdown = getattr(protocol, "shutdown", None)
    if shutdown is not None:
        shutdown()
    else:
        close(protocol)


def close(protocol: Protocol, abort: bool = False) -> None:
    """Close a connection once what is written is out, or at once."""
    transport = getattr(protocol, "transport", None)
    if transport is None:
        return
    if abort:
        transport.abort()
    elif not transport.is_closing():
        transport.close()

"""The proof that a connection may move: its parser holds nothing.

What a parser has swallowed stays in the process. If a connection moved then, bytes would be lost, or the rest of a
request's body would be read as a request by the next process (request smuggling). The keep-alive timer proves
nothing: it is armed after an early answer too. So there is one proof per protocol class, by its exact class, and
a class without one never moves. The functions only read.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from typing import Any

import h11


class Verdict(enum.Enum):
    """What may be done with a connection now."""

    IDLE = enum.auto()
    """It may move."""
    BUSY = enum.auto()
    """A request is arriving or being answered; it may move afterwards."""
    UNFLUSHED = enum.auto()
    """Answered, but the answer isn't out yet, or nothing is being read; it may move soon."""
    NEVER = enum.auto()
    """It can't be proven that nothing is held (an early answer, TLS, another protocol)."""
    CLOSING = enum.auto()
    """It is on its way out already."""


def _httptools(protocol: Any) -> Verdict:
    if protocol.pipeline:
        return Verdict.BUSY
    scope, cycle = protocol.scope, protocol.cycle
    if scope is None:  # set with the first byte of the first request
        return Verdict.IDLE
    if cycle is None or cycle.scope is not scope:  # the head of a request is incomplete
        return Verdict.BUSY
    if not cycle.response_complete:
        return Verdict.BUSY
    if cycle.more_body or protocol.parser.should_upgrade():
        return Verdict.NEVER
    return Verdict.IDLE if cycle.keep_alive else Verdict.CLOSING


def _h11(protocol: Any) -> Verdict:
    connection, cycle = protocol.conn, protocol.cycle
    ours, theirs = connection.our_state, connection.their_state
    if ours is h11.IDLE and theirs is h11.IDLE:
        data, closed = connection.trailing_data
        if closed:
            return Verdict.CLOSING
        return Verdict.BUSY if data or (cycle and not cycle.response_complete) else Verdict.IDLE
    if cycle is not None and cycle.response_complete:
        if ours in {h11.MUST_CLOSE, h11.CLOSED, h11.ERROR}:
            return Verdict.CLOSING
        return Verdict.NEVER
    return Verdict.BUSY


_PROOFS: dict[str, Callable[[Any], Verdict]] = {
    "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol": _httptools,
    "uvicorn.protocols.http.h11_impl:H11Protocol": _h11,
}


def proof_for(protocol_class: type) -> Callable[[Any], Verdict] | None:
    """The proof for exactly this class, if there is one: a subclass may hold what we know nothing of."""
    name = f"{protocol_class.__module__}:{protocol_class.__qualname__}"
    module = sys.modules.get(protocol_class.__module__)
    if getattr(module, protocol_class.__qualname__, None) is not protocol_class:
        return None
    return _PROOFS.get(name)


def judge(protocol: Any, proof: Callable[[Any], Verdict] | None) -> Verdict:
    """What may be done with `protocol`'s connection now; `proof` is `proof_for` its class."""
    transport = protocol.transport
    if transport is None or transport.is_closing():
        return Verdict.CLOSING
    if proof is None or transport.get_extra_info("sslcontext") is not None:
        return Verdict.NEVER
    verdict = proof(protocol)
    if verdict is not Verdict.IDLE:
        return verdict
    if transport.get_write_buffer_size() > 0 or protocol.flow.read_paused or not transport.is_reading():
        return Verdict.UNFLUSHED
    return Verdict.IDLE

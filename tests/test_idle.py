"""The proof that a connection may move, fed byte by byte, and what of uvicorn it stands on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn

from segue.worker.idle import Verdict, judge, proof_for
from segue.worker.uvicorn_internals import Http, is_busy


class FakeTransport:
    """Enough of a transport to run a protocol without a socket."""

    def __init__(self) -> None:
        self.written = b""
        self.closing = False
        self.reading = True
        self.buffered = 0
        self.tls: object = None

    def get_extra_info(self, name: str) -> object:
        return self.tls if name == "sslcontext" else None

    def is_closing(self) -> bool:
        return self.closing

    def is_reading(self) -> bool:
        return self.reading and not self.closing

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def set_protocol(self, protocol: object) -> None:
        raise NotImplementedError


async def answer_all(scope: Any, receive: Any, send: Any) -> None:
    """Read the body, then answer."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def answer_at_once(scope: Any, receive: Any, send: Any) -> None:
    """Answer without reading the body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


HTTP = ["httptools", "h11"]


def run(http: str, app: Any, feed: Callable[[Any, Any, Callable[[], Any]], Any], **options: Any) -> None:
    """Make a connection and let `feed(protocol, transport, verdict)` play with it."""

    async def play() -> None:
        options["timeout_keep_alive"] = 3600  # however long the machine stands still
        config = uvicorn.Config(app, http=http, ws="none", lifespan="off", log_config=None, **options)
        config.load()
        made = Http(config, {}, asyncio.get_running_loop())
        protocol = made.factory("web")()
        transport = FakeTransport()
        protocol.connection_made(transport)
        proof = proof_for(config.http_protocol_class)
        assert proof is not None
        await feed(protocol, transport, lambda: judge(protocol, proof))
        protocol.connection_lost(None)

    asyncio.run(play())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("http", HTTP)
def test_a_connection_is_idle_before_its_first_byte_and_after_each_answer_only(http: str) -> None:
    request = b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\n\r\nabc"

    async def feed(protocol: Any, transport: Any, verdict: Callable[[], Verdict]) -> None:
        assert verdict() is Verdict.IDLE
        for _ in range(2):
            for position in range(len(request)):
                protocol.data_received(request[position : position + 1])
                await settle()
                if position < len(request) - 1:
                    assert verdict() is Verdict.BUSY, position
                    assert is_busy(protocol)
            assert verdict() is Verdict.IDLE
            assert not is_busy(protocol)

    run(http, answer_all, feed)


@pytest.mark.parametrize("http", HTTP)
def test_a_request_that_was_answered_before_its_body_is_never_idle_while_that_may_come(http: str) -> None:
    async def feed(protocol: Any, transport: Any, verdict: Callable[[], Verdict]) -> None:
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 30\r\n\r\n")
        await settle()
        assert transport.written.endswith(b"ok")
        assert protocol.timeout_keep_alive_task is not None
        for byte in b"GET / HTTP/1.1\r\nHost: t\r\n\r\n...":
            assert verdict() is Verdict.NEVER
            assert not is_busy(protocol)
            protocol.data_received(bytes([byte]))

    run(http, answer_at_once, feed)


@pytest.mark.parametrize("http", HTTP)
def test_what_isnt_flushed_read_or_plain_is_not_idle(http: str) -> None:
    async def feed(protocol: Any, transport: Any, verdict: Callable[[], Verdict]) -> None:
        transport.buffered = 1
        assert verdict() is Verdict.UNFLUSHED
        transport.buffered = 0
        transport.tls = object()
        assert verdict() is Verdict.NEVER
        transport.tls = None
        assert verdict() is Verdict.IDLE
        transport.closing = True
        assert verdict() is Verdict.CLOSING

    run(http, answer_all, feed)


@pytest.mark.parametrize("http", HTTP)
def test_a_refused_upgrade_never_moves_or_is_over(http: str) -> None:
    async def feed(protocol: Any, transport: Any, verdict: Callable[[], Verdict]) -> None:
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        await settle()
        assert b"200 OK" in transport.written
        assert verdict() is (Verdict.NEVER if http == "httptools" else Verdict.IDLE)

    run(http, answer_all, feed)


def test_a_subclass_has_no_proof() -> None:
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Mine(H11Protocol):
        pass

    assert proof_for(H11Protocol) is not None
    assert proof_for(Mine) is None

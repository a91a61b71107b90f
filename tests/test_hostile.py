"""Connections under conditions that nobody wishes for: no descriptors to spare, clients that read slowly."""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from worker_harness import Bench, Client, Worker

from bench.processes import cpu_s

APP = """
import os

async def app(scope, receive, send):
    if scope["type"] != "http":
        raise ValueError(scope["type"])
    body = b"z" * int(scope["query_string"] or b"2")
    headers = [(b"content-length", b"%d" % len(body)), (b"x-pid", b"%d" % os.getpid())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""
LIMIT = 1024
NEARLY_FULL = 850
LARGE = 8_000_000


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path, APP) as bench:
        yield bench


def ask_for(client: Client, size: int) -> None:
    client.send(b"GET /?%d HTTP/1.1\r\nHost: t\r\n\r\n" % size)


def test_a_worker_that_is_nearly_full_hands_everything_over_to_one_of_the_same_size(bench: Bench) -> None:
    old = bench.spawn(prlimit=str(LIMIT)).wait_ready().activate()
    clients = [bench.client() for _ in range(NEARLY_FULL)]
    for client in clients:
        ask_for(client, 2)
        assert client.read().status == 200
    new = bench.spawn(prlimit=str(LIMIT)).wait_ready().activate()
    old.hand_over()
    for client in clients:
        ask_for(client, 2)
        assert client.read().headers["x-pid"] == str(new.pid)
    assert old.status().closed == 0
    assert new.stop() == 0
    assert old.stop() == 0


def still_has(worker: Worker, connections: int, for_s: float) -> bool:
    """Whether it has as many connections all that time."""
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        if worker.status().connections != connections:
            return False
        select.select([], [], [], 0.1)
    return True


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_an_answer_to_a_slow_reader_is_not_cut_off_when_its_connection_cannot_move(
    bench: Bench, tmp_path: Path, loop: str
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "pem"))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    old = bench.spawn(loop=loop, ssl_certfile=str(tmp_path / "pem")).wait_ready().activate()
    client = bench.client()
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    client.file.close()
    client.sock = trusting.wrap_socket(client.sock, server_hostname="localhost")
    client.file = client.sock.makefile("rb")
    ask_for(client, LARGE)
    assert client.file.peek(1)
    old.hand_over(wait=False)
    # far longer than its grace of 0.3 s and the 3 s in which a closed connection may linger
    assert still_has(old, 1, 4.0)
    assert len(client.read().body) == LARGE
    assert client.is_closed(60)
    old.wait_for("X_SEGUE_STATE", "drained")
    assert old.stop() == 0


def test_slow_readers_cost_a_draining_worker_nothing_and_move_when_they_have_read(bench: Bench) -> None:
    old = bench.spawn(dev=False).wait_ready().activate()
    clients = [bench.client() for _ in range(300)]
    for client in clients:
        ask_for(client, LARGE)
    for client in clients:
        assert client.file.peek(1)
    new = bench.spawn().wait_ready().activate()
    old.hand_over(wait=False)
    assert still_has(old, len(clients), 2.5)  # it looks around more often at first
    before = cpu_s(old.pid)
    assert still_has(old, len(clients), 1.0)
    assert cpu_s(old.pid) - before < 0.1
    for client in clients:
        assert len(client.read().body) == LARGE
    old.wait_for("X_SEGUE_STATE", "drained")
    for client in clients:
        ask_for(client, 2)
        assert client.read().headers["x-pid"] == str(new.pid)
    assert old.status().closed == 0
    assert new.stop() == 0
    assert old.stop() == 0

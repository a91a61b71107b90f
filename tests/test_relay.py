"""The relay alone: what is sent arrives once, and what can't be sent stays."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from segue.handoff import descriptors, relay

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    write, read = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with write, read:
        yield write, read


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def test_descriptors_arrive_with_their_listener_and_their_time(pair: Pair, pipe: tuple[int, int]) -> None:
    write, read = pair
    assert relay.receive(read) is None
    assert relay.send(write, "web", [pipe[0], pipe[1]], [1500, relay.NO_TIMER]) is None
    parcel = relay.receive(read)
    assert parcel is not None
    assert (parcel.header.listener, parcel.header.keep_alive_ms, parcel.lost) == ("web", [1500, -1], 0)
    assert not any(os.get_inheritable(fd) for fd in parcel.fds)
    os.write(parcel.fds[1], b"through")
    assert os.read(pipe[0], 10) == b"through"
    relay.close_all(parcel.fds)


def test_a_whole_batch_fits_into_a_message(pair: Pair, pipe: tuple[int, int]) -> None:
    write, read = pair
    count = relay.MAX_BATCH
    assert relay.send(write, "w" * 100, [pipe[0]] * count, [75_000] * count) is None
    parcel = relay.receive(read)
    assert parcel is not None
    assert len(parcel.fds) == count
    relay.close_all(parcel.fds)


def test_a_full_relay_refuses_and_takes_again_once_somebody_reads(pair: Pair, pipe: tuple[int, int]) -> None:
    write, read = pair
    sent = 0
    while (refusal := relay.send(write, "web", [pipe[0]], [0])) is None:
        sent += 1
    assert refusal is relay.Refusal.FULL
    received = 0
    while (parcel := relay.receive(read)) is not None:
        relay.close_all(parcel.fds)
        received += 1
    assert received == sent
    assert relay.send(write, "web", [pipe[0]], [0]) is None


def test_what_is_no_message_of_ours_is_refused_and_its_descriptors_are_closed(
    pair: Pair,
) -> None:
    write, read = pair
    end, sent = os.pipe2(os.O_NONBLOCK)
    for data in (b"nonsense", b'{"version":2,"listener":"web","keep_alive_ms":[1]}', b'{"version":1}'):
        socket.send_fds(write, [data], [sent])
        with pytest.raises(relay.MalformedParcelError):
            relay.receive(read)
    socket.send_fds(write, [b'{"version":1,"listener":"web","keep_alive_ms":[1,1]}'], [sent])
    with pytest.raises(relay.MalformedParcelError):
        relay.receive(read)
    os.close(sent)
    assert os.read(end, 1) == b""  # nobody has it any more
    os.close(end)


def test_a_relay_without_another_end_says_so(pipe: tuple[int, int]) -> None:
    write, read = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with write:
        read.close()
        assert relay.send(write, "web", [pipe[0]], [0]) is relay.Refusal.CLOSED
    write, read = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with read:
        write.close()
        with pytest.raises(relay.RelayClosedError):
            relay.receive(read)


def test_where_little_room_is_left_what_is_needed_is_that_of_the_next_message(
    pair: Pair, pipe: tuple[int, int]
) -> None:
    write, read = pair
    assert relay.needed_room(read, 1000) == relay.SCM_MAX_FD
    assert relay.needed_room(read, 10) == 0
    assert relay.send(write, "web", [pipe[0]] * 40, [0] * 40) is None
    assert relay.needed_room(read, 10) == relay.needed_room(read, 41) == 40
    parcel = relay.receive(read)
    assert parcel is not None
    assert len(parcel.fds) == 40
    relay.close_all(parcel.fds)


@pytest.mark.parametrize("limit", [64, 256, 1000, 1024, 2047, 4096, 20_000, 1 << 20])
def test_what_is_kept_back_from_adopting_holds_a_whole_message(limit: int) -> None:
    assert relay.max_batch(limit) <= max(1, descriptors.reserve(limit) // 2)

"""The relay: open connections on their way from one process to another (SCM_RIGHTS over SOCK_SEQPACKET).

A message is one small JSON header and up to `MAX_BATCH` descriptors. What is in flight outlives sender and reader,
since the master holds both ends. Two kernel rules shape this module: a reader without room for all descriptors of a
message loses the rest of them for good (MSG_CTRUNC), so it must not call `receive` without head-room; and what is in
flight is limited per user by the *sender's* RLIMIT_NOFILE (ETOOMANYREFS), which passes once somebody reads.
"""

from __future__ import annotations

import array
import contextlib
import enum
import errno
import os
import socket
from collections.abc import Sequence

import msgspec

VERSION = 1
MAX_BATCH = 100
"""Descriptors in one message; the kernel's limit is 253 (SCM_MAX_FD)."""
SCM_MAX_FD = 253
_MAX_HEADER_BYTES = 16 * 1024
_MAX_KEEP_ALIVE_MS = 366 * 86_400_000
_ANCILLARY_BYTES = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)

NO_TIMER = -1
"""In `Header.keep_alive_ms`: no keep-alive timer was armed for this connection."""


class Refusal(enum.Enum):
    """Why a message was not sent. Nothing of it was: the connections are still the sender's."""

    FULL = "the relay is full"
    TOO_MANY = "too many descriptors of this user are in flight"
    TOO_BIG = "the message is too big"
    CLOSED = "nobody holds the other end"


class Header(msgspec.Struct, frozen=True):
    """What a message says of its descriptors, in their order."""

    version: int
    listener: str
    """Name of the listener that accepted them (`ListenerInfo.name`)."""
    keep_alive_ms: list[int]
    """What is left of each one's keep-alive time in milliseconds, or `NO_TIMER`."""


class Parcel(msgspec.Struct, frozen=True):
    """One received message; its descriptors are the receiver's to close."""

    header: Header
    fds: list[int]
    lost: int = 0
    """Descriptors that the kernel closed for want of room (MSG_CTRUNC)."""


class MalformedParcelError(Exception):
    """A message that isn't one of ours; its descriptors have been closed."""


class RelayClosedError(Exception):
    """Nobody holds the sending end any more."""


_REFUSALS = {
    errno.EAGAIN: Refusal.FULL,
    errno.ENOBUFS: Refusal.FULL,
    errno.ENOMEM: Refusal.FULL,
    errno.ETOOMANYREFS: Refusal.TOO_MANY,
    errno.EMSGSIZE: Refusal.TOO_BIG,
    errno.EPIPE: Refusal.CLOSED,
    errno.ECONNRESET: Refusal.CLOSED,
    errno.ENOTCONN: Refusal.CLOSED,
}

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Header)


def max_batch(limit: int) -> int:
    """How many descriptors a message may have when processes may have `limit` of them."""
    return max(1, min(MAX_BATCH, limit // 16))


def send(sock: socket.socket, listener: str, fds: Sequence[int], keep_alive_ms: list[int]) -> Refusal | None:
    """Send connections without ever blocking: None if they are on their way, else why not one of them is.

    Raises OSError for what is a mistake of the caller (EBADF).
    """
    data = _encoder.encode(Header(VERSION, listener, keep_alive_ms))
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    try:
        sock.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError as error:
        refusal = _REFUSALS.get(error.errno or 0)
        if refusal is None:
            raise
        return refusal
    return None


def needed_room(sock: socket.socket, spare: int) -> int:
    """How many descriptors must fit before `receive` may be called, when `spare` do.

    Where the largest possible message fits, it is that; else the next message is looked at first, since a worker with
    just enough room for its predecessor's connections never has room for many more. Another reader may take that one
    meanwhile and leave a larger one; what `descriptors.spare_to_adopt` keeps back covers the difference.
    """
    if spare >= SCM_MAX_FD:
        return SCM_MAX_FD
    try:
        # without room for ancillary data the kernel passes no descriptor, and peeking leaves them in place
        data = sock.recv(_MAX_HEADER_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        # whatever it says, no message has more
        return min(SCM_MAX_FD, len(_decoder.decode(data).keep_alive_ms))
    except (OSError, msgspec.MsgspecError, RecursionError):
        return 0  # nothing to take, or nothing to keep


def receive(sock: socket.socket) -> Parcel | None:
    """Take the next message, or None when there is none.

    Raises `MalformedParcelError`, `RelayClosedError`.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(
            _MAX_HEADER_BYTES, _ANCILLARY_BYTES, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
    except (BlockingIOError, InterruptedError):
        return None
    except ConnectionError as error:
        raise RelayClosedError(str(error)) from error
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data and not fds:
        raise RelayClosedError("end of file")
    try:
        header = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        close_all(fds)
        raise MalformedParcelError(
            f"{len(fds)} descriptors with a header that can't be read: {error}"
        ) from error
    lost = len(header.keep_alive_ms) - len(fds)
    if header.version != VERSION or lost < 0 or (lost > 0 and not flags & socket.MSG_CTRUNC):
        close_all(fds)
        raise MalformedParcelError(
            f"version {header.version}, {len(header.keep_alive_ms)} timers for {len(fds)} descriptors"
        )
    if not all(NO_TIMER <= each <= _MAX_KEEP_ALIVE_MS for each in header.keep_alive_ms):
        close_all(fds)
        raise MalformedParcelError(f"keep-alive times that can't be: {header.keep_alive_ms}")
    return Parcel(header, fds.tolist(), lost)


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody takes."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)

"""How a worker that has lost its master is found by the next one, and what the two tell each other.

A worker binds a ``SOCK_SEQPACKET`` socket in the runtime directory. A master that starts connects, and sends one
message: who it is, and with it the read end of its lifeline. The worker answers with what it is, and with copies of
what must not be lost: both ends of the relay, and its listening sockets. Binding the socket itself is what makes the
worker known: the kernel tells the pid of whoever called listen(2) (SO_PEERCRED), which no message can forge.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from segue.handoff.messages import ListenerInfo, WorkerMode

VERSION = 1
SUFFIX = ".adopt"
"""Of the socket's name, beside the worker's private socket."""
_MAX_BYTES = 64 * 1024
_MAX_FDS = 253
_T = TypeVar("_T")
_CREDENTIALS = struct.Struct("3i")


class Offer(msgspec.Struct, frozen=True):
    """From a master to a worker, with one descriptor: the read end of the new lifeline."""

    version: int
    identity: str
    """Of the instance; empty if it has been lost."""
    epoch: int


class Acceptance(msgspec.Struct, frozen=True):
    """From a worker to its new master. With it: relay's read end, its write end, and `listeners` in their order."""

    version: int
    pid: int
    start_time: int
    """As `start_time` of this module tells of a pid."""
    identity: str
    generation: int
    worker: int
    mode: WorkerMode
    fingerprint: str
    listeners: tuple[ListenerInfo, ...] = ()
    handover_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """How long its services may take to hand over; None: it has none."""
    services_active: bool = False
    """They take work, or may."""
    lead: bool = False
    """It has, or may have, the services active that one worker alone may have."""
    versions: dict[str, int] = {}
    """Of its services, by name."""
    operator_drain: str | None = None
    error: str = ""
    """Why it doesn't accept. Nothing comes with it then."""


class MalformedError(Exception):
    """A message that isn't one of ours; what came with it has been closed."""


def connect(path: str) -> socket.socket:
    """To the worker at `path`, without ever blocking. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def listen(path: str) -> socket.socket:
    """Where a master will look, readable by its owner only. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(8)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, error.strerror, path) from None
    return sock


def peer(sock: socket.socket) -> tuple[int, int]:
    """Pid and user of the other side, as the kernel knows them."""
    pid, uid, _ = _CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return pid, uid


def send(sock: socket.socket, message: Offer | Acceptance, fds: Sequence[int] = ()) -> None:
    """One message. Raises OSError."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([msgspec.json.encode(message)], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def receive_offer(sock: socket.socket) -> tuple[Offer, list[int]] | None:
    """An `Offer` and its descriptors, the receiver's to close; None: nothing has come yet.

    Raises OSError (also at the end of file) and `MalformedError`.
    """
    received = _receive(sock)
    return None if received is None else (_decode(received, Offer), received[1])


def receive_acceptance(sock: socket.socket) -> tuple[Acceptance, list[int]] | None:
    """An `Acceptance` and its descriptors; as `receive_offer`."""
    received = _receive(sock)
    return None if received is None else (_decode(received, Acceptance), received[1])


def _receive(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    ancillary_bytes = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
    try:
        data, ancillary, flags, _ = sock.recvmsg(
            _MAX_BYTES, ancillary_bytes, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
    except (BlockingIOError, InterruptedError):
        return None
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data:
        close_all(fds)
        raise ConnectionResetError("the other side has gone")
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        close_all(fds)
        raise MalformedError("a message that did not fit")
    return data, list(fds)


def _decode(received: tuple[bytes, list[int]], kind: type[_T]) -> _T:
    data, fds = received
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        close_all(fds)
        raise MalformedError(f"a message that can't be read: {error}") from error


def is_pipe(fd: int) -> bool:
    """Whether it can be a lifeline."""
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


def is_socket(fd: int, kind: int) -> bool:
    """Whether it is a socket of this kind (``SOCK_STREAM``, ``SOCK_SEQPACKET``); never raises."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            return sock.type == kind
    except OSError:
        return False


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody takes."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since the machine was (proc(5)); None if there is none of that pid.

    With it a pid names one process for ever.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    return int(text.rpartition(")")[2].split()[19])

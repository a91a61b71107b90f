"""sd_notify datagrams (sd_notify(3)): from a worker to the master, and from the master to systemd.

A datagram socket queues few messages (``net.unix.max_dgram_qlen``, 10 by default): a sender that blocked would hang
with a stopped receiver, so nobody here ever blocks; what matters is repeated until it is confirmed. The receiver
takes the sender's pid from the kernel (SCM_CREDENTIALS), never from the text.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Mapping, Sequence

import msgspec

_MAX_BYTES = 8192
_MAX_VALUE_BYTES = 3500
"""Two values that are as long fit into a message."""
_MOST_AT_ONCE = 1024
"""Datagrams that are taken in one go: more than any queue holds, so that a sender that never pauses holds nobody up."""
_CREDENTIALS = struct.Struct("3i")


class Notifier:
    """Sends to the socket that ``NOTIFY_SOCKET`` names: a path, or ``@name`` in the abstract namespace."""

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.full = False
        """Whether the last message found the receiver's queue full."""

    def send(self, fields: Mapping[str, object], fds: Sequence[int] = ()) -> bool:
        """Send ``KEY=value`` lines; False if the receiver is gone or its queue is full."""
        self.full = False
        text = "\n".join(f"{key}={_fitting(str(value))}" for key, value in fields.items())
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            # not socket.send_fds: before Python 3.13 it drops flags and address
            self._socket.sendmsg([text.encode()], rights, socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            self.full = isinstance(error, BlockingIOError)
            return False
        return True

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()


class Notification(msgspec.Struct, frozen=True):
    """One received datagram and the process that the kernel says has sent it."""

    pid: int
    fields: dict[str, str]
    """Empty if it has no ``KEY=value``, or was too long to be whole."""


class NotifySocket:
    """The receiving end: bound at `path`, readable by its owner only."""

    def __init__(self, path: str, fd: int | None = None) -> None:
        """`fd` is the descriptor of such a socket that this process has bound there before it began anew."""
        self.path = path
        if fd is not None:
            self._socket = socket.socket(fileno=fd)
            self._socket.setblocking(False)
            return
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._socket.bind(path)
        os.chmod(path, 0o600)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def receive(self) -> list[Notification]:
        """Everything that has arrived; an empty list when nothing has."""
        received: list[Notification] = []
        for _ in range(_MOST_AT_ONCE):
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    _MAX_BYTES,
                    socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(16),
                    socket.MSG_CMSG_CLOEXEC,
                )
            except (BlockingIOError, InterruptedError):
                break
            pid = 0
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                    pid, _, _ = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])
                elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    for offset in range(0, len(content) - 3, 4):
                        os.close(struct.unpack_from("i", content, offset)[0])
            if pid:
                received.append(Notification(pid, {} if flags & socket.MSG_TRUNC else _fields(data)))
        return received

    def close(self) -> None:
        """Give the socket back and remove its name."""
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def _fitting(text: str) -> str:
    """In one line, sayable, and not so long that the receiver would drop the message."""
    data = " ".join(text.splitlines()).encode(errors="backslashreplace")
    if len(data) <= _MAX_VALUE_BYTES:
        return data.decode()
    return data[:_MAX_VALUE_BYTES].decode(errors="ignore") + "…"


def _fields(data: bytes) -> dict[str, str]:
    lines = data.decode(errors="replace").split("\n")
    return dict(line.split("=", 1) for line in lines if "=" in line)

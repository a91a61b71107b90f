"""Listening sockets: bound once, held by the master, inherited by every worker.

Never ``SO_REUSEPORT``: a queue of its own dies with its worker. The accept queue belongs to the one kernel socket, so
what is queued outlives any process that holds a descriptor of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat

import msgspec

from segue.handoff.messages import ListenerInfo
from segue.handoff.occupant import occupant

_UNIX_MODE = 0o666  # as uvicorn: access is ruled by the directory


class BindError(Exception):
    """An address can't be listened on; the message says which, why, and what to do."""


class Listener(msgspec.Struct, frozen=True):
    """One bound, listening, non-blocking socket, and the bind that asked for it."""

    bind: str
    info: ListenerInfo
    sock: socket.socket

    def refuse(self) -> None:
        """Stop listening for every process that holds it: whoever connects now is refused, not left waiting."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back, with the name of a Unix socket that is still ours."""
        if self.info.family == "unix" and self.bind.startswith("unix:"):
            with contextlib.suppress(OSError):
                path = self.bind.removeprefix("unix:")
                if _is_ours(path, self.sock):
                    os.unlink(path)
        self.sock.close()


def open_listeners(bind: str, backlog: int) -> list[Listener]:
    """Bind what `bind` names (``HOST:PORT``, ``[v6]:PORT``, ``unix:PATH``, ``fd:N``); a host name may have several.

    Raises `BindError`.
    """
    try:
        if bind.startswith("unix:"):
            socks = [_bind_unix(bind.removeprefix("unix:"))]
        elif bind.startswith("fd:"):
            socks = [_take(int(bind.removeprefix("fd:")))]
        else:
            socks = _bind_tcp(bind)
        for sock in socks:
            sock.listen(backlog)
            sock.setblocking(False)
    except OSError as error:
        raise BindError(_explain(bind, error)) from error
    return [_listener(bind, number, sock) for number, sock in enumerate(socks)]


def adopt_listener(fd: int) -> Listener:
    """Take a listening socket that this process inherited (socket activation, sd_listen_fds(3)); `fd` is closed."""
    sock = _take(fd)
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise OSError(
            errno.EINVAL, "it is a connection, not a listening socket (a socket unit needs Accept=no)"
        )
    os.close(fd)
    sock.setblocking(False)
    address = address_of(sock)
    return _listener(address, 0, sock)


def known_listener(bind: str, number: int, fd: int) -> Listener | None:
    """The `number`-th listener of `bind` again, from a copy of its socket; `fd` is closed.

    None if it is of no use: it doesn't listen any more, or its name in the file system is gone.
    """
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    try:
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(errno.EINVAL, "it doesn't listen")
        if bind.startswith("unix:") and not _is_ours(bind.removeprefix("unix:"), sock):
            raise OSError(errno.ENOENT, "its name is gone")
    except OSError:
        sock.close()
        return None
    return _listener(bind, number, sock)


def _listener(bind: str, number: int, sock: socket.socket) -> Listener:
    family = {socket.AF_INET: "inet", socket.AF_INET6: "inet6"}.get(sock.family, "unix")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", bind).strip("-") + (f"-{number}" if number else "")
    return Listener(bind, ListenerInfo(name, address_of(sock), family, bind), sock)


def address_of(sock: socket.socket) -> str:
    """Where it listens, as people write it."""
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    if isinstance(name, bytes):
        return f"unix:@{name[1:].decode(errors='replace')}"
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"{host}:{name[1]}"


def _take(fd: int) -> socket.socket:
    sock = socket.socket(fileno=os.dup(fd))
    os.set_inheritable(sock.fileno(), False)
    if sock.type != socket.SOCK_STREAM:
        sock.close()
        raise OSError(errno.EPROTOTYPE, "it isn't a stream socket")
    return sock


def _bind_tcp(bind: str) -> list[socket.socket]:
    host, _, port = bind.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    found = socket.getaddrinfo(host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    if int(port) == 0:
        found = found[:1]  # several addresses could not share the port that the kernel picks
    socks: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            socks.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind(address)
            except OSError as error:
                # a name such as localhost may resolve to a family that this host doesn't have
                if error.errno != errno.EADDRNOTAVAIL or len(found) == 1:
                    raise
                socks.remove(sock)
                sock.close()
    except OSError:
        for sock in socks:
            sock.close()
        raise
    if not socks:
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    return socks


def _bind_unix(path: str) -> socket.socket:
    mode = _UNIX_MODE
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.EEXIST, "the file exists and isn't a socket")
        mode = stat.S_IMODE(found.st_mode)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)  # nobody listens: it was left behind
            except BlockingIOError:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
            else:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        os.chmod(path, mode)
    except OSError:
        sock.close()
        raise
    return sock


def _is_ours(path: str, sock: socket.socket) -> bool:
    """Whether the name still leads to this socket, and not to one that somebody bound there since."""
    if not os.path.exists(path):
        return False
    with open("/proc/net/unix") as table:
        inode = str(os.fstat(sock.fileno()).st_ino)
        return any(fields[6:8] == [inode, path] for fields in map(str.split, table))


_HINTS = {
    errno.EADDRINUSE: "another process listens there; stop it or choose another address",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE, and a Unix socket a directory that you may write to",
    errno.EADDRNOTAVAIL: "this host does not have that address",
    errno.ENOENT: "its directory does not exist",
    errno.EBADF: "no such descriptor was inherited",
    errno.ENOTSOCK: "that descriptor isn't a socket",
}


def _explain(bind: str, error: OSError) -> str:
    hint = _HINTS.get(error.errno or 0)
    if error.errno == errno.EADDRINUSE and (who := occupant(bind)):
        hint = f"{who} listens there; stop it or choose another address"
    reason = error.strerror or str(error)
    return f"cannot listen on {bind}: {reason}" + (f" ({hint})" if hint else "")

"""What a master is given when it starts: by systemd's store, by its socket units, or by itself before an upgrade.

All of it comes in one way, as descriptors with names (sd_listen_fds(3)). Names that aren't ours are sockets that somebody
else has bound for us.
"""

from __future__ import annotations

import contextlib
import os
import socket
import urllib.parse
from collections.abc import Iterable

from segue.handoff.listeners import Listener, adopt_listener, known_listener
from segue.handoff.messages import FdName
from segue.supervisor.spawning import Lifeline, Relay

LOCK = "segue-lock"
EVENTS = "segue-events"
CONTROL = "segue-control"
NOTIFY = "segue-notify"
LIFELINE_READ = "segue-lifeline-read"
LIFELINE_WRITE = "segue-lifeline-write"
_ADMIN = "segue-admin"
_LISTENER = "segue-listener"
_ONLY_ONCE = {
    *(LOCK, EVENTS, CONTROL, NOTIFY),
    *(LIFELINE_READ, LIFELINE_WRITE, FdName.RELAY_READ, FdName.RELAY_WRITE),
}


def listener_name(bind: str, number: int) -> str:
    """What the `number`-th listener of `bind` is called in the store: systemd takes no colon in a name."""
    return f"{_LISTENER}.{number}.{urllib.parse.quote(bind, safe='')}"


def admin_name(bind: str, number: int) -> str:
    """What the `number`-th listener of ``--admin`` is called while a master renews itself."""
    return f"{_ADMIN}.{number}.{urllib.parse.quote(bind, safe='')}"


class Inherited:
    """Taken apart. What is not taken over is closed by `close`."""

    def __init__(self, fds: Iterable[tuple[str, int]]) -> None:
        """Raises OSError for what isn't a socket and should be."""
        self.listeners: dict[str, list[Listener]] = {}
        """Those that a master of this instance had bound, by bind."""
        self.passed: list[tuple[str, Listener]] = []
        """Those that others have bound, and their names."""
        self.relay: Relay | None = None
        self.lifeline: Lifeline | None = None
        self.kept: set[str] = set()
        """Names of what is in use, of that which a service manager keeps for us."""
        self.useless: set[str] = set()
        """Names of what it keeps, and nobody wants."""
        self._own: dict[str, int] = {}
        bound: list[tuple[str, int, int]] = []
        for name, fd in fds:
            if name in _ONLY_ONCE:
                if name in self._own:
                    os.close(fd)
                    self.useless.add(name)  # which of the two is the right one can't be told
                else:
                    self._own[name] = fd
            elif name.startswith(f"{_ADMIN}."):
                self._own[name] = fd
            elif name.startswith(f"{_LISTENER}."):
                _, number, bind = name.split(".", 2)
                bound.append((urllib.parse.unquote(bind), int(number), fd))
            else:
                self.passed.append((name, _passed(name, fd)))
        for known, place, fd in sorted(bound):
            listener = known_listener(known, place, fd)
            name = listener_name(known, place)
            if listener is not None and name not in self.kept:
                self.listeners.setdefault(known, []).append(listener)
                self.kept.add(name)
            else:
                self.useless.add(name)
                if listener is not None:
                    listener.sock.close()
        if {FdName.RELAY_READ, FdName.RELAY_WRITE} <= self._own.keys():
            ends = [self._own.pop(name) for name in (FdName.RELAY_READ, FdName.RELAY_WRITE)]
            self.relay = Relay(*(socket.socket(fileno=fd) for fd in ends))
            self.kept |= {FdName.RELAY_READ, FdName.RELAY_WRITE}
        self.useless |= {FdName.RELAY_READ, FdName.RELAY_WRITE} & self._own.keys()
        self.kept -= self.useless
        if {LIFELINE_READ, LIFELINE_WRITE} <= self._own.keys():
            self.lifeline = Lifeline(self._own.pop(LIFELINE_READ), self._own.pop(LIFELINE_WRITE))

    def take(self, name: str) -> int | None:
        """The descriptor of this name, which is the caller's from now on."""
        return self._own.pop(name, None)

    def close(self) -> None:
        """Give back what nobody has taken."""
        for fd in self._own.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._own.clear()


def _passed(name: str, fd: int) -> Listener:
    try:
        return adopt_listener(fd)
    except OSError as error:
        raise OSError(error.errno, f"{name or fd}: {error.strerror}") from error

"""The public addresses of an instance: opened before a generation is promoted, closed after the last has left them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping

from segue.handoff.listeners import BindError, Listener, open_listeners
from segue.supervisor.inherited import Inherited, listener_name
from segue.supervisor.settings import Effective
from segue.supervisor.systemd import FIRST_FD


class Listening:
    """Every listening socket that the master holds, by the bind that asked for it."""

    def __init__(self, inherited: Inherited) -> None:
        self._passed = list(inherited.passed)
        self._inherited = [listener for _, listener in self._passed]
        self._open: dict[str, list[Listener]] = dict(inherited.listeners)
        self._asked_for: tuple[str, ...] = ()
        """Binds of a generation that is being prepared: nobody else may close them meanwhile."""

    def restore(self, found: Mapping[str, Listener]) -> dict[str, Listener]:
        """Take over what workers have handed over, unless it is there already. Returns all that there is, by name."""
        known = {listener.info.name: listener for listener in self._inherited}
        known |= {each.info.name: each for listeners in self._open.values() for each in listeners}
        passed = {_inode(listener): listener for listener in self._inherited}
        for name, listener in found.items():
            if name in known:
                listener.sock.close()
            elif (same := passed.get(_inode(listener))) is not None:
                listener.sock.close()
                known[name] = same
            else:
                self._open.setdefault(listener.bind, []).append(listener)
                known[name] = listener
        return known

    @property
    def own(self) -> list[tuple[str, int]]:
        """Those that this master, or one before it, has bound, by the names under which the next will know them."""
        return [
            (listener_name(bind, number), listener.sock.fileno())
            for bind, listeners in self._open.items()
            for number, listener in enumerate(listeners)
            if listener not in self._inherited
        ]

    @property
    def names(self) -> list[tuple[str, int]]:
        """Every socket."""
        return self.own + [(name, listener.sock.fileno()) for name, listener in self._passed]

    async def open(self, effective: Effective) -> tuple[Listener, ...]:
        """What these settings ask for; sockets that are open stay as they are. Raises `BindError`."""
        settings = effective.settings
        # sockets that the service manager passed stand in for an address that nobody has chosen
        binds = () if self._inherited and effective.sources["bind"] == "default" else settings.binds
        found: list[Listener] = []
        self._asked_for = binds
        try:
            for bind in binds:
                if bind not in self._open:
                    inherited = self._passed_for(bind)
                    # in a thread: a host name may have to be looked up
                    self._open[bind] = inherited or await asyncio.to_thread(
                        open_listeners, bind, settings.backlog
                    )
                for listener in self._open[bind]:
                    listener.sock.listen(
                        settings.backlog
                    )  # again, for what was open: the backlog may have changed
                found += self._open[bind]
        except BindError:
            self._asked_for = ()
            raise
        return tuple(found) + tuple(listener for listener in self._inherited if listener not in found)

    def _passed_for(self, bind: str) -> list[Listener]:
        """What was passed and is what `bind` asks for: by its address, or as ``fd:3`` and following in their order."""
        if bind.startswith("fd:"):
            place = int(bind.removeprefix("fd:")) - FIRST_FD
            return self._inherited[place : place + 1] if place >= 0 else []
        return [each for each in self._inherited if _covers(each.info.address, bind)]

    def opened(self) -> None:
        """The generation for which `open` was called is known now."""
        self._asked_for = ()

    def refuse(self, listeners: Iterable[Listener]) -> list[str]:
        """Nobody accepts on these any more: who connects is refused, not left waiting. Returns their addresses."""
        refused = []
        for listener in listeners:
            if listener.bind in self._open:
                listener.refuse()
                refused.append(listener.info.address)
        return refused

    def close_all_but(self, used: Iterable[Listener]) -> None:
        """Close what nobody asks for."""
        binds = {listener.bind for listener in used} | set(self._asked_for)
        for bind in [bind for bind in self._open if bind not in binds]:
            for listener in self._open.pop(bind):
                if listener not in self._inherited:
                    listener.close()

    def close(self) -> None:
        """Close everything."""
        self._asked_for = ()
        self.close_all_but(())
        for listener in self._inherited:
            listener.sock.close()  # its name in the file system is whose it was


_EVERYWHERE = {"", "0.0.0.0", "[::]"}


def _covers(address: str, bind: str) -> bool:
    """Whether a socket that somebody else has bound at `address` is what `bind` asks for."""
    if address == bind:
        return True
    (host, _, port), (wanted, _, number) = address.rpartition(":"), bind.rpartition(":")
    return port == number and host in _EVERYWHERE and wanted in _EVERYWHERE


def _inode(listener: Listener) -> int:
    return os.fstat(listener.sock.fileno()).st_ino

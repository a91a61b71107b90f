"""Signals to a master: gunicorn's, except that SIGUSR2 renews it in place. A handler only puts something into its queue."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from segue.supervisor import reaping
from segue.supervisor.log import Log
from segue.supervisor.requests import Requests

_NUMBERS = {
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
_TURNS = 4
"""Of the loop, from a signal to the call of its handler."""


class Signals:
    """What each of them asks for."""

    def __init__(self, requests: Requests, log: Log, terminate: Callable[[], None]) -> None:
        """`terminate` is for SIGTERM, which may be the first half of a restart of the unit."""
        self._requests, self._log, self._terminate = requests, log, terminate

    def listen(self) -> None:
        """From now on; what an upgrade has held back comes at once."""
        loop = asyncio.get_running_loop()
        for number, handler in {
            signal.SIGHUP: self._on_hup,
            signal.SIGTERM: self._on_term,
            signal.SIGINT: lambda: self._on_stop("SIGINT"),
            signal.SIGQUIT: lambda: self._on_stop("SIGQUIT", at_once=True),
            signal.SIGTTIN: lambda: self._requests.scale_by(1),
            signal.SIGTTOU: lambda: self._requests.scale_by(-1),
            signal.SIGUSR2: self._on_usr2,
            signal.SIGUSR1: self._on_usr1,
        }.items():
            loop.add_signal_handler(number, handler)
        if reaping.is_first():
            loop.add_signal_handler(signal.SIGCHLD, reaping.reap)
            reaping.reap()  # those that ended before
        unblock()

    def _on_hup(self) -> None:
        self._log("info", "signal", signal="SIGHUP")
        self._requests.reload("SIGHUP")

    def _on_term(self) -> None:
        self._log("info", "signal", signal="SIGTERM")
        self._terminate()

    def _on_stop(self, name: str, at_once: bool = False) -> None:
        self._log("info", "signal", signal=name)
        self._requests.end(at_once)

    def _on_usr2(self) -> None:
        self._log("info", "signal", signal="SIGUSR2")
        self._requests.upgrade("SIGUSR2")

    def _on_usr1(self) -> None:
        """Elsewhere it means that log files are to be opened anew; by itself it would end this process."""
        self._log("info", "signal", signal="SIGUSR1", action="none: there is no log file to be opened anew")


def block() -> None:
    """None reaches this thread; they wait. In every thread but that of the loop, and there before an upgrade and an end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)


def unblock() -> None:
    """Those that wait come now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NUMBERS)


async def hold() -> None:
    """Block them; those that came before have had their handlers called when this returns."""
    block()
    for _ in range(_TURNS):
        await asyncio.sleep(0)

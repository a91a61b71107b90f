"""Signals that are for the master, also where they come to every process of it: ``systemctl kill -s HUP``, Ctrl-C.

A process that the master starts would be ended by them until it has handlers of its own. So it is started with them
held back, which outlives an exec, and lets them through when it has.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

OF_THE_MASTER = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2})
"""Not SIGTTIN and SIGTTOU: they do nothing to what is in a session of its own."""


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """What this thread starts in it is started with them blocked; its own come afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_MASTER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through() -> None:
    """From now on they reach this thread; those that wait come at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_MASTER)

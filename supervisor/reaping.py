"""The first process of a container: what the kernel asks of it, and of no other.

It is given every process that has lost its parent, and must reap it. And a signal that it has no handler for does not
reach it, not even one that ends every other process. So those that come before the master listens are held back.

The kernel tells of children that have ended with SIGCHLD, and that may stand for several. Those that this program has started itself are
asked for elsewhere, by their pid, where it is of interest how they ended: they are left alone here. So the one that has
ended is looked at before it is taken (WNOWAIT); is it one of ours, then what is behind it is looked at once that is done.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection

_started: set[int] = set()
"""Pids of children that somebody here asks for."""


def is_first() -> bool:
    """Whether processes without a parent become this one's."""
    return os.getpid() == 1


def hold_back(signals: Collection[signal.Signals]) -> None:
    """Let `signals` wait until somebody unblocks them. To be called before anything that takes time."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)


def end_by(signals: Collection[signal.Signals]) -> None:
    """Let `signals` end this process, as they do with any other, but not before it has cleaned up."""
    for number in signals:
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def leave(pid: int) -> None:
    """`pid` is a child that the caller reaps, and then tells so with `done`."""
    _started.add(pid)


def done(pid: int) -> None:
    """`pid` was reaped."""
    _started.discard(pid)
    if is_first():
        reap()


def reap() -> None:
    """Take every process that has ended, but those that somebody asks for."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in _started:
            return
        os.waitpid(ended.si_pid, os.WNOHANG)

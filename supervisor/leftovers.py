"""The processes of a systemd unit that outlive its main one: workers whose master has ended, and what they started.

The unit has ``KillMode=process``, so that a crash of the master costs no worker. What systemd then no longer does, to
leave no process behind at a stop, is done here, by its own measure: the unit's control group.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

TERM_GRACE_S = 5.0
"""From SIGTERM to SIGKILL, for what isn't a worker or has had its time."""
_WORKER = b"segue.worker"
_ROOTS = {"0": ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"), "systemd": ("/sys/fs/cgroup/systemd",)}
"""Where the hierarchy is that systemd keeps units in: the only one, or beside others (cgroups(7))."""
_CONTROL = "/.control"
"""Where systemd may put the processes of ``ExecStop=`` and the like."""


class NotInUnitError(Exception):
    """It is not in the control group of that unit that this process runs."""


class _Group:
    """A unit's control group."""

    def __init__(self) -> None:
        """That of this process. Raises `NotInUnitError`."""
        for directory in _candidates():
            self._directory = directory
            self.unit = os.path.basename(directory)
            if os.getpid() in self.pids():
                return
        raise NotInUnitError("the control group of this process can't be found")

    def pids(self) -> list[int]:
        """Who is in it now, below it too."""
        found: list[int] = []
        for directory, _, files in os.walk(self._directory):
            if "cgroup.procs" in files:
                with contextlib.suppress(OSError):
                    found += map(int, Path(directory, "cgroup.procs").read_text().split())
        return found


def _candidates() -> list[str]:
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        key = number if number == "0" else controllers.removeprefix("name=")
        found += [root + path.removesuffix(_CONTROL) for root in _ROOTS.get(key, ())]
    return found


def _is_worker(pid: int) -> bool:
    try:
        return _WORKER in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def end_strays(known: Collection[int]) -> list[int]:
    """Ask the workers of this process's unit that aren't `known` to end; returns their pids."""
    try:
        group = _Group()
    except (NotInUnitError, OSError):
        return []
    strays = [pid for pid in group.pids() if pid not in known and _is_worker(pid)]
    for pid in strays:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGTERM)
    return strays


def unit() -> str:
    """The name of this process's unit. Raises `NotInUnitError`."""
    return _Group().unit


def members() -> frozenset[int]:
    """The pids of this process's unit. Raises `NotInUnitError`."""
    return frozenset(_Group().pids())


def end_all(
    unit: str, budget_s: float, say: Callable[[str], None], among: Collection[int] | None = None
) -> None:
    """End every process of `unit` but this one: workers gracefully within `budget_s` seconds, then by force.

    `among` is whom to end, if others may have come since. A SIGTERM to this process says that the time is up. Raises
    `NotInUnitError`.
    """
    group = _Group()
    if group.unit != unit:
        raise NotInUnitError(f"this process runs in {group.unit}, not in {unit}")

    def left_over() -> list[int]:
        return [pid for pid in group.pids() if pid not in ours and (among is None or pid in among)]

    hurried, hurry = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(hurry)
    signal.signal(signal.SIGTERM, lambda *_: None)
    ours = {os.getpid(), os.getppid()}
    if workers := [pid for pid in left_over() if _is_worker(pid)]:
        say(f"workers without a master are being stopped: {', '.join(map(str, workers))}")
        _end(workers, signal.SIGTERM, budget_s, hurried)
    if left := left_over():
        say(f"processes are left and get SIGTERM: {', '.join(map(str, left))}")
        _end(left, signal.SIGTERM, TERM_GRACE_S, hurried)
    while left := left_over():
        say(f"processes are left and get SIGKILL: {', '.join(map(str, left))}")
        _end(left, signal.SIGKILL, TERM_GRACE_S, -1)


def _end(pids: Collection[int], number: signal.Signals, budget_s: float, hurried: int) -> None:
    """Signal them and wait until all have ended, the time is up, or something can be read from `hurried`."""
    poll = select.poll()
    waiting: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            waiting.add(pidfd)
            poll.register(pidfd, select.POLLIN)
            signal.pidfd_send_signal(pidfd, number)
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)  # one that was stopped hears nothing else
    if hurried >= 0:
        poll.register(hurried, select.POLLIN)
    deadline = time.monotonic() + budget_s
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready = {fd for fd, _ in poll.poll(left * 1000)}
        if hurried in ready:
            break
        for pidfd in ready:
            poll.unregister(pidfd)
            waiting.discard(pidfd)
            os.close(pidfd)
    for pidfd in waiting:
        os.close(pidfd)

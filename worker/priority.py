"""A booting worker steps back: importing an application must not slow down the generation that serves.

Where the kernel groups processes by session (sched(7), autogroup; the default of most distributions) a worker, being a
session of its own, competes as a group: only the group's nice value counts. It may be raised, and taken back to 0,
without privilege, but then only about ten times a second on the whole machine; so it is tried again until it works.

Elsewhere the nice value itself counts. With the privilege to undo it, it is raised while booting. Without, a raised
nice value would stay for ever; there a thread may still ask for long time slices (EEVDF, Linux 6.12 and later: a custom
slice in ``sched_attr.sched_runtime``), which lets those with shorter ones be scheduled before it. Both are per thread,
and new threads inherit them, so `restore` goes through all threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import resource
import struct
import threading

_BOOT_NICE = 5
"""A third of the weight of what serves: less would take a start on a busy machine into its timeout."""
_AUTOGROUP = "/proc/self/autogroup"
_RETRY_S = 0.11
"""The kernel grants one unprivileged change per 0.1 s."""
_BOOT_SLICE_NS = 100_000_000
"""The longest that the kernel grants."""
_CAP_SYS_NICE = 23
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period


class BootPriority:
    """Lowered on construction; `restore` undoes it for every thread of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._restored = threading.Event()
        self._grouped = False
        if not self._lower_group():
            threading.Thread(target=self._lower_group_later, name="segue-priority", daemon=True).start()
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)
        self._niced = self._nice < _BOOT_NICE and _may_set(self._nice)
        if self._niced:
            os.setpriority(os.PRIO_PROCESS, 0, _BOOT_NICE)
        else:
            _ask_for_slice(0, self._nice, _BOOT_SLICE_NS)

    def restore(self, loop: asyncio.AbstractEventLoop) -> None:
        """Go back to the priority of before, in every thread that still has that of booting.

        The group's may follow within a moment, from `loop`: waiting for it here would delay the first request.
        """
        with self._lock:
            self._restored.set()
        self._raise_group(loop)
        for thread in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if not self._niced:
                    _ask_for_slice(thread, os.getpriority(os.PRIO_PROCESS, thread), 0)
                elif os.getpriority(os.PRIO_PROCESS, thread) == _BOOT_NICE:
                    os.setpriority(os.PRIO_PROCESS, thread, self._nice)

    def _lower_group(self) -> bool:
        """True when there is nothing left to try."""
        with self._lock:
            if self._restored.is_set():
                return True
            try:
                _write_group_nice(_BOOT_NICE)
            except BlockingIOError:
                return False
            except OSError:
                return True  # no autogroups here
            self._grouped = True
            return True

    def _lower_group_later(self) -> None:
        while not self._restored.wait(_RETRY_S) and not self._lower_group():
            pass

    def _raise_group(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._grouped:
            return
        try:
            _write_group_nice(0)
        except BlockingIOError:
            loop.call_later(_RETRY_S, self._raise_group, loop)
        except OSError:
            return


def _write_group_nice(nice: int) -> None:
    with open(_AUTOGROUP, "w") as group:
        group.write(str(nice))


def _may_set(nice: int) -> bool:
    """Whether this process may return to `nice` later (setpriority(2), RLIMIT_NICE in getrlimit(2))."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                if int(line.split()[1], 16) >> _CAP_SYS_NICE & 1:
                    return True
                break
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    return soft == resource.RLIM_INFINITY or 20 - soft <= nice


def _ask_for_slice(thread: int, nice: int, nanoseconds: int) -> None:
    """Ask the scheduler for time slices of that length; 0 for the default. An older kernel ignores or refuses it."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or os.sched_getscheduler(thread) != os.SCHED_OTHER:
        return
    import ctypes

    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
    ctypes.CDLL(None, use_errno=True).syscall(number, thread, attributes, 0)

"""A booting worker steps back: importing an application must not slow down the generation that serves.

With the privilege to undo it, the nice value is raised while booting. Without it a raised nice value would stay for
ever; there a thread may still ask for long time slices (EEVDF, Linux 6.12 and later: a custom slice in
``sched_attr.sched_runtime``), which lets those with shorter ones be scheduled before it. Both are per thread, and new
threads inherit them, so `restore` goes through all threads.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import struct

_BOOT_NICE = 10
_BOOT_SLICE_NS = 100_000_000
"""The longest that the kernel grants."""
_CAP_SYS_NICE = 23
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period


class BootPriority:
    """Lowered on construction; `restore` undoes it for every thread of the process."""

    def __init__(self) -> None:
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)
        self._niced = self._nice < _BOOT_NICE and _may_set(self._nice)
        if self._niced:
            os.setpriority(os.PRIO_PROCESS, 0, _BOOT_NICE)
        else:
            _ask_for_slice(0, self._nice, _BOOT_SLICE_NS)

    def restore(self) -> None:
        """Go back to the priority of before, in every thread that still has that of booting."""
        for thread in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if not self._niced:
                    _ask_for_slice(thread, os.getpriority(os.PRIO_PROCESS, thread), 0)
                elif os.getpriority(os.PRIO_PROCESS, thread) == _BOOT_NICE:
                    os.setpriority(os.PRIO_PROCESS, thread, self._nice)


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

"""What this process uses, read from /proc."""

from __future__ import annotations

import os
import time

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def rss_bytes() -> int:
    """Resident memory of this process (proc_pid_statm(5))."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES


class CpuMeter:
    """CPU use of this process between two readings, in percent of one core."""

    def __init__(self) -> None:
        self._wall, self._cpu, self._percent = time.monotonic(), time.process_time(), 0.0

    def percent(self) -> float:
        """Since the last reading; readings within half a second repeat the last one."""
        wall, cpu = time.monotonic(), time.process_time()
        if wall - self._wall >= 0.5:
            self._percent = round(100 * (cpu - self._cpu) / (wall - self._wall), 1)
            self._wall, self._cpu = wall, cpu
        return self._percent

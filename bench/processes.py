"""What Linux says about processes: size, CPU time, descriptors, children (proc(5))."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

MARK = "BENCH_MARK"
"""An environment variable that marks every process of one measured server, so that those it leaves are found."""

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    """Resident memory."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    if found is None:
        raise ProcessLookupError(f"process {pid} has ended")
    return int(found[1]) / 1024


def ticks(pid: int) -> int:
    """CPU time in clock ticks: utime and stime."""
    fields = _stat(pid)
    return int(fields[11]) + int(fields[12])


def cpu_s(pid: int) -> float:
    """CPU time to the nanosecond where the kernel keeps it (all threads that still run), else to the tick."""
    try:
        threads = [int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    except FileNotFoundError:
        threads = []
    return sum(threads) / 1e9 if threads and sum(threads) else ticks(pid) * _TICK_S


def waited_s(pid: int) -> float:
    """How long it was ready to run while no processor was free for it; 0 where the kernel doesn't keep it."""
    try:
        return (
            sum(int(path.read_text().split()[1]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
            / 1e9
        )
    except FileNotFoundError:
        return 0.0


def children(pid: int) -> list[int]:
    """Of a process, zombies among them."""
    found = []
    for entry in _all_pids():
        try:
            if int(_stat(entry)[1]) == pid:
                found.append(entry)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found)


def descriptors(pid: int) -> int:
    """How many are open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def marked(mark: str) -> list[int]:
    """All processes that were started with this mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in _all_pids():
        try:
            if wanted in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found.append(entry)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return sorted(found)


def kill_marked(mark: str) -> list[int]:
    """End by pid what a server has left behind; their pids."""
    left = marked(mark)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + 5
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def machine_busy(seconds: float) -> float:
    """The share of all processors that was in use for that long, from 0 to 1."""
    before = _processors()
    time.sleep(seconds)
    after = _processors()
    idle, total = after[0] - before[0], after[1] - before[1]
    return 1 - idle / total if total else 0.0


def _processors() -> tuple[int, int]:
    """Ticks idle, ticks in all."""
    fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name, which may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()

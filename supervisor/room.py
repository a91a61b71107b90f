"""Whether there is room for so many workers: on the processors, and in the memory that the machine or the container has left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

PER_PROCESSOR, AT_LEAST = 32, 64
"""So many workers for each processor, but at least so many, are taken for meant when somebody asks for them at run time."""
_CGROUPS = Path("/sys/fs/cgroup")
_GIB = 2**30
_LOOKED_AT = 3
"""Of so many processes, which are alike."""


def too_many(workers: int, pids: Sequence[int]) -> str:
    """Why there shall not be `workers`, of which those with `pids` run; empty if there may, or if nobody can tell.

    Against a slip of the finger, with which a machine is busy for minutes, or which ends in the killing of processes. What
    processes share isn't counted, nor is looked for what could be swapped out or given back by others.
    """
    more = workers - len(pids)
    if more <= 0:
        return ""
    processors = len(os.sched_getaffinity(0))
    most = max(AT_LEAST, PER_PROCESSOR * processors)
    if workers > most:
        return (
            f"{workers} workers on {processors} processors would be busy with themselves; up to {most} are taken here, "
            "more only from the settings, with a reload"
        )
    each = max((own_bytes(pid) for pid in pids[:_LOOKED_AT]), default=0)
    left = bytes_left()
    if more * each <= left:
        return ""
    return (
        f"{more} more workers of about {each / 2**20:.0f} MiB each need {more * each / _GIB:.1f} GiB, "
        f"and {left / _GIB:.1f} GiB of memory are left"
    )


def own_bytes(pid: int) -> int:
    """Memory that a process shares with no other; 0 if it can't be told."""
    try:
        uss: int = psutil.Process(pid).memory_full_info().uss
    except psutil.Error:
        return 0
    return uss


def bytes_left() -> int:
    """What can still be had without swapping: of the machine, or of a control group with a limit (cgroups(7))."""
    left: list[int] = [psutil.virtual_memory().available]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without control groups
        return left[0]
    path = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    group = _CGROUPS / path
    while group != _CGROUPS.parent:
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            reclaimable = _field(group / "memory.stat", "inactive_file")
        except (OSError, ValueError):  # the root has none, or there is no such controller
            limit, used, reclaimable = "max", 0, 0
        if limit != "max":
            left.append(max(0, int(limit) - used + reclaimable))
        group = group.parent
    return min(left)


def _field(path: Path, name: str) -> int:
    return next(
        (int(value) for key, value in map(str.split, path.read_text().splitlines()) if key == name), 0
    )

"""Which losses are explained: connections that a worker held when it was killed, and errors of code that is bad on purpose.

A worker is stopped first, then what it holds is read from /proc, then it is killed. So the set is exact: whoever loses a
connection that is not in it has found a mistake of ours. Bad code writes down whom it has answered with an error.
"""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Sequence
from pathlib import Path

Loss = tuple[float, int, float, str]
"""When, of which client's port, dialed when, and what: as the load generator tells it."""


class Cause(enum.StrEnum):
    """Why something was lost."""

    KILLED = "with a worker that was killed"
    SPOILED = "with 500, by code that is bad on purpose"
    UNKNOWN = "otherwise"


class Blame:
    """The connections that died with their workers, and the answers of bad code, by the client's port."""

    def __init__(self, spoiled: Path) -> None:
        """`spoiled` is the file into which bad code writes."""
        self.spoiled = spoiled
        self._written: dict[int, list[float]] | None = None
        self._deaths: dict[int, list[float]] = {}
        self.port = 0
        """Where the service listens."""

    def take_down(self, pid: int) -> int:
        """Write down what a stopped process holds; returns how many connections that is."""
        ports = held(pid, self.port)
        at = time.monotonic()
        for port in ports:
            self._deaths.setdefault(port, []).append(at)
        return len(ports)

    def cause(self, loss: Loss) -> Cause:
        """Of one loss."""
        at, port, dialed, what = loss
        if what.endswith("non_2xx 500") and _between(dialed, self._errors().get(port, ()), at):
            return Cause.SPOILED
        return Cause.KILLED if _between(dialed, self._deaths.get(port, ()), at) else Cause.UNKNOWN

    def _errors(self) -> dict[int, list[float]]:
        if self._written is None:
            self._written = {}
            for line in self.spoiled.read_text().splitlines():
                port, at = line.split()
                self._written.setdefault(int(port), []).append(float(at))
        return self._written


def _between(first: float, times: Sequence[float], last: float) -> bool:
    return any(first <= at <= last for at in times)


def held(pid: int, port: int) -> set[int]:
    """The clients' ports of the connections to `port` that a process holds."""
    directory = f"/proc/{pid}/fd"
    inodes = set()
    for fd in os.listdir(directory):
        target = os.readlink(f"{directory}/{fd}")
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[9] in inodes and int(fields[1].rpartition(":")[2], 16) == port:
            found.add(int(fields[2].rpartition(":")[2], 16))
    return found - {0}

"""Which losses are explained: those of connections that a worker held when it was killed.

A worker is stopped first, then what it holds is read from /proc, then it is killed. So the set is exact: whoever loses a
connection that is not in it has found a mistake of ours.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


class Blame:
    """The connections that died with their workers, by the client's port."""

    def __init__(self) -> None:
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

    def explains(self, at: float, port: int, dialed: float) -> bool:
        """Whether a connection that was dialed at `dialed` and lost at `at` was held by one that was killed between."""
        return any(dialed <= death <= at for death in self._deaths.get(port, ()))


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

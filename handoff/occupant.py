"""Who has an address that can't be bound: the process, and if it is a worker of segue, its instance."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

INSTANCE = "SEGUE_INSTANCE_NAME"
"""In a worker's environment from its start."""
_LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp, proc(5)."""
_MAX_COMMAND = 100


def occupant(bind: str) -> str:
    """In words, or empty if it can't be found out: then it is of another user, or in another container. Never raises."""
    try:
        inodes = set(_unix(bind.removeprefix("unix:")) if bind.startswith("unix:") else _tcp(bind))
        return _describe(inodes) if inodes else ""
    except (OSError, ValueError):
        return ""


def _unix(path: str) -> Iterator[str]:
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[7:8] == [path] and fields[3] != "00000000":  # flags: it accepts
            yield fields[6]


def _tcp(bind: str) -> Iterator[str]:
    port = int(bind.rpartition(":")[2])
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]


def _describe(inodes: set[str]) -> str:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    holders = sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _holds(entry, wanted))
    if not holders:
        return ""
    pid = holders[0]
    more = f" and {len(holders) - 1} more" if len(holders) > 1 else ""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    instance = next((each.partition("=")[2] for each in variables if each.startswith(f"{INSTANCE}=")), "")
    whose = f", a worker of instance {instance!r}" if instance and "segue.worker" in command else ""
    return f"pid {pid}{more} ({command[:_MAX_COMMAND]}){whose}"


def _holds(pid: str, wanted: set[str]) -> bool:
    try:
        directory = f"/proc/{pid}/fd"
        return any(os.readlink(f"{directory}/{fd}") in wanted for fd in os.listdir(directory))
    except OSError:
        return False

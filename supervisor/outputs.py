"""What workers print: kept by the master until they are ready, and then wherever its own output goes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

_ONE = re.compile(r"g?(\d+)(?:[/.w](\d+))?")


def selected(text: str) -> tuple[int, int | None]:
    """Generation and worker that are meant by ``3``, ``3/1`` or ``g3w1``. Raises `ValueError`."""
    match = _ONE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is neither a generation (3) nor a worker of one (3/1)")
    return int(match[1]), None if match[2] is None else int(match[2])


def show(printed: Sequence[dict[str, Any]]) -> str:
    """As text, each worker's part under a heading."""
    parts = []
    for each in printed:
        failed = each["state"] == "failed"
        title = (
            f"generation {each['generation']}, worker {each['worker']}, pid {each['pid']}: {each['state']}"
        )
        if each["reason"]:
            title += f" ({each['reason']})"
        body = each["output"].rstrip("\n") or click.style("(nothing was printed)", dim=True)
        parts.append(f"{click.style(f'== {title}', bold=True, fg='red' if failed else None)}\n{body}")
    return "\n\n".join(parts)


def journal_unit(pid: int) -> list[str] | None:
    """The arguments of ``journalctl`` that name the unit of a master, if its output goes to the journal."""
    if shutil.which("journalctl") is None:
        return None
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        stream = next((line[15:] for line in environ if line.startswith(b"JOURNAL_STREAM=")), b"").decode()
        found = os.stat(f"/proc/{pid}/fd/2")
        groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    if stream != f"{found.st_dev}:{found.st_ino}":
        return None
    path = next((line.partition("::")[2] for line in groups if line.startswith("0::")), "")
    unit = next((part for part in reversed(path.split("/")) if part.endswith(".service")), None)
    if unit is None:
        return None
    return ["--user-unit" if "/user@" in path and not unit.startswith("user@") else "--unit", unit]


def journal_command(unit: Sequence[str], pids: Sequence[int], lines: int, follow: bool) -> list[str]:
    """What shows the journal of these processes, or of the whole unit."""
    command = ["journalctl", *unit, "--output=short-iso", "--no-hostname", f"--lines={lines}"]
    command += ["--follow"] if follow else ["--no-pager"]
    return command + [f"_PID={pid}" for pid in pids]

"""What systemd has in mind with a unit, as its own client `systemctl` tells it. Every call blocks for a moment."""

from __future__ import annotations

import os
import subprocess
import sys

from segue.supervisor import leftovers

STOP, RESTART = "stop", "restart"
"""Types of systemd's jobs."""
ASK_TIMEOUT_S = 5.0
_OUTLIVED = "process"
"""The ``KillMode=`` with which workers outlive their master."""


def say(text: str) -> None:
    """For the journal."""
    print(f"segue: {text}", file=sys.stderr, flush=True)


def job(unit: str) -> str | None:
    """The type of the job that systemd has for `unit`; None if there is none, or nobody to ask."""
    for line in _systemctl("list-jobs", "--no-legend", "--plain", "--full").splitlines():
        words = line.split()
        if len(words) >= 3 and words[1] == unit:
            return words[2]
    return None


def properties(unit: str, *names: str) -> dict[str, str]:
    """Those of `unit`; none if there is nobody to ask."""
    shown = _systemctl("show", *(f"--property={name}" for name in names), unit)
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def is_restart() -> bool:
    """Whether the unit of this process is being restarted, in such a way that workers outlive their master."""
    try:
        unit = leftovers.unit()
    except (leftovers.NotInUnitError, OSError):
        return False
    return job(unit) == RESTART and properties(unit, "KillMode") == {"KillMode": _OUTLIVED}


def _systemctl(*arguments: str) -> str:
    command = ["systemctl", "--no-pager", *arguments]
    environ = {**os.environ, "LC_ALL": "C", "SYSTEMD_COLORS": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, env=environ, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        say(f"systemd can't be asked: {error}")
        return ""
    if done.returncode:
        say(f"systemd can't be asked: {done.stderr.strip()}")
    return done.stdout

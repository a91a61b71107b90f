"""What the service manager is told, and the sockets that it passes (sd_notify(3), sd_listen_fds(3))."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import MutableMapping

from segue.handoff.notify import Notifier

FIRST_FD = 3


class ServiceManager:
    """systemd, or nobody: then every call does nothing."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", None)
        self._notifier = Notifier(address) if address else None
        interval = environ.pop("WATCHDOG_USEC", "")
        meant = environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog_s = int(interval) / 2e6 if interval.isdigit() and meant else None

    def ready(self, status: str) -> None:
        """The first generation serves; or a reload has ended, well or not."""
        self._send({"READY": 1, "STATUS": status})

    def reloading(self) -> None:
        """A reload has begun: the time stamp must be taken after the signal arrived."""
        self._send({"RELOADING": 1, "MONOTONIC_USEC": time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000})

    def stopping(self) -> None:
        """A stop has begun."""
        self._send({"STOPPING": 1})

    def extend(self, seconds: float) -> None:
        """A start or stop that makes progress may take `seconds` more."""
        self._send({"EXTEND_TIMEOUT_USEC": int(seconds * 1e6)})

    async def watchdog(self) -> None:
        """Tell, as long as the loop that runs this is alive."""
        while self._watchdog_s is not None:
            self._send({"WATCHDOG": 1})
            await asyncio.sleep(self._watchdog_s)

    def _send(self, fields: dict[str, object]) -> None:
        if self._notifier is not None:
            self._notifier.send(fields)


def inherited_fds(environ: MutableMapping[str, str]) -> list[int]:
    """Descriptors of listening sockets that were passed to this very process; taken out of the environment."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    return list(range(FIRST_FD, FIRST_FD + int(count)))

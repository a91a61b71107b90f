"""What the service manager is told, and the sockets that it passes and keeps (sd_notify(3), sd_listen_fds(3))."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import MutableMapping, Sequence

from segue.handoff.notify import Notifier

FIRST_FD = 3
NUMBERS = "SEGUE_FDS"
"""Where the descriptors are, if they aren't at 3 and following."""


class ServiceManager:
    """systemd, or nobody: then every call does nothing."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._environ = {key: environ[key] for key in _OURS if key in environ}
        address = environ.pop("NOTIFY_SOCKET", None)
        self._notifier = Notifier(address) if address else None
        interval = environ.pop("WATCHDOG_USEC", "")
        meant = environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog_s = int(interval) / 2e6 if interval.isdigit() and meant else None
        environ.pop("FDSTORE", None)  # unset by versions before 254, which store none the less

    @property
    def environ(self) -> dict[str, str]:
        """What this process was told by it, for another program that takes this process over."""
        return dict(self._environ)

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

    def store(self, name: str, fd: int) -> bool:
        """Let it keep a copy of `fd`, which it passes to the next start of this service, by `name`.

        It does if ``FileDescriptorStoreMax=`` is set. False if it could not be told: try again.
        """
        return self._notifier is None or self._notifier.send({"FDSTORE": 1, "FDNAME": name}, [fd])

    def forget(self, name: str) -> None:
        """Let it drop what it keeps by `name`."""
        self._send({"FDSTOREREMOVE": 1, "FDNAME": name})

    async def watchdog(self) -> None:
        """Tell, as long as the loop that runs this is alive."""
        while self._watchdog_s is not None:
            self._send({"WATCHDOG": 1})
            await asyncio.sleep(self._watchdog_s)

    def _send(self, fields: dict[str, object]) -> None:
        if self._notifier is not None:
            self._notifier.send(fields)


_OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE")


def inherited_fds(environ: MutableMapping[str, str]) -> list[tuple[str, int]]:
    """Names and descriptors that were passed to this very process; taken out of the environment, closed on exec.

    A name may come more than once. The order of what a store gives back varies: go by the names.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    numbers = environ.pop(NUMBERS, "")
    environ.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    fds = [int(number) for number in numbers.split(",")] if numbers else _following(int(count))
    names += [""] * (len(fds) - len(names))
    for fd in fds:
        os.set_inheritable(fd, False)
    return list(zip(names, fds, strict=False))


def pass_fds(fds: Sequence[tuple[str, int]]) -> dict[str, str]:
    """The environment in which a program that takes this process over finds `fds`; they stay open over exec."""
    for _, fd in fds:
        os.set_inheritable(fd, True)
    return {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(fds)),
        "LISTEN_FDNAMES": ":".join(name for name, _ in fds),
        NUMBERS: ",".join(str(fd) for _, fd in fds),
    }


def _following(count: int) -> list[int]:
    return list(range(FIRST_FD, FIRST_FD + count))

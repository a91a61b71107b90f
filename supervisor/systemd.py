"""What the service manager is told, and the sockets that it passes and keeps (sd_notify(3), sd_listen_fds(3))."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, MutableMapping, Sequence

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
        self.has_started_us = environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())
        """Whether this process is itself what a unit's ``ExecStart=`` has started."""
        self._beaten = 0.0
        self._extended = 0.0
        self._kept: set[str] = set()

    @property
    def environ(self) -> dict[str, str]:
        """What this process was told by it, for another program that takes this process over."""
        return dict(self._environ)

    def ready(self, status: str) -> None:
        """The first generation serves; or a reload has ended, well or not."""
        self._send({"READY": 1, "STATUS": status})

    def status(self, status: str) -> None:
        """What there is to know."""
        self._send({"STATUS": status})

    def reloading(self, status: str) -> None:
        """A reload has begun: the time stamp must be taken after the signal arrived. `ready` must follow."""
        stamp = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send({"RELOADING": 1, "MONOTONIC_USEC": stamp, "STATUS": status})

    def stopping(self, status: str) -> None:
        """A stop has begun."""
        self._send({"STOPPING": 1, "STATUS": status})

    def extend(self, seconds: float) -> None:
        """A start, reload or stop that makes progress may take `seconds` more, from now on."""
        self._send({"EXTEND_TIMEOUT_USEC": int(seconds * 1e6)})

    def progress(self) -> None:
        """A start makes progress; may be called as often as anything shows it."""
        now = time.monotonic()
        if now - self._extended >= _EXTEND_EVERY_S:
            self._extended = now
            self.extend(PROGRESS_S)

    def knows(self, kept: Iterable[str], dropped: Iterable[str]) -> None:
        """What it has passed to this start: by these names it keeps what is in use, and by those what nobody wants."""
        self._kept = set(kept)
        for name in dropped:
            self._forget(name)

    def keep(self, fds: Mapping[str, int]) -> None:
        """Let it keep copies of `fds`, and of nothing else, for the next start of this service.

        It does if ``FileDescriptorStoreMax=`` is set. What could not be told is told by the next call.
        """
        for name in self._kept - fds.keys():
            self._forget(name)
            self._kept.discard(name)
        for name in fds.keys() - self._kept:
            # first, since with two of one name it would be a matter of luck which comes back
            if self._forget(name) and self._send({"FDSTORE": 1, "FDNAME": name}, [fds[name]]):
                self._kept.add(name)

    def _forget(self, name: str) -> bool:
        return self._send({"FDSTOREREMOVE": 1, "FDNAME": name})

    @property
    def watchdog_s(self) -> float | None:
        """How often `alive` has to be called at least; None: nobody watches."""
        return self._watchdog_s

    def alive(self) -> None:
        """The loop that calls this turns; may be called in each turn."""
        now = time.monotonic()
        if self._watchdog_s is not None and now - self._beaten >= self._watchdog_s / 2:
            self._beaten = now
            self._send({"WATCHDOG": 1})

    def _send(self, fields: dict[str, object], fds: Sequence[int] = ()) -> bool:
        return self._notifier is not None and self._notifier.send(fields, fds)


PROGRESS_S = 15.0
"""What a sign of progress is worth; the last one keeps a start that has got stuck for so long."""
_EXTEND_EVERY_S = 1.0

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

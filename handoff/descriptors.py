"""The descriptors that a worker inherits: taking them over at boot, and knowing how many more fit.

The convention is systemd's (sd_listen_fds(3)): descriptors from 3 on, counted by ``LISTEN_FDS`` and named by
``LISTEN_FDNAMES``. `subprocess` can't put descriptors at given numbers in the child without running Python code
between fork and exec, so the parent passes them where they are and says where in ``SEGUE_FDS``; `take_inherited`
moves them before anything else runs.
"""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import MutableMapping

FIRST_FD = 3
_OURS = ("SEGUE_FDS", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "LISTEN_PIDFDID", "NOTIFY_SOCKET")
_OURS_PREFIX = "WATCHDOG_"


class InheritanceError(Exception):
    """What the environment says of inherited descriptors doesn't fit together."""


def take_inherited(environ: MutableMapping[str, str]) -> dict[str, int]:
    """Move the inherited descriptors to 3, 4, … and return them by name, closed on exec from now on.

    Removes from `environ` what an application must not see. Raises `InheritanceError`.
    """
    count = environ.get("LISTEN_FDS", "")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    listen_pid = environ.get("LISTEN_PID")
    numbers = environ.get("SEGUE_FDS")
    for key in [key for key in environ if key in _OURS or key.startswith(_OURS_PREFIX)]:
        del environ[key]
    if listen_pid is not None and listen_pid != str(os.getpid()):
        raise InheritanceError(f"LISTEN_PID is {listen_pid}, this process is {os.getpid()}")
    if not count.isdecimal() or int(count) != len(names):
        raise InheritanceError(f"LISTEN_FDS is {count!r}, but LISTEN_FDNAMES has {len(names)} names")
    if len(set(names)) != len(names) or not all(names):
        raise InheritanceError(f"LISTEN_FDNAMES has an empty name or one twice: {':'.join(names)}")
    try:
        sources = list(range(FIRST_FD, FIRST_FD + len(names))) if numbers is None else _parse(numbers)
    except ValueError:
        raise InheritanceError(f"SEGUE_FDS isn't a list of numbers: {numbers}") from None
    if len(sources) != len(names) or len(set(sources)) != len(sources) or min(sources) < FIRST_FD:
        raise InheritanceError(
            f"SEGUE_FDS ({numbers}) doesn't give each of {len(names)} names its own descriptor"
        )
    try:
        _move(sources)
    except (OSError, OverflowError) as error:
        raise InheritanceError(f"the descriptors {sources} can't be taken over: {error}") from error
    return {name: FIRST_FD + place for place, name in enumerate(names)}


def _parse(numbers: str) -> list[int]:
    return [int(number) for number in numbers.split(",")]


def _move(sources: list[int]) -> None:
    """Put `sources` at 3, 4, … in their order; a source that lies where another one goes makes room first."""
    places = list(sources)
    beyond = FIRST_FD + len(places)
    for index, place in enumerate(places):
        target = FIRST_FD + index
        if place == target:
            os.set_inheritable(target, False)
            continue
        if target in places[index + 1 :]:
            places[places.index(target)] = fcntl.fcntl(target, fcntl.F_DUPFD_CLOEXEC, beyond)
        os.dup2(place, target, inheritable=False)
        os.close(place)


def raise_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # hard may be "unlimited" above fs.nr_open
            return soft
    return hard


def limit() -> int:
    """How many descriptors this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 30


def in_use() -> int:
    """How many descriptors this process has. The kernel counts them in the size of /proc/self/fd since 6.2."""
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))


def reserve(limit: int) -> int:
    """How many of `limit` descriptors are left to the application (its files, its database connections)."""
    return min(256, limit // 8)


def spare() -> int:
    """How many connections may be accepted now: what is free without touching the reserve."""
    most = limit()
    return most - in_use() - reserve(most)


def spare_to_adopt() -> int:
    """How many connections may be adopted now.

    Half of the reserve may be used for that: they are open and nobody else may be there to serve them. The other half
    holds the largest message of a relay (`segue.handoff.relay.max_batch`).
    """
    most = limit()
    return most - in_use() - reserve(most) // 2

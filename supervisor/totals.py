"""What the instance has counted, whoever counted it: totals that don't go back when a generation, or a master, ends.

A living worker's part is in the file that it writes (`segue.handoff.figures`). When it has ended its last figures are
added to what others left, and the sum is in the journal, with what the master counts itself; figures of workers that
ended while there was no master are found by the next one. All of it begins anew with a start after a clean stop.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import msgspec

from segue.handoff import figures
from segue.handoff.messages import Counts, Figures
from segue.supervisor.instance import Instance
from segue.supervisor.operations import Operation

RELOAD_BOUNDS_S = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the buckets in which the duration of reloads is counted."""

Key = tuple[int, int]
"""Generation and worker."""

OUTCOMES = ("ok", "refused")
"""How what was asked for ends."""

KINDS = (
    *("reload", "stage", "promote", "discard", "rollback"),
    *("swap", "scale", "drain", "upgrade", "stop"),
)
"""What can be asked for."""

CAUSES = ("crash", "start", "hang", "limit", "other")
"""Why a worker of the serving generation was started anew. ``start``: the last try failed."""

_RESTARTS = {"worker-died": "crash", "worker-start-failed": "start"}
"""Events of the log that say that a worker of the current generation is started anew, and why."""
_REPLACED = "worker-replaced"
_HANG = "event loop"
_LIMIT = "limit_max_requests"


class Durations(msgspec.Struct):
    """A histogram."""

    buckets: list[int]
    seconds: float = 0.0

    @classmethod
    def none(cls) -> Durations:
        """One that has counted nothing."""
        return cls([0] * (len(RELOAD_BOUNDS_S) + 1))


class Followed(msgspec.Struct):
    """A counter that begins anew with whoever counts: what was last seen of it, and what was seen before that."""

    before: float = 0.0
    last: float = 0.0

    def now(self, value: float) -> float:
        """Its total. What was counted between the last look and a new beginning is nowhere."""
        if value < self.last:
            self.before += self.last
        self.last = value
        return self.before + value


class Written(msgspec.Struct):
    """What is in the journal."""

    gone: Counts = Counts()
    """The sum of what workers counted that have ended."""
    operations: dict[str, dict[str, int]] = {}
    """By kind, then by outcome."""
    swaps: dict[str, dict[str, int]] = {}
    """By service, then by outcome."""
    reloads: dict[str, Durations] = {}
    """By outcome."""
    probations: dict[str, int] = {}
    """By `segue.supervisor.underway.Outcome`."""
    restarts: dict[str, int] = {}
    """By one of `CAUSES`."""
    services: dict[str, Followed] = {}
    """Counters of services, by what they count."""


class Totals:
    """Of one instance."""

    def __init__(self, instance: Instance, written: Written | None, living: Iterable[Key]) -> None:
        """`written` is what an earlier master has counted; `living` are the workers that it has left."""
        self._instance = instance
        self.written = written or Written()
        self._last: dict[Key, Figures] = {}
        self._services: set[str] = set()
        """Names that a worker has said it has; those that somebody asks for are as many as one likes."""
        for key in set(instance.figures_keys()) - set(living):
            self.worker_ended(key)

    def figures(self, key: Key) -> Figures | None:
        """What a worker has written last, or had when it could be read; None for one that has yet to write."""
        found = figures.read(self._instance.worker_figures(*key))
        if found is not None:
            self._last[key] = found
            self._services.update(found.leases)
        return self._last.get(key)

    def counts(self, living: Iterable[Figures]) -> Counts:
        """Everything that was ever counted."""
        total = self.written.gone
        for each in living:
            total = add(total, each.counts)
        return total

    # What happens

    def worker_ended(self, key: Key) -> None:
        """Its process is gone: what it counted is kept."""
        last = self.figures(key)
        if last is not None:
            self.written.gone = add(self.written.gone, last.counts)
        self._last.pop(key, None)
        with contextlib.suppress(OSError):
            os.unlink(self._instance.worker_figures(*key))

    def operation_ended(self, operation: Operation) -> None:
        """It has its outcome."""
        outcome = "ok" if operation.ok else "refused"
        _increment(self.written.operations, operation.kind, outcome)
        if operation.service and (operation.ok or self._is_known(operation.service)):
            _increment(self.written.swaps, operation.service, outcome)
        if operation.kind == "reload":
            durations = self.written.reloads.setdefault(outcome, Durations.none())
            seconds = sum(operation.phases.values())
            durations.buckets[bisect_left(RELOAD_BOUNDS_S, seconds)] += 1
            durations.seconds += seconds

    def _is_known(self, service: str) -> bool:
        """Whether there is such a service: each label of a metric is kept for good, in the journal too."""
        if service not in self.written.swaps and service not in self._services:
            with contextlib.suppress(OSError):  # the directory may be gone
                for key in self._instance.figures_keys():
                    found = figures.read(self._instance.worker_figures(*key))
                    self._services.update(found.leases if found is not None else ())
        return service in self.written.swaps or service in self._services

    def probation_ended(self, outcome: str) -> None:
        """A generation is watched no more."""
        self.written.probations[outcome] = self.written.probations.get(outcome, 0) + 1

    def happened(self, event: str, fields: dict[str, Any]) -> None:
        """A line of the log: some of them count."""
        cause = _RESTARTS.get(event)
        if event == _REPLACED:
            reason = str(fields.get("reason", ""))
            cause = "hang" if _HANG in reason else "limit" if reason == _LIMIT else "other"
        if cause is not None:
            self.written.restarts[cause] = self.written.restarts.get(cause, 0) + 1


def _increment(counters: dict[str, dict[str, int]], name: str, outcome: str) -> None:
    outcomes = counters.setdefault(name, {})
    outcomes[outcome] = outcomes.get(outcome, 0) + 1


def add(one: Counts, other: Counts) -> Counts:
    """The sum of both."""
    return Counts(*(_sum(getattr(one, name), getattr(other, name)) for name in Counts.__struct_fields__))


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {key: one.get(key, 0) + other.get(key, 0) for key in one | other}
    if isinstance(one, tuple):
        if len(one) != len(other):  # one of them has none, or counts in other buckets
            return max(one, other, key=len)
        return tuple(map(int.__add__, one, other))
    return one + other

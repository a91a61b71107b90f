"""How tools do: counted for as long as the process lives, over all reloads."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import segue

RECENT_S = 3600.0
"""A failure is recent for so long."""
_KEPT = 1000
"""So many failures of one tool are remembered at most."""


class _Record:
    def __init__(self) -> None:
        self.invocations = 0
        self.failures = 0
        self.seconds = 0.0
        self.failed_at: deque[float] = deque(maxlen=_KEPT)
        self.last_error: str | None = None

    def recent_failures(self) -> int:
        since = time.monotonic() - RECENT_S
        while self.failed_at and self.failed_at[0] < since:
            self.failed_at.popleft()
        return len(self.failed_at)


class Statistics:
    """Of all tools that were ever called here."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def add(self, tool: str, seconds: float, error: str | None) -> None:
        """A call has ended; `error` says why it failed, if it did."""
        record = self._records.setdefault(tool, _Record())
        record.invocations += 1
        record.seconds += seconds
        if error is not None:
            record.failures += 1
            record.failed_at.append(time.monotonic())
            record.last_error = error

    def by_tool(self) -> dict[str, dict[str, Any]]:
        """By name: ``invocations``, ``failures``, ``recent_failures``, ``success_rate``, ``avg_latency`` (ms) …"""
        return {
            name: {
                "invocations": record.invocations,
                "failures": record.failures,
                "recent_failures": record.recent_failures(),
                "success_rate": _share(record.invocations - record.failures, record.invocations),
                "avg_latency": _share(record.seconds * 1000, record.invocations),
                "last_error": record.last_error,
            }
            for name, record in sorted(self._records.items())
        }

    def totals(self) -> dict[str, Any]:
        """Over all tools; a rate or a mean of nothing is 0. ``avg_latency`` in milliseconds."""
        records = self._records.values()
        invocations = sum(record.invocations for record in records)
        failures = sum(record.failures for record in records)
        return {
            "total_invocations": invocations,
            "recent_failures": sum(record.recent_failures() for record in records),
            "success_rate": _share(invocations - failures, invocations),
            "avg_latency": _share(sum(record.seconds for record in records) * 1000, invocations),
        }

    def metrics(self) -> dict[str, Any]:
        """`totals` for the status, in which rates are weighted over the workers."""
        totals = self.totals()
        count = totals["total_invocations"]
        return totals | {
            "success_rate": segue.Rate(totals["success_rate"], count),
            "avg_latency": segue.Rate(totals["avg_latency"], count),
        }


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 0.0

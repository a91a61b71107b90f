"""When a worker asks to be replaced: after so many requests, with so much memory, after so much time."""

from __future__ import annotations

import logging
import random
import time

from segue.handoff.messages import RecycleLimits
from segue.worker import usage

_log = logging.getLogger("segue.worker")


class Recycling:
    """One worker's limits, each with its share of jitter, as they were drawn at its start."""

    def __init__(self, limits: RecycleLimits) -> None:
        self._requests = _drawn_count(limits.requests, limits.requests_jitter)
        self._rss_bytes = _drawn_count(limits.rss_bytes, limits.rss_jitter_bytes)
        self._age_s = None if limits.age_s is None else limits.age_s + random.uniform(0, limits.age_jitter_s)  # noqa: S311
        self._since = time.monotonic()

    def begin(self) -> None:
        """The worker has started. A memory limit below what it needs for that is put aside: replacing would not help."""
        rss_bytes = usage.rss_bytes()
        if self._rss_bytes is not None and rss_bytes > self._rss_bytes:
            _log.error(
                "event=max-worker-rss-ignored reason='it uses %.0f MiB from its start on' limit_mib=%.0f",
                rss_bytes / 2**20,
                self._rss_bytes / 2**20,
            )
            self._rss_bytes = None

    def due(self, requests: int) -> str | None:
        """Why it should be replaced, after so many `requests`; None as long as it needn't."""
        if self._requests is not None and requests >= self._requests:
            return f"it has had {requests} requests (limit-max-requests)"
        if self._rss_bytes is not None and (rss_bytes := usage.rss_bytes()) > self._rss_bytes:
            return f"it uses {rss_bytes / 2**20:.0f} MiB (max-worker-rss)"
        if self._age_s is not None and (age_s := time.monotonic() - self._since) >= self._age_s:
            return f"it has run for {age_s:.0f} s (max-worker-age)"
        return None


def _drawn_count(limit: int | None, jitter: int) -> int | None:
    return None if limit is None else limit + random.randint(0, jitter)  # noqa: S311 - spreads restarts

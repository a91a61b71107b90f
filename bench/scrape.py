"""How long a scrape of ``/metrics`` takes with many workers, over the control socket."""

from __future__ import annotations

import asyncio
import statistics
import time

from bench.figures import Figure, Measured
from bench.servers import Bench, ServerError, segue
from segue.handoff.http_client import call

WORKERS = 32
SCRAPES = 50
FIGURES = [
    Figure("median", f"a scrape of /metrics with {WORKERS} workers (median of {SCRAPES})", "ms", 20, "<", 1),
    Figure("slowest", "  the slowest of them", "ms", digits=1),
    Figure("first", "  the first, which imports prometheus-client", "ms", digits=1),
    Figure("bytes", "  size of the answer", "bytes"),
]


def measure(bench: Bench) -> Measured:
    """One run."""
    workers = 4 if bench.quick else WORKERS
    bench.say(f"scrape: starting {workers} workers")
    with segue(bench, workers=workers, options=["--ready-timeout", "120"]) as server:
        server.first_answer()
        times, size = asyncio.run(_scrapes(server.control))
    return {
        "median": statistics.median(times[1:]),
        "slowest": max(times[1:]),
        "first": times[0],
        "bytes": size,
    }


async def _scrapes(control: str) -> tuple[list[float], int]:
    """Milliseconds of each, and the size of the last answer."""
    times, size = [], 0
    for _ in range(SCRAPES + 1):
        began = time.perf_counter()
        answer = await call(control, "GET", "/metrics", timeout_s=30)
        times.append((time.perf_counter() - began) * 1000)
        if answer.status != 200:
            raise ServerError(f"/metrics: {answer.status}")
        size = len(answer.body)
        await asyncio.sleep(0.05)
    return times, size

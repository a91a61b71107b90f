"""How much later than plain uvicorn a worker starts: from its beginning to its first answer, in turn, medians.

A worker's beginning is the moment at which a reload is asked for, so that what the master does for it counts, too
(reading settings and fingerprint, spawning, gating, activating). uvicorn's is its exec. The same application, which
starts at once here; nothing else runs.
"""

from __future__ import annotations

import statistics
import threading
import time

from bench.figures import Figure, Measured
from bench.servers import START_TIMEOUT_S, Bench, Segue, answered, segue, uvicorn, wait_for

FIGURES = [
    Figure(
        "later", "a worker starts later than plain uvicorn by (reload asked → its first answer)", "ms", 150
    ),
    Figure("worker", "  a worker's start (median)", "ms"),
    Figure("uvicorn", "  beside: uvicorn's start, exec → first answer (median)", "ms"),
    Figure("serve", "  segue serve, exec → first answer (median)", "ms"),
]


def measure(bench: Bench) -> Measured:
    """One run."""
    workers, uvicorns, serves = [], [], []
    with segue(bench) as running:
        running.first_answer()
        _reload(running)  # fills the caches of the disk for both
        for number in range(3 if bench.quick else 10):
            bench.say(f"start: {number + 1}")
            workers.append(_reload(running))
            with uvicorn(bench) as theirs:
                uvicorns.append(theirs.first_answer() - theirs.launched)
            with segue(bench) as another:
                serves.append(another.first_answer() - another.launched)
    worker, plain, serve = (statistics.median(times) * 1000 for times in (workers, uvicorns, serves))
    return {"later": worker - plain, "worker": worker, "uvicorn": plain, "serve": serve}


def _reload(running: Segue) -> float:
    """Seconds from asking for a reload to the first answer of another process."""
    before = answered(running.port)
    operations: list[int] = []
    asking = threading.Thread(target=lambda: operations.append(running.reload()))
    begun = time.monotonic()
    asking.start()
    try:
        seen = wait_for(
            lambda: answered(running.port) not in {before, None},
            START_TIMEOUT_S,
            0.002,
            lambda: f"no new worker\n{running.tail()}",
        )
    finally:
        asking.join()
    running.wait_drained(operations[0])
    return seen - begun

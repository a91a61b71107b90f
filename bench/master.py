"""The master: small, silent while idle, and the same after 200 reloads."""

from __future__ import annotations

import os
import time

from bench.figures import Figure, Measured
from bench.processes import children, cpu_s, descriptors, marked, rss_mib, ticks
from bench.servers import Bench, Segue, segue, wait_for

_PARKED_TIMEOUT_S = 60.0

FIGURES = [
    Figure("rss", "master: resident memory, the most that was seen", "MiB", 45, "<", 1),
    Figure("ticks", "master: CPU ticks over 10 s idle", "", 0),
    Figure("cpu", "  the same in CPU time", "ms", digits=2),
    Figure("growth", "200 reloads: growth of the master", "MiB", 2, digits=2),
    Figure("late-growth", "  of it after the first ten", "MiB", digits=2),
    Figure("processes", "200 reloads: processes left", "", 0),
    Figure("descriptors", "200 reloads: descriptors left in the master", "", 0),
    Figure("worker-descriptors", "200 reloads: more descriptors in a worker", "", 0),
    Figure("files", "200 reloads: files left in the runtime directory", "", 0),
    Figure("seconds", "  time of a reload, application that starts at once", "s", digits=2),
    Figure("after-stop", "processes left after the stop", "", 0),
]


def measure(bench: Bench) -> Measured:
    """One run."""
    idle_s, reloads = (3, 20) if bench.quick else (10, 200)
    with segue(bench) as running:
        running.first_answer()
        bench.say(f"master: idle for {idle_s} s")
        time.sleep(1)
        ticks_before, cpu_before = ticks(running.pid), cpu_s(running.pid)
        time.sleep(idle_s)
        idle = {
            "ticks": ticks(running.pid) - ticks_before,
            "cpu": (cpu_s(running.pid) - cpu_before) * 1000,
        }
        bench.say(f"master: {reloads} reloads")
        before = _Footprint(running)
        begun = time.monotonic()
        early = before
        for number in range(reloads):
            running.reload()
            if number == 9:
                _wait_alone(running)
                early = _Footprint(running)
        took = time.monotonic() - begun
        _wait_alone(running)
        time.sleep(0.5)
        after = _Footprint(running)
    return {
        **idle,
        "rss": max(before.rss, early.rss, after.rss),
        "growth": after.rss - before.rss,
        "late-growth": after.rss - early.rss,
        "processes": len(after.processes) - len(before.processes),
        "descriptors": after.descriptors - before.descriptors,
        "worker-descriptors": after.worker_descriptors - before.worker_descriptors,
        "files": after.files - before.files,
        "seconds": took / reloads,
        "after-stop": len(running.left_behind),
    }


def _wait_alone(running: Segue) -> None:
    """Wait until the current generation is the only one: the one before it stays parked for a while."""
    wait_for(
        lambda: len(running.status()["generations"]) == 1,
        _PARKED_TIMEOUT_S,
        0.1,
        lambda: "older generations do not end",
    )


class _Footprint:
    """What an instance takes at one moment."""

    def __init__(self, running: Segue) -> None:
        self.rss = rss_mib(running.pid)
        worker = running.workers()[0]["pid"]
        self.descriptors = descriptors(running.pid)
        self.worker_descriptors = descriptors(worker)
        self.processes = set(marked(running.mark)) | set(children(running.pid))
        self.files = len(os.listdir(os.path.dirname(running.control)))

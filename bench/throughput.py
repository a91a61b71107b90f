"""Requests per second beside uvicorn: what segue adds must cost nothing on the way of a request.

Fresh processes ten times, so that the luck of one memory layout is not measured; three servers are up at once (segue with
request metrics and without, uvicorn) and wrk turns from one to the next and back, so that a change of the machine's speed
meets all.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
from dataclasses import dataclass, field

from bench.figures import Figure, Measured
from bench.processes import cpu_s
from bench.servers import Bench, ServerError, segue, uvicorn

FIGURES = [
    Figure("ratio", "requests/s of one worker ÷ uvicorn's (median of ten)", "", 0.95, ">=", 3),
    Figure("ratio_off", "  the same with --no-request-metrics", "", 0.98, ">=", 3),
    Figure("cpu", "  CPU per request ÷ uvicorn's (median; less sensitive to a busy machine)", digits=3),
    Figure("cpu_off", "  the same with --no-request-metrics", digits=3),
    Figure("segue", "  requests/s of one worker (median)", "", sense=">="),
    Figure("uvicorn", "  beside: requests/s of uvicorn (median)", "", sense=">="),
]
NO_WRK = "wrk is not installed"


def measure(bench: Bench) -> Measured:
    """One run: ten times the three."""
    if not wrk_is_here():
        return {figure.key: NO_WRK for figure in FIGURES}
    times, turns = (3, 1) if bench.quick else (10, 2)
    found = []
    for number in range(times):
        bench.say(f"throughput: {number + 1} of {times}")
        found.append(_beside(bench, turns, number))
    return {
        "ratio": statistics.median(ours.rate / theirs.rate for ours, _, theirs in found),
        "ratio_off": statistics.median(bare.rate / theirs.rate for _, bare, theirs in found),
        "cpu": statistics.median(ours.cpu_s / theirs.cpu_s for ours, _, theirs in found),
        "cpu_off": statistics.median(bare.cpu_s / theirs.cpu_s for _, bare, theirs in found),
        "segue": statistics.median(ours.rate for ours, _, _ in found),
        "uvicorn": statistics.median(theirs.rate for _, _, theirs in found),
    }


@dataclass
class _Seen:
    """What wrk and the kernel have seen of one server."""

    port: int
    pid: int
    rates: list[float] = field(default_factory=list)
    cpus_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Requests per second."""
        return statistics.mean(self.rates)

    @property
    def cpu_s(self) -> float:
        """CPU time of the serving process per request."""
        return statistics.mean(self.cpus_s)

    def load(self, seconds: int) -> None:
        """Put load on it."""
        before = cpu_s(self.pid)
        rate, requests = wrk(self.port, seconds)
        self.rates.append(rate)
        self.cpus_s.append((cpu_s(self.pid) - before) / requests)


def _beside(bench: Bench, turns: int, first: int) -> tuple[_Seen, _Seen, _Seen]:
    """With request metrics, without, and uvicorn; who goes first depends on `first`."""
    with segue(bench) as one, segue(bench, options=["--no-request-metrics"]) as bare, uvicorn(bench) as other:
        for server in (one, bare, other):
            server.first_answer()
            wrk(server.port, 1)
        seen = [_Seen(each.port, each.workers()[0]["pid"]) for each in (one, bare)]
        seen.append(_Seen(other.port, other.pid))
        there = [seen[(first + place) % 3] for place in range(3)]
        for each in (*there, *reversed(there)) * turns:
            each.load(1)
        return seen[0], seen[1], seen[2]


def wrk_is_here() -> bool:
    """Whether it is installed."""
    return shutil.which("wrk") is not None


def wrk(port: int, seconds: int) -> tuple[float, int]:
    """Load of 32 connections on one core: requests per second, and how many there were."""
    command = ["wrk", "-t1", "-c32", f"-d{seconds}s", f"http://127.0.0.1:{port}/ping"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rate = re.search(r"^Requests/sec:\s+([\d.]+)", said, re.M)
    requests = re.search(r"^\s+(\d+) requests in", said, re.M)
    if rate is None or requests is None or "Socket errors" in said or "Non-2xx" in said:
        raise ServerError(f"wrk says:\n{said}")
    return float(rate[1]), int(requests[1])

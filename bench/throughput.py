"""Requests per second beside uvicorn: what segue adds must cost nothing on the way of a request.

Pairs of fresh processes, so that the luck of one memory layout is not measured; both are up at once and wrk turns from
one to the other and back, so that a change of the machine's speed meets both.
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
    Figure("ratio", "requests/s of one worker ÷ uvicorn's (median of ten pairs)", "", 0.98, ">=", 3),
    Figure("cpu", "  CPU per request ÷ uvicorn's (median; less sensitive to a busy machine)", digits=3),
    Figure("segue", "  requests/s of one worker (median)", "", sense=">="),
    Figure("uvicorn", "  beside: requests/s of uvicorn (median)", "", sense=">="),
]


def measure(bench: Bench) -> Measured:
    """One run: ten pairs."""
    if shutil.which("wrk") is None:
        return {figure.key: "wrk is not installed" for figure in FIGURES}
    pairs, turns = (3, 1) if bench.quick else (10, 2)
    found = []
    for number in range(pairs):
        bench.say(f"throughput: pair {number + 1} of {pairs}")
        found.append(_pair(bench, turns, ours_first=number % 2 == 0))
    return {
        "ratio": statistics.median(ours.rate / theirs.rate for ours, theirs in found),
        "cpu": statistics.median(ours.cpu_s / theirs.cpu_s for ours, theirs in found),
        "segue": statistics.median(ours.rate for ours, _ in found),
        "uvicorn": statistics.median(theirs.rate for _, theirs in found),
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
        rate, requests = _wrk(self.port, seconds)
        self.rates.append(rate)
        self.cpus_s.append((cpu_s(self.pid) - before) / requests)


def _pair(bench: Bench, turns: int, ours_first: bool) -> tuple[_Seen, _Seen]:
    with segue(bench) as one, uvicorn(bench) as other:
        for server in (one, other):
            server.first_answer()
            _wrk(server.port, 1)
        ours, theirs = _Seen(one.port, one.workers()[0]["pid"]), _Seen(other.port, other.pid)
        there = (ours, theirs) if ours_first else (theirs, ours)
        for seen in (*there, *reversed(there)) * turns:
            seen.load(1)
        return ours, theirs


def _wrk(port: int, seconds: int) -> tuple[float, int]:
    """Requests per second, and how many there were."""
    command = ["wrk", "-t1", "-c32", f"-d{seconds}s", f"http://127.0.0.1:{port}/ping"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rate = re.search(r"^Requests/sec:\s+([\d.]+)", said, re.M)
    requests = re.search(r"^\s+(\d+) requests in", said, re.M)
    if rate is None or requests is None or "Socket errors" in said or "Non-2xx" in said:
        raise ServerError(f"wrk says:\n{said}")
    return float(rate[1]), int(requests[1])

"""Requests per second beside uvicorn: what segue adds must cost nothing on the way of a request.

Pairs of fresh processes, so that the luck of one memory layout is not measured; both are up at once and wrk turns from
one to the other and back, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess

from bench.figures import Figure, Measured
from bench.servers import Bench, ServerError, segue, uvicorn

FIGURES = [
    Figure("ratio", "requests/s of one worker ÷ uvicorn's (median of ten pairs)", "", 0.98, ">=", 3),
    Figure("segue", "  requests/s of one worker (median)", "", sense=">="),
    Figure("uvicorn", "  beside: requests/s of uvicorn (median)", "", sense=">="),
]


def measure(bench: Bench) -> Measured:
    """One run: ten pairs."""
    if shutil.which("wrk") is None:
        return {figure.key: "wrk is not installed" for figure in FIGURES}
    pairs, seconds = (3, 1) if bench.quick else (10, 2)
    ours, theirs, ratios = [], [], []
    for number in range(pairs):
        bench.say(f"throughput: pair {number + 1} of {pairs}")
        one, other = _pair(bench, seconds, ours_first=number % 2 == 0)
        ours.append(one)
        theirs.append(other)
        ratios.append(one / other)
    return {
        "ratio": statistics.median(ratios),
        "segue": statistics.median(ours),
        "uvicorn": statistics.median(theirs),
    }


def _pair(bench: Bench, seconds: int, ours_first: bool) -> tuple[float, float]:
    with segue(bench) as ours, uvicorn(bench) as theirs:
        for server in (ours, theirs):
            server.first_answer()
            _wrk(server.port, 1)
        there = (ours, theirs) if ours_first else (theirs, ours)
        rates: dict[int, float] = {ours.port: 0.0, theirs.port: 0.0}
        for server in (*there, *reversed(there)):
            rates[server.port] += _wrk(server.port, seconds)
        return rates[ours.port] / 2, rates[theirs.port] / 2


def _wrk(port: int, seconds: int) -> float:
    command = ["wrk", "-t1", "-c32", f"-d{seconds}s", f"http://127.0.0.1:{port}/ping"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"^Requests/sec:\s+([\d.]+)", said, re.M)
    if found is None or "Socket errors" in said or "Non-2xx" in said:
        raise ServerError(f"wrk says:\n{said}")
    return float(found[1])

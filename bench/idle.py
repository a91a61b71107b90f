"""10,000 idle keep-alive connections over a reload: all live on, quickly, and no event loop notices.

With one worker the old one is kept alive by a stream, so that after the handover its own figures can still be read
(`sending_s`, `handover_cpu_s`, `max_stall_s` of its status). The stalls are felt from outside, too (`bench.probe`), and
its CPU time is also the kernel's. With four workers it is counted which of the new ones answers on each connection.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from bench.figures import Figure, Measured
from bench.processes import cpu_s, waited_s
from bench.servers import Bench, Segue, Server, ServerError, segue, wait_for
from bench.users import ROOT

CONNECTIONS = 10_000
NEW = 1_000
SPARE = 500

FIGURES = [
    Figure("lost", "10,000 idle connections: not served by the new generation", "", 0),
    Figure("sending", "10,000 idle connections: start of draining → last one sent", "s", 0.4, "<", 3),
    Figure("cpu", "10,000 idle connections: CPU per connection, sending side", "µs", 30, "<", 1),
    Figure("sender-stall", "10,000 idle connections: longest turn of the sending loop", "ms", 10, "<=", 1),
    Figure("adopter-stall", "10,000 idle connections: longest turn of the adopting loop", "ms", 10, "<=", 1),
    Figure(
        "kernel-cpu",
        "  CPU per connection by the kernel's count, all that the old worker did",
        "µs",
        digits=1,
    ),
    Figure("sender-waited", "  the sending process waited for a processor meanwhile, in all", "ms", digits=1),
    Figure("sender-felt", "  the sending loop's longest stall as felt by a stream", "ms", digits=1),
    Figure("adopter-felt", "  the adopting loop's longest stall as felt by new connections", "ms", digits=1),
    Figure("probe-own", "  the probe's own longest stall in that time", "ms", digits=1),
    Figure("lost-4", "10,000 idle connections, 4 workers: not served by the new generation", "", 0),
    Figure("share", "4 workers: most connections of one ÷ its share, after that", "", 1.5, digits=2),
    Figure("share-new", "4 workers: the same after 1,000 new connections", "", 1.5, digits=2),
    Figure("share-only-new", "  the same of the 1,000 new ones alone", "", digits=2),
]


def measure(bench: Bench) -> Measured:
    """One run."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = CONNECTIONS + NEW + SPARE
    if hard != resource.RLIM_INFINITY and hard < needed:
        return {f.key: f"a process may have {hard} descriptors here, {needed} are needed" for f in FIGURES}
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    bench.say("idle: one worker")
    measured = _one(bench)
    bench.say("idle: one worker, probed")
    measured |= _felt(bench)
    bench.say("idle: four workers")
    return measured | _four(bench)


def _one(bench: Bench) -> Measured:
    """Figures by the workers and the kernel, with nothing beside that needs a processor."""
    with segue(bench) as server:
        server.first_answer()
        old = server.workers()[0]
        with _crowd(server) as crowd, socket.create_connection(("127.0.0.1", server.port)) as stream:
            stream.sendall(b"GET /sse?n=1000000&ms=100 HTTP/1.1\r\nHost: bench\r\n\r\n")
            crowd.say(f"open {CONNECTIONS}")
            time.sleep(0.5)
            cpu_before, waited_before = cpu_s(old["pid"]), waited_s(old["pid"])
            operation = server.reload()
            sender = _sent(server, old["control"])
            cpu, waited = cpu_s(old["pid"]) - cpu_before, waited_s(old["pid"]) - waited_before
            new = server.workers()
            answered = crowd.say("ask")
        server.wait_drained(operation)
    return {
        "lost": CONNECTIONS - _answers(answered, new),
        "sending": sender["sending_s"],
        "cpu": sender["handover_cpu_s"] / sender["handed_over"] * 1e6,
        "sender-stall": sender["max_stall_s"] * 1000,
        "adopter-stall": max(worker["max_stall_s"] for worker in new) * 1000,
        "kernel-cpu": cpu / CONNECTIONS * 1e6,
        "sender-waited": waited * 1000,
    }


def _felt(bench: Bench) -> Measured:
    """The same once more, with a client that is sensitive to stalls; it competes for the processors."""
    with segue(bench) as server:
        server.first_answer()
        old = server.workers()[0]
        with _crowd(server) as crowd, _probe(server) as probe:
            crowd.say(f"open {CONNECTIONS}")
            time.sleep(0.5)
            operation = server.reload()
            promoted = time.monotonic()
            sender = _sent(server, old["control"])
            felt = probe.end()
        server.wait_drained(operation)
    # From just before the promote was told of until what was sent last had been adopted, too.
    window = promoted - 0.05, promoted + sender["sending_s"] + 0.3
    return {
        "sender-felt": _worst(felt["stream"], *window),
        "adopter-felt": _worst(felt["new"], *window),
        "probe-own": _worst(felt["own"], *window),
    }


def _four(bench: Bench) -> Measured:
    with segue(bench, workers=4) as server:
        server.first_answer()
        with _crowd(server) as crowd:
            crowd.say(f"open {CONNECTIONS}")
            server.wait_drained(server.reload())
            new = server.workers()
            moved = crowd.say("ask")
            fresh = crowd.say(f"open {NEW}")
            crowded = crowd.say("ask")
    return {
        "lost-4": CONNECTIONS - _answers(moved, new),
        "share": _share(moved, CONNECTIONS),
        "share-new": _share(crowded, CONNECTIONS + NEW),
        "share-only-new": _share(fresh, NEW),
    }


def _sent(server: Segue, control: str) -> dict[str, Any]:
    """Wait until the old worker has sent everything; its status."""
    status: dict[str, Any] = {}

    def everything() -> bool:
        status.update(server.ask("GET", "/status", control=control))
        return status["sending_s"] is not None and status["handed_over"] >= CONNECTIONS

    time.sleep(0.6)  # to ask is work, too, for the loop that is being timed
    wait_for(everything, 20, 0.1, lambda: f"the old worker has not sent all connections: {status}")
    return status


def _answers(answered: dict[str, Any], workers: list[dict[str, Any]]) -> int:
    """How many connections these workers answered on."""
    return sum(answered["answers"].get(str(worker["pid"]), 0) for worker in workers)


def _share(answered: dict[str, Any], connections: int) -> float:
    most: int = max(answered["answers"].values())
    return most / (connections / 4)


def _worst(noted: list[list[float]], begin: float, end: float) -> float:
    return max((late_ms for at, late_ms in noted if begin <= at <= end), default=0.0)


class _Crowd:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def say(self, line: str) -> dict[str, Any]:
        """One line to it, its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise ServerError(f"the crowd of clients broke down at {line!r}")
        found: dict[str, Any] = json.loads(answer)
        return found


@contextlib.contextmanager
def _crowd(server: Server) -> Iterator[_Crowd]:
    command = [sys.executable, str(ROOT / "bench" / "crowd.py"), "127.0.0.1", str(server.port)]
    with _helper(command, stdin=subprocess.PIPE) as process:
        yield _Crowd(process)


class _Probe:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def end(self) -> dict[str, list[list[float]]]:
        """What it has felt."""
        self._process.send_signal(signal.SIGTERM)
        found: dict[str, list[list[float]]] = json.loads(self._process.communicate(timeout=10)[0])
        return found


@contextlib.contextmanager
def _probe(server: Server) -> Iterator[_Probe]:
    command = [sys.executable, str(ROOT / "bench" / "probe.py"), str(server.port)]
    with _helper(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        if process.stderr.readline() != "\n":
            raise ServerError("the probe could not start")
        yield _Probe(process)


@contextlib.contextmanager
def _helper(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()

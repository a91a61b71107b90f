"""The master is upgraded in place, and killed and started again, under load: how long nobody supervises, and what it costs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from bench.figures import Figure, Measured
from bench.processes import children, descriptors, marked
from bench.servers import Bench, Segue, ServerError, load, segue, wait_for

LOAD = ("--keepalive", "20", "--post", "5", "--newconn", "5", "--sse", "2", "--think-max", "20")
WORKERS = 2
_LOOK_S = 0.001
_TIMEOUT_S = 30.0

FIGURES = [
    Figure(
        "upgrade_ms",
        "20 upgrades of the master under load: longest time without an answer of one",
        "ms",
        500,
        "<",
    ),
    Figure("upgrade_failed", "  failed requests", "", 0),
    Figure("upgrade_closed", "  connections closed by the server", "", 0),
    Figure("upgrade_workers", "  workers that are not the same as before", "", 0),
    Figure("upgrade_descriptors", "  descriptors left in the master", "", 0),
    Figure("upgrade_processes", "  processes left", "", 0),
    Figure(
        "kill_ms", "kill -9 of the master under load, and the same command again: to its first answer", "ms"
    ),
    Figure("kill_failed", "  failed requests", "", 0),
    Figure("kill_closed", "  connections closed by the server", "", 0),
    Figure("kill_workers", "  workers that are not the same as before", "", 0),
]


def measure(bench: Bench) -> Measured:
    """One run."""
    upgrades, kills = (3, 2) if bench.quick else (20, 5)
    found: Measured = {}
    with segue(bench, workers=WORKERS) as server:
        server.first_answer()
        bench.say(f"takeover: {upgrades} upgrades")
        _upgrade(server)  # what is opened once and kept is not a leak
        before = set(marked(server.mark)) | set(children(server.pid))
        opened = descriptors(server.pid)
        with load(bench, server, LOAD) as clients, _gaps(server) as longest:
            workers = _pids(server)
            for _ in range(upgrades):
                _upgrade(server)
            found["upgrade_ms"] = longest() * 1000
            found["upgrade_workers"] = len(workers ^ _pids(server))
            result = clients.end()
        found["upgrade_failed"] = result["failed_total"]
        found["upgrade_closed"] = sum(result["server_closes"].values())
        found["upgrade_descriptors"] = descriptors(server.pid) - opened
        found["upgrade_processes"] = len((set(marked(server.mark)) | set(children(server.pid))) - before)
        bench.say(f"takeover: {kills} masters are killed")
        with load(bench, server, LOAD) as clients:
            workers = _pids(server)
            found["kill_ms"] = max(_kill(server) for _ in range(kills)) * 1000
            found["kill_workers"] = len(workers ^ _pids(server))
            result = clients.end()
        found["kill_failed"] = result["failed_total"]
        found["kill_closed"] = sum(result["server_closes"].values())
    return found


def _pids(server: Segue) -> set[int]:
    return {worker["pid"] for worker in server.workers()}


def _epoch(server: Segue) -> int:
    return int(server.status()["master"]["epoch"])


def _upgrade(server: Segue) -> None:
    before = _epoch(server)
    number = server.ask("POST", "/upgrade?wait=30")["id"]
    target = f"/operations/{number}?wait={_TIMEOUT_S:g}"
    wait_for(_quietly(lambda: server.ask("GET", target)["outcome"] == "ok"), _TIMEOUT_S, 0.005, server.tail)
    if _epoch(server) != before + 1:
        raise ServerError(f"the master was not upgraded\n{server.tail()}")


def _kill(server: Segue) -> float:
    """Seconds from the end of one master to the first answer of the next."""
    before = _epoch(server)
    server.process.kill()
    server.process.wait()
    begun = time.monotonic()
    server.relaunch()
    return wait_for(_quietly(lambda: _epoch(server) > before), _TIMEOUT_S, 0.005, server.tail) - begun


def _quietly(condition: Callable[[], bool]) -> Callable[[], bool]:
    """The same, but no while nobody answers."""

    def holds() -> bool:
        with contextlib.suppress(ServerError):
            return condition()
        return False

    return holds


@contextlib.contextmanager
def _gaps(server: Segue) -> Iterator[Callable[[], float]]:
    """Ask for a sign of life all the time; gives the longest time in seconds from one answer to the next."""
    ended, longest = threading.Event(), [0.0]

    def look() -> None:
        last = time.monotonic()
        while not ended.wait(_LOOK_S):
            with contextlib.suppress(ServerError):
                server.ask("GET", "/events?last=0")
                longest[0], last = max(longest[0], time.monotonic() - last), time.monotonic()

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield lambda: longest[0]
    finally:
        ended.set()
        looking.join()

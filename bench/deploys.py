"""How fast a deploy is taken back: by hand, to a generation that is parked, and by itself, from a breach on.

What counts is what a client sees: the first answer of the old code, on a new connection, from the moment in which the
rollback was asked for, or in which the new code began to fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from bench.figures import Figure, Measured
from bench.servers import Bench, Segue, load, pid_in, ping, segue, wait_for
from bench.users import ROOT

LOAD = ("--keepalive", "20", "--post", "5", "--newconn", "5", "--sse", "0", "--think-max", "20")
WORKERS = 2
_PARKED_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 10.0

FIGURES = [
    Figure(
        "rollback_ms",
        "rollback to a parked generation: to the first answer of the old code",
        "ms",
        50,
        "<",
        1,
    ),
    Figure("rollback_load_ms", "  the same under load", "ms", 50, "<", 1),
    Figure("rollback_failed", "rollbacks under load: failed requests", "", 0),
    Figure("rollback_closed", "rollbacks under load: connections closed by the server", "", 0),
    Figure(
        "errors_ms", "new code answers 500 under load: to the first answer of the old code", "ms", 1000, "<"
    ),
    Figure("errors_failed", "  requests that failed otherwise", "", 0),
    Figure("errors_closed", "  connections closed by the server", "", 0),
    Figure("errors_seen", "  answers of 500 until then (most)"),
    Figure("crash_ms", "a new worker is killed: to the first answer of the old code", "ms", 1000, "<"),
]


def measure(bench: Bench) -> Measured:
    """One run."""
    shutil.copy(ROOT / "bench" / "flaky_app.py", bench.directory / "app" / "flaky_app.py")
    rounds = 2 if bench.quick else 5
    bench.say("deploys: rollbacks")
    options = ("--park-for", "600", "--probation", "0")
    with segue(bench, workers=WORKERS, options=options) as server:
        server.first_answer()
        server.reload()
        found: Measured = {"rollback_ms": max(_roll_back(server) for _ in range(rounds))}
        with load(bench, server, LOAD) as clients:
            found["rollback_load_ms"] = max(_roll_back(server) for _ in range(rounds))
            result = clients.end()
    found |= {"rollback_failed": result["failed_total"], "rollback_closed": _closed(result)}
    bench.say("deploys: new code that fails")
    options = ("--park-for", "600", "--probation", "300")
    with segue(bench, workers=WORKERS, options=options, app="flaky_app:app") as server:
        server.first_answer()
        taken: list[float] = []
        errors: list[int] = []
        failed = closed = 0
        for _ in range(rounds):
            with load(bench, server, LOAD) as clients:
                server.reload()
                taken.append(_taken_back(server, lambda: _spoil(server)))
                result = clients.end()
            errors.append(result["status_codes"].get("500", 0))
            failed += result["failed_total"] - result["failures"].get("non_2xx", 0)
            closed += _closed(result)
        found |= {"errors_ms": max(taken), "errors_failed": failed, "errors_closed": closed}
        found["errors_seen"] = max(errors)
        crashes = []
        for _ in range(rounds):
            server.reload()
            crashes.append(_taken_back(server, lambda: _kill(server)))
        return found | {"crash_ms": max(crashes)}


def _closed(result: dict[str, Any]) -> int:
    closes = result["server_closes"]
    return int(closes["idle_keepalive_closed"] + closes["connection_close_header"])


def _roll_back(server: Segue) -> float:
    """Milliseconds until the parked generation has answered."""
    _wait_parked(server)
    return _taken_back(server, lambda: server.ask("POST", "/rollback?wait=30"))


def _wait_parked(server: Segue) -> None:
    def parked() -> bool:
        return any(generation["state"] == "parked" for generation in server.status()["generations"])

    wait_for(parked, _PARKED_TIMEOUT_S, 0.05, lambda: "the old generation is not parked")


def _taken_back(server: Segue, act: Callable[[], Any]) -> float:
    """Milliseconds from `act` until somebody else answers than those that do now."""
    now = {worker["pid"] for worker in server.workers()}
    seen: list[float] = []
    acted = threading.Event()

    def look() -> None:
        while not seen:
            pid = _answering(server.port)
            if pid is not None and pid not in now and acted.is_set():
                seen.append(time.monotonic())

    looking = threading.Thread(target=look)
    looking.start()
    begun = time.monotonic()
    acted.set()
    act()
    looking.join()
    return (seen[0] - begun) * 1000


def _answering(port: int) -> int | None:
    """The pid of the process that takes a new connection, whatever it answers."""
    return pid_in(ping(port, _ANSWER_TIMEOUT_S) or b"")


def _spoil(server: Segue) -> None:
    for worker in server.workers():
        (server.started_dir / f"bad-{worker['pid']}").touch()


def _kill(server: Segue) -> None:
    os.kill(server.workers()[0]["pid"], signal.SIGKILL)

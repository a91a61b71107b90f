"""Ten reloads under load: nothing fails, nothing is closed, and it is hardly slower than without them.

Windows alternate in one run: a quiet one, then a reload (from asking for it until half a second after the new
generation serves, so the handover is in it), then whatever the old generation needs to end its streams, which counts
for neither. Beside it uvicorn, which reloads on SIGHUP.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from typing import Any

from bench.figures import BrokenRun, Figure, Measured
from bench.processes import children
from bench.servers import UNPRIVILEGED_USER, Bench, Segue, ServerError, load, segue, uvicorn
from bench.users import NoInterpreterError

START_S = 1.0
AFTER_S = 0.5
"""How much of the time after a reload still counts for it."""
LOAD = (
    "--keepalive",
    "50",
    "--post",
    "10",
    "--newconn",
    "10",
    "--sse",
    "5",
    "--think-min",
    "0",
    "--think-max",
    "20",
)

CASES = {
    f"{'root' if user is None else 'user'}-{workers}": (user, workers)
    for user in (None, UNPRIVILEGED_USER)
    for workers in (1, 2)
}


def _figures() -> list[Figure]:
    figures = []
    for case, (user, workers) in CASES.items():
        of = f"{'as root' if user is None else 'unprivileged'}, {workers} worker{'s' if workers > 1 else ''}"
        figures += [
            Figure(f"{case}-failed", f"reloads under load: failed requests ({of})", "", 0),
            Figure(f"{case}-closed", f"reloads under load: connections closed by the server ({of})", "", 0),
            Figure(f"{case}-p99", f"reloads under load: p99 ÷ p99 without reloads ({of})", "", 1.5, digits=2),
            Figure(f"{case}-kept-p99", f"  the same of keep-alive clients alone ({of})", "", digits=2),
            Figure(f"{case}-gap", f"  longest time without any answer ({of})", "ms", digits=1),
            Figure(
                f"{case}-own", f"  the load generator's own longest stall over 10 ms ({of})", "ms", digits=1
            ),
            Figure(f"{case}-rate", f"  requests/s ({of})", "", sense=">="),
            Figure(
                f"{case}-first", f"readiness to first request on the new generation ({of})", "ms", 50, "<", 1
            ),
        ]
    figures.append(Figure("uvicorn-failed", "  beside: failed requests of uvicorn --workers 2, SIGHUP"))
    figures.append(
        Figure("uvicorn-p99", "  beside: p99 ÷ p99 without reloads of uvicorn --workers 2", digits=2)
    )
    figures.append(Figure("uvicorn-given-up", "  beside: reloads not done after 20 s by uvicorn --workers 2"))
    return figures


FIGURES = _figures()


def measure(bench: Bench) -> Measured:
    """One run of all cases."""
    measured: Measured = {}
    for case, (user, workers) in CASES.items():
        bench.say(f"reloads: {case}")
        found: Measured | str
        if user is None and os.geteuid() != 0:
            found = "the bench does not run as root"
        else:
            try:
                found = _case(bench, user if os.geteuid() == 0 else None, workers)
            except NoInterpreterError as error:
                found = str(error)
            except Exception as error:
                traceback.print_exc()
                found = BrokenRun(f"the run broke down: {type(error).__name__}: {error}".splitlines()[0])
        keys = [figure.key for figure in FIGURES if figure.key.startswith(f"{case}-")]
        measured |= {
            key: found if isinstance(found, str) else found[key.removeprefix(f"{case}-")] for key in keys
        }
    bench.say("reloads: uvicorn")
    try:
        return measured | _beside(bench)
    except ServerError as error:  # what the other does is no reason to lose our own figures
        reason = str(error).splitlines()[0]
        return measured | dict.fromkeys(("uvicorn-failed", "uvicorn-p99", "uvicorn-given-up"), reason)


def _case(bench: Bench, user: str | None, workers: int) -> Measured:
    reloads, quiet_s = _length(bench)
    moments: list[tuple[float, list[int]]] = []
    with segue(bench, workers=workers, start_s=START_S, user=user) as server:
        server.first_answer()
        with load(bench, server, LOAD) as clients:
            time.sleep(1)
            for _ in range(reloads):
                clients.window("quiet")
                time.sleep(quiet_s)
                clients.window("reload")
                operation = server.reload()
                time.sleep(AFTER_S)
                clients.window("draining")
                moments.append(_readiness(server))
                server.wait_drained(operation)
            clients.window("quiet")
            time.sleep(quiet_s)
            result = clients.end()
    _keep(bench, f"{'unprivileged' if user else 'own user'}, {workers}", result)
    closes = result["server_closes"]
    seen = result["pids"]
    return {
        **_compared(result),
        "failed": result["failed_total"],
        "closed": closes["idle_keepalive_closed"] + closes["connection_close_header"],
        "gap": result["longest_gap_ms"]["any"]["ms"],
        "own": max((late_ms for _, late_ms in result["own_stalls"]), default=0.0),
        "rate": result["rate_short"],
        "first": max(
            (min(seen[str(pid)]["first"] for pid in pids if str(pid) in seen) - ready) * 1000
            for ready, pids in moments
        ),
    }


def _readiness(server: Segue) -> tuple[float, list[int]]:
    """When the last worker of the current generation had completed its start-up, and their pids.

    The application's own clock: what the worker and the master do from there to the first answer is in the figure.
    """
    pids = [worker["pid"] for worker in server.workers()]
    return max(server.started(pid) for pid in pids), pids


def _keep(bench: Bench, case: str, result: dict[str, Any]) -> None:
    """What tells where and when, for whoever has to find out why."""
    keys = [
        *("failures_detail", "fail_log", "server_closes", "longest_gap_ms", "own_stalls"),
        *("windows", "client_cpu_frac", "timeline_100ms"),
    ]
    borders = [(event["t_rel"], event["window"]) for event in result["events"]]
    bench.details.append({"case": case, "borders": borders, **{key: result[key] for key in keys}})


def _compared(result: dict[str, Any]) -> dict[str, float]:
    windows = result["windows"]
    quiet, reloading = windows["quiet"]["latency_ms"], windows["reload"]["latency_ms"]
    return {
        "p99": reloading["short"]["p99"] / quiet["short"]["p99"],
        "kept-p99": reloading["keepalive"]["p99"] / quiet["keepalive"]["p99"],
    }


def _beside(bench: Bench) -> Measured:
    reloads, quiet_s = _length(bench)
    given_up = 0
    with uvicorn(bench, workers=2, start_s=START_S) as server:
        server.first_answer()
        with load(bench, server, LOAD) as clients:
            time.sleep(1)
            for _ in range(reloads):
                clients.window("quiet")
                time.sleep(quiet_s)
                before = set(_workers(server.pid))
                clients.window("reload")
                server.process.send_signal(signal.SIGHUP)
                if not _replaced(server.pid, before):
                    given_up += 1
                time.sleep(START_S + AFTER_S)
                clients.window("draining")
            clients.window("quiet")
            time.sleep(quiet_s)
            result = clients.end()
    _keep(bench, "uvicorn, 2", result)
    return {
        "uvicorn-failed": result["failed_total"],
        "uvicorn-p99": _compared(result)["p99"],
        "uvicorn-given-up": given_up,
    }


def _replaced(pid: int, before: set[int]) -> bool:
    """Wait until uvicorn has replaced both workers; it tells nobody when it gives up."""
    deadline = time.monotonic() + 20
    while len(set(_workers(pid)) - before) < 2:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _workers(pid: int) -> list[int]:
    """The children of uvicorn that are workers, not multiprocessing's resource tracker."""
    found = []
    for child in children(pid):
        try:
            with open(f"/proc/{child}/cmdline", "rb") as file:
                if b"spawn_main" in file.read():
                    found.append(child)
        except FileNotFoundError:
            continue
    return found


def _length(bench: Bench) -> tuple[int, float]:
    """How many reloads, and how long a quiet window is."""
    return (3, 1.0) if bench.quick else (10, 2.0)

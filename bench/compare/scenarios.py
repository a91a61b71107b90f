"""What is done to each server, and what is then seen from outside.

Each scenario takes a running workshop and a contestant, and returns what it found as plain values; ``failed`` and
``closed`` are what the clients of the load generator felt. Nothing here knows how a server works inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import websockets.exceptions
from websockets.asyncio.client import ClientConnection, connect

from bench.compare.contestants import Contestant, Running, serving
from bench.processes import marked, rss_mib
from bench.servers import Bench, ServerError, load

Found = dict[str, Any]

LOAD = (
    *("--keepalive", "50", "--post", "10", "--newconn", "10", "--sse", "5"),
    *("--think-min", "0", "--think-max", "20", "--timeout", "10"),
)
"""Of the reloads: near the most that a worker does."""
LIGHT = ("--keepalive", "20", "--newconn", "4", "--think-min", "20", "--think-max", "60", "--timeout", "5")
"""Where something is broken: enough to notice, not enough to disturb."""
NEW_CODE_S = 30.0
"""So long a reload is waited for."""
START_S = 1.0
SLOW_START_S = 7.0
SOCKETS = 20
_CLEAN_CODES = frozenset({1000, 1001, 1012})
"""What tells a client that nothing is wrong and it may connect again."""


# ---------------------------------------------------------------------------------------------------- reload under load


def reloads(bench: Bench, contestant: Contestant, workers: int) -> Found:
    """Reload again and again under full load; each time wait for the new code."""
    count, rest_s = (2, 1.0) if bench.quick else (5, 2.0)
    delays: list[float | None] = []
    with serving(bench, contestant, workers, START_S) as server, load(bench, server, LOAD) as clients:
        time.sleep(rest_s)
        signals = []
        for _ in range(count):
            signals.append(time.monotonic())
            delays.append(_reload(server, start_s=START_S))
            time.sleep(rest_s)
            if server.ended is not None:
                break
        ended, result = server.ended, clients.end()
    told = [delay for delay in delays if delay is not None]
    return {
        **felt(result),
        "reloads": len(delays),
        "not_done": len(delays) - len(told),
        "new_code_s": statistics.median(told) if told else None,
        "ended": ended,
        "around": around(result, signals),
    }


def reloads_with_one_worker(bench: Bench, contestant: Contestant) -> Found:
    """One worker."""
    return reloads(bench, contestant, 1)


def reloads_with_two_workers(bench: Bench, contestant: Contestant) -> Found:
    """Two workers."""
    return reloads(bench, contestant, 2)


def _reload(server: Running, **how: Any) -> float | None:
    """Deploy and signal; seconds until new connections get the new code only, None if that doesn't come."""
    version = server.code.deploy(**how)
    begun = time.monotonic()
    server.reload()
    seen = wait_for_version(server, version, NEW_CODE_S)
    return None if seen is None else seen - begun


def wait_for_version(server: Running, version: int, timeout_s: float) -> float | None:
    """The time of the first answer of `version`; None if none comes, or the server has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if version_of(server.port) == version:
            return time.monotonic()
        if server.ended is not None and version_of(server.port) is None:
            return None
        time.sleep(0.005)
    return None


def version_of(port: int, timeout_s: float = 2.0) -> int | None:
    """Which version answers a new connection; None if nobody does."""
    answer = ask(port, timeout_s)
    found = re.search(rb"x-version: (\d+)", answer, re.I)
    return int(found[1]) if found else None


def ask(port: int, timeout_s: float = 2.0) -> bytes:
    """A whole answer on a new connection; empty if there is none."""
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout_s) as connection:
            connection.sendall(b"GET /ping HTTP/1.1\r\nHost: compare\r\nConnection: close\r\n\r\n")
            while data := connection.recv(4096):
                answer += data
    except OSError:
        return b""
    return answer


def felt(result: dict[str, Any]) -> Found:
    """What the clients have felt."""
    closes = result["server_closes"]
    return {
        "requests": result["ok_total"],
        "failed": result["failed_total"],
        "failures": result["failures"],
        "closed": closes["idle_keepalive_closed"] + closes["connection_close_header"],
        "gap_ms": result["longest_gap_ms"]["any"]["ms"],
        "p99_ms": (result["latency_ms"]["short"] or {}).get("p99"),
    }


def around(
    result: dict[str, Any], moments: list[float], before_s: float = 1.0, after_s: float = 4.0
) -> list[Any]:
    """The longest latency, the answers and the failures of each tenth of a second around the signals, laid over one another."""
    found: dict[int, list[float]] = {}
    for moment in moments:
        at = moment - result["t0"]
        for second, latency_ms, answers, failures in result["timeline_100ms"]:
            if -before_s <= second - at <= after_s:
                tenth = found.setdefault(round((second - at) * 10), [0.0, 0, 0])
                tenth[0] = max(tenth[0], latency_ms)
                tenth[1] += answers
                tenth[2] += failures
    return [[tenth / 10, *values] for tenth, values in sorted(found.items())]


# -------------------------------------------------------------------------------------------------------- broken code


def broken(bench: Bench, contestant: Contestant, mend: bool = True, **how: Any) -> Found:
    """Deploy code that does not start, and look whether the old one goes on serving; then mend it."""
    watch_s = 4.0 if bench.quick else 10.0
    with serving(bench, contestant, 2) as server, load(bench, server, LIGHT) as clients:
        server.code.deploy(**how)
        server.reload()
        time.sleep(watch_s)
        answers = version_of(server.port)
        ended, result = server.ended, clients.end()
        tried = mend and ended is None
        mended = _reload(server) if tried else None
        later = server.ended if ended is None else None
    return {
        **felt(result),
        "serves": answers == 1,
        "ended": ended,
        "mend_tried": tried,
        "mended_s": mended,
        "ended_when_mended": later,
    }


def broken_import(bench: Bench, contestant: Contestant) -> Found:
    """The module can't be imported."""
    return broken(bench, contestant, broken_import=True)


def broken_startup(bench: Bench, contestant: Contestant) -> Found:
    """The start-up raises."""
    return broken(bench, contestant, how="fails=True")


def hanging_startup(bench: Bench, contestant: Contestant) -> Found:
    """The start-up does not end. Not mended: how long each waits for it is a setting."""
    return broken(bench, contestant, mend=False, how="hangs=True")


def slow_startup(bench: Bench, contestant: Contestant) -> Found:
    """The new code takes long to start, as an application does that loads a model."""
    with serving(bench, contestant, 2) as server, load(bench, server, LIGHT) as clients:
        time.sleep(1)
        moment = time.monotonic()
        delay = _reload(server, start_s=SLOW_START_S if not bench.quick else 3.0)
        time.sleep(1)
        ended, result = server.ended, clients.end()
    return {
        **felt(result),
        "new_code_s": delay,
        "ended": ended,
        "around": around(result, [moment], 1.0, 14.0),
    }


# ------------------------------------------------------------------------------------------------------------- crashes


def worker_killed(bench: Bench, contestant: Contestant) -> Found:
    """One of two workers dies."""
    return _kill_worker(bench, contestant, broker_down=False)


def worker_killed_while_broken(bench: Bench, contestant: Contestant) -> Found:
    """One of two workers dies while nothing can start, since a broker is down."""
    return _kill_worker(bench, contestant, broker_down=True)


def _kill_worker(bench: Bench, contestant: Contestant, broker_down: bool) -> Found:
    watch_s = 4.0 if bench.quick else 10.0
    with serving(bench, contestant, 2) as server:
        pids = workers_of(server, 2)
        with load(bench, server, LIGHT) as clients:
            time.sleep(1)
            server.code.broker(broker_down)
            os.kill(pids[0], signal.SIGKILL)
            killed = time.monotonic()
            again = None if broker_down else _another(server, set(pids), killed, watch_s)
            time.sleep(max(0.0, watch_s - (time.monotonic() - killed)))
            serves, ended = version_of(server.port) is not None, server.ended
            result = clients.end()
        recovered = None
        if broker_down and ended is None:
            server.code.broker(down=False)
            recovered = _another(server, set(pids), time.monotonic(), 40.0)
    return {
        **felt(result),
        "serves": serves,
        "ended": ended,
        "again_s": recovered if broker_down else again,
    }


def workers_of(server: Running, count: int) -> list[int]:
    """The processes that answer."""
    found: set[int] = set()
    deadline = time.monotonic() + 20
    while len(found) < count and time.monotonic() < deadline:
        pid = re.search(rb"x-pid: (\d+)", ask(server.port), re.I)
        if pid is not None:
            found.add(int(pid[1]))
    if len(found) < count:
        raise ServerError(f"only {len(found)} of {count} workers answer\n{server.tail()}")
    return sorted(found)


def _another(server: Running, known: set[int], since: float, timeout_s: float) -> float | None:
    """Seconds until a process answers that is none of `known`."""
    while time.monotonic() - since < timeout_s:
        pid = re.search(rb"x-pid: (\d+)", ask(server.port), re.I)
        if pid is not None and int(pid[1]) not in known:
            return time.monotonic() - since
        if server.ended is not None and pid is None:
            return None
        time.sleep(0.01)
    return None


def master_killed(bench: Bench, contestant: Contestant) -> Found:
    """The process that supervises dies; then the same command is started again, as a service manager would."""
    watch_s = 3.0 if bench.quick else 6.0
    with serving(bench, contestant, 2) as server, load(bench, server, LIGHT) as clients:
        workers = set(workers_of(server, 2))
        time.sleep(1)
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait()
        time.sleep(watch_s)
        serves = version_of(server.port) is not None
        version = server.code.deploy()
        second = server.launch()
        try:
            time.sleep(watch_s)
            ended = second.poll()
            second.send_signal(signal.SIGHUP) if ended is None else None
            time.sleep(watch_s)
            versions = {version_of(server.port) for _ in range(60)} - {None}
            ended = second.poll()
            result = clients.end()
        finally:
            if second.poll() is None:
                second.send_signal(signal.SIGQUIT if contestant.ours else signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    second.wait(10)
        left = [pid for pid in workers if pid in marked(server.mark)]
    return {
        **felt(result),
        "serves": serves,
        "started_again": ended is None,
        "new_code": versions == {version},
        "mixed": len(versions) > 1,
        "left": len(left),
    }


# ---------------------------------------------------------------------------------------------------------- WebSockets


def sockets(bench: Bench, contestant: Contestant) -> Found:
    """Open WebSockets over a reload: what becomes of them, and whether they are told."""
    watch_s = 5.0 if bench.quick else 12.0
    with serving(bench, contestant, 2) as server:
        opened = asyncio.run(_sockets(server, watch_s))
    codes = [code for code in opened if code is not None]
    return {
        "open": len(opened) - len(codes),
        "told": sum(code in _CLEAN_CODES for code in codes),
        "cut": sum(code not in _CLEAN_CODES for code in codes),
        "codes": {str(code): codes.count(code) for code in sorted(set(codes))},
    }


async def _sockets(server: Running, watch_s: float) -> list[int | None]:
    """The code with which each was closed; None of those that still answer."""
    clients = [await connect(f"ws://127.0.0.1:{server.port}/", ping_interval=None) for _ in range(SOCKETS)]
    for client in clients:
        await client.send("a")
        await client.recv()
    server.code.deploy()
    server.reload()
    await asyncio.sleep(watch_s)
    codes = [await _still_open(client) for client in clients]
    for client in clients:
        client.transport.abort()
    return codes


async def _still_open(client: ClientConnection) -> int | None:
    try:
        async with asyncio.timeout(2):
            await client.send("b")
            await client.recv()
    except websockets.exceptions.ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd is not None else 1006
    except TimeoutError:
        return 1006
    return None


# -------------------------------------------------------------------------------------------------------------- figures


def memory(bench: Bench, contestant: Contestant) -> Found:
    """Resident memory of the master, and of all its processes, with two workers."""
    with serving(bench, contestant, 2) as server:
        workers_of(server, 2)
        time.sleep(1 if bench.quick else 3)
        found = {}
        for pid in marked(server.mark):
            with contextlib.suppress(OSError):
                found[pid] = rss_mib(pid)
    return {"master_mib": found[server.pid], "all_mib": sum(found.values()), "processes": len(found)}


def throughput(bench: Bench, contestant: Contestant) -> Found:
    """Requests per second with one worker and with two."""
    if shutil.which("wrk") is None:
        raise ServerError("wrk is not installed")
    found = {}
    for workers in (1, 2):
        with serving(bench, contestant, workers) as server:
            workers_of(server, workers)
            _wrk(server.port, 1)
            found[str(workers)] = _wrk(server.port, 1 if bench.quick else 5)
    return {"one": found["1"], "two": found["2"]}


def _wrk(port: int, seconds: int) -> float:
    command = ["wrk", "-t1", "-c32", f"-d{seconds}s", f"http://127.0.0.1:{port}/ping"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rate = re.search(r"^Requests/sec:\s+([\d.]+)", said, re.M)
    if rate is None:
        raise ServerError(f"wrk says:\n{said}")
    return float(rate[1])


def signal_to_new_code(bench: Bench, contestant: Contestant) -> Found:
    """From the signal to the first answer of code that starts at once, without load."""
    delays = []
    with serving(bench, contestant, 2) as server:
        workers_of(server, 2)
        for _ in range(2 if bench.quick else 5):
            delays.append(_reload(server))
            time.sleep(1.0)
    told = [delay for delay in delays if delay is not None]
    return {"median_s": statistics.median(told) if told else None, "not_done": len(delays) - len(told)}


SCENARIOS: dict[str, tuple[str, Callable[[Bench, Contestant], Found]]] = {
    "reload-1": ("reload under load, 1 worker", reloads_with_one_worker),
    "reload-2": ("reload under load, 2 workers", reloads_with_two_workers),
    "import": ("new code fails at import", broken_import),
    "startup": ("new code fails at start-up", broken_startup),
    "hang": ("new code hangs at start-up", hanging_startup),
    "slow": ("new code takes 7 s to start", slow_startup),
    "worker": ("a worker is killed", worker_killed),
    "worker-broken": ("a worker is killed while nothing can start", worker_killed_while_broken),
    "master": ("the master is killed", master_killed),
    "sockets": ("WebSockets over a reload", sockets),
    "memory": ("memory", memory),
    "throughput": ("requests/s", throughput),
    "signal": ("time from the signal to new code", signal_to_new_code),
}
"""In the order of the page."""

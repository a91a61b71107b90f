"""The dashboard in a real browser: how soon it is painted, and what it costs while it is open.

The page is open as whoever steers has it: signed in, so with the stream of the status and that of the events. The browser
belongs on another machine, since what it paints with is not what the worker has lost. So a worker's loss is measured with
the two streams of the page in the hands of a client that paints nothing, and beside it with the browser here. Where there
are two processors or more, the worker under load has one for itself, and all else shares the others.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from bench.browser import NoBrowserError, Page, chromium
from bench.figures import Figure, Measured
from bench.ports import free_port
from bench.processes import cpu_s
from bench.servers import Bench, Segue, segue
from bench.throughput import NO_WRK, wrk, wrk_is_here

FIGURES = [
    Figure("paint", "first paint of the page, nothing cached (slowest of ten)", "ms", 300, "<"),
    Figure("paint-median", "  the same (median)", "ms"),
    Figure("shown", "  until it shows the workers (median)", "ms"),
    Figure("idle", "master with the page open, 2 workers: CPU while idle", "% of a core", 1, "<", 2),
    Figure("closed", "  the same with no page open", "% of a core", digits=2),
    Figure("loaded", "master with the page open, 2 workers: CPU under load", "% of a core", 1, "<", 2),
    Figure(
        "ratio", "requests/s of a worker, page's streams open ÷ closed (median of pairs)", "", 0.99, ">=", 3
    ),
    Figure("cpu", "  CPU per request, open ÷ closed (median of pairs)", digits=3),
    Figure("here", "  requests/s, page open in a browser on the same machine ÷ closed", digits=3),
    Figure("here-cpu", "  CPU per request, the same", digits=3),
]
TOKEN = "a-token-of-many-letters-0123456789"
EMPTY = "about:blank"
_PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
_SHOWN = "document.querySelectorAll('#workers tbody tr').length > 0 && performance.now()"
_MAY_SIGN_IN = "!document.getElementById('signin').hidden"
_MAY_ACT = "!document.getElementById('signout').hidden"
_STREAMS = ("/api/v1/hot/watch", "/api/v1/hot/events?last=100")
"""What the page follows."""
_SETTLED_S = 2.0
"""After the page was opened or closed: what that takes isn't what it costs while it is open."""


def measure(bench: Bench) -> Measured:
    """One run."""
    loads = 1 if bench.quick else 10
    watched_s = 3 if bench.quick else 30
    found: Measured = {}
    try:
        with _browser() as page, _instance(bench, workers=2) as (server, address):
            found |= _painted(bench, page, address, loads)
            bench.say(f"dashboard: idle for twice {watched_s} s")
            page.open(EMPTY)
            found["closed"] = _busy(server, watched_s)
            _open(page, address)
            found["idle"] = _busy(server, watched_s)
            if wrk_is_here():
                bench.say(f"dashboard: under load for {watched_s} s")
                found["loaded"] = _busy(server, watched_s, loaded=True)
        if wrk_is_here():
            with _instance(bench, workers=1) as (server, address):
                worker = server.workers()[0]["pid"]
                pairs = _Pairs(bench, server, worker)
                with _apart(worker, server.pid):
                    rate, cost = pairs.measure("streams", loads, lambda: _followed(address))
                    found |= {"ratio": rate, "cpu": cost}
                    with _browser() as page:
                        rate, cost = pairs.measure("browser", loads, lambda: _shown(page, address))
                        found |= {"here": rate, "here-cpu": cost}
    except NoBrowserError as error:
        return {figure.key: str(error) for figure in FIGURES}
    return {figure.key: found.get(figure.key, NO_WRK) for figure in FIGURES}


def _browser() -> contextlib.AbstractContextManager[Page]:
    return chromium({"PATH": os.environ["PATH"]})


@contextlib.contextmanager
def _instance(bench: Bench, workers: int) -> Iterator[tuple[Segue, str]]:
    """A running one, and where its page is."""
    token = bench.directory / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    admin = f"127.0.0.1:{free_port()}"
    options = ("--admin", admin, "--token-file", str(token))
    with segue(bench, workers=workers, options=options) as server:
        server.first_answer()
        yield server, f"http://{admin}/"


def _painted(bench: Bench, page: Page, address: str, times: int) -> Measured:
    """What the browser itself says of its paints (PerformancePaintTiming)."""
    page.keep_nothing()
    painted, shown = [], []
    for number in range(times):
        bench.say(f"dashboard: loaded {number + 1} times")
        page.open(EMPTY)
        page.open(address)
        shown.append(float(page.wait(_SHOWN)))
        painted.append(float(page.wait(_PAINTED)))
    return {
        "paint": max(painted),
        "paint-median": statistics.median(painted),
        "shown": statistics.median(shown),
    }


def _open(page: Page, address: str) -> None:
    """The page of somebody who may steer, with both of its streams."""
    page.open(address)
    page.wait(f"{_MAY_SIGN_IN} || {_MAY_ACT}")
    if page.run(_MAY_SIGN_IN):
        page.run("document.getElementById('token').focus()")
        page.type(TOKEN)
        page.press_enter()
    page.wait("document.getElementById('events').children.length > 0")


def _busy(server: Segue, seconds: int, loaded: bool = False) -> float:
    """Per cent of a core that the master uses."""
    time.sleep(_SETTLED_S)
    before, begun = cpu_s(server.pid), time.monotonic()
    if loaded:
        wrk(server.port, seconds)
    else:
        time.sleep(seconds)
    return 100 * (cpu_s(server.pid) - before) / (time.monotonic() - begun)


@contextlib.contextmanager
def _shown(page: Page, address: str) -> Iterator[None]:
    _open(page, address)
    assert all(any(each in asked for asked in page.requested) for each in _STREAMS), page.requested
    yield
    page.open(EMPTY)


@contextlib.contextmanager
def _followed(address: str) -> Iterator[None]:
    """The page's streams, read by somebody who does nothing with them."""
    netloc = urlsplit(address).netloc
    with contextlib.ExitStack() as stack:
        for stream in _STREAMS:
            connection = http.client.HTTPConnection(netloc)
            connection.request("GET", stream, headers={"Authorization": f"Bearer {TOKEN}"})
            connected, answer = connection.sock, connection.getresponse()
            assert answer.status == 200, answer.read()
            reader = threading.Thread(target=_read_on, args=(answer,))
            reader.start()
            stack.callback(reader.join)
            stack.callback(connected.shutdown, socket.SHUT_RDWR)
        yield


def _read_on(answer: http.client.HTTPResponse) -> None:
    with contextlib.closing(answer), contextlib.suppress(http.client.IncompleteRead):
        while answer.read1(65536):
            pass


class _Pairs:
    """Of the same load on a worker, with something open and without, each second pair the other way round."""

    def __init__(self, bench: Bench, server: Segue, worker: int) -> None:
        self._bench = bench
        self._server = server
        self._worker = worker
        self._seconds = 1 if bench.quick else 4
        wrk(server.port, 1)

    def measure(
        self, what: str, times: int, opened: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> tuple[float, float]:
        """Requests/s, and CPU per request, open ÷ closed: the medians."""
        rates, costs = [], []
        for number in range(times):
            self._bench.say(f"dashboard: {what}, pair {number + 1} of {times}")
            found: dict[bool, tuple[float, float]] = {}
            for is_open in (True, False) if number % 2 else (False, True):
                with opened() if is_open else contextlib.nullcontext():
                    found[is_open] = self._rate_and_cost()
            rates.append(found[True][0] / found[False][0])
            costs.append(found[True][1] / found[False][1])
        self._bench.details.append({"dashboard": {"with": what, "rates": rates, "costs": costs}})
        return statistics.median(rates), statistics.median(costs)

    def _rate_and_cost(self) -> tuple[float, float]:
        time.sleep(_SETTLED_S)
        before = cpu_s(self._worker)
        rate, requests = wrk(self._server.port, self._seconds)
        return rate, (cpu_s(self._worker) - before) / requests


@contextlib.contextmanager
def _apart(worker: int, master: int) -> Iterator[None]:
    """A processor for the worker alone; the master and what this process starts meanwhile have the others."""
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        yield
        return
    os.sched_setaffinity(worker, processors[:1])
    for pid in (0, master):
        os.sched_setaffinity(pid, processors[1:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, processors)

"""Services: what a lease and a swap cost, and what becomes of streams while their service is swapped."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
import timeit
from dataclasses import dataclass, field
from typing import Any

import segue
from bench.figures import Figure, Measured
from bench.servers import Bench, Segue
from bench.servers import segue as instance
from bench.users import ROOT

DEPENDENTS = 100
STREAMS = 50
LINES = 15
"""Of a stream, one every 20 ms."""

FIGURES = [
    Figure("commit", "commit step with 100 dependents (99th of 100)", "µs", 200, "<"),
    Figure("lease", "a lease and its return", "µs", 2, "<", 2),
    Figure("idle", "what a registry adds to a request that does not use it", "µs", 1, "<", 2),
    Figure("swaps_broken", "100 swaps under 50 streams, 2 workers: streams broken", "", 0),
    Figure("swaps_refused", "  swaps refused", "", 0),
    Figure("reloads_broken", "and with 20 reloads in between: streams broken", "", 0),
    Figure("reloads_refused", "  swaps and reloads refused", "", 0),
    Figure("streams", "  streams that ended whole", "", sense=">="),
    Figure("swap_ms", "  one swap in all workers under that load (median)", "ms", digits=1),
]


def measure(bench: Bench) -> Measured:
    """One run."""
    swaps, reloads = (10, 2) if bench.quick else (100, 20)
    shutil.copy(ROOT / "bench" / "services_app.py", bench.directory / "app" / "services_app.py")
    bench.say("services: a lease, a commit, an idle registry")
    found: Measured = {**asyncio.run(_commit_and_lease()), "idle": _idle()}
    bench.say("services: swaps under streams")
    plain = _under_streams(bench, swaps, 0)
    bench.say("services: swaps and reloads under streams")
    both = _under_streams(bench, swaps, reloads)
    return found | {
        "swaps_broken": len(plain.broken),
        "swaps_refused": plain.refused,
        "reloads_broken": len(both.broken),
        "reloads_refused": both.refused,
        "streams": plain.whole + both.whole,
        "swap_ms": statistics.median(plain.seconds) * 1000,
    }


class _Thing:
    def __init__(self, **_: Any) -> None:
        self.base: Any = None


async def _commit_and_lease() -> dict[str, float]:
    services = segue.Services()
    base = services.declare("base", _Thing)
    for number in range(DEPENDENTS):
        services.declare(f"dependent{number}", lambda base: _Thing(base=base), requires=[base])
    async with services:
        seconds = sorted([(await services.reload("base"))["seconds"]["commit"] for _ in range(100)])

        def lease() -> None:
            with base.lease():
                pass

        number = 100_000
        per_lease = min(timeit.repeat(lease, number=number, repeat=5)) / number
    return {"commit": seconds[98] * 1e6, "lease": per_lease * 1e6}


def _idle() -> float:
    """Seconds more per request, from calling the wrapped application as the server does."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        pass

    wrapped = segue.Services().wrap(application)
    scope = {"type": "http"}

    async def time_of(app: Any, number: int = 100_000) -> float:
        begun = time.perf_counter()
        for _ in range(number):
            await app(scope, None, None)
        return (time.perf_counter() - begun) / number

    async def both() -> float:
        return min([await time_of(wrapped) for _ in range(5)]) - min(
            [await time_of(application) for _ in range(5)]
        )

    return max(0.0, asyncio.run(both()) * 1e6)


@dataclass
class _Tally:
    """What became of the streams and of who asked for changes."""

    whole: int = 0
    refused: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def _under_streams(bench: Bench, swaps: int, reloads: int) -> _Tally:
    with instance(bench, workers=2, app="services_app:app") as server:
        server.first_answer()
        return asyncio.run(_run(server, swaps, reloads))


async def _run(server: Segue, swaps: int, reloads: int) -> _Tally:
    tally, ended = _Tally(), asyncio.Event()
    listeners = [asyncio.create_task(_listen(server.port, tally, ended)) for _ in range(STREAMS)]
    every = swaps // reloads if reloads else 0
    for number in range(swaps):
        begun = time.perf_counter()
        try:
            await asyncio.to_thread(server.ask, "POST", f"/reload/model?tag={number}")
            tally.seconds.append(time.perf_counter() - begun)
            if every and number % every == every - 1:
                await asyncio.to_thread(server.reload)
        except Exception as error:
            tally.refused += 1
            tally.broken.append(str(error))
    ended.set()
    await asyncio.gather(*listeners)
    return tally


async def _listen(port: int, tally: _Tally, ended: asyncio.Event) -> None:
    """One stream after the other, each on a connection that is kept."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while not ended.is_set():
        writer.write(f"GET /stream?n={LINES}&ms=20 HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
        try:
            answer = (await reader.readuntil(b"0\r\n\r\n")).decode()
        except (asyncio.IncompleteReadError, OSError) as error:
            tally.broken.append(f"{type(error).__name__}: {error}")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        lines = answer.partition("\r\n\r\n")[2].split()[1::2]
        if (
            len(lines) == LINES + 1
            and lines[-1] == "end"
            and len(set(lines[:-1])) == 1
            and lines[0] != "gone"
        ):
            tally.whole += 1
        else:
            tally.broken.append(answer)
    writer.close()

"""HSP: swaps of the connector under load on a real mosquitto, in the process and with whole generations."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

import segue
from bench.broker import Broker
from bench.figures import Figure, Measured
from bench.servers import Bench, ServerError, wait_for
from bench.servers import segue as instance
from bench.users import ROOT
from segue.worker.backend.hsp.connector import HSPConnector
from segue.worker.backend.hsp.envelope import FACT, Envelope
from segue.worker.backend.hsp.settings import HSPSettings

KINDS = {
    f"v{version}-q{qos}": (version, qos, rate, f"MQTT {version}, QoS {qos}, {rate:,} messages/s")
    for version in ("3.1.1", "5")
    for qos, rate in ((1, 1000), (2, 500))
}
PAUSE_S = 0.05
"""Between two swaps."""
SETTLE_S = 60.0

FIGURES = [
    figure
    for key, (_, _, _, text) in KINDS.items()
    for figure in (
        Figure(f"{key}-swaps", f"{text}: 50 swaps in the process: lost + doubled + out of order", "", 0),
        Figure(f"{key}-ms", "  one swap (median)", "ms", 30, "<", 1),
        Figure(f"{key}-worst", "  the slowest", "ms", digits=1),
        Figure(f"{key}-generations", "  then 20 generation swaps: lost + doubled + out of order", "", 0),
        Figure(
            f"{key}-pause",
            "  from the last message of one process to the first of the next (median)",
            "ms",
            digits=1,
        ),
        Figure(f"{key}-refused", "  swaps and reloads refused", "", 0),
        Figure(f"{key}-messages", "  messages handled", "", sense=">="),
    )
]


def measure(bench: Bench) -> Measured:
    """One run."""
    swaps, reloads = (10, 3) if bench.quick else (50, 20)
    found: Measured = {}
    for key, (version, qos, rate, text) in KINDS.items():
        with Broker(bench.directory / f"broker-{key}-{time.monotonic_ns()}") as broker:
            wanted: dict[str, Any] = {"mqtt_version": version, "qos": qos, "ai_id": "bench"}
            bench.say(f"hsp: {text}: swaps in the process")
            inside = uvloop.run(_swaps(broker, rate, swaps, wanted))
            bench.say(f"hsp: {text}: generation swaps")
            across = _generations(bench, broker, rate, reloads, wanted | {"ai_id": "generations"})
        milliseconds = [each * 1000 for each in inside.seconds]
        found |= {
            f"{key}-swaps": inside.wrong,
            f"{key}-ms": statistics.median(milliseconds),
            f"{key}-worst": max(milliseconds),
            f"{key}-generations": across.wrong,
            f"{key}-pause": statistics.median(across.seconds or [0.0]) * 1000,
            f"{key}-refused": inside.refused + across.refused,
            f"{key}-messages": inside.handled + across.handled,
        }
        bench.details.append({"hsp": key, "swaps": inside.document(), "generations": across.document()})
    return found


@dataclass
class Tally:
    """What was handled, against what was sent."""

    got: dict[int, list[int]] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each swap in the process; between generations, from the last message of one process to the first of the next."""
    refused: int = 0

    def take(self, topic: int, number: int) -> None:
        """One was handled."""
        self.got.setdefault(topic, []).append(number)

    @property
    def handled(self) -> int:
        """All of them."""
        return sum(map(len, self.got.values()))

    @property
    def lost(self) -> int:
        """Sent, and never handled."""
        return sum(count - len(set(self.got.get(topic, ()))) for topic, count in enumerate(self.sent))

    @property
    def doubled(self) -> int:
        """Handled more than once."""
        return sum(len(got) - len(set(got)) for got in self.got.values())

    @property
    def inversions(self) -> list[tuple[int, int, int]]:
        """Topic, and two messages one after the other of which the second was handled too late, or the first too early."""
        return [
            (topic, before, after)
            for topic, got in self.got.items()
            for before, after in itertools.pairwise(dict.fromkeys(got))
            if after < before
        ]

    @property
    def reordered(self) -> int:
        """Handled for the first time after a later one of its topic."""
        return len(self.inversions)

    @property
    def wrong(self) -> int:
        """All that must not be."""
        return self.lost + self.doubled + self.reordered

    def document(self) -> dict[str, Any]:
        """For the result's file."""
        names = ("handled", "lost", "doubled", "reordered", "refused")
        shown: dict[str, Any] = {"inversions": self.inversions[:20]} if self.inversions else {}
        return {"sent": sum(self.sent)} | {name: getattr(self, name) for name in names} | shown


@contextlib.contextmanager
def publisher(port: int, rate: int, qos: int, sent: list[int]) -> Iterator[None]:
    """Numbered facts for the length of a block; how many there were is in `sent` then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.hsp_publisher", str(port), str(rate), str(qos)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise ServerError("the publisher did not start")
        yield
        process.stdin.close()
        sent[:] = json.loads(process.stdout.readline())["sent"]
        process.wait(30)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


async def _swaps(broker: Broker, rate: int, swaps: int, wanted: dict[str, Any]) -> Tally:
    tally = Tally()
    settings = HSPSettings(host="127.0.0.1", port=broker.port, **wanted)

    def take(message: Envelope) -> None:
        if "number" in message.payload:
            tally.take(message.payload["topic"], message.payload["number"])

    def make(previous: HSPConnector | None) -> HSPConnector:
        connector = HSPConnector(settings, previous)
        if previous is None:
            connector.on(FACT, take)
        return connector

    services = segue.Services()
    services.declare("hsp", make, per="generation")
    async with services:
        with publisher(broker.port, rate, wanted["qos"], tally.sent):
            for _ in range(swaps):
                await asyncio.sleep(PAUSE_S)
                begun = time.perf_counter()
                try:
                    await services.reload("hsp")
                except segue.SwapRefusedError:
                    tally.refused += 1
                else:
                    tally.seconds.append(time.perf_counter() - begun)
        async with asyncio.timeout(SETTLE_S):
            while tally.handled < sum(tally.sent):
                await asyncio.sleep(0.05)
    return tally


def _generations(bench: Bench, broker: Broker, rate: int, reloads: int, wanted: dict[str, Any]) -> Tally:
    tally = Tally()
    place = bench.directory / "app"
    shutil.copy(ROOT / "bench" / "hsp_app.py", place / "hsp_app.py")
    received, settings = place / "received", place / "segue.toml"
    received.unlink(missing_ok=True)
    lines = [f"{key} = {json.dumps(value)}" for key, value in (wanted | {"host": "127.0.0.1"}).items()]
    settings.write_text("\n".join(["[services.hsp]", f"port = {broker.port}", *lines, ""]))
    try:
        with instance(bench, app="hsp_app:app") as server:
            server.first_answer()
            wait_for(
                lambda: server.status()["hsp"]["is_connected"],
                30,
                0.05,
                lambda: "no connection",
                lambda: None,
            )
            with publisher(broker.port, rate, wanted["qos"], tally.sent):
                for _ in range(reloads):
                    try:
                        server.reload()
                    except ServerError:
                        tally.refused += 1
            with contextlib.suppress(ServerError):  # what is missing is in the figures
                wait_for(lambda: _count(received) >= sum(tally.sent), SETTLE_S, 0.1, lambda: "", lambda: None)
    finally:
        settings.unlink()
    before: tuple[int, int] | None = None
    for line in _lines(received):
        topic, number, pid, microseconds = map(int, line.split())
        tally.take(topic, number)
        if before is not None and before[0] != pid:
            tally.seconds.append((microseconds - before[1]) / 1e6)
        before = pid, microseconds
    return tally


def _count(path: Path) -> int:
    return sum(1 for _ in _lines(path))


def _lines(path: Path) -> Iterable[str]:
    return path.read_text().splitlines() if path.exists() else []

"""Development mode: from a save to the first answer of the new code, beside the start of plain uvicorn; and what it costs.

uvicorn's own ``--reload`` stands beside it. Then saves follow on one another under load: nothing may fail.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from bench.figures import Figure, Measured
from bench.processes import children, cpu_s, rss_mib
from bench.reloads import LOAD
from bench.servers import START_TIMEOUT_S, Bench, Segue, Server, load, ping, segue, uvicorn, wait_for

FIGURES = [
    Figure(
        "later", "save → first answer of the new code, less plain uvicorn's exec → first answer", "ms", 150
    ),
    Figure("save", "  save → first answer of the new code (median)", "ms"),
    Figure("uvicorn", "  beside: uvicorn's start, exec → first answer (median)", "ms"),
    Figure(
        "uvicorn-save", "  beside: save → first answer of the new code of uvicorn --reload (median)", "ms"
    ),
    Figure("failed", "saves under load: failed requests", "", 0),
    Figure("closed", "saves under load: connections closed by the server", "", 0),
    Figure("rss", "master in development mode: resident memory", "MiB", 45, "<", 1),
    Figure("watcher", "  the process that watches: resident memory", "MiB", digits=1),
    Figure("idle", "  CPU time of both in a second of idleness", "ms", digits=1),
]


def measure(bench: Bench) -> Measured:
    """One run."""
    saves, uvicorns, theirs = [], [], []
    source = Source(bench.directory / "app" / "app.py")
    rounds = 3 if bench.quick else 10
    with segue(bench, options=("--reload",)) as running:
        running.first_answer()
        wait_for(lambda: _watches(running), START_TIMEOUT_S, 0.01, running.tail)
        watcher = next(pid for pid in children(running.pid) if _is_watcher(pid))
        source.saved_to_answer(running)  # fills the caches of the disk for both
        for number in range(rounds):
            bench.say(f"dev: {number + 1}")
            time.sleep(0.5)  # longer than --reload-delay, as a person's saves are
            saves.append(source.saved_to_answer(running))
            with uvicorn(bench) as plain:
                uvicorns.append(plain.first_answer() - plain.launched)
        idle_before = cpu_s(running.pid) + cpu_s(watcher)
        time.sleep(5)
        idle = (cpu_s(running.pid) + cpu_s(watcher) - idle_before) / 5
        with load(bench, running, LOAD) as clients:
            for _ in range(rounds):
                source.saved_to_answer(running)
                time.sleep(0.5)
            result = clients.end()
        rss, watching = rss_mib(running.pid), rss_mib(watcher)
    with uvicorn(bench, options=("--reload",)) as reloading:
        reloading.first_answer()
        time.sleep(1)  # it does not say when it watches
        for _ in range(rounds):
            time.sleep(0.5)
            theirs.append(source.saved_to_answer(reloading))
    source.restore()
    closes = result["server_closes"]
    save, plainly = statistics.median(saves) * 1000, statistics.median(uvicorns) * 1000
    return {
        "later": save - plainly,
        "save": save,
        "uvicorn": plainly,
        "uvicorn-save": statistics.median(theirs) * 1000,
        "failed": result["failed_total"],
        "closed": closes["idle_keepalive_closed"] + closes["connection_close_header"],
        "rss": rss,
        "watcher": watching,
        "idle": idle * 1000,
    }


class Source:
    """The application's file, which is saved again and again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text = path.read_text()
        self._number = 100

    def saved_to_answer(self, server: Server) -> float:
        """Save another version; seconds until a new connection gets an answer of it."""
        self._number += 1
        wanted = str(self._number).encode()
        text = self._text.replace('os.environ.get("BENCH_VERSION", "1")', f'"{self._number}"')
        text += "#" * (self._number % 50)  # another size: Python's cache knows sources by second and size
        begun = time.monotonic()
        self._path.write_text(text)
        return (
            wait_for(
                lambda: _version(server.port) == wanted,
                START_TIMEOUT_S,
                0.002,
                lambda: f"version {self._number} is not served\n{server.tail()}",
            )
            - begun
        )

    def restore(self) -> None:
        """As it was."""
        self._path.write_text(self._text)


def _watches(server: Segue) -> bool:
    return any(event["event"] == "watching" for event in server.ask("GET", "/events")["events"])


def _version(port: int) -> bytes | None:
    """What a new connection is answered by; None if it isn't."""
    answer = ping(port, 0.5) or b""
    return answer.partition(b"x-version: ")[2].partition(b"\r\n")[0] or None


def _is_watcher(pid: int) -> bool:
    return b"segue.supervisor.watcher" in Path(f"/proc/{pid}/cmdline").read_bytes()

"""Everything that can go wrong, at random, under load: `make chaos` does the same for longer."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scenario import ROOT, environment

from bench.chaos.blame import Blame, Cause
from bench.chaos.events import BESIDE, EVENTS, WITH_COMPANY
from bench.chaos.schedule import Schedule


@pytest.mark.timeout(960)
def test_whatever_goes_wrong_only_what_a_killed_worker_held_is_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.chaos", "--events", "1"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing else was lost" in done.stdout
    told = done.stdout.partition("\nseed ")[2]
    assert all(f"  {name}\n" in told for name in EVENTS)


def test_each_event_comes_as_often_as_asked_and_a_seed_repeats_the_order() -> None:
    def order(seed: int) -> list[tuple[str, str | None]]:
        schedule = Schedule(EVENTS, 10, random.Random(seed), BESIDE, WITH_COMPANY)
        found = []
        while not schedule.enough:
            found.append(schedule.next())
            schedule.counts.update(each for each in found[-1] if each)
        assert min(schedule.counts[name] for name in EVENTS) == 10
        assert all(beside is None or (name in WITH_COMPANY and beside in BESIDE) for name, beside in found)
        assert any(beside for _, beside in found)
        return found

    assert order(7) == order(7)
    assert order(7) != order(8)
    assert len(order(7)) < 15 * len(EVENTS)  # what has come often enough waits for what has not


SERVER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
kept = listener.accept()
print("accepted", flush=True)
sys.stdin.read()
"""


def test_only_what_was_held_at_that_moment_is_explained_by_a_kill(tmp_path: Path) -> None:
    blame = Blame(tmp_path / "spoiled")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        blame.port = int(server.stdout.readline())
        dialed = time.monotonic()
        with socket.create_connection(("127.0.0.1", blame.port)) as client:
            assert server.stdout.readline() == "accepted\n"
            port, before = client.getsockname()[1], time.monotonic()
            assert blame.take_down(server.pid) == 1
            server.kill()
    (tmp_path / "spoiled").write_text("")
    now = time.monotonic()
    assert blame.cause((now, port, dialed, "idle")) is Cause.KILLED
    for at, other, since in ((now, port + 1, dialed), (now, port, now), (before, port, dialed)):
        assert blame.cause((at, other, since, "idle")) is Cause.UNKNOWN


def test_only_the_errors_that_bad_code_has_written_down_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "spoiled").write_text("5000 10.5\n")
    blame = Blame(tmp_path / "spoiled")
    assert blame.cause((11.0, 5000, 10.0, "keepalive: non_2xx 500")) is Cause.SPOILED
    for loss in (
        (11.0, 5000, 10.0, "keepalive: non_2xx 503"),
        (11.0, 5000, 10.0, "keepalive: truncated eof"),
        (11.0, 5001, 10.0, "keepalive: non_2xx 500"),
        (10.4, 5000, 10.0, "keepalive: non_2xx 500"),
        (11.0, 5000, 10.6, "keepalive: non_2xx 500"),
    ):
        assert blame.cause(loss) is Cause.UNKNOWN

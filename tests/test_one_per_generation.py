"""Services of which one is active in the whole generation: never two, whatever happens, and never none for long."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scenario import HOT, Client, Segue, supervised

APP = """
import asyncio, fcntl, json, os, pathlib
import segue

VERSION = "1"
HERE = pathlib.Path(__file__).parent
services = segue.Services()


class Scheduler:
    "Holds a lock while it is active: a second one that is active at the same time is seen by everybody."

    def __init__(self):
        self.lock = None

    def activate(self):
        if (HERE / "broker-down").exists():
            raise ConnectionError("the broker is down")
        lock = os.open(HERE / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (HERE / "two-at-once").touch()
            raise
        self.lock = lock
        with open(HERE / "log", "a") as log:
            log.write(f"{os.getpid()} active {VERSION}\\n")

    async def deactivate(self):
        if (HERE / "deactivate-hangs").exists():
            await asyncio.sleep(3600)
        while (HERE / "deactivate-waits").exists():
            await asyncio.sleep(0.01)
        self.give_up()

    def give_up(self):
        if self.lock is not None:
            with open(HERE / "log", "a") as log:
                log.write(f"{os.getpid()} idle {VERSION}\\n")
            os.close(self.lock)
            self.lock = None

    def close(self):
        if (HERE / "deactivate-hangs").exists():
            raise RuntimeError("can't be closed either")
        self.give_up()

    def metrics(self):
        return {"is_connected": self.lock is not None}


services.declare("scheduler", Scheduler, per="generation", handover_timeout=1, deactivate_timeout=float(os.environ.get("LET_GO_S", "0.5")))


async def serve(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not (HERE / "end-streams").exists():
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.02)
        await send({"type": "http.response.body", "body": b"end"})
        return
    headers = [(b"content-length", b"4"), (b"x-pid", str(os.getpid()).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"pong"})


app = services.wrap(serve)
"""


@contextlib.contextmanager
def running(directory: Path, workers: int = 2, **env: str) -> Iterator[Segue]:
    (directory / "jobs.py").write_text(APP)
    with supervised("jobs:app", "--workers", str(workers), cwd=directory, env=env) as master:
        yield master
        master.stop(None)
    assert not (directory / "two-at-once").exists()


def active(directory: Path) -> list[str]:
    """The processes that are active, by what they wrote: those that died while active are left out."""
    lines = (directory / "log").read_text().splitlines() if (directory / "log").exists() else []
    found: list[str] = []
    for line in lines:
        pid, what, _ = line.split()
        if what == "active":
            found.append(pid)
        elif pid in found:
            found.remove(pid)
    return [pid for pid in found if Path(f"/proc/{pid}/exe").exists()]  # not of a zombie


def one_active(master: Segue, directory: Path) -> str:
    """Wait until exactly one worker of the current generation is active, and nothing is unhealthy."""

    def settled(document: dict[str, Any]) -> bool:
        generation = next(g for g in document["generations"] if g["current"])
        now = active(directory)
        return len(now) == 1 and int(now[0]) in {worker["pid"] for worker in generation["workers"]}

    master.wait_status(settled)
    return active(directory)[0]


def test_one_worker_has_it_and_the_status_asks_only_that_one(tmp_path: Path) -> None:
    with running(tmp_path, workers=3) as master:
        lead = one_active(master, tmp_path)
        document = master.told(lambda d: d["services"]["scheduler"]["active"])
        assert document["metrics"]["scheduler"] == {"is_connected": True}
        workers = document["generations"][0]["workers"]
        expected = [w for w in workers if w["services"]["scheduler"]["expected_active"]]
        assert [str(w["pid"]) for w in expected] == [lead]


def test_it_moves_when_its_worker_dies_or_leaves(tmp_path: Path) -> None:
    with running(tmp_path) as master:
        first = one_active(master, tmp_path)
        os.kill(int(first), signal.SIGKILL)
        master.output.wait_for("worker-died generation=1 .*SIGKILL")
        second = one_active(master, tmp_path)
        assert second != first
        for count in (4, 1, 2):
            assert master.command("scale", str(count)).returncode == 0
            one_active(master, tmp_path)


def test_it_follows_the_generation_and_is_never_active_twice(tmp_path: Path) -> None:
    with running(tmp_path) as master:
        before = one_active(master, tmp_path)
        for version in range(2, 8):
            (tmp_path / "jobs.py").write_text(APP.replace('"1"', f'"{version}"', 1))
            master.reload()
            now = one_active(master, tmp_path)
            assert now != before
            before = now
        # a reload that is refused leaves it where it was
        (tmp_path / "jobs.py").write_text("raise RuntimeError('broken')")
        assert master.command("reload").returncode == 1
        assert one_active(master, tmp_path) == before


def test_a_swap_of_it_deactivates_the_old_instance_before_the_new_one_is_active(tmp_path: Path) -> None:
    with running(tmp_path, LET_GO_S="60") as master:
        lead = one_active(master, tmp_path)

        def states() -> list[str]:
            return [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]

        for number in range(3):
            code, answer = master.call("POST", f"{HOT}/reload/scheduler")
            assert code == 200, answer
            # the answer waits a second for this, and no longer
            master.wait_status(lambda _, number=number: len(states()) == 1 + 2 * (number + 1))
        assert one_active(master, tmp_path) == lead
        assert states() == ["active", *["idle", "active"] * 3]


def test_a_promote_stands_when_it_can_not_be_activated_and_it_comes_up_later(tmp_path: Path) -> None:
    with running(tmp_path) as master:
        one_active(master, tmp_path)
        (tmp_path / "broker-down").touch()
        master.reload()
        document = master.told(lambda d: d["services"]["scheduler"]["degraded"] is not None)
        assert "the broker is down" in document["services"]["scheduler"]["degraded"]
        assert document["metrics"]["scheduler"] == {"is_connected": False}
        assert document["ready"]
        worker = next(
            w for w in document["generations"][-1]["workers"] if w["services"]["scheduler"]["expected_active"]
        )
        assert "ConnectionError" in worker["services"]["scheduler"]["errors"][0]["error"]
        (tmp_path / "broker-down").unlink()
        one_active(master, tmp_path)


def test_in_a_promote_connections_move_first_and_services_hand_over_after(tmp_path: Path) -> None:
    # who is old stays for as long as the test takes
    with running(tmp_path, LET_GO_S="60", SEGUE_PARK_FOR="600") as master, Client(master.port) as client:
        old = one_active(master, tmp_path)
        generation = set(master.worker_pids())
        (tmp_path / "deactivate-waits").touch()
        master.reload()
        # the kept connection is served by the new generation, while the old one still has its service
        master.wait_status(lambda _: int(client.get("/ping")[1]["x-pid"]) not in generation)
        assert active(tmp_path) == [old]
        (tmp_path / "deactivate-waits").unlink()
        assert one_active(master, tmp_path) != old


def test_while_the_old_one_does_not_let_go_the_new_one_is_not_active(tmp_path: Path) -> None:
    with running(tmp_path, SEGUE_PARK_FOR="600") as master, Client(master.port) as client:
        old = one_active(master, tmp_path)
        (tmp_path / "deactivate-hangs").touch()
        # keep the workers of the old generation, for as long as their streams last
        streams = [Client(master.port) for _ in range(8)]
        for stream in streams:
            stream.connection.request("GET", "/stream")
        answers = [stream.connection.getresponse() for stream in streams]
        master.reload()
        master.output.wait_for(r"services-not-told .*did not let go")
        assert active(tmp_path) == [old]
        assert client.get("/ping")[2] == b"pong"
        (tmp_path / "deactivate-hangs").unlink()
        assert one_active(master, tmp_path) != old
        (tmp_path / "end-streams").touch()
        for stream, answer in zip(streams, answers, strict=True):
            answer.read()
            stream.close()


def test_a_worker_without_a_master_keeps_it(tmp_path: Path) -> None:
    with running(tmp_path, workers=1) as master, Client(master.port) as client:
        lead = one_active(master, tmp_path)
        master.process.kill()
        master.process.wait()
        assert client.get("/ping")[2] == b"pong"
        assert active(tmp_path) == [lead]
        assert master.command("stop").returncode == 0
        assert active(tmp_path) == []

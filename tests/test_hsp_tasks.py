"""Many tasks at once, and their process ends in the middle: what was begun is brought to an end, by whoever comes next."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hsp_harness import (
    FACTS,
    MARKS,
    Agent,
    Proxy,
    agent,
    broker,
    connected,
    fact,
    publish,
    received,
    serving,
    settings,
    until,
)
from scenario import Segue, made_directory

from bench.broker import Broker

pytestmark = [
    *MARKS,
    pytest.mark.parametrize("version", ["5", "3.1.1"]),
    pytest.mark.parametrize("qos", [1, 2]),
]

MANY = 15
"""More than may wait for their acknowledgement."""


class Tasks:
    """Of an agent behind a master, asked for by one in this process."""

    def __init__(self, code: Path, master: Segue, asker: Agent) -> None:
        self.code = code
        self.master = master
        self._asker = asker
        self.asked: list[asyncio.Task[dict[str, Any]]] = []

    async def ask(self, count: int = MANY) -> int:
        """Ask for so many, and wait until all have begun; the pid of who works on them."""
        self.asked = [self._asking(number) for number in range(count)]
        pid = await asyncio.to_thread(self.pid)
        await self.begun(pid, set(range(count)))
        return pid

    def ask_again(self, number: int) -> None:
        """For what is lost."""
        self.asked[number].cancel()
        self.asked[number] = self._asking(number)

    def _asking(self, number: int) -> asyncio.Task[dict[str, Any]]:
        asking = self._asker.current.request_task("square", {"number": number}, "alpha", timeout_s=100)
        return asyncio.create_task(asking)

    def pid(self) -> int:
        """Of the worker."""
        (pid,) = self.master.worker_pids()
        return pid

    def by(self, pid: int) -> list[int]:
        """What a process has begun."""
        path = self.code / "begun"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [int(number) for who, number in lines if int(who) == pid]

    async def begun(self, pid: int, numbers: set[int]) -> None:
        """Wait until a process has begun all of these."""
        await until(lambda: numbers <= set(self.by(pid)))

    async def finish(self, *numbers: int) -> None:
        """Let some end, and wait for their results."""
        for number in numbers:
            (self.code / f"go-{number}").touch()
        for number in numbers:
            assert await self.asked[number] == {"square": number**2}

    async def remembered(self, *finished: int) -> None:
        """Wait until the worker has only the others left: a result arrives before it is remembered that it was given."""
        await counted(self, lambda metrics: metrics["tasks_running"] == len(self.asked) - len(finished))

    async def kill(self) -> int:
        """`kill -9` of the worker; the pid of the one that takes its place."""
        before = await asyncio.to_thread(self.pid)
        os.kill(before, signal.SIGKILL)
        await asyncio.to_thread(
            self.master.wait_status,
            lambda document: connected(document) and before not in self.master.worker_pids(),
        )
        return await asyncio.to_thread(self.pid)

    @property
    def written(self) -> list[Path]:
        """The tasks that are written down."""
        return written(self.code / "state")


def written(state: Path) -> list[Path]:
    return list(state.rglob("*.task"))


@contextlib.asynccontextmanager
async def working(tmp_path: Path, server: Broker, through: Any, **more: Any) -> AsyncIterator[Tasks]:
    code = tmp_path / "code"
    wanted = {"mqtt_version": more["mqtt_version"], "qos": more["qos"]}
    async with contextlib.AsyncExitStack() as stack:
        asker = settings(server, ai_id="asker", ack_timeout_s=60.0, **wanted)
        asking = await stack.enter_async_context(agent(asker))
        # not in the loop: a proxy may be running there
        serves = contextlib.ExitStack()
        stack.push_async_callback(asyncio.to_thread, serves.close)
        alpha = serving(code, through, app="tasks_app:app", reconnect_first_s=0.05, **more)
        yield Tasks(code, await asyncio.to_thread(serves.enter_context, alpha), asking)


async def test_more_tasks_than_may_wait_are_all_brought_to_an_end_after_a_kill(
    tmp_path: Path, version: str, qos: int
) -> None:
    with broker(tmp_path) as server:
        async with working(tmp_path, server, server, mqtt_version=version, qos=qos) as tasks:
            await tasks.ask()
            await until(lambda: len(tasks.written) == MANY - 10)
            finished = {0, 12, 14}
            await tasks.finish(*finished)
            await until(lambda: len(tasks.written) == MANY - 10 - 2)
            await tasks.remembered(*finished)
            successor = await tasks.kill()
            await tasks.begun(successor, set(range(MANY)) - finished)
            await tasks.finish(*range(MANY))
            assert sorted(tasks.by(successor)) == sorted(set(range(MANY)) - finished)
            await until(lambda: not tasks.written)


async def test_more_tasks_than_may_wait_go_on_in_a_new_generation(
    tmp_path: Path, version: str, qos: int
) -> None:
    with broker(tmp_path) as server:
        more: dict[str, Any] = {"mqtt_version": version, "qos": qos, "drain_timeout_s": 0.5}
        async with working(tmp_path, server, server, **more) as tasks:
            await tasks.ask()
            await asyncio.to_thread(tasks.master.reload)
            successor = await asyncio.to_thread(tasks.pid)
            await tasks.begun(successor, set(range(MANY)))
            successor = await tasks.kill()
            await tasks.begun(successor, set(range(MANY)))
            await tasks.finish(*range(MANY))
            assert sorted(tasks.by(successor)) == list(range(MANY))
            await until(lambda: not tasks.written)


async def test_tasks_whose_session_has_gone_in_a_swap_are_brought_to_an_end_after_a_kill(
    tmp_path: Path, version: str, qos: int
) -> None:
    with broker(tmp_path) as server:
        async with working(tmp_path, server, server, mqtt_version=version, qos=qos) as tasks:
            pid = await tasks.ask()
            for _ in range(2):
                swapped = await asyncio.to_thread(tasks.master.command, "reload", "hsp")
                assert swapped.returncode == 0, swapped.stderr
            assert len(tasks.by(pid)) == MANY, "none is begun anew by a swap"
            await tasks.finish(3)
            await tasks.remembered(3)
            successor = await tasks.kill()
            await tasks.begun(successor, set(range(MANY)) - {3})
            await tasks.finish(*range(MANY))
            assert 3 not in tasks.by(successor)
            await until(lambda: not tasks.written)


async def test_tasks_that_are_delivered_again_while_they_last_are_not_acknowledged_before_they_are_done(
    tmp_path: Path, version: str, qos: int
) -> None:
    with broker(tmp_path) as server:
        async with Proxy(server) as proxy:
            more: dict[str, Any] = {"mqtt_version": version, "qos": qos}
            async with working(tmp_path, server, proxy, **more) as tasks:
                pid = await tasks.ask()
                proxy.reset()
                await counted(tasks, lambda metrics: metrics["duplicates"] >= 10)
                assert len(tasks.by(pid)) == MANY
                successor = await tasks.kill()
                await tasks.begun(successor, set(range(MANY)))
                await tasks.finish(*range(MANY))


async def counted(tasks: Tasks, condition: Callable[[dict[str, Any]], bool]) -> None:
    """Wait for what the connector counts."""

    def holds(document: dict[str, Any]) -> bool:
        return condition(document["metrics"]["hsp"])

    await asyncio.to_thread(tasks.master.wait_status, holds)


def fill(path: Path) -> None:
    """Until nothing more goes onto its file system."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


async def test_with_a_full_disk_tasks_wait_at_the_broker_and_what_can_not_is_told(
    tmp_path: Path, version: str, qos: int
) -> None:
    mount = 'mkdir state && mount -t tmpfs -o size=1m,mode=0700 tmpfs state && exec "$@"'
    prefix = ("unshare", "-Urm", "sh", "-c", mount, "sh")
    possible = subprocess.run([*prefix, "true"], check=False, cwd=made_directory("segue-full-"))
    if possible.returncode:
        pytest.skip("no file system can be mounted here")
    with broker(tmp_path) as server:
        more: dict[str, Any] = {"mqtt_version": version, "qos": qos, "prefix": prefix}
        async with working(tmp_path, server, server, **more) as tasks:
            ballast = Path(f"/proc/{tasks.master.process.pid}/root{tasks.code}/state/ballast")
            fill(ballast)
            await tasks.ask(MANY + 2)
            await counted(tasks, lambda metrics: metrics["tasks_exposed"] == 2)
            told = "a task is lost if this process is killed: it can't be written down"
            await asyncio.to_thread(tasks.master.output.wait_for, told)
            # fifteen wait for their acknowledgement, and what is behind them gets through all the same
            await publish(server, *((f"{FACTS}/0", fact(number)) for number in range(100)))
            await until(lambda: received(tasks.code).count == 100)
            successor = await tasks.kill()
            await tasks.begun(successor, set(range(MANY)))
            ballast.unlink()
            for number in (MANY, MANY + 1):
                tasks.ask_again(number)
            await until(lambda: len(written(ballast.parent)) >= 2)
            await tasks.finish(*range(MANY + 2))

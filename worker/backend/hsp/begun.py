"""Work that goes on for longer than its message: until it is done, the broker has the message, or it is written down.

A broker passes on no more than so many messages that aren't acknowledged (mosquitto 20) before it waits, and what comes
behind must get through: results, above all, that the same work waits for. So ten messages are left unacknowledged while
their work goes on. One more is written into a file first, as is each whose session goes meanwhile; the file goes with the end
of the work. After a `kill -9`, and where a process leaves off before its work is done, whoever holds the subscription next
begins with what is left. There are never more files than work in progress (`max_tasks`).

Rejected: to begin no more than ten (they may wait for what is behind them), and one file of all (it would have to be written
anew, or cleaned up, for each).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from segue.worker.backend.hsp.link import Message

_log = logging.getLogger("segue.hsp")

_UNACKNOWLEDGED = 10
"""How many messages whose work goes on are left unacknowledged …"""
_WITHOUT_DISK = 15
"""… and how many if no more can be written down. Beyond, what waits behind them counts for more."""

Work = asyncio.Future[None]


class _Written(msgspec.Struct):
    topic: str
    payload: bytes


class Left(msgspec.Struct, frozen=True):
    """A message of which another process has begun the work, and not finished it."""

    path: Path
    topic: str
    payload: bytes


class Begun:
    """What is written down by one process, over swaps."""

    def __init__(self, problem: Callable[[str, str], object]) -> None:
        """`problem` is told of a topic, and of what is wrong with a message there."""
        self.exposed = 0
        """How many messages were acknowledged, and would be lost with this process: they could not be written down."""
        self._problem = problem
        self._path: Path | None = None
        self._files: dict[Work, Path] = {}
        self._writer = ThreadPoolExecutor(1, "hsp-begun")

    def __len__(self) -> int:
        return len(self._files)

    def attach(self, path: Path) -> list[Left]:
        """Write here from now on: names of files begin with `path`. What others have left there, the oldest first."""
        self._path = path
        with contextlib.suppress(OSError):
            for torn in path.parent.glob(f"{path.name}.*.torn"):
                torn.unlink(missing_ok=True)  # it was never acknowledged
        own = set(self._files.values())
        found = [_read(each) for each in sorted(path.parent.glob(f"{path.name}.*.task")) if each not in own]
        return [each for each in found if each is not None]

    async def write(self, work: Work, topic: str, payload: bytes) -> None:
        """Once it returns, a message is on the disk until `work` is done. Raises `OSError`."""
        if work in self._files:
            return
        if self._path is None:
            raise OSError("there is no place for it")
        path = self._path.with_name(f"{self._path.name}.{time.time_ns():020d}-{os.getpid()}.task")
        data = msgspec.msgpack.encode(_Written(topic, payload))
        await asyncio.get_running_loop().run_in_executor(self._writer, _write, path, data)
        self.until_done(path, work)

    def until_done(self, path: Path, work: Work | None) -> None:
        """Keep a file until then. None: it is done."""
        if work is None or work in self._files:
            _remove(path)
        else:
            self._files[work] = path
            work.add_done_callback(self._finished)

    def _finished(self, work: Work) -> None:
        path = self._files.pop(work)
        if not work.cancelled():
            _remove(path)

    def expose(self, topic: str, error: OSError) -> None:
        """Say that a message would be lost with this process."""
        self.exposed += 1
        self._problem(topic, f"a task is lost if this process is killed: it can't be written down: {error}")


class Unfinished:
    """The work of one connection, and its messages."""

    def __init__(self, begun: Begun, acknowledge: Callable[[Message], None]) -> None:
        self._begun = begun
        self._acknowledge = acknowledge
        self._going: dict[Work, Message | None] = {}
        """With the message, while that is not acknowledged."""

    async def add(self, work: Work, message: Message) -> None:
        """Acknowledge a message once its work is done, or as soon as it is safe otherwise."""
        if work.cancelled():
            return
        if work.done() or work in self._going:  # the latter: who has sent it did so again
            self._acknowledge(message)
            return
        self._going[work] = message
        work.add_done_callback(self._finished)
        if len(self) <= _UNACKNOWLEDGED:
            return
        try:
            await self._begun.write(work, message.topic.value, _payload(message))
        except OSError as error:
            if len(self) <= _WITHOUT_DISK:
                return
            self._begun.expose(message.topic.value, error)
        if self._going.get(work) is message:  # else it was done meanwhile
            self._going[work] = None
            self._acknowledge(message)

    def __len__(self) -> int:
        """How many messages are unacknowledged meanwhile."""
        return sum(message is not None for message in self._going.values())

    def _finished(self, work: Work) -> None:
        message = self._going.pop(work)
        if message is not None and not work.cancelled():
            self._acknowledge(message)

    async def write_down(self) -> None:
        """Make all of it safe: the broker will not have the messages any more."""
        for work, message in list(self._going.items()):
            if message is not None and not work.done():
                try:
                    await self._begun.write(work, message.topic.value, _payload(message))
                except OSError as error:
                    self._begun.expose(message.topic.value, error)

    async def done(self) -> None:
        """Wait until all of it is."""
        while self._going:
            await asyncio.wait(set(self._going))


def _payload(message: Message) -> bytes:
    return message.payload if isinstance(message.payload, bytes) else bytes(message.payload)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    torn = path.with_suffix(".torn")
    try:
        with open(os.open(torn, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        torn.rename(path)
    except OSError:
        _remove(torn)
        raise


def _read(path: Path) -> Left | None:
    try:
        written = msgspec.msgpack.decode(path.read_bytes(), type=_Written)
    except FileNotFoundError:  # it was done at this moment
        return None
    except (OSError, msgspec.MsgspecError) as error:
        _log.error("event=hsp-task-not-read path=%s reason=%s", path, error)
        return None
    return Left(path, written.topic, written.payload)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # then it is told apart by its message_id
        path.unlink(missing_ok=True)

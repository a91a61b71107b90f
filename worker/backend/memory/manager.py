"""`HAMMemoryManager`: the memory as a service.

All file access is in two threads of its own, one for writing and one for reading, so that neither a slow disk nor a
search holds up the event loop. What `add` and `add_turn` have returned is committed (see `schema.connect`).

A file that is no database, that is damaged, or that can't be opened fails `start` with the reason, in a swap as at boot:
the instance before, or the generation before, goes on, and the file is left as it is. Nothing is ever begun anew in its
place, since what looks damaged to one process may be in use by another.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

import msgspec

import segue
from segue.worker.backend.memory.records import (
    TURN,
    Memory,
    MemoryFailedError,
    MemoryRefusedError,
    Session,
    Turn,
    TurnRole,
)
from segue.worker.backend.memory.schema import Durability
from segue.worker.backend.memory.store import Limits, Store
from segue.worker.backend.places import PlaceError, state_directory

_T = TypeVar("_T")
_P = ParamSpec("_P")
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_FILE = "memory.db"
_IN_MEMORY = ":memory:"
_MAX_KIND = 64


class MemorySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[services.memory]``."""

    path: str = ""
    """The file; empty: ``memory.db`` in the state directory. ``:memory:`` keeps nothing, and each worker its own."""
    max_items: _Positive = 100_000
    """The oldest notes go first, then the oldest turns."""
    max_bytes: _Positive = 256 * 1024 * 1024
    """Of texts; the file may be three times as large."""
    max_item_bytes: _Positive = 256 * 1024
    """A longer note is refused, a longer turn shortened."""
    durability: Durability = "process"
    """What an acknowledged write survives: the end of the process, however it ends, or a power cut as well, for which
    each write waits for the disk."""
    busy_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    """How long a write waits for those of other processes."""


class HAMMemoryManager:
    """Notes and the turns of conversations, with full-text search."""

    def __init__(self, settings: MemorySettings) -> None:
        self.settings = settings
        self._store: Store | None = None
        self._writer = ThreadPoolExecutor(1, "memory-writer")
        self._reader = ThreadPoolExecutor(1, "memory-reader")
        self._path = settings.path
        self._note: str | None = None
        self._failed: str | None = None
        self._size = 0
        self._closed = False

    async def start(self) -> None:
        """Open the file. Raises `MemoryFailedError`, which names it."""
        if not self._path:
            try:
                directory = await asyncio.get_running_loop().run_in_executor(self._writer, state_directory)
                self._path = str(directory / _FILE)
            except PlaceError as error:
                if os.environ.get("STATE_DIRECTORY"):
                    raise MemoryFailedError(f"no place for the memory: {error}") from error
                self._path, self._note = _IN_MEMORY, f"nothing is kept: {error}"
        if self._path == _IN_MEMORY:
            self._note = self._note or "nothing is kept beyond this process"
            self._reader = self._writer  # one connection, one thread
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._open)
        except (sqlite3.Error, OSError) as error:
            raise MemoryFailedError(
                f"{self._path} can't be used as memory: {error}; move it away, or set another path"
            ) from error

    def _open(self) -> None:
        settings = self.settings
        limits = Limits(settings.max_items, settings.max_bytes, settings.max_item_bytes)
        if self._path != _IN_MEMORY:
            directory = Path(self._path).parent
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives the files beside it the mode of the first one
            try:
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            except OSError as error:
                raise OSError(error.errno, error.strerror) from error
        store = Store(self._path, limits, settings.durability, settings.busy_timeout_s)
        try:
            # a look at each table
            store.search("", 1, None, None)
            store.search("segue", 1, None, None)
            self._size = store.totals()[0]
        except BaseException:
            store.close()
            raise
        self._store = store

    def health(self) -> dict[str, Any]:
        """Not ok while writing fails; `note` says if nothing is kept."""
        if self._store is None:
            return {"ok": False, "reason": "it isn't open"}
        if self._failed is not None:
            return {"ok": False, "reason": self._failed}
        return {"ok": True} | ({} if self._note is None else {"note": self._note})

    async def activate(self) -> None:
        """The limits are this instance's from here on."""
        try:
            self._size = await self._write(Store.prune)
        except MemoryFailedError as error:
            self._failed = str(error)

    async def close(self) -> None:
        """Finish what was begun, and close the file."""
        self._closed = True
        loop = asyncio.get_running_loop()
        try:
            # after whatever the threads still have to do
            await loop.run_in_executor(self._reader, _nothing)
            await loop.run_in_executor(self._writer, self._shut)
        finally:
            self._reader.shutdown(wait=False)
            self._writer.shutdown(wait=False)

    def _shut(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()

    async def metrics(self) -> dict[str, Any]:
        """What all workers share."""
        items, size = await self._read(Store.totals)
        self._size = items
        return {"ham_store_size": segue.Shared(items), "bytes": segue.Shared(size)}

    # ------------------------------------------------------------------------------------------------- its verbs

    async def add(
        self,
        text: str,
        *,
        kind: str = "note",
        session: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> int:
        """Remember a note; its number, once it is committed.

        With a `session` it is found in that conversation only. Raises `MemoryRefusedError` for a text that is empty or
        too long and for a kind that can't be, `MemoryFailedError` if it can't be written.
        """
        if not text.strip():
            raise MemoryRefusedError(400, "text is empty")
        if not 0 < len(kind) <= _MAX_KIND or not kind.isprintable() or kind == TURN:
            raise MemoryRefusedError(400, f"a note's kind can't be {kind[:_MAX_KIND]!r}")
        return await self._add(kind, session, None, text, meta)

    async def add_turn(
        self, session: str, role: TurnRole, content: str, meta: Mapping[str, Any] | None = None
    ) -> int:
        """Remember what was said; its number, once it is committed. One that is too long is shortened.

        Raises `MemoryFailedError`.
        """
        return await self._add(TURN, session, role, content, meta)

    async def search(
        self, query: str, limit: int = 10, session: str | None = None, *, turns_before: int | None = None
    ) -> list[Memory]:
        """What has one of the words of `query`, best fit first; parts in double quotes as they stand. Empty: the newest.

        With a `session` nothing of other conversations is found; with `turns_before` none of its turns from that number
        on. Raises `MemoryFailedError`.
        """
        return await self._read(Store.search, query, limit, session, turns_before)

    async def turns(self, session: str, limit: int = 100) -> list[Turn]:
        """The last turns of a conversation, oldest first. Raises `MemoryFailedError`."""
        return await self._read(Store.turns, session, limit)

    async def sessions(self, limit: int = 100) -> list[Session]:
        """The conversations, the last one first. Raises `MemoryFailedError`."""
        return await self._read(Store.sessions, limit)

    def size(self) -> int:
        """How many items there are, as of the last write of this process or the last `metrics`."""
        return self._size

    # ---------------------------------------------------------------------------------------------- the threads

    async def _add(
        self,
        kind: str,
        session: str | None,
        role: TurnRole | None,
        text: str,
        meta: Mapping[str, Any] | None,
    ) -> int:
        number, self._size = await self._write(Store.add, kind, session, role, text, dict(meta or {}))
        return number

    async def _write(
        self, do: Callable[Concatenate[Store, _P], _T], *args: _P.args, **named: _P.kwargs
    ) -> _T:
        try:
            done = await self._run(self._writer, do, *args, **named)
        except MemoryFailedError as error:
            self._failed = str(error)
            raise
        self._failed = None
        return done

    async def _read(self, do: Callable[Concatenate[Store, _P], _T], *args: _P.args, **named: _P.kwargs) -> _T:
        return await self._run(self._reader, do, *args, **named)

    async def _run(
        self,
        thread: ThreadPoolExecutor,
        do: Callable[Concatenate[Store, _P], _T],
        *args: _P.args,
        **named: _P.kwargs,
    ) -> _T:
        store = self._store
        if store is None or self._closed:
            raise MemoryFailedError("the memory is closed")
        work = functools.partial(do, store, *args, **named)
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", None) or type(error).__name__
            raise MemoryFailedError(f"{self._path}: {error} ({code})") from error


def _nothing() -> None:
    pass

"""The memory's tables, read and written; synchronous, for a thread of its own.

Two connections: one writes, one reads, so that a search never waits for a write, nor for another process's.
"""

from __future__ import annotations

import json
import sqlite3
import time
from typing import Any

import msgspec

from segue.worker.backend.memory import words
from segue.worker.backend.memory.records import TURN, Memory, MemoryRefusedError, Session, Turn, TurnRole
from segue.worker.backend.memory.schema import Durability, connect

_PRUNE_AT_ONCE = 64
_ITEM = "INSERT INTO items (kind, session, role, text, meta, created, bytes) VALUES (?, ?, ?, ?, ?, ?, ?)"
_SEARCH = """
SELECT items.id, kind, session, items.text, created, -bm25(words) AS score, meta
FROM words JOIN items ON items.id = words.rowid
WHERE words MATCH :query AND (:session IS NULL OR session IS NULL OR session = :session)
    AND NOT (kind = 'turn' AND session IS :session AND items.id >= :turns_before)
ORDER BY bm25(words), items.id DESC LIMIT :limit
"""
_NEWEST = """
SELECT id, kind, session, text, created, 0.0, meta FROM items
WHERE (:session IS NULL OR session IS NULL OR session = :session)
    AND NOT (kind = 'turn' AND session IS :session AND id >= :turns_before)
ORDER BY id DESC LIMIT :limit
"""
_SESSIONS = """
SELECT session, count(*), min(created), max(created) FROM items WHERE kind = 'turn'
GROUP BY session ORDER BY max(id) DESC LIMIT ?
"""
_END = 2**63 - 1


class Limits(msgspec.Struct, frozen=True):
    """How much there may be."""

    items: int
    bytes: int
    """Of texts and what is said about them; the file is up to some three times as large."""
    item_bytes: int
    """Of one text."""


class Store:
    """One file. `close` it; every method may raise `sqlite3.Error`."""

    def __init__(self, path: str, limits: Limits, durability: Durability, busy_timeout_s: float) -> None:
        self._limits = limits
        self._writing = connect(path, durability, busy_timeout_s)
        try:
            # a database in memory belongs to its connection
            self._reading = self._writing if path == ":memory:" else connect(path, durability, busy_timeout_s)
        except BaseException:
            self._writing.close()
            raise

    def close(self) -> None:
        """Nothing more."""
        self._reading.close()
        self._writing.close()

    # ------------------------------------------------------------------------------------------------- writing

    def add(
        self, kind: str, session: str | None, role: TurnRole | None, text: str, meta: dict[str, Any]
    ) -> tuple[int, int]:
        """Write it down and make room for it, all or nothing; its number, and how many there are."""
        text = _storable(text)
        if kind == TURN:
            # what was said goes on being a turn of its conversation, if a shorter one
            encoded = text.encode()
            if len(encoded) > self._limits.item_bytes:
                text = encoded[: self._limits.item_bytes].decode(errors="ignore")
                meta = meta | {"shortened": True}
        about = json.dumps(meta, default=str)
        size = len(text.encode()) + len(about.encode())
        if kind != TURN and size > self._limits.item_bytes:
            raise MemoryRefusedError(
                413, f"the text, with what is said about it, is longer than {self._limits.item_bytes} bytes"
            )
        session = None if session is None else _storable(session)
        with _Transaction(self._writing):
            number = self._writing.execute(
                _ITEM, (_storable(kind), session, role, text, about, time.time(), size)
            ).lastrowid
            assert number is not None
            self._prune(keep=number)
            return number, self._totals(self._writing)[0]

    def prune(self) -> int:
        """Keep within the limits, which may have become smaller; how many there are."""
        while self._excess(self._totals(self._writing)):
            with _Transaction(self._writing):
                before = self._totals(self._writing)
                self._prune(keep=None, rounds=16)
                if self._totals(self._writing) == before:
                    break
        return self._totals(self._writing)[0]

    def _prune(self, keep: int | None, rounds: int | None = None) -> None:
        """The oldest notes go first, then the oldest turns; `keep` stays."""
        while (rounds is None or rounds > 0) and (
            excess := self._excess(totals := self._totals(self._writing))
        ):
            rounds = None if rounds is None else rounds - 1
            mean = max(1, totals[1] // max(1, totals[0]))
            count = max(1, min(_PRUNE_AT_ONCE, max(excess[0], excess[1] // (2 * mean))))
            for what in ("kind <> 'turn'", "kind = 'turn'"):
                gone = self._writing.execute(
                    f"DELETE FROM items WHERE id IN (SELECT id FROM items WHERE {what} AND id <> ? "  # noqa: S608
                    "ORDER BY id LIMIT ?)",
                    (keep or 0, count),
                ).rowcount
                if gone:
                    break
            else:
                return

    def _excess(self, totals: tuple[int, int]) -> tuple[int, int] | None:
        items, size = totals[0] - self._limits.items, totals[1] - self._limits.bytes
        return (max(0, items), max(0, size)) if items > 0 or size > 0 else None

    # ------------------------------------------------------------------------------------------------- reading

    def search(self, text: str, limit: int, session: str | None, turns_before: int | None) -> list[Memory]:
        """What fits, best first; the newest if `text` is empty. With a `session` nothing of other conversations."""
        query = words.query(text)
        if query is None and text.strip():
            return []
        values = {"query": query, "session": session, "limit": limit, "turns_before": turns_before or _END}
        rows = self._reading.execute(_NEWEST if query is None else _SEARCH, values).fetchall()
        return [
            Memory(number, kind, of, found, created, score, _about(about))
            for number, kind, of, found, created, score, about in rows
        ]

    def turns(self, session: str, limit: int) -> list[Turn]:
        """The last ones, oldest first."""
        rows = self._reading.execute(
            "SELECT id, session, role, text, created, meta FROM items "
            "WHERE kind = 'turn' AND session = ? ORDER BY id DESC LIMIT ?",
            (session, limit),
        ).fetchall()
        return [
            Turn(number, of, role, text, created, _about(about))
            for number, of, role, text, created, about in reversed(rows)
        ]

    def sessions(self, limit: int) -> list[Session]:
        """Those with the newest turns first."""
        return [Session(*row) for row in self._reading.execute(_SESSIONS, (limit,)).fetchall()]

    def totals(self) -> tuple[int, int]:
        """How many items there are, and their bytes."""
        return self._totals(self._reading)

    @staticmethod
    def _totals(connection: sqlite3.Connection) -> tuple[int, int]:
        items, size = connection.execute("SELECT items, bytes FROM totals").fetchone()
        return int(items), int(size)


class _Transaction:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._connection.execute("COMMIT")
        finally:
            # some errors have ended it already, others leave it open
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")


def _storable(text: str) -> str:
    """Halves of surrogate pairs can't be written."""
    return text.encode("utf-8", "replace").decode()


def _about(encoded: str) -> dict[str, Any]:
    found = json.loads(encoded)
    return found if isinstance(found, dict) else {}

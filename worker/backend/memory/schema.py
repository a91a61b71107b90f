"""The store's tables, and how a connection to them is made while other processes do the same."""

from __future__ import annotations

import sqlite3
import time
from typing import Literal

from segue.worker.backend.memory.records import MemoryFailedError

VERSION = 1
Durability = Literal["process", "power"]

_CACHE_KIB = 4096
_WAL_LIMIT_BYTES = 16 * 1024 * 1024
_OPEN_TIMEOUT_S = 10.0
_PAUSE_S = 0.02

_TABLES = """
CREATE TABLE items (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    session TEXT,
    role TEXT,
    text TEXT NOT NULL,
    meta TEXT NOT NULL,
    created REAL NOT NULL,
    bytes INTEGER NOT NULL
);
CREATE INDEX items_turns ON items (session, id) WHERE kind = 'turn';
CREATE INDEX items_notes ON items (id) WHERE kind <> 'turn';
CREATE TABLE totals (items INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO totals VALUES (0, 0);
CREATE VIRTUAL TABLE words USING fts5 (
    text, content = 'items', content_rowid = 'id', tokenize = 'unicode61 remove_diacritics 2'
);
CREATE TRIGGER item_added AFTER INSERT ON items BEGIN
    INSERT INTO words (rowid, text) VALUES (new.id, new.text);
    UPDATE totals SET items = items + 1, bytes = bytes + new.bytes;
END;
CREATE TRIGGER item_removed AFTER DELETE ON items BEGIN
    INSERT INTO words (words, rowid, text) VALUES ('delete', old.id, old.text);
    UPDATE totals SET items = items - 1, bytes = bytes - old.bytes;
END;
"""


def connect(path: str, durability: Durability, busy_timeout_s: float) -> sqlite3.Connection:
    """A connection in autocommit mode, for one thread at a time. Makes the tables if there are none.

    In WAL mode what is committed is in the operating system's hands: it survives the end of the process, ``kill -9``
    included. With `durability` "power" each commit is on the disk before it counts, and survives a power cut as well;
    without, a power cut costs the last commits, and never the store.

    Raises `sqlite3.Error`, and `MemoryFailedError` for a store of a newer version.
    """
    connection = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
    try:
        _check(connection, path)  # before anything is changed in it
        _patiently(connection, "PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {'FULL' if durability == 'power' else 'NORMAL'}")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: str) -> None:
    if _check(connection, path) == VERSION:
        return
    _patiently(connection, "BEGIN IMMEDIATE")
    try:
        if _check(connection, path) == 0:  # another process may have been faster
            for statement in _statements(_TABLES):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _check(connection: sqlite3.Connection, path: str) -> int:
    """The version of the tables, 0 if there are none. Raises `MemoryFailedError` for what isn't ours."""
    # in one statement, since another process may be making them
    found, tables = connection.execute(
        "SELECT (SELECT user_version FROM pragma_user_version), (SELECT count(*) FROM sqlite_schema)"
    ).fetchone()
    if found > VERSION:
        raise MemoryFailedError(
            f"{path} was written by a newer segue (version {found} of the store, this one knows {VERSION}): "
            "run that one, or set another path"
        )
    if found == 0 and tables:
        raise MemoryFailedError(f"{path} is a database of something else: set another path")
    return int(found)


def _statements(script: str) -> list[str]:
    """One by one: `executescript` would end the transaction."""
    found, statement = [], ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            found.append(statement)
            statement = ""
    return [each for each in found if each.strip()]


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Changing the journal's mode doesn't wait for others, whatever the busy timeout is."""
    until = time.monotonic() + _OPEN_TIMEOUT_S
    while True:
        try:
            connection.execute(statement)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(_PAUSE_S)
        else:
            return

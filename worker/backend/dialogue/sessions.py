"""One answer at a time in each conversation, in the order in which they were asked for."""

from __future__ import annotations

import asyncio

from segue.worker.backend.dialogue.reply import DialogueError

MAX_WAITING = 16
"""So many messages may wait in one conversation."""


class Hold:
    """The right to speak in a conversation; `release` it."""

    def __init__(self, sessions: Sessions, session: str, lock: asyncio.Lock) -> None:
        self._sessions: Sessions | None = sessions
        self._session = session
        self._lock = lock

    def release(self) -> None:
        """The next one; releasing twice does nothing."""
        sessions, self._sessions = self._sessions, None
        if sessions is not None:
            self._lock.release()
            sessions._left(self._session)


class Sessions:
    """Knows only the conversations in which somebody speaks."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._interested: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._locks)

    async def take(self, session: str) -> Hold:
        """Wait for one's turn. Raises `DialogueError` (429) if too many wait already."""
        if self._interested.get(session, 0) > MAX_WAITING:
            raise DialogueError(f"{MAX_WAITING} messages wait in this conversation already", 429)
        lock = self._locks.setdefault(session, asyncio.Lock())
        self._interested[session] = self._interested.get(session, 0) + 1
        try:
            await lock.acquire()
        except BaseException:
            self._left(session)
            raise
        return Hold(self, session, lock)

    def _left(self, session: str) -> None:
        self._interested[session] -= 1
        if not self._interested[session]:
            del self._interested[session], self._locks[session]

"""What the memory holds, as its users see it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from segue.worker.backend.errors import ToldError

TurnRole = Literal["user", "assistant"]
TURN = "turn"
"""The kind of what was said in a conversation; all else is a note of some kind."""


class Memory(msgspec.Struct, frozen=True):
    """One thing found."""

    id: int
    kind: str
    session: str | None
    text: str
    created: float
    """Seconds since the epoch."""
    score: float
    """The higher, the better it fits; comparable within one search only."""
    meta: dict[str, Any] = {}


class Turn(msgspec.Struct, frozen=True):
    """Something said in a conversation."""

    id: int
    session: str
    role: TurnRole
    content: str
    created: float
    """Seconds since the epoch."""
    meta: dict[str, Any] = {}


class Session(msgspec.Struct, frozen=True):
    """One conversation."""

    session: str
    turns: int
    began: float
    """Seconds since the epoch."""
    last: float
    """The same, of the last turn."""


class MemoryFailedError(ToldError):
    """The store can't be read or written just now; the message says why, and names the file."""

    def __init__(self, detail: str) -> None:
        super().__init__(503, detail)


class MemoryRefusedError(ToldError):
    """What is to be remembered can't be: it's the caller's to change."""

"""What a caller gets of an answer, piece by piece."""

from __future__ import annotations

import msgspec

from segue.worker.backend.emotion import Emotion
from segue.worker.backend.errors import ToldError


class DialogueError(ToldError):
    """There is no answer, or it ends here; `status` is what an HTTP client is told."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(status, message)


class ToolUse(msgspec.Struct, frozen=True):
    """A tool was called."""

    name: str
    arguments: str
    """JSON, as the model wrote it."""
    ok: bool
    text: str
    error: str | None
    seconds: float


class Final(msgspec.Struct, frozen=True):
    """Who has answered."""

    provider: str
    model: str
    personality: str
    emotion: Emotion
    problems: tuple[str, ...] = ()
    """What went wrong beside: the memory couldn't be read, or the turn not be kept."""


class Reply(msgspec.Struct, frozen=True):
    """A piece of an answer: text, or a tool that was called, or, last, who has answered."""

    text: str = ""
    tool: ToolUse | None = None
    final: Final | None = None

"""What comes of calling a tool."""

from __future__ import annotations

import msgspec


class ToolResult(msgspec.Struct, frozen=True):
    """The outcome of one call."""

    ok: bool
    text: str
    """What a model is told: the result, or the reason of the failure in one sentence."""
    error: str | None = None
    """The reason of the failure; None: there was none."""
    seconds: float = 0.0
    """How long the call took."""


def failed(reason: str, seconds: float = 0.0) -> ToolResult:
    """A failure, and why."""
    return ToolResult(False, f"The tool has failed: {reason}", reason, seconds)

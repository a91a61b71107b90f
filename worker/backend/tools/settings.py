"""What can be set about tools, and what one reload may be told."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=10_000)]


class ToolSettings(msgspec.Struct, frozen=True):
    """``[services.tools]``."""

    directory: str = ""
    """Where the tool files are; empty: the bundled ones. Relative to the working directory."""
    deadline_s: _Seconds = 30.0
    """How long one call may take, waiting for a thread included."""
    load_deadline_s: _Seconds = 10.0
    """How long the import of one file may take."""
    max_threads: _Count = 32
    """How many calls of tools that aren't async run at once; further ones wait."""
    max_hanging: _Count = 4
    """A tool that has so many calls which went on after their deadline is refused until one of them ends."""
    max_result_chars: Annotated[int, msgspec.Meta(ge=100)] = 100_000
    """A longer result is cut, and says so."""


class ToolOptions(msgspec.Struct, frozen=True):
    """What one reload may be told."""

    tool: str | None = None
    """Reload this one alone: the key of a file, or the name of a tool in it."""

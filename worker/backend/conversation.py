"""What goes between the parts of a dialogue: messages, tool calls, chunks of an answer. Data only."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(msgspec.Struct, frozen=True):
    """A model asks for a tool. `arguments` is the JSON text as the model wrote it, which may be wrong."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """For the role ``tool``: whose result this is."""


class Sampling(msgspec.Struct, frozen=True):
    """How a model is to choose its words; None: as the provider does."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] = ()
    further: dict[str, Any] = {}
    """What else a provider is told, as the caller has written it; the offline responder ignores it."""


class Chunk(msgspec.Struct, frozen=True):
    """A piece of an answer."""

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Whole calls; given once they are complete."""
    finish: str | None = None
    """In the last chunk: ``stop``, ``length`` or ``tool_calls``."""
    provider: str = ""
    model: str = ""
    usage: dict[str, int] | None = None
    """In the last chunk, where the provider says: prompt_tokens, completion_tokens."""


class Tool(msgspec.Struct, frozen=True):
    """What a model is told of a tool."""

    name: str
    description: str
    parameters: dict[str, Any]
    """A JSON schema of type object."""

"""What a tool may use of the service that calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from segue.worker.backend.conversation import Message


class Completed(Protocol):
    """A model's whole answer."""

    @property
    def text(self) -> str:
        """What it says."""


class Model(Protocol):
    """What answers prompts: `segue.worker.backend.llm.MultiLLMService`."""

    async def complete(self, messages: Sequence[Message]) -> Completed:
        """The whole answer at once."""


class ToolContext:
    """Given to a tool that has a parameter of this type, for one call."""

    def __init__(self, tool: str, llm: Any) -> None:
        self.tool = tool
        """The name under which it is called."""
        self._llm: Model = llm

    async def ask(self, prompt: str, system: str = "") -> str:
        """What the model that serves at the begin of the call answers; it is given no tools.

        Raises `segue.worker.backend.llm.LLMError`.
        """
        messages = [Message("system", system)] if system else []
        return (await self._llm.complete([*messages, Message("user", prompt)])).text

"""What this service does for other agents: its tools, and a conversation.

Which of that is said in ``[services.hsp] offers``. What is offered is looked up when it is asked for, so it follows every
swap; and it is leased, so that a task ends on the instances on which it began.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from segue.worker.backend.hsp.continuity import TaskHandler
from segue.worker.backend.hsp.payloads import Capability
from segue.worker.backend.http.parts import Parts

CHAT = "chat"
_MAX_MESSAGE = 100_000
_MAX_DESCRIPTION = 1000


class TaskFailedError(Exception):
    """A task can't be done; the message goes to whoever asked for it."""


class Agent:
    """Of one worker."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def capabilities(self) -> list[Capability]:
        """What is offered at this moment."""
        found = [Capability(CHAT, "A conversation: takes message and session, answers with text")]
        found += [
            Capability(tool.name, tool.description[:_MAX_DESCRIPTION])
            for tool in self._parts.tools.current.tools()
        ]
        return [each for each in found if self._offers(each.name)]

    def handler(self, capability: str) -> TaskHandler | None:
        """What does it; None if it isn't offered."""
        if not self._offers(capability):
            return None
        if capability == CHAT:
            return self._chat
        if any(tool.name == capability for tool in self._parts.tools.current.tools()):
            return functools.partial(self._call, capability)
        return None

    def _offers(self, capability: str) -> bool:
        return any(fnmatchcase(capability, each) for each in self._parts.hsp.current.settings.offers)

    async def _call(self, tool: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        with self._parts.mcp.lease(), self._parts.tools.lease() as tools:
            result = await tools.call(tool, parameters)
        if not result.ok:
            raise TaskFailedError(result.error or result.text)
        return {"text": result.text}

    async def _chat(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        message, session = parameters.get("message"), parameters.get("session", "agents")
        if not isinstance(message, str) or not 0 < len(message.strip()) <= _MAX_MESSAGE:
            raise TaskFailedError(f"message is a text of up to {_MAX_MESSAGE} characters")
        if not isinstance(session, str) or not 0 < len(session) <= 64:
            raise TaskFailedError("session is a name of up to 64 characters")
        dialogue, lease = self._parts.lease_dialogue()
        with lease:
            async with contextlib.aclosing(dialogue.reply(session, message, served_by={})) as replies:
                text = "".join([reply.text async for reply in replies])
        return {"text": text, "session": session}

"""The services that requests use, leased together: what begins on one set of instances ends on it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from segue import Service
from segue.worker.backend.dialogue import DialogueManager
from segue.worker.backend.emotion import EmotionSystem
from segue.worker.backend.hsp.connector import HSPConnector
from segue.worker.backend.learning import LearningManager
from segue.worker.backend.lis import LIS
from segue.worker.backend.llm import MultiLLMService
from segue.worker.backend.mcp_connector import MCPConnector
from segue.worker.backend.memory import HAMMemoryManager
from segue.worker.backend.personality import PersonalityManager
from segue.worker.backend.tools import ToolDispatcher


@dataclass(frozen=True)
class Parts:
    """All services of the backend."""

    memory: Service[HAMMemoryManager]
    lis: Service[LIS]
    learning: Service[LearningManager]
    hsp: Service[HSPConnector]
    llm: Service[MultiLLMService]
    mcp: Service[MCPConnector]
    tools: Service[ToolDispatcher]
    personality: Service[PersonalityManager]
    emotion: Service[EmotionSystem]
    dialogue: Service[DialogueManager]

    def lease_dialogue(self) -> tuple[DialogueManager, contextlib.ExitStack]:
        """The dialogue and all that it uses, in one synchronous step; closing the stack returns them."""
        stack = contextlib.ExitStack()
        for service in (
            self.memory,
            self.lis,
            self.llm,
            self.mcp,
            self.tools,
            self.personality,
            self.emotion,
        ):
            stack.enter_context(service.lease())
        return stack.enter_context(self.dialogue.lease()), stack

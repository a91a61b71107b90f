"""Conversations: what is said goes to the model with what is remembered and felt, and its answer comes back in pieces."""

from segue.worker.backend.dialogue.manager import DialogueManager, DialogueSettings
from segue.worker.backend.dialogue.reply import DialogueError, Final, Reply, ToolUse

__all__ = ["DialogueError", "DialogueManager", "DialogueSettings", "Final", "Reply", "ToolUse"]

"""The language model: several providers behind one interface, and a small responder for when there is none."""

from segue.worker.backend.llm.errors import LLMError
from segue.worker.backend.llm.service import Completion, MultiLLMService
from segue.worker.backend.llm.settings import LLMSettings, Provider

__all__ = ["Completion", "LLMError", "LLMSettings", "MultiLLMService", "Provider"]

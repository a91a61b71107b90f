"""HAM, the memory: what was said and noted, in one SQLite file that all workers of all generations share."""

from segue.worker.backend.memory.manager import HAMMemoryManager, MemorySettings
from segue.worker.backend.memory.records import (
    Memory,
    MemoryFailedError,
    MemoryRefusedError,
    Session,
    Turn,
    TurnRole,
)

__all__ = [
    "HAMMemoryManager",
    "Memory",
    "MemoryFailedError",
    "MemoryRefusedError",
    "MemorySettings",
    "Session",
    "Turn",
    "TurnRole",
]

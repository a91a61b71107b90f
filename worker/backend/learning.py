"""`LearningManager`: what this service has learnt by doing: which other agents there are, and how well tools have worked.

It is told: by `HSPConnector` of what agents say of themselves, by `ToolDispatcher` of calls. So it goes on when one of them
is swapped, and its own swap keeps what it knows.
"""

from __future__ import annotations

from typing import Any

import segue
from segue.worker.backend.hsp.peers import Peers
from segue.worker.backend.tools.statistics import Statistics


class LearningManager:
    """Of one worker."""

    def __init__(self, previous: LearningManager | None = None) -> None:
        self.peers: Peers = previous.peers if previous is not None else Peers()
        """The other agents that are known."""
        self.tools: Statistics = previous.tools if previous is not None else Statistics()
        """All calls of tools."""

    def metrics(self) -> dict[str, Any]:
        """For the status: each worker hears the same of other agents; rates are weighted over the workers."""
        return {"known_ai_count": segue.Shared(len(self.peers)), "tools": self.tools.metrics()}

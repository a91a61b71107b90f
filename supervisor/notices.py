"""What a worker's datagram may say. A worker runs the application, so what it says is checked before it is believed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from segue.handoff.messages import NotifyKey, WorkerMode, WorkerPhase

MAX_HANDOVER_S = 7 * 86400.0


def malformed(fields: Mapping[str, str]) -> str:
    """What is wrong with it; empty if nothing is. Keys that nobody knows are of a later version."""
    if not fields:
        return "it has no KEY=value"
    if (state := fields.get(NotifyKey.STATE)) is not None and state not in set(WorkerMode):
        return f"{NotifyKey.STATE} is {state[:40]!r}"
    if (phase := fields.get(NotifyKey.PHASE)) is not None and phase not in set(WorkerPhase):
        return f"{NotifyKey.PHASE} is {phase[:40]!r}"
    if (handover := fields.get(NotifyKey.HANDOVER)) is not None:
        try:
            seconds = float(handover)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= MAX_HANDOVER_S:
            return f"{NotifyKey.HANDOVER} is {handover[:40]!r}"
    return ""

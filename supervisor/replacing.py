"""Replace: the old workers end before the new ones are started, for what can't run twice. Nothing serves in between.

That is the one exception to the rule that a new generation never leaves nobody accepting. It is bounded: the old workers
have `Limits.replace_timeout` seconds to finish, and if the new ones do not start, the old code is started again.
Meanwhile connections wait in the kernel's queue, and those that were open in the relay, or in the old worker until it ends.
"""

from __future__ import annotations

from segue.supervisor import model as m
from segue.supervisor import probation, retirement, staffing
from segue.supervisor.model import GenerationState, Outcome, PromotePhase
from segue.supervisor.turn import Turn


def begin(turn: Turn, promote: m.Promote, generation: m.Generation, budget_s: float) -> None:
    """Let the current generation finish and end."""
    old = turn.state.generations[promote.previous or 0]
    promote.phase = PromotePhase.CLEAR
    generation.deadline = None
    if not promote.because:
        probation.end(turn, Outcome.SUPERSEDED)
    staffing.end_scaling(turn, ok=False, reason="a reload came between")
    turn.effects.append(m.Progress(promote.operations, PromotePhase.CLEAR, generation.id))
    turn.say("warning", "replacing", generation, None, previous=old.id, budget_s=budget_s)
    old.drain_budget = budget_s
    retirement.drain(turn, old)


def is_clear(turn: Turn, promote: m.Promote) -> bool:
    """Whether nothing of the old generation is left."""
    old = turn.state.generations[promote.previous or 0]
    return old.state is GenerationState.DRAINING and not old.workers

"""The canary: some workers of the new generation serve beside the current one, and are watched, before all of it does.

Nothing is handed over meanwhile: a connection stays with the generation that accepted it. What is found wrong ends the
promote, and the current generation goes on alone.
"""

from __future__ import annotations

from segue.supervisor import model as m
from segue.supervisor import probation, staffing
from segue.supervisor.model import GenerationState, PromotePhase, WorkerState
from segue.supervisor.turn import Turn


def is_due(turn: Turn, promote: m.Promote, generation: m.Generation) -> bool:
    """Whether there is to be one, and has not been yet."""
    limits = generation.limits
    wanted = limits.canary > 0 and limits.canary_for > 0
    return wanted and not promote.waited and promote.is_watched and turn.state.serving


def begin(turn: Turn, promote: m.Promote, generation: m.Generation) -> None:
    """Let the first of them serve; but not while the current generation replaces one of its own."""
    current = turn.state.generations[promote.previous or 0]
    if any(worker.replaces is not None for worker in current.workers.values()):
        return
    promote.phase = PromotePhase.CANARY
    turn.move(generation, GenerationState.MIXED)
    generation.deadline = None
    turn.effects.append(m.Progress(promote.operations, PromotePhase.CANARY, generation.id))
    seconds = probation.watch_s(turn, generation)
    for worker in staffing.able(turn, generation)[: generation.limits.canary]:
        turn.activate(generation, worker, seconds)


def is_over(turn: Turn, promote: m.Promote, generation: m.Generation) -> bool:
    """Take it further; whether it is over, and went well."""
    if generation.having(frozenset({WorkerState.ACTIVATING})):
        return False
    if promote.watch is None:
        promote.watch = probation.record(generation, turn.state.generations[promote.previous or 0])
    return not waits(turn, promote, generation)


def waits(turn: Turn, promote: m.Promote, generation: m.Generation) -> bool:
    """Whether the promote waits while it serves; that begins when all of it does."""
    if not promote.waited:
        promote.waited, seconds = True, generation.limits.canary_for
        promote.until = turn.now + seconds
        serving = len(generation.having(frozenset({WorkerState.ACTIVE})))
        turn.say("info", "canary", generation, None, workers=serving, seconds=seconds)
    if promote.until is not None and promote.until <= turn.now:
        promote.until = None
    return promote.until is not None

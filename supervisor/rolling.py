"""One worker at a time, for hosts that can't hold twice the workers: never more than one beyond the number that is wanted.

A new worker is started and serves, then an old one leaves and ends, and only then the next is started. While that goes on
both generations serve, and the places of the old one are *ceded* to the new one; the old one has one worker until the new
one is complete. If it fails, the places are given back, and the old generation fills them with workers of its code.
"""

from __future__ import annotations

from segue.supervisor import canary, probation, staffing
from segue.supervisor import model as m
from segue.supervisor.model import GenerationState, PromotePhase, WorkerState
from segue.supervisor.turn import Turn


def begin(turn: Turn, promote: m.Promote, generation: m.Generation) -> None:
    """`step`, at the end of this turn, starts the first one."""
    promote.phase = PromotePhase.ROLLING
    staffing.end_scaling(turn, ok=False, reason="a reload came between")
    generation.deadline = turn.now + generation.limits.ready_timeout
    turn.effects.append(m.Progress(promote.operations, PromotePhase.ROLLING, generation.id))


def is_complete(turn: Turn, promote: m.Promote, generation: m.Generation) -> bool:
    """Take it one step further, if what was begun is done; whether all its workers serve."""
    old = turn.state.generations[promote.previous or 0]
    if generation.having(frozenset({WorkerState.ACTIVATING})):
        return False
    able = staffing.able(turn, generation)
    if able:
        if generation.state is not GenerationState.MIXED:
            turn.move(generation, GenerationState.MIXED)
        generation.deadline = None
        turn.activate(generation, able[0], probation.watch_s(turn, generation))
        return False
    if generation.having(frozenset({WorkerState.BOOTING})):
        return False
    serving = len(generation.having(frozenset({WorkerState.ACTIVE})))
    if serving >= generation.wanted:
        return True
    if serving and promote.watch is None and promote.is_watched:
        promote.watch = probation.record(generation, old)
    pauses = promote.until is not None or canary.is_due(turn, promote, generation)
    if serving == generation.limits.canary and pauses and canary.waits(turn, promote, generation):
        return False
    old.ceded = max(0, min(serving, old.target - old.missing - 1))
    staffing.fill(turn, old)
    most = max(old.wanted + old.ceded, generation.wanted)
    if len(old.workers) + len(generation.workers) <= most:
        generation.deadline = turn.now + generation.limits.ready_timeout
        turn.spawn(generation, gated=generation.next_worker > 1)
    return False

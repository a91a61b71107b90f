"""The operator's drain: its mode is told to every worker that has connections or will, and answered when all have it."""

from __future__ import annotations

from segue.supervisor import model as m
from segue.supervisor.model import WorkerState
from segue.supervisor.turn import STOPPING_CAUSE, Turn


def asked(turn: Turn, event: m.DrainAsked) -> None:
    """Begin it, change its mode, or end it."""
    if turn.state.stopping is not None:
        turn.settle(event.operation, ok=False, reason=STOPPING_CAUSE)
        return
    end(turn, ok=False, reason="another drain request came after it")
    turn.state.drain_mode = event.mode
    turn.state.drain_change = m.DrainChange(event.operation, set())
    turn.say("info", "drain", None, None, mode=event.mode or "off")
    tell(turn)


def tell(turn: Turn) -> None:
    """The mode, to every worker that has connections, or will."""
    for generation in turn.state.generations.values():
        for worker in generation.having(m.SERVING | m.LEAVING | {WorkerState.ACTIVATING}):
            turn.tell_drain(generation, worker)


def check(turn: Turn) -> None:
    """It is done when all have confirmed, or ended."""
    change = turn.state.drain_change
    if change is None:
        return
    change.pending = {
        (generation, worker)
        for generation, worker in change.pending
        if generation in turn.state.generations and worker in turn.state.generations[generation].workers
    }
    if not change.pending:
        end(turn, ok=True)


def end(turn: Turn, ok: bool, reason: str = "") -> None:
    """Answer whoever asked for it."""
    change, turn.state.drain_change = turn.state.drain_change, None
    if change is not None:
        turn.settle(change.operation, ok=ok, reason=reason, generation=turn.state.current)

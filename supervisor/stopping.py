"""The stop of the whole instance: everybody who waits is told, every worker finishes, and the exit status says how it went."""

from __future__ import annotations

import msgspec

from segue.supervisor import model as m
from segue.supervisor import operator_drain, probation, promotion, staffing, swaps
from segue.supervisor.model import Outcome, WorkerState
from segue.supervisor.turn import SLACK_S, STARTING_IDLE, STOPPING_CAUSE, Turn

_STOP_REASONS = {1: "it was not a clean stop", 3: "the first generation did not start"}


def asked(turn: Turn, event: m.StopAsked) -> None:
    """Stop after a delay, gracefully, or at once; asked twice by signal means at once."""
    operations = (event.operation,) if event.operation is not None else ()
    stopping = turn.state.stopping
    if stopping is None:
        status = 0 if turn.state.serving else 1  # never 0 from an outage, or from a start that was given up
        stopping = m.Stopping((), begun=False, deadline=turn.now + event.delay, status=status)
        turn.state.stopping = stopping
        turn.say("info", "stopping", None, None, delay_s=event.delay, budget_s=event.budget)
        for generation in turn.state.generations.values():
            generation.limits = msgspec.structs.replace(generation.limits, stop_timeout=event.budget)
        _refuse_waiting(turn, STOPPING_CAUSE)
        if event.delay > 0 and not event.at_once:
            operator_drain.tell(turn)  # balancers may ask a worker (`health_path`)
    elif event.operation is None:
        event = m.StopAsked(None, at_once=True)  # the second signal
    stopping.operations += operations
    if event.at_once:
        stopping.begun, stopping.deadline = True, None
        for generation in turn.state.generations.values():
            generation.respawn_at.clear()
            for worker in generation.workers.values():
                if worker.cause == STOPPING_CAUSE:
                    stopping.status = stopping.status or 1  # it was to finish, and had not
                turn.kill(generation, worker, "stop at once")
    elif not stopping.begun and event.delay <= 0:
        begin(turn, stopping.status)


def _refuse_waiting(turn: Turn, reason: str) -> None:
    """A stop has come: everybody who waits for something else gets the answer now."""
    queued, turn.state.queued = turn.state.queued, ()
    for event in queued:
        turn.settle(event.operation, ok=False, reason=reason)
    staffing.end_scaling(turn, ok=False, reason=reason)
    staffing.refuse_queued(turn, reason)
    swaps.refuse_all(turn, reason)
    turn.state.recover_at = None
    operator_drain.end(turn, ok=False, reason=reason)
    probation.end(turn, Outcome.STOPPED)
    for under_way in (turn.state.change, turn.state.promote):
        if under_way is not None:
            promotion.fail(turn, turn.state.generations[under_way.generation], reason)


def begin(turn: Turn, status: int) -> None:
    """Tell every worker to finish and end."""
    _refuse_waiting(turn, _STOP_REASONS.get(status, STOPPING_CAUSE))
    if turn.state.current is not None and not turn.state.serving:
        status = status or 1
    operations = turn.state.stopping.operations if turn.state.stopping else ()
    turn.state.stopping = m.Stopping(operations, begun=True, deadline=None, status=status)
    for generation in list(turn.state.generations.values()):
        generation.respawn_at.clear()
        generation.deadline = None
        for worker in list(generation.workers.values()):
            if worker.state in STARTING_IDLE:
                turn.terminate(generation, worker, "it was still starting")
            elif worker.state is WorkerState.STOPPING:
                latest = turn.now + generation.limits.stop_timeout + 2 * SLACK_S
                worker.deadline = min(latest, worker.deadline or latest)
            elif worker.state is not WorkerState.KILLED:
                worker.cause = STOPPING_CAUSE
                turn.stop_worker(generation, worker, generation.limits.stop_timeout)


def check(turn: Turn) -> None:
    """The end, once nothing is left; without a first generation there is nothing to wait for."""
    if turn.first_failed and not turn.state.developing and turn.state.stopping is None:
        begin(turn, status=3)
    stopping = turn.state.stopping
    if stopping is None or not stopping.begun:
        return
    if any(generation.workers for generation in turn.state.generations.values()):
        return
    for operation in stopping.operations:
        turn.settle(operation, ok=stopping.status == 0, reason=_STOP_REASONS.get(stopping.status, ""))
    stopping.operations = ()
    turn.effects.append(m.Exit(stopping.status))

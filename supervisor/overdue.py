"""Time: what is due next, what is done about what is late, and what a pause of the master means for both."""

from __future__ import annotations

from segue.supervisor import handover, probation, promotion, reports, retirement, staffing, stopping
from segue.supervisor import model as m
from segue.supervisor.model import ChangePhase, State, WorkerState
from segue.supervisor.succession import PREPARE_TIMEOUT_S
from segue.supervisor.turn import STOPPING_CAUSE, Turn

PAUSE_GRACE_S = 5.0
"""What is left of a deadline at least after the master stood still, for whatever stood still with it."""
SECOND_LOOK_S = 1.0
"""Silence is believed only after so long more. While the master stood still, for less than it would notice, the queue of what
workers tell it may have been full; who found it so tries again within that time."""
_WATCHED = frozenset(
    {WorkerState.READY, WorkerState.ACTIVE, WorkerState.DRAINING, WorkerState.QUIET, WorkerState.PARKED}
)
"""Where silence longer than the heartbeat timeout means a hung event loop. Elsewhere a deadline is running."""


def next_deadline(state: State) -> float | None:
    """When `TimePassed` is due next; None while nothing has a deadline."""
    times = [state.stopping.deadline if state.stopping else None, probation.next_deadline(state)]
    times.append(state.promote.until if state.promote is not None else None)
    times.append(state.swap.deadline if state.swap is not None else state.recover_at)
    for generation in state.generations.values():
        times += [generation.deadline, retirement.next_deadline(state, generation)]
        times.extend(generation.respawn_at)
        for worker in generation.workers.values():
            times += [worker.deadline, handover.next_deadline(worker)]
            if worker.state in _WATCHED:
                times.append(worker.doubted or worker.heard + generation.limits.heartbeat_timeout)
    return min((time for time in times if time is not None), default=None)


def paused(turn: Turn, event: m.Paused) -> None:
    """Nobody is to blame for silence while the master itself stood still: every deadline starts anew."""
    shift = event.seconds
    turn.say("warning", "paused", None, None, seconds=round(shift, 1))
    if turn.state.recover_at is not None:
        turn.state.recover_at += shift
    if turn.state.stopping is not None and turn.state.stopping.deadline is not None:
        turn.state.stopping.deadline += shift
    if turn.state.swap is not None and turn.state.swap.deadline is not None:
        turn.state.swap.deadline += shift
    if turn.state.probation is not None:
        turn.state.probation.until += shift
    if turn.state.promote is not None and turn.state.promote.until is not None:
        turn.state.promote.until += shift
    for generation in turn.state.generations.values():
        if generation.deadline is not None:
            generation.deadline = max(generation.deadline + shift, turn.now + PAUSE_GRACE_S)
        if generation.warm_until is not None:
            generation.warm_until += shift
        if generation.kept_until is not None:
            generation.kept_until += shift
        generation.respawn_at = [time + shift for time in generation.respawn_at]
        for worker in generation.workers.values():
            worker.heard, worker.doubted = turn.now, None
            if worker.deadline is not None:
                worker.deadline = max(worker.deadline + shift, turn.now + PAUSE_GRACE_S)
            _shift_services(worker, shift)


def _shift_services(worker: m.Worker, shift: float) -> None:
    if worker.services_retry is not None:
        worker.services_retry += shift
    if worker.blocks_until is not None:
        worker.blocks_until += shift
    if worker.swap_due is not None:
        worker.swap_due += shift


def time_passed(turn: Turn, _event: m.TimePassed) -> None:
    """Everything whose time has come."""
    stop = turn.state.stopping
    if stop is not None and stop.deadline is not None and stop.deadline <= turn.now:
        stopping.begin(turn, stop.status)
    for generation in list(turn.state.generations.values()):
        if generation.deadline is not None and generation.deadline <= turn.now:
            _generation_late(turn, generation)
        due = sum(1 for time in generation.respawn_at if time <= turn.now)
        generation.respawn_at = [time for time in generation.respawn_at if time > turn.now]
        for _unused in range(due):
            turn.spawn(generation, gated=True)
        for worker in list(generation.workers.values()):
            if worker.deadline is not None and worker.deadline <= turn.now:
                _worker_late(turn, generation, worker)
            if worker.state in _WATCHED:
                _check_heartbeat(turn, generation, worker)


def _generation_late(turn: Turn, generation: m.Generation) -> None:
    timeout = generation.limits.ready_timeout
    change = turn.state.change
    if change is not None and change.generation == generation.id and change.phase is ChangePhase.PREPARE:
        promotion.fail(turn, generation, f"its settings could not be read within {PREPARE_TIMEOUT_S:g} s")
        return
    if not generation.workers:
        promotion.fail(turn, generation, f"its code was not checked within {timeout:g} s (ready-timeout)")
        return
    late = [worker for worker in generation.workers.values() if worker.state is WorkerState.BOOTING]
    places = ", ".join(f"worker {worker.id} is in {worker.phase}" for worker in late)
    promotion.fail(turn, generation, f"not ready within {timeout:g} s (ready-timeout): {places}")


def _worker_late(turn: Turn, generation: m.Generation, worker: m.Worker) -> None:
    if worker.state in {WorkerState.STOPPING, WorkerState.DRAINING}:
        if worker.cause == STOPPING_CAUSE and turn.state.stopping is not None:
            turn.state.stopping.status = turn.state.stopping.status or 1
        turn.kill(generation, worker, f"it did not end in time ({worker.state})")
    elif worker.state is WorkerState.KILLED:
        turn.kill(generation, worker, worker.cause)
    elif worker.state is WorkerState.BOOTING:
        reason = f"was not ready within {generation.limits.ready_timeout:g} s (it is in {worker.phase})"
        turn.kill(generation, worker, reason)
        staffing.start_failed(turn, generation, worker, f"worker {worker.id} {reason}")
    elif worker.state in m.SERVING:
        worker.deadline = None
        staffing.replace_next(turn, generation)
    elif worker.state is WorkerState.ACTIVATING:  # an answer is on its way, if only that there was none
        reports.activated(turn, generation, worker, m.Activated(generation.id, worker.id, "no answer"))
    elif worker.state is WorkerState.QUIETING:
        turn.say("warning", "worker-silent", generation, worker, reason="no answer")
        reports.gone_quiet(turn, generation, worker)


def _check_heartbeat(turn: Turn, generation: m.Generation, worker: m.Worker) -> None:
    if worker.heard + generation.limits.heartbeat_timeout > turn.now:
        return
    if worker.doubted is None:
        worker.doubted = turn.now + SECOND_LOOK_S
    if worker.doubted > turn.now:
        return
    reason = f"its event loop has been silent for {turn.now - worker.heard:.1f} s"
    if worker.state is WorkerState.ACTIVE and turn.serves(generation):
        worker.state = WorkerState.HUNG
        probation.found(turn, generation, f"worker {worker.id}: {reason}")
        staffing.replace(turn, generation, worker, reason)
    elif reports.comes(turn, generation) and worker.state in {WorkerState.READY, WorkerState.ACTIVE}:
        promotion.fail(turn, generation, f"worker {worker.id}: {reason}", by=worker)
    else:
        turn.kill(generation, worker, reason)

"""What becomes of a generation that has been taken over from: it drains, is kept for a while, and ends.

Drained workers stay *warm* until `Generation.warm_until`, and the generation can be promoted again until
`Generation.kept_until`, with workers that are started anew in the place of those that it has lost. Only the one that
served last is kept: however often a service is reloaded, there is the memory of one generation beside what serves.
Its state follows from what is left of it, which `check` looks at after every event; a generation that is being promoted
is let alone.
"""

from __future__ import annotations

from segue.supervisor import model as m
from segue.supervisor.model import GenerationState, WorkerState
from segue.supervisor.turn import Turn

_GONE = frozenset({GenerationState.RETIRED, GenerationState.FAILED})
_FINISHING = _GONE | {GenerationState.DRAINING}
_KEPT = frozenset({GenerationState.DRAINING, GenerationState.PARKED})


def drain(turn: Turn, generation: m.Generation) -> None:
    """Its workers stop accepting, hand their connections over, and finish."""
    turn.move(generation, GenerationState.DRAINING)
    generation.respawn_at.clear()
    generation.deadline = None
    leaving = []
    for worker in list(generation.workers.values()):
        worker.replaces = None
        if worker.state in {WorkerState.BOOTING, WorkerState.READY}:
            turn.terminate(generation, worker, "its generation was replaced before it was ready")
        elif worker.state in {WorkerState.ACTIVATING, WorkerState.ACTIVE, WorkerState.HUNG}:
            leaving.append(worker)
    turn.quiet(generation, leaving)


def drained(turn: Turn, generation: m.Generation, worker: m.Worker) -> None:
    """Nothing is left in one of its workers."""
    if _is_warm(turn, generation) and worker.swaps_seen >= turn.state.swap_count:
        last = generation.warm_until if generation.warm_until is not None else turn.now
        turn.park(generation, worker, max(0.0, last - turn.now) + generation.limits.ready_timeout)
    else:
        turn.stop_worker(generation, worker, generation.limits.stop_timeout)


def keep_no_longer(turn: Turn) -> None:
    """The time of whatever has been kept until now is over; `check`, at the end of this turn, sees to it."""
    for generation in turn.state.generations.values():
        if generation.warm_until is not None:
            generation.warm_until = turn.now
        if generation.kept_until is not None:
            generation.kept_until = turn.now


def retire(turn: Turn, generation: m.Generation, cause: str) -> None:
    """Nobody will have it any more: what serves nobody ends, the others finish first."""
    turn.move(generation, GenerationState.RETIRED)
    generation.warm_until = generation.kept_until = generation.deadline = None
    for worker in list(generation.workers.values()):
        turn.dismiss(generation, worker, cause)


def offered(state: m.State) -> list[m.Generation]:
    """Those that can be gone back to; the one that served last comes first."""
    able = [
        generation
        for generation in state.generations.values()
        if generation.state in _KEPT
        and generation.id != state.current
        and (generation.kept_until is not None or generation.having(m.RETURNING))
    ]
    return sorted(able, key=lambda generation: (-generation.served_until, -generation.id))


def next_deadline(state: m.State, generation: m.Generation) -> float | None:
    """When the time of one that is kept is over; None if nothing waits for that."""
    if generation.state not in _KEPT or _is_busy(state, generation) or _is_awaited(state, generation):
        return None
    times = [time for time in (generation.warm_until, generation.kept_until) if time is not None]
    return min(times, default=None)


def check(turn: Turn) -> None:
    """Where each of them is by now."""
    for generation in list(turn.state.generations.values()):
        if generation.state in _KEPT and not _is_busy(turn.state, generation):
            _check_kept(turn, generation)
        if generation.state in _GONE and not generation.workers:
            _release(turn, generation)
        turn.hand_over_if_quiet(generation)  # whom the others waited for may serve again: as a canary
    _check_drained(turn)


def _check_kept(turn: Turn, generation: m.Generation) -> None:
    if not _is_awaited(turn.state, generation):
        _check_time(turn, generation)
    if generation.state is not GenerationState.DRAINING:
        return
    if all(worker.state is WorkerState.PARKED for worker in generation.workers.values()):
        kept = generation.workers or generation.kept_until is not None
        turn.move(generation, GenerationState.PARKED if kept else GenerationState.RETIRED)
        if kept:
            turn.say("info", "parked", generation, None, workers=len(generation.workers))


def _check_time(turn: Turn, generation: m.Generation) -> None:
    if generation.warm_until is None or generation.warm_until <= turn.now:
        generation.warm_until = None  # or it was kept warm only for a promote, which has failed
        for worker in generation.having(frozenset({WorkerState.PARKED})):
            turn.dismiss(generation, worker, "its time is over")
    if generation.kept_until is not None and generation.kept_until <= turn.now:
        generation.kept_until = None
        if generation.state is GenerationState.PARKED:
            retire(turn, generation, "its time is over")


def _is_busy(state: m.State, generation: m.Generation) -> bool:
    """Whether it is being promoted, or is the one that serves or will again unless another's promote succeeds."""
    promote = state.promote
    return generation.id == state.current or (promote is not None and promote.generation == generation.id)


def _is_awaited(state: m.State, generation: m.Generation) -> bool:
    """Whether it is to be gone back to, as soon as that can be."""
    probation = state.probation
    return probation is not None and probation.previous == generation.id and bool(probation.breach)


def _is_warm(turn: Turn, generation: m.Generation) -> bool:
    promote = turn.state.promote
    if promote is not None and promote.generation == generation.id:
        return True
    return (
        generation.state in _KEPT and generation.warm_until is not None and generation.warm_until > turn.now
    )


def _release(turn: Turn, generation: m.Generation) -> None:
    failed = generation.state is GenerationState.FAILED
    if failed:
        turn.move(generation, GenerationState.RETIRED)
    del turn.state.generations[generation.id]
    turn.effects.append(m.Released(generation.id, failed))


def _check_drained(turn: Turn) -> None:
    """Parked is as good as ended to whoever waits until nothing is left to be done."""
    state = turn.state
    for promoted, old in list(state.drained_watch.items()):
        left = [state.generations[number] for number in old if number in state.generations]
        if not any(generation.state in _FINISHING for generation in left):
            del state.drained_watch[promoted]
            turn.effects.append(m.AllDrained(promoted))

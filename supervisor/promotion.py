"""The promote: the one primitive by which a generation becomes the current one, be it new, staged, or one that served before.

Its workers are told to serve while the current ones still do. When all have confirmed, it is the current generation,
and only then the old one stops accepting. If one fails, the promote fails: what has begun to serve hands back, and the
old generation has never noticed. One promote at a time; `check` takes it further after every event, by what its
generation's workers are by then.

A generation that lacks workers is filled up before any of them is told to serve, with workers of the same code or not
at all; so is one whose workers don't have what was decided about services since they were started.
"""

from __future__ import annotations

from segue.supervisor import model as m
from segue.supervisor import probation, retirement, staffing, swaps
from segue.supervisor.model import GenerationState, Outcome, PromoteKind, PromotePhase, Strategy, WorkerState
from segue.supervisor.turn import Turn

_NEW = frozenset(
    {GenerationState.BOOTING, GenerationState.STAGED, GenerationState.ACTIVATING, GenerationState.MIXED}
)
UNKNOWN = 404
"""HTTP status of what is asked for a generation that there is not."""


# ------------------------------------------------------------------------------------------------------ what is asked


def asked(turn: Turn, event: m.PromoteAsked) -> None:
    """Somebody wants the staged generation to serve, or one that served before."""
    if turn.refused(event.operation):
        return
    able = {
        generation.id: generation for generation in (*staged(turn.state), *retirement.offered(turn.state))
    }
    number = event.generation
    if number is None:
        number = next((generation.id for generation in staged(turn.state)), None)
    if number in able:
        begin(turn, able[number], PromoteKind.PROMOTE, (event.operation,))
    else:
        refuse(
            turn, event.operation, number, able, none="no generation is staged", wrong="not to be promoted"
        )


def rollback_asked(turn: Turn, event: m.RollbackAsked) -> None:
    """Somebody wants one back that served before."""
    if turn.refused(event.operation):
        return
    able = {generation.id: generation for generation in retirement.offered(turn.state)}
    number = event.generation if event.generation is not None else next(iter(able), None)
    if number in able:
        begin(turn, able[number], PromoteKind.ROLLBACK, (event.operation,))
    else:
        none = "there is no generation to go back to"
        refuse(turn, event.operation, number, able, none=none, wrong="not to be gone back to")


def refuse(
    turn: Turn, operation: int, number: int | None, able: dict[int, m.Generation], *, none: str, wrong: str
) -> None:
    """There is no such generation, or it can't be had; with those that can."""
    generation = turn.state.generations.get(number) if number is not None else None
    if number is None:
        reason = none
    elif generation is None:
        reason = f"there is no generation {number}"
    else:
        state = "the current one" if number == turn.state.current else generation.state
        reason = f"generation {number} is {state} and {wrong}"
    if number is not None:
        reason += f"; known: {', '.join(map(str, able)) or 'none'}"
    code = UNKNOWN if generation is None else 409
    turn.settle(operation, ok=False, reason=reason, code=code, details={"known": list(able)})


def staged(state: m.State) -> list[m.Generation]:
    """Those that wait for somebody to promote them, the newest first."""
    change = state.change.generation if state.change is not None else None
    able = [g for g in state.generations.values() if g.state is GenerationState.STAGED and g.id != change]
    return sorted(able, key=lambda generation: -generation.id)


# --------------------------------------------------------------------------------------------------------- its course


def begin(
    turn: Turn,
    generation: m.Generation,
    kind: PromoteKind,
    operations: tuple[int, ...] = (),
    *,
    first: bool = False,
    because: str = "",
) -> None:
    """Let `generation` take over; `check`, at the end of this turn, has the first step done."""
    turn.state.recover_at = None
    turn.state.promote = m.Promote(
        generation.id,
        turn.state.current,
        kind,
        PromotePhase.MUSTER,
        Strategy.SURGE,
        generation.served_until or generation.since,
        operations,
        first,
        because,
    )
    if generation.wanted <= 0:
        generation.missing = 0  # it is tried anew
    for worker in list(generation.workers.values()):
        if worker.swaps_seen < turn.state.swap_count:
            turn.dismiss(generation, worker, "a service was swapped since it was started")


def check(turn: Turn) -> None:
    """The next step of the promote that runs, if its workers are so far."""
    _go_back_if_breached(turn)
    promote = turn.state.promote
    if promote is None:
        return
    generation = turn.state.generations[promote.generation]
    if promote.phase is PromotePhase.MUSTER:
        _muster(turn, promote, generation)
    elif promote.phase is PromotePhase.ACTIVATE:
        serving = generation.having(frozenset({WorkerState.ACTIVE}))
        if len(serving) >= generation.wanted and not generation.having(frozenset({WorkerState.ACTIVATING})):
            _commit(turn, promote, generation)


def _go_back_if_breached(turn: Turn) -> None:
    """As soon as no other promote runs: that one may succeed, and then there is nothing to go back from any more."""
    watch = turn.state.probation
    if watch is None or not watch.breach or turn.state.promote is not None:
        return
    able = {generation.id: generation for generation in retirement.offered(turn.state)}
    if watch.previous in able:
        reason = f"segue goes back to generation {watch.previous}: {watch.breach}"
        swaps.give_up(turn, reason)
        begin(turn, able[watch.previous], PromoteKind.ROLLBACK, because=watch.breach)
    else:
        reason = f"{watch.breach}; generation {watch.previous} is no longer there to go back to"
        probation.end(turn, Outcome.KEPT, reason)


def _muster(turn: Turn, promote: m.Promote, generation: m.Generation) -> None:
    able = _able(turn, generation)
    booting = generation.having(frozenset({WorkerState.BOOTING}))
    missing = generation.wanted - len(able) - len(booting)
    if missing > 0:
        if generation.deadline is None:
            generation.deadline = turn.now + generation.limits.ready_timeout
            turn.effects.append(m.Progress(promote.operations, "boot"))
        for _ in range(missing):
            turn.spawn(generation, gated=True)
    elif not booting:
        promote.phase = PromotePhase.ACTIVATE
        turn.move(generation, GenerationState.ACTIVATING)
        generation.deadline = None
        turn.effects.append(m.Progress(promote.operations, PromotePhase.ACTIVATE))
        watch = probation.watch_s(turn, generation)
        for worker in able:
            turn.activate(generation, worker, watch)


def _able(turn: Turn, generation: m.Generation) -> list[m.Worker]:
    """Its workers that could serve at once, and have what was decided about services."""
    return [
        worker
        for worker in generation.having(m.RETURNING | {WorkerState.READY})
        if worker.swaps_seen >= turn.state.swap_count
    ]


def is_complete(turn: Turn, generation: m.Generation) -> bool:
    """Whether it could serve at once."""
    return len(_able(turn, generation)) >= generation.wanted > 0


def _commit(turn: Turn, promote: m.Promote, generation: m.Generation) -> None:
    """All have confirmed: from here on this generation is the current one."""
    state = turn.state
    previous = state.generations[state.current] if state.current not in {None, generation.id} else None
    state.promote = None
    back = promote.kind is PromoteKind.ROLLBACK
    probation.end(turn, Outcome.ROLLED_BACK if back else Outcome.SUPERSEDED, promote.because)
    turn.move(generation, GenerationState.ACTIVE)
    state.current = generation.id
    state.recover_streak = generation.streak = 0
    generation.warm_until = generation.kept_until = generation.deadline = None
    turn.effects.append(m.Promoted(generation.id, previous.id if previous is not None else None))
    if previous is not None and back:
        turn.say("warning", "rolled-back", generation, None, previous=previous.id, reason=promote.because)
        state.drained_watch.pop(previous.id, None)  # what it took over from serves again
        turn.effects.append(m.RolledBack(previous.id, generation.id, promote.because))
    for operation in promote.operations:
        turn.settle(operation, ok=True, generation=generation.id)
    if state.scaling is not None:
        staffing.end_scaling(
            turn, ok=False, reason="a reload came between; the new generation has its own number of workers"
        )
    if previous is not None:
        if previous.scaled_at >= promote.asof:
            generation.target, generation.scaled_at = previous.target, turn.now
        _relieve(turn, promote, previous, generation)
    _watch_drained(turn, generation)
    staffing.fill(turn, generation)


def _relieve(turn: Turn, promote: m.Promote, previous: m.Generation, generation: m.Generation) -> None:
    """The old one has done its duty, and is kept for a while; not so if it was found to be no good."""
    limits = generation.limits
    previous.served_until = turn.now
    if previous.state is GenerationState.ACTIVE:
        retirement.drain(turn, previous)
    if promote.because:
        retirement.retire(turn, previous, "it was gone back from")
        return
    watched = limits.probation if promote.is_watched else 0.0
    if limits.park_for > 0:
        previous.warm_until = turn.now + limits.park_for
    if max(limits.park_for, watched) > 0:
        previous.kept_until = turn.now + max(limits.park_for, watched)
    if watched > 0:
        probation.begin(turn, generation, previous, watched)


def _watch_drained(turn: Turn, generation: m.Generation) -> None:
    idle = {GenerationState.BOOTING, GenerationState.STAGED, GenerationState.PARKED}
    turn.state.drained_watch[generation.id] = frozenset(
        other.id
        for other in turn.state.generations.values()
        if other is not generation and other.state not in idle
    )


def fail(turn: Turn, generation: m.Generation, reason: str, output: str = "") -> None:
    """It does not come: whoever asked is told at once, and what was begun is taken back."""
    state = turn.state
    operations: tuple[int, ...] = ()
    change, promote = state.change, state.promote
    if change is not None and change.generation == generation.id:
        state.change = None
        operations += change.operations
        turn.first_failed |= change.first
    if promote is not None and promote.generation == generation.id:
        state.promote = None
        operations += promote.operations
        turn.first_failed |= promote.first
        if not promote.operations:
            turn.say("error", "not-promoted", generation, None, reason=reason, output=output)
        if promote.because:
            probation.end(turn, Outcome.KEPT, f"{promote.because}; going back has failed: {reason}")
    for operation in operations:
        turn.settle(operation, ok=False, reason=reason, output=output, generation=generation.id)
    generation.deadline = None
    if generation.state in _NEW:
        _give_up(turn, generation, reason)
        return
    for worker in generation.having(frozenset({WorkerState.BOOTING, WorkerState.READY})):
        turn.terminate(generation, worker, "it is no longer needed")


def _give_up(turn: Turn, generation: m.Generation, reason: str) -> None:
    turn.move(generation, GenerationState.FAILED)
    generation.reason = reason
    generation.respawn_at.clear()
    leaving = []
    for worker in list(generation.workers.values()):
        if worker.state in {WorkerState.ACTIVE, WorkerState.ACTIVATING}:
            leaving.append(worker)  # may have accepted: what it has, it hands back
        else:
            turn.dismiss(generation, worker, "its generation failed")
    turn.quiet(generation, leaving)

"""The promote: the one primitive by which a generation becomes the current one, be it new, staged, or one that served before.

Its workers are told to serve while the current ones still do. When all have confirmed, it is the current generation,
and only then the old one stops accepting. If one fails, the promote fails: what has begun to serve hands back, and the
old generation has never noticed. One promote at a time; `check` takes it further after every event, by what its
generation's workers are by then.

A generation that lacks workers is filled up before any of them is told to serve, with workers of the same code or not
at all; so is one whose workers don't have what was decided about services since they were started.
"""

from __future__ import annotations

import msgspec

from segue.supervisor import canary, probation, replacing, retirement, rolling, staffing, swaps
from segue.supervisor import model as m
from segue.supervisor.model import GenerationState, Outcome, PromoteKind, PromotePhase, Strategy, WorkerState
from segue.supervisor.turn import Turn

_WITHOUT_RETURN = frozenset({PromotePhase.CLEAR, PromotePhase.ACTIVATE})
"""Where a promote is awaited, whatever comes."""
_NEW = frozenset(
    {GenerationState.BOOTING, GenerationState.STAGED, GenerationState.ACTIVATING, GenerationState.MIXED}
)
UNKNOWN = 404
"""HTTP status of what is asked for a generation that there is not."""
OUTDATED = "a service was swapped since it was started"
"""Or a swap was taken back, and nobody knows whether this worker has done so."""


# ------------------------------------------------------------------------------------------------------ what is asked


def asked(turn: Turn, event: m.PromoteAsked) -> None:
    """Somebody wants the staged generation to serve, or one that served before; or all of what is a canary by now."""
    promote = turn.state.promote
    if promote is not None and promote.until is not None and event.generation in {None, promote.generation}:
        promote.operations += (event.operation,)
        promote.until = turn.now
        return
    if turn.refused(event.operation):
        return
    able = {
        generation.id: generation for generation in (*staged(turn.state), *retirement.offered(turn.state))
    }
    number = event.generation
    if number is None:
        number = next((generation.id for generation in staged(turn.state)), None)
    if number in able:
        able[number].limits = as_asked(event, able[number].limits)
        begin(turn, able[number], PromoteKind.PROMOTE, (event.operation,))
        _note_strategy(turn, event, able[number])
    else:
        none = "; ".join(filter(None, ("no generation is staged", turn.state.staged_lost)))
        refuse(turn, event.operation, number, able, none=none, wrong="not to be promoted")


def _note_strategy(turn: Turn, event: m.PromoteAsked, generation: m.Generation) -> None:
    """What runs already, beside what serves, has nothing to wait for: whoever named a strategy is told."""
    promote = turn.state.promote
    if promote is None or event.strategy in {None, promote.strategy} or not turn.state.serving:
        return
    promote.note = f"all its workers run already: it takes over at once, and not by strategy {event.strategy}"
    turn.say("warning", "strategy-without-effect", generation, None, reason=promote.note)


def as_asked(asked: m.Change | m.PromoteAsked, limits: m.Limits) -> m.Limits:
    """What was said with the request has precedence over the settings."""
    return msgspec.structs.replace(
        limits,
        strategy=limits.strategy if asked.strategy is None else asked.strategy,
        canary=limits.canary if asked.canary is None else asked.canary,
        canary_for=limits.canary_for if asked.canary_for is None else asked.canary_for,
    )


def rollback_asked(turn: Turn, event: m.RollbackAsked) -> None:
    """Somebody wants one back that served before; or the end of a canary, which is the same."""
    state = turn.state
    if state.promote is not None and state.promote.is_mixed and event.generation in {None, state.current}:
        fail(turn, state.generations[state.promote.generation], "it was rolled back")
        turn.settle(event.operation, ok=True, generation=state.current)
        return
    if turn.refused(event.operation, beside_stage=True):
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
    state = turn.state
    state.recover_at = None
    if generation.wanted <= 0:
        generation.missing = 0  # it is tried anew
    for worker in list(generation.workers.values()):
        if worker.swaps_seen < state.swap_count:
            turn.dismiss(generation, worker, OUTDATED)
    promote = state.promote = m.Promote(
        generation.id,
        state.current,
        kind,
        PromotePhase.MUSTER,
        Strategy.SURGE,
        generation.served_until or generation.since,
        operations,
        first,
        because,
    )
    if state.serving and not is_complete(turn, generation):
        newer = state.generations[state.current or 0] if kind is PromoteKind.ROLLBACK else generation
        promote.strategy = newer.limits.strategy
        if promote.strategy is Strategy.ROLLING:
            rolling.begin(turn, promote, generation)
        elif promote.strategy is Strategy.REPLACE:
            replacing.begin(turn, promote, generation, newer.limits.replace_timeout)


def check(turn: Turn) -> None:
    """The next step of the promote that runs, if its workers are so far."""
    _go_back_if_breached(turn)
    promote = turn.state.promote
    if promote is None:
        return
    generation = turn.state.generations[promote.generation]
    if promote.watch is not None and promote.watch.breach:
        fail(turn, generation, promote.watch.breach)
        return
    if promote.phase is PromotePhase.CLEAR and replacing.is_clear(turn, promote):
        promote.phase = PromotePhase.MUSTER
    if promote.phase is PromotePhase.MUSTER:
        _muster(turn, promote, generation)
    elif promote.phase is PromotePhase.CANARY:
        if canary.is_over(turn, promote, generation):
            _activate(turn, promote, generation)
    elif promote.phase is PromotePhase.ROLLING and rolling.is_complete(turn, promote, generation):
        _commit(turn, promote, generation)
    if promote.phase is PromotePhase.ACTIVATE and not generation.having(frozenset({WorkerState.ACTIVATING})):
        if len(generation.having(frozenset({WorkerState.ACTIVE}))) >= generation.wanted:
            _commit(turn, promote, generation)
        else:
            fail(turn, generation, "one of its workers has ended")


def _go_back_if_breached(turn: Turn) -> None:
    """Unless another promote is about to succeed: then there is nothing to go back from any more."""
    watch, promote = turn.state.probation, turn.state.promote
    if watch is None or not watch.breach:
        return
    if promote is not None:
        if promote.kind is PromoteKind.ROLLBACK or promote.phase in _WITHOUT_RETURN:
            return
        reason = f"generation {watch.generation} is gone back from: {watch.breach}"
        fail(turn, turn.state.generations[promote.generation], reason)
    able = {generation.id: generation for generation in retirement.offered(turn.state)}
    if watch.previous in able:
        reason = f"segue goes back to generation {watch.previous}: {watch.breach}"
        swaps.give_up(turn, reason)
        begin(turn, able[watch.previous], PromoteKind.ROLLBACK, because=watch.breach)
    else:
        reason = f"{watch.breach}; generation {watch.previous} is no longer there to go back to"
        probation.end(turn, Outcome.KEPT, reason)


def _muster(turn: Turn, promote: m.Promote, generation: m.Generation) -> None:
    able = staffing.able(turn, generation)
    booting = generation.having(frozenset({WorkerState.BOOTING}))
    missing = generation.wanted - len(able) - len(booting)
    if missing > 0:
        if generation.deadline is None:
            generation.deadline = turn.now + generation.limits.ready_timeout
            turn.effects.append(m.Progress(promote.operations, "boot", generation.id))
        for _ in range(missing):
            turn.spawn(generation, gated=True)
    elif not booting:
        if generation.state is GenerationState.BOOTING:
            turn.move(generation, GenerationState.STAGED)
        if canary.is_due(turn, promote, generation):
            canary.begin(turn, promote, generation)
        else:
            _activate(turn, promote, generation)


def _activate(turn: Turn, promote: m.Promote, generation: m.Generation) -> None:
    """All of them, or all that do not serve yet."""
    promote.phase, promote.watch = PromotePhase.ACTIVATE, None
    turn.move(generation, GenerationState.ACTIVATING)
    generation.deadline = None
    turn.effects.append(m.Progress(promote.operations, PromotePhase.ACTIVATE, generation.id))
    seconds = probation.watch_s(turn, generation)
    for worker in staffing.able(turn, generation):
        turn.activate(generation, worker, seconds)


def is_complete(turn: Turn, generation: m.Generation) -> bool:
    """Whether it could serve at once."""
    return len(staffing.able(turn, generation)) >= generation.wanted > 0


def _commit(turn: Turn, promote: m.Promote, generation: m.Generation) -> None:
    """All have confirmed: from here on this generation is the current one."""
    state = turn.state
    previous = state.generations[state.current] if state.current not in {None, generation.id} else None
    state.promote = None
    back = promote.kind is PromoteKind.ROLLBACK
    probation.end(turn, Outcome.ROLLED_BACK if back else Outcome.SUPERSEDED, promote.because)
    turn.move(generation, GenerationState.ACTIVE)
    if back:
        generation.missing = 0  # what it lacks is tried one by one
    state.current = generation.id
    state.recover_streak = generation.streak = 0
    generation.warm_until = generation.kept_until = generation.deadline = generation.drain_budget = None
    turn.effects.append(m.Promoted(generation.id, previous.id if previous is not None else None))
    if previous is not None and back:
        turn.say("warning", "rolled-back", generation, None, previous=previous.id, reason=promote.because)
        state.drained_watch.pop(previous.id, None)  # what it took over from serves again
        turn.effects.append(m.RolledBack(previous.id, generation.id, promote.because))
    result = {"notes": [promote.note]} if promote.note else None
    for operation in promote.operations:
        turn.settle(operation, ok=True, generation=generation.id, result=result)
    if state.scaling is not None:
        staffing.end_scaling(
            turn, ok=False, reason="a reload came between; the new generation has its own number of workers"
        )
    if previous is not None:
        if previous.scaled_at >= promote.asof:
            generation.target, generation.missing = previous.target, 0  # what it lacks is tried one by one
            generation.scaled_at = turn.now
        _relieve(turn, promote, previous, generation)
    _watch_drained(turn, generation)
    staffing.fill(turn, generation)


def _relieve(turn: Turn, promote: m.Promote, previous: m.Generation, generation: m.Generation) -> None:
    """The old one has done its duty, and is kept for a while; not so if it was found to be no good.

    What was kept before is let go: with a reload every second there would be one set of workers for each.
    """
    retirement.keep_no_longer(turn)
    limits = generation.limits
    previous.served_until, previous.ceded = turn.now, 0
    if previous.state is GenerationState.ACTIVE:
        retirement.drain(turn, previous)
    if promote.because:
        retirement.retire(turn, previous, "it was gone back from")
        return
    watched = limits.probation if promote.is_watched else 0.0
    if limits.park_for > 0 and promote.strategy is Strategy.SURGE:
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


def fail(
    turn: Turn, generation: m.Generation, reason: str, output: str = "", by: m.Worker | None = None
) -> None:
    """It does not come: whoever asked is told at once, and what was begun is taken back.

    `by`: the worker whose fault that is, if it still lives.
    """
    state = turn.state
    operations: tuple[int, ...] = ()
    change, promote = state.change, state.promote
    if promote is not None and promote.generation == generation.id and _goes_short(turn, promote, reason, by):
        return
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
    under_way = {each.generation for each in (change, promote) if each is not None}
    if generation.state is GenerationState.STAGED and generation.id not in under_way:
        state.staged_lost = f"generation {generation.id} was, and has failed: {reason}"
        turn.say("error", "staged-failed", generation, None, reason=reason, output=output)
    generation.deadline = None
    if generation.state in _NEW:
        _give_up(turn, generation, reason)
    else:
        for worker in generation.having(frozenset({WorkerState.BOOTING, WorkerState.READY})):
            turn.terminate(generation, worker, "it is no longer needed")
    if promote is not None and promote.previous is not None and state.promote is None:
        _go_on(turn, state.generations[promote.previous], generation)


def _goes_short(turn: Turn, promote: m.Promote, reason: str, by: m.Worker | None) -> bool:
    """Whether what has served before serves again with those workers that it has: `check` sees to that."""
    generation, able = turn.state.generations[promote.generation], []
    if promote.may_go_short and promote.phase is PromotePhase.MUSTER:
        able = staffing.able(turn, generation)
    elif promote.may_go_short and promote.phase is PromotePhase.ACTIVATE:
        able = generation.having(m.TAKING_PART)
    able = [worker for worker in able if worker is not by]
    if not able or turn.state.stopping is not None:
        return False
    if by is not None:
        turn.kill(generation, by, reason)
    generation.missing, generation.deadline = generation.target - len(able), None
    promote.note = f"{len(able)} of its {generation.target} workers serve, since {reason}"
    turn.say("warning", "generation-short", generation, None, reason=reason, missing=generation.missing)
    for worker in generation.having(frozenset({WorkerState.BOOTING})):
        turn.terminate(generation, worker, "its generation serves without it")
    return True


def _go_on(turn: Turn, current: m.Generation, failed: m.Generation) -> None:
    """The generation that was to be taken over from has all its places again, or is started again."""
    if current is failed:
        return
    current.ceded = 0
    if current.state is GenerationState.ACTIVE:
        staffing.fill(turn, current)
    elif turn.state.stopping is None:
        because = f"generation {failed.id} has taken its place and failed"
        begin(turn, current, PromoteKind.ROLLBACK, because=because)


def _give_up(turn: Turn, generation: m.Generation, reason: str) -> None:
    stays = generation.id == turn.state.current
    turn.move(generation, GenerationState.DRAINING if stays else GenerationState.FAILED)
    generation.reason = reason
    generation.respawn_at.clear()
    leaving = []
    for worker in list(generation.workers.values()):
        if worker.state in {WorkerState.ACTIVE, WorkerState.ACTIVATING}:
            leaving.append(worker)  # may have accepted: what it has, it hands back
        else:
            turn.dismiss(generation, worker, "its generation failed")
    turn.quiet(generation, leaving)

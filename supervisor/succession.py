"""How a generation comes to be: from somebody who asks, over its settings and its workers' start, to ready.

What is ready is staged, or promoted at once. One that does not get that far changes nothing for the current one.
Requests that come meanwhile are merged into the next change.
"""

from __future__ import annotations

from segue.supervisor import model as m
from segue.supervisor import promotion, retirement
from segue.supervisor.model import ChangePhase, GenerationState, PromoteKind, Strategy, WorkerState
from segue.supervisor.staffing import backoff
from segue.supervisor.turn import STOPPING_CAUSE, Turn

PREPARE_TIMEOUT_S = 60.0
_OVERTAKEN = "something was saved meanwhile: the newer code is started instead"


def reload_asked(turn: Turn, event: m.ReloadAsked) -> None:
    """Start a new generation, or after what is under way."""
    if turn.state.stopping is not None:
        turn.settle(event.operation, ok=False, reason=STOPPING_CAUSE)
    elif turn.state.changing or turn.state.swap is not None:
        turn.state.queued += (event,)
        turn.effects.append(m.Progress((event.operation,), "queued"))
        if event.overtakes and turn.state.change is not None:
            _overtake(turn, turn.state.change)
    else:
        _start(turn, (event,))


def _overtake(turn: Turn, change: m.Change) -> None:
    """What is being started is old by now: the next one answers whoever asked for it. What is promoted goes first."""
    if change.stage:
        return
    generation = turn.state.generations[change.generation]
    turn.say("info", "overtaken", generation, None, reason=_OVERTAKEN)
    turn.effects.append(m.Progress(change.operations, "queued"))
    how = (change.strategy, change.canary, change.canary_for)
    turn.state.queued = (
        *(m.ReloadAsked(operation, *how) for operation in change.operations),
        *turn.state.queued,
    )
    change.operations = ()
    promotion.fail(turn, generation, _OVERTAKEN)


def stage_asked(turn: Turn, event: m.StageAsked) -> None:
    """Start a new generation that waits until somebody promotes it."""
    if not turn.refused(event.operation):
        _start_change(turn, m.Change(turn.state.next_generation, (event.operation,), stage=True))


def _start(turn: Turn, asked: tuple[m.ReloadAsked, ...]) -> None:
    """One generation for all of them; the last who named a strategy or a canary has the say about that."""
    change = m.Change(
        turn.state.next_generation,
        tuple(event.operation for event in asked),
        first=turn.state.current is None,
    )
    for event in asked:
        change.strategy = event.strategy if event.strategy is not None else change.strategy
        change.canary = event.canary if event.canary is not None else change.canary
        change.canary_for = event.canary_for if event.canary_for is not None else change.canary_for
    _start_change(turn, change)


def _start_change(turn: Turn, change: m.Change) -> None:
    """A new generation, from its settings on."""
    turn.state.next_generation += 1
    generation = m.Generation(change.generation, GenerationState.BOOTING, since=turn.now)
    generation.deadline = turn.now + PREPARE_TIMEOUT_S
    turn.state.generations[generation.id] = generation
    turn.state.change, turn.state.recover_at = change, None
    turn.effects += [m.Progress(change.operations, change.phase, generation.id), m.Prepare(generation.id)]


def prepared(turn: Turn, event: m.Prepared) -> None:
    """Its settings are there: start its workers."""
    generation = turn.state.generations.get(event.generation)
    change = turn.state.change
    if (
        generation is None
        or change is None
        or change.generation != event.generation
        or change.phase is not ChangePhase.PREPARE
    ):
        return
    generation.target, generation.limits = event.workers, promotion.as_asked(change, event.limits)
    generation.deadline = turn.now + event.limits.ready_timeout
    strategy = generation.limits.strategy if turn.state.serving else Strategy.SURGE
    if strategy is not Strategy.SURGE and change.stage:
        reason = f"with strategy {strategy} nothing can be staged: it would be started beside what serves"
        promotion.fail(turn, generation, reason)
    elif strategy is Strategy.REPLACE:
        _progress(turn, change, ChangePhase.CHECK)
        turn.effects.append(m.Check(generation.id))
    elif strategy is Strategy.ROLLING:
        generation.deadline, change.phase = None, ChangePhase.WAIT
    else:
        _progress(turn, change, ChangePhase.BOOT)
        for _ in range(generation.target):
            turn.spawn(generation)


def checked(turn: Turn, event: m.Checked) -> None:
    """Its code can be imported, or not."""
    change = turn.state.change
    if change is None or change.generation != event.generation or change.phase is not ChangePhase.CHECK:
        return
    generation = turn.state.generations[event.generation]
    if event.error:
        promotion.fail(turn, generation, event.error, event.output)
    else:
        generation.deadline, change.phase = None, ChangePhase.WAIT


def prepare_failed(turn: Turn, event: m.PrepareFailed) -> None:
    """They can't be had."""
    generation = turn.state.generations.get(event.generation)
    change = turn.state.change
    if generation is not None and change is not None and change.generation == generation.id:
        promotion.fail(turn, generation, event.reason)


def check(turn: Turn) -> None:
    """Whether all its workers are ready; and then it waits, or is promoted as soon as nothing else is."""
    change = turn.state.change
    if change is None:
        return
    generation = turn.state.generations[change.generation]
    if change.phase is ChangePhase.BOOT and all(
        worker.state is WorkerState.READY for worker in generation.workers.values()
    ):
        turn.move(generation, GenerationState.STAGED)
        generation.deadline = None
        change.phase = ChangePhase.WAIT
    if change.phase is not ChangePhase.WAIT:
        return
    if change.stage:
        turn.state.change = None
        for earlier in promotion.staged(turn.state):
            if earlier is not generation:
                retirement.retire(turn, earlier, f"generation {generation.id} was staged after it")
        turn.state.staged_lost = ""
        turn.say("info", "staged", generation, None, workers=len(generation.workers))
        for operation in change.operations:
            turn.settle(operation, ok=True, generation=generation.id)
    elif turn.state.promote is None:
        turn.state.change = None
        promotion.begin(turn, generation, PromoteKind.RELOAD, change.operations, first=change.first)


def discard_asked(turn: Turn, event: m.DiscardAsked) -> None:
    """Somebody gives a generation up."""
    state = turn.state
    if state.stopping is not None:
        turn.settle(event.operation, ok=False, reason=STOPPING_CAUSE)
        return
    staged, change = promotion.staged(state), state.change
    able = {generation.id: generation for generation in staged}
    if change is not None and not change.first:
        able[change.generation] = state.generations[change.generation]
    if state.promote is not None and state.promote.is_mixed:
        able[state.promote.generation] = state.generations[state.promote.generation]
    able |= {generation.id: generation for generation in retirement.offered(state)}
    number = event.generation
    if number is None:
        number = next((number for number, each in able.items() if not each.served_until), None)
    if number not in able:
        none = "no generation is staged"
        promotion.refuse(turn, event.operation, number, able, none=none, wrong="not to be discarded")
    elif state.promote is not None and not state.promote.is_mixed and number == state.promote.generation:
        turn.refused(event.operation)
    else:
        generation = able[number]
        turn.say("info", "discarded", generation, None)
        turn.settle(event.operation, ok=True, generation=generation.id)
        if any(each is not None and each.generation == number for each in (change, state.promote)):
            promotion.fail(turn, generation, "it was discarded")
        if generation.state is not GenerationState.FAILED:
            retirement.retire(turn, generation, "it was discarded")


def _progress(turn: Turn, change: m.Change, phase: ChangePhase) -> None:
    change.phase = phase
    turn.effects.append(m.Progress(change.operations, phase, change.generation))


def start_queued(turn: Turn) -> None:
    """The requests that came during a change, or a swap, start the next one once that has ended."""
    if turn.state.stopping is not None or turn.state.changing or turn.state.swap is not None:
        return
    if turn.state.queued:
        queued, turn.state.queued = turn.state.queued, ()
        _start(turn, queued)


def recover_if_lost(turn: Turn) -> None:
    """Nothing serves and its code is gone from the disk: the code that is there is tried, again and again.

    If a generation is still warm, that one serves again.
    """
    if not _is_lost(turn):
        return
    for generation in retirement.offered(turn.state):
        if promotion.is_complete(turn, generation):
            because = f"nothing of generation {turn.state.current} serves, and its code is gone"
            promotion.begin(turn, generation, PromoteKind.ROLLBACK, because=because)
            promotion.check(turn)
            return
    if turn.state.recover_at is None:
        turn.state.recover_at = turn.now + backoff(turn.state.recover_streak)
        turn.state.recover_streak += 1


def recover_if_due(turn: Turn) -> None:
    """The time has come to try; but a swap that is decided is told first."""
    state = turn.state
    if state.recover_at is not None and state.recover_at <= turn.now and state.swap is None:
        state.recover_at = None
        if _is_lost(turn):
            _start(turn, ())


def _is_lost(turn: Turn) -> bool:
    """Whether no worker serves (a hung one doesn't), and none will be started by itself."""
    state = turn.state
    if state.current is None or state.stopping is not None or state.changing:
        return False
    current = state.generations[state.current]
    if turn.serves(current) and current.wanted > 0:
        return False
    return not current.respawn_at and not current.having(m.STARTING | {WorkerState.ACTIVE})

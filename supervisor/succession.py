"""How one generation follows on another: reload, promote, what becomes of the old one, and the stop of all.

A generation that does not make it changes nothing for the current one: `fail` ends what was started and tells whoever
asked. Whoever waits for something is answered by whatever makes that impossible.
"""

from __future__ import annotations

from segue.supervisor import model as m
from segue.supervisor import staffing, swaps
from segue.supervisor.model import GenerationState, WorkerState
from segue.supervisor.staffing import backoff
from segue.supervisor.turn import SLACK_S, STARTING_IDLE, STOPPING_CAUSE, Turn

PREPARE_TIMEOUT_S = 60.0
_STOP_REASONS = {1: "it was not a clean stop", 3: "the first generation did not start"}


def reload_asked(turn: Turn, event: m.ReloadAsked) -> None:
    """Start a new generation, or after the one that is being started, or the swap that runs."""
    if turn.state.stopping is not None:
        turn.settle(event.operation, ok=False, reason=STOPPING_CAUSE)
    elif turn.state.change is not None or turn.state.swap is not None:
        turn.state.queued += (event,)
        turn.effects.append(m.Progress((event.operation,), "queued"))
    else:
        start_change(turn, (event.operation,))


def start_change(turn: Turn, operations: tuple[int, ...]) -> None:
    """A new generation, from its settings on."""
    number = turn.state.next_generation
    turn.state.next_generation += 1
    generation = m.Generation(number, GenerationState.BOOTING, since=turn.now)
    generation.deadline = turn.now + PREPARE_TIMEOUT_S
    turn.state.generations[number] = generation
    turn.state.change = m.Change(number, operations, first=turn.state.current is None)
    turn.state.recover_at = None
    turn.effects += [m.Progress(operations, "prepare"), m.Prepare(number)]


def prepared(turn: Turn, event: m.Prepared) -> None:
    """Its settings are there: start its workers."""
    generation = turn.state.generations.get(event.generation)
    change = turn.state.change
    if generation is None or change is None or change.generation != event.generation or generation.workers:
        return
    generation.target, generation.limits = event.workers, event.limits
    generation.deadline = turn.now + event.limits.ready_timeout
    turn.effects.append(m.Progress(change.operations, "boot"))
    for _ in range(generation.target):
        turn.spawn(generation)


def prepare_failed(turn: Turn, event: m.PrepareFailed) -> None:
    """They can't be had."""
    generation = turn.state.generations.get(event.generation)
    if generation is not None and generation.state is GenerationState.BOOTING:
        fail(turn, generation, event.reason)


def stage(turn: Turn, generation: m.Generation) -> None:
    """All are ready: activate them. The old generation goes on accepting until all have confirmed."""
    turn.move(generation, GenerationState.STAGED)
    generation.deadline = None
    if turn.state.change is not None:
        turn.effects.append(m.Progress(turn.state.change.operations, "activate"))
    for worker in generation.workers.values():
        turn.activate(generation, worker)


def promote(turn: Turn, generation: m.Generation) -> None:
    """All have confirmed: from here on this generation is the current one."""
    previous = turn.state.current
    change, turn.state.change = turn.state.change, None
    turn.move(generation, GenerationState.ACTIVE)
    turn.state.current = generation.id
    turn.state.recover_streak = 0
    generation.streak = 0
    turn.effects.append(m.Promoted(generation.id, previous))
    old = frozenset(key for key in turn.state.generations if key != generation.id)
    turn.state.drained_watch[generation.id] = old
    if change is not None:
        for operation in change.operations:
            turn.settle(operation, ok=True, generation=generation.id)
    if turn.state.scaling is not None:
        staffing.end_scaling(
            turn, ok=False, reason="a reload came between; the new generation has its own number of workers"
        )
    if previous is not None:
        _drain(turn, turn.state.generations[previous])
    _check_drained(turn)
    start_queued(turn)


def fail(turn: Turn, generation: m.Generation, reason: str, output: str = "") -> None:
    """A new generation did not make it: whoever asked is told at once, what was started is ended."""
    turn.move(generation, GenerationState.FAILED)
    generation.reason, generation.deadline = reason, None
    generation.respawn_at.clear()
    change, turn.state.change = turn.state.change, None
    if change is not None:
        for operation in change.operations:
            turn.settle(operation, ok=False, reason=reason, output=output, generation=generation.id)
    leaving = []
    for worker in list(generation.workers.values()):
        if worker.state in {WorkerState.ACTIVE, WorkerState.ACTIVATING}:
            leaving.append(worker)  # may have accepted: what it has, it hands back
        else:
            turn.terminate(generation, worker, "its generation failed")
    turn.quiet(generation, leaving)
    release_if_empty(turn, generation)
    if change is not None and change.first and turn.state.stopping is None:
        begin_stop(turn, status=3)
    start_queued(turn)
    recover_if_lost(turn)


def start_queued(turn: Turn) -> None:
    """The requests that came during a change, or a swap, start the next one once that has ended."""
    if turn.state.stopping is not None or turn.state.change is not None or turn.state.swap is not None:
        return
    if turn.state.queued:
        queued, turn.state.queued = turn.state.queued, ()
        start_change(turn, tuple(event.operation for event in queued))


def recover_if_lost(turn: Turn) -> None:
    """Nothing serves and the old code is gone from the disk: the code that is there is tried, again and again."""
    if is_lost(turn) and turn.state.recover_at is None:
        turn.state.recover_at = turn.now + backoff(turn.state.recover_streak)
        turn.state.recover_streak += 1


def recover_if_due(turn: Turn) -> None:
    """The time has come to try; but a swap that is decided is told first."""
    state = turn.state
    if state.recover_at is not None and state.recover_at <= turn.now and state.swap is None:
        state.recover_at = None
        if is_lost(turn):
            start_change(turn, ())


def is_lost(turn: Turn) -> bool:
    """Whether no worker serves (a hung one doesn't), and none is about to."""
    state = turn.state
    if state.current is None or state.stopping is not None or state.change is not None:
        return False
    current = state.generations[state.current]
    return not current.respawn_at and not current.having(m.STARTING | {WorkerState.ACTIVE})


def _drain(turn: Turn, generation: m.Generation) -> None:
    """Retire a generation: its workers stop accepting, hand their connections over, finish, and end."""
    turn.move(generation, GenerationState.DRAINING)
    generation.respawn_at.clear()
    generation.deadline = None
    leaving = []
    for worker in list(generation.workers.values()):
        if worker.state in {WorkerState.BOOTING, WorkerState.READY}:
            turn.terminate(generation, worker, "its generation was replaced before it was ready")
        elif worker.state in {WorkerState.ACTIVATING, WorkerState.ACTIVE, WorkerState.HUNG}:
            leaving.append(worker)
    turn.quiet(generation, leaving)
    release_if_empty(turn, generation)


def release_if_empty(turn: Turn, generation: m.Generation) -> None:
    """A generation that was replaced, or failed, ends with its last process."""
    if generation.workers or generation.id not in turn.state.generations:
        return
    if generation.state in {GenerationState.DRAINING, GenerationState.FAILED}:
        failed = generation.state is GenerationState.FAILED
        turn.move(generation, GenerationState.RETIRED)
        del turn.state.generations[generation.id]
        turn.effects.append(m.Released(generation.id, failed))
        _check_drained(turn)
    _exit_if_empty(turn)


def _check_drained(turn: Turn) -> None:
    for promoted, old in list(turn.state.drained_watch.items()):
        if not any(generation in turn.state.generations for generation in old):
            del turn.state.drained_watch[promoted]
            turn.effects.append(m.AllDrained(promoted))


def drain_asked(turn: Turn, event: m.DrainAsked) -> None:
    """Tell every worker that has connections, or will."""
    if turn.state.stopping is not None:
        turn.settle(event.operation, ok=False, reason=STOPPING_CAUSE)
        return
    end_drain_change(turn, ok=False, reason="another drain request came after it")
    turn.state.drain_mode = event.mode
    turn.state.drain_change = m.DrainChange(event.operation, set())
    turn.say("info", "drain", None, None, mode=event.mode or "off")
    for generation in turn.state.generations.values():
        for worker in generation.having(m.SERVING | m.LEAVING | {WorkerState.ACTIVATING}):
            turn.tell_drain(generation, worker)
            turn.state.drain_change.pending.add((generation.id, worker.id))


def check_drain_change(turn: Turn) -> None:
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
        end_drain_change(turn, ok=True)


def end_drain_change(turn: Turn, ok: bool, reason: str = "") -> None:
    """Answer whoever asked for it."""
    change, turn.state.drain_change = turn.state.drain_change, None
    if change is not None:
        turn.settle(change.operation, ok=ok, reason=reason, generation=turn.state.current)


def stop_asked(turn: Turn, event: m.StopAsked) -> None:
    """Stop after a delay, gracefully, or at once; asked twice by signal means at once."""
    operations = (event.operation,) if event.operation is not None else ()
    stopping = turn.state.stopping
    if stopping is None:
        status = 0 if turn.state.serving else 1  # never 0 from an outage, or from a start that was given up
        stopping = m.Stopping((), begun=False, deadline=turn.now + event.delay, status=status)
        turn.state.stopping = stopping
        turn.say("info", "stopping", None, None, delay_s=event.delay, budget_s=event.budget)
        for generation in turn.state.generations.values():
            generation.limits = m.Limits(
                generation.limits.ready_timeout,
                generation.limits.drain_timeout,
                event.budget,
                generation.limits.heartbeat_timeout,
            )
        _refuse_waiting(turn, STOPPING_CAUSE)
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
        swaps.check(turn)
        _exit_if_empty(turn)
    elif not stopping.begun and event.delay <= 0:
        begin_stop(turn, stopping.status)


def _refuse_waiting(turn: Turn, reason: str) -> None:
    """A stop has come: everybody who waits for something else gets the answer now."""
    queued, turn.state.queued = turn.state.queued, ()
    for event in queued:
        turn.settle(event.operation, ok=False, reason=reason)
    staffing.end_scaling(turn, ok=False, reason=reason)
    staffing.refuse_queued(turn, reason)
    swaps.refuse_all(turn, reason)
    turn.state.recover_at = None
    end_drain_change(turn, ok=False, reason=reason)
    if turn.state.change is not None:
        fail(turn, turn.state.generations[turn.state.change.generation], reason)


def begin_stop(turn: Turn, status: int) -> None:
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
    swaps.check(turn)
    _exit_if_empty(turn)


def _exit_if_empty(turn: Turn) -> None:
    stopping = turn.state.stopping
    if stopping is None or not stopping.begun:
        return
    if any(generation.workers for generation in turn.state.generations.values()):
        return
    for operation in stopping.operations:
        turn.settle(operation, ok=stopping.status == 0, reason=_STOP_REASONS.get(stopping.status, ""))
    stopping.operations = ()
    turn.effects.append(m.Exit(stopping.status))

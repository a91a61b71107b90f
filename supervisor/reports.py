"""What a worker says, answers or suffers, and what follows from it: the cells of the table in `lifecycle`."""

from __future__ import annotations

from segue.supervisor import model as m
from segue.supervisor import operator_drain, probation, promotion, retirement, staffing
from segue.supervisor.model import GenerationState, Verb, WorkerState
from segue.supervisor.turn import ACTIVATE_TIMEOUT_S, COMMAND_TIMEOUT_S, SLACK_S, STOPPING_CAUSE, Turn

_COMING = frozenset(
    {GenerationState.BOOTING, GenerationState.STAGED, GenerationState.ACTIVATING, GenerationState.MIXED}
)


def comes(turn: Turn, generation: m.Generation) -> bool:
    """Whether it is to serve one day, and what goes wrong with one of its workers goes wrong with all of it."""
    promote = turn.state.promote
    return generation.state in _COMING or (promote is not None and promote.generation == generation.id)


def boot_phase(turn: Turn, _: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """It says how far its start is."""
    assert isinstance(event, m.WorkerPhased)
    worker.phase = event.phase


def became_ready(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """It has started. `staffing.admit`, `succession.check` and `promotion.check` see to what becomes of it."""
    assert isinstance(event, m.WorkerReady)
    worker.state, worker.deadline, worker.handover = WorkerState.READY, None, event.handover
    turn.say("info", "worker-ready", generation, worker)
    if not (turn.serves(generation) or comes(turn, generation)):
        turn.terminate(generation, worker, "it is no longer needed")


def activated(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to `activate`: it accepts, or its generation, or it alone, has failed."""
    assert isinstance(event, m.Activated)
    if event.error:
        reason = f"worker {worker.id} could not be activated: {event.error}"
        if comes(turn, generation):
            promotion.fail(turn, generation, reason, by=worker)
        else:
            turn.kill(generation, worker, reason)
            staffing.start_failed(turn, generation, worker, reason)
        return
    worker.state, worker.deadline = WorkerState.ACTIVE, None
    if comes(turn, generation):
        return
    turn.say("info", "worker-active", generation, worker)
    generation.streak = 0
    replaced = generation.workers.get(worker.replaces) if worker.replaces else None
    worker.replaces = None
    if replaced is not None:
        turn.leave(generation, replaced, "it was replaced")
    staffing.fill(turn, generation)


def woke_up(turn: Turn, generation: m.Generation, worker: m.Worker, _: m.WorkerEvent) -> None:
    """A hung one shows that it is alive; one that the last master may have told to leave is told to serve."""
    worker.state = WorkerState.ACTIVE  # its replacement goes on, and then it leaves in peace
    if worker.unasked:
        turn.command(generation, worker, Verb.ACTIVATE, ACTIVATE_TIMEOUT_S)


def activated_again(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to that; if it does not take it, it is as good as hung until it shows again that it is alive."""
    assert isinstance(event, m.Activated)
    if worker.unasked and event.error:
        worker.state = WorkerState.HUNG
        staffing.replace(turn, generation, worker, event.error)
    worker.unasked = worker.unasked and bool(event.error)


def hand_over_again(turn: Turn, generation: m.Generation, worker: m.Worker, _: m.WorkerEvent) -> None:
    """It is alive, and had not taken its handover."""
    if worker.handover_refused and not generation.having(frozenset({WorkerState.QUIETING})):
        worker.handover_refused = False
        assert worker.deadline is not None
        budget = max(0.0, worker.deadline - SLACK_S - turn.now)
        turn.command(generation, worker, Verb.HAND_OVER, COMMAND_TIMEOUT_S, budget=budget)


def asks(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """It wants to be replaced; later, if many who were are not done yet with their streams: it asks with each heartbeat."""
    assert isinstance(event, m.WorkerAsks)
    if len(generation.having(m.LEAVING)) < generation.wanted:
        staffing.replace(turn, generation, worker, event.why)


def quieted(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to the first phase; one to an earlier first phase says nothing about this one."""
    assert isinstance(event, m.Quieted)
    if event.error:
        turn.say("warning", "worker-silent", generation, worker, reason=event.error)
    worker.quiets_unanswered -= 1
    if not worker.quiets_unanswered:
        gone_quiet(turn, generation, worker)


def gone_quiet(turn: Turn, generation: m.Generation, worker: m.Worker) -> None:
    """It accepts no more, or is taken for one that doesn't: the second phase can't wait for ever."""
    worker.state, worker.deadline = WorkerState.QUIET, None
    turn.hand_over_if_quiet(generation)


def quieted_earlier(_: Turn, __: m.Generation, worker: m.Worker, ___: m.WorkerEvent) -> None:
    """The answer to the first phase of a handover that something else has come after."""
    worker.quiets_unanswered -= 1


def handing_over(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to the second phase."""
    assert isinstance(event, m.HandingOver)
    if event.error:
        turn.say("warning", "worker-silent", generation, worker, reason=event.error)
        worker.handover_refused = True


def drained(turn: Turn, generation: m.Generation, worker: m.Worker, _: m.WorkerEvent) -> None:
    """Nothing is left in it."""
    retirement.drained(turn, generation, worker)


def parked(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to `park`: what can't be kept ends."""
    assert isinstance(event, m.Parked)
    if event.error:
        turn.say("warning", "worker-not-parked", generation, worker, reason=event.error)
        turn.dismiss(generation, worker, event.error)


def stop_taken(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to `stop`."""
    assert isinstance(event, m.StopTaken)
    if event.error:
        turn.effects.append(m.Kill(generation.id, worker.id, now=False))


def drain_told(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to the operator's drain."""
    assert isinstance(event, m.DrainTold)
    worker.drains_unanswered = max(0, worker.drains_unanswered - 1)
    if worker.drains_unanswered:
        return  # to an older one
    change = turn.state.drain_change
    if not event.error:
        if change is not None:
            change.pending.discard((generation.id, worker.id))
        return
    reason = f"worker {worker.id} of generation {generation.id} did not take the drain mode: {event.error}"
    if change is not None and (generation.id, worker.id) in change.pending:
        operator_drain.end(turn, ok=False, reason=reason)
    if comes(turn, generation) and worker.state in m.TAKING_PART:
        promotion.fail(turn, generation, reason, by=worker)
    elif worker.state is WorkerState.ACTIVATING:
        turn.kill(generation, worker, reason)
        staffing.start_failed(turn, generation, worker, reason)
    elif worker.state in m.SERVING:
        staffing.replace(turn, generation, worker, reason)


def boot_failed(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """Death before it was active."""
    assert isinstance(event, m.WorkerExited)
    del generation.workers[worker.id]
    if comes(turn, generation):
        promotion.fail(turn, generation, f"worker {worker.id} {event.reason}", event.output)
    elif turn.serves(generation):
        turn.say("error", "worker-start-failed", generation, worker, reason=event.reason, output=event.output)
        staffing.start_failed(turn, generation, worker, f"worker {worker.id} {event.reason}", event.output)


def crashed(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """Death of one that served."""
    assert isinstance(event, m.WorkerExited)
    del generation.workers[worker.id]
    turn.say("error", "worker-died", generation, worker, reason=event.reason, output=event.output)
    probation.found(turn, generation, f"worker {worker.id} {event.reason}")
    if comes(turn, generation):
        promotion.fail(turn, generation, f"worker {worker.id} {event.reason}", event.output)
    elif turn.serves(generation):
        replacement = next((o for o in generation.workers.values() if o.replaces == worker.id), None)
        if replacement is not None:
            replacement.replaces = None  # it is the respawn now
            staffing.replace_next(turn, generation)
        else:
            staffing.respawn_later(turn, generation)


def ended(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """Death of one that was leaving."""
    assert isinstance(event, m.WorkerExited)
    expected = worker.state in {WorkerState.STOPPING, WorkerState.KILLED}
    if event.status not in {0, None} and worker.cause == STOPPING_CAUSE and turn.state.stopping is not None:
        turn.state.stopping.status = turn.state.stopping.status or 1  # something was cut off
    del generation.workers[worker.id]
    level = "info" if expected else "error"
    turn.say(level, "worker-ended", generation, worker, reason=event.reason, cause=worker.cause)
    if not expected:
        probation.found(turn, generation, f"worker {worker.id} {event.reason}")
    turn.hand_over_if_quiet(generation)
    staffing.fill(turn, generation)


def code_changed(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The respawn does not take part: two codes would serve side by side under one generation's name."""
    assert isinstance(event, m.CodeChanged)
    if worker.started:
        turn.terminate(generation, worker, "its code is not its generation's")
    else:
        del generation.workers[worker.id]
    if comes(turn, generation):
        advice = "; put that code back and try again, or reload" if generation.served_until else ""
        promotion.fail(turn, generation, event.what + advice)
    if not turn.serves(generation):
        return
    reason = f"{event.what}; run a reload to move to the new code"
    if worker.replaces is not None:
        turn.say(
            "warning", "worker-not-replaced", generation, worker, reason=reason, replaces=worker.replaces
        )
        staffing.replace_later(turn, generation, worker, staffing.BACKOFF_CAP_S)
        return
    if turn.state.scaling is not None:
        staffing.undo_scaling(turn, generation, reason)
    else:
        generation.missing += 1
    turn.say("warning", "generation-short", generation, worker, reason=reason, missing=generation.missing)


def never_started(turn: Turn, generation: m.Generation, worker: m.Worker, _: m.WorkerEvent) -> None:
    """It was given up while its code was being compared, and so it hasn't even been started."""
    if not worker.started:
        del generation.workers[worker.id]
        staffing.fill(turn, generation)


def ignored(turn: Turn, _: m.Generation, __: m.Worker, ___: m.WorkerEvent) -> None:
    """Repeated, or overtaken by something that has happened since."""

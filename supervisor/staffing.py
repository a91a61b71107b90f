"""How many workers the current generation has: respawns, replacements, and the changes of their number.

One function, `fill`, compares what there is with what is wanted; the others change what is wanted, and call it.
"""

from __future__ import annotations

from segue.supervisor import model as m
from segue.supervisor import probation
from segue.supervisor.model import WorkerState
from segue.supervisor.turn import STOPPING_CAUSE, Turn

BACKOFF_FIRST_S = 0.5
BACKOFF_CAP_S = 30.0


def backoff(streak: int) -> float:
    """Seconds to wait before the next start after `streak` failed ones: at once, then doubling up to a cap."""
    return 0.0 if streak <= 0 else min(BACKOFF_CAP_S, BACKOFF_FIRST_S * 2.0 ** (streak - 1))


def respawn_later(turn: Turn, generation: m.Generation) -> None:
    """Start another one, the later the more starts have failed."""
    generation.respawn_at.append(turn.now + backoff(generation.streak))


def able(turn: Turn, generation: m.Generation) -> list[m.Worker]:
    """Its workers that could serve at once, and have what was decided about services."""
    return [
        worker
        for worker in generation.having(m.RETURNING | {WorkerState.READY})
        if worker.swaps_seen >= turn.state.swap_count
    ]


def admit(turn: Turn) -> None:
    """Let workers that became ready in the current generation serve; while a swap is undecided they wait.

    One that was started before the last swap was decided starts over with what was decided: that is nobody's fault.
    """
    state = turn.state
    if state.current is None or (state.swap is not None and not state.swap.decided):
        return
    current = state.generations[state.current]
    if not turn.serves(current):
        return
    for worker in current.having(frozenset({WorkerState.READY})):
        if worker.swaps_seen < state.swap_count:
            replaces, worker.replaces = worker.replaces, None
            turn.terminate(current, worker, "a service was swapped while it started")
            turn.spawn(current, gated=True, replaces=replaces)
        else:
            turn.activate(current, worker, probation.watch_s(turn, current))


def fill(turn: Turn, generation: m.Generation) -> None:
    """Bring the current generation to the number of workers that it shall have."""
    if not turn.serves(generation) or turn.state.ending:
        return
    replacements = {worker.replaces: worker for worker in generation.workers.values()}
    staying = generation.having(m.SERVING | m.STARTING)
    count = sum(1 for worker in staying if worker.id not in replacements) + len(generation.respawn_at)
    while count < generation.wanted:
        respawn_later(turn, generation)
        count += 1
    while count > generation.wanted and generation.respawn_at:
        generation.respawn_at.remove(max(generation.respawn_at))
        count -= 1
    # the least useful go first, and with one that would be replaced its replacement
    surplus = [worker for worker in staying if worker.replaces is None]
    surplus.sort(key=lambda worker: (_usefulness(worker), -worker.id))
    for worker in surplus[: max(0, count - generation.wanted)]:
        for leaving in (replacements.get(worker.id), worker):
            if leaving is not None:
                leaving.replaces = None
                turn.leave(generation, leaving, "fewer workers were asked for")
    replace_next(turn, generation)


def replace(turn: Turn, generation: m.Generation, worker: m.Worker, why: str) -> None:
    """Start-first: another worker of the same generation, and this one leaves when that one serves."""
    worker.replace_why = worker.replace_why or why
    replace_next(turn, generation)


def replace_next(turn: Turn, generation: m.Generation) -> None:
    """One at a time: the first that is to be replaced, and does not wait after a try that failed."""
    if not turn.serves(generation) or turn.state.ending:
        return
    if any(other.replaces is not None for other in generation.workers.values()):
        return
    leaves = turn.state.promote is not None  # then only who hangs: a canary waits for them
    for worker in generation.having(frozenset({WorkerState.HUNG}) if leaves else m.SERVING):
        if worker.replace_why and worker.deadline is None:
            turn.say("warning", "worker-replaced", generation, worker, reason=worker.replace_why)
            turn.spawn(generation, gated=True, replaces=worker.id)
            return


def start_failed(
    turn: Turn, generation: m.Generation, worker: m.Worker, reason: str, output: str = ""
) -> None:
    """One that the current generation wanted does not come: what it was for is given up, or tried again later."""
    generation.streak += 1
    if worker.replaces is not None:
        replace_later(turn, generation, worker, backoff(generation.streak))
    elif turn.state.scaling is not None:
        undo_scaling(turn, generation, reason, output)
    else:
        respawn_later(turn, generation)


def replace_later(turn: Turn, generation: m.Generation, replacement: m.Worker, delay: float) -> None:
    """The replacement does not come. Whom it was for stays until another try, and others have their turn."""
    replaced = generation.workers.get(replacement.replaces) if replacement.replaces is not None else None
    replacement.replaces = None
    if replaced is not None and replaced.state in m.SERVING:
        replaced.deadline = turn.now + delay
    replace_next(turn, generation)


def scale_asked(turn: Turn, event: m.ScaleAsked) -> None:
    """Another number of workers is wanted."""
    state = turn.state
    current = state.generations.get(state.current) if state.current is not None else None
    if state.swap is not None and state.stopping is None:
        _scale_after_swap(turn, event)
        return
    refusal = ""
    if state.stopping is not None:
        refusal = STOPPING_CAUSE
    elif state.changing or current is None:
        refusal = "a reload is running; try again when it has ended"
    elif not turn.serves(current):
        refusal = "no worker serves; try again when one does"
    elif state.scaling is not None and state.scaling.operation is not None:
        refusal = "the number of workers is being changed already"
    if refusal or current is None:
        if event.operation is not None:
            turn.settle(event.operation, ok=False, reason=refusal)
        elif state.stopping is None:
            state.scale_delta += event.delta  # its turn comes
        return
    count = event.count if event.count is not None else current.target + event.delta
    if count < 1:
        if event.operation is not None:
            turn.settle(event.operation, ok=False, reason=f"{count} workers can't serve; 1 is the least")
        return
    turn.say("info", "scale", current, None, workers=count, before=current.target)
    if state.scaling is None:
        state.scaling = m.Scaling(event.operation, current.id, current.target, current.missing)
    state.scaling.operation = event.operation  # a nudge under way is overtaken; what it began at stays
    current.target, current.missing = count, 0
    fill(turn, current)


def _scale_after_swap(turn: Turn, event: m.ScaleAsked) -> None:
    if event.operation is None:
        turn.state.scale_delta += event.delta
    elif turn.state.scale_queued is not None:
        turn.settle(event.operation, ok=False, reason="the number of workers is being changed already")
    else:
        turn.state.scale_queued = event
        turn.effects.append(m.Progress((event.operation,), "queued"))


def scale_queued(turn: Turn) -> None:
    """What was asked for while something else changed has its turn."""
    state = turn.state
    if state.current is None or state.stopping is not None or state.swap is not None or state.changing:
        return
    if state.scaling is None and state.scale_queued is not None:
        event, state.scale_queued = state.scale_queued, None
        scale_asked(turn, event)
        check_scaling(turn)  # it may be so already
    if state.scaling is None and state.scale_delta:
        delta, state.scale_delta = state.scale_delta, 0
        scale_asked(turn, m.ScaleAsked(None, delta=delta))


def refuse_queued(turn: Turn, reason: str) -> None:
    """A stop has come."""
    event, turn.state.scale_queued = turn.state.scale_queued, None
    if event is not None and event.operation is not None:
        turn.settle(event.operation, ok=False, reason=reason)


def check_scaling(turn: Turn) -> None:
    """A change of the number is over when so many serve."""
    if turn.state.scaling is not None:
        generation = turn.state.generations[turn.state.scaling.generation]
        if len(generation.having(m.SERVING)) == generation.target and not generation.having(m.STARTING):
            end_scaling(turn, ok=True)


def undo_scaling(turn: Turn, generation: m.Generation, reason: str, output: str = "") -> None:
    """It can't be done: back to the number that there was."""
    assert turn.state.scaling is not None
    generation.target = turn.state.scaling.before
    lacking = generation.target - len(generation.having(m.SERVING))  # some may have come by now
    generation.missing = max(0, min(turn.state.scaling.missing, lacking))
    end_scaling(turn, ok=False, reason=reason, output=output)
    fill(turn, generation)


def end_scaling(turn: Turn, ok: bool, reason: str = "", output: str = "") -> None:
    """Answer whoever asked for it."""
    scaling, turn.state.scaling = turn.state.scaling, None
    if scaling is not None and ok:
        turn.state.generations[scaling.generation].scaled_at = turn.now
    if scaling is not None and scaling.operation is not None:
        turn.settle(scaling.operation, ok=ok, reason=reason, output=output, generation=scaling.generation)


def _usefulness(worker: m.Worker) -> int:
    if worker.state is not WorkerState.ACTIVE:
        return 1 if worker.state is WorkerState.HUNG else 0
    return 2 if worker.replace_why else 3

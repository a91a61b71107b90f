"""The swap of one service in every worker of the current generation: all or nothing, in two phases, one at a time.

All prepare the new instance beside the old one, then one worker alone commits. What only shows in a commit, such as a
dependent that refuses the new instance, shows there, while the others haven't changed. Its confirmation is the
decision: it is recorded in the same step, and every worker that starts from then on starts with it. Until it every
failure refuses the swap for all; after it whoever does not follow is replaced by a worker that has it.

Nobody's silence is taken for an answer: a worker of which nobody knows which instance it has is replaced.
"""

from __future__ import annotations

from typing import Any

from segue.handoff.messages import ServiceRecord
from segue.supervisor import model as m
from segue.supervisor import staffing
from segue.supervisor.model import SwapPhase, Verb, WorkerState
from segue.supervisor.turn import STOPPING_CAUSE, Turn

SWAP_PREPARE_TIMEOUT_S = 900.0
"""For what never answers: workers have deadlines of their own for this, and shorter ones."""
SWAP_COMMIT_TIMEOUT_S = 60.0
SWAP_ABORT_TIMEOUT_S = 60.0
SWAP_FOLLOW_TIMEOUT_S = 120.0
"""From the decision until whoever asked is told that some worker does not follow."""
_NOT_SHOWN = frozenset({"choices", "digest", "worker"})


def asked(turn: Turn, event: m.SwapAsked) -> None:
    """Somebody wants another instance of a service: its turn comes."""
    if turn.state.stopping is not None:
        turn.settle(event.operation, ok=False, reason=STOPPING_CAUSE)
        return
    turn.state.swaps_queued += (event,)
    if len(turn.state.swaps_queued) > 1 or not _may_start(turn):
        turn.effects.append(m.Progress((event.operation,), "queued"))


def start_next(turn: Turn) -> None:
    """Begin with the first of those that wait, as soon as nothing else changes."""
    state = turn.state
    while state.swaps_queued and (_may_start(turn) or _is_hopeless(turn)):
        event, state.swaps_queued = state.swaps_queued[0], state.swaps_queued[1:]
        if state.serving:
            _start(turn, event)
        else:
            turn.settle(event.operation, ok=False, reason="no worker serves")


def check(turn: Turn) -> None:
    """What becomes of the swap that runs, by what has become of its workers and their answers."""
    swap = turn.state.swap
    if swap is not None:
        if swap.decided:
            _check_followers(turn, swap)
        else:
            _check_undecided(turn, swap)
    turn.state.swaps_told = [
        swap for swap in turn.state.swaps_told if _owes(turn, swap, m.TAKING_PART | m.RETURNING)
    ]


def died(turn: Turn, generation: m.Generation, worker: m.Worker, reason: str) -> None:
    """A worker has ended; if it takes part in what isn't decided, that is refused."""
    swap = turn.state.swap
    if swap is None or swap.decided or swap.generation != generation.id or worker.id not in swap.shares:
        return
    del swap.shares[worker.id]
    _refuse(turn, swap, f"worker {worker.id} {reason}")


def refuse_all(turn: Turn, reason: str) -> None:
    """A stop has come. What is decided goes on."""
    queued, turn.state.swaps_queued = turn.state.swaps_queued, ()
    for event in queued:
        turn.settle(event.operation, ok=False, reason=reason)
    give_up(turn, reason)


def give_up(turn: Turn, reason: str) -> None:
    """Something more urgent comes. What is decided goes on."""
    if turn.state.swap is not None and not turn.state.swap.decided:
        _refuse(turn, turn.state.swap, reason)


# -------------------------------------------------------------------------------------------------------- answers


def prepared(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to `swap prepare`."""
    assert isinstance(event, m.SwapPrepared)
    swap = _answered(turn, generation, worker, event.swap, Verb.SWAP_PREPARE)
    if swap is None:
        return
    if not event.error:
        swap.shares[worker.id].prepared = event.report
    if swap.phase is SwapPhase.UNDO:
        _abort(turn, swap, worker)
    elif event.error:
        _refuse(turn, swap, f"worker {worker.id}: {event.error}", event.code, event.details)


def committed(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to `swap commit`: of the first worker it is the decision."""
    assert isinstance(event, m.SwapCommitted)
    swap = _answered(turn, generation, worker, event.swap, Verb.SWAP_COMMIT)
    if swap is None:
        return
    if not event.error:
        swap.shares[worker.id].committed = event.report
    if event.rolled_back:
        swap.shares[worker.id].prepared = None
    if swap.phase is SwapPhase.UNDO:
        _abort(turn, swap, worker)
    elif swap.decided:
        if event.error:
            why = f"it does not follow the swap of service {swap.service}: {event.error}"
            staffing.replace(turn, generation, worker, why)
        else:
            worker.swaps_seen += 1
    elif event.error:
        _refuse(turn, swap, f"worker {worker.id}: {event.error}")
        if not event.rolled_back:
            _replace_unknown(turn, generation, worker, swap)
    else:
        _decide(turn, generation, swap, worker)


def aborted(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to `swap abort`."""
    assert isinstance(event, m.SwapAborted)
    swap = _answered(turn, generation, worker, event.swap, Verb.SWAP_ABORT)
    if swap is None or not event.error:
        return
    why = f"it did not take back the swap of service {swap.service}: {event.error}"
    turn.say("warning", "swap-not-aborted", generation, worker, reason=why)
    if swap.shares[worker.id].prepared is not None and worker.state in m.TAKING_PART:
        staffing.replace(turn, generation, worker, why)


def _answered(
    turn: Turn, generation: m.Generation, worker: m.Worker, number: int, verb: Verb
) -> m.Swap | None:
    """The swap that this is the answer to; None if no such answer is waited for."""
    swaps = [*turn.state.swaps_told, *([turn.state.swap] if turn.state.swap is not None else [])]
    for swap in swaps:
        if swap.operation == number and swap.generation == generation.id:
            share = swap.shares.get(worker.id)
            if share is not None and share.awaits is verb:
                share.awaits = None
                if verb is not Verb.SWAP_PREPARE:
                    worker.swap_due = None
                return swap
    return None


# ----------------------------------------------------------------------------------------------------------- steps


def _may_start(turn: Turn) -> bool:
    """Nothing else changes, and nobody is left with something to answer about the last swap."""
    state = turn.state
    if (
        not state.serving
        or state.changing
        or state.queued
        or state.scaling is not None
        or state.scale_queued is not None
        or state.swap is not None
        or state.stopping is not None
    ):
        return False
    assert state.current is not None
    current = state.generations[state.current]
    if any(swap.generation == current.id and _owes(turn, swap, m.TAKING_PART) for swap in state.swaps_told):
        return False
    # whom one replaces that is being activated leaves in a moment, which would refuse the swap
    return not any(worker.replaces for worker in current.having(frozenset({WorkerState.ACTIVATING})))


def _is_hopeless(turn: Turn) -> bool:
    """Nobody serves, and nobody is about to."""
    state = turn.state
    if state.serving or state.changing:
        return False
    current = state.generations.get(state.current) if state.current is not None else None
    return current is None or not (current.respawn_at or current.having(m.STARTING))


def _start(turn: Turn, event: m.SwapAsked) -> None:
    assert turn.state.current is not None
    current = turn.state.generations[turn.state.current]
    record = turn.state.services.get(event.service, ServiceRecord())
    workers = current.having(m.TAKING_PART)
    turn.effects.append(m.Progress((event.operation,), SwapPhase.PREPARE))
    for worker in workers:
        if (
            worker.state is WorkerState.HUNG
        ):  # it would not answer, and its replacement would have to wait for it
            turn.settle(event.operation, ok=False, reason=_hangs(worker), generation=current.id)
            return
    shares = {worker.id: m.Share(None) for worker in workers}
    swap = m.Swap(event.operation, event.service, current.id, record.version + 1, shares)
    turn.state.swap = swap
    for worker in workers:
        turn.swap(
            swap,
            worker,
            Verb.SWAP_PREPARE,
            SWAP_PREPARE_TIMEOUT_S,
            query=dict(event.query),
            choices=dict(record.choices),
        )


def _check_undecided(turn: Turn, swap: m.Swap) -> None:
    generation = turn.state.generations[swap.generation]
    for number in swap.shares:
        worker = generation.workers[number]
        if worker.state is WorkerState.HUNG:
            _refuse(turn, swap, _hangs(worker))
            return
        if worker.state not in m.TAKING_PART:
            _refuse(turn, swap, f"worker {number}: {worker.cause or 'it leaves'}")
            return
    reports = {number: share.prepared for number, share in swap.shares.items()}
    if swap.phase is not SwapPhase.PREPARE or not all(report is not None for report in reports.values()):
        return
    disagreement = _disagreement({number: report or {} for number, report in reports.items()})
    if disagreement:
        _refuse(turn, swap, disagreement)
        return
    active = [w for w in generation.having(frozenset({WorkerState.ACTIVE})) if w.id in swap.shares]
    if active:  # else one that is being activated will be
        swap.phase = SwapPhase.COMMIT
        turn.effects.append(m.Progress((swap.operation,), SwapPhase.COMMIT))
        turn.swap(swap, active[0], Verb.SWAP_COMMIT, SWAP_COMMIT_TIMEOUT_S)


def _disagreement(reports: dict[int, dict[str, Any]]) -> str:
    """In what workers would differ after the swap, without saying how: choices may be secret."""
    first, *others = reports
    for key in ("choices", "digest"):
        for other in others:
            if reports[other].get(key) != reports[first].get(key):
                return f"the workers disagree: worker {other} has another {key} than worker {first}"
    return ""


def _decide(turn: Turn, generation: m.Generation, swap: m.Swap, first: m.Worker) -> None:
    """From here on it is committed, whatever happens."""
    choices = (swap.shares[first.id].prepared or {}).get("choices") or {}
    turn.state.services[swap.service] = ServiceRecord(swap.version, dict(choices))
    turn.state.swap_count += 1
    first.swaps_seen += 1
    swap.phase, swap.deadline = SwapPhase.FOLLOW, turn.now + SWAP_FOLLOW_TIMEOUT_S
    turn.say("info", "swap-decided", generation, None, service=swap.service, version=swap.version)
    for number in swap.shares:
        worker = generation.workers[number]
        if worker is not first and worker.state in m.TAKING_PART:
            turn.swap(swap, worker, Verb.SWAP_COMMIT, SWAP_COMMIT_TIMEOUT_S)


def _check_followers(turn: Turn, swap: m.Swap) -> None:
    generation = turn.state.generations.get(swap.generation)
    behind = [
        worker
        for number, share in swap.shares.items()
        if share.committed is None
        and generation is not None
        and (worker := generation.workers.get(number)) is not None
        and worker.state in m.TAKING_PART
    ]
    late = swap.deadline is not None and swap.deadline <= turn.now
    if behind and not late:
        return
    turn.state.swap = None
    turn.state.swaps_told.append(swap)
    reason = ""
    if behind:
        names = "worker " + ", ".join(str(worker.id) for worker in behind)
        verb = "does not follow and is" if len(behind) == 1 else "do not follow and are"
        reason = f"it is committed, but {names} {verb} being replaced"
    turn.settle(
        swap.operation, ok=not behind, reason=reason, generation=swap.generation, result=_result(swap)
    )
    for worker in behind:
        assert generation is not None
        staffing.replace(turn, generation, worker, f"it does not follow the swap of service {swap.service}")


def _result(swap: m.Swap) -> dict[str, Any]:
    workers: list[dict[str, Any]] = []
    rewired: dict[str, None] = {}
    notes: dict[str, None] = {}
    for number, share in sorted(swap.shares.items()):
        if share.committed is not None:
            report = {**(share.prepared or {}), **share.committed}
            workers.append(
                {"worker": number} | {key: value for key, value in report.items() if key not in _NOT_SHOWN}
            )
            rewired |= dict.fromkeys(report.get("rewired") or ())
            notes |= dict.fromkeys(_notes(report.get("health")))
    return {
        "service": swap.service,
        "version": swap.version,
        "workers": workers,
        "rewired": list(rewired),
        "notes": list(notes),
    }


def _notes(health: Any) -> list[str]:
    """What an instance that is healthy wants whoever asked for it to know."""
    notes = health.get("notes") if isinstance(health, dict) else None
    return [str(note) for note in notes] if isinstance(notes, list) else []


def _refuse(
    turn: Turn, swap: m.Swap, reason: str, code: int = 409, details: dict[str, Any] | None = None
) -> None:
    """Nothing is decided, and nothing will be: whoever asked is told at once, and workers take it back."""
    generation = turn.state.generations[swap.generation]
    swap.phase, turn.state.swap = SwapPhase.UNDO, None
    turn.state.swaps_told.append(swap)
    turn.settle(swap.operation, ok=False, reason=reason, generation=generation.id, code=code, details=details)
    for number, share in swap.shares.items():
        worker = generation.workers[number]
        if share.awaits is Verb.SWAP_COMMIT:
            _replace_unknown(turn, generation, worker, swap)
        elif share.awaits is None:
            _abort(turn, swap, worker)


def _abort(turn: Turn, swap: m.Swap, worker: m.Worker) -> None:
    if worker.state is not WorkerState.KILLED:
        turn.swap(swap, worker, Verb.SWAP_ABORT, SWAP_ABORT_TIMEOUT_S)


def _replace_unknown(turn: Turn, generation: m.Generation, worker: m.Worker, swap: m.Swap) -> None:
    if worker.state in m.TAKING_PART:
        why = f"nobody knows which instance of service {swap.service} it has"
        staffing.replace(turn, generation, worker, why)


def _owes(turn: Turn, swap: m.Swap, states: frozenset[WorkerState]) -> bool:
    """Whether a worker in one of `states` has yet to answer something about it."""
    generation = turn.state.generations.get(swap.generation)
    return generation is not None and any(
        worker.id in swap.shares and swap.shares[worker.id].awaits is not None
        for worker in generation.having(states)
    )


def _hangs(worker: m.Worker) -> str:
    return f"worker {worker.id}: its event loop is silent"

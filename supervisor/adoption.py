"""What a master that has just started makes of the workers that it has found: the state that its lifecycle begins with.

Workers tell what they are; the journal tells what they were for. One rule for each mode in which a worker can be found,
whatever its master was doing when it ended: those of the current generation serve on, those of older ones go on leaving
or stay parked, those of a generation that was never promoted are ended, unless it is staged and whole. A promote that was
begun and not written down as done is finished if all of its workers are ready, else undone; one of which only some
workers were to serve is undone. If nobody accepts, since the old workers made room for new ones that never came, the
old ones serve again. Who has not answered counts as alive for as long as its generation's deadlines allow, and as
having all that it may have.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from segue.handoff.messages import WorkerMode
from segue.supervisor import memory, promotion, staffing, swaps
from segue.supervisor import model as m
from segue.supervisor.finding import Found, FoundWorker, by_generation
from segue.supervisor.model import (
    GenerationState,
    Outcome,
    PromoteKind,
    PromotePhase,
    ServicesState,
    State,
    Strategy,
    Verb,
    WorkerState,
)
from segue.supervisor.turn import SLACK_S, Turn

INTERRUPTED = "the master ended before it was done"
SILENT = "it did not answer the new master"
_SERVING = frozenset({WorkerMode.READY, WorkerMode.ACTIVE})
_LEAVING = frozenset({WorkerMode.DRAINING, WorkerMode.DRAINED})
_RETURNING = _LEAVING | {WorkerMode.QUIET, WorkerMode.PARKED}
_KEPT = frozenset({GenerationState.ACTIVE, GenerationState.DRAINING, GenerationState.PARKED})
"""What a generation can have been that can still be gone back to."""
_NOT_ACCEPTING = frozenset({"", GenerationState.BOOTING, GenerationState.STAGED, GenerationState.PARKED})
"""What one was of which no worker can have accepted when that was written down; also one that wasn't known yet."""


class Adopted(msgspec.Struct, frozen=True):
    """Where the lifecycle goes on from."""

    state: State
    effects: list[m.Effect]
    promote: str = ""
    """What became of a promote that was interrupted: ``finished`` or ``undone``."""
    promoted: tuple[int, ...] = ()
    """The operations that waited for the last promote, if it was done."""


def adopt(known: memory.Memory, found: Found, limits: Mapping[int, m.Limits], now: float) -> Adopted:
    """Put together what was written down and what was found. `limits` are those of the generations, if known."""
    grouped = by_generation(found.workers)
    state = State(
        next_generation=max(
            [
                known.numbers.generation,
                *(number + 1 for number in (*grouped, *(key[0] for key in found.refused))),
            ]
        ),
        drain_mode=known.drain_mode,
        services=dict(known.services),
        swap_count=known.numbers.swaps,
    )
    turn = Turn(state, now)
    promoting = _interrupted(known)
    current = _current(known, grouped, promoting)
    for number, workers in grouped.items():
        state.generations[number] = _generation(known, number, workers, limits, now)
    for number in known.generations.keys() - grouped.keys():
        _remember(turn, known, number, limits)
    if current is not None:
        state.current = current
        state.generations[current].state = GenerationState.ACTIVE
    for number, workers in grouped.items():
        generation = state.generations[number]
        if number == current:
            _go_on_all(turn, generation, workers)
        elif number == promoting and current is not None:
            continue
        elif _is_staged(known, generation, workers) and current is not None:
            generation.state = GenerationState.STAGED
            for worker in generation.workers.values():
                worker.state = WorkerState.READY
        else:
            kept = current is not None and _was(known, number) in _KEPT
            generation.state = GenerationState.DRAINING if kept else GenerationState.RETIRED
            _leave(turn, generation, workers)
    _miss_staged(turn, known)
    _watch_on(turn, known)
    outcome = ""
    if promoting is not None and promoting in grouped and promoting != current and current is not None:
        outcome = _conclude_promote(turn, known, state.generations[promoting], grouped[promoting])
    elif promoting is not None:
        outcome = "finished" if current == promoting else "undone"
    if state.current is not None:
        _serve_again(turn, state.generations[state.current])
        _look_after_current(turn, known, state.generations[state.current], grouped)
    done = known.promote is not None and (known.promote.committed or outcome == "finished")
    promoted = known.promote.operations if known.promote is not None and done else ()
    return Adopted(state, turn.effects, outcome, promoted)


def _interrupted(known: memory.Memory) -> int | None:
    promote = known.promote
    return promote.generation if promote is not None and not promote.committed else None


def _current(
    known: memory.Memory, grouped: Mapping[int, list[FoundWorker]], promoting: int | None
) -> int | None:
    """The generation that serves: as written down, else the newest of which a worker accepts, else the one that did.

    Who does not answer may serve, too, and who is ready will; unless another accepts that did not when the journal was
    written last.
    """
    workers = grouped.get(known.current or 0, [])
    candidates = [
        number
        for number, workers in grouped.items()
        if number != known.current and any(_accepts(worker) for worker in workers)
    ]
    since = [each for each in candidates if each != promoting and _was(known, each) in _NOT_ACCEPTING]
    if any(_accepts(worker) or (_serves(worker) and not since) for worker in workers):
        return known.current
    if since:
        return max(since)
    if promoting in candidates:
        return promoting  # it accepts, and nothing else does
    returning = any(worker.told is not None and worker.told.mode in _RETURNING for worker in workers)
    return max(candidates, default=known.current if returning else None)


def _accepts(worker: FoundWorker) -> bool:
    return worker.told is not None and worker.told.mode is WorkerMode.ACTIVE


def _serves(worker: FoundWorker) -> bool:
    return not worker.booting if worker.told is None else worker.told.mode in _SERVING


def _was(known: memory.Memory, number: int) -> str:
    """The state of a generation as it was written down."""
    written = known.generations.get(number)
    return "" if written is None else written.state


def _is_staged(known: memory.Memory, generation: m.Generation, workers: list[FoundWorker]) -> bool:
    """Whether it was staged, and all of its workers are ready."""
    ready = [each for each in workers if each.told is not None and each.told.mode is WorkerMode.READY]
    return (
        _was(known, generation.id) == GenerationState.STAGED
        and len(ready) == len(workers) >= generation.wanted
    )


def _miss_staged(turn: Turn, known: memory.Memory) -> None:
    """What was staged and is no more: whoever comes to promote it is told."""
    for number in sorted(known.generations):
        adopted = turn.state.generations.get(number)
        staged = adopted is not None and adopted.state is GenerationState.STAGED
        if _was(known, number) == GenerationState.STAGED and not staged and number != _interrupted(known):
            turn.state.staged_lost = f"generation {number} was, and has ended with its master"


def _remember(turn: Turn, known: memory.Memory, number: int, limits: Mapping[int, m.Limits]) -> None:
    """One of which no worker lives: it is kept for the rest of its time, if it is known what it was started from."""
    written = known.generations[number]
    kept = _here(written.kept_until, known)
    if number not in limits or kept is None or kept <= turn.now or written.state not in _KEPT:
        return
    generation = _generation(known, number, [], limits, turn.now)
    generation.state = GenerationState.PARKED
    turn.state.generations[number] = generation


def _here(unix: float | None, known: memory.Memory) -> float | None:
    """A time of the journal on this clock."""
    return None if unix is None else unix - known.wall


def _generation(
    known: memory.Memory,
    number: int,
    workers: list[FoundWorker],
    limits: Mapping[int, m.Limits],
    now: float,
) -> m.Generation:
    written = known.generations.get(number)
    since = now if written is None else min(now, _here(written.since, known) or now)
    generation = m.Generation(number, GenerationState.BOOTING, since=since)
    generation.limits = limits.get(number, m.Limits())
    # a journal that could not be written any more knows less than there is
    generation.target = (written.target if written is not None else 0) or len(workers)
    lacking = max(0, generation.target - len(workers))
    generation.missing = 0 if written is None else min(written.missing, lacking)
    if written is not None:
        served = now if written.state == GenerationState.ACTIVE else 0.0
        generation.served_until = _here(written.served_until, known) or served
        if written.state in _KEPT:
            generation.warm_until = _here(written.warm_until, known)
            generation.kept_until = _here(written.kept_until, known)
    most = max((worker.key[1] for worker in workers), default=0)
    generation.next_worker = max(most + 1, 0 if written is None else written.next_worker)
    for each in workers:
        generation.workers[each.key[1]] = _worker(known, each, now)
    return generation


def _worker(known: memory.Memory, found: FoundWorker, now: float) -> m.Worker:
    number, key = found.key
    worker = m.Worker(key, WorkerState.BOOTING, deadline=None, heard=now, started=True)
    worker.swaps_seen = known.numbers.swaps
    if found.told is not None:
        told = found.told
        if known.instance is not None and not _is_up_to_date(known, told.versions):
            worker.swaps_seen -= 1
        worker.handover, worker.lead = told.handover_s, told.lead
        worker.services = ServicesState.ACTIVE if told.services_active else ServicesState.IDLE
        worker.drain_mode = told.operator_drain
        return worker
    # what is written of it, if anything, may be of a time at which it was booting, or followed another
    written = known.generations.get(number)
    process = written.processes.get(key) if written is not None else None
    if found.booting:
        if known.numbers.swaps or (known.instance is not None and process is None):
            worker.swaps_seen -= 1  # nobody knows what it was started with
        return worker
    worker.swaps_seen -= 1  # nor what it has by now: it may have followed a swap that was refused
    worker.handover = (process.handover if process is not None else None) or 0.0
    worker.lead, worker.services = True, ServicesState.ACTIVE
    return worker


# ---------------------------------------------------------------------------------------------- what becomes of each


def _go_on_all(turn: Turn, generation: m.Generation, workers: list[FoundWorker]) -> None:
    """The generation that serves; or that did, and does again."""
    generation.warm_until = generation.kept_until = None
    if any(_serves(worker) for worker in workers):
        for worker in workers:
            _go_on(turn, generation, worker)
        return
    generation.state = GenerationState.DRAINING
    _leave(turn, generation, workers)


def _serve_again(turn: Turn, current: m.Generation) -> None:
    """What served last and serves nobody does so again; unless another is about to."""
    if current.state is GenerationState.DRAINING and turn.state.promote is None:
        promotion.begin(turn, current, PromoteKind.ROLLBACK, because=INTERRUPTED)
    if turn.state.promote is not None:
        promotion.check(turn)


def _go_on(turn: Turn, generation: m.Generation, found: FoundWorker) -> None:
    """One of the generation that serves."""
    worker = generation.workers[found.key[1]]
    mode = found.told.mode if found.told is not None else None
    if found.booting:
        worker.deadline = turn.now + generation.limits.ready_timeout
    elif mode is None:
        worker.state, worker.replace_why, worker.unasked = WorkerState.HUNG, SILENT, True
    elif mode is WorkerMode.ACTIVE:
        worker.state = WorkerState.ACTIVE
    elif mode is WorkerMode.READY:
        worker.state = WorkerState.READY
    elif mode is WorkerMode.QUIET:
        worker.cause = INTERRUPTED
        turn.quiet(generation, [worker])
    else:
        _end(turn, generation, worker, mode)


def _leave(turn: Turn, generation: m.Generation, workers: list[FoundWorker]) -> None:
    """Those of a generation that no longer serves, or never will."""
    quiet = []
    for found in workers:
        worker = generation.workers[found.key[1]]
        mode = found.told.mode if found.told is not None else None
        if found.booting or mode is WorkerMode.READY:
            turn.terminate(generation, worker, "it is no longer needed")
        elif mode is None:
            _end(turn, generation, worker, WorkerMode.DRAINING)
            worker.handover_refused = True  # it is told when it shows that it is alive
        elif mode in {WorkerMode.ACTIVE, WorkerMode.QUIET}:
            quiet.append(worker)
        elif mode is WorkerMode.PARKED:
            worker.state = WorkerState.PARKED
            gone = generation.warm_until is None or generation.state is GenerationState.RETIRED
            if gone and generation.id != turn.state.current:
                turn.dismiss(generation, worker, "it is no longer needed")
        else:
            _end(turn, generation, worker, mode)
    turn.quiet(generation, quiet)


def _end(turn: Turn, generation: m.Generation, worker: m.Worker, mode: WorkerMode) -> None:
    if mode in _LEAVING:
        worker.state = WorkerState.DRAINING
        worker.deadline = turn.now + generation.limits.drain_timeout + SLACK_S
    else:
        worker.state = WorkerState.STOPPING
        worker.deadline = turn.now + generation.limits.stop_timeout + 2 * SLACK_S


def _conclude_promote(
    turn: Turn, known: memory.Memory, generation: m.Generation, workers: list[FoundWorker]
) -> str:
    """The generation of a promote that was begun: all are ready, and it is finished; else nothing of it is left."""
    assert known.promote is not None
    modes = [found.told.mode for found in workers if found.told is not None]
    generation.state = GenerationState.ACTIVATING
    turn.state.promote = m.Promote(
        generation.id,
        turn.state.current,
        known.promote.kind,
        PromotePhase.ACTIVATE,
        Strategy.SURGE,
        asof=turn.now,
        because=known.promote.because,
    )
    able = _SERVING | _RETURNING if generation.served_until else _SERVING
    outdated = [w for w in generation.workers.values() if w.swaps_seen < turn.state.swap_count]
    fresh = len(workers) - len(outdated)
    if (written := known.generations.get(generation.id)) is not None:
        generation.missing = min(written.missing, max(0, generation.target - fresh))
    whole = len(modes) == len(workers) and all(mode in able for mode in modes) and fresh >= generation.wanted
    for found in workers:
        worker = generation.workers[found.key[1]]
        mode = found.told.mode if found.told is not None else None
        if mode is WorkerMode.ACTIVE:
            worker.state = WorkerState.ACTIVE
        elif mode is WorkerMode.READY:
            worker.state = WorkerState.READY
        elif mode is WorkerMode.PARKED:
            worker.state = WorkerState.PARKED
        elif mode is WorkerMode.QUIET:
            worker.state = WorkerState.ACTIVATING  # what it has, it hands back
        elif mode is not None and mode is not WorkerMode.BOOTING:
            _end(turn, generation, worker, mode)
    if not whole or known.promote.mixed:
        promotion.fail(turn, generation, INTERRUPTED)
        return "undone"
    for worker in outdated:
        if worker.state is WorkerState.PARKED:
            turn.dismiss(generation, worker, promotion.OUTDATED)
        else:
            turn.leave(generation, worker, promotion.OUTDATED)
    for worker in generation.having(frozenset({WorkerState.READY, WorkerState.ACTIVATING}) | m.RETURNING):
        if worker not in outdated:
            turn.activate(generation, worker)
    return "finished"


def _watch_on(turn: Turn, known: memory.Memory) -> None:
    """A probation goes on for what is left of it. What its workers have answered is told by them from their start on."""
    written = known.probation
    if written is None:
        return
    if written.generation != turn.state.current:
        turn.effects.append(m.ProbationEnded(written.generation, Outcome.STOPPED, INTERRUPTED))
        return
    until = _here(written.until, known) or turn.now
    turn.state.probation = m.Probation(
        written.generation,
        written.previous,
        until,
        (0, 0),
        (0, 0),
        written.share_before,
        written.breach,
    )


def _look_after_current(
    turn: Turn, known: memory.Memory, current: m.Generation, grouped: Mapping[int, list[FoundWorker]]
) -> None:
    """What its workers were told, or not, of what concerns them all."""
    for found in grouped[current.id]:
        worker, told = current.workers[found.key[1]], found.told
        if told is None or worker.state not in m.SERVING:
            continue
        if worker.drain_mode != turn.state.drain_mode:
            turn.tell_drain(current, worker)
        if worker.services is ServicesState.ACTIVE:  # and may be about to cease, as it was told before
            worker.services, worker.services_retry = ServicesState.ACTIVATING, turn.now
        if known.instance is not None:  # else nobody knows what was decided
            _compare_services(turn, known, current, worker, told.versions)
    if known.swap is not None:
        _give_up_swap(turn, known.swap, current)
    leaving = {GenerationState.DRAINING, GenerationState.RETIRED, GenerationState.FAILED}
    turn.state.drained_watch[current.id] = frozenset(
        each.id for each in turn.state.generations.values() if each is not current and each.state in leaving
    )
    staffing.fill(turn, current)


def _decided(known: memory.Memory, service: str) -> int:
    record = known.services.get(service)
    return 1 if record is None else record.version


def _is_up_to_date(known: memory.Memory, versions: Mapping[str, int]) -> bool:
    return all(version == _decided(known, name) for name, version in versions.items())


def _compare_services(
    turn: Turn, known: memory.Memory, current: m.Generation, worker: m.Worker, versions: Mapping[str, int]
) -> None:
    for name, version in versions.items():
        decided = _decided(known, name)
        if version != decided:
            why = f"its service {name} is version {version}, and {decided} was decided"
            staffing.replace(turn, current, worker, why)


def _give_up_swap(turn: Turn, written: memory.Swap, current: m.Generation) -> None:
    """It was not decided: what workers have prepared is taken back."""
    swap = m.Swap(written.operation, written.service, current.id, written.version, {})
    swap.phase = m.SwapPhase.UNDO
    for worker in current.having(frozenset({WorkerState.ACTIVE})):
        swap.shares[worker.id] = m.Share(None)
        turn.swap(swap, worker, Verb.SWAP_ABORT, swaps.SWAP_ABORT_TIMEOUT_S)
    turn.state.swaps_told.append(swap)

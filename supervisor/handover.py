"""Which workers' services take work of their own, and how that passes from one worker to another.

A pure function of the state, `check`, looked at after every event: services are active in the workers of the current
generation that serve, and cease in those that leave. Those that one worker alone may have active belong to the *lead*.
Who may have them keeps that mark until it has confirmed that it gave them up, or is dead; as long as one worker has
it, no other gets it. So nothing that gets lost or is late can make two of them, at worst there is none for a while.

Rejected: to pass the lead on at a deadline. The old one may only be slow to answer, and two consumers of one
subscription do more harm than none.
"""

from __future__ import annotations

from segue.supervisor import model as m
from segue.supervisor.model import ServicesState, State, WorkerState
from segue.supervisor.turn import Turn

RETRY_S = 5.0
"""When a worker is told again of what it did not take."""


def check(turn: Turn) -> None:
    """Tell those that are to give up, and those that may take over."""
    for generation in turn.state.generations.values():
        for worker in generation.workers.values():
            if worker.handover is not None and not _keeps(turn.state, generation, worker):
                _give_up(turn, generation, worker)
            if worker.blocks_until is not None and (
                worker.services is ServicesState.IDLE or worker.blocks_until <= turn.now
            ):
                worker.blocks_until = None
    if turn.state.current is not None:
        _take_over(turn, turn.state.generations[turn.state.current])


def next_deadline(worker: m.Worker) -> float | None:
    """When something is to be done about its services; None for nothing."""
    retry = worker.services_retry if worker.state in _TOLD else None
    return min((time for time in (retry, worker.blocks_until) if time is not None), default=None)


def activated(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to `services activate`. After a failure nobody knows what it has, so it is told the same again."""
    assert isinstance(event, m.ServicesActivated)
    if not _is_last_answer(worker) or worker.services is not ServicesState.ACTIVATING:
        return  # it has been told to give up since
    if event.error:
        _failed(turn, generation, worker, event.error)
        return
    worker.services = ServicesState.ACTIVE
    turn.say("info", "services-active", generation, worker, role="lead" if worker.lead else "")


def deactivated(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """The answer to `services deactivate`: only this says for certain that a living worker has given up."""
    assert isinstance(event, m.ServicesDeactivated)
    if not _is_last_answer(worker) or worker.services is not ServicesState.DEACTIVATING:
        return  # it has been told to take over since, and perhaps to give up again
    if event.error:
        _failed(turn, generation, worker, event.error)
        return
    worker.services, worker.lead = ServicesState.IDLE, False
    turn.say("info", "services-idle", generation, worker)


def _is_last_answer(worker: m.Worker) -> bool:
    worker.services_unanswered -= 1
    return not worker.services_unanswered


_TOLD = frozenset({WorkerState.ACTIVE}) | m.RETURNING
"""Who is told of its services: one that hangs doesn't hear, and one that stops gives up by itself."""


def _keeps(state: State, generation: m.Generation, worker: m.Worker) -> bool:
    return generation.id == state.current and worker.state in m.SERVING


def _give_up(turn: Turn, generation: m.Generation, worker: m.Worker) -> None:
    assert worker.handover is not None
    told = worker.state in _TOLD
    if worker.services in {ServicesState.ACTIVE, ServicesState.ACTIVATING}:
        worker.services, worker.services_retry = ServicesState.DEACTIVATING, turn.now
        worker.blocks_until = turn.now + worker.handover
        if told:  # else as soon as it can be, whatever it shall do by then
            turn.deactivate_services(generation, worker)
    elif told and worker.services_retry is not None and worker.services_retry <= turn.now:
        turn.deactivate_services(generation, worker)


def _take_over(turn: Turn, current: m.Generation) -> None:
    everybody = [w for g in turn.state.generations.values() for w in g.workers.values()]
    free = all(worker.blocks_until is None for worker in everybody)
    candidates = [
        w for w in current.having(frozenset({WorkerState.ACTIVE})) if w.handover is not None
    ]  # in the order of their start
    lead = None if any(worker.lead for worker in everybody) else _choose(candidates, free)
    for worker in candidates:
        starts = worker.services is ServicesState.IDLE and free
        again = worker.services_retry is not None and worker.services_retry <= turn.now
        if starts or again or worker is lead:
            turn.activate_services(current, worker, worker is lead)


def _choose(candidates: list[m.Worker], free: bool) -> m.Worker | None:
    """The oldest that stays; one that is to be replaced only if there is no other. Not one that has just failed."""
    able = [worker for worker in candidates if worker.services_retry is None]
    best = min(able, key=lambda worker: bool(worker.replace_why), default=None)
    if best is None or best.services is ServicesState.ACTIVATING:
        return None  # it will have answered soon
    return best if best.services is ServicesState.ACTIVE or free else None


def _failed(turn: Turn, generation: m.Generation, worker: m.Worker, error: str) -> None:
    turn.say("warning", "services-not-told", generation, worker, reason=error)
    worker.services_retry = turn.now + RETRY_S

"""The lifecycle of generations and workers: ``step(state, event, now) -> (state, effects)``, and nothing else.

No clock, no process, no socket, no logging: everything that happens comes in as an event, everything that shall
happen goes out as an effect, so the same code runs under the master and in a simulator with faults. What a
message of a worker means in which state is the table `WORKER`; which state may follow on which is
`segue.supervisor.model.TRANSITIONS`. Messages repeat, come late and get lost: the table is total, and what comes too
late is named as such.

Rejected: objects that carry out their own transitions (orders can't be tested without processes), and coroutines
per generation (their state hides in stack frames, which nobody can list, copy or compare).

`turn` is one step and what can be told to a worker; `succession` brings generations up, `promotion` makes one the
current one, `probation` watches that for a while, `staffing` keeps that at its number, and `retirement` is what becomes of the old ones; `swaps` replaces one
service in all workers, `handover` says whose services take work; `stopping` ends it all. `reports` is what workers say, and
`overdue` what they, or others, don't.
"""

from __future__ import annotations

from collections.abc import Callable

from segue.supervisor import (
    handover,
    operator_drain,
    overdue,
    probation,
    promotion,
    reports,
    retirement,
    staffing,
    stopping,
    succession,
    swaps,
)
from segue.supervisor import model as m
from segue.supervisor.model import State, WorkerState
from segue.supervisor.overdue import next_deadline
from segue.supervisor.succession import PREPARE_TIMEOUT_S
from segue.supervisor.turn import Turn

__all__ = ["PREPARE_TIMEOUT_S", "WORKER", "next_deadline", "step"]


def step(state: State, event: m.Event, now: float) -> tuple[State, list[m.Effect]]:
    """What `event` at time `now` makes of `state`, and what the shell has to do about it. `state` stays as it was."""
    turn = Turn(state.clone(), now)
    _handle(turn, event)
    return turn.state, turn.effects


def _handle(turn: Turn, event: m.Event) -> None:
    if isinstance(event, m.WorkerEvent):
        _worker_event(turn, event)
    else:
        _EVENTS[type(event)](turn, event)
    _conclude(turn)


def _conclude(turn: Turn) -> None:
    """What may have come to its end, or to its next step, by what happened, whatever that was."""
    operator_drain.check(turn)
    swaps.check(turn)
    probation.check(turn)
    promotion.check(turn)
    succession.check(turn)  # what waited for the end of that
    promotion.check(turn)
    retirement.check(turn)
    stopping.check(turn)
    staffing.admit(turn)
    staffing.check_scaling(turn)
    succession.recover_if_due(turn)
    succession.recover_if_lost(turn)
    succession.start_queued(turn)
    staffing.scale_queued(turn)
    swaps.start_next(turn)
    handover.check(turn)


def _worker_event(turn: Turn, event: m.WorkerEvent) -> None:
    generation = turn.state.generations.get(event.generation)
    worker = generation.workers.get(event.worker) if generation else None
    if generation is None or worker is None:
        return  # of a process that has already ended
    if not isinstance(event, m.WorkerExited | m.CodeChanged) and not getattr(event, "error", ""):
        worker.heard, worker.doubted, worker.started = turn.now, None, True
    if isinstance(event, m.WorkerExited):
        swaps.died(turn, generation, worker, event.reason)
    WORKER[type(event), worker.state](turn, generation, worker, event)


_Handler = Callable[[Turn, m.Generation, m.Worker, m.WorkerEvent], None]


_CALLED = ("activating", "active", "hung", "quieting", "quiet", "draining", "parked")
"""Where a worker may have been told something about a drain or a swap."""


_ONCE_CALLED = (*_CALLED, "stopping", "killed")
"""Where the answer to that may still come."""


def _row(
    event: type[m.WorkerEvent], **columns: _Handler
) -> dict[tuple[type[m.WorkerEvent], WorkerState], _Handler]:
    """One event's row of the table; what isn't named comes too late, or again, and is ignored."""
    return {(event, state): columns.get(state.name.lower(), reports.ignored) for state in WorkerState}


WORKER: dict[tuple[type[m.WorkerEvent], WorkerState], _Handler] = {
    **_row(m.WorkerPhased, booting=reports.boot_phase),
    **_row(m.WorkerReady, booting=reports.became_ready, hung=reports.woke_up),
    **_row(m.WorkerBeat, hung=reports.woke_up, draining=reports.hand_over_again),
    **_row(m.WorkerAsks, active=reports.asks),
    **_row(m.Activated, activating=reports.activated, active=reports.activated_again),
    **_row(m.Quieted, **dict.fromkeys(_ONCE_CALLED, reports.quieted_earlier) | {"quieting": reports.quieted}),
    **_row(m.HandingOver, draining=reports.handing_over),
    **_row(m.WorkerDrained, draining=reports.drained, hung=reports.woke_up),
    **_row(m.Parked, parked=reports.parked),
    **_row(
        m.ResponsesCounted, **dict.fromkeys((state.name.lower() for state in WorkerState), probation.counted)
    ),
    **_row(m.StopTaken, stopping=reports.stop_taken),
    **_row(m.DrainTold, **dict.fromkeys(_CALLED, reports.drain_told)),
    **_row(m.SwapPrepared, **dict.fromkeys(_CALLED, swaps.prepared)),
    **_row(m.SwapCommitted, **dict.fromkeys(_CALLED, swaps.committed)),
    **_row(m.SwapAborted, **dict.fromkeys(_CALLED, swaps.aborted)),
    **_row(m.ServicesActivated, **dict.fromkeys(_ONCE_CALLED, handover.activated)),
    **_row(m.ServicesDeactivated, **dict.fromkeys(_ONCE_CALLED, handover.deactivated)),
    **_row(
        m.WorkerExited,
        booting=reports.boot_failed,
        ready=reports.boot_failed,
        activating=reports.boot_failed,
        active=reports.crashed,
        hung=reports.crashed,
        quieting=reports.ended,
        quiet=reports.ended,
        draining=reports.ended,
        parked=reports.ended,
        stopping=reports.ended,
        killed=reports.ended,
    ),
    **_row(
        m.CodeChanged,
        booting=reports.code_changed,
        stopping=reports.never_started,
        killed=reports.never_started,
    ),
}
"""What each message of or about a worker means in each of its states. Total: states × events."""

_EVENTS: dict[type[m.Event], Callable[[Turn, m.Event], None]] = {
    m.ReloadAsked: succession.reload_asked,  # type: ignore[dict-item]
    m.StageAsked: succession.stage_asked,  # type: ignore[dict-item]
    m.PromoteAsked: promotion.asked,  # type: ignore[dict-item]
    m.RollbackAsked: promotion.rollback_asked,  # type: ignore[dict-item]
    m.DiscardAsked: succession.discard_asked,  # type: ignore[dict-item]
    m.ScaleAsked: staffing.scale_asked,  # type: ignore[dict-item]
    m.DrainAsked: operator_drain.asked,  # type: ignore[dict-item]
    m.SwapAsked: swaps.asked,  # type: ignore[dict-item]
    m.StopAsked: stopping.asked,  # type: ignore[dict-item]
    m.Prepared: succession.prepared,  # type: ignore[dict-item]
    m.PrepareFailed: succession.prepare_failed,  # type: ignore[dict-item]
    m.Checked: succession.checked,  # type: ignore[dict-item]
    m.Paused: overdue.paused,  # type: ignore[dict-item]
    m.TimePassed: overdue.time_passed,  # type: ignore[dict-item]
}

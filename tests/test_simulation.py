"""The simulator finds what it is there for: a share of it in each run of the tests, and three rules that are broken on purpose.

`make simulate` has more time. A breach is found within the share, or the share is too small.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import pytest
from reached import Reached, cells
from simulate import STEPS, execute, plan, report, simulate

from segue.supervisor import lifecycle, promotion, staffing
from segue.supervisor import model as m
from segue.supervisor.model import Outcome, PromotePhase, Strategy, Verb, WorkerState
from segue.supervisor.turn import Turn

COUNTED_APART = {m.Command, m.SwapCommand, m.Settle, m.ProbationEnded, m.Exit}
PHASES = (
    (Strategy.SURGE, PromotePhase.CANARY),
    (Strategy.SURGE, PromotePhase.ACTIVATE),
    (Strategy.ROLLING, PromotePhase.ROLLING),
    (Strategy.REPLACE, PromotePhase.CLEAR),
    (Strategy.REPLACE, PromotePhase.ACTIVATE),
)
SHARE = 30_000
"""Events."""


def test_no_rule_is_broken_in_a_share_of_the_simulation() -> None:
    failure = simulate("the share of the tests", SHARE, jobs=1).failure
    assert failure is None, report(failure)


def test_a_seed_reproduces_a_run() -> None:
    first, second = (execute(plan("again", 7)) for _ in range(2))
    assert first == second
    assert plan("again", 7) == plan("again", 7) != plan("again", 8)


def promoted_too_early(patch: pytest.MonkeyPatch) -> None:
    """The first worker that confirms is taken for all of them."""
    real = lifecycle.WORKER[m.Activated, WorkerState.ACTIVATING]

    def activated(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        if generation.id != turn.state.current and not getattr(event, "error", ""):
            for other in generation.workers.values():
                if other.state is WorkerState.ACTIVATING:
                    other.state, other.deadline = WorkerState.ACTIVE, None
            worker.state = WorkerState.ACTIVATING
        real(turn, generation, worker, event)

    table: dict[Any, Any] = lifecycle.WORKER
    patch.setitem(table, (m.Activated, WorkerState.ACTIVATING), activated)


def replaced_before_the_other_serves(patch: pytest.MonkeyPatch) -> None:
    """A worker that is to be replaced leaves at once, and another one is started after."""

    def replace(turn: Turn, generation: m.Generation, worker: m.Worker, why: str) -> None:
        turn.leave(generation, worker, why)
        staffing.fill(turn, generation)

    patch.setattr(staffing, "replace", replace)


def an_answer_twice(patch: pytest.MonkeyPatch) -> None:
    """Whoever is refused is told so by the generation that failed, and again by the one that follows."""
    real = promotion.fail

    def fail(turn: Turn, generation: m.Generation, reason: str, output: str = "") -> None:
        change = turn.state.change
        waiting = change.operations if change is not None and change.generation == generation.id else ()
        real(turn, generation, reason, output)
        for operation in waiting:
            turn.settle(operation, ok=False, reason=reason)

    patch.setattr(promotion, "fail", fail)


@pytest.mark.parametrize("breach", [promoted_too_early, replaced_before_the_other_serves, an_answer_twice])
def test_a_rule_that_is_broken_on_purpose_is_found_and_told_in_few_steps(
    breach: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breach(monkeypatch)
    failure = simulate("the share of the tests", SHARE, jobs=1).failure
    assert failure is not None
    assert len(failure.run.steps) <= STEPS // 4, "it is cut down to what matters"
    assert failure.trace
    assert failure.run.name in report(failure)


def test_everything_happens_in_a_share_of_the_simulation() -> None:
    """A simulation in which something never happens shows nothing about it."""
    reached = Reached()
    failure = simulate("everything", SHARE, jobs=1, reached=reached).failure
    assert failure is None, report(failure)
    asked = {
        f"{what}Asked" for what in ("Reload", "Stage", "Promote", "Discard", "Rollback", "Swap", "Drain")
    }
    wanted = {
        *(("event", event.__name__) for event in typing.get_args(m.Event) if event is not m.WorkerEvent),
        *(("event", event.__name__) for event in m.WorkerEvent.__subclasses__()),
        *(("effect", effect.__name__) for effect in typing.get_args(m.Effect) if effect not in COUNTED_APART),
        *(("told", verb) for verb in Verb),
        *(("answer", kind, outcome) for kind in asked for outcome in ("ok", "refused")),
        *(("promote", "reload", strategy, phase) for strategy, phase in PHASES),
        *(("probation", outcome) for outcome in (Outcome.PASSED, Outcome.ROLLED_BACK, Outcome.SUPERSEDED)),
        *(("exit", status) for status in ("0", "1", "3")),
    }
    assert not wanted - reached.keys()
    missed = cells() - {key[1:] for key in reached if key[0] == "cell"}
    assert len(missed) < len(cells()) / 2, f"of the table this was not reached: {sorted(missed)}"

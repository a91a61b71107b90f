"""The simulator finds what it is there for: a share of it in each run of the tests, and three rules that are broken on purpose.

`make simulate` has more time. A breach is found within the share, or the share is too small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from simulate import STEPS, execute, plan, report, simulate

from segue.supervisor import lifecycle, promotion, staffing
from segue.supervisor import model as m
from segue.supervisor.model import Verb, WorkerState
from segue.supervisor.turn import Turn

SHARE = 30_000
"""Events."""


def test_no_rule_is_broken_in_a_share_of_the_simulation() -> None:
    _, _, failure = simulate("the share of the tests", SHARE, jobs=1)
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
    _, _, failure = simulate("the share of the tests", SHARE, jobs=1)
    assert failure is not None
    assert len(failure.run.steps) <= STEPS // 4, "it is cut down to what matters"
    assert failure.trace
    assert failure.run.name in report(failure)


def test_every_verb_is_told_to_some_worker() -> None:
    """A simulation in which something never happens shows nothing about it."""
    told: set[Verb] = set()
    for number in range(60):
        _, failure = execute(plan("coverage", number), told=told)
        assert failure is None, report(failure)
    assert told == set(Verb)

"""The lifecycle alone, in random orders: whatever happens, in whatever order, the "Never" list holds.

`SEGUE_DEEP=1` tries many more orders than a run of all tests has time for.
"""

from __future__ import annotations

import itertools
import os
from random import Random
from typing import Any

import msgspec
import pytest
from actions import ACTIONS, NAMES, Step, finish
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from simulated_worker import CODES
from simulator import LIMITS, World

from segue.supervisor import lifecycle
from segue.supervisor import model as m
from segue.supervisor.model import WorkerState

_COMMON: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", derandomize=True, max_examples=200, stateful_step_count=40, **_COMMON)
settings.register_profile("deep", max_examples=20_000, stateful_step_count=60, print_blob=True, **_COMMON)
DEEP = bool(os.environ.get("SEGUE_DEEP"))
PROFILE = settings.get_profile("deep" if DEEP else "ci")


class AnyOrder(RuleBasedStateMachine):
    """An operator, code, a host and workers that do what they like; `simulator.World` checks every step."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @initialize(
        workers=st.integers(1, 3),
        behaviour=st.sampled_from(("good", "good", "good", *CODES)),
        ready=st.booleans(),
        services=st.sampled_from((True, True, True, False)),
        mortal=st.booleans(),
        deploys=st.fixed_dictionaries(
            {
                "park_for": st.sampled_from((0.0, 10.0, 100.0)),
                "probation": st.sampled_from((0.0, 10.0, 100.0)),
                "strategy": st.sampled_from((m.Strategy.SURGE, m.Strategy.SURGE, *m.Strategy)),
                "replace_timeout": st.just(5.0),
                "canary": st.sampled_from((0, 0, 1, 2)),
                "canary_for": st.sampled_from((5.0, 100.0)),
            }
        ),
    )
    def start(
        self,
        workers: int,
        behaviour: str,
        ready: bool,
        services: bool,
        mortal: bool,
        deploys: dict[str, Any],
    ) -> None:
        limits = msgspec.structs.replace(LIMITS, **deploys)
        self.world = World(workers, limits) if services else World(workers, limits, handover=None)
        self.world.journals = mortal
        self.world.behaviour = behaviour
        self.world.reload()
        if ready:
            self.world.run(5.0)

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 99))
    def step(self, name: str, seed: int) -> None:
        Step(name, ACTIONS[name].draw(Random(seed)))(self.world)

    def teardown(self) -> None:
        finish(self.world)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = PROFILE
setattr(TestAnyOrder, "pytestmark", [pytest.mark.timeout(7200 if DEEP else 120)])  # noqa: B010


def events_about_workers() -> list[type[m.WorkerEvent]]:
    return m.WorkerEvent.__subclasses__()


def test_the_table_of_workers_is_total() -> None:
    pairs = set(itertools.product(events_about_workers(), WorkerState))
    assert set(lifecycle.WORKER) == pairs

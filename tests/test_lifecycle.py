"""The lifecycle alone, in random orders: whatever happens, in whatever order, the "Never" list holds.

`SEGUE_DEEP=1` tries many more orders than a run of all tests has time for.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulator import CODES, FAULTS, LIMITS, SETTINGS, WEATHERS, WHO, Process, World

from segue.supervisor import lifecycle
from segue.supervisor import model as m
from segue.supervisor.model import WorkerState

_COMMON: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", derandomize=True, max_examples=200, stateful_step_count=40, **_COMMON)
settings.register_profile("deep", max_examples=20_000, stateful_step_count=60, print_blob=True, **_COMMON)
DEEP = bool(os.environ.get("SEGUE_DEEP"))
PROFILE = settings.get_profile("deep" if DEEP else "ci")

generations = st.sampled_from((None, None, 1, 2, 3, 4))
picks = st.integers(min_value=0, max_value=5)


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

    def pick(self, number: int) -> Process | None:
        live = self.world.live()
        return live[number % len(live)] if live else None

    # What is asked

    @rule()
    def reload(self) -> None:
        self.world.reload()

    @rule(behaviour=st.sampled_from(("good", *CODES)))
    def save(self, behaviour: str) -> None:
        self.world.deploy(behaviour)
        self.world.save()

    @rule(behaviour=st.sampled_from(("good", *CODES)))
    def deploy_and_reload(self, behaviour: str) -> None:
        self.world.deploy(behaviour)
        self.world.reload()

    @rule()
    def stage(self) -> None:
        self.world.stage()

    @rule(generation=generations)
    def promote(self, generation: int | None) -> None:
        self.world.promote(generation)

    @rule(generation=generations)
    def discard(self, generation: int | None) -> None:
        self.world.discard(generation)

    @rule(generation=generations)
    def rollback(self, generation: int | None) -> None:
        self.world.rollback(generation)

    @rule(count=st.integers(-1, 4))
    def scale(self, count: int) -> None:
        self.world.scale(count)

    @rule(delta=st.sampled_from((1, -1)))
    def nudge(self, delta: int) -> None:
        self.world.nudge(delta)

    @rule(mode=st.sampled_from(("reject", "queue", None)))
    def drain(self, mode: str | None) -> None:
        self.world.drain(mode)

    @rule(service=st.sampled_from(("model", "limits")))
    def swap(self, service: str) -> None:
        self.world.swap(service, name="other")

    @rule(fault=st.sampled_from(FAULTS), who=st.sampled_from(WHO))
    def services_do_wrong(self, fault: str, who: str) -> None:
        if self.world.faults.pop(fault, None) is None:
            self.world.faults[fault] = who

    @rule(fault=st.sampled_from(FAULTS), who=st.sampled_from(WHO), seconds=st.sampled_from((0.4, 0.6, 70.0)))
    def swap_with_a_fault(self, fault: str, who: str, seconds: float) -> None:
        self.world.faults[fault] = who
        self.world.swap()
        self.world.run(seconds)

    @precondition(lambda self: len(self.world.answers) > 3 or self.world.state.stopping is not None)
    @rule(
        at_once=st.sampled_from((False, False, True)),
        delay=st.sampled_from((0.0, 4.0)),
        by_signal=st.booleans(),
    )
    def stop(self, at_once: bool, delay: float, by_signal: bool) -> None:
        (self.world.signal_stop if by_signal else self.world.stop)(at_once, delay)

    # What goes wrong

    @rule(behaviour=st.sampled_from(CODES))
    def deploy(self, behaviour: str) -> None:
        self.world.deploy(behaviour)

    @precondition(lambda self: self.world.state.current is not None)
    @rule()
    def restore(self) -> None:
        self.world.restore(self.world.state.current or 0)

    @rule(settings_are=st.sampled_from(SETTINGS), workers=st.integers(1, 3))
    def edit_settings(self, settings_are: str, workers: int) -> None:
        self.world.settings, self.world.workers_setting = settings_are, workers

    @rule(number=picks)
    def crash(self, number: int) -> None:
        if (process := self.pick(number)) is not None:
            self.world.crash(process)

    @rule(number=picks)
    def hang_or_wake(self, number: int) -> None:
        if (process := self.pick(number)) is not None:
            (self.world.wake if process.hung else self.world.hang)(process)

    @rule(number=picks, count=st.sampled_from((1, 30)), errors=st.sampled_from((0, 0, 1)))
    def respond(self, number: int, count: int, errors: int) -> None:
        if (process := self.pick(number)) is not None:
            self.world.respond(process, count, errors * count)

    @rule(number=picks, work_s=st.sampled_from((0.0, 30.0, 1000.0)))
    def keep_busy(self, number: int, work_s: float) -> None:
        if (process := self.pick(number)) is not None:
            process.work_s = work_s

    @rule(number=picks)
    def ask_to_be_replaced(self, number: int) -> None:
        if (process := self.pick(number)) is not None:
            process.wants_recycling = not process.wants_recycling

    @rule(weather=st.sampled_from(WEATHERS))
    def weather(self, weather: str) -> None:
        self.world.turn(weather, weather not in self.world.weather)

    @precondition(lambda self: self.world.last_messages)
    @rule(number=st.integers(0, 29))
    def repeat_a_message(self, number: int) -> None:
        messages = self.world.last_messages
        self.world.put(messages[number % len(messages)])

    @rule(seconds=st.sampled_from((3.0, 40.0)))
    def pause_the_master(self, seconds: float) -> None:
        self.world.pause(seconds)

    @precondition(lambda self: self.world.state.stopping is None)
    @rule(downtime=st.sampled_from((0.0, 0.3, 3.0)))
    def kill_the_master(self, downtime: float) -> None:
        self.world.kill_master(downtime)

    @precondition(lambda self: self.world.state.stopping is None)
    @rule(effects=st.integers(0, 4))
    def kill_the_master_in_its_next_step(self, effects: int) -> None:
        self.world.dies_after = effects

    @rule()
    def upgrade_the_master(self) -> None:
        self.world.upgrade()

    # Time

    @rule(first=st.booleans())
    def next_thing(self, first: bool) -> None:
        self.world.deadlines_first = first
        if self.world.exit is None:
            self.world.advance()

    @rule(seconds=st.sampled_from((0.02, 0.2, 1.1, 6.0, 15.0, 70.0)))
    def time(self, seconds: float) -> None:
        self.world.run(seconds)

    def teardown(self) -> None:
        world = self.world
        if not (world.asked or world.lost):
            return
        world.dies_after = None
        if world.state.stopping is None:
            world.heal()
            if world.exit is None:
                current = world.state.generations.get(world.state.current or 0)
                if current is None or current.missing or world.releases[current.id][0] != world.code:
                    world.reload()  # what is offered to an operator whose code has changed in place
                    world.run(200.0)
                world.check_settled()
        world.end()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = PROFILE
setattr(TestAnyOrder, "pytestmark", [pytest.mark.timeout(7200 if DEEP else 120)])  # noqa: B010


def events_about_workers() -> list[type[m.WorkerEvent]]:
    return m.WorkerEvent.__subclasses__()


def test_the_table_of_workers_is_total() -> None:
    pairs = set(itertools.product(events_about_workers(), WorkerState))
    assert set(lifecycle.WORKER) == pairs

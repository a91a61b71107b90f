"""The lifecycle alone: a canary first, one worker at a time, and what can't run twice."""

from __future__ import annotations

from typing import Any

import pytest
from simulator import LIMITS, World
from test_lifecycle_probation import outcomes, respond
from test_lifecycle_promotion import answered, calm, commands, serving, spawns, staged, started, state_of

from segue.supervisor import lifecycle
from segue.supervisor import model as m
from segue.supervisor.model import GenerationState, Outcome, PromotePhase, Strategy, Verb, WorkerState

QUIET = frozenset({WorkerState.QUIET})


def phases(world: World, operation: int) -> list[str]:
    return [e.phase for e in world.log if isinstance(e, m.Progress) and operation in e.operations]


def until_phase(world: World, phase: PromotePhase) -> m.Promote:
    world.run_until(lambda: world.state.promote is not None and world.state.promote.phase is phase)
    assert world.state.promote is not None
    return world.state.promote


# ------------------------------------------------------------------------------------------------------------- canary


def with_canary(workers: int = 3, **limits: Any) -> tuple[World, int]:
    """A reload whose canary serves."""
    world = started(workers, **({"canary": 1, "canary_for": 30.0} | limits))
    world.deploy()
    operation = world.reload()
    world.run_until(lambda: world.state.promote is not None and world.state.promote.until is not None)
    return world, operation


def test_a_canary_serves_beside_the_old_generation_and_then_all_of_it_takes_over() -> None:
    world, operation = with_canary()
    began, seen = world.now, len(world.log)
    assert serving(world) == {(1, 1), (1, 2), (1, 3), (2, 1)}
    assert state_of(world, 2) is GenerationState.MIXED
    world.run(29.0)
    assert operation not in world.answers
    assert not commands(world, Verb.QUIET, seen)
    assert not any(process.services_active for process in world.of(2))
    assert answered(world, operation).ok
    assert 30.0 <= world.now - began < 30.2
    assert phases(world, operation) == ["prepare", "boot", "canary", "activate"]
    world.run(5.0)
    assert serving(world) == {(2, 1), (2, 2), (2, 3)}


def test_the_first_generation_has_no_canary() -> None:
    world = started(canary=1, canary_for=1000.0)
    assert len(world.serving()) == 2


def test_a_canary_that_crashes_ends_the_reload_and_the_old_generation_has_never_noticed() -> None:
    world, operation = with_canary()
    world.crash(world.of(2)[0])
    assert not world.answers[operation].ok
    assert "worker 1 crashed" in world.answers[operation].reason
    world.run(10.0)
    assert serving(world) == {(1, 1), (1, 2), (1, 3)}
    assert list(world.state.generations) == [1]


def test_a_canary_that_answers_with_5xx_ends_the_reload_and_hands_back() -> None:
    world, operation = with_canary()
    respond(world, 1, 100, 1)
    world.respond(world.of(2)[0], 30, 15)
    assert not world.answers[operation].ok
    assert "5xx" in world.answers[operation].reason
    world.run(10.0)
    assert {process.key[0] for process in world.live()} == {1}
    assert [c.worker for c in commands(world, Verb.HAND_OVER) if c.generation == 2] == [1]


def test_a_canary_in_an_outage_that_the_old_generation_has_too_goes_on() -> None:
    world, operation = with_canary()
    respond(world, 1, 100, 90)
    world.respond(world.of(2)[0], 30, 30)
    assert answered(world, operation).ok


def test_a_canary_can_be_ended_by_a_promote() -> None:
    world, operation = with_canary(canary_for=1000.0)
    promote = world.promote()
    assert answered(world, promote).ok
    assert world.answers[operation].ok
    assert world.promoted == [1, 2]


def test_a_worker_found_hung_as_the_canarys_time_ends_gets_no_replacement_that_would_end_at_once() -> None:
    world, _ = with_canary(2, canary=2)
    assert world.state.promote is not None
    ends, hung = world.state.promote.until, world.state.generations[1].workers[2]
    assert ends is not None
    hung.heard, hung.doubted = ends - LIMITS.heartbeat_timeout - 1.0, ends
    state, effects = lifecycle.step(world.state, m.TimePassed(), ends)
    assert state.current == 2
    assert "worker-replaced" in [each.event for each in effects if isinstance(each, m.Say)]
    assert not [each for each in effects if isinstance(each, m.Spawn | m.Kill)]
    assert list(state.generations[1].workers) == [1, 2]


def test_who_waits_for_one_that_serves_again_as_a_canary_hands_over_without_it() -> None:
    world = started(3, canary=1, canary_for=100.0, park_for=100.0)
    slow = world.serving()[0]
    world.hang(slow)
    world.deploy()
    world.reload()
    world.promote()
    world.run_until(lambda: len(world.state.generations[1].having(QUIET)) == 2)
    world.promote(1)
    world.run_until(
        lambda: world.state.promote is not None and world.state.promote.phase is PromotePhase.CANARY
    )
    assert not world.state.generations[1].having(QUIET)


@pytest.mark.parametrize("how", ["discard", "rollback"])
def test_a_canary_can_be_taken_back(how: str) -> None:
    world, operation = with_canary(canary_for=1000.0)
    assert answered(world, getattr(world, how)()).ok
    assert not world.answers[operation].ok
    world.run(10.0)
    assert serving(world) == {(1, 1), (1, 2), (1, 3)}


def test_a_crash_of_the_old_generation_during_a_canary_is_replaced() -> None:
    world = started(3, canary=1, canary_for=30.0)
    operation = world.reload()
    until_phase(world, PromotePhase.CANARY)
    world.crash(world.of(1)[0])
    world.run(5.0)
    assert len(world.of(1)) == 3
    assert answered(world, operation).ok


def test_nobody_is_replaced_and_hands_over_while_a_canary_serves() -> None:
    world = started(3, canary=1, canary_for=30.0)
    operation = world.reload()
    until_phase(world, PromotePhase.CANARY)
    seen = len(world.log)
    world.of(1)[0].wants_recycling = True
    world.run(25.0)
    assert not [each for each in spawns(world, seen) if each.generation == 1]
    assert answered(world, operation).ok


def test_a_canary_waits_for_the_one_that_is_being_replaced_and_not_for_those_after_it() -> None:
    """Where there is always another one, it would never begin."""
    world = started(3)
    staged(world)
    for process in world.of(1):
        process.wants_recycling = True
    world.run_until(lambda: world.said["worker-replaced"] == 1)
    operation, seen = world.promote(canary=1, canary_for=5.0), len(world.log)
    world.run(0.0)
    assert world.state.promote is not None
    assert world.state.promote.phase is PromotePhase.MUSTER
    until_phase(world, PromotePhase.CANARY)
    assert not spawns(world, seen)
    assert answered(world, operation).ok


def test_what_was_asked_with_the_reload_has_precedence_over_the_settings() -> None:
    world = started(3, canary=1, canary_for=30.0)
    assert answered(world, world.reload(canary=0)).ok
    world.run(1.0)
    operation = world.reload(canary=2, canary_for=5.0)
    promote = until_phase(world, PromotePhase.CANARY)
    world.run(1.0)
    assert len([process for process in world.of(promote.generation) if process.accepts]) == 2
    assert answered(world, operation).ok


def test_a_staged_generation_can_be_a_canary_too() -> None:
    world = started(3)
    staged(world)
    operation = world.promote(canary=1, canary_for=5.0)
    world.run(1.0)
    assert len([process for process in world.of(2) if process.accepts]) == 1
    assert answered(world, operation).ok


def test_a_probation_that_fails_during_the_next_canary_ends_that_and_goes_back() -> None:
    world = started(2, probation=100.0, park_for=100.0)
    world.deploy()
    assert answered(world, world.reload()).ok
    operation = world.reload(canary=1, canary_for=50.0)
    until_phase(world, PromotePhase.CANARY)
    world.run(1.0)
    world.crash(next(process for process in world.of(2)))
    world.run(1.0)
    assert not world.answers[operation].ok
    assert [effect.to for effect in world.rolled_back] == [1]
    calm(world)


def test_a_pause_of_the_master_does_not_shorten_a_canary() -> None:
    world, _ = with_canary()
    before = world.state.promote
    after, _ = lifecycle.step(world.state, m.Paused(100.0), world.now)
    assert before is not None
    assert after.promote is not None
    assert before.until is not None
    assert after.promote.until == before.until + 100.0


# ------------------------------------------------------------------------------------------------------------ rolling


def rolling(workers: int = 3, **limits: Any) -> World:
    world = started(workers, **({"strategy": Strategy.ROLLING} | limits))
    world.deploy()
    return world


def most_while(world: World, operation: int) -> int:
    """The most processes that there were until it was answered."""
    most = 0
    while operation not in world.answers:
        most = max(most, len(world.live()))
        assert len([process for process in world.live() if process.accepts]) >= 1
        world.advance()
    return most


def test_rolling_never_has_more_than_one_worker_beyond_the_number() -> None:
    world = rolling()
    for process in world.serving():
        process.work_s = 20.0
    operation = world.reload()
    assert most_while(world, operation) == 4
    assert world.answers[operation].ok
    assert phases(world, operation) == ["prepare", "rolling"]
    world.run(50.0)
    assert {process.key[0] for process in world.live()} == {2}
    assert len(world.serving()) == 3
    assert not world.said["worker-killed"]


def test_rolling_serves_with_at_least_as_many_workers_as_before() -> None:
    world = rolling()
    operation = world.reload()
    while operation not in world.answers:
        assert len([process for process in world.live() if process.accepts]) >= 3
        world.advance()


@pytest.mark.parametrize("behaviour", ["exits", "hangs", "dies when ready", "refuses activation"])
def test_a_rolling_reload_that_fails_at_once_leaves_all_old_workers_serving(behaviour: str) -> None:
    world = rolling()
    before = serving(world)
    world.deploy(behaviour)
    answer = answered(world, world.reload())
    assert not answer.ok
    assert answer.reason
    world.run(30.0)
    assert serving(world) == before
    assert list(world.state.generations) == [1]


def until_two_roll(world: World) -> int:
    """Two of three new workers serve; the code of the old generation is on the disk again."""
    operation = world.reload()
    world.run_until(lambda: len([p for p in world.of(2) if p.accepts]) == 2)
    world.restore(1)
    return operation


def test_a_failure_halfway_rolls_back_to_the_old_code() -> None:
    world = rolling()
    operation = until_two_roll(world)
    world.crash(world.of(2)[0])
    assert not world.answers[operation].ok
    world.run(100.0)
    assert {process.key[0] for process in world.live()} == {1}
    assert len(world.serving()) == 3
    assert world.state.generations[1].ceded == 0


def test_too_many_5xx_halfway_roll_back_too() -> None:
    world = rolling()
    operation = until_two_roll(world)
    respond(world, 2, 50, 50)
    assert "5xx" in world.answers[operation].reason
    world.run(100.0)
    assert {process.key[0] for process in world.live()} == {1}


def test_code_that_changes_while_workers_roll_does_not_mix_in() -> None:
    world = rolling()
    operation = world.reload()
    world.run_until(lambda: len([p for p in world.of(2) if p.accepts]) == 1)
    world.deploy()
    answer = answered(world, operation)
    assert not answer.ok
    assert "the code has changed" in answer.reason
    world.run(100.0)
    assert {process.key[0] for process in world.serving()} == {1}


def test_an_old_generation_whose_code_is_gone_is_short_after_a_failure_and_says_so() -> None:
    world = rolling()
    operation = world.reload()
    world.run_until(lambda: len([p for p in world.of(2) if p.accepts]) == 2)
    world.crash(world.of(2)[0])
    assert not world.answers[operation].ok
    world.run(100.0)
    assert {process.key[0] for process in world.serving()} == {1}
    assert world.said["generation-short"] >= 1


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (4, 2)])
def test_rolling_from_one_number_to_another(before: int, after: int) -> None:
    world = rolling(before)
    world.workers_setting = after
    operation = world.reload()
    assert most_while(world, operation) <= max(before, after) + 1
    assert world.answers[operation].ok
    world.run(30.0)
    assert len(world.live()) == after


def test_a_way_back_after_rolling_starts_the_old_code_one_by_one() -> None:
    world = rolling(probation=30.0)
    assert answered(world, world.reload()).ok
    world.run(10.0)
    assert state_of(world, 1) is GenerationState.PARKED
    assert not world.of(1)
    world.restore(1)
    operation = world.rollback()
    assert most_while(world, operation) == 4
    assert world.answers[operation].ok
    assert outcomes(world) == [Outcome.ROLLED_BACK]
    world.run(100.0)
    assert {process.key[0] for process in world.live()} == {1}


def test_a_canary_in_a_rolling_reload_is_a_pause() -> None:
    world = rolling(4, canary=2, canary_for=50.0)
    operation = world.reload()
    world.run(40.0)
    assert len([process for process in world.of(2) if process.accepts]) == 2
    assert operation not in world.answers
    assert answered(world, operation).ok


@pytest.mark.parametrize("strategy", [Strategy.ROLLING, Strategy.REPLACE])
def test_what_is_short_of_room_can_not_be_staged(strategy: Strategy) -> None:
    world = started(strategy=strategy)
    answer = answered(world, world.stage())
    assert (answer.ok, answer.code) == (False, 409)
    assert str(strategy) in answer.reason
    assert answered(world, world.reload()).ok


# ------------------------------------------------------------------------------------------------------------ replace


def replacing(workers: int = 2, **limits: Any) -> World:
    world = started(workers, **({"strategy": Strategy.REPLACE} | limits))
    world.deploy()
    return world


def test_what_can_not_run_twice_never_does() -> None:
    world = replacing()
    operation = world.reload()
    while operation not in world.answers:
        assert len({process.key[0] for process in world.live()}) <= 1
        world.advance()
    assert world.answers[operation].ok
    assert phases(world, operation) == ["prepare", "check", "clear", "boot", "activate"]
    assert serving(world) == {(2, 1), (2, 2)}


def test_nothing_is_ready_while_it_is_replaced() -> None:
    world = replacing()
    world.reload()
    until_phase(world, PromotePhase.CLEAR)
    assert not world.state.ready
    assert world.state.current == 1
    until_phase(world, PromotePhase.MUSTER)
    assert not world.state.ready
    world.run(10.0)
    assert world.state.ready


@pytest.mark.parametrize("behaviour", ["exits", "hangs"])
def test_what_can_not_be_imported_is_found_out_before_anything_ends(behaviour: str) -> None:
    world = replacing()
    before = serving(world)
    world.deploy(behaviour)
    operation = world.reload()
    while operation not in world.answers:
        assert serving(world) == before
        world.advance()
    assert not world.answers[operation].ok
    assert world.answers[operation].reason
    world.run(5.0)
    assert list(world.state.generations) == [1]


@pytest.mark.parametrize("behaviour", ["dies when ready", "refuses activation", "silent on activation"])
def test_if_the_new_code_fails_the_old_code_is_started_again(behaviour: str) -> None:
    world = replacing()
    world.deploy(behaviour)
    operation = world.reload()
    until_phase(world, PromotePhase.MUSTER)
    world.restore(1)
    world.releases[2] = (world.code, behaviour, 2)
    assert not answered(world, operation).ok
    world.run(30.0)
    assert {process.key[0] for process in world.serving()} == {1}
    assert len(world.serving()) == 2
    assert list(world.state.generations) == [1]
    calm(world)


def test_if_neither_starts_what_is_on_the_disk_is_tried_until_it_does() -> None:
    world = replacing()
    world.deploy("dies when ready")
    assert not answered(world, world.reload()).ok
    world.run(20.0)
    assert not world.serving()
    world.deploy()
    world.run(60.0)
    assert len(world.serving()) == 2


def test_the_old_workers_have_so_long_to_finish() -> None:
    world = replacing(replace_timeout=5.0)
    for process in world.serving():
        process.work_s = 1000.0
    world.reload()
    until_phase(world, PromotePhase.CLEAR)
    began = world.now
    world.run(0.1)
    assert {command.budget for command in commands(world, Verb.HAND_OVER)} == {5.0}
    until_phase(world, PromotePhase.MUSTER)
    assert world.now - began < 6.0


def test_the_first_start_has_nothing_to_replace_and_checks_nothing() -> None:
    world = started(strategy=Strategy.REPLACE)
    assert not [each for each in world.log if isinstance(each, m.Check)]
    assert len(world.serving()) == 2


def test_a_breach_of_what_can_not_run_twice_goes_back_without_running_twice() -> None:
    world = replacing(probation=30.0)
    assert answered(world, world.reload()).ok
    world.run(5.0)
    world.restore(1)
    world.crash(world.of(2)[0])
    while not world.rolled_back:
        serves = {process.key[0] for process in world.live() if process.mode != "stopping"}
        assert len(serves) <= 1
        world.advance()
    world.run(5.0)
    assert {process.key[0] for process in world.serving()} == {1}
    assert outcomes(world) == [Outcome.ROLLED_BACK]


def test_what_is_gone_back_to_starts_anew_though_its_last_worker_ends_while_it_waits_for_room() -> None:
    world = started(1, strategy=Strategy.REPLACE, replace_timeout=5.0, park_for=10.0)
    world.crash(world.serving()[0])
    world.run(0.055)  # its respawn boots, when the next generation is asked for
    assert answered(world, world.reload()).ok
    assert world.of(1)
    back = world.rollback()
    until_phase(world, PromotePhase.CLEAR)
    world.run_until(lambda: not world.of(1))
    assert state_of(world, 1) is GenerationState.DRAINING
    assert answered(world, back).ok
    calm(world)


def test_a_stop_while_nothing_serves_does_not_exit_with_0() -> None:
    world = replacing()
    operation = world.reload()
    until_phase(world, PromotePhase.MUSTER)
    world.stop()
    assert not world.answers[operation].ok
    world.run(60.0)
    assert world.exit == 1


def test_a_scaling_is_overtaken_by_a_replacement() -> None:
    world = replacing()
    world.restore(1)
    scale = world.scale(4)
    assert answered(world, world.reload()).ok
    assert not world.answers[scale].ok
    calm(world)

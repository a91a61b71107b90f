"""The lifecycle alone: a master dies at any step of a deploy, and the next one finishes what was begun, or undoes it."""

from __future__ import annotations

import functools

import pytest
from simulated_worker import Process
from simulator import World
from test_lifecycle_probation import outcomes
from test_lifecycle_promotion import answered, calm, commands, serving, staged, started, state_of
from test_lifecycle_strategies import most_while, until_phase

from segue.handoff.messages import BEFORE_STOP
from segue.supervisor import lifecycle, memory
from segue.supervisor.model import (
    Activated,
    GenerationState,
    Outcome,
    PromotePhase,
    Spawn,
    Strategy,
    Verb,
    WorkerState,
)


def recorded(workers: int = 2, **limits: object) -> World:
    world = started(workers, **limits)
    world.journals = True
    return world


def reloaded(workers: int = 2, **limits: object) -> World:
    """Generation 2 serves, generation 1 is parked."""
    world = recorded(workers, **limits)
    world.deploy()
    assert answered(world, world.reload()).ok
    world.run_until(lambda: state_of(world, 1) is GenerationState.PARKED)
    world.run(1.0)
    return world


def test_a_parked_generation_outlives_the_master_and_its_time_goes_on() -> None:
    world = reloaded(park_for=60.0)
    parked = {process.key for process in world.of(1)}
    before = world.state.generations[1].warm_until
    world.kill_master(downtime=3.0)
    assert state_of(world, 1) is GenerationState.PARKED
    assert {process.key for process in world.of(1)} == parked
    assert world.state.generations[1].warm_until == pytest.approx(before, abs=0.1)
    began = world.now
    assert answered(world, world.rollback()).ok
    assert world.now - began < 0.05
    world.run(3.0)
    assert serving(world) == parked


@pytest.mark.parametrize("ahead_s", [-14_400.0, 14_400.0])
def test_a_clock_that_is_set_while_there_is_no_master_changes_no_time(
    monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    world = reloaded(park_for=60.0)
    before = world.state.generations[1].warm_until
    monkeypatch.setattr(memory, "wall", lambda: ahead_s)
    world.kill_master(downtime=3.0)
    assert state_of(world, 1) is GenerationState.PARKED
    assert world.state.generations[1].warm_until == pytest.approx(before, abs=0.1)


def test_a_stop_that_waits_is_forgotten_with_the_master_and_workers_are_asked_for_again() -> None:
    world = recorded()
    world.signal_stop(delay=100.0)
    world.run(1.0)
    assert {process.operator_drain for process in world.serving()} == {BEFORE_STOP}
    world.kill_master()
    world.run(5.0)
    assert world.state.ready
    assert {process.operator_drain for process in world.serving()} == {None}


def test_a_parked_generation_whose_time_is_over_when_the_next_master_comes_ends() -> None:
    world = reloaded(park_for=10.0)
    world.kill_master(downtime=60.0)
    world.run(5.0)
    assert list(world.state.generations) == [2]


def test_of_several_generations_that_drain_the_one_that_served_last_is_still_known() -> None:
    world = started(park_for=100.0)
    for _ in range(2):
        for process in world.serving():
            process.work_s = 500.0
        assert answered(world, world.reload()).ok
        world.run(5.0)
    assert answered(world, world.rollback(1)).ok
    world.run(5.0)
    world.kill_master()
    assert answered(world, world.rollback()).generation == 3


def test_a_generation_that_is_kept_without_workers_outlives_the_master_too() -> None:
    world = reloaded(park_for=0.0, probation=100.0)
    assert not world.of(1)
    world.kill_master()
    assert state_of(world, 1) is GenerationState.PARKED
    world.restore(1)
    assert answered(world, world.rollback()).ok
    assert {process.key[0] for process in world.serving()} == {1}


def test_a_probation_outlives_the_master() -> None:
    world = reloaded(park_for=60.0, probation=60.0)
    before = world.state.probation
    world.kill_master(downtime=1.0)
    after = world.state.probation
    assert before is not None
    assert after is not None
    assert after.until == pytest.approx(before.until, abs=0.1)
    world.crash(world.of(2)[0])
    world.run(1.0)
    assert [effect.to for effect in world.rolled_back] == [1]
    assert outcomes(world) == [Outcome.ROLLED_BACK]


def test_a_probation_that_ended_while_there_was_no_master_has_passed() -> None:
    world = reloaded(park_for=10.0, probation=10.0)
    world.kill_master(downtime=30.0)
    world.run(1.0)
    assert outcomes(world) == [Outcome.PASSED]


def test_a_breach_that_was_found_just_before_is_not_forgotten() -> None:
    world = reloaded(park_for=60.0, probation=60.0)
    world.dies_after = 0
    world.crash(world.of(2)[0])
    world.run(2.0)
    assert world.said["adopted"] == 1
    assert {process.key[0] for process in world.serving()} == {1}
    calm(world)


def test_a_staged_generation_outlives_an_upgrade() -> None:
    world = recorded()
    staged(world)
    world.kill_master(upgrade=True)
    assert state_of(world, 2) is GenerationState.STAGED
    assert answered(world, world.promote()).ok


def test_a_staged_generation_ends_with_a_master_that_dies_since_it_serves_nobody() -> None:
    world = recorded()
    staged(world)
    world.kill_master()
    world.run(5.0)
    assert list(world.state.generations) == [1]
    assert len(world.serving()) == 2
    assert answered(world, world.promote()).reason == (
        "no generation is staged; generation 2 was, and has ended with its master"
    )
    assert staged(world) == 3


@pytest.mark.parametrize("after", range(6))
def test_a_promote_that_is_cut_short_is_finished_or_undone(after: int) -> None:
    world = recorded()
    staged(world)
    world.dies_after = after
    world.promote()
    world.run(60.0)
    world.dies_after = None
    [generation] = {process.key[0] for process in world.serving()}
    assert len(world.serving()) == 2
    assert len({process.key[0] for process in world.live() if process.accepts}) == 1
    assert generation in {1, 2}
    calm(world)


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.011, 0.015, 0.02, 0.03, 0.1])
def test_a_rollback_that_is_cut_short_is_finished_or_undone(delay: float) -> None:
    world = reloaded(park_for=60.0)
    world.rollback()
    world.run(delay)
    world.kill_master(downtime=0.5)
    world.run(30.0)
    assert len(world.serving()) == 2
    assert len({process.key[0] for process in world.live() if process.accepts}) == 1
    assert not world.said["worker-killed"]
    calm(world)


def test_a_canary_that_is_cut_short_is_undone() -> None:
    world = recorded(3, canary=1, canary_for=30.0)
    operation = world.reload()
    until_phase(world, PromotePhase.CANARY)
    world.run(1.0)
    before = {key for key in serving(world) if key[0] == 1}
    world.kill_master()
    world.run(20.0)
    assert operation in world.lost
    assert serving(world) == before
    assert list(world.state.generations) == [1]
    assert [c.worker for c in commands(world, Verb.HAND_OVER) if c.generation == 2] == [1]


def test_a_rolling_reload_that_is_cut_short_is_undone() -> None:
    world = recorded(3, strategy=Strategy.ROLLING)
    world.reload()
    world.run_until(lambda: len([process for process in world.of(2) if process.accepts]) == 2)
    world.kill_master()
    world.run(60.0)
    assert {process.key[0] for process in world.serving()} == {1}
    assert len(world.serving()) == 3
    calm(world)


@pytest.mark.parametrize("phase", [PromotePhase.CLEAR, PromotePhase.MUSTER, PromotePhase.ACTIVATE])
def test_a_replacement_that_is_cut_short_serves_again(phase: PromotePhase) -> None:
    world = recorded(strategy=Strategy.REPLACE, replace_timeout=5.0)
    for process in world.serving():
        process.work_s = 3.0
    world.reload()
    until_phase(world, phase)
    world.kill_master()
    world.run(20.0)
    assert len(world.serving()) == 2
    calm(world)


def test_old_workers_that_made_room_for_new_ones_that_never_came_serve_again() -> None:
    world = recorded(strategy=Strategy.REPLACE, replace_timeout=20.0)
    for process in world.serving():
        process.work_s = 10.0
    before = serving(world)
    world.reload()
    until_phase(world, PromotePhase.CLEAR)
    world.run(1.0)
    assert not serving(world)
    world.kill_master()
    world.run(1.0)
    assert serving(world) == before


def test_an_old_worker_that_can_serve_again_does_though_the_others_can_not_be_started_any_more() -> None:
    world = recorded(strategy=Strategy.REPLACE, replace_timeout=20.0)
    first, second = world.serving()
    second.work_s = 10.0
    world.reload()
    until_phase(world, PromotePhase.CLEAR)
    world.run(2.0)
    assert not first.alive
    world.deploy("exits")
    world.kill_master()
    world.run(30.0)
    assert serving(world) == {second.key}
    assert world.state.generations[1].missing == 1
    world.deploy()
    assert answered(world, world.reload()).ok
    calm(world)


def test_what_was_given_up_is_not_gone_back_to_by_the_next_master() -> None:
    world = reloaded(park_for=100.0)
    for process in world.serving():
        process.work_s = 50.0
    assert answered(world, world.reload()).ok
    assert answered(world, world.discard(2)).ok
    world.run(1.0)
    world.kill_master()
    assert state_of(world, 2) is GenerationState.RETIRED
    answer = answered(world, world.rollback(2))
    assert (answer.code, answer.details) == (409, {"known": []})


def test_what_was_parked_before_a_service_was_swapped_starts_anew_also_under_the_next_master() -> None:
    world = reloaded(park_for=100.0)
    assert answered(world, world.swap(name="other")).ok
    world.restore(1)
    world.kill_master()
    assert answered(world, world.rollback()).ok
    assert [process.versions for process in world.serving()] == [{"model": 2}] * 2


def test_what_did_not_say_which_services_it_has_is_not_gone_back_to_as_it_is() -> None:
    world = recorded(workers=1, park_for=100.0)
    [old] = world.live()
    old.work_s = 5.0
    world.deploy()
    assert answered(world, world.reload()).ok
    assert answered(world, world.swap(name="other")).ok
    world.hang(old)
    world.kill_master()
    world.wake(old)
    world.restore(1)
    assert answered(world, world.rollback(1)).ok
    assert not old.accepts
    assert [process.versions for process in world.serving()] == [{"model": 2}]


def test_what_did_not_say_whether_it_took_back_a_swap_is_not_gone_back_to_as_it_is() -> None:
    world = recorded(workers=2, park_for=100.0)
    old, other = world.live()
    for process in (old, other):
        process.work_s = 5.0
    world.faults["silent commit"] = "odd"
    assert not answered(world, world.swap(name="other")).ok
    assert old.versions == {"model": 2}
    world.deploy()
    assert answered(world, world.reload()).ok
    world.run(1.0)
    world.hang(old)
    world.kill_master()
    world.wake(old)
    world.restore(1)
    assert answered(world, world.rollback(1)).ok
    assert not old.accepts
    assert [process.versions for process in world.serving()] == [{}, {}]


def test_what_has_a_swap_that_was_not_decided_is_left_out_when_a_way_back_is_finished() -> None:
    world = recorded(workers=3, park_for=100.0)
    old, *others = world.live()
    for process in (old, *others):
        process.work_s = 30.0
    world.faults["silent commit"] = "odd"
    world.swap(name="other")
    world.run(1.0)
    assert [process.versions for process in (old, *others)] == [{"model": 2}, {}, {}]
    world.deploy()  # so that nobody can be started in its place
    world.kill_master()
    world.faults.clear()
    assert answered(world, world.reload()).ok
    world.run(1.0)
    world.rollback(1)
    until_phase(world, PromotePhase.ACTIVATE)
    world.restore(1)
    world.kill_master()
    world.run(0.5)
    assert serving(world) == {process.key for process in others}
    assert old.mode == "draining"
    world.run(200.0)
    assert [process.versions for process in world.serving()] == [{}, {}, {}]
    calm(world)


def test_what_boots_with_a_swap_that_was_not_written_down_does_not_serve_with_it() -> None:
    world = recorded(workers=2)
    world.run(5.0)
    world.turn("journal full", on=True)
    assert answered(world, world.swap(name="other")).ok
    world.crash(world.serving()[1])
    world.run(0.2)
    [respawn] = [process for process in world.live() if process.mode == "booting"]
    assert respawn.versions == {"model": 2}
    world.kill_master()
    world.run(60.0)
    assert [process.versions for process in world.serving()] == [{}, {}]


def test_a_generation_of_which_only_the_begin_could_be_written_down_keeps_its_workers() -> None:
    world = recorded()
    world.deploy()
    operation = world.reload()
    world.turn("journal full", on=True)
    assert world.state.generations[2].target == 0  # its settings are still being read
    assert answered(world, operation).ok
    world.run(1.0)
    before = serving(world)
    world.kill_master(downtime=1.0)
    world.run(5.0)
    assert serving(world) == before
    assert len(before) == 2
    calm(world)


def test_what_accepts_serves_on_though_an_older_journal_names_one_that_does_not_answer() -> None:
    world = recorded()
    old, other = world.serving()
    old.work_s = other.work_s = 30.0
    world.run(5.0)
    world.turn("journal full", on=True)
    world.deploy()
    assert answered(world, world.reload()).ok
    world.run(1.0)
    before = serving(world)
    assert {key[0] for key in before} == {2}
    world.hang(old)
    world.kill_master()
    assert serving(world) == before
    world.run(100.0)
    assert serving(world) == before
    calm(world)


def test_a_worker_that_did_not_answer_the_new_master_serves_once_it_wakes_though_it_was_leaving() -> None:
    world = recorded(1, strategy=Strategy.REPLACE, replace_timeout=20.0)
    [old] = world.serving()
    old.work_s = 10.0
    world.deploy()
    world.reload()
    until_phase(world, PromotePhase.CLEAR)
    world.run(1.0)
    assert not old.accepts
    world.hang(old)
    world.kill_master()
    world.wake(old)
    world.run(4.0)  # it says again that it is alive
    assert serving(world) == {old.key}


def test_what_does_not_answer_is_not_taken_for_what_has_lost_its_promote() -> None:
    """The new ones are told to serve when the master dies; the old ones, too busy to answer, serve on."""
    world = recorded()
    staged(world)
    world.promote()
    world.run(0.015)
    assert all(process.accepts for process in world.of(2))
    for process in world.of(1):
        world.hang(process)
    world.kill_master(downtime=0.1)
    for process in world.of(1):
        world.wake(process)
    world.run(60.0)
    assert len(world.serving()) == 2
    calm(world)


def test_services_that_were_ceasing_for_the_last_master_are_active_again_where_their_generation_serves_again() -> (
    None
):
    world = reloaded(park_for=60.0)
    assert [process.key for process in world.live() if process.leads] == [(2, 1)]
    world.faults["slow services"] = "all"
    assert answered(world, world.rollback()).ok
    world.run(0.5)
    assert answered(world, world.rollback()).ok
    world.run(0.1)
    world.kill_master()
    world.faults.clear()
    world.run(40.0)
    assert all(process.services_active for process in world.serving())
    assert [process.key[0] for process in world.live() if process.leads] == [world.state.current]
    calm(world)


def test_services_that_were_ceasing_for_a_replacement_take_work_again_where_it_is_undone() -> None:
    """Before its quiet workers serve again they can't be told."""
    world = recorded(strategy=Strategy.REPLACE, replace_timeout=5.0)
    world.deploy()
    world.faults["slow services"] = "all"
    for process in world.serving():
        process.work_s = 30.0
    world.reload()
    until_phase(world, PromotePhase.CLEAR)
    world.run(0.5)
    world.kill_master()
    world.faults.clear()
    world.run(40.0)
    assert all(process.services_active for process in world.serving())
    assert [process.key[0] for process in world.live() if process.leads] == [world.state.current]
    calm(world)


def test_a_way_back_is_finished_though_nothing_serves_that_it_could_take_over_from() -> None:
    world = reloaded(park_for=100.0, probation=100.0)
    parked = {process.key for process in world.of(1)}
    for process in world.serving():
        process.work_s = 30.0
    assert answered(world, world.scale(1)).ok
    world.run(1.0)
    [last] = world.serving()
    world.crash(last)
    world.kill_master()
    world.run(1.0)
    assert serving(world) == parked
    assert world.state.current == 1
    world.run(200.0)
    calm(world)


def test_one_worker_after_the_other_comes_back_though_one_of_them_has_not_ended_and_can_not_serve_again() -> (
    None
):
    world = recorded(strategy=Strategy.ROLLING, probation=100.0)
    world.hang(world.serving()[1])
    world.kill_master(downtime=0.3)
    world.workers_setting = 1
    world.deploy()
    assert answered(world, world.reload()).ok
    world.restore(1)
    operation = world.rollback()
    assert most_while(world, operation) == 3
    assert world.answers[operation].ok
    world.run(1.0)
    assert {key[0] for key in serving(world)} == {1}
    world.run(200.0)
    calm(world)


def test_who_beats_and_does_not_take_what_the_new_master_tells_it_is_replaced_beside_a_canary_too() -> None:
    world = recorded(canary=1, canary_for=100.0)
    world.deploy()
    world.reload()
    world.run_until(lambda: world.state.promote is not None and world.state.promote.until is not None)
    world.state.generations[1].workers[2].unasked = True
    answer = Activated(generation=1, worker=2, error="no answer in time")
    state, effects = lifecycle.step(world.state, answer, world.now)
    assert state.generations[1].workers[2].state is WorkerState.HUNG
    assert [each.generation for each in effects if isinstance(each, Spawn)] == [1]


def left_with_a_silent_leader(world: World) -> Process:
    """What serves is one worker, and that does not answer the next master: no other leads."""
    world.run(20.0)
    [silent] = world.serving()
    assert silent.leads
    world.hang(silent)
    world.kill_master()
    world.run(4.0)
    assert [process.key for process in world.live() if process.leads] == [silent.key]
    return silent


def test_what_no_journal_knows_and_what_does_not_answer_may_lead_until_it_says_that_it_does_not() -> None:
    world = recorded(workers=1)
    world.turn("journal full", on=True)
    world.deploy()
    assert answered(world, world.reload()).ok
    silent = left_with_a_silent_leader(world)
    world.wake(silent)
    world.run(30.0)
    assert [process.key[0] for process in world.live() if process.leads] == [world.state.current]
    calm(world)


def test_what_does_not_answer_may_lead_whatever_the_journal_knew_before_it_was_behind() -> None:
    world = recorded(workers=2)
    leader, silent = world.serving()
    world.run(5.0)  # and that is written down
    world.turn("journal full", on=True)
    world.crash(leader)
    world.run(5.0)
    assert silent.leads
    world.hang(silent)
    world.kill_master()
    world.run(1.0)
    assert [process.key for process in world.live() if process.leads] == [silent.key]
    world.run(60.0)
    assert len([process for process in world.live() if process.leads]) == 1
    calm(world)


def test_what_does_not_answer_may_lead_though_it_was_booting_when_that_was_last_written() -> None:
    world = recorded(workers=1, park_for=100.0)
    world.deploy()
    operation = world.reload()
    world.run(0.5)
    assert [process.mode for process in world.of(2)] == ["booting"]
    world.turn("journal full", on=True)
    assert answered(world, operation).ok
    silent = left_with_a_silent_leader(world)
    world.wake(silent)
    world.run(30.0)
    assert len([process for process in world.live() if process.leads]) == 1
    calm(world)


def test_a_probation_that_was_written_down_goes_on_though_what_came_since_could_not_be() -> None:
    world = reloaded(park_for=100.0, probation=100.0)
    world.turn("journal full", on=True)
    world.deploy()
    assert answered(world, world.reload()).ok
    world.run(1.0)
    world.crash(world.serving()[0])
    world.run(5.0)
    assert [(effect.generation, effect.to) for effect in world.rolled_back] == [(3, 2)]
    world.kill_master()
    assert world.state.probation is not None
    world.crash(world.serving()[0])
    world.run(5.0)
    assert outcomes(world)[-1] is Outcome.KEPT  # what it would go back to has ended since
    assert {process.key[0] for process in world.serving()} == {2}


def test_what_ended_before_the_new_master_came_is_not_taken_for_a_namesake_that_lives() -> None:
    world = recorded()
    world.run(5.0)
    world.turn("journal full", on=True)
    staged(world)
    world.turn("deaths seen late", on=True)
    world.kill_master()
    assert not world.of(2)
    assert answered(world, world.reload()).ok  # its number is given again
    assert {process.key[0] for process in world.serving()} == {2}


def test_without_a_journal_nothing_but_what_serves_is_kept() -> None:
    world = reloaded(park_for=100.0)
    world.shell.written = {}
    world.kill_master()
    world.run(5.0)
    assert list(world.state.generations) == [2]
    assert len(world.serving()) == 2


def test_an_adopted_generation_is_complete_again_soon() -> None:
    world = recorded(3)
    world.kill_master(downtime=1.0)
    assert all(w.state is WorkerState.ACTIVE for w in world.state.generations[1].workers.values())
    world.crash(world.of(1)[0])
    world.run(5.0)
    assert len(world.serving()) == 3


def test_a_parked_generation_does_not_stay_for_ever_when_nothing_is_left_of_the_one_that_served() -> None:
    """Nobody accepts: the code on the disk is started, and what was parked ends."""
    world = reloaded(park_for=1000.0)
    for process in world.of(2):
        world.at(0.5, functools.partial(world.crash, process))
    world.kill_master(downtime=1.0)
    assert world.state.current is None
    world.run(20.0)
    assert len(world.serving()) == 2
    assert list(world.state.generations) == [3]

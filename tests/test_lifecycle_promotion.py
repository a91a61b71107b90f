"""The lifecycle alone: stage, promote, discard, roll back and park, each promise in the order in which it matters."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from simulator import LIMITS, World

from segue.supervisor import lifecycle, promotion, turn
from segue.supervisor import model as m
from segue.supervisor.model import GenerationState, Strategy, Verb, WorkerState


def started(workers: int = 2, **limits: Any) -> World:
    world = World(workers, msgspec.structs.replace(LIMITS, **({"park_for": 60.0} | limits)))
    assert world.answers[world.start()].ok
    world.run(1.0)
    return world


def reloaded(workers: int = 2, **limits: Any) -> World:
    """Generation 2 serves, generation 1 is parked."""
    world = started(workers, **limits)
    world.deploy()
    assert answered(world, world.reload()).ok
    world.run_until(lambda: world.state.generations[1].state is GenerationState.PARKED)
    return world


def answered(world: World, operation: int) -> m.Settle:
    world.run_until(lambda: operation in world.answers)
    return world.answers[operation]


def staged(world: World) -> int:
    answer = answered(world, world.stage())
    assert answer.ok
    assert answer.generation is not None
    return answer.generation


def commands(world: World, verb: Verb, since: int = 0) -> list[m.Command]:
    return [each for each in world.log[since:] if isinstance(each, m.Command) and each.verb is verb]


def spawns(world: World, since: int = 0) -> list[m.Spawn]:
    return [each for each in world.log[since:] if isinstance(each, m.Spawn)]


def state_of(world: World, generation: int) -> GenerationState | None:
    found = world.state.generations.get(generation)
    return None if found is None else found.state


def serving(world: World) -> set[tuple[int, int]]:
    return {process.key for process in world.live() if process.accepts}


def calm(world: World) -> None:
    world.heal()
    world.check_settled()


# ------------------------------------------------------------------------------------------------------------ staging


def test_a_staged_generation_is_ready_and_serves_nobody() -> None:
    world = started()
    before = serving(world)
    assert staged(world) == 2
    world.run(500.0)
    assert serving(world) == before
    assert state_of(world, 2) is GenerationState.STAGED
    assert [process.mode for process in world.of(2)] == ["ready", "ready"]
    assert not any(process.services_active for process in world.of(2))


@pytest.mark.parametrize("behaviour", ["exits", "hangs", "dies when ready"])
def test_what_can_not_be_staged_changes_nothing_and_says_why(behaviour: str) -> None:
    world = started()
    world.deploy(behaviour)
    answer = answered(world, world.stage())
    assert not answer.ok
    assert answer.reason
    world.run(60.0)
    assert list(world.state.generations) == [1]
    assert len(world.serving()) == 2


def test_what_is_staged_is_promoted_without_another_start() -> None:
    world = started()
    staged(world)
    seen = len(world.log)
    began = world.now
    answer = answered(world, world.promote())
    assert answer.ok
    assert answer.generation == 2
    assert world.now - began < 0.1
    assert not spawns(world, seen)
    world.run(1.0)
    assert serving(world) == {(2, 1), (2, 2)}


def test_a_staged_generation_that_loses_a_worker_has_failed() -> None:
    world = started()
    staged(world)
    world.crash(world.of(2)[0])
    world.run(30.0)
    assert list(world.state.generations) == [1]
    answer = answered(world, world.promote())
    assert (answer.ok, answer.code) == (False, 404)
    assert "generation 2 was, and has failed: worker 1" in answer.reason
    assert staged(world) == 3
    world.discard()
    assert answered(world, world.promote()).reason == "no generation is staged"


def test_the_newest_staged_generation_takes_the_place_of_the_one_staged_before() -> None:
    world = started()
    assert (staged(world), staged(world)) == (2, 3)
    world.run(30.0)
    assert list(world.state.generations) == [1, 3]
    world.deploy("exits")
    assert not answered(world, world.stage()).ok
    world.run(30.0)
    assert list(world.state.generations) == [1, 3]


def test_a_reload_leaves_alone_what_is_staged() -> None:
    world = started()
    staged(world)
    assert answered(world, world.reload()).generation == 3
    world.run(100.0)
    assert state_of(world, 2) is GenerationState.STAGED
    assert answered(world, world.promote(2)).ok


def test_what_was_staged_before_a_service_was_swapped_starts_anew_before_it_serves() -> None:
    world = started()
    staged(world)
    assert answered(world, world.swap(name="other")).ok
    old = {process.key for process in world.of(2)}
    assert answered(world, world.promote()).ok
    assert not old & serving(world)
    assert [process.versions for process in world.serving()] == [{"model": 2}] * 2


def test_what_was_staged_before_the_number_was_changed_gets_the_new_number() -> None:
    world = started()
    staged(world)
    assert answered(world, world.scale(4)).ok
    assert answered(world, world.promote()).ok
    world.run(10.0)
    assert len(world.serving()) == 4


def test_a_promote_of_what_does_not_activate_is_refused_and_cuts_nobody() -> None:
    world = started()
    world.deploy("one refuses activation")
    staged(world)
    before = serving(world)
    answer = answered(world, world.promote())
    assert not answer.ok
    assert "no listener" in answer.reason
    assert commands(world, Verb.HAND_OVER) == []
    world.run(60.0)
    assert serving(world) == before
    assert list(world.state.generations) == [1]


# ------------------------------------------------------------------------------------------------------------ discard


def test_what_is_discarded_ends_and_nothing_else_does() -> None:
    world = reloaded()
    staged(world)
    answer = answered(world, world.discard())
    assert answer.ok
    assert answer.generation == 3
    world.run(5.0)
    assert list(world.state.generations) == [1, 2]
    assert answered(world, world.discard(1)).ok
    world.run(5.0)
    assert list(world.state.generations) == [2]
    assert len(world.serving()) == 2


def test_a_discard_cancels_a_reload_that_boots() -> None:
    world = started()
    reload = world.reload()
    world.run(0.5)
    assert answered(world, world.discard()).ok
    assert not world.answers[reload].ok
    assert "discarded" in world.answers[reload].reason
    world.run(60.0)
    assert list(world.state.generations) == [1]


def test_a_draining_generation_that_is_discarded_finishes_first() -> None:
    world = started()
    for process in world.serving():
        process.work_s = 20.0
    assert answered(world, world.reload()).ok
    assert answered(world, world.discard(1)).ok
    world.run(10.0)
    assert len(world.of(1)) == 2
    world.run(15.0)
    assert not world.of(1)
    assert not world.said["worker-killed"]
    answer = answered(world, world.rollback())
    assert (answer.ok, answer.code, answer.details) == (False, 404, {"known": []})


# ------------------------------------------------------------------------------------------------------ park, roll back


def test_a_parked_generation_takes_no_work_and_is_ended_when_its_time_is_over() -> None:
    world = started()
    world.reload()
    world.run_until(lambda: world.promoted == [1, 2])
    promoted = world.now
    world.run_until(lambda: state_of(world, 1) is GenerationState.PARKED)
    assert world.drained == [1, 2]  # whoever waits for that does not wait until the parked one ends
    world.run(1.0)
    assert [process.mode for process in world.of(1)] == ["parked", "parked"]
    assert not any(process.services_active for process in world.of(1))
    world.run_until(lambda: not world.of(1))
    assert 60.0 <= world.now - promoted < 61.0
    world.run(1.0)
    assert list(world.state.generations) == [2]
    assert not world.said["worker-killed"]


def test_a_rollback_to_a_parked_generation_starts_nothing() -> None:
    world = reloaded()
    old = {process.key for process in world.of(1)}
    seen, began = len(world.log), world.now
    answer = answered(world, world.rollback())
    assert answer.ok
    assert answer.generation == 1
    assert world.now - began < 0.05
    assert serving(world) >= old
    assert not spawns(world, seen)
    assert [each for each in world.log[seen:] if isinstance(each, m.RolledBack)] == [m.RolledBack(2, 1, "")]
    world.run(5.0)
    assert serving(world) == old
    assert state_of(world, 2) is GenerationState.PARKED
    world.run(1.0)
    assert [process.leads for process in world.serving()].count(True) == 1
    assert all(process.services_active for process in world.serving())


def test_a_rollback_to_a_generation_that_still_drains_goes_on_with_what_it_has() -> None:
    world = started()
    for process in world.serving():
        process.work_s = 50.0
    assert answered(world, world.reload()).ok
    world.run(5.0)
    assert state_of(world, 1) is GenerationState.DRAINING
    assert answered(world, world.rollback()).ok
    assert len(world.serving()) == 2
    assert {process.key[0] for process in world.serving()} == {1}
    world.run(100.0)
    assert len(world.serving()) == 2
    assert not world.said["worker-killed"]


def test_a_rollback_before_the_old_one_has_confirmed_that_it_is_quiet() -> None:
    world = started()
    world.reload()
    world.run_until(lambda: world.promoted == [1, 2])
    assert {worker.state for worker in world.state.generations[1].workers.values()} == {WorkerState.QUIETING}
    assert answered(world, world.rollback()).ok
    world.run(5.0)
    assert len(world.serving()) == 2
    assert {process.key[0] for process in world.serving()} == {1}
    calm(world)


def test_back_and_forth_as_often_as_you_like() -> None:
    world = reloaded()
    for expected in (1, 2, 1, 2, 1):
        assert answered(world, world.rollback()).generation == expected
        world.run(3.0)
    assert len(world.live()) == 4
    calm(world)


def test_of_several_the_one_that_served_last_comes_back_unless_another_is_named() -> None:
    world = started()
    for expected in (2, 3):
        for process in world.serving():
            process.work_s = 500.0  # they drain, all the time
        assert answered(world, world.reload()).generation == expected
        world.run(5.0)
    assert answered(world, world.rollback()).generation == 2
    world.run(5.0)
    assert answered(world, world.rollback(1)).generation == 1
    world.run(5.0)
    assert answered(world, world.rollback()).generation == 2


def test_only_the_generation_that_served_last_is_kept_however_many_reloads_there_are() -> None:
    world = reloaded()
    for number in range(3, 13):
        assert answered(world, world.reload()).generation == number
        world.run(2.0)
        assert {process.key[0] for process in world.live()} == {number - 1, number}
        assert list(world.state.generations) == [number - 1, number]
    assert world.drained == list(range(1, 13))
    calm(world)


def test_a_rollback_keeps_what_it_has_gone_back_from_and_lets_go_what_was_kept_before() -> None:
    world = reloaded()
    for process in world.serving():
        process.work_s = 5.0
    assert answered(world, world.reload()).generation == 3
    assert state_of(world, 1) is GenerationState.RETIRED
    assert answered(world, world.rollback()).generation == 2
    world.run(10.0)
    assert list(world.state.generations) == [2, 3]
    assert state_of(world, 3) is GenerationState.PARKED
    answer = answered(world, world.rollback(1))
    assert (answer.ok, answer.code) == (False, promotion.UNKNOWN)
    calm(world)


def test_what_still_drains_when_the_next_promote_comes_finishes_and_is_not_parked() -> None:
    world = started()
    for process in world.serving():
        process.work_s = 20.0
    for _ in range(2):
        assert answered(world, world.reload()).ok
    world.run(10.0)
    assert [process.mode for process in world.of(1)] == ["draining", "draining"]
    world.run(15.0)
    assert not world.of(1)
    assert not world.said["worker-killed"]
    calm(world)


@pytest.mark.parametrize(
    ("asked", "code"), [(99, 404), (2, 409), (3, 409)], ids=["unknown", "current", "staged"]
)
def test_a_rollback_to_what_can_not_be_had_names_what_can(asked: int, code: int) -> None:
    world = reloaded()
    staged(world)
    answer = answered(world, world.rollback(asked))
    assert (answer.ok, answer.code, answer.details) == (False, code, {"known": [1]})
    assert "known: 1" in answer.reason


def test_a_promote_takes_one_that_served_before_too() -> None:
    world = reloaded()
    assert answered(world, world.promote(1)).generation == 1


def test_a_parked_worker_that_dies_is_started_anew_only_for_a_rollback() -> None:
    world = reloaded()
    world.restore(1)
    seen = len(world.log)
    world.crash(world.of(1)[0])
    world.run(10.0)
    assert not spawns(world, seen)
    assert answered(world, world.rollback()).ok
    assert [(each.generation, each.gated) for each in spawns(world, seen)] == [(1, True)]
    assert len(world.serving()) == 2


def test_a_generation_that_lost_a_worker_and_whose_code_is_gone_is_gone_back_to_with_the_others() -> None:
    world = reloaded()
    world.crash(world.of(1)[0])
    answer = answered(world, world.rollback())
    assert answer.ok
    assert answer.result is not None
    [note] = answer.result["notes"]
    assert note.startswith("1 of its 2 workers serve, since the code has changed; put that code back")
    assert {process.key[0] for process in world.serving()} == {1}
    world.run(1.0)
    assert world.state.generations[1].missing == 1


def test_a_generation_that_lost_all_workers_and_whose_code_is_gone_is_not_gone_back_to() -> None:
    world = reloaded()
    for process in world.of(1):
        world.crash(process)
    answer = answered(world, world.rollback())
    assert not answer.ok
    assert answer.reason == "the code has changed; put that code back and try again, or reload"
    assert {process.key[0] for process in world.serving()} == {2}
    assert state_of(world, 1) is GenerationState.PARKED
    calm(world)


@pytest.mark.parametrize("code", ["gone", "there"])
def test_a_parked_worker_that_hangs_is_gone_back_without(code: str) -> None:
    world = reloaded()
    world.hang(world.of(1)[0])
    if code == "there":
        world.restore(1)
    answer = answered(world, world.rollback())
    assert answer.ok
    assert answer.result is not None
    assert "could not be activated" in answer.result["notes"][0]
    assert {process.key[0] for process in world.serving()} == {1}
    world.run(5.0)
    assert len(world.serving()) == (2 if code == "there" else 1)


def test_somebody_who_names_a_generation_to_promote_wants_all_of_it() -> None:
    world = reloaded()
    world.hang(world.of(1)[0])
    answer = answered(world, world.promote(1))
    assert not answer.ok
    assert {process.key[0] for process in world.serving()} == {2}


@pytest.mark.parametrize("strategy", [Strategy.ROLLING, Strategy.REPLACE])
def test_a_strategy_that_can_not_be_had_any_more_is_told(strategy: Strategy) -> None:
    world = started()
    staged(world)
    answer = answered(world, world.promote(strategy=strategy))
    assert answer.ok
    assert answer.result is not None
    [note] = answer.result["notes"]
    assert note.endswith(f"and not by strategy {strategy}")
    assert [e.event for e in world.log if isinstance(e, m.Say) and e.event == "strategy-without-effect"]
    assert answered(world, world.rollback()).result is None


def test_what_runs_says_of_which_generation_it_is() -> None:
    world = started()
    world.reload()
    world.run_until(lambda: world.state.promote is not None)
    told = [each.generation for each in world.log if isinstance(each, m.Progress)][-3:]
    assert told == [2, 2, 2]


def test_a_rollback_that_fails_leaves_the_current_generation_serving() -> None:
    world = reloaded()
    before = serving(world)
    world.turn("commands refused", on=True)
    answer = answered(world, world.rollback())
    assert not answer.ok
    assert answer.reason
    world.turn("commands refused", on=False)
    world.run(200.0)
    assert serving(world) == before
    assert list(world.state.generations) == [2]


def test_a_drain_that_was_asked_for_meanwhile_is_told_to_those_that_come_back() -> None:
    world = reloaded()
    assert answered(world, world.drain("reject")).ok
    assert answered(world, world.rollback()).ok
    assert {process.operator_drain for process in world.serving()} == {"reject"}


def test_the_number_of_workers_that_was_asked_for_meanwhile_holds_after_a_rollback() -> None:
    world = reloaded()
    assert answered(world, world.scale(4)).ok
    world.restore(1)
    assert answered(world, world.rollback()).ok
    world.run(10.0)
    assert len(world.serving()) == 4


def test_what_was_swapped_meanwhile_holds_after_a_rollback() -> None:
    world = reloaded()
    world.restore(1)
    assert answered(world, world.swap(name="other")).ok
    assert answered(world, world.rollback()).ok
    assert [process.versions for process in world.serving()] == [{"model": 2}] * 2


def test_an_answer_to_an_earlier_first_phase_does_not_begin_the_second_of_a_later_one() -> None:
    """A rollback overtakes a handover and fails: who is told twice to be quiet has to confirm it twice."""
    world = started(workers=2)
    slow, other = world.of(1)
    world.reload()
    world.run_until(lambda: world.promoted == [1, 2])
    world.hang(slow)
    world.promote(1)
    world.run_until(lambda: other.mode == "active")
    world.crash(other)  # and the promote fails
    [worker] = [w for w in world.state.generations[1].workers.values() if w.id == slow.key[1]]
    assert (worker.state, worker.quiets_unanswered) == (WorkerState.QUIETING, 2)
    world.put(m.Quieted(*slow.key))
    assert world.state.generations[1].workers[slow.key[1]].state is WorkerState.QUIETING


# --------------------------------------------------------------------------------------------------- one at a time


@pytest.mark.parametrize("what", ["stage", "promote", "rollback"])
def test_what_comes_while_a_reload_runs_is_told_what_runs(what: str) -> None:
    world = reloaded()
    reload = world.reload()
    world.run(0.5)
    answer = world.answers[getattr(world, what)()]
    assert (answer.ok, answer.code) == (False, 423)
    assert answer.details["running"] == {"kind": "reload", "generation": 3, "phase": "boot"}
    assert "segue discard 3" in answer.reason
    assert answered(world, reload).ok


def test_a_rollback_does_not_wait_for_what_is_being_staged() -> None:
    world = reloaded()
    stage = world.stage()
    world.run(0.5)
    assert world.state.change is not None
    assert answered(world, world.rollback()).ok
    assert world.state.current == 1
    assert world.state.change is not None  # and that goes on
    answer = answered(world, stage)
    assert (answer.ok, answer.generation) == (True, 3)
    assert world.state.generations[3].state is GenerationState.STAGED


def test_what_comes_while_a_swap_runs_is_told_so() -> None:
    world = reloaded()
    swap = world.swap()
    answer = world.answers[world.rollback()]
    assert (answer.code, answer.details["running"]["kind"]) == (423, "swap")
    assert answered(world, swap).ok


def test_a_reload_waits_for_a_rollback() -> None:
    world = reloaded()
    world.restore(1)
    world.crash(world.of(1)[0])
    rollback, reload = world.rollback(), world.reload()
    assert answered(world, rollback).ok
    assert reload not in world.answers
    assert answered(world, reload).ok
    assert world.promoted == [1, 2, 1, 3]


def test_a_stop_ends_what_is_staged_and_parked_and_answers_everybody() -> None:
    world = reloaded()
    world.restore(1)
    staged(world)
    world.crash(world.of(1)[0])
    rollback = world.rollback()
    world.run(0.5)
    stop = world.stop()
    assert world.answers[rollback].reason == turn.STOPPING_CAUSE
    world.run(30.0)
    assert world.exit == 0
    assert world.answers[stop].ok


def test_nothing_is_staged_promoted_or_discarded_once_a_stop_was_asked_for() -> None:
    world = reloaded()
    staged(world)
    world.stop(delay=3.0)
    for operation in (world.stage(), world.promote(), world.rollback(), world.discard()):
        assert world.answers[operation].reason == turn.STOPPING_CAUSE


def test_a_pause_of_the_master_does_not_shorten_how_long_a_generation_is_kept() -> None:
    world = reloaded()
    before = world.state.generations[1]
    after, _ = lifecycle.step(world.state, m.Paused(100.0), world.now)
    assert before.kept_until is not None
    assert before.warm_until is not None
    assert after.generations[1].kept_until == before.kept_until + 100.0
    assert after.generations[1].warm_until == before.warm_until + 100.0


def test_a_short_generation_that_takes_over_a_smaller_number_of_workers_serves_on() -> None:
    world = started(3, park_for=100.0)
    world.deploy()
    for process in world.of(1)[:2]:
        world.crash(process)
    world.run(2.0)
    assert world.state.generations[1].missing == 2
    assert answered(world, world.reload()).ok
    world.run(5.0)
    assert answered(world, world.scale(2)).ok
    assert answered(world, world.rollback()).ok
    world.run(5.0)
    assert {process.key[0] for process in world.serving()} == {1}
    assert world.state.generations[1].missing == 1

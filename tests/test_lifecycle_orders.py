"""The lifecycle alone: each promise in the order of events in which it matters, and nothing left to chance."""

from __future__ import annotations

import itertools

import pytest
from simulator import LIMITS, World

from segue.handoff.messages import BEFORE_STOP
from segue.supervisor import lifecycle, staffing, turn
from segue.supervisor import model as m
from segue.supervisor.model import GenerationState, Verb, WorkerState


def started(workers: int = 2) -> World:
    world = World(workers)
    operation = world.start()
    assert world.answers[operation].ok
    return world


def commands(world: World, verb: Verb, since: int = 0) -> list[m.Command]:
    return [each for each in world.log[since:] if isinstance(each, m.Command) and each.verb is verb]


def spawns(world: World, since: int = 0) -> list[m.Spawn]:
    return [each for each in world.log[since:] if isinstance(each, m.Spawn)]


def current(world: World) -> m.Generation:
    assert world.state.current is not None
    return world.state.generations[world.state.current]


def states(generation: m.Generation) -> list[WorkerState]:
    return [worker.state for worker in generation.workers.values()]


def answered(world: World, operation: int) -> m.Settle:
    world.run_until(lambda: operation in world.answers)
    return world.answers[operation]


# ------------------------------------------------------------------------------------------------- start and reload


@pytest.mark.parametrize("behaviour", ["exits", "hangs", "refuses activation", "silent on activation"])
def test_a_first_generation_that_does_not_start_exits_3_with_the_reason(behaviour: str) -> None:
    world = World(2)
    world.behaviour = behaviour
    operation, queued = world.reload(), world.reload()
    drain = world.drain("reject")
    world.run(60.0)
    assert world.exit == 3
    assert not world.answers[operation].ok
    assert world.answers[operation].reason
    assert not world.answers[queued].ok
    assert drain in world.answers


def test_a_first_generation_whose_settings_are_broken_exits_3() -> None:
    world = World(2)
    world.settings = "broken"
    operation = world.reload()
    world.run(1.0)
    assert world.exit == 3
    assert world.answers[operation].reason == "no such file: segue.toml"


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("exits", "exited with 3 during import"),
        ("hangs", "not ready within 20 s (ready-timeout)"),
        ("dies when ready", "exited with 1"),
        ("refuses activation", "could not be activated: no listener"),
        ("silent on activation", "could not be activated: no answer"),
    ],
)
def test_a_broken_reload_leaves_the_old_generation_serving(behaviour: str, reason: str) -> None:
    world = started()
    before = {process.key for process in world.serving()}
    world.deploy(behaviour)
    answer = answered(world, world.reload())
    assert not answer.ok
    assert reason in answer.reason
    world.run(100.0)
    assert {process.key for process in world.serving()} == before
    assert list(world.state.generations) == [1]
    assert not [command for command in commands(world, Verb.QUIET) if command.generation == 1]


def test_the_output_of_the_failed_worker_reaches_whoever_asked() -> None:
    world = started()
    world.deploy("exits")
    assert answered(world, world.reload()).output == "Traceback"


@pytest.mark.parametrize("settings", ["broken", "never read"])
def test_settings_that_can_not_be_read_refuse_a_reload(settings: str) -> None:
    world = started()
    world.settings = settings
    answer = answered(world, world.reload())
    assert not answer.ok
    assert answer.reason
    assert len(world.serving()) == 2
    assert list(world.state.generations) == [1]


def test_a_generation_is_promoted_only_when_all_its_workers_have_confirmed() -> None:
    world = started()
    world.reload()
    world.run_until(lambda: len(commands(world, Verb.ACTIVATE)) == 4)
    assert current(world).id == 1
    assert not commands(world, Verb.QUIET)
    assert world.state.generations[2].state is GenerationState.ACTIVATING
    world.run_until(lambda: world.promoted == [1, 2])
    assert states(current(world)) == [WorkerState.ACTIVE] * 2
    assert {command.generation for command in commands(world, Verb.QUIET)} == {1}


def test_requests_while_a_reload_runs_are_merged_into_one_and_all_are_answered() -> None:
    world = started()
    operations = [world.reload() for _ in range(4)]
    world.run(30.0)
    answers = [world.answers[operation] for operation in operations]
    assert all(answer.ok for answer in answers)
    assert [answer.generation for answer in answers] == [2, 3, 3, 3]
    assert world.promoted == [1, 2, 3]


def test_requests_merged_behind_a_reload_that_fails_are_answered_by_the_next() -> None:
    world = started()
    world.deploy("exits")
    first, second = world.reload(), world.reload()
    assert not answered(world, first).ok
    world.deploy("good")
    assert not answered(world, second).ok  # it had read the code already
    assert answered(world, world.reload()).ok


def test_a_save_overtakes_a_start_that_hangs_and_answers_whoever_waits_for_it() -> None:
    world = started()
    world.deploy("hangs")
    first, second = world.save(), world.reload()
    world.run(1.0)
    world.deploy("good")
    third = world.save()
    assert all(answered(world, operation).ok for operation in (first, second, third))
    assert {world.answers[operation].generation for operation in (first, second, third)} == {3}
    world.run(30.0)
    assert {process.key[0] for process in world.live()} == {3}


def test_a_save_does_not_overtake_what_is_being_activated() -> None:
    world = started()
    world.deploy("good")
    first = world.save()
    activating = GenerationState.ACTIVATING
    world.run_until(lambda: 2 in world.state.generations and world.state.generations[2].state is activating)
    second = world.save()
    assert answered(world, first).generation == 2
    assert answered(world, second).generation == 3


def test_a_reload_that_is_asked_for_by_hand_waits_for_the_one_before_it() -> None:
    world = started()
    world.deploy("hangs")
    first, second = world.reload(), world.reload()
    assert not answered(world, first).ok
    assert not answered(world, second).ok
    assert world.answers[second].generation == 3


def test_in_development_a_first_generation_that_does_not_start_waits_for_the_next_save() -> None:
    world = World(2)
    world.state.developing = True
    world.behaviour = "exits"
    assert not answered(world, world.reload()).ok
    world.run(60.0)
    assert world.exit is None
    world.behaviour = "hangs"
    hanging = world.save()
    world.run(1.0)
    world.behaviour = "good"
    assert answered(world, world.save()).ok
    assert answered(world, hanging).ok
    stop = world.stop()
    assert answered(world, stop).ok
    assert world.exit == 0


def test_a_promote_that_fails_halfway_is_handed_back_and_cuts_nobody() -> None:
    world = started()
    world.deploy("one refuses activation")
    seen = len(world.log)
    assert not answered(world, world.reload()).ok
    world.run(10.0)
    assert {process.key[0] for process in world.live()} == {1}
    accepted = [command.worker for command in commands(world, Verb.HAND_OVER, seen)]
    assert 2 in accepted
    assert not [each for each in world.log[seen:] if isinstance(each, m.Kill) and each.worker == 2]


def test_a_generation_that_drains_is_not_filled_up_again() -> None:
    world = started()
    world.turn("boots fail", on=True)
    world.crash(world.serving()[0])
    world.run(6.0)
    assert current(world).respawn_at
    world.turn("boots fail", on=False)
    world.serving()[0].work_s = 50.0
    seen = len(world.log)
    assert answered(world, world.reload()).ok
    world.run(100.0)
    assert {spawn.generation for spawn in spawns(world, seen)} == {2}


def test_a_handover_has_two_phases() -> None:
    """Nobody sends before all that leave have stopped reading."""
    world = started(workers=3)
    [slow] = [process for process in world.of(1) if process.key[1] == 2]
    world.reload()
    world.run_until(lambda: len(world.promoted) == 2)
    world.hang(slow)
    world.run(2.0)
    assert sorted(states(world.state.generations[1])) == [
        WorkerState.QUIET,
        WorkerState.QUIET,
        WorkerState.QUIETING,
    ]
    assert not commands(world, Verb.HAND_OVER)
    world.wake(slow)
    world.run(2.0)
    assert len(commands(world, Verb.HAND_OVER)) == 3


def test_a_worker_that_does_not_confirm_the_first_phase_does_not_hold_up_the_second() -> None:
    world = started()
    silent, other = world.of(1)
    world.reload()
    world.run_until(lambda: len(world.promoted) == 2)
    world.hang(silent)
    world.run_until(lambda: not other.alive, limit=LIMITS.drain_timeout)
    world.run_until(lambda: not silent.alive, limit=LIMITS.drain_timeout)


def test_a_handover_that_is_refused_is_asked_for_again_without_a_busy_loop() -> None:
    world = started(workers=1)
    world.reload()
    world.run_until(lambda: world.state.generations[1].having(frozenset({WorkerState.QUIETING})) != [])
    world.run(turn.QUIET_TIMEOUT_S / 1000)
    world.turn("commands refused", on=True)
    world.run(20.0)
    assert 2 <= len(commands(world, Verb.HAND_OVER)) <= 10
    world.turn("commands refused", on=False)
    world.run_until(lambda: list(world.state.generations) == [2], limit=10.0)


def test_a_draining_worker_is_ended_at_its_deadline() -> None:
    world = started(workers=1)
    [old] = world.of(1)
    old.work_s = 100_000.0
    world.reload()
    world.run_until(lambda: len(world.promoted) == 2)
    promoted = world.now
    world.hang(old)  # it does not even cut by itself
    world.run_until(lambda: not old.alive)
    assert world.now - promoted <= LIMITS.drain_timeout + 4 * turn.SLACK_S


def test_several_old_generations_drain_at_once_each_with_its_deadline() -> None:
    world = started(workers=1)
    for expected in (2, 3, 4):
        for process in world.live():
            process.work_s = 50.0
        assert answered(world, world.reload()).generation == expected
        world.run(5.0)
    draining = [g for g in world.state.generations.values() if g.state is GenerationState.DRAINING]
    assert [generation.id for generation in draining] == [1, 2, 3]
    deadlines = [worker.deadline for generation in draining for worker in generation.workers.values()]
    assert deadlines == sorted(deadlines, key=lambda deadline: deadline or 0.0)
    assert len(set(deadlines)) == 3
    assert world.drained == [1]
    world.run(60.0)
    assert list(world.state.generations) == [4]
    assert world.drained == [1, 2, 3, 4]


# -------------------------------------------------------------------------------------- crashes, hangs, other code


def test_a_crash_is_replaced_and_its_sibling_serves_on() -> None:
    world = started()
    victim, sibling = world.serving()
    world.crash(victim)
    assert world.serving() == [sibling]
    world.run(3.0)
    assert len(world.serving()) == 2


def test_failed_respawns_back_off_exponentially_up_to_a_cap_and_a_start_resets_it() -> None:
    world = started()
    world.turn("boots fail", on=True)
    seen = len(world.log)
    world.crash(world.serving()[0])
    world.run(300.0)
    times = [world.spawned[each.generation, each.worker] for each in spawns(world, seen)]
    failed_after = 0.3 + 0.05
    pauses = [round(later - earlier - failed_after, 3) for earlier, later in itertools.pairwise(times)]
    assert pauses[:8] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert len(world.serving()) == 1
    world.turn("boots fail", on=False)
    world.run(40.0)
    assert len(world.serving()) == 2
    assert current(world).streak == 0
    seen = len(world.log)
    world.crash(world.serving()[0])
    world.run(0.1)
    assert len(spawns(world, seen)) == 1  # at once again


def test_the_backoff_starts_at_nothing_and_is_capped() -> None:
    assert [staffing.backoff(streak) for streak in (0, 1, 2, 3)] == [0.0, 0.5, 1.0, 2.0]
    assert staffing.backoff(1000) == staffing.BACKOFF_CAP_S


def test_a_hung_worker_is_replaced_first_and_killed_after() -> None:
    world = started()
    hung = world.serving()[0]
    world.hang(hung)
    world.run_until(lambda: world.said["worker-replaced"] == 1)
    assert hung.alive
    world.run_until(lambda: current(world).workers[3].state is WorkerState.ACTIVE)
    assert hung.alive or world.said["worker-killed"]
    world.run(1.0)
    assert not hung.alive
    assert len(world.serving()) == 2


def test_hung_workers_are_replaced_one_at_a_time() -> None:
    world = started(workers=3)
    seen = len(world.log)
    for process in world.serving():
        world.hang(process)
    world.run_until(lambda: world.said["worker-replaced"] == 1)
    world.run(0.5)
    assert len(spawns(world, seen)) == 1
    assert states(current(world)).count(WorkerState.HUNG) == 3
    world.run(30.0)
    assert len(world.serving()) == 3
    assert not any(process.hung for process in world.live())


def test_a_hung_worker_whose_replacement_does_not_start_gets_another_later() -> None:
    world = started()
    hung = world.serving()[0]
    world.turn("boots fail", on=True)
    world.hang(hung)
    world.run(60.0)
    assert hung.alive
    assert 3 < world.said["worker-replaced"] < 20
    world.turn("boots fail", on=False)
    world.run(60.0)
    assert not hung.alive
    assert len(world.serving()) == 2


def test_a_worker_that_asks_to_be_replaced_is_not_cut() -> None:
    world = started(workers=1)
    tired = world.serving()[0]
    tired.wants_recycling, tired.work_s = True, 10.0
    world.run_until(lambda: not tired.accepts)
    assert len(world.serving()) == 1
    world.run_until(lambda: not tired.alive)
    assert not world.said["worker-killed"]


def test_who_has_long_streams_is_recycled_but_not_as_fast_as_processes_can_be_started() -> None:
    """Each goes on until its streams end: more and more of them would fill the memory."""
    world = started(workers=2)
    most = 0

    def look() -> bool:
        nonlocal most
        for process in world.serving():
            process.wants_recycling, process.work_s = True, 1000.0
        leaving = current(world).having(m.LEAVING)
        most = max(most, len(leaving))
        return world.said["worker-replaced"] >= 8

    world.run_until(look, limit=2000.0)
    assert 2 <= most < 4
    assert len(world.serving()) == 2


def test_who_is_to_be_recycled_stays_while_the_code_has_changed() -> None:
    world = started()
    world.deploy("good")
    [recycled, _] = world.serving()
    recycled.wants_recycling = True
    world.run_until(lambda: world.said["worker-not-replaced"] >= 2, limit=100.0)
    assert recycled in world.serving()
    assert not world.said["generation-short"]
    assert answered(world, world.reload()).ok
    assert not [process for process in world.serving() if process.key[0] == 1]


def test_a_respawn_does_not_take_part_when_the_code_has_changed() -> None:
    world = started()
    world.deploy("good")
    world.crash(world.serving()[0])
    world.run(100.0)
    assert len(world.serving()) == 1
    assert (current(world).missing, current(world).wanted) == (1, 1)
    assert world.said["generation-short"] == 1
    assert answered(world, world.reload()).ok
    world.run(10.0)
    assert len(world.serving()) == 2


def test_a_respawn_whose_code_changes_while_it_starts_is_ended() -> None:
    world = started()
    world.crash(world.serving()[0])
    world.run(0.5)
    world.deploy("good")
    world.run(30.0)
    assert len(world.live()) == 1
    assert current(world).missing == 1


def test_when_nothing_is_left_a_gated_reload_is_tried_by_itself_until_it_succeeds() -> None:
    world = started()
    world.deploy("exits")
    for process in world.serving():
        world.crash(process)
    world.run(20.0)
    assert not world.serving()
    tried = len([each for each in world.log if isinstance(each, m.Prepare)])
    assert 4 <= tried <= 8
    world.deploy("good")
    world.run(40.0)
    assert len(world.serving()) == 2
    assert world.promoted[-1] == current(world).id > 2


# -------------------------------------------------------------------------------------------------- scale and drain


def test_scale_up_is_told_when_all_serve() -> None:
    world = started()
    operation = world.scale(4)
    world.run(0.5)
    assert operation not in world.answers
    assert answered(world, operation).ok
    assert len(world.serving()) == 4


def test_scale_down_drains_instead_of_cutting() -> None:
    world = started(workers=3)
    leaving = world.serving()[2]
    leaving.work_s = 20.0
    assert answered(world, world.scale(2)).ok
    world.run(10.0)
    assert leaving.mode == "draining"
    world.run(15.0)
    assert not leaving.alive
    assert world.ended[leaving.key] == 1
    assert not world.said["worker-killed"]


@pytest.mark.parametrize("weather", ["boots fail", "boots hang", "spawns fail", "commands refused"])
def test_a_scale_up_that_fails_goes_back_to_the_number_that_there_was(weather: str) -> None:
    world = started()
    world.turn(weather, on=True)
    answer = answered(world, world.scale(4))
    assert not answer.ok
    assert answer.reason
    world.turn(weather, on=False)
    world.run(60.0)
    assert current(world).target == 2
    assert len(world.live()) == 2


def test_a_scale_up_on_changed_code_is_refused_and_the_generation_stays_whole() -> None:
    world = started()
    world.deploy("good")
    answer = answered(world, world.scale(4))
    assert not answer.ok
    assert "reload" in answer.reason
    world.run(60.0)
    assert (current(world).target, current(world).missing) == (2, 0)
    assert len(world.serving()) == 2


def test_scaling_a_short_generation_down_to_what_serves_takes_nobody_away() -> None:
    world = started()
    world.deploy("good")
    world.crash(world.serving()[0])
    world.run(5.0)
    assert current(world).missing == 1
    assert answered(world, world.scale(1)).ok
    world.run(60.0)
    assert len(world.serving()) == 1
    assert (current(world).target, current(world).missing) == (1, 0)


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_workers_that_can_not_serve_is_refused(count: int) -> None:
    world = started()
    answer = answered(world, world.scale(count))
    assert not answer.ok
    assert len(world.serving()) == 2


def test_two_scalings_at_once_are_refused_and_so_is_one_during_a_reload() -> None:
    world = started()
    first, second = world.scale(3), world.scale(4)
    assert not world.answers[second].ok
    assert answered(world, first).ok
    reload, third = world.reload(), world.scale(4)
    assert not world.answers[third].ok
    assert answered(world, reload).ok


def test_a_reload_that_overtakes_a_scaling_says_so() -> None:
    world = started()
    scale = world.scale(3)
    reload = world.reload()
    assert answered(world, reload).ok
    assert "a reload came between" in world.answers[scale].reason
    world.run(30.0)
    assert len(world.serving()) == current(world).target


def test_signals_to_scale_that_come_during_a_reload_or_another_scaling_have_their_turn() -> None:
    world = started()
    world.reload()
    world.nudge(1)
    world.nudge(1)
    world.run(10.0)
    assert len(world.serving()) == 4
    world.scale(5)
    world.nudge(-1)
    world.run(10.0)
    assert len(world.serving()) == 4
    for _ in range(9):
        world.nudge(-1)
    world.run(30.0)
    assert len(world.serving()) == 1


def test_a_hung_worker_is_the_one_that_leaves_when_fewer_are_asked_for() -> None:
    world = started()
    hung, healthy = world.serving()
    world.hang(hung)
    world.run_until(lambda: world.said["worker-replaced"] == 1)
    world.scale(1)
    world.run(10.0)
    assert world.serving() == [healthy]


def test_the_operators_drain_is_told_to_all_and_to_those_to_come() -> None:
    world = started()
    world.reload()
    world.run(0.5)
    assert answered(world, world.drain("reject")).ok
    assert not world.state.ready
    world.run(30.0)
    assert {process.operator_drain for process in world.live()} == {"reject"}
    world.crash(world.serving()[0])
    assert answered(world, world.drain(None)).ok
    world.run(30.0)
    assert {process.operator_drain for process in world.live()} == {None}
    assert len(world.serving()) == 2
    assert world.state.ready


def test_an_answer_to_an_older_drain_request_is_not_taken_for_the_newer_ones() -> None:
    world = started(workers=1)
    [worker] = world.serving()
    world.hang(worker)
    first, second = world.drain("reject"), world.drain("queue")
    assert not world.answers[first].ok
    world.run(turn.COMMAND_TIMEOUT_S + 1.0)
    assert second not in world.answers
    world.wake(worker)
    assert answered(world, second).ok
    assert worker.operator_drain == "queue"


def test_a_drain_that_a_worker_did_not_take_is_not_called_a_success() -> None:
    world = started()
    world.turn("commands refused", on=True)
    answer = answered(world, world.drain("reject"))
    assert not answer.ok
    assert "did not take the drain mode: not now" in answer.reason
    world.turn("commands refused", on=False)
    world.run(60.0)
    assert {process.operator_drain for process in world.serving()} == {"reject"}


# ------------------------------------------------------------------------------------------------------------- stop


def test_a_graceful_stop_ends_all_and_exits_0() -> None:
    world = started()
    operation = world.stop()
    world.run(30.0)
    assert world.exit == 0
    assert world.answers[operation].ok


def test_a_stop_that_cuts_something_off_does_not_exit_with_0() -> None:
    world = started()
    world.serving()[0].work_s = 1000.0
    operation = world.stop(budget=5.0)
    world.run(30.0)
    assert world.exit == 1
    assert not world.answers[operation].ok


def test_a_stop_of_what_does_not_serve_does_not_exit_with_0() -> None:
    world = started(workers=1)
    world.turn("boots fail", on=True)
    world.crash(world.serving()[0])
    world.run(5.0)
    world.signal_stop()
    world.run(30.0)
    assert world.exit == 1


def test_a_stop_during_a_reload_ends_both_generations_and_answers_everybody() -> None:
    world = started()
    reload, queued = world.reload(), world.reload()
    world.run(1.0)
    stop = world.stop()
    assert not world.answers[reload].ok
    assert not world.answers[queued].ok
    world.run(60.0)
    assert world.exit == 0
    assert world.answers[stop].ok
    assert world.promoted == [1]


def test_nothing_is_accepted_once_a_stop_was_asked_for() -> None:
    world = started()
    world.stop(delay=3.0)
    for operation in (world.reload(), world.scale(4), world.drain("reject")):
        assert not world.answers[operation].ok
        assert world.answers[operation].reason == turn.STOPPING_CAUSE


@pytest.mark.parametrize("delay", [0.0, 5.0])
def test_a_second_signal_stops_at_once(delay: float) -> None:
    world = started()
    for process in world.serving():
        process.work_s = 1000.0
    world.signal_stop(delay=delay, budget=500.0)
    world.run(1.0)
    assert world.exit is None
    world.signal_stop(delay=delay, budget=500.0)
    world.run(1.0)
    assert world.exit is not None


def test_a_second_request_to_stop_waits_with_the_first() -> None:
    world = started()
    first, second = world.stop(), world.stop()
    world.run(30.0)
    assert world.answers[first].ok
    assert world.answers[second].ok


def test_stop_delay_goes_on_serving_with_readiness_off_and_replaces_what_dies() -> None:
    world = started(workers=1)
    world.signal_stop(delay=10.0)
    assert not world.state.ready
    world.run(1.0)
    assert {process.operator_drain for process in world.serving()} == {BEFORE_STOP}
    world.crash(world.serving()[0])
    world.run(5.0)
    assert [process.operator_drain for process in world.serving()] == [BEFORE_STOP]
    world.run(20.0)
    assert world.exit == 0


def test_a_stop_delay_in_which_everything_dies_does_not_exit_with_0() -> None:
    world = started(workers=1)
    world.signal_stop(delay=10.0)
    world.turn("boots fail", on=True)
    world.crash(world.serving()[0])
    world.run(60.0)
    assert world.exit == 1


def test_nothing_is_started_after_a_stop_at_once() -> None:
    world = started()
    world.turn("boots fail", on=True)
    world.crash(world.serving()[0])
    world.run(4.0)
    assert current(world).respawn_at
    world.hang(world.serving()[0])
    seen = len(world.log)
    world.death_s = 30.0
    world.signal_stop(at_once=True)
    world.run(60.0)
    assert world.exit is not None
    assert not spawns(world, seen)


@pytest.mark.parametrize("changed", [False, True])
def test_a_stop_while_a_respawn_is_compared_with_the_code_on_disk_ends(changed: bool) -> None:
    world = started()
    world.turn("slow disk", on=True)
    world.crash(world.serving()[0])
    world.run(0.5)
    if changed:
        world.deploy("good")
    world.signal_stop(at_once=True)
    world.run(60.0)
    assert world.exit is not None
    assert not world.live()


def test_workers_that_ignore_everything_are_killed_in_the_end() -> None:
    world = started()
    world.turn("stubborn", on=True)
    world.turn("requests lost", on=True)
    world.signal_stop()
    world.run(60.0)
    assert world.exit == 1


# ------------------------------------------------------------------------------------------------------------- time


def test_a_pause_of_the_master_blames_nobody() -> None:
    world = started()
    world.turn("datagrams lost", on=True)  # not even what was said meanwhile is heard
    world.run(5.0)
    world.pause(1000.0)
    world.turn("datagrams lost", on=False)
    world.run(5.0)
    assert not world.said["worker-replaced"]
    assert len(world.serving()) == 2


def test_a_pause_moves_every_deadline() -> None:
    world = started()
    world.turn("boots fail", on=True)
    world.crash(world.serving()[0])
    world.run(4.0)
    world.settings = "never read"
    world.reload()
    before = world.state
    after, _ = lifecycle.step(before, m.Paused(100.0), world.now)
    assert current(world).respawn_at
    for number, generation in before.generations.items():
        later = after.generations[number]
        assert later.respawn_at == [time + 100.0 for time in generation.respawn_at]
        assert later.deadline == (None if generation.deadline is None else generation.deadline + 100.0)
        assert all(worker.heard == world.now for worker in later.workers.values())
    stopping, _ = lifecycle.step(before, m.StopAsked(None, delay=50.0), world.now)
    paused, _ = lifecycle.step(stopping, m.Paused(100.0), world.now)
    assert paused.stopping is not None
    assert paused.stopping.deadline == world.now + 150.0


def test_what_stood_still_with_the_master_gets_time_to_go_on() -> None:
    """A frozen container: workers that were booting could not do anything either."""
    world = started()
    world.deploy("slow")
    operation = world.reload()
    world.run(2.0)
    for process in world.of(2):
        world.hang(process)
    world.pause(1000.0)
    for process in world.live():
        world.wake(process)
    assert answered(world, operation).ok


def test_a_worker_that_hangs_after_a_pause_is_noticed_as_soon_as_ever() -> None:
    world = started()
    world.pause(1000.0)
    world.run(5.0)
    world.hang(world.serving()[0])
    world.run_until(lambda: world.said["worker-replaced"] == 1, limit=LIMITS.heartbeat_timeout + 1.0)


def test_silence_is_believed_only_after_a_second_look() -> None:
    """What it said may have been lost while the master stood still, for less than that would notice."""
    world = started()
    worker = world.serving()[0]
    world.hang(worker)
    world.run(LIMITS.heartbeat_timeout + 0.5)
    world.wake(worker)
    world.run(LIMITS.heartbeat_timeout)
    assert not world.said["worker-replaced"]


def test_an_idle_instance_has_only_its_heartbeats_to_wait_for() -> None:
    world = started(workers=1)
    world.run(20.0)
    [worker] = current(world).workers.values()
    assert lifecycle.next_deadline(world.state) == worker.heard + LIMITS.heartbeat_timeout

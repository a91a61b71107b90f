"""The lifecycle alone: swaps of services, and whose services take work. Each promise in the order in which it matters."""

from __future__ import annotations

import msgspec
import pytest
from simulated_worker import HANDOVER_S, Process
from simulator import LIMITS, World

from segue.handoff.messages import ServiceRecord
from segue.supervisor import handover, lifecycle, swaps, turn
from segue.supervisor import model as m
from segue.supervisor.model import ServicesState, Verb, WorkerState


def started(workers: int = 3) -> World:
    """An instance that has settled: its services are active, and the first worker leads."""
    world = World(workers)
    assert world.answers[world.start()].ok
    world.run(1.0)
    assert leads(world) == [(1, 1)]
    return world


def current(world: World) -> m.Generation:
    assert world.state.current is not None
    return world.state.generations[world.state.current]


def answered(world: World, operation: int, limit: float = 600.0) -> m.Settle:
    world.run_until(lambda: operation in world.answers, limit)
    return world.answers[operation]


def swap_commands(world: World, verb: Verb, since: int = 0) -> list[m.SwapCommand]:
    return [each for each in world.log[since:] if isinstance(each, m.SwapCommand) and each.verb is verb]


def service_commands(world: World, verb: Verb, since: int = 0) -> list[m.Command]:
    return [each for each in world.log[since:] if isinstance(each, m.Command) and each.verb is verb]


def spawns(world: World, since: int = 0) -> list[m.Spawn]:
    return [each for each in world.log[since:] if isinstance(each, m.Spawn)]


def phases(world: World, operation: int) -> list[str]:
    return [e.phase for e in world.log if isinstance(e, m.Progress) and operation in e.operations]


def leads(world: World) -> list[tuple[int, int]]:
    return [process.key for process in world.live() if process.leads]


def versions(world: World, service: str = "model") -> list[int]:
    return [process.versions.get(service, 1) for process in world.serving()]


def until_prepared(world: World) -> None:
    """The swap is being prepared in all workers, and none of them has answered."""
    world.run_until(lambda: world.state.swap is not None)
    world.run(0.1)


def until_first_commits(world: World) -> Process:
    """The first worker has been told to commit, and has not been heard of since."""
    world.run_until(lambda: bool(swap_commands(world, Verb.SWAP_COMMIT)))
    command = swap_commands(world, Verb.SWAP_COMMIT)[0]
    return world.processes[command.generation, command.worker]


def calm(world: World) -> None:
    """Nothing goes wrong any more, and in the end all is well."""
    world.heal()
    world.check_settled()


# ------------------------------------------------------------------------------------------------- all or nothing


def test_a_swap_replaces_the_service_in_every_worker_and_says_what_came_of_it() -> None:
    world = started()
    operation = world.swap("model", name="large")
    answer = answered(world, operation)
    assert answer.ok
    assert answer.generation == 1
    assert versions(world) == [2, 2, 2]
    assert phases(world, operation) == ["prepare", "commit"]
    assert answer.result is not None
    assert (answer.result["service"], answer.result["version"]) == ("model", 2)
    assert answer.result["workers"] == [
        {"worker": n, "build_s": 0.5, "rewired": ["cache", f"router-{n}"], "moved": True} for n in (1, 2, 3)
    ]
    assert answer.result["rewired"] == ["cache", "router-1", "router-2", "router-3"]
    assert world.state.services == {"model": ServiceRecord(2, {"name": "large"})}
    assert world.state.swap_count == 1
    calm(world)


def test_the_next_swap_starts_from_what_the_last_one_decided() -> None:
    world = started()
    assert answered(world, world.swap("model", name="large")).ok
    seen = len(world.log)
    assert answered(world, world.swap("model", place="gpu")).ok
    prepares = swap_commands(world, Verb.SWAP_PREPARE, seen)
    assert {each.version for each in prepares} == {3}
    assert all(each.choices == {"name": "large"} for each in prepares)
    assert all(each.query == {"place": "gpu"} for each in prepares)
    assert world.state.services["model"] == ServiceRecord(3, {"name": "large", "place": "gpu"})


def test_one_worker_commits_first_and_its_confirmation_is_the_decision() -> None:
    world = started()
    operation = world.swap()
    until_first_commits(world)
    assert len(swap_commands(world, Verb.SWAP_COMMIT)) == 1
    assert not world.state.services
    world.run_until(lambda: world.state.swap_count == 1)
    assert world.state.services == {"model": ServiceRecord(2, {})}
    assert len(swap_commands(world, Verb.SWAP_COMMIT)) == 3
    assert operation not in world.answers
    assert answered(world, operation).ok


@pytest.mark.parametrize("who", ["all", "odd", "even"])
def test_a_worker_that_can_not_prepare_refuses_the_swap_for_all(who: str) -> None:
    world = started()
    world.faults["refuses prepare"] = who
    answer = answered(world, world.swap("modle"))
    assert not answer.ok
    assert answer.reason in {f"worker {number}: no prepare" for number in (1, 2)}
    assert (answer.code, answer.details) == (404, {"known": ["model"]})
    assert answer.result is None
    world.run(5.0)
    assert not swap_commands(world, Verb.SWAP_COMMIT)
    assert {each.worker for each in swap_commands(world, Verb.SWAP_ABORT)} == {1, 2, 3}
    assert versions(world, "modle") == [1, 1, 1]
    assert not any(process.prepared for process in world.live())
    assert not world.said["worker-replaced"]
    calm(world)


def test_workers_that_disagree_refuse_the_swap_without_saying_what_was_chosen() -> None:
    world = started()
    world.faults["differs"] = "even"
    answer = answered(world, world.swap("model", key="s3cret"))
    assert answer.reason == "the workers disagree: worker 2 has another digest than worker 1"
    assert not swap_commands(world, Verb.SWAP_COMMIT)
    calm(world)


def test_choices_are_neither_logged_nor_answered_nor_sent_twice() -> None:
    world = started()
    assert answered(world, world.swap("model", key="s3cret")).ok
    world.faults["refuses commit"] = "all"
    assert not answered(world, world.swap("model", key="s3cret")).ok
    for effect in world.log:
        secret = isinstance(effect, m.Spawn) or (
            isinstance(effect, m.SwapCommand) and effect.verb is Verb.SWAP_PREPARE
        )
        assert secret or "s3cret" not in repr(effect)


def test_a_worker_that_dies_while_it_prepares_refuses_the_swap() -> None:
    world = started()
    world.faults["dies in prepare"] = "even"
    answer = answered(world, world.swap())
    assert answer.reason == "worker 2 crashed"
    world.faults.clear()
    world.run(10.0)
    assert versions(world) == [1, 1, 1]
    calm(world)


def test_a_worker_that_dies_while_another_commits_refuses_the_swap_and_the_other_is_replaced() -> None:
    """The confirmation that would have decided may still come: nobody knows what that worker has."""
    world = started()
    operation = world.swap()
    first = until_first_commits(world)
    world.crash(world.processes[1, 3])
    assert world.answers[operation].reason == "worker 3 crashed"
    world.run(0.1)
    assert first.versions == {"model": 2}
    assert current(world).workers[first.key[1]].replace_why
    world.run_until(lambda: not first.alive)
    assert versions(world) == [1, 1, 1]
    assert not world.state.services
    calm(world)


def test_a_worker_that_hangs_while_it_prepares_refuses_the_swap_as_soon_as_that_is_noticed() -> None:
    world = started()
    operation = world.swap()
    until_prepared(world)
    world.hang(world.processes[1, 2])
    answer = answered(world, operation, limit=LIMITS.heartbeat_timeout + 1.0)
    assert answer.reason == "worker 2: its event loop is silent"
    calm(world)


def test_a_worker_that_hangs_already_refuses_the_swap_before_it_starts() -> None:
    world = started()
    world.turn("boots fail", on=True)
    world.hang(world.processes[1, 2])
    world.run_until(lambda: world.said["worker-replaced"] == 1)
    assert answered(world, world.swap(), limit=0.1).reason == "worker 2: its event loop is silent"
    assert not swap_commands(world, Verb.SWAP_PREPARE)
    calm(world)


def test_a_worker_that_begins_to_leave_before_the_decision_refuses_the_swap() -> None:
    world = started()
    world.crash(world.processes[1, 2])
    world.run_until(lambda: bool(current(world).having(frozenset({WorkerState.ACTIVATING}))))
    world.processes[1, 4].behaviour = "refuses activation"
    answer = answered(world, world.swap())
    assert answer.reason.startswith("worker 4: worker 4 could not be activated")
    calm(world)


def test_whoever_asked_is_told_at_once_though_another_worker_still_prepares() -> None:
    world = started()
    world.faults |= {"hangs in prepare": "odd", "refuses prepare": "even"}
    operation = world.swap()
    answer = answered(world, operation, limit=2.0)
    assert answer.reason == "worker 2: no prepare"
    world.run(10.0)
    assert {each.worker for each in swap_commands(world, Verb.SWAP_ABORT)} == {2}
    world.run_until(lambda: len(swap_commands(world, Verb.SWAP_ABORT)) == 3)
    calm(world)


def test_a_worker_is_not_told_of_another_swap_before_it_is_done_with_the_last() -> None:
    world = started()
    world.faults |= {"hangs in prepare": "odd", "refuses prepare": "even"}
    assert not answered(world, world.swap()).ok
    world.faults.clear()
    seen, next_one = len(world.log), world.swap()
    world.run(60.0)
    assert phases(world, next_one) == ["queued"]
    assert answered(world, next_one).ok
    first = next(each for each in world.log[seen:] if isinstance(each, m.SwapCommand))
    assert first.verb is Verb.SWAP_ABORT


def test_a_first_commit_that_fails_and_is_rolled_back_costs_nobody_anything() -> None:
    world = started()
    world.faults["refuses commit"] = "all"
    answer = answered(world, world.swap())
    assert answer.reason == "worker 1: no commit"
    assert len(swap_commands(world, Verb.SWAP_COMMIT)) == 1
    world.run(100.0)
    assert versions(world) == [1, 1, 1]
    assert not world.said["worker-replaced"]
    assert [process.key for process in world.live()] == [(1, 1), (1, 2), (1, 3)]
    calm(world)


def test_a_first_commit_of_unknown_outcome_is_refused_and_that_worker_replaced() -> None:
    world = started()
    world.faults["silent commit"] = "odd"
    answer = answered(world, world.swap())
    assert answer.reason == "worker 1: no answer in time"
    assert world.processes[1, 1].versions == {"model": 2}
    assert "nobody knows" in current(world).workers[1].replace_why
    world.run_until(lambda: not world.processes[1, 1].alive)
    assert versions(world) == [1, 1, 1]
    calm(world)


def test_a_first_worker_that_dies_in_its_commit_refuses_the_swap_and_is_started_with_the_old_record() -> None:
    world = started()
    world.faults["dies in commit"] = "odd"
    assert not answered(world, world.swap()).ok
    world.run(10.0)
    assert versions(world) == [1, 1, 1]
    assert [spawn.services for spawn in spawns(world)] == [{}] * 4
    calm(world)


def test_a_worker_that_does_not_take_the_swap_back_is_replaced() -> None:
    world = started()
    world.faults |= {"differs": "even", "refuses abort": "odd"}
    assert not answered(world, world.swap()).ok
    world.run(30.0)
    assert {process.key for process in world.live()} == {(1, 2), (1, 4), (1, 5)}
    calm(world)


# ------------------------------------------------------------------------------------------------ after the decision


@pytest.mark.parametrize("fault", ["refuses commit", "silent commit"])
def test_a_worker_that_does_not_follow_is_replaced_by_one_that_has_it(fault: str) -> None:
    world = started()
    world.faults[fault] = "even"
    answer = answered(world, world.swap())
    assert answer.ok
    assert answer.result is not None
    assert [each["worker"] for each in answer.result["workers"]] == [1, 3]
    world.run(1.0)
    assert not [each for each in world.serving() if each.versions != {"model": 2}]
    assert spawns(world)[-1].services == {"model": ServiceRecord(2, {})}
    world.faults.clear()
    calm(world)


def test_a_worker_that_dies_after_the_decision_is_started_with_what_was_decided() -> None:
    world = started()
    world.faults["dies in commit"] = "even"
    assert answered(world, world.swap()).ok
    world.run(10.0)
    assert versions(world) == [2, 2, 2]
    assert spawns(world)[-1].services == {"model": ServiceRecord(2, {})}
    calm(world)


def test_a_swap_that_a_worker_does_not_follow_in_time_is_not_called_a_success() -> None:
    world = started()
    world.faults["refuses commit"] = "even"
    operation = world.swap()
    until_first_commits(world)
    world.turn("boots fail", on=True)
    decided = world.now
    answer = answered(world, operation)
    assert world.now - decided >= swaps.SWAP_FOLLOW_TIMEOUT_S
    assert not answer.ok
    assert answer.reason == "it is committed, but worker 2 does not follow and is being replaced"
    assert answer.result is not None
    assert world.state.swap_count == 1
    calm(world)
    assert versions(world) == [2, 2, 2]


def test_a_pause_of_the_master_moves_the_deadline_of_those_that_follow() -> None:
    world = started()
    world.faults["silent commit"] = "even"
    world.swap()
    world.run_until(lambda: world.state.swap_count == 1)
    assert world.state.swap is not None
    before = world.state.swap.deadline
    assert before is not None
    after, _ = lifecycle.step(world.state, m.Paused(100.0), world.now)
    assert after.swap is not None
    assert after.swap.deadline == before + 100.0


# ------------------------------------------------------------------------------------------ what starts in a swap


def test_what_was_decided_outlives_reloads_and_reaches_every_worker_that_starts() -> None:
    world = started(workers=2)
    assert answered(world, world.swap("model", name="large")).ok
    seen = len(world.log)
    assert answered(world, world.reload()).ok
    assert answered(world, world.scale(3)).ok
    world.crash(world.serving()[0])
    world.run(10.0)
    record = {"model": ServiceRecord(2, {"name": "large"})}
    assert [spawn.services for spawn in spawns(world, seen)] == [record] * 4
    assert versions(world) == [2, 2, 2]
    calm(world)


def test_what_took_part_in_a_swap_is_kept_warm_and_gone_back_to() -> None:
    world = started()
    world.limits = msgspec.structs.replace(LIMITS, park_for=100.0)
    assert answered(world, world.reload()).ok
    assert answered(world, world.swap(name="large")).ok
    before = {process.key for process in world.serving()}
    world.deploy()
    assert answered(world, world.reload()).ok
    world.run(5.0)
    since = len(world.log)
    assert answered(world, world.rollback()).ok
    assert {process.key for process in world.serving()} == before
    assert versions(world) == [2, 2, 2]
    assert not spawns(world, since)


def test_what_becomes_ready_while_a_swap_is_undecided_waits_and_starts_over_when_it_is_decided() -> None:
    world = started()
    world.faults["hangs in prepare"] = "odd"
    world.crash(world.processes[1, 2])
    world.run(0.2)
    operation = world.swap()
    world.run(10.0)
    assert current(world).workers[4].state is WorkerState.READY
    slow = [world.processes[1, number] for number in (1, 3)]
    for process in slow:  # and now they are done
        call = process.beside[0]
        command = call.command
        assert isinstance(command, m.SwapCommand)
        process.prepared[command.swap] = command.service, command.version
        world.shell.take_answer(process, call, "")
    world.settle()
    world.run_until(lambda: world.state.swap_count == 1)
    assert current(world).workers[4].state is WorkerState.STOPPING
    assert current(world).streak == 0
    assert [spawn.services for spawn in spawns(world)[-2:]] == [{}, {"model": ServiceRecord(2, {})}]
    assert answered(world, operation).ok
    world.run(5.0)
    assert versions(world) == [2, 2, 2]
    calm(world)


def test_what_became_ready_while_a_swap_was_undecided_serves_when_that_is_refused() -> None:
    world = started()
    world.faults["hangs in prepare"] = "odd"
    world.crash(world.processes[1, 2])
    world.run(0.2)
    operation = world.swap()
    world.run(10.0)
    assert current(world).workers[4].state is WorkerState.READY
    assert not answered(world, operation).ok
    world.run(0.1)
    assert current(world).workers[4].state is WorkerState.ACTIVE
    assert len(spawns(world)) == 4
    calm(world)


def test_a_replacement_that_starts_over_still_replaces_the_same_worker() -> None:
    world = started()
    tired = world.processes[1, 2]
    tired.wants_recycling = True
    world.run_until(lambda: world.said["worker-replaced"] == 1)
    world.run(0.3)
    assert answered(world, world.swap()).ok
    world.run_until(lambda: 5 in current(world).workers)
    assert current(world).workers[5].replaces == 2
    world.run_until(lambda: not tired.alive)
    world.run(1.0)
    assert versions(world) == [2, 2, 2]
    calm(world)


def test_a_worker_that_waits_for_a_swap_is_still_watched() -> None:
    world = started()
    world.faults["hangs in prepare"] = "odd"
    world.crash(world.processes[1, 2])
    world.run(0.2)
    world.swap()
    world.run(10.0)
    world.hang(world.processes[1, 4])
    world.run_until(lambda: 4 not in current(world).workers, limit=LIMITS.heartbeat_timeout + 5.0)
    assert world.said["worker-killed"] == 1
    calm(world)


# ------------------------------------------------------------------------------------------------ one at a time


def test_swaps_have_their_turn_one_after_the_other() -> None:
    world = started()
    operations = [world.swap(service) for service in ("model", "limits", "model")]
    assert [phases(world, number) for number in operations] == [["prepare"], ["queued"], ["queued"]]
    assert all(answered(world, number).ok for number in operations)
    assert world.state.services == {"model": ServiceRecord(3, {}), "limits": ServiceRecord(2, {})}
    calm(world)


def test_a_swap_that_is_asked_for_during_a_reload_has_its_turn_in_the_new_generation() -> None:
    world = started()
    reload, second = world.reload(), world.reload()
    operation = world.swap()
    assert phases(world, operation) == ["queued"]
    assert answered(world, reload).ok
    assert operation not in world.answers
    assert answered(world, second).ok  # a reload that waits goes first
    assert answered(world, operation).generation == 3
    calm(world)


def test_a_reload_that_is_asked_for_during_a_swap_waits_until_that_is_told() -> None:
    world = started()
    operation, reload = world.swap(), world.reload()
    next_one = world.swap()
    assert phases(world, reload) == ["queued"]
    assert answered(world, operation).ok
    assert reload not in world.answers
    assert answered(world, reload).ok
    assert answered(world, next_one).generation == 2
    assert versions(world) == [3, 3, 3]


def test_a_change_of_the_number_of_workers_waits_for_a_swap_and_is_answered_once() -> None:
    world = started()
    operation = world.swap()
    scale, second = world.scale(4), world.scale(5)
    world.nudge(1)
    assert phases(world, scale) == ["queued"]
    assert world.answers[second].reason == "the number of workers is being changed already"
    assert current(world).target == 3
    assert answered(world, operation).ok
    assert answered(world, scale).ok
    world.run(10.0)
    assert len(world.serving()) == 5
    calm(world)


def test_a_number_of_workers_that_there_is_already_is_told_as_soon_as_the_swap_is() -> None:
    world = started()
    operation, scale = world.swap(), world.scale(3)
    assert answered(world, operation).ok
    assert answered(world, scale, limit=0.1).ok


def test_a_swap_waits_for_a_change_of_the_number_of_workers() -> None:
    world = started()
    scale, operation = world.scale(4), world.swap()
    assert phases(world, operation) == ["queued"]
    assert answered(world, scale).ok
    assert answered(world, operation).ok
    assert versions(world) == [2, 2, 2, 2]


def test_a_swap_is_refused_when_no_worker_serves_and_none_is_about_to() -> None:
    world = started(workers=1)
    world.deploy("exits")
    world.crash(world.serving()[0])
    waiting = world.swap()
    world.run(0.01)
    assert waiting not in world.answers  # a respawn may come
    answer = answered(world, waiting)
    assert (answer.ok, answer.reason) == (False, "no worker serves")


# ---------------------------------------------------------------------------------------------------------- stop


def test_a_stop_refuses_what_is_not_decided_and_what_waits() -> None:
    world = started()
    running, waiting = world.swap(), world.swap()
    scale = world.scale(4)
    until_prepared(world)
    world.signal_stop()
    for operation in (running, waiting, scale, world.swap()):
        assert world.answers[operation].reason == turn.STOPPING_CAUSE
    world.run(60.0)
    assert world.exit == 0


@pytest.mark.parametrize("at_once", [False, True])
def test_a_stop_after_the_decision_leaves_the_swap_one_answer(at_once: bool) -> None:
    world = started()
    world.faults["silent commit"] = "even"
    operation = world.swap()
    world.run_until(lambda: world.state.swap_count == 1)
    world.run(0.1)
    world.signal_stop(at_once=at_once)
    answer = world.answers[operation]
    assert answer.ok
    assert answer.result is not None
    assert [each["worker"] for each in answer.result["workers"]] == [1, 3]
    world.run(200.0)
    assert world.exit is not None


# ------------------------------------------------------------------------------------------ whose services take work


def test_services_become_active_in_every_worker_and_the_leads_in_one() -> None:
    world = started()
    assert all(process.services_active for process in world.live())
    assert [each.lead for each in service_commands(world, Verb.SERVICES_ACTIVATE)] == [True, False, False]
    assert all(each.budget == HANDOVER_S for each in service_commands(world, Verb.SERVICES_ACTIVATE))


def test_workers_without_services_are_told_nothing_of_them() -> None:
    world = World(2, handover=None)
    world.start()
    assert answered(world, world.reload()).ok
    world.run(30.0)
    assert not service_commands(world, Verb.SERVICES_ACTIVATE)
    assert not service_commands(world, Verb.SERVICES_DEACTIVATE)


def test_in_a_reload_services_cease_in_the_old_generation_before_they_begin_in_the_new_one() -> None:
    world = started()
    world.deploy("slow")
    seen = len(world.log)
    for process in world.live():
        process.work_s = 50.0
    operation = world.reload()
    world.run(5.0)
    assert not service_commands(world, Verb.SERVICES_DEACTIVATE)  # nothing before the promote
    assert answered(world, operation).ok
    assert {each.generation for each in service_commands(world, Verb.SERVICES_DEACTIVATE, seen)} == {1}
    assert not service_commands(world, Verb.SERVICES_ACTIVATE, seen)
    world.run(1.0)
    assert leads(world) == [(2, 1)]
    assert {process.key for process in world.live() if process.services_active} == {(2, 1), (2, 2), (2, 3)}


def test_a_refused_reload_leaves_services_where_they_are() -> None:
    world = started()
    world.deploy("one refuses activation")
    seen = len(world.log)
    assert not answered(world, world.reload()).ok
    world.run(30.0)
    assert leads(world) == [(1, 1)]
    assert not service_commands(world, Verb.SERVICES_DEACTIVATE, seen)
    assert not service_commands(world, Verb.SERVICES_ACTIVATE, seen)


def test_services_that_do_not_cease_hold_the_others_up_for_their_time_and_the_lead_until_they_are_gone() -> (
    None
):
    world = started()
    world.faults["never deactivates"] = "odd"
    for process in world.live():
        process.work_s = 50.0
    assert answered(world, world.reload()).ok
    promoted = world.now
    world.run(HANDOVER_S - 1.0)
    assert not [process for process in world.of(2) if process.services_active]
    world.run(1.5)
    assert all(process.services_active for process in world.of(2))
    assert leads(world) == [(1, 1)]
    world.run_until(lambda: not world.processes[1, 1].leads)
    assert world.now - promoted > 30.0
    world.run_until(lambda: leads(world) == [(2, 1)])
    calm(world)


def test_a_deactivation_that_is_not_confirmed_is_asked_for_again_every_few_seconds() -> None:
    world = started(workers=1)
    [old] = world.live()
    old.work_s = 50.0
    world.reload()
    world.run_until(lambda: len(world.promoted) == 2)
    world.turn("commands refused", on=True)
    world.run(22.0)
    told = service_commands(world, Verb.SERVICES_DEACTIVATE)
    assert len(told) == pytest.approx(22.0 / handover.RETRY_S, abs=1.5)
    assert old.leads
    world.turn("commands refused", on=False)
    world.run(2 * handover.RETRY_S)
    assert leads(world) == [(2, 1)]


def test_an_activation_that_is_not_confirmed_may_have_happened_and_is_asked_for_again() -> None:
    world = started(workers=2)
    world.turn("answers lost", on=True)
    seen = len(world.log)
    world.crash(world.processes[1, 1])
    world.run(3 * (HANDOVER_S + turn.COMMAND_TIMEOUT_S + handover.RETRY_S) - 1.0)
    told = service_commands(world, Verb.SERVICES_ACTIVATE, seen)
    assert [(each.worker, each.lead) for each in told if each.worker == 2] == [(2, True)] * 3
    assert [each.worker for each in told if each.lead] == [2, 2, 2]
    second = current(world).workers[2]
    assert (second.lead, second.services) == (True, ServicesState.ACTIVATING)
    assert leads(world) == [(1, 2)]
    calm(world)


def test_services_that_may_have_become_active_are_deactivated_when_their_worker_leaves() -> None:
    world = World(1)
    world.faults["refuses services"] = "all"
    world.start()
    world.run(20.0)
    assert current(world).workers[1].services is ServicesState.ACTIVATING
    seen = len(world.log)
    assert answered(world, world.reload()).ok
    world.run(20.0)
    [told] = service_commands(world, Verb.SERVICES_DEACTIVATE, seen)
    assert (told.generation, told.worker) == (1, 1)
    calm(world)


def test_an_answer_about_services_says_nothing_about_what_was_told_since() -> None:
    world = World(2, msgspec.structs.replace(LIMITS, park_for=100.0))
    world.faults["slow services"] = "even"
    world.start()
    assert answered(world, world.reload()).ok
    assert answered(world, world.rollback()).ok
    world.run(HANDOVER_S)
    assert leads(world) == [(1, 1)]
    world.crash(world.processes[1, 1])
    assert answered(world, world.reload()).ok
    verbs = [call.command.verb for call in world.processes[1, 2].calls]
    assert verbs[-3:] == [Verb.SERVICES_DEACTIVATE, Verb.SERVICES_ACTIVATE, Verb.SERVICES_DEACTIVATE]
    world.run_until(lambda: bool(leads(world)))
    assert leads(world) == [(1, 2)]
    world.run(60.0)
    assert leads(world) == [(3, 1)]
    calm(world)


def test_the_lead_moves_to_the_oldest_worker_when_its_worker_dies() -> None:
    world = started()
    world.crash(world.processes[1, 1])
    world.run(0.1)
    assert leads(world) == [(1, 2)]
    world.run(10.0)
    assert leads(world) == [(1, 2)]


def test_a_worker_that_was_killed_may_lead_until_it_is_dead() -> None:
    world = started()
    world.death_s = 30.0
    hung = world.processes[1, 1]
    world.hang(hung)
    world.run_until(lambda: current(world).workers[1].state is WorkerState.KILLED)
    world.run(20.0)
    assert leads(world) == [(1, 1)]
    world.run_until(lambda: not hung.alive)
    world.run(0.1)
    assert leads(world) == [(1, 2)]


def test_a_worker_that_hangs_keeps_what_it_has_and_is_told_nothing() -> None:
    world = started()
    world.turn("boots fail", on=True)
    hung = world.processes[1, 1]
    world.hang(hung)
    seen = len(world.log)
    world.run(30.0)
    assert leads(world) == [(1, 1)]
    assert not service_commands(world, Verb.SERVICES_DEACTIVATE, seen)
    assert not service_commands(world, Verb.SERVICES_ACTIVATE, seen)


def test_a_lead_that_is_replaced_gives_up_and_one_that_stays_takes_over() -> None:
    world = started()
    tired, next_tired = world.processes[1, 1], world.processes[1, 2]
    tired.wants_recycling = next_tired.wants_recycling = True
    world.run_until(lambda: not tired.leads)
    world.run(0.1)
    assert leads(world) == [(1, 3)]  # the oldest that is not to be replaced


def test_a_worker_that_is_to_be_replaced_leads_if_there_is_no_other() -> None:
    world = started(workers=2)
    world.turn("boots fail", on=True)
    world.processes[1, 2].wants_recycling = True
    world.run_until(lambda: world.said["worker-replaced"] == 1)
    world.crash(world.processes[1, 1])
    world.run(1.0)
    assert leads(world) == [(1, 2)]


def test_a_worker_that_refuses_its_services_does_not_keep_others_from_theirs() -> None:
    world = World(3)
    world.faults["refuses services"] = "even"
    world.start()
    world.run(30.0)
    assert [process.services_active for process in world.live()] == [True, False, True]
    world.faults.clear()
    world.run(handover.RETRY_S)
    assert all(process.services_active for process in world.live())


def test_a_pause_of_the_master_moves_what_services_wait_for() -> None:
    world = started(workers=1)
    world.faults["never deactivates"] = "all"
    world.live()[0].work_s = 50.0
    assert answered(world, world.reload()).ok
    before = world.state.generations[1].workers[1]
    after, _ = lifecycle.step(world.state, m.Paused(100.0), world.now)
    later = after.generations[1].workers[1]
    assert before.blocks_until is not None
    assert later.blocks_until == before.blocks_until + 100.0


def test_what_a_worker_is_still_busy_with_does_not_shorten_its_time_to_stop() -> None:
    world = started(workers=1)
    world.faults["never deactivates"] = "all"
    world.live()[0].work_s = 9.0
    world.reload()
    world.run_until(lambda: len(world.promoted) == 2)
    world.signal_stop(budget=10.0)
    world.run(60.0)
    assert world.exit == 0
    assert not world.said["worker-killed"]


def test_a_stop_asks_nothing_of_services_for_they_cease_by_themselves() -> None:
    world = started()
    world.signal_stop()
    world.run(60.0)
    assert world.exit == 0
    assert not service_commands(world, Verb.SERVICES_DEACTIVATE)

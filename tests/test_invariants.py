"""Each rule of the simulator can fail: what it forbids is made up, and it says so."""

from __future__ import annotations

from collections.abc import Callable

import invariants
import msgspec
import pytest
import truth
from invariants import Checks
from simulated_worker import KILLED
from simulator import LIMITS, World

from segue.supervisor import model as m
from segue.supervisor.model import GenerationState, ServicesState, Verb, WorkerState

PASSED = m.TimePassed()


def reloaded() -> World:
    """Generation 2 serves, on probation; generation 1 is parked."""
    world = World(2, msgspec.structs.replace(LIMITS, park_for=1000.0, probation=1000.0))
    world.start()
    world.deploy()
    world.reload()
    world.run(20.0)
    assert [g.state for g in world.state.generations.values()] == [
        GenerationState.PARKED,
        GenerationState.ACTIVE,
    ]
    return world


def last_worker_leaves(world: World) -> None:
    for worker in world.state.generations[2].workers.values():
        worker.state, worker.deadline = WorkerState.QUIETING, world.now + 1.0


def nobody_accepts(world: World) -> None:
    for process in world.of(2):
        process.mode = "quiet"


def one_does_not_accept(world: World) -> None:
    world.of(2)[0].mode = "quiet"


def current_one_is_retired(world: World) -> None:
    world.state.generations[2].state = GenerationState.RETIRED


def parked_one_boots(world: World) -> None:
    world.state.generations[1].state = GenerationState.BOOTING


def two_are_active(world: World) -> None:
    world.state.generations[1].state = GenerationState.ACTIVE


def generation_is_forgotten(world: World) -> None:
    del world.state.generations[1]


def process_is_forgotten(world: World) -> None:
    world.state.generations[1].workers.clear()


def worker_is_made_up(world: World) -> None:
    workers = world.state.generations[2].workers
    workers[9] = msgspec.structs.replace(workers[1], id=9)


def asker_is_forgotten(world: World) -> None:
    world.asked[77] = m.ReloadAsked(77)


def old_one_accepts(world: World) -> None:
    world.of(1)[0].mode = "active"


def old_one_may_accept(world: World) -> None:
    world.state.generations[1].workers[1].state = WorkerState.ACTIVE


def two_lead(world: World) -> None:
    for process in world.of(2):
        process.leads = True


def old_services_go_on(world: World) -> None:
    world.of(1)[0].services_active = True
    world.state.generations[1].workers[1].services = ServicesState.DEACTIVATING


def services_are_unknown(world: World) -> None:
    world.of(1)[0].services_active = True


def services_are_believed_in(world: World) -> None:
    world.of(2)[0].services_active = False


def another_version_serves(world: World) -> None:
    world.of(2)[0].versions["model"] = 7


def too_many_workers(world: World) -> None:
    world.state.generations[2].target = 1


def too_few_workers(world: World) -> None:
    world.state.generations[2].target = 3


def parked_one_stays(world: World) -> None:
    world.state.generations[1].kept_until = None


def worker_waits_for_ever(world: World) -> None:
    world.state.generations[1].workers[1].state = WorkerState.STOPPING


def former_one_is_let_go(world: World) -> None:
    generation = world.state.generations[1]
    generation.state, generation.kept_until = GenerationState.RETIRED, None


def several_are_kept(world: World) -> None:
    other = world.state.generations[3] = world.state.generations[1].clone()
    other.id = 3
    other.workers.clear()


def watch_has_vanished(world: World) -> None:
    world.state.probation = None


def reloads_wait_for_nothing(world: World) -> None:
    world.state.queued = (m.ReloadAsked(78),)


def swaps_wait_for_nothing(world: World) -> None:
    world.state.swaps_queued = (m.SwapAsked(79, "model", {}),)


def swap_runs_while_workers_are_added(world: World) -> None:
    world.state.swap = m.Swap(80, "model", 2, 2, {1: m.Share(Verb.SWAP_PREPARE)})
    world.state.scaling = m.Scaling(None, 2, 2, 0)


def nobody_owes_an_answer_to_a_swap(world: World) -> None:
    world.state.swap = m.Swap(80, "model", 2, 2, {1: m.Share(None)})


def followers_of_a_swap_have_no_deadline(world: World) -> None:
    world.state.swap = m.Swap(80, "model", 2, 2, {1: m.Share(Verb.SWAP_COMMIT)}, m.SwapPhase.FOLLOW)


def scaling_waits_for_nothing(world: World) -> None:
    world.state.scale_queued = m.ScaleAsked(81, count=3)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (last_worker_leaves, "the last worker that serves was taken away"),
        (nobody_accepts, "nobody accepts, though nobody crashed"),
        (one_does_not_accept, "does not accept, and nobody knows"),
        (current_one_is_retired, "the last good generation is given up"),
        (parked_one_boots, "generation 1 went from parked to booting"),
        (two_are_active, "are active"),
        (generation_is_forgotten, "there are"),
        (process_is_forgotten, "nobody knows of"),
        (worker_is_made_up, "there is no worker"),
        (asker_is_forgotten, "nobody will answer"),
        (old_one_accepts, "still accepts"),
        (old_one_may_accept, "may accept, and it isn't the current one"),
        (two_lead, "two processes have active what only one may have"),
        (old_services_go_on, "still has active services"),
        (services_are_unknown, "has active services, and that isn't known"),
        (services_are_believed_in, "has no active services, and nobody knows"),
        (another_version_serves, "what was never decided"),
        (too_many_workers, "2 workers, though 1 are wanted"),
        (too_few_workers, "2 workers, though 3 are wanted"),
        (parked_one_stays, "generation 1 stays parked"),
        (worker_waits_for_ever, "has no way on from stopping"),
        (former_one_is_let_go, "though it may be gone back to"),
        (several_are_kept, "are kept"),
        (watch_has_vanished, "the probations of"),
        (reloads_wait_for_nothing, "reloads are queued behind nothing"),
        (swaps_wait_for_nothing, "swaps are queued behind nothing"),
        (swap_runs_while_workers_are_added, "a swap runs beside"),
        (nobody_owes_an_answer_to_a_swap, "the swap waits for nothing"),
        (followers_of_a_swap_have_no_deadline, "the swap may wait for ever"),
        (scaling_waits_for_nothing, "a change of the number of workers is queued behind nothing"),
    ],
)
def test_what_is_forbidden_is_found_after_the_step_in_which_it_comes(
    broken: Callable[[World], None], told: str
) -> None:
    world = reloaded()
    before = world.state.clone()
    Checks(world, before, PASSED, []).all()
    broken(world)
    checks = Checks(world, before, PASSED, [])
    found = []
    for check in checks.each:
        try:
            check()
        except (AssertionError, LookupError) as error:  # a rule may rely on another one
            found.append(str(error).splitlines()[0])
    assert any(told in each for each in found), found


def nothing_is_current(world: World) -> None:
    world.state.current = None


def number_is_given_again(world: World) -> None:
    world.state.next_generation = 2


def worker_is_not_found(world: World) -> None:
    del world.state.generations[2].workers[1]


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (worker_is_not_found, "and there are"),
        (worker_is_made_up, "and there are"),
        (nothing_is_current, "none is the current one"),
        (number_is_given_again, "number is given again"),
    ],
)
def test_what_a_new_master_must_not_overlook_is_found(broken: Callable[[World], None], told: str) -> None:
    world = reloaded()
    before = world.state.clone()
    invariants.adopted(world, before, [])
    broken(world)
    with pytest.raises(AssertionError, match=told):
        invariants.adopted(world, before, [])


@pytest.mark.parametrize(
    ("effect", "told"),
    [
        (
            m.Command(1, 1, Verb.ACTIVATE, 5.0),
            "neither of the current generation nor of one that is promoted",
        ),
        (m.Kill(2, 1, now=False), "ended without handing over"),
        (m.Spawn(1, 5, False, None, {}), "started for a generation that ends"),
    ],
)
def test_what_must_not_be_told_is_found(effect: m.Effect, told: str) -> None:
    world = reloaded()
    checks = Checks(world, world.state, PASSED, [effect])
    with pytest.raises(AssertionError, match=told):
        checks.all()


def test_a_connection_that_is_closed_with_its_worker_is_found() -> None:
    world = reloaded()
    world.connect(5)
    [process] = [process for process in world.live() if process.connections]
    with pytest.raises(AssertionError, match="5 connections are closed"):
        process.die(KILLED, "was killed")


def test_a_sibling_that_would_read_back_what_is_handed_over_is_found() -> None:
    world = reloaded()
    world.of(1)[0].mode = "active"
    with pytest.raises(AssertionError, match="read back"):
        world.hand_over(world.of(1)[1], 1)


@pytest.mark.parametrize(
    ("settle", "told"),
    [
        (m.Settle(1, ok=True, generation=2), "without a promote"),
        (m.Settle(1, ok=False), "without a reason"),
    ],
)
def test_an_answer_that_is_not_so_is_found(settle: m.Settle, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        truth.settled(reloaded(), settle, [])


def test_a_promote_before_all_have_confirmed_is_found() -> None:
    world = reloaded()
    world.of(2)[0].mode = "ready"
    with pytest.raises(AssertionError, match="promoted unconfirmed"):
        truth.promoted(world, world.state, m.Promoted(2, None), [])


@pytest.mark.parametrize(("served", "cut"), [(False, False), (True, True)])
def test_an_outage_that_is_called_a_clean_end_is_found(served: bool, cut: bool) -> None:
    world = World(1)
    world.served_at_stop, world.cut_at_stop = served, cut
    with pytest.raises(AssertionError, match="exit 0 from an outage"):
        truth.exited(world, 0)


def test_a_worker_that_never_ended_is_found_at_the_end() -> None:
    world = World(1)
    world.served_at_stop = True
    world.spawned[1, 1] = world.now
    with pytest.raises(AssertionError, match="so often have workers ended"):
        truth.exited(world, 0)


def test_a_death_that_is_not_seen_yet_is_waited_for() -> None:
    world = World(1)
    world.start()
    world.run(20.0)
    assert truth.is_calm(world)
    world.turn("deaths seen late", on=True)
    world.crash(world.serving()[0])
    assert not truth.is_calm(world)
    world.heal()
    world.check_settled()

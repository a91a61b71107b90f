"""The lifecycle alone: the watch over a generation that has just taken over, and the way back by itself."""

from __future__ import annotations

from typing import Any

import pytest
from simulator import LIMITS, World
from test_lifecycle_promotion import answered, calm, serving, spawns, staged, started, state_of

from segue.supervisor import lifecycle
from segue.supervisor import model as m
from segue.supervisor.model import GenerationState, Outcome, Verb

PROBATION_S = 10.0


def promoted(workers: int = 2, **limits: Any) -> World:
    """Generation 2 serves on probation, generation 1 is parked."""
    world = started(workers, **({"probation": PROBATION_S, "park_for": PROBATION_S} | limits))
    world.deploy()
    assert answered(world, world.reload()).ok
    world.run(2.0)
    assert world.state.probation is not None
    return world


def respond(world: World, generation: int, count: int, errors: int = 0) -> None:
    """Its workers answer together so many requests."""
    processes = world.of(generation)
    for number, process in enumerate(processes):
        share = [total // len(processes) + (number < total % len(processes)) for total in (count, errors)]
        world.respond(process, *share)


def outcomes(world: World) -> list[Outcome]:
    return [each.outcome for each in world.probations]


def test_a_generation_that_does_well_passes_and_the_old_one_ends() -> None:
    world = promoted()
    respond(world, 2, 1000)
    world.run(PROBATION_S)
    assert world.probations == [m.ProbationEnded(2, Outcome.PASSED)]
    world.run(5.0)
    assert list(world.state.generations) == [2]
    assert not world.rolled_back


def test_what_need_not_stay_warm_ends_though_its_work_ended_while_going_back_to_it_was_tried() -> None:
    world = started(probation=60.0, park_for=0.0)
    first, second = world.serving()
    second.work_s = 3.0
    world.deploy()
    assert answered(world, world.reload()).ok
    world.run(2.0)
    assert not first.alive
    world.turn("slow disk", on=True)  # it takes a while to see that what is lacking can't be started any more
    operation = world.promote(1)
    world.run_until(lambda: second.mode == "parked")
    assert operation not in world.answers
    assert not answered(world, operation).ok
    world.run(5.0)
    assert not second.alive
    assert state_of(world, 1) is GenerationState.PARKED


def test_the_first_generation_is_not_on_probation_since_there_is_nothing_to_go_back_to() -> None:
    world = started(probation=PROBATION_S)
    assert world.state.probation is None
    assert not world.probations


def test_a_crash_brings_the_old_generation_back_at_once() -> None:
    world = promoted()
    old = {process.key for process in world.of(1)}
    crashed, seen = world.now, len(world.log)
    world.crash(world.of(2)[0])
    world.run_until(lambda: bool(world.rolled_back))
    assert world.now - crashed < 0.05
    [effect] = world.rolled_back
    assert (effect.generation, effect.to) == (2, 1)
    assert "worker 1 crashed" in effect.because
    assert outcomes(world) == [Outcome.ROLLED_BACK]
    assert world.probations[0].reason == effect.because
    assert not [each for each in spawns(world, seen) if each.generation == 1]
    world.run(20.0)
    assert serving(world) == old
    assert list(world.state.generations) == [1]
    assert world.state.probation is None


def test_what_was_gone_back_to_is_not_on_probation_and_what_was_found_bad_is_not_kept() -> None:
    world = promoted()
    world.crash(world.of(2)[0])
    world.run(1.0)
    assert state_of(world, 2) in {GenerationState.RETIRED, None}
    assert world.state.probation is None
    world.restore(1)
    world.crash(world.of(1)[0])
    world.run(5.0)
    assert len(world.rolled_back) == 1
    assert {process.key[0] for process in world.serving()} == {1}
    assert not answered(world, world.rollback()).ok
    calm(world)


@pytest.mark.parametrize(
    ("before", "after", "goes_back"),
    [
        ((100, 0), (100, 30), True),
        ((100, 0), (100, 20), False),
        ((100, 0), (19, 19), False),
        ((100, 0), (20, 20), True),
        ((100, 100), (100, 100), False),
        ((100, 50), (100, 60), False),
        ((100, 50), (100, 75), True),
        ((10, 10), (100, 30), True),
    ],
    ids=[
        "more than the share",
        "just the share",
        "too few to tell",
        "just enough to tell",
        "both broken",
        "not much worse",
        "much worse",
        "too few before to tell",
    ],
)
def test_a_share_of_5xx_beyond_that_of_the_old_generation_brings_it_back(
    before: tuple[int, int], after: tuple[int, int], goes_back: bool
) -> None:
    world = started(probation=PROBATION_S)
    respond(world, 1, *before)
    assert answered(world, world.reload()).ok
    respond(world, 2, *after)
    world.run(2.0)
    assert bool(world.rolled_back) == goes_back
    if goes_back:
        assert "5xx" in world.rolled_back[0].because
        assert {process.key[0] for process in world.serving()} == {1}
    world.run(PROBATION_S)
    assert outcomes(world) == [Outcome.ROLLED_BACK if goes_back else Outcome.PASSED]


def test_the_old_generation_is_compared_by_its_last_responses() -> None:
    """An outage that began a minute ago is nobody's fault, however well the hours before went."""
    world = started(probation=PROBATION_S)
    respond(world, 1, 1_000_000)
    for _ in range(3):
        world.run(31.0)
        respond(world, 1, 100, 100)
    assert answered(world, world.reload()).ok
    respond(world, 2, 100, 100)
    world.run(PROBATION_S + 1.0)
    assert outcomes(world) == [Outcome.PASSED]


def test_counts_that_come_late_or_twice_count_once() -> None:
    world = promoted(workers=1)
    for total, errors in ((15, 3), (15, 3), (10, 3), (15, 3)):
        world.put(m.ResponsesCounted(2, 1, total, errors))
    assert world.state.generations[2].traffic.responses == 15
    assert not world.state.probation.breach  # type: ignore[union-attr]


def test_workers_are_told_to_report_what_they_answer_for_as_long_as_they_are_watched() -> None:
    world = promoted(probation=50.0)
    told = {
        (c.generation, c.worker): c.watch
        for c in world.log
        if isinstance(c, m.Command) and c.verb is Verb.ACTIVATE
    }
    assert told[1, 1] == 0.0
    assert told[2, 1] >= 50.0
    world.of(2)[0].wants_recycling = True
    world.run(6.0)
    told = {
        (c.generation, c.worker): c.watch
        for c in world.log
        if isinstance(c, m.Command) and c.verb is Verb.ACTIVATE
    }
    assert 30.0 < told[2, 3] < 50.0


def test_a_hang_is_a_breach_too() -> None:
    world = promoted(probation=60.0, park_for=60.0)
    world.hang(world.of(2)[0])
    world.run_until(lambda: bool(world.rolled_back), limit=LIMITS.heartbeat_timeout + 2.0)
    assert "silent" in world.rolled_back[0].because


def test_without_the_old_generation_the_new_one_is_kept_and_that_is_said() -> None:
    world = promoted()
    assert answered(world, world.discard(1)).ok
    world.run(1.0)
    world.crash(world.of(2)[0])
    assert outcomes(world) == [Outcome.KEPT]
    assert "no longer there" in world.probations[0].reason
    world.run(10.0)
    assert len(world.serving()) == 2
    assert {process.key[0] for process in world.serving()} == {2}


def test_if_the_old_generation_is_broken_itself_the_new_one_is_kept() -> None:
    world = promoted()
    for process in world.of(1):
        process.behaviour = "refuses activation"
    world.crash(world.of(2)[0])
    world.run(10.0)
    assert outcomes(world) == [Outcome.KEPT]
    assert "no listener" in world.probations[0].reason
    assert len(world.serving()) == 2
    assert not world.rolled_back
    world.run(100.0)
    assert list(world.state.generations) == [2]


def test_without_a_parked_generation_the_old_code_is_started_again() -> None:
    world = promoted(park_for=0.0)
    assert state_of(world, 1) is GenerationState.PARKED
    assert not world.of(1)
    world.restore(1)
    world.crash(world.of(2)[0])
    world.run(5.0)
    assert outcomes(world) == [Outcome.ROLLED_BACK]
    assert {process.key[0] for process in world.serving()} == {1}
    assert len(world.serving()) == 2


def test_without_a_parked_generation_and_its_code_the_new_one_is_kept() -> None:
    world = promoted(park_for=0.0)
    world.crash(world.of(2)[0])
    world.run(5.0)
    assert outcomes(world) == [Outcome.KEPT]
    assert "the code has changed" in world.probations[0].reason
    assert {process.key[0] for process in world.serving()} == {2}


# ------------------------------------------------------------------------------------------- what comes in between


def test_a_reload_that_boots_goes_on_beside_a_rollback_and_takes_over_from_the_old_generation() -> None:
    world = promoted()
    world.deploy()
    reload = world.reload()
    world.run(0.5)
    world.crash(world.of(2)[0])
    world.run(0.1)
    assert world.promoted == [1, 2, 1]
    assert answered(world, reload).ok
    assert world.promoted == [1, 2, 1, 3]
    assert world.state.probation is not None
    assert world.state.probation.previous == 1


def test_a_reload_that_takes_over_ends_the_probation() -> None:
    world = promoted(probation=60.0)
    assert answered(world, world.reload()).ok
    assert outcomes(world) == [Outcome.SUPERSEDED]
    assert world.state.probation is not None
    assert (world.state.probation.generation, world.state.probation.previous) == (3, 2)


def test_a_promote_that_is_under_way_goes_first_and_if_it_fails_the_way_back_is_taken() -> None:
    world = promoted(probation=60.0, park_for=60.0)
    world.deploy("silent on activation")
    staged(world)
    promote = world.promote()
    world.run(0.5)
    world.crash(world.of(2)[0])
    world.run(1.0)
    assert not world.rolled_back
    assert not answered(world, promote).ok
    world.run(1.0)
    assert [effect.to for effect in world.rolled_back] == [1]
    calm(world)


def test_a_rollback_by_hand_ends_the_probation() -> None:
    world = promoted()
    assert answered(world, world.rollback()).ok
    assert outcomes(world) == [Outcome.ROLLED_BACK]
    assert world.rolled_back == [m.RolledBack(2, 1, "")]
    world.run(3.0)
    assert state_of(world, 2) is GenerationState.PARKED  # nothing was found wrong with it


def test_a_promote_of_one_that_served_before_is_on_probation() -> None:
    world = promoted()
    assert answered(world, world.promote(1)).ok
    assert world.state.probation is not None
    assert world.state.probation.generation == 1
    assert not world.rolled_back


def test_a_swap_that_is_not_decided_makes_way() -> None:
    world = promoted()
    swap = world.swap()
    world.run(0.1)
    world.crash(world.of(2)[1])
    world.run(1.0)
    assert not world.answers[swap].ok
    assert [effect.to for effect in world.rolled_back] == [1]
    calm(world)


def test_a_scaling_is_told_that_the_old_generation_came_back() -> None:
    world = promoted()
    scale = world.scale(4)
    world.crash(world.of(2)[0])
    world.run(1.0)
    assert not world.answers[scale].ok
    assert len(world.serving()) == 2


def test_the_operators_drain_changes_nothing_about_a_probation() -> None:
    world = promoted()
    assert answered(world, world.drain("reject")).ok
    world.crash(world.of(2)[0])
    world.run(1.0)
    assert {process.key[0] for process in world.serving()} == {1}
    assert {process.operator_drain for process in world.serving()} == {"reject"}


def test_a_stop_ends_the_probation_and_nothing_is_gone_back_to() -> None:
    world = promoted()
    world.signal_stop(delay=5.0)
    assert outcomes(world) == [Outcome.STOPPED]
    world.crash(world.of(2)[0])
    world.run(3.0)
    assert not world.rolled_back
    world.run(60.0)
    assert world.exit is not None


def test_a_pause_of_the_master_does_not_shorten_a_probation() -> None:
    world = promoted()
    before = world.state.probation
    after, _ = lifecycle.step(world.state, m.Paused(100.0), world.now)
    assert before is not None
    assert after.probation is not None
    assert after.probation.until == before.until + 100.0


def test_when_nothing_serves_and_the_code_is_gone_a_warm_generation_serves_again() -> None:
    world = started(park_for=100.0)
    world.deploy()
    assert answered(world, world.reload()).ok
    world.run(5.0)
    world.deploy("exits")
    for process in world.of(2):
        world.crash(process)
    world.run(1.0)
    assert {process.key[0] for process in world.serving()} == {1}
    assert [(effect.generation, effect.to) for effect in world.rolled_back] == [(2, 1)]

"""Whether what the lifecycle tells is so: success is told when it is true, and failure with its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from segue.supervisor import model as m
from segue.supervisor.model import GenerationState, ServicesState, WorkerState

if TYPE_CHECKING:
    from simulator import World


def promoted(world: World, before: m.State, effect: m.Promoted, effects: list[m.Effect]) -> None:
    """All its workers have confirmed; and it has taken over from the one that was current.

    What is gone back to, be it from nothing, may have lost some just now, and says so.
    """
    generation = before.generations[effect.generation]
    confirmed = [world.processes[generation.id, worker.id] for worker in generation.having(m.TAKING_PART)]
    wanted, found = generation.wanted, before is world.state  # by a new master
    said = any(isinstance(each, m.Say) and each.event == "generation-short" for each in effects)
    goes_back = before.promote is not None and before.promote.kind is m.PromoteKind.ROLLBACK
    if (said and goes_back) or (found and any(isinstance(each, m.RolledBack) for each in effects)):
        confirmed, wanted = [process for process in confirmed if process.mode == "active"], 1
    assert len(confirmed) >= wanted > 0, "not all of its workers were started"
    assert all(process.mode == "active" for process in confirmed), f"promoted unconfirmed; {world.describe()}"
    expected = before.current if before.current != effect.generation else None
    if not found:
        assert effect.previous == expected, f"{effect}, and {before.current} was the current one"


def settled(world: World, settle: m.Settle, effects: list[m.Effect]) -> None:
    """An answer to somebody who has asked."""
    asked = world.asked[settle.operation]
    if not settle.ok:
        assert settle.reason, f"{asked} was refused without a reason"
        return
    promotions = [each.generation for each in effects if isinstance(each, m.Promoted)]
    match asked:
        case m.ReloadAsked():
            assert promotions == [settle.generation], "a reload succeeded without a promote"
        case m.RollbackAsked() if not promotions:
            assert settle.generation == world.state.current, f"{asked}: nothing was gone back to"
        case m.PromoteAsked() | m.RollbackAsked():
            assert promotions == [settle.generation], f"{asked} succeeded without a promote"
            assert asked.generation in {None, settle.generation}
        case m.StageAsked():
            _staged(world, settle)
        case m.DiscardAsked():
            discarded = world.state.generations.get(settle.generation or 0)
            ended = {GenerationState.RETIRED, GenerationState.FAILED}
            assert discarded is None or discarded.state in ended, world.describe()
        case m.ScaleAsked():
            _scaled(world, asked, effects)
        case m.SwapAsked():
            assert settle.result is not None
            _swapped(world, asked, settle.result)
        case m.DrainAsked():
            _told_of_drain(world, asked)
        case m.StopAsked():
            assert not world.live(), "stopped, but there are workers"


def _staged(world: World, settle: m.Settle) -> None:
    assert settle.generation is not None
    generation = world.state.generations[settle.generation]
    assert generation.state is GenerationState.STAGED
    modes = [process.mode for process in world.processes.values() if process.key[0] == generation.id]
    assert modes == ["ready"] * generation.target, f"staged, though {modes}; {world.describe()}"


def _scaled(world: World, asked: m.ScaleAsked, effects: list[m.Effect]) -> None:
    assert world.state.current is not None
    current = world.state.generations[world.state.current]
    as_before = any(isinstance(each, m.Say) and each.fields.get("before") == asked.count for each in effects)
    if not as_before:
        serving = current.having(m.SERVING)
        assert current.target == len(serving) == asked.count, f"not done: {asked}; {world.describe()}"
    assert not current.missing


def _swapped(world: World, asked: m.SwapAsked, result: dict[str, Any]) -> None:
    """Whoever takes part and can be spoken with has what was decided."""
    version = world.state.services[asked.service].version
    assert (result["service"], result["version"]) == (asked.service, version)
    assert "choices" not in str(result)
    assert world.state.current is not None
    for worker in world.state.generations[world.state.current].having(m.TAKING_PART):
        process = world.processes[world.state.current, worker.id]
        assert not process.alive or process.versions.get(asked.service, 1) == version, (
            f"{process.key} does not have version {version}; {world.describe()}"
        )


def _told_of_drain(world: World, asked: m.DrainAsked) -> None:
    for process in world.live():
        generation = world.state.generations.get(process.key[0])
        worker = generation.workers.get(process.key[1]) if generation else None
        if worker is not None and worker.state in m.SERVING | m.LEAVING:
            assert process.operator_drain == asked.mode, f"{process.key} was not told of {asked.mode}"


def exited(world: World, status: int) -> None:
    """Nothing is left, everybody has been answered, and an outage isn't called a clean end."""
    assert not world.live(), f"exit with living workers; {world.describe()}"
    assert world.answers.keys() == world.asked.keys(), (
        f"unanswered: {world.asked.keys() - world.answers.keys()}"
    )
    if world.served_at_stop is None:
        assert world.epoch > 1 or not world.promoted, "an exit that nobody asked for"
        assert status == 3
    elif not world.served_at_stop or world.cut_at_stop:
        assert status != 0, "exit 0 from an outage"
    ends = {key: world.ended[key] for key in world.spawned if world.ended[key] != 1}
    assert not ends, f"so often have workers ended: {ends}"


def is_calm(world: World) -> bool:
    """Whether nothing is left to be done, and one generation serves alone."""
    state = world.state
    under_way: tuple[object, ...] = (
        *(state.changing, state.probation, state.queued, state.scaling, state.drained_watch),
        *(state.drain_change, state.scale_queued, state.swap, state.swaps_queued, state.swaps_told),
        *(len(state.generations) != 1, world.answers.keys() != world.asked.keys()),
        *(process.hung for process in world.living.values()),
        *(not process.alive and not process.reaped for process in world.processes.values()),
    )
    if any(under_way):
        return False
    [current] = state.generations.values()
    services = ServicesState.IDLE if world.handover is None else ServicesState.ACTIVE
    return len(current.workers) == current.wanted >= 1 and all(
        worker.state is WorkerState.ACTIVE and not worker.replace_why and worker.services is services
        for worker in current.workers.values()
    )


def calm(world: World) -> None:
    """With nothing wrong for long enough one generation is left, complete; nobody waits, and nothing was lost."""
    state = world.state
    assert world.answers.keys() == world.asked.keys(), f"unanswered; {world.describe()}"
    [current] = state.generations.values()
    assert current.id == state.current, world.describe()
    assert current.state is GenerationState.ACTIVE
    assert {worker.state for worker in current.workers.values()} == {WorkerState.ACTIVE}, world.describe()
    assert len(current.workers) == current.wanted >= 1, world.describe()
    assert current.missing == 0
    assert {process.key for process in world.live()} == {(current.id, worker) for worker in current.workers}
    assert all(process.accepts for process in world.live())
    assert all(process.operator_drain == state.drain_mode for process in world.live()), world.describe()
    assert is_calm(world), f"something is under way; {world.describe()}"
    decided = {name: record.version for name, record in state.services.items()}
    assert all(process.versions == decided for process in world.live()), world.describe()
    if world.handover is not None:
        assert [process.leads for process in world.live()].count(True) == 1, world.describe()
        assert all(process.services_active for process in world.live()), world.describe()
    assert not world.relay, f"{world.relay} connections are in the relay, and nobody takes them"
    assert not world.knocking, f"{world.knocking} connections are not accepted"
    held = sum(process.connections for process in world.live())
    assert world.opened == held + world.closed, f"of {world.opened} connections there are {held}"

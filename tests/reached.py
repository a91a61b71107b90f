"""What a simulation has come to: which cells of the lifecycle's table, which changes, which ends of a master.

What never happens in a simulation is shown nothing about. ``python -m simulate --reached`` prints all of it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from segue.supervisor import lifecycle, reports
from segue.supervisor import model as m
from segue.supervisor.model import WorkerState

if TYPE_CHECKING:
    from simulator import World

Reached = Counter[tuple[str, ...]]
"""How often: the kind of thing, and what it was."""


def watch(reached: Reached, world: World, before: m.State, event: m.Event, effects: list[m.Effect]) -> None:
    """One step, or one adoption."""
    state = world.state
    reached["event", type(event).__name__] += 1
    if isinstance(event, m.WorkerEvent):
        generation = before.generations.get(event.generation)
        worker = generation.workers.get(event.worker) if generation is not None else None
        if worker is not None:
            reached["cell", type(event).__name__, worker.state.name] += 1
    promote = state.promote
    if promote is not None and (before.promote is None or before.promote.phase is not promote.phase):
        reached["promote", promote.kind, promote.strategy, promote.phase] += 1
    for generation in state.generations.values():
        was = before.generations.get(generation.id)
        if was is not None and was.state is not generation.state:
            reached["generation", was.state, generation.state] += 1
    for effect in effects:
        match effect:
            case m.Command() | m.SwapCommand():
                reached["told", effect.verb] += 1
            case m.ProbationEnded(_, outcome):
                reached["probation", outcome] += 1
            case m.Exit(status):
                reached["exit", str(status)] += 1
            case m.Settle(operation, ok):
                asked = type(world.asked.get(operation)).__name__
                reached["answer", asked, "ok" if ok else "refused"] += 1
            case _:
                reached["effect", type(effect).__name__] += 1


def died(reached: Reached, world: World, effect: m.Effect | None) -> None:
    """The master dies, before it has carried that out; and this is how the next one finds its workers."""
    verb = effect.verb if isinstance(effect, m.Command | m.SwapCommand) else ""
    reached["master dies before", f"{type(effect).__name__} {verb}".strip() if effect else "anything"] += 1
    for process in world.live():
        generation = world.state.generations.get(process.key[0])
        where = "unknown" if generation is None else generation.state
        current = " (current)" if process.key[0] == world.state.current else ""
        answers = "silent" if process.hung else process.mode
        reached["adopted", f"{where}{current}", answers] += 1


def cells() -> set[tuple[str, str]]:
    """Those of the table that mean something."""
    return {
        (event.__name__, state.name)
        for (event, state), handler in lifecycle.WORKER.items()
        if handler is not reports.ignored
    }


def table(reached: Reached) -> str:
    """All of it, for a person. In the table a dot is what comes too late and is ignored; ``(!)`` was never reached."""
    events = sorted({name for name, _ in cells()} | {key[1] for key in reached if key[0] == "cell"})
    lines = [" " * 20 + "".join(f"{state.name.lower():>11}" for state in WorkerState)]
    for name in events:
        row = []
        for state in WorkerState:
            count = reached["cell", name, state.name]
            means = (name, state.name) in cells()
            row.append(f"{count}{'' if means else ' .'}" if count or not means else "(!)")
        lines.append(f"{name:20}" + "".join(f"{cell:>11}" for cell in row))
    for kind in sorted({key[0] for key in reached} - {"cell"}):
        lines += ["", f"{kind}:"]
        of_kind = sorted((key[1:], count) for key, count in reached.items() if key[0] == kind)
        lines += [f"{count:>9}  {' → '.join(key)}" for key, count in of_kind]
    return "\n".join(lines)

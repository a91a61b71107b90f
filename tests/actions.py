"""What may happen to an instance: what is asked, what goes wrong, what is on the disk, and time.

Each action draws its arguments without looking at the world, and does nothing where it does not apply: so any part
of a sequence is a sequence too, and a failing one can be cut down to what matters.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from simulated_shell import SETTINGS
from simulated_worker import CODES, FAULTS, WHO, Process
from simulator import WEATHERS, World

from segue.supervisor.model import Strategy

Argument = int | float | str | bool | None
Do = Callable[..., None]


class Action(NamedTuple):
    """One kind of thing that happens."""

    weight: int
    draw: Callable[[Random], tuple[Argument, ...]]
    do: Do


class Step(NamedTuple):
    """One thing that happens."""

    name: str
    arguments: tuple[Argument, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.arguments))})"

    def __call__(self, world: World) -> None:
        """Let it happen."""
        ACTIONS[self.name].do(world, *self.arguments)


def _nothing(_: Random) -> tuple[Argument, ...]:
    return ()


def _one_of(*values: Argument) -> Callable[[Random], tuple[Argument, ...]]:
    return lambda random: (random.choice(values),)


def _each_of(*choices: tuple[Argument, ...]) -> Callable[[Random], tuple[Argument, ...]]:
    return lambda random: tuple(random.choice(values) for values in choices)


def _picked(do: Do) -> Do:
    """The first argument picks a process, if any lives."""

    def picked(world: World, number: int, *rest: Argument) -> None:
        live = world.live()
        if live:
            do(world, live[number % len(live)], *rest)

    return picked


def _save(world: World, behaviour: str) -> None:
    world.deploy(behaviour)
    world.save()


def _deploy_and_reload(world: World, behaviour: str) -> None:
    world.deploy(behaviour)
    world.reload()


def _reload_otherwise(world: World, strategy: str | None, canary: int | None, seconds: float | None) -> None:
    chosen = None if strategy is None else Strategy(strategy)
    world.reload(strategy=chosen, canary=canary, canary_for=seconds)


def _toggle_fault(world: World, fault: str, who: str) -> None:
    if world.faults.pop(fault, None) is None:
        world.faults[fault] = who


def _swap_with_a_fault(world: World, fault: str, who: str, seconds: float) -> None:
    world.faults[fault] = who
    world.swap()
    world.run(seconds)


def _stop(world: World, at_once: bool, delay: float, by_signal: bool) -> None:
    if len(world.answers) > 3 or world.state.stopping is not None:
        (world.signal_stop if by_signal else world.stop)(at_once, delay)


def _restore(world: World) -> None:
    if world.state.current in world.releases:
        world.restore(world.state.current or 0)


def _settings(world: World, settings: str, workers: int) -> None:
    world.settings, world.workers_setting = settings, workers


def _work(_: World, process: Process, seconds: float) -> None:
    process.work_s = seconds


def _recycle(_: World, process: Process) -> None:
    process.wants_recycling = not process.wants_recycling


def _repeat(world: World, number: int) -> None:
    if world.last_messages:
        world.put(world.last_messages[number % len(world.last_messages)])


def _respond(world: World, process: Process, count: int, errors: int) -> None:
    world.respond(process, count, errors * count)


def _kill_master(world: World, downtime: float) -> None:
    if world.state.stopping is None:
        world.kill_master(downtime)


def _calm(world: World) -> None:
    """What is wrong with host, disk and services is mended; what has come of it goes on."""
    for weather in list(world.weather):
        world.turn(weather, on=False)
    world.faults.clear()
    world.settings = "good"
    world.deploy("good")


def _die_soon(world: World, effects: int) -> None:
    if world.state.stopping is None:
        world.dies_after = effects


def finish(world: World) -> None:
    """Everything is healed, what is offered to an operator is done, and it is stopped: nothing is left."""
    if not (world.asked or world.lost):
        return
    world.dies_after = None
    if world.state.stopping is None:
        world.heal()
        if world.exit is None:
            current = world.state.generations.get(world.state.current or 0)
            if current is None or current.missing or world.releases[current.id][0] != world.code:
                world.reload()  # what is offered to an operator whose code has changed in place
                world.rest(600.0)  # for a canary, its drain, and what is parked
            world.rest(60.0)
            world.check_settled()
    world.end()


def _next(world: World, deadlines_first: bool) -> None:
    world.deadlines_first = deadlines_first
    if world.exit is None:
        world.advance()


def _hang_or_wake(world: World, process: Process) -> None:
    (world.wake if process.hung else world.hang)(process)


def _then(world: World, what: str) -> None:
    name, _, argument = what.partition(" ")
    if name == "kill":
        _kill_master(world, float(argument))
    elif name == "crash" and world.serving():
        world.crash(world.serving()[0])
    elif name == "swap":
        world.swap(name="other")
    elif name == "drain":
        world.drain("reject")
    elif name == "scale":
        world.scale(3)
    elif name in {"promote", "rollback", "discard", "reload", "stage"}:
        getattr(world, name)()


def _reload_and_then(world: World, seconds: float, what: str) -> None:
    """The rest is as the settings say; and a moment later something comes between, or follows."""
    world.deploy("good")
    world.reload()
    world.run(seconds)
    _then(world, what)


def _deploy_what_breaks(world: World, seconds: float, crashes: bool) -> None:
    """It serves for so long, and then one of its workers crashes, or all of its answers are 5xx."""
    world.deploy("good")
    world.reload()
    world.run(seconds)
    serving = world.serving()
    if serving and crashes:
        world.crash(serving[0])
    for process in serving[crashes:]:
        world.respond(process, 30, 30)


def _stage_and_then(world: World, seconds: float, what: str) -> None:
    world.deploy("good")
    world.stage()
    world.run(seconds)
    _then(world, what)


def _reload_with_a_fault(world: World, fault: str, who: str, seconds: float, what: str) -> None:
    """What services do wrong while they pass from one generation to another, and back."""
    world.faults[fault] = who
    _reload_and_then(world, seconds, what)


def _swap_and_then(world: World, fault: str, seconds: float, what: str) -> None:
    """Something comes between while workers owe an answer about a swap."""
    world.faults[fault] = "odd"
    world.swap()
    world.run(seconds)
    _then(world, what)


_SERVICE_FAULTS = ("slow services", "slow services", "never deactivates", "refuses services")
_SWAP_FAULTS = ("hangs in prepare", "hangs in prepare", "silent commit", "refuses abort")
_NEXT: tuple[Argument, ...] = (
    *("promote", "promote", "rollback", "rollback", "rollback", "discard", "reload", "stage"),
    *("kill 0.0", "kill 0.3", "crash", "swap", "drain", "scale", "wait"),
)
_PICKS: tuple[Argument, ...] = tuple(range(6))
_GENERATIONS: tuple[Argument, ...] = (None, None, None, 1, 2, 3, 4)

ACTIONS: dict[str, Action] = {
    # what is asked
    "reload": Action(5, _nothing, lambda world: world.reload()),
    "deploy_and_reload": Action(4, _one_of("good", "good", "good", *CODES), _deploy_and_reload),
    "save": Action(2, _one_of("good", *CODES), _save),
    "reload_otherwise": Action(2, _each_of((*Strategy, None), (0, 1, None), (5.0, None)), _reload_otherwise),
    "reload_and_then": Action(
        6, _each_of((0.02, 0.5, 1.2, 1.25, 1.3, 1.4, 2.0, 6.0), _NEXT), _reload_and_then
    ),
    "deploy_what_breaks": Action(4, _each_of((1.4, 3.0, 8.0), (True, False)), _deploy_what_breaks),
    "stage_and_then": Action(3, _each_of((0.5, 1.4, 2.0, 6.0), _NEXT), _stage_and_then),
    "stage": Action(3, _nothing, lambda world: world.stage()),
    "promote": Action(3, _one_of(*_GENERATIONS), lambda world, generation: world.promote(generation)),
    "discard": Action(2, _one_of(*_GENERATIONS), lambda world, generation: world.discard(generation)),
    "rollback": Action(3, _one_of(*_GENERATIONS), lambda world, generation: world.rollback(generation)),
    "scale": Action(2, _one_of(-1, 0, 1, 2, 3, 4), lambda world, count: world.scale(count)),
    "nudge": Action(2, _one_of(1, -1), lambda world, delta: world.nudge(delta)),
    "drain": Action(2, _one_of("reject", "queue", None), lambda world, mode: world.drain(mode)),
    "swap": Action(3, _one_of("model", "limits"), lambda world, service: world.swap(service, name="other")),
    "swap_with_a_fault": Action(2, _each_of(FAULTS, WHO, (0.4, 0.6, 70.0)), _swap_with_a_fault),
    "reload_with_a_fault": Action(
        2, _each_of(_SERVICE_FAULTS, WHO, (1.25, 1.4, 6.0), _NEXT), _reload_with_a_fault
    ),
    "swap_and_then": Action(2, _each_of(_SWAP_FAULTS, (0.4, 0.52, 0.6), _NEXT), _swap_and_then),
    "stop": Action(1, _each_of((False, False, True), (0.0, 4.0), (True, False)), _stop),
    # what is on the disk
    "deploy": Action(1, _one_of(*CODES), lambda world, behaviour: world.deploy(behaviour)),
    "restore": Action(1, _nothing, _restore),
    "settings": Action(2, _each_of(SETTINGS, (1, 2, 3)), _settings),
    # what goes wrong
    "services_do_wrong": Action(2, _each_of(FAULTS, WHO), _toggle_fault),
    "crash": Action(4, _one_of(*_PICKS), _picked(lambda world, process: world.crash(process))),
    "hang_or_wake": Action(3, _one_of(*_PICKS), _picked(_hang_or_wake)),
    "connect": Action(
        4, _each_of((1, 20), _PICKS), lambda world, count, number: world.connect(count, number)
    ),
    "respond": Action(4, _each_of(_PICKS, (1, 30), (0, 0, 1)), _picked(_respond)),
    "keep_busy": Action(2, _each_of(_PICKS, (0.0, 30.0, 1000.0)), _picked(_work)),
    "wants_recycling": Action(2, _one_of(*_PICKS), _picked(_recycle)),
    "weather": Action(3, _one_of(*WEATHERS), lambda world, name: world.turn(name, name not in world.weather)),
    "repeat_a_message": Action(2, _one_of(*range(30)), _repeat),
    "calm": Action(7, _nothing, _calm),
    "pause_the_master": Action(1, _one_of(3.0, 40.0), lambda world, seconds: world.pause(seconds)),
    "kill_the_master": Action(3, _one_of(0.0, 0.3, 3.0), _kill_master),
    "the_master_dies_soon": Action(3, _one_of(0, 1, 2, 3, 4), _die_soon),
    "upgrade_the_master": Action(2, _nothing, lambda world: world.upgrade()),
    # time
    "next": Action(14, _one_of(False, True), _next),
    "time": Action(10, _one_of(0.02, 0.2, 1.1, 6.0, 15.0, 70.0), lambda world, seconds: world.run(seconds)),
}
NAMES = tuple(name for name, action in ACTIONS.items() for _ in range(action.weight))
"""Each as often as it weighs."""


def draw(random: Random, count: int) -> list[Step]:
    """So many steps."""
    names = random.choices(NAMES, k=count)
    # a stop ends a run: it comes late, so that there is something to stop
    early = [name for name in names[: count * 3 // 4] if name != "stop"]
    names = early + names[count * 3 // 4 :]
    return [Step(name, ACTIONS[name].draw(random)) for name in names]

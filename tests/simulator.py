"""A world for the lifecycle: a shell, processes, an operator and a clock, all made up, and the "Never" list checked.

`World` carries out the effects of `segue.supervisor.lifecycle.step` on simulated workers, as
`segue.supervisor.master` does on real ones, with faults on demand. It guarantees to the lifecycle exactly what the
real shell does: a command that isn't answered within its timeout comes back with an error, the calls to one worker
are made one after the other, and each `Spawn` comes to one end. After every step the invariants are checked.

Time is a number. It jumps to whatever is next: something that happens in a worker, or `next_deadline`.
"""

from __future__ import annotations

import copy
import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec

from segue.handoff.adoption import Acceptance
from segue.handoff.messages import WorkerMode
from segue.supervisor import adoption, lifecycle, memory, swaps
from segue.supervisor import model as m
from segue.supervisor.finding import Found, FoundWorker
from segue.supervisor.model import (
    ChangePhase,
    GenerationState,
    PromotePhase,
    ServicesState,
    Strategy,
    SwapPhase,
    Verb,
    WorkerState,
)
from segue.supervisor.totals import Written

LIMITS = m.Limits(ready_timeout=20.0, drain_timeout=60.0, stop_timeout=10.0, heartbeat_timeout=9.0)
BOOT_S = 1.0
BOOT_SPREAD_S = 0.1
BEAT_S = 3.0
REPEAT_S = 1.0
LATENCY_S = 0.01
GATE_S = 0.05
SLOW_GATE_S = 8.0
LATE_S = 1.0
HANDOVER_S = 10.0
PREPARE_S = 0.5
"""How long a worker takes to make a new instance of a service."""
PREPARE_LIMIT_S = 300.0
"""After that a worker gives up by itself."""
STEPS_AT_ONCE = 2000
"""More steps than this without any time passing are a busy loop."""

Key = tuple[int, int]

CODES = (
    "good",
    "slow",
    "exits",
    "hangs",
    "dies when ready",
    "refuses activation",
    "one refuses activation",
    "silent on activation",
)
WEATHERS = (
    "spawns fail",
    "boots fail",
    "boots hang",
    "requests lost",
    "answers lost",
    "commands refused",
    "datagrams lost",
    "slow disk",
    "stubborn",
)
FAULTS = (
    "refuses prepare",
    "hangs in prepare",
    "dies in prepare",
    "differs",
    "refuses commit",
    "silent commit",
    "dies in commit",
    "refuses abort",
    "dies in abort",
    "refuses services",
    "never deactivates",
)
"""What services do to their workers: `World.faults` says to which."""
WHO = ("all", "odd", "even")
SWAP_VERBS = frozenset({Verb.SWAP_PREPARE, Verb.SWAP_COMMIT, Verb.SWAP_ABORT})
SETTINGS = ("good", "broken", "late", "never read")

ANSWERS: dict[Verb, type[Any]] = {
    Verb.ACTIVATE: m.Activated,
    Verb.QUIET: m.Quieted,
    Verb.HAND_OVER: m.HandingOver,
    Verb.PARK: m.Parked,
    Verb.STOP: m.StopTaken,
    Verb.DRAIN: m.DrainTold,
    Verb.SERVICES_DEACTIVATE: m.ServicesDeactivated,
}


@dataclass
class Call:
    """A command on its way to a worker."""

    command: m.Command | m.SwapCommand
    epoch: int
    """Of the master that makes it."""
    answered: bool = False
    report: dict[str, Any] = field(default_factory=dict)

    def event(self, error: str, own: bool) -> m.WorkerEvent:
        """What the shell makes of its end; `own`: the worker has said so itself."""
        command, key = self.command, (self.command.generation, self.command.worker)
        if isinstance(command, m.Command):
            if command.verb is Verb.SERVICES_ACTIVATE:
                return m.ServicesActivated(*key, command.lead, error)
            answer: m.WorkerEvent = ANSWERS[command.verb](*key, error)
            return answer
        report = {} if error else self.report
        if command.verb is Verb.SWAP_PREPARE:
            known = {"known": ["model"]} if own and error else {}
            return m.SwapPrepared(*key, command.swap, error, 404 if known else 409, known, report)
        if command.verb is Verb.SWAP_COMMIT:
            return m.SwapCommitted(*key, command.swap, error, report, rolled_back=own and bool(error))
        return m.SwapAborted(*key, command.swap, error)


@dataclass(eq=False)
class Process:
    """A worker as it really is, whatever the lifecycle believes."""

    key: Key
    behaviour: str
    gated: bool
    operator_drain: str | None
    mode: str = "booting"
    alive: bool = True
    hung: bool = False
    work_s: float = 0.5
    """How long what it has to finish takes."""
    drains: int = 0
    """How often it has begun to drain."""
    responses: int = 0
    errors: int = 0
    """How many responses it has sent, and how many of them with 5xx."""
    unconfirmed: bool = False
    ready_seen: bool = False
    wants_recycling: bool = False
    stopped_by_master: bool = False
    calls: deque[Call] = field(default_factory=deque)
    call: Call | None = None
    beside: list[Call] = field(default_factory=list)
    """Calls that are made beside the others."""
    orphaned: int = 0
    """It has lost its master, in this epoch."""
    deaf: bool = False
    """It has left a call without an answer."""
    versions: dict[str, int] = field(default_factory=dict)
    """Service → the version that it has; those that were never swapped are not in it."""
    prepared: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Swap → the service and the version that it has beside the old one."""
    services_active: bool = False
    leads: bool = False
    """Whether the services that only one process may have active are active here."""
    backlog: list[Callable[[], None]] = field(default_factory=list)
    """What it does once its loop turns again."""

    @property
    def accepts(self) -> bool:
        return self.alive and self.mode == "active"


def _fake_process(process: Process) -> Any:
    """What of a process adoption looks at: whether its output is still caught, since it boots."""
    return SimpleNamespace(output=object() if process.mode == "booting" else None)


class World:
    """One instance of segue, and everything around it."""

    def __init__(
        self, workers: int = 2, limits: m.Limits = LIMITS, handover: float | None = HANDOVER_S
    ) -> None:
        self.now = 1000.0
        self.limits = limits
        self.handover = handover
        """Seconds that services may take to hand over; None: the application has none."""
        self.faults: dict[str, str] = {}
        """What services do wrong, and in which workers: one of `WHO`."""
        self.superseded: dict[int, float] = {}
        """Generation → when another became the current one."""
        self.state = m.State()
        self.processes: dict[Key, Process] = {}
        self.code = 1
        self.behaviour = "good"
        self.weather: set[str] = set()
        self.settings = "good"
        self.workers_setting = workers
        self.deadlines_first = False
        self.death_s = LATENCY_S
        """How long a killed process takes to end: one that waits for a disk takes its time."""
        self.releases: dict[int, tuple[int, str, int]] = {}
        """Generation → the code, its behaviour and the workers setting that it was started from."""
        self.answers: dict[int, m.Settle] = {}
        self.asked: dict[int, m.Event] = {}
        self.log: list[m.Effect] = []
        self.said: Counter[str] = Counter()
        self.spawned: dict[Key, float] = {}
        self.ended: Counter[Key] = Counter()
        self.promoted: list[int] = []
        self.rolled_back: list[m.RolledBack] = []
        self.probations: list[m.ProbationEnded] = []
        self.went_back = False
        """Whether what serves now was gone back to."""
        self.drained: list[int] = []
        self.harmed: set[int] = set()
        """Generations with a worker that crashed, hung or could not be spoken with."""
        self.exit: int | None = None
        self.first_failed = False
        self.served_at_stop: bool | None = None
        self.cut_at_stop = False
        self.epoch = 1
        self.journals = False
        """Whether the masters of this world can die: each step is written down."""
        self.dies_after: int | None = None
        """The master dies in its next step, after so many of its effects."""
        self.lost: set[int] = set()
        """Operations whose asker has lost the master before there was an answer."""
        self._writer = memory.Writer(memory.Instance("world", 1), clock=lambda: 0.0)
        self._written: dict[str, Any] = {}
        self.trace: deque[str] | None = None
        """What the lifecycle saw and did last, for a person, if it is asked for."""
        self.last_messages: deque[m.Event] = deque(maxlen=30)
        self._next_operation = 1
        self._frozen: list[m.Event] | None = None
        self._queue: deque[m.Event] = deque()
        self._happenings: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._steps = 0
        self._steps_now = 0

    @property
    def events(self) -> int:
        """How many the lifecycle has seen."""
        return self._steps

    # ----------------------------------------------------------------------------------------- the operator

    def reload(self, **asked: Any) -> int:
        """Ask for a reload; returns the operation."""
        return self._ask(lambda number: m.ReloadAsked(number, **asked))

    def stage(self) -> int:
        return self._ask(m.StageAsked)

    def promote(self, generation: int | None = None, **asked: Any) -> int:
        return self._ask(lambda number: m.PromoteAsked(number, generation, **asked))

    def discard(self, generation: int | None = None) -> int:
        return self._ask(lambda number: m.DiscardAsked(number, generation))

    def rollback(self, generation: int | None = None) -> int:
        return self._ask(lambda number: m.RollbackAsked(number, generation))

    def save(self) -> int:
        """Something was saved in development mode."""
        return self._ask(lambda operation: m.ReloadAsked(operation, overtakes=True))

    def scale(self, count: int) -> int:
        return self._ask(lambda number: m.ScaleAsked(number, count=count))

    def nudge(self, delta: int) -> None:
        """TTIN or TTOU."""
        self.put(m.ScaleAsked(None, delta=delta))

    def swap(self, service: str = "model", **query: str) -> int:
        """Ask for another instance of a service."""
        return self._ask(lambda number: m.SwapAsked(number, service, query))

    def drain(self, mode: str | None) -> int:
        return self._ask(lambda number: m.DrainAsked(number, mode))

    def stop(self, at_once: bool = False, delay: float = 0.0, budget: float = 10.0) -> int:
        return self._ask(lambda number: m.StopAsked(number, at_once, delay, budget))

    def signal_stop(self, at_once: bool = False, delay: float = 0.0, budget: float = 10.0) -> None:
        self.put(m.StopAsked(None, at_once, delay, budget))

    def start(self) -> int:
        """The first start, until it is over."""
        operation = self.reload()
        self.run_until(lambda: operation in self.answers and (self.exit is not None or bool(self.promoted)))
        return operation

    def _ask(self, event: Callable[[int], m.Event]) -> int:
        number = self._next_operation
        self._next_operation += 1
        if self.exit is None:
            self.asked[number] = event(number)
            self.put(self.asked[number])
        return number

    def deploy(self, behaviour: str = "good") -> None:
        """Other code is on the disk now, and this is how it starts."""
        self.code += 1
        self.behaviour = behaviour

    def restore(self, generation: int) -> None:
        """The code of that generation is on the disk again."""
        self.code, self.behaviour, _ = self.releases[generation]

    def respond(self, process: Process, count: int, errors: int = 0) -> None:
        """It answers requests, and tells of it."""
        process.responses += count
        process.errors += errors
        self._act(process, lambda: self._say_counts(process))
        self._settle_queue()

    def _say_counts(self, process: Process) -> None:
        self._say(process, m.ResponsesCounted(*process.key, process.responses, process.errors))

    # -------------------------------------------------------------------------------------------- mishaps

    def live(self) -> list[Process]:
        """Processes in the order of their start."""
        return [process for process in self.processes.values() if process.alive]

    def of(self, generation: int) -> list[Process]:
        return [process for process in self.live() if process.key[0] == generation]

    def serving(self) -> list[Process]:
        """Processes of the current generation that accept."""
        return [
            process for process in self.live() if process.accepts and process.key[0] == self.state.current
        ]

    def crash(self, process: Process, status: int = -11) -> None:
        self._harm(process.key[0])
        self._die(process, status, "crashed")
        self._settle_queue()

    def hang(self, process: Process) -> None:
        self._harm(process.key[0])
        process.hung = True

    def wake(self, process: Process) -> None:
        process.hung = False
        backlog, process.backlog = process.backlog, []
        for action in backlog:
            if process.alive:
                action()
        self._settle_queue()

    def turn(self, weather: str, on: bool) -> None:
        """Trouble of the whole host begins or ends."""
        (self.weather.add if on else self.weather.discard)(weather)
        for generation in self.state.generations:
            self._harm(generation)

    def pause(self, seconds: float) -> None:
        """The master does not run; the workers do. Then it reads everything that was said, and then looks at the clock."""
        if self.exit is not None:
            return
        due = lifecycle.next_deadline(self.state)
        self._frozen = []
        end = self.now + seconds
        while self._happenings and self._happenings[0][0] <= end:
            self.now, _, happening = heapq.heappop(self._happenings)
            happening()
        self.now = end
        self._steps_now = 0
        late, self._frozen = self._frozen, None
        if due is not None and due <= self.now:
            if self.now - due > LATE_S:
                late.append(m.Paused(self.now - due))
            late.append(m.TimePassed())
        for event in late:
            self._queue.append(event)
        self._settle_queue()

    # -------------------------------------------------------------------------------------------- time

    def run(self, seconds: float) -> None:
        """Let this much time pass."""
        end = self.now + seconds
        while self.exit is None and (upcoming := self._upcoming()) is not None and upcoming <= end:
            self.advance()
        if self.exit is None:
            self.now = end

    def run_until(self, condition: Callable[[], bool], limit: float = 600.0) -> None:
        """Let time pass until it is so, which must be within `limit` seconds."""
        end = self.now + limit
        while not condition():
            upcoming = self._upcoming()
            if self.exit is not None or upcoming is None or upcoming > end:
                raise AssertionError(f"it did not come to it within {limit} s; {self.describe()}")
            self.advance()

    def advance(self) -> None:
        """Jump to the next thing that happens."""
        due = lifecycle.next_deadline(self.state)
        happens = self._happenings[0][0] if self._happenings else None
        if due is None and happens is None:
            return
        if happens is None or (
            due is not None and (due < happens or (due == happens and self.deadlines_first))
        ):
            assert due is not None
            if due > self.now:
                self._steps_now = 0
            self.now = max(self.now, due)
            self.put(m.TimePassed())
            after = lifecycle.next_deadline(self.state)
            assert self.exit is not None or after is None or after > self.now - 1e-12, (
                f"{after} is over; {self.describe()}"
            )
        else:
            time, _, happening = heapq.heappop(self._happenings)
            if time > self.now:
                self._steps_now = 0
            self.now = max(self.now, time)
            happening()
            self._settle_queue()

    def _upcoming(self) -> float | None:
        due = lifecycle.next_deadline(self.state)
        times = [due] if due is not None else []
        times += [self._happenings[0][0]] if self._happenings else []
        return max(self.now, min(times)) if times else None

    def _at(self, delay: float, happening: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._happenings, (self.now + delay, self._sequence, happening))

    # --------------------------------------------------------------------------------------------- the shell

    def put(self, event: m.Event) -> None:
        """An event of the shell."""
        if self._frozen is not None:
            self._frozen.append(event)
            return
        self._queue.append(event)
        self._settle_queue()

    def _tell(self, event: m.Event) -> None:
        """An event that comes out of a process: it is stepped when what happens there has happened."""
        if self._frozen is not None:
            self._frozen.append(event)
        else:
            self._queue.append(event)

    def _settle_queue(self) -> None:
        if self._frozen is not None:
            return
        while self._queue and self.exit is None:
            self._step(self._queue.popleft())

    def _step(self, event: m.Event) -> None:
        self._steps += 1
        self._steps_now += 1
        assert self._steps_now < STEPS_AT_ONCE, f"a busy loop; {self.describe()}"
        before = self.state
        sample = copy.deepcopy(before) if self._steps % 53 == 0 else None
        after, effects = lifecycle.step(before, event, self.now)
        assert sample is None or sample == before, "step() changed the state that it was given"
        if isinstance(event, m.StopAsked) and self.served_at_stop is None and self.exit is None:
            self.served_at_stop = before.serving or before.current is None
        self.state = after
        if self.trace is not None:
            self.trace.append(f"{self.now:9.2f}  {event}")
            self.trace.extend(f"           -> {effect}" for effect in effects)
        self._record()
        for number, effect in enumerate(effects):
            assert self.exit is None, f"{effect} after the exit"
            if self.journals and self.dies_after == number:
                self.kill_master()
                return
            self._execute(effect, before, effects)
        self.log += effects
        if effects:
            self._record()
        if self.exit is None:
            Checks(self, before, event, effects).all()

    def _record(self) -> None:
        if self.journals:
            pids = {process.key: (1, 1) for process in self.live()}
            self._written = self._writer.values(self.state, {}, pids, {}, self._next_operation, Written(), {})

    def kill_master(self, downtime: float = 0.0, upgrade: bool = False) -> None:
        """The master dies, or executes itself; after `downtime` seconds there is another one."""
        if self.exit is not None or not self.journals or self._frozen is not None:
            return
        self.dies_after = None
        self.epoch += 1
        self._queue.clear()
        for number in self.asked.keys() - self.answers.keys():
            self.lost.add(number)
            del self.asked[number]
        for key in self.spawned.keys() - self.processes.keys():
            self.ended[key] = self.ended[key] or 1  # its code was being compared
        for process in self.live():
            for call in [*process.beside, *process.calls, *([process.call] if process.call else [])]:
                call.answered = True
            process.calls.clear()
            process.beside.clear()
            process.call = None
            if not upgrade:
                self._act(process, lambda process=process: self._lose_master(process))  # type: ignore[misc]
        self._frozen = []
        end = self.now + downtime
        while self._happenings and self._happenings[0][0] <= end:
            self.now, _, happening = heapq.heappop(self._happenings)
            happening()
        self.now, self._frozen, self._steps_now = end, None, 0
        self._adopt()

    def upgrade(self) -> None:
        """The master executes itself, unless something is under way, as the real one."""
        state = self.state
        busy = state.stopping or state.changing or state.queued or state.swap or state.swaps_queued
        if not (busy or state.scaling or state.scale_queued or state.drain_change or state.current is None):
            self.kill_master(0.05, upgrade=True)

    def _lose_master(self, process: Process) -> None:
        """What a worker does without one."""
        process.orphaned = self.epoch
        match process.mode:
            case "booting" | "ready":
                self._die(process, 70, "has lost its master")
            case "drained":
                self._stop(process, self.limits.stop_timeout)
            case "quiet":
                self._mode(process, "draining")
                process.drains += 1
                self._finish(process, process.drains)

    def _adopt(self) -> None:
        known = memory.recall({key: msgspec.json.encode(value) for key, value in self._written.items()})
        known.wall = 0.0
        workers = [FoundWorker(p.key, _fake_process(p), self._acceptance(p)) for p in self.live()]
        limits = dict.fromkeys(self.releases, self.limits)
        adopted = adoption.adopt(known, Found(workers), limits, self.now)
        self.said["adopted"] += 1
        for process in self.live():
            process.orphaned = 0
            process.ready_seen = process.ready_seen and process.mode != "ready"
            process.gated = process.gated or process.mode == "booting"
        before, self.state = self.state, adopted.state
        if self.state.current is not None and self.state.current not in self.promoted:
            self.promoted.append(self.state.current)  # it alone accepts, so its promote is done
        for number in before.generations:
            if number != self.state.current and number in self.promoted:
                self.superseded.setdefault(number, self.now)
        self._writer = memory.Writer(memory.Instance("world", self.epoch), clock=lambda: 0.0)
        self._record()
        for effect in adopted.effects:
            self._execute(effect, self.state, adopted.effects)
        self.log += adopted.effects
        self._record()
        if self.state.current is None:
            self.served_at_stop = None
            self.reload()
        self.put(m.TimePassed())

    def _acceptance(self, process: Process) -> Acceptance | None:
        """What it tells its new master; None if it hangs."""
        if process.hung:
            return None
        return Acceptance(
            version=1,
            pid=1,
            start_time=1,
            identity="world",
            generation=process.key[0],
            worker=process.key[1],
            mode=WorkerMode(process.mode),
            fingerprint="",
            handover_s=None if process.mode == "booting" else self.handover,
            services_active=process.services_active,
            lead=process.leads,
            versions={"model": 1, "limits": 1} | process.versions,
            operator_drain=process.operator_drain,
        )

    def _execute(self, effect: m.Effect, before: m.State, effects: list[m.Effect]) -> None:
        match effect:
            case m.Prepare(generation):
                self._prepare(generation)
            case m.Check(generation):
                self._check_code(generation)
            case m.Spawn(generation, worker):
                key = (generation, worker)
                assert key not in self.spawned, f"{key} is spawned twice"
                assert not (before.stopping and before.stopping.begun), f"{key} is spawned during a stop"
                self.spawned[key] = self.now
                if effect.gated:
                    gate_s = SLOW_GATE_S if "slow disk" in self.weather else GATE_S
                    self._at(gate_s, self._of_this_master(lambda: self._gate(effect)))
                else:
                    self._spawn(effect)
            case m.Command() | m.SwapCommand():
                self._command(effect)
            case m.Kill(generation, worker, now):
                self._kill((generation, worker), now)
            case m.Settle(operation):
                assert operation in self.asked, f"operation {operation} was never asked for"
                assert operation not in self.answers, f"operation {operation} has two answers"
                self.answers[operation] = effect
                self._check_truth(effect, effects)
            case m.Promoted(generation, previous):
                self._check_promotion(before.generations[generation])
                if previous is not None:
                    self.superseded[previous] = self.now
                self.promoted.append(generation)
                back = [each for each in effects if isinstance(each, m.RolledBack)]
                breached = before.probation is not None
                assert not (breached and self.went_back and back), "to and fro by itself"
                self.went_back = bool(back)
            case m.RolledBack(generation, to):
                assert self.promoted[-1] == to
                self.rolled_back.append(effect)
            case m.ProbationEnded():
                self.probations.append(effect)
            case m.AllDrained(generation):
                self.drained.append(generation)
            case m.Say(_, event):
                self.said[event] += 1
            case m.Exit(status):
                self.exit = status
                self._check_exit(status)
            case _:
                pass

    def _prepare(self, generation: int) -> None:
        if self.settings == "never read":
            return
        settings, release = self.settings, (self.code, self.behaviour, self.workers_setting)

        def done() -> None:
            if generation not in self.state.generations:
                return
            if settings == "broken":
                self._tell(m.PrepareFailed(generation, "no such file: segue.toml"))
                return
            self.releases[generation] = release
            current, workers = self.state.current, release[2]
            if current is not None and self.releases[current][2] == workers:
                workers = self.state.generations[current].target
            if self.weather:
                self._harm(generation)
            self._tell(m.Prepared(generation, workers, self.limits))

        self._at(50.0 if settings == "late" else 0.02, self._of_this_master(done))

    def _of_this_master(self, happening: Callable[[], None]) -> Callable[[], None]:
        """What it does itself, and does not do any more once it is dead."""
        epoch = self.epoch

        def if_alive() -> None:
            if self.epoch == epoch:
                happening()

        return if_alive

    def _check_code(self, generation: int) -> None:
        """A throw-away process imports it."""
        behaviour = self.releases[generation][1]
        if behaviour == "hangs":
            return
        error = "exited with 3 during import: ModuleNotFoundError" if behaviour == "exits" else ""
        done = m.Checked(generation, error, error and "Traceback")
        self._at(0.3, self._of_this_master(lambda: self._tell(done)))

    def _gate(self, effect: m.Spawn) -> None:
        """A respawn starts only if its code is still there."""
        if self.releases[effect.generation][0] == self.code:
            self._spawn(effect)
        else:
            self.ended[effect.generation, effect.worker] += 1
            self._tell(m.CodeChanged(effect.generation, effect.worker, "the code has changed"))

    def _spawn(self, effect: m.Spawn) -> None:
        key = (effect.generation, effect.worker)
        if "spawns fail" in self.weather:
            self.ended[key] += 1
            self._tell(m.WorkerExited(*key, "could not be started: no more processes"))
            return
        behaviour = self.releases[effect.generation][1]
        for weather in ("boots fail", "boots hang"):
            if weather in self.weather:
                behaviour = {"boots fail": "exits", "boots hang": "hangs"}[weather]
        process = Process(key, behaviour, effect.gated, effect.drain_mode)
        process.versions = {name: record.version for name, record in effect.services.items()}
        self.processes[key] = process
        self._boot(process)

    def _command(self, command: m.Command | m.SwapCommand) -> None:
        process = self.processes.get((command.generation, command.worker))
        if process is None or not process.alive:
            return
        call = Call(command, self.epoch)
        if isinstance(command, m.SwapCommand):
            self._check_swap_command(process, command)
        if command.verb is Verb.SWAP_PREPARE:
            process.beside.append(call)
            self._send(process, call)
        else:
            process.calls.append(call)
            self._next_call(process)

    def _check_swap_command(self, process: Process, command: m.SwapCommand) -> None:
        pending = [*process.beside, *process.calls, *([process.call] if process.call else [])]
        swaps = [call.command.verb for call in pending if call.command.verb in SWAP_VERBS]
        assert not swaps, f"{command.verb}, while {swaps} is not answered; {self.describe()}"
        if command.verb is not Verb.SWAP_PREPARE:
            assert not command.query
            assert not command.choices

    def _next_call(self, process: Process) -> None:
        if process.call is not None or not process.calls:
            return
        process.call = process.calls.popleft()
        self._send(process, process.call)

    def _send(self, process: Process, call: Call) -> None:
        command = call.command
        self._at(command.timeout, lambda: self._answer(process, call, "no answer in time"))
        if "requests lost" in self.weather:
            return
        refused = "commands refused" in self.weather
        answer_lost = "answers lost" in self.weather

        def arrive() -> None:
            if call.epoch != self.epoch:
                return  # another master has come meanwhile
            if refused:
                error: str | None = "not now"
            elif isinstance(command, m.SwapCommand):
                error = self._obey_swap(process, call, command)
            else:
                error = self._obey(process, command)
            if error is not None and not answer_lost and process.alive:
                self._answer(process, call, error, own=True)

        delay = PREPARE_S if command.verb is Verb.SWAP_PREPARE else LATENCY_S
        self._at(delay, lambda: self._act(process, arrive))

    def _answer(self, process: Process, call: Call, error: str, own: bool = False) -> None:
        if call.answered:
            return
        call.answered = True
        process.deaf = process.deaf or not own
        self._tell(call.event(error, own))
        if call in process.beside:
            process.beside.remove(call)
            return
        process.call = None
        if process.alive:
            self._next_call(process)

    def _kill(self, key: Key, now: bool) -> None:
        process = self.processes.get(key)
        if process is None or not process.alive:
            return
        if now:
            self._at(self.death_s, lambda: self._die(process, -9, "was killed"))
        elif "stubborn" not in self.weather:
            if process.mode == "booting":
                self._at(0.1, lambda: self._die(process, -15, "was ended by SIGTERM"))
            else:
                self._act(process, lambda: self._stop(process, self.limits.stop_timeout))

    # ------------------------------------------------------------------------------------------- a process

    def _harm(self, generation: int) -> None:
        self.harmed.add(generation)

    def _act(self, process: Process, action: Callable[[], None]) -> None:
        if process.hung:
            process.backlog.append(action)
        elif process.alive:
            action()

    def _say(self, process: Process, event: m.Event) -> None:
        """A datagram to the master."""
        if process.alive and "datagrams lost" not in self.weather:
            self.last_messages.append(event)
            self._tell(event)

    def _boot(self, process: Process) -> None:
        boot_s = (6.0 if process.behaviour == "slow" else BOOT_S) + BOOT_SPREAD_S * (process.key[1] % 4)
        self._at(0.05, lambda: self._say(process, m.WorkerPhased(*process.key, "import")))
        self._at(
            boot_s / 2,
            lambda: self._act(process, lambda: self._say(process, m.WorkerPhased(*process.key, "startup"))),
        )
        if process.behaviour == "exits":
            self._at(
                0.3,
                lambda: self._die(
                    process, 3, "exited with 3 during import: ModuleNotFoundError", "Traceback"
                ),
            )
        elif process.behaviour != "hangs":
            self._at(boot_s, lambda: self._act(process, lambda: self._become_ready(process)))
            if process.behaviour == "dies when ready":
                self._at(boot_s + LATENCY_S / 2, lambda: self._die(process, 1, "exited with 1"))

    def _become_ready(self, process: Process) -> None:
        if process.mode != "booting":
            return
        self._mode(process, "ready")
        self._beat(process)

    def _mode(self, process: Process, mode: str) -> None:
        process.mode = mode
        process.unconfirmed = mode in {"ready", "drained"}

    def _beat(self, process: Process) -> None:
        """Its state, again and again: more often while nothing shows that it was heard."""
        if not process.alive:
            return
        if process.mode == "ready" and not process.ready_seen and "datagrams lost" not in self.weather:
            process.ready_seen = True
            if process.gated:
                gate_s = SLOW_GATE_S if "slow disk" in self.weather else GATE_S
                self._at(gate_s, self._of_this_master(lambda: self._ready_if_same(process)))
            else:
                self._say(process, m.WorkerReady(*process.key, self.handover))
        if process.wants_recycling:
            self._say(process, m.WorkerAsks(*process.key, "limit_max_requests"))
        drained = process.mode == "drained"
        self._say(process, m.WorkerDrained(*process.key) if drained else m.WorkerBeat(*process.key))
        self._at(
            REPEAT_S if process.unconfirmed else BEAT_S,
            lambda: self._act(process, lambda: self._beat(process)),
        )

    def _ready_if_same(self, process: Process) -> None:
        if self.releases[process.key[0]][0] != self.code:
            self._tell(m.CodeChanged(*process.key, "the code has changed"))
        else:
            self._tell(m.WorkerReady(*process.key, self.handover))

    def _obey(self, process: Process, command: m.Command) -> str | None:
        """Do it; the error, or "" when it is done, or None for no answer."""
        process.unconfirmed = False
        if (
            command.verb is not Verb.DRAIN
            and command.verb is not Verb.STOP
            and process.mode in {"booting", "stopping"}
        ):
            return f"it is {process.mode}"
        match command.verb:
            case Verb.ACTIVATE:
                if process.behaviour == "refuses activation" or (
                    process.behaviour == "one refuses activation" and process.key[1] == 1
                ):
                    return "no listener"
                if process.behaviour == "silent on activation":
                    return None
                self._mode(process, "active")
            case Verb.QUIET:
                if process.mode not in {"draining", "drained", "parked"}:
                    self._mode(process, "quiet")
            case Verb.HAND_OVER:
                self._mode(process, "draining")
                process.drains += 1
                drain = process.drains
                self._at(
                    min(process.work_s, command.budget),
                    lambda: self._act(process, lambda: self._finish(process, drain)),
                )
            case Verb.PARK:
                if process.mode != "drained":
                    return f"it is {process.mode}"
                self._mode(process, "parked")
            case Verb.STOP:
                process.stopped_by_master = True
                self._stop(process, command.budget)
            case Verb.DRAIN:
                process.operator_drain = command.mode
            case Verb.SERVICES_ACTIVATE:
                if self._has(process, "refuses services"):
                    return "no broker"
                process.services_active = True
                process.leads = process.leads or command.lead
            case Verb.SERVICES_DEACTIVATE:
                if self._has(process, "never deactivates"):
                    process.deaf = True
                    return None
                process.services_active = process.leads = False
        return ""

    def _has(self, process: Process, fault: str) -> bool:
        """Whether a worker's services do this wrong."""
        who = self.faults.get(fault)
        return who == "all" or who == ("odd" if process.key[1] % 2 else "even")

    def _obey_swap(self, process: Process, call: Call, command: m.SwapCommand) -> str | None:
        if process.mode in {"booting", "stopping"}:
            return f"it is {process.mode}"
        phase = command.verb.value.removeprefix("swap ")
        if self._has(process, f"dies in {phase}"):
            self._harm(process.key[0])
            self._die(process, -11, "crashed")
            return None
        if self._has(process, f"refuses {phase}"):
            return f"no {phase}"
        match command.verb:
            case Verb.SWAP_PREPARE:
                if self._has(process, "hangs in prepare"):
                    self._at(PREPARE_LIMIT_S, lambda: self._answer(process, call, "took too long", own=True))
                    return None
                process.prepared[command.swap] = command.service, command.version
                differs = self._has(process, "differs")
                call.report = {
                    "choices": dict(command.choices) | command.query,
                    "digest": str(process.key) if differs else "same",
                    "build_s": PREPARE_S,
                }
            case Verb.SWAP_COMMIT:
                service, version = process.prepared.pop(command.swap)
                process.versions[service] = version
                call.report = {"rewired": ["cache", f"router-{process.key[1]}"], "moved": True}
                if self._has(process, "silent commit"):
                    return None
            case _:
                process.prepared.pop(command.swap, None)
        return ""

    def _finish(self, process: Process, drain: int) -> None:
        if process.mode == "draining" and process.drains == drain:
            self._mode(process, "drained")
            if process.orphaned:
                self._stop(process, self.limits.stop_timeout)
                return
            self._say(process, m.WorkerDrained(*process.key))

    def _stop(self, process: Process, budget: float) -> None:
        if process.mode == "stopping":
            return
        idle = process.mode in {"booting", "ready", "drained", "parked"}
        work_s = 0.0 if idle else process.work_s
        self._mode(process, "stopping")
        process.services_active = process.leads = False
        status = 0 if work_s <= budget else 1
        self._at(
            0.2 + min(work_s, budget),
            lambda: self._act(process, lambda: self._die(process, status, f"exited with {status}")),
        )

    def _die(self, process: Process, status: int, reason: str, output: str = "") -> None:
        if not process.alive:
            return
        if process.mode == "active":
            self._harm(process.key[0])
        process.alive = False
        self.ended[process.key] += 1
        if process.call is not None:
            self._answer(process, process.call, "connection closed")
        if process.stopped_by_master and status != 0 and self.state.ending:
            self.cut_at_stop = True
        self._tell(m.WorkerExited(*process.key, reason, output, status))
        for call in [*process.beside, *process.calls]:
            if not call.answered:
                call.answered = True
                self._tell(call.event("no such socket", own=False))

    # ----------------------------------------------------------------------------- what an effect may say

    def _check_promotion(self, generation: m.Generation) -> None:
        confirmed = [self.processes[generation.id, worker.id] for worker in generation.having(m.TAKING_PART)]
        assert len(confirmed) >= generation.wanted > 0, "not all of its workers were started"
        assert all(process.mode == "active" for process in confirmed), (
            f"promoted unconfirmed; {self.describe()}"
        )

    def _check_truth(self, settled: m.Settle, effects: list[m.Effect]) -> None:
        """Success is told when it is true, and failure with its reason."""
        asked = self.asked[settled.operation]
        if not settled.ok:
            assert settled.reason, f"{asked} was refused without a reason"
            return
        promoted = [each.generation for each in effects if isinstance(each, m.Promoted)]
        if isinstance(asked, m.ReloadAsked):
            assert promoted == [settled.generation], "a reload succeeded without a promote"
        elif isinstance(asked, m.RollbackAsked) and not promoted:
            assert settled.generation == self.state.current, f"{asked}: nothing was gone back to"
        elif isinstance(asked, m.PromoteAsked | m.RollbackAsked):
            assert promoted == [settled.generation], f"{asked} succeeded without a promote"
            assert asked.generation in {None, settled.generation}
        elif isinstance(asked, m.StageAsked):
            assert settled.generation is not None
            staged = self.state.generations[settled.generation]
            assert staged.state is GenerationState.STAGED
            modes = [process.mode for process in self.processes.values() if process.key[0] == staged.id]
            assert modes == ["ready"] * staged.target, f"staged, though {modes}; {self.describe()}"
        elif isinstance(asked, m.DiscardAsked):
            discarded = self.state.generations.get(settled.generation or 0)
            ended = {GenerationState.RETIRED, GenerationState.FAILED}
            assert discarded is None or discarded.state in ended, self.describe()
        elif isinstance(asked, m.ScaleAsked):
            assert self.state.current is not None
            current = self.state.generations[self.state.current]
            if not any(
                isinstance(each, m.Say) and each.fields.get("before") == asked.count for each in effects
            ):
                serving = current.having(m.SERVING)
                assert current.target == len(serving) == asked.count, f"not done: {asked}; {self.describe()}"
            assert not current.missing
        elif isinstance(asked, m.SwapAsked):
            assert settled.result is not None
            self._check_swap(asked, settled.result)
        elif isinstance(asked, m.DrainAsked):
            for process in self.live():
                generation = self.state.generations.get(process.key[0])
                worker = generation.workers.get(process.key[1]) if generation else None
                if worker is not None and worker.state in m.SERVING | m.LEAVING:
                    assert process.operator_drain == asked.mode, f"{process.key} was not told of {asked.mode}"
        elif isinstance(asked, m.StopAsked):
            assert not self.live(), "stopped, but there are workers"

    def _check_swap(self, asked: m.SwapAsked, result: dict[str, Any]) -> None:
        """Whoever takes part and can be spoken with has what was decided."""
        version = self.state.services[asked.service].version
        assert (result["service"], result["version"]) == (asked.service, version)
        assert "choices" not in str(result)
        assert self.state.current is not None
        for worker in self.state.generations[self.state.current].having(m.TAKING_PART):
            process = self.processes[self.state.current, worker.id]
            assert not process.alive or process.versions.get(asked.service, 1) == version, (
                f"{process.key} does not have version {version}; {self.describe()}"
            )

    def _check_exit(self, status: int) -> None:
        assert not self.live(), f"exit with living workers; {self.describe()}"
        assert self.answers.keys() == self.asked.keys(), (
            f"unanswered: {self.asked.keys() - self.answers.keys()}"
        )
        if self.served_at_stop is None:
            assert self.epoch > 1 or not self.promoted, "an exit that nobody asked for"
            assert status == 3
        elif not self.served_at_stop or self.cut_at_stop:
            assert status != 0, "exit 0 from an outage"
        pending = {key for key in self.spawned if not self.ended[key]}
        assert not pending, f"exit while {pending} were being started"

    def describe(self) -> str:
        """Everything, for a failure's message."""
        lines = [
            f"at {self.now:.2f}: current={self.state.current} change={self.state.change} scaling={self.state.scaling}",
            f"  promote={self.state.promote} probation={self.state.probation}",
        ]
        lines += [f"  weather={self.weather} settings={self.settings} stopping={self.state.stopping}"]
        lines += [f"  faults={self.faults} services={self.state.services} swaps={self.state.swap_count}"]
        lines += [f"  swap={self.state.swap} queued={self.state.swaps_queued} told={self.state.swaps_told}"]
        for generation in self.state.generations.values():
            lines.append(
                f"  generation {generation.id} {generation.state} target={generation.target} missing={generation.missing}"
                f" deadline={generation.deadline} respawn_at={generation.respawn_at}"
                f" warm_until={generation.warm_until} kept_until={generation.kept_until}"
            )
            lines += [f"    {worker}" for worker in generation.workers.values()]
        lines += [
            f"  process {process.key} {process.mode} hung={process.hung} versions={process.versions}"
            f" services={process.services_active} leads={process.leads} call={process.call}"
            for process in self.live()
        ]
        return "\n".join(lines)

    # ---------------------------------------------------------------------------------------- in the end

    def heal(self) -> None:
        """Nothing is wrong any more: good code, fair weather, nobody hangs; and enough time passes."""
        if self.exit is not None:
            return
        self.weather.clear()
        self.faults.clear()
        self.settings = "good"
        if self.behaviour not in {"good", "slow"}:
            self.deploy("good")
        if self.state.swap is not None or self.state.swaps_told:
            self.run(swaps.SWAP_PREPARE_TIMEOUT_S + swaps.SWAP_ABORT_TIMEOUT_S)
        self.run(6 * (self.limits.drain_timeout + lifecycle.PREPARE_TIMEOUT_S))
        for generation in self.state.generations.values():
            if generation.state is GenerationState.STAGED:
                self.discard(generation.id)
        self.run(self.limits.park_for + self.limits.probation + 60.0)

    def check_settled(self) -> None:
        """With nothing wrong for long enough one generation is left, complete; everybody has been answered."""
        assert self.answers.keys() == self.asked.keys(), f"unanswered; {self.describe()}"
        [current] = self.state.generations.values()
        assert current.id == self.state.current, self.describe()
        assert current.state is GenerationState.ACTIVE
        assert {worker.state for worker in current.workers.values()} == {WorkerState.ACTIVE}, self.describe()
        assert len(current.workers) == current.wanted >= 1, self.describe()
        assert {process.key for process in self.live()} == {
            (current.id, worker) for worker in current.workers
        }
        assert all(process.accepts for process in self.live())
        assert all(process.operator_drain == self.state.drain_mode for process in self.live()), (
            self.describe()
        )
        assert not self.state.changing
        assert self.state.probation is None
        assert not self.state.queued
        assert self.state.scaling is None
        assert not self.state.drained_watch
        assert current.missing == 0
        assert self.state.scale_queued is None
        assert self.state.swap is None
        assert not self.state.swaps_queued
        assert not self.state.swaps_told
        decided = {name: record.version for name, record in self.state.services.items()}
        assert all(process.versions == decided for process in self.live()), self.describe()
        if self.handover is not None:
            assert [process.leads for process in self.live()].count(True) == 1, self.describe()
            assert all(process.services_active for process in self.live()), self.describe()
            services = {worker.services for worker in current.workers.values()}
            assert services == {ServicesState.ACTIVE}, self.describe()

    def end(self) -> None:
        """Stop it; everything ends and everybody is answered."""
        if self.exit is None and self.state.stopping is None:
            self.stop()
        limit = self.now + 200.0
        while self.exit is None:
            assert self._upcoming() is not None, f"it has stopped before its end; {self.describe()}"
            assert self.now < limit, f"it does not end; {self.describe()}"
            self.advance()


class Checks:
    """What must hold after every step."""

    def __init__(self, world: World, before: m.State, event: m.Event, effects: list[m.Effect]) -> None:
        self.world = world
        self.before = before
        self.event = event
        self.effects = effects
        self.after = world.state

    def all(self) -> None:
        for check in (
            self.transitions,
            self.one_generation_is_active,
            self.spawns,
            self.commands,
            self.kills,
            self.never_zero_serving,
            self.numbers,
            self.probation,
            self.ways_on,
            self.one_lead,
            self.services_cease,
            self.versions,
            self.swaps_go_on,
        ):
            check()

    def fail(self, what: str) -> None:
        raise AssertionError(
            f"{what}\n  after {self.event}\n  effects {self.effects}\n{self.world.describe()}"
        )

    def transitions(self) -> None:
        for number, generation in self.before.generations.items():
            later = self.after.generations.get(number)
            state = GenerationState.RETIRED if later is None else later.state
            reached, todo = {generation.state}, [generation.state]
            while todo:
                for following in m.TRANSITIONS[todo.pop()] - reached:
                    reached.add(following)
                    todo.append(following)
            if state not in reached:
                self.fail(f"generation {number} went from {generation.state} to {state}")

    def one_generation_is_active(self) -> None:
        active = [g.id for g in self.after.generations.values() if g.state is GenerationState.ACTIVE]
        cleared = not active and (self.world.limits.strategy is Strategy.REPLACE or self.world.epoch > 1)
        if active != ([] if self.after.current is None else [self.after.current]) and not cleared:
            self.fail(f"{active} are active")
        ending = {GenerationState.DRAINING, GenerationState.FAILED, GenerationState.RETIRED}
        for generation in self.after.generations.values():
            if generation.state in ending and not generation.workers and generation.id != self.after.current:
                self.fail(f"generation {generation.id} has ended and is not retired")

    def spawns(self) -> None:
        """Only for the current generation, and for the one that is to follow."""
        wanted = {self.after.current, *self.coming()}
        for effect in self.effects:
            if isinstance(effect, m.Spawn) and effect.generation not in wanted:
                self.fail("a worker is started for a generation that ends")

    def coming(self) -> set[int]:
        """Generations that are being brought up, or promoted."""
        return {each.generation for each in (self.after.change, self.after.promote) if each is not None}

    def kills(self) -> None:
        """SIGTERM is for those that never served, or that did not take a stop."""
        for effect in self.effects:
            if isinstance(effect, m.Kill) and not effect.now:
                worker = self.before.generations[effect.generation].workers.get(effect.worker)
                if worker is not None and worker.state not in {
                    WorkerState.BOOTING,
                    WorkerState.READY,
                    WorkerState.STOPPING,
                }:
                    self.fail("a worker that may have accepted connections is ended without handing over")

    def commands(self) -> None:
        current, promote = self.after.current, self.after.promote
        beside = {GenerationState.ACTIVATING, GenerationState.MIXED}
        over = {GenerationState.DRAINING, GenerationState.RETIRED}
        for effect in self.effects:
            if not isinstance(effect, m.Command):
                continue
            generation = self.after.generations[effect.generation]
            match effect.verb:
                case Verb.ACTIVATE:
                    if self.world.processes[generation.id, effect.worker].mode == "booting":
                        self.fail("a worker is activated before it is ready")
                    promoted = promote is not None and promote.generation == generation.id
                    if generation.id != current and not (promoted and generation.state in beside):
                        self.fail(
                            "a worker is activated that is neither of the current generation nor of one that is promoted"
                        )
                case Verb.QUIET:
                    replaced = generation.state in over and generation.id in self.world.promoted
                    if generation.id == current:
                        active = frozenset({WorkerState.ACTIVE})
                        if generation.id in self.world.harmed or generation.state is GenerationState.DRAINING:
                            continue
                        if not generation.having(active):
                            self.fail("the last worker is told to be quiet")
                        before = self.before.promote
                        if before is not None and before.phase is PromotePhase.CANARY and promote is not None:
                            self.fail("a worker hands over while a canary serves")
                    elif not replaced and generation.state is not GenerationState.FAILED:
                        self.fail("an old worker is told to be quiet before the promote")
                case Verb.HAND_OVER:
                    if generation.having(frozenset({WorkerState.QUIETING})):
                        self.fail("hand over, while a worker of the generation is still in the first phase")
                case _:
                    pass

    @property
    def is_serving(self) -> bool:
        """Whether the current generation is to serve: not while it makes room for what can't run beside it."""
        current = self.after.generations.get(self.after.current or 0)
        return current is not None and current.state is GenerationState.ACTIVE

    def never_zero_serving(self) -> None:
        if self.after.stopping is not None or self.before.current is None or not self.is_serving:
            return
        if self.after.current not in self.world.harmed and not self.world.serving():
            self.fail("nobody accepts, though nobody crashed, hung or was asked to stop")
        active = frozenset({WorkerState.ACTIVE})
        had = self.before.generations[self.before.current].having(active)
        assert self.after.current is not None
        has = self.after.generations[self.after.current].having(active)
        hung = self.after.generations[self.after.current].having(frozenset({WorkerState.HUNG}))
        if had and not has and not hung and not isinstance(self.event, m.WorkerExited):
            self.fail("the last worker that serves was taken away")

    def numbers(self) -> None:
        if self.after.current is None or (self.after.stopping and self.after.stopping.begun):
            return
        generation = self.after.generations[self.after.current]
        if not self.is_serving:
            if not self.after.changing and self.after.recover_at is None and self.after.stopping is None:
                self.fail("nothing serves, and nothing will be tried")
            return
        promote = self.after.promote
        if promote is not None and promote.phase is PromotePhase.ROLLING:
            new = self.after.generations[promote.generation]
            most = max(generation.wanted + generation.ceded, new.wanted)
            spawned = [
                each for each in self.effects if isinstance(each, m.Spawn) and each.generation == new.id
            ]
            if spawned and len(generation.workers) + len(new.workers) > most + 1:
                self.fail("more workers than one beyond the number that is wanted")
        replacing = [w for w in generation.workers.values() if w.replaces is not None]
        if len(replacing) > 1:
            self.fail("more than one worker is being replaced")
        staying = generation.having(m.SERVING | m.STARTING)
        replaced = {worker.replaces for worker in replacing}
        count = sum(1 for worker in staying if worker.id not in replaced) + len(generation.respawn_at)
        if count > generation.wanted:
            self.fail(f"{count} workers, though {generation.wanted} are wanted")
        going = [
            w for w in generation.workers.values() if w.state in {WorkerState.STOPPING, WorkerState.KILLED}
        ]
        if count < generation.wanted and not going:
            self.fail(f"{count} workers, though {generation.wanted} are wanted, and nothing will change it")
        trying = self.after.recover_at is not None or self.after.changing
        if generation.wanted <= 0 and not staying and not trying and self.after.stopping is None:
            self.fail("nothing is left, and nothing will be tried")

    def ways_on(self) -> None:
        """Whoever isn't where it may stay has a deadline, or something to wait for that has one."""
        state = self.after
        serving = {GenerationState.ACTIVE, GenerationState.ACTIVATING, GenerationState.MIXED}
        waiting = {GenerationState.STAGED, GenerationState.MIXED}
        kept = {GenerationState.DRAINING, GenerationState.PARKED, GenerationState.MIXED}
        for generation in state.generations.values():
            self.way_of(generation)
            replacing = any(worker.replaces is not None for worker in generation.workers.values())
            for worker in generation.workers.values():
                match worker.state:
                    case WorkerState.READY if state.swap is not None and not state.swap.decided:
                        on = True
                    case WorkerState.READY if generation.state in waiting:
                        on = True
                    case WorkerState.BOOTING | WorkerState.READY:
                        on = worker.deadline is not None or generation.deadline is not None
                    case WorkerState.ACTIVE:
                        on = generation.state in serving
                    case WorkerState.PARKED:
                        on = generation.warm_until is not None or generation.id in self.coming()
                        on = on and generation.state in kept
                    case WorkerState.HUNG:
                        on = worker.deadline is not None or replacing or state.stopping is not None
                    case WorkerState.QUIET:
                        on = bool(generation.having(frozenset({WorkerState.QUIETING})))
                    case _:
                        on = worker.deadline is not None
                if not on:
                    self.fail(
                        f"worker {worker.id} of generation {generation.id} has no way on from {worker.state}"
                    )
        if state.change is not None and state.generations[state.change.generation].state not in {
            GenerationState.BOOTING,
            GenerationState.STAGED,
        }:
            self.fail("the reload has ended, and doesn't know")
        if state.queued and not state.changing and state.swap is None:
            self.fail("reloads are queued behind nothing")
        if state.scaling is not None and state.scaling.operation is not None:
            current = state.generations[state.scaling.generation]
            if not current.having(m.STARTING) and not current.respawn_at:
                going = frozenset({WorkerState.STOPPING, WorkerState.KILLED})
                if not current.having(going):
                    self.fail("the scaling waits for nothing")

    def probation(self) -> None:
        """Each ends once, and what it finds wrong is seen to at once; nobody is watched who was gone back to."""
        before, after = self.before.probation, self.after.probation
        ended = [each.generation for each in self.effects if isinstance(each, m.ProbationEnded)]
        same = before is not None and after is not None and before.generation == after.generation
        if ended != ([before.generation] if before is not None and not same else []):
            self.fail(f"the probations of {ended} have ended")
        if after is None:
            return
        if self.after.stopping is not None:
            self.fail("a probation during a stop")
        watched = {self.after.current, *self.coming()}
        if after.generation not in watched or after.generation == after.previous:
            self.fail("the wrong one is on probation")
        if after.breach and self.after.promote is None:
            self.fail("something was found wrong, and nothing is done about it")
        if self.world.went_back and after.generation == self.after.current:
            self.fail("what was gone back to is on probation")

    def way_of(self, generation: m.Generation) -> None:
        """What a generation waits for."""
        state, change = generation.state, self.after.change
        activating = generation.having(frozenset({WorkerState.ACTIVATING}))
        on = True
        match state:
            case GenerationState.BOOTING if generation.deadline is None:
                promote = self.after.promote
                waits = change is not None and change.phase is ChangePhase.WAIT
                on = promote is not None and (waits or promote.phase is PromotePhase.CLEAR)
            case GenerationState.BOOTING:
                on = generation.id in self.coming()
            case GenerationState.MIXED:
                on = self.is_rolling_on(generation)
            case GenerationState.STAGED if change is not None and change.generation == generation.id:
                on = self.after.promote is not None
            case GenerationState.ACTIVATING:
                on = bool(activating) and generation.id in self.coming()
            case GenerationState.PARKED:
                on = generation.kept_until is not None or generation.id in self.coming()
        if not on:
            self.fail(f"generation {generation.id} stays {state}")

    def is_rolling_on(self, generation: m.Generation) -> bool:
        """Whether a generation that serves beside another waits for something that comes."""
        promote, current = self.after.promote, self.after.generations.get(self.after.current or 0)
        if promote is None or promote.generation != generation.id or current is None:
            return False
        coming = generation.having(frozenset({WorkerState.BOOTING, WorkerState.ACTIVATING}))
        leaving = [w for w in current.workers.values() if w.state not in m.SERVING]
        return bool(coming or leaving) or promote.until is not None

    # Services

    def one_lead(self) -> None:
        """What only one process may have active never is in two; and the lifecycle knows of every one that has."""
        if len([process for process in self.world.live() if process.leads]) > 1:
            self.fail("two processes have active what only one may have")
        workers = {(g.id, w.id): w for g in self.after.generations.values() for w in g.workers.values()}
        if [worker.lead for worker in workers.values()].count(True) > 1:
            self.fail("two workers may lead")
        for process in self.world.live():
            worker = workers.get(process.key)
            if worker is not None and process.leads and not worker.lead:
                self.fail(f"{process.key} leads, and that isn't known")
            if worker is not None and process.services_active and worker.services is ServicesState.IDLE:
                self.fail(f"{process.key} has active services, and that isn't known")

    def services_cease(self) -> None:
        """In a generation that no longer serves, and that can be spoken with, services cease in time."""
        for process in self.world.live():
            number = process.key[0]
            if not process.services_active or number == self.after.current:
                continue
            since = self.world.superseded.get(number)
            if since is None:
                self.fail(f"{process.key} has active services, and its generation has never served")
            elif (
                number not in self.world.harmed
                and not (process.deaf or process.call)  # what it owes an answer to comes first
                and not self.world.faults
            ):
                late = self.world.now - since - HANDOVER_S
                if late > LATE_S:
                    self.fail(f"{process.key} still has active services {late:.1f} s too late")

    def versions(self) -> None:
        """Whoever serves has what was decided, or follows, or is to be replaced."""
        swap = self.after.swap
        if self.after.current is None:
            return
        for worker in self.after.generations[self.after.current].having(m.TAKING_PART):
            process = self.world.processes[self.after.current, worker.id]
            share = swap.shares.get(worker.id) if swap is not None else None
            commits = share is not None and share.awaits is Verb.SWAP_COMMIT
            if not process.alive or worker.replace_why or commits:
                continue
            for service, record in self.after.services.items():
                if process.versions.get(service, 1) != record.version:
                    self.fail(f"{process.key} has another version of {service} than {record.version}")
            if process.versions.keys() - self.after.services.keys():
                self.fail(f"{process.key} has what was never decided")

    def swaps_go_on(self) -> None:
        """A swap that runs waits for something, and so do those that are queued."""
        state, swap = self.after, self.after.swap
        if swap is not None and not swap.decided and (state.changing or state.scaling is not None):
            self.fail("a swap runs beside a reload or a change of the number of workers")
        if swap is not None:
            waits = any(share.awaits for share in swap.shares.values())
            activating = state.generations[swap.generation].having(frozenset({WorkerState.ACTIVATING}))
            if not swap.decided and not waits and not (swap.phase is SwapPhase.PREPARE and activating):
                self.fail("the swap waits for nothing")
            if swap.decided and swap.deadline is None:
                self.fail("the swap may wait for ever")
        if state.scale_queued is not None and not (swap or state.changing or state.scaling):
            self.fail("a change of the number of workers is queued behind nothing")
        if state.swaps_queued and not (
            swap or state.changing or state.scaling or state.swaps_told or state.queued
        ):
            assert state.current is not None
            current = state.generations[state.current]
            if not current.respawn_at and not current.having(m.STARTING):
                self.fail("swaps are queued behind nothing")

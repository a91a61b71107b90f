"""A world for the lifecycle: a shell, processes, an operator and a clock, all made up, and the "Never" list checked.

`World` lets things happen, asks `segue.supervisor.lifecycle.step` what follows from them, and has that carried out by
`simulated_shell` on workers that are `simulated_worker`s, with faults on demand. What the lifecycle tells anybody is
compared with what is (`truth`), and after every step the `invariants` are checked.

Time is a number. It jumps to whatever is next: something that happens in a worker, or `next_deadline`.
"""

from __future__ import annotations

import copy
import heapq
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import invariants
import truth
from reached import Reached, died, watch
from simulated_shell import Shell
from simulated_worker import HANDOVER_S, LATENCY_S, Key, Process

from segue.supervisor import lifecycle, swaps
from segue.supervisor import model as m
from segue.supervisor.model import GenerationState

LIMITS = m.Limits(ready_timeout=20.0, drain_timeout=60.0, stop_timeout=10.0, heartbeat_timeout=9.0)
LATE_S = 1.0
STEPS_AT_ONCE = 2000
"""More steps than this without any time passing are a busy loop."""
WEATHERS = (
    "spawns fail",
    "boots fail",
    "boots hang",
    "requests lost",
    "answers lost",
    "commands refused",
    "datagrams lost",
    "deaths seen late",
    "journal full",
    "slow disk",
    "stubborn",
)


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
        """What services do wrong, and in which workers: one of `simulated_worker.WHO`."""
        self.state = m.State()
        self.processes: dict[Key, Process] = {}
        self.living: dict[Key, Process] = {}
        self.shell = Shell(self)
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
        # what was told, and to whom
        self.answers: dict[int, m.Settle] = {}
        self.asked: dict[int, m.Event] = {}
        self.lost: set[int] = set()
        """Operations whose asker has lost the master before there was an answer."""
        self.log: list[m.Effect] = []
        self.said: Counter[str] = Counter()
        self.promoted: list[int] = []
        self.rolled_back: list[m.RolledBack] = []
        self.probations: list[m.ProbationEnded] = []
        self.drained: list[int] = []
        self.undrained: set[int] = set()
        """Generations that have taken over, and for which what was before is not done yet."""
        self.exit: int | None = None
        # what there was
        self.spawned: dict[Key, float] = {}
        self.ended: Counter[Key] = Counter()
        self.begun: set[int] = set()
        """Generations that have begun, and have not been released."""
        self.idle_since: dict[int, float] = {}
        """Generation → since when it isn't the current one."""
        self.superseded: dict[int, float] = {}
        """Generation → since when it is neither the current one nor being promoted."""
        self.harmed: set[int] = set()
        """Generations with a worker that crashed, hung or could not be spoken with."""
        self.went_back = False
        """Whether what serves now was gone back to, and that is known."""
        self.cleared = False
        """Whether a generation has ever made room for the next one."""
        self.served_at_stop: bool | None = None
        self.cut_at_stop = False
        # connections: waiting in the listeners, in the relay, and how many there were and were closed
        self.knocking = self.relay = self.opened = self.closed = 0
        # the master
        self.epoch = 1
        self.journals = False
        """Whether the masters of this world can die: each step is written down."""
        self.dies_after: int | None = None
        """The master dies in its next step, after so many of its effects."""
        self.guessed: set[Key] = set()
        """Workers that have not told the last new master what they are: they count as having all that they may have."""
        self.next_operation = 1
        # for a person
        self.trace: deque[str] | None = None
        """What the lifecycle saw and did last, if it is asked for."""
        self.reached: Reached | None = None
        """What there has been, if it is counted."""
        self.last_messages: deque[m.WorkerEvent] = deque(maxlen=30)
        self.queue: deque[m.Event] = deque()
        """What the lifecycle is yet to see."""
        self._frozen: list[m.Event] | None = None
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
        number = self.next_operation
        self.next_operation += 1
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

    # ------------------------------------------------------------------------------------------- the clients

    def respond(self, process: Process, count: int, errors: int = 0) -> None:
        """It answers requests, and tells of it."""
        process.responses += count
        process.errors += errors
        process.act(process.say_counts)
        self.settle()

    def connect(self, count: int, number: int = 0) -> None:
        """So many connections come, and are accepted by one of those that do; else they wait."""
        self.opened += count
        self.knocking += count
        self.read_relay(number)

    def read_relay(self, number: int = 0) -> None:
        """Whoever accepts takes what waits in the listeners, and what others have handed over."""
        if self.knocking or self.relay:
            readers = [process for process in self.live() if process.accepts and not process.hung]
            if readers:
                readers[number % len(readers)].connections += self.knocking + self.relay
                self.knocking = self.relay = 0

    def hand_over(self, process: Process, connections: int) -> None:
        """A worker lets go of so many: they wait in the relay until somebody takes them."""
        generation = process.key[0]
        ceased_s = self.now - self.superseded.get(generation, self.now)  # some may serve again, as a canary
        told_after = ceased_s > 1.5 * LATENCY_S  # before, it left alone, and its siblings were to stay
        if told_after and generation not in self.harmed and not process.orphaned:
            siblings = [each.key for each in self.of(generation) if each.accepts and not each.deaf]
            assert not siblings, f"{siblings} read back what {process.key} hands over; {self.describe()}"
        self.relay += connections
        self.read_relay()

    def lose(self, process: Process) -> None:
        """What it still has open is closed by its end."""
        lost, process.connections = process.connections, 0
        self.closed += lost
        harmed = process.key[0] in self.harmed or process.hung or process.orphaned
        assert not lost or harmed or self.state.stopping is not None, (
            f"{lost} connections are closed with {process.key}; {self.describe()}"
        )

    # -------------------------------------------------------------------------------------------- mishaps

    def live(self) -> list[Process]:
        """Processes in the order of their start."""
        return list(self.living.values())

    def of(self, generation: int) -> list[Process]:
        return [process for process in self.living.values() if process.key[0] == generation]

    def serving(self) -> list[Process]:
        """Processes of the current generation that accept."""
        return [
            process
            for process in self.living.values()
            if process.accepts and process.key[0] == self.state.current
        ]

    def harm(self, generation: int) -> None:
        """Nothing can be promised any more about this one."""
        self.harmed.add(generation)

    def crash(self, process: Process, status: int = -11) -> None:
        self.harm(process.key[0])
        process.die(status, "crashed")
        self.settle()

    def hang(self, process: Process) -> None:
        self.harm(process.key[0])
        process.hung = True

    def wake(self, process: Process) -> None:
        process.wake()
        self.read_relay()
        self.settle()

    def turn(self, weather: str, on: bool) -> None:
        """Trouble of the whole host begins or ends."""
        (self.weather.add if on else self.weather.discard)(weather)
        for generation in self.state.generations:
            self.harm(generation)

    def pause(self, seconds: float) -> None:
        """The master does not run; the workers do. Then it reads what was said, looks at the clock, and takes answers."""
        if self.exit is not None:
            return
        due = lifecycle.next_deadline(self.state)
        self._frozen = []
        self.shell.stand_still()
        self._pass(seconds)
        late, self._frozen = self._frozen, None
        self.queue.extend(late)
        if due is not None and due <= self.now:
            if self.now - due > LATE_S:
                self.queue.append(m.Paused(self.now - due))
            self.queue.append(m.TimePassed())
        self.shell.go_on()
        self.settle()

    def _pass(self, seconds: float) -> None:
        """Time goes by without a master, and nobody is late meanwhile."""
        end = self.now + seconds
        while self._happenings and self._happenings[0][0] <= end:
            self.now, _, happening = heapq.heappop(self._happenings)
            happening()
        self.now, self._steps_now = end, 0
        for times in (self.idle_since, self.superseded):
            for generation in times:
                times[generation] += seconds

    def kill_master(
        self, downtime: float = 0.0, upgrade: bool = False, undone: m.Effect | None = None
    ) -> None:
        """The master dies, before it does `undone`, or executes itself; after `downtime` seconds there is another one."""
        if self.exit is not None or not self.journals or self._frozen is not None:
            return
        self.dies_after = None
        self.epoch += 1
        self.queue.clear()
        for number in self.asked.keys() - self.answers.keys():
            self.lost.add(number)
            del self.asked[number]
        self.shell.die()
        self._frozen = []
        if not upgrade:
            for process in self.live():
                process.orphaned = self.epoch
                process.act(process.lose_master)
        self._pass(downtime)
        self._frozen = None
        if self.reached is not None:
            died(self.reached, self, undone)
        self._adopt()

    def upgrade(self) -> None:
        """The master executes itself, unless something is under way, as the real one."""
        state = self.state
        busy = state.stopping or state.changing or state.queued or state.swap or state.swaps_queued
        if not (busy or state.scaling or state.scale_queued or state.drain_change or state.current is None):
            self.kill_master(0.05, upgrade=True)

    def _adopt(self) -> None:
        before, adopted = self.state, self.shell.adopt()
        self.said["adopted"] += 1
        self.guessed |= {process.key for process in self.live() if process.accept_master() is None}
        self.state = adopted.state
        self.served_at_stop, self.cut_at_stop = None, False  # nobody has asked this one to stop
        self.begun, self.undrained = set(self.state.generations), set(self.state.drained_watch)
        self.went_back = self.went_back and not self.shell.is_behind
        if self.state.current is not None and self.state.current not in self.promoted:
            self.promoted.append(self.state.current)  # it alone accepts, so its promote is done
            self.went_back = False  # to what has never served
        self._forget(adopted.effects)
        self._note_who_serves()
        invariants.adopted(self, before, adopted.effects)
        self.shell.record()
        for effect in adopted.effects:
            self._execute(effect, self.state, adopted.effects)
        self.log += adopted.effects
        self.shell.record()
        if self.reached is not None:
            watch(self.reached, self, before, m.TimePassed(), adopted.effects)
        if self.state.current is None:
            self.reload()
        self.put(m.TimePassed())

    def _forget(self, effects: list[m.Effect]) -> None:
        """Numbers are given again if the journal was not written any more, and none of their workers lives."""
        generations, last = self.state.generations, self.state.next_generation
        spawned = {(each.generation, each.worker) for each in effects if isinstance(each, m.Spawn)}

        def is_free(key: Key) -> bool:
            known = generations.get(key[0])
            return (
                key in spawned
                or (known is None and key[0] >= last)
                or (known is not None and key[1] >= known.next_worker)
            )

        for keys in (self.spawned, self.processes, self.ended):
            for key in [key for key in keys if is_free(key)]:
                del keys[key]
        said = [each for each in self.last_messages if not is_free((each.generation, each.worker))]
        self.last_messages = deque(said, maxlen=self.last_messages.maxlen)
        self.promoted = [number for number in self.promoted if number < last]
        self.harmed = {number for number in self.harmed if number < last}
        for numbers in (self.idle_since, self.superseded, self.releases):
            for number in [number for number in numbers if number >= last]:
                del numbers[number]

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
            self.settle()

    def _upcoming(self) -> float | None:
        due = lifecycle.next_deadline(self.state)
        times = [due] if due is not None else []
        times += [self._happenings[0][0]] if self._happenings else []
        return max(self.now, min(times)) if times else None

    def at(self, delay: float, happening: Callable[[], None]) -> None:
        """Let it happen after so many seconds."""
        self._sequence += 1
        heapq.heappush(self._happenings, (self.now + delay, self._sequence, happening))

    # ------------------------------------------------------------------------------------------- the master

    def put(self, event: m.Event) -> None:
        """An event of the shell."""
        self.tell(event)
        self.settle()

    def tell(self, event: m.Event) -> None:
        """An event that comes out of a process: it is stepped when what happens there has happened."""
        (self.queue if self._frozen is None else self._frozen).append(event)

    def settle(self) -> None:
        """Let the lifecycle see what there is."""
        while self.queue and self.exit is None and self._frozen is None:
            self._step(self.queue.popleft())

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
        self._note_who_serves()
        if self.trace is not None:
            self.trace.append(f"{self.now:9.2f}  {event}")
            self.trace.extend(f"           -> {effect}" for effect in effects)
        if self.reached is not None:
            watch(self.reached, self, before, event, effects)
        self.shell.record()
        for number, effect in enumerate(effects):
            assert self.exit is None, f"{effect} after the exit"
            if self.journals and self.dies_after == number:
                self.kill_master(undone=effect)
                return
            self._execute(effect, before, effects)
        self.log += effects
        if effects:
            self.shell.record()
        if self.exit is None:
            invariants.Checks(self, before, event, effects).all()

    def _note_who_serves(self) -> None:
        state = self.state
        promote = state.promote
        self.cleared |= promote is not None and promote.phase is m.PromotePhase.CLEAR
        for number in state.generations:
            if number == state.current:
                self.idle_since.pop(number, None)
                self.superseded.pop(number, None)
                continue
            self.idle_since.setdefault(number, self.now)
            if promote is not None and promote.generation == number:
                self.superseded.pop(number, None)
            else:
                self.superseded.setdefault(number, self.now)

    def _execute(self, effect: m.Effect, before: m.State, effects: list[m.Effect]) -> None:
        match effect:
            case m.Prepare(generation):
                self.begun.add(generation)
                self.shell.prepare(generation)
            case m.Check(generation):
                self.shell.check_code(generation)
            case m.Spawn(generation, worker):
                key = (generation, worker)
                assert key not in self.spawned, f"{key} is spawned twice"
                assert not before.ending, f"{key} is spawned during a stop"
                self.spawned[key] = self.now
                self.shell.spawn(effect)
            case m.Command() | m.SwapCommand():
                self.shell.command(effect)
            case m.Kill():
                self.shell.kill(effect)
            case m.Progress(operations):
                for operation in operations:
                    assert operation in self.asked, f"operation {operation} was never asked for"
                    assert operation not in self.answers, f"operation {operation} goes on after its answer"
            case m.Settle(operation):
                assert operation in self.asked, f"operation {operation} was never asked for"
                assert operation not in self.answers, f"operation {operation} has two answers"
                self.answers[operation] = effect
                truth.settled(self, effect, effects)
            case m.Promoted(generation):
                truth.promoted(self, before, effect, effects)
                self.promoted.append(generation)
                self.undrained.add(generation)
                back = any(isinstance(each, m.RolledBack) for each in effects)
                breached = before.probation is not None
                assert not (breached and self.went_back and back), "to and fro by itself"
                self.went_back = back
            case m.RolledBack(_, to):
                assert self.promoted[-1] == to
                self.rolled_back.append(effect)
            case m.ProbationEnded():
                self.probations.append(effect)
            case m.AllDrained(generation):
                self.drained.append(generation)
                assert generation in self.undrained, f"{effect}, and nobody waits for that"
                self.undrained.discard(generation)
            case m.Released(generation):
                assert generation in self.begun, f"generation {generation} ends twice"
                self.begun.discard(generation)
            case m.Say(_, event):
                self.said[event] += 1
            case m.Exit(status):
                self.exit = status
                truth.exited(self, status)

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
        swap_s = swaps.SWAP_PREPARE_TIMEOUT_S + swaps.SWAP_ABORT_TIMEOUT_S
        self.rest(swap_s + 6 * (self.limits.drain_timeout + lifecycle.PREPARE_TIMEOUT_S))
        for generation in self.state.generations.values():
            if generation.state is GenerationState.STAGED:
                self.discard(generation.id)
        self.rest(self.limits.park_for + self.limits.probation + 60.0)

    def rest(self, most: float) -> None:
        """Let time pass until nothing is left to be done, `most` seconds if need be."""
        end = self.now + most
        while self.now < end and self.exit is None and not truth.is_calm(self):
            self.run(10.0)

    def check_settled(self) -> None:
        """With nothing wrong for long enough one generation is left, complete; everybody has been answered."""
        truth.calm(self)

    def end(self) -> None:
        """Stop it; everything ends and everybody is answered."""
        if self.exit is None and self.state.stopping is None:
            self.stop()
        limit = self.now + 200.0
        while self.exit is None:
            assert self._upcoming() is not None, f"it has stopped before its end; {self.describe()}"
            assert self.now < limit, f"it does not end; {self.describe()}"
            self.advance()

    def describe(self) -> str:
        """Everything, for a failure's message."""
        state = self.state
        lines = [
            f"at {self.now:.2f}: current={state.current} change={state.change} scaling={state.scaling}",
            f"  promote={state.promote} probation={state.probation}",
            f"  weather={self.weather} settings={self.settings} stopping={state.stopping}",
            f"  faults={self.faults} services={state.services} swaps={state.swap_count}",
            f"  swap={state.swap} queued={state.swaps_queued} told={state.swaps_told}",
        ]
        for generation in state.generations.values():
            lines.append(
                f"  generation {generation.id} {generation.state} target={generation.target} missing={generation.missing}"
                f" deadline={generation.deadline} respawn_at={generation.respawn_at}"
                f" warm_until={generation.warm_until} kept_until={generation.kept_until}"
            )
            lines += [f"    {worker}" for worker in generation.workers.values()]
        for process in self.live():
            calls = [str(call.command.verb) for call in process.calls]
            lines.append(
                f"  process {process.key} {process.mode} hung={process.hung} versions={process.versions}"
                f" services={process.services_active} leads={process.leads} calls={calls}"
                f" connections={process.connections}"
            )
        return "\n".join(lines)

"""The shell of the simulated master: it carries out what the lifecycle wants, as `segue.supervisor.master` does.

It guarantees exactly what the real one does. A command that isn't answered within its timeout comes back with an error.
The calls to one worker are made one after the other, those about its services in a row of their own, and each
`swap prepare` beside all others. A process that dies closes its sockets first: a call that breaks waits a moment for
that death, which goes before it. A respawn that is given up while its code is compared has ended. Each `Spawn` comes to
one end.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
from simulated_worker import KILLED, LATENCY_S, PREPARE_S, Call, Key, Process, Row

from segue.supervisor import adoption, memory
from segue.supervisor import model as m
from segue.supervisor.finding import Found, FoundWorker
from segue.supervisor.model import Verb
from segue.supervisor.totals import Written

if TYPE_CHECKING:
    from simulator import World

GATE_S = 0.05
SLOW_GATE_S = 8.0
DEATH_FOLLOWS_S = 0.5
"""How long after a broken call its process is given to be seen to have ended."""
SEEN_LATE_S = 0.7
SETTINGS = ("good", "broken", "late", "never read")
SWAP_VERBS = frozenset({Verb.SWAP_PREPARE, Verb.SWAP_COMMIT, Verb.SWAP_ABORT})
_ABOUT_SERVICES = frozenset({Verb.SERVICES_ACTIVATE, Verb.SERVICES_DEACTIVATE})
NO_ANSWER = "no answer in time"


class Shell:
    """Of one world; the next master has the same."""

    def __init__(self, world: World) -> None:
        self.written: dict[str, Any] = {}
        """The journal."""
        self.is_behind = False
        """Whether the last step could not be written down."""
        self._world = world
        self._comparing: dict[Key, m.Spawn] = {}
        """Respawns whose code is being compared; they have no process yet."""
        self._put_off: list[Callable[[], None]] | None = None
        """What it will do once it runs again; None: it runs."""
        self._writer = memory.Writer(memory.Instance("world", 1), clock=lambda: 0.0)

    def is_starting(self, key: Key) -> bool:
        """Whether the code of that respawn is being compared."""
        return key in self._comparing

    # -------------------------------------------------------------------------------------- what it is to do

    def prepare(self, generation: int) -> None:
        """Read the settings."""
        world = self._world
        if world.settings == "never read":
            return
        settings, release = world.settings, (world.code, world.behaviour, world.workers_setting)

        def done() -> None:
            if generation not in world.state.generations:
                return
            if settings == "broken":
                world.tell(m.PrepareFailed(generation, "no such file: segue.toml"))
                return
            world.releases[generation] = release
            current, workers = world.state.current, release[2]
            if current is not None and world.releases[current][2] == workers:
                workers = world.state.generations[current].target
            if world.weather:
                world.harm(generation)
            world.tell(m.Prepared(generation, workers, world.limits))

        self._later(50.0 if settings == "late" else 0.02, done)

    def check_code(self, generation: int) -> None:
        """A throw-away process imports it."""
        behaviour = self._world.releases[generation][1]
        if behaviour == "hangs":
            return
        error = "exited with 3 during import: ModuleNotFoundError" if behaviour == "exits" else ""
        done = m.Checked(generation, error, error and "Traceback")
        self._later(0.3, lambda: self._world.tell(done))

    def spawn(self, effect: m.Spawn) -> None:
        """Start a worker; gated, only if its code is still there."""
        if not effect.gated:
            self._spawn(effect)
            return
        key = (effect.generation, effect.worker)
        self._comparing[key] = effect
        self._later(self._gate_s, lambda: self._compared(key))

    @property
    def _gate_s(self) -> float:
        return SLOW_GATE_S if "slow disk" in self._world.weather else GATE_S

    def _compared(self, key: Key) -> None:
        effect = self._comparing.pop(key, None)
        if effect is None:
            return
        if self._is_same_code(key):
            self._spawn(effect)
        else:
            self._world.ended[key] += 1

    def _is_same_code(self, key: Key) -> bool:
        same = self._world.releases[key[0]][0] == self._world.code
        if not same:
            self._world.tell(m.CodeChanged(*key, "the code has changed"))
        return same

    def compare_again(self, process: Process) -> None:
        """The code may have changed while the respawn was importing it."""

        def ready() -> None:
            if self._is_same_code(process.key):
                self._world.tell(m.WorkerReady(*process.key, self._world.handover))

        self._later(self._gate_s, ready)

    def _spawn(self, effect: m.Spawn) -> None:
        world, key = self._world, (effect.generation, effect.worker)
        if "spawns fail" in world.weather:
            world.ended[key] += 1
            world.tell(m.WorkerExited(*key, "could not be started: no more processes"))
            return
        behaviour = world.releases[effect.generation][1]
        for weather, instead in {"boots fail": "exits", "boots hang": "hangs"}.items():
            if weather in world.weather:
                behaviour = instead
        versions = {name: record.version for name, record in effect.services.items()}
        process = Process(world, key, world.epoch, behaviour, effect.gated, effect.drain_mode, versions)
        world.processes[key] = world.living[key] = process
        process.boot()

    def kill(self, effect: m.Kill) -> None:
        """Ask a worker to end, or end it."""
        world, key = self._world, (effect.generation, effect.worker)
        process = world.processes.get(key)
        if self._comparing.pop(key, None) is not None:
            world.ended[key] += 1
            world.tell(m.WorkerExited(*key, "was no longer wanted before it was started"))
        elif process is None or not process.alive:
            return
        elif effect.now:
            if world.state.stopping is not None:
                world.harm(key[0])  # this may be seen by a next master, which nobody has asked to stop
            world.at(world.death_s, lambda: process.die(KILLED, "was killed"))
        elif "stubborn" not in world.weather:
            if process.turns:
                process.act(lambda: process.stop(world.limits.stop_timeout))
            else:
                world.at(0.1, lambda: process.die(-15, "was ended by SIGTERM"))

    # ------------------------------------------------------------------------------------------------- calls

    def command(self, command: m.Command | m.SwapCommand) -> None:
        """Call a worker, when it is the call's turn."""
        process = self._world.processes.get((command.generation, command.worker))
        if process is None or process.reaped:
            return
        call = Call(command, self._world.epoch)
        if isinstance(command, m.SwapCommand):
            self._check_swap_command(process, command)
        if command.verb is Verb.SWAP_PREPARE:
            process.beside.append(call)
            self._send(process, call)
            return
        row = process.about_services if command.verb in _ABOUT_SERVICES else process.commands
        row.waiting.append(call)
        self._next_call(process, row)

    def _check_swap_command(self, process: Process, command: m.SwapCommand) -> None:
        swaps = [call.command.verb for call in process.calls if call.command.verb in SWAP_VERBS]
        assert not swaps, f"{command.verb}, while {swaps} is not answered; {self._world.describe()}"
        if command.verb is not Verb.SWAP_PREPARE:
            assert not command.query
            assert not command.choices

    def _next_call(self, process: Process, row: Row) -> None:
        if row.call is None and row.waiting and self._put_off is None:
            row.call = row.waiting.popleft()
            self._send(process, row.call)

    def _send(self, process: Process, call: Call) -> None:
        world, command = self._world, call.command
        call.due = world.now + command.timeout
        if not process.alive:
            self._break(process, call, "no such socket")
            return
        world.at(command.timeout, lambda: self._break(process, call, NO_ANSWER))
        if "requests lost" in world.weather:
            return

        def arrive() -> None:
            if call.epoch < process.epoch:
                return  # another master has come meanwhile
            error = "not now" if "commands refused" in world.weather else process.obey(call)
            if error is not None and "answers lost" not in world.weather:
                self.take_answer(process, call, error)

        world.at(PREPARE_S if command.verb is Verb.SWAP_PREPARE else LATENCY_S, lambda: process.act(arrive))

    def take_answer(self, process: Process, call: Call, error: str) -> None:
        """A worker has answered."""
        if not call.broken and process.alive:
            self._conclude(process, call, error, own=True)

    def _break(self, process: Process, call: Call, why: str) -> None:
        """No answer will come; a death that explains it does, if it is seen soon."""
        if call.answered or call.broken:
            return
        call.broken = why
        if process.reaped:
            self._conclude(process, call, why, own=False)
        else:
            self._world.at(DEATH_FOLLOWS_S, lambda: self._conclude(process, call, why, own=False))

    def _conclude(self, process: Process, call: Call, error: str, own: bool) -> None:
        """The lifecycle hears of it, and the next call is made."""
        if call.answered or call.epoch != self._world.epoch:
            return
        if self._put_off is not None:
            self._put_off.append(lambda: self._conclude_late(process, call, error, own))
            return
        call.answered = True
        process.deaf = process.deaf or not own
        self._world.tell(call.event(error, own))
        if call in process.beside:
            process.beside.remove(call)
        for row in process.rows:
            if row.call is call:
                row.call = None
                self._next_call(process, row)

    def on_death(self, process: Process, event: m.WorkerExited) -> None:
        """Its sockets are closed; that it has ended is seen in the same moment, or a little later."""

        def seen() -> None:
            if process.reaped:
                return  # a new master has come, and has not found it
            process.reaped = True
            self._world.tell(event)
            for call in process.calls:
                if call.broken:
                    self._conclude(process, call, call.broken, own=False)

        for call in [*(row.call for row in process.rows if row.call is not None), *process.beside]:
            self._break(process, call, "connection closed")
        if "deaths seen late" in self._world.weather:
            self._later(SEEN_LATE_S, seen)
        else:
            seen()

    def _conclude_late(self, process: Process, call: Call, error: str, own: bool) -> None:
        """By the clock, which has gone on, its time may be over: then it is as good as lost."""
        late = call.due <= self._world.now
        if late:
            self._world.harm(process.key[0])
        self._conclude(process, call, NO_ANSWER if late else error, own and not late)

    def stand_still(self) -> None:
        """The master does not run."""
        self._put_off = []

    def go_on(self) -> None:
        """It runs again."""
        put_off, self._put_off = self._put_off or [], None
        for happening in put_off:
            happening()

    # ------------------------------------------------------------------------------------ its death, and the next

    def _later(self, delay: float, happening: Callable[[], None]) -> None:
        """What it does itself, and does not do any more once it is dead."""
        world, epoch = self._world, self._world.epoch

        def if_alive() -> None:
            if world.epoch != epoch:
                return
            if self._put_off is not None:
                self._put_off.append(happening)
            else:
                happening()

        world.at(delay, if_alive)

    def record(self) -> None:
        """Write down what the next master has to know."""
        world = self._world
        self.is_behind = "journal full" in world.weather
        if world.journals and not self.is_behind:
            pids = {process.key: (1, 1) for process in world.processes.values() if not process.reaped}
            args: Any = (world.state, {}, pids, {}, world.next_operation, Written(), {})
            self.written = self._writer.values(*args)

    def die(self) -> None:
        """What it was doing is not done any more."""
        world = self._world
        for key in self._comparing:
            world.ended[key] += 1
        self._comparing.clear()
        self._put_off = None
        for process in world.processes.values():
            process.commands, process.about_services = Row(), Row()
            process.beside.clear()
            process.reaped = process.reaped or not process.alive

    def adopt(self) -> adoption.Adopted:
        """Another one starts, and finds what there is."""
        world = self._world
        known = memory.recall({key: msgspec.json.encode(value) for key, value in self.written.items()})
        workers = [FoundWorker(p.key, _known_process(p), p.accept_master()) for p in world.live()]
        adopted = adoption.adopt(
            known, Found(workers), dict.fromkeys(world.releases, world.limits), world.now
        )
        for process in world.processes.values():
            process.reaped = process.reaped or not process.alive
        for process in world.live():
            process.orphaned, process.epoch = 0, world.epoch
            process.ready_seen = process.mode != "booting"
            process.gated = process.gated or process.mode == "booting"
        self._writer = memory.Writer(memory.Instance("world", world.epoch), clock=lambda: 0.0)
        return adopted


def _known_process(process: Process) -> Any:
    """What of a process adoption looks at: whether its output is still caught, since it boots."""
    return SimpleNamespace(output=object() if process.mode == "booting" else None)

"""A worker of the simulation: a process as it really is, whatever the lifecycle believes of it.

It boots, says how it is, does what it is told, and dies; how well it does that is up to its code, to the faults of its
services and to the weather. Its connections are counted: those that it hands over wait in the relay for whoever accepts,
and those that it still has when it ends are closed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from segue.handoff.adoption import Acceptance
from segue.handoff.messages import WorkerMode
from segue.supervisor import model as m
from segue.supervisor.model import Verb

if TYPE_CHECKING:
    from simulator import World

BOOT_S = 1.0
BOOT_SPREAD_S = 0.1
BEAT_S = 3.0
REPEAT_S = 1.0
REPEATS = 10
"""So often in a row what matters is said again; then with the heartbeats."""
LATENCY_S = 0.01
HANDOVER_S = 10.0
PREPARE_S = 0.5
"""How long a worker takes to make a new instance of a service."""
PREPARE_LIMIT_S = 300.0
"""After that a worker gives up by itself."""
SLOW_SERVICES_S = HANDOVER_S
KILLED = -9
NO_MASTER = 4
"""Exit status of one that has lost its master before it ever served."""

Key = tuple[int, int]
"""Generation and worker."""

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
    "slow services",
    "never deactivates",
)
"""What services do to their workers: `World.faults` says to which."""
WHO = ("all", "odd", "even")

_ANSWERS: dict[Verb, type[Any]] = {
    Verb.ACTIVATE: m.Activated,
    Verb.QUIET: m.Quieted,
    Verb.HAND_OVER: m.HandingOver,
    Verb.PARK: m.Parked,
    Verb.STOP: m.StopTaken,
    Verb.DRAIN: m.DrainTold,
    Verb.SERVICES_DEACTIVATE: m.ServicesDeactivated,
}
_IDLE = frozenset({"booting", "ready", "drained", "parked"})
"""Where a worker has nothing to finish."""
_OVER = frozenset({"draining", "drained", "parked"})
"""Where a worker has handed over already."""


@dataclass(eq=False)
class Call:
    """A command on its way to a worker."""

    command: m.Command | m.SwapCommand
    epoch: int
    """Of the master that makes it."""
    due: float = 0.0
    """When it must have been answered."""
    broken: str = ""
    """Why no answer will come."""
    answered: bool = False
    report: dict[str, Any] = field(default_factory=dict)

    def event(self, error: str, own: bool) -> m.WorkerEvent:
        """What the shell makes of its end; `own`: the worker has said so itself."""
        command, key = self.command, (self.command.generation, self.command.worker)
        if isinstance(command, m.Command):
            if command.verb is Verb.SERVICES_ACTIVATE:
                return m.ServicesActivated(*key, command.lead, error)
            answer: m.WorkerEvent = _ANSWERS[command.verb](*key, error)
            return answer
        report = {} if error else self.report
        if command.verb is Verb.SWAP_PREPARE:
            known = {"known": ["model"]} if own and error else {}
            return m.SwapPrepared(*key, command.swap, error, 404 if known else 409, known, report)
        if command.verb is Verb.SWAP_COMMIT:
            return m.SwapCommitted(*key, command.swap, error, report, rolled_back=own and bool(error))
        return m.SwapAborted(*key, command.swap, error)


@dataclass
class Row:
    """Calls to one worker that are made one after the other."""

    call: Call | None = None
    """The one that is made."""
    waiting: deque[Call] = field(default_factory=deque)


@dataclass(eq=False)
class Process:
    """One process."""

    world: World = field(repr=False)
    key: Key
    epoch: int
    """Of the master that it obeys."""
    behaviour: str
    gated: bool
    operator_drain: str | None
    versions: dict[str, int]
    """Service → the version that it has; those that were never swapped are not in it."""
    mode: str = "booting"
    turns: bool = False
    """Whether its loop turns yet: not before its import is over."""
    alive: bool = True
    reaped: bool = False
    """Its death has been seen."""
    hung: bool = False
    work_s: float = 0.5
    """How long what it has to finish takes."""
    connections: int = 0
    """How many it has open."""
    drains: int = 0
    """How often it has begun to drain."""
    beats: int = 0
    """How often it has said how it is."""
    repeated: int = 0
    responses: int = 0
    errors: int = 0
    """How many responses it has sent, and how many of them with 5xx."""
    unconfirmed: bool = False
    ready_seen: bool = False
    wants_recycling: bool = False
    may_be_cut: bool = False
    """It was told to stop while it had something to finish."""
    commands: Row = field(default_factory=Row)
    about_services: Row = field(default_factory=Row)
    beside: list[Call] = field(default_factory=list)
    """Calls that are made beside the others."""
    orphaned: int = 0
    """It has lost its master, in this epoch."""
    parked_until: float = 0.0
    deaf: bool = False
    """It has left a call without an answer, or was slow with its services."""
    prepared: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Swap → the service and the version that it has beside the old one."""
    services_active: bool = False
    services_busy_until: float = 0.0
    leads: bool = False
    """Whether the services that only one process may have active are active here."""
    backlog: list[Callable[[], None]] = field(default_factory=list)
    """What it does once its loop turns again."""

    @property
    def accepts(self) -> bool:
        return self.alive and self.mode == "active"

    @property
    def rows(self) -> tuple[Row, Row]:
        return self.commands, self.about_services

    @property
    def calls(self) -> list[Call]:
        """All that are not answered, those that are made first."""
        made = [row.call for row in self.rows if row.call is not None]
        return [*made, *self.beside, *(call for row in self.rows for call in row.waiting)]

    def act(self, action: Callable[[], None]) -> None:
        """Do it as soon as its loop turns."""
        if self.hung:
            self.backlog.append(action)
        elif self.alive:
            action()

    def wake(self) -> None:
        """Its loop turns again."""
        self.hung = False
        backlog, self.backlog = self.backlog, []
        for action in backlog:
            self.act(action)

    # ------------------------------------------------------------------------------------------ what it says

    def say(self, *events: m.WorkerEvent) -> None:
        """A datagram to the master."""
        if self.alive and "datagrams lost" not in self.world.weather:
            self.world.last_messages.extend(events)
            for event in events:
                self.world.tell(event)

    def say_counts(self) -> None:
        """What it has answered so far."""
        self.say(m.ResponsesCounted(*self.key, self.responses, self.errors))

    def beat(self) -> None:
        """How it is, again and again: more often while nothing shows that it was heard."""
        self.beats += 1
        beat = self.beats
        is_first = self.mode != "stopping" and not self.ready_seen
        if is_first and "datagrams lost" not in self.world.weather:
            self.ready_seen = True
            if self.gated:
                self.world.shell.compare_again(self)
            else:
                self.say(m.WorkerReady(*self.key, self.world.handover))
        said: list[m.WorkerEvent] = (
            [m.WorkerAsks(*self.key, "limit_max_requests")] if self.wants_recycling else []
        )
        if self.responses:
            said.append(m.ResponsesCounted(*self.key, self.responses, self.errors))
        drained = self.mode == "drained"
        self.say(*said, m.WorkerDrained(*self.key) if drained else m.WorkerBeat(*self.key))

        def again() -> None:
            if self.beats == beat:
                self.beat()

        repeats = self.unconfirmed and self.repeated < REPEATS
        self.repeated += repeats
        self.world.at(REPEAT_S if repeats else BEAT_S, lambda: self.act(again))

    def accept_master(self) -> Acceptance | None:
        """What it tells its new master; None if it can't be heard."""
        if self.hung or not self.turns:
            return None
        return Acceptance(
            version=1,
            pid=1,
            start_time=1,
            identity="world",
            generation=self.key[0],
            worker=self.key[1],
            mode=WorkerMode(self.mode),
            fingerprint="",
            handover_s=None if self.mode == "booting" else self.world.handover,
            services_active=self.services_active,
            lead=self.leads,
            versions={"model": 1, "limits": 1} | self.versions,
            operator_drain=self.operator_drain,
        )

    # --------------------------------------------------------------------------------------------- its life

    def boot(self) -> None:
        """Import, start up, be ready; as well as its code can."""
        slow = self.behaviour == "slow"
        boot_s = (6.0 if slow else BOOT_S) + BOOT_SPREAD_S * (self.key[1] % 4)
        at = self.world.at
        at(0.05, lambda: self.say(m.WorkerPhased(*self.key, "import")))
        if self.behaviour == "exits":
            reason = "exited with 3 during import: ModuleNotFoundError"
            at(0.3, lambda: self.die(3, reason, "Traceback"))
            return
        at(boot_s / 2, lambda: self.act(self._start_up))
        if self.behaviour != "hangs":
            at(boot_s, lambda: self.act(self._become_ready))
            if self.behaviour == "dies when ready":
                at(boot_s + LATENCY_S / 2, lambda: self.die(1, "exited with 1"))

    def _start_up(self) -> None:
        self.turns = True
        if self.orphaned:
            self.die(NO_MASTER, "has lost its master")
            return
        self.say(m.WorkerPhased(*self.key, "startup"))
        self._tick()

    def _tick(self) -> None:
        if self.mode == "booting":
            self.say(m.WorkerBeat(*self.key))
            self.world.at(REPEAT_S, lambda: self.act(self._tick))

    def _become_ready(self) -> None:
        if self.mode == "booting":
            self._set_mode("ready")

    def _set_mode(self, mode: str) -> None:
        if mode != self.mode:
            self.mode, self.repeated = mode, 0
            self.unconfirmed = mode in {"ready", "drained"}
            self.beat()

    def lose_master(self) -> None:
        """What it does without one."""
        if not self.turns:
            return  # it looks once it has imported its application
        match self.mode:
            case "booting" | "ready":
                self.die(NO_MASTER, "has lost its master")
            case "drained":
                self.stop(self.world.limits.stop_timeout)
            case "quiet":
                self._hand_over(self.world.limits.stop_timeout)
            case "parked":
                orphaned = self.orphaned
                left = max(0.0, self.parked_until - self.world.now)
                self.world.at(left, lambda: self.act(lambda: self._stop_if_still(orphaned)))

    def _stop_if_still(self, orphaned: int) -> None:
        if self.orphaned == orphaned and self.mode == "parked":
            self.stop(self.world.limits.stop_timeout)

    def _hand_over(self, budget: float) -> None:
        self._set_mode("draining")
        self.drains += 1
        drain = self.drains
        connections, self.connections = self.connections, 0
        self.world.hand_over(self, connections)
        self.world.at(min(self.work_s, budget), lambda: self.act(lambda: self._finish(drain)))

    def _finish(self, drain: int) -> None:
        if self.mode == "draining" and self.drains == drain:
            self._set_mode("drained")
            if self.orphaned:
                self.stop(self.world.limits.stop_timeout)

    def stop(self, budget: float) -> None:
        """Finish, and end."""
        if self.mode == "stopping":
            return
        work_s = 0.0 if self.mode in _IDLE else self.work_s
        self._set_mode("stopping")  # its services may go on until its end
        status = 0 if work_s <= budget else 1
        self.world.at(
            0.2 + min(work_s, budget), lambda: self.act(lambda: self.die(status, f"exited with {status}"))
        )

    def die(self, status: int, reason: str, output: str = "") -> None:
        """It is no more; that is seen later."""
        if not self.alive:
            return
        if self.mode == "active" and status != KILLED:
            self.world.harm(self.key[0])
        self.alive = self.services_active = self.leads = False
        del self.world.living[self.key]
        self.world.ended[self.key] += 1
        self.world.lose(self)
        if self.may_be_cut and status != 0 and self.world.state.ending:
            self.world.cut_at_stop = True
        self.world.shell.on_death(self, m.WorkerExited(*self.key, reason, output, status))

    # ------------------------------------------------------------------------------------ what it is told

    def has(self, fault: str) -> bool:
        """Whether its services do this wrong."""
        who = self.world.faults.get(fault)
        return who == "all" or who == ("odd" if self.key[1] % 2 else "even")

    def obey(self, call: Call) -> str | None:
        """Do it; the error, or "" when it is done, or None for no answer yet."""
        command = call.command
        self.unconfirmed = False
        anywhere = command.verb in {Verb.DRAIN, Verb.STOP, Verb.SERVICES_ACTIVATE, Verb.SERVICES_DEACTIVATE}
        if not anywhere and self.mode in {"booting", "stopping"}:
            return f"it is {self.mode}"
        if isinstance(command, m.SwapCommand):
            return self._swap(call, command)
        if command.verb in {Verb.SERVICES_ACTIVATE, Verb.SERVICES_DEACTIVATE}:
            return self._obey_about_services(call, command)
        return self._obey(command)

    def _obey(self, command: m.Command) -> str | None:
        match command.verb:
            case Verb.ACTIVATE:
                one = self.behaviour == "one refuses activation" and self.key[1] == 1
                if one or self.behaviour == "refuses activation":
                    return "no listener"
                if self.behaviour == "silent on activation":
                    self.deaf = True
                    return None
                self._set_mode("active")
                self.world.read_relay()
            case Verb.QUIET if self.mode not in _OVER:
                self._set_mode("quiet")
            case Verb.HAND_OVER:
                self._hand_over(command.budget)
            case Verb.PARK:
                if self.mode not in {"drained", "parked"}:
                    return f"it is {self.mode}"
                self.parked_until = self.world.now + command.budget
                self._set_mode("parked")
            case Verb.STOP:
                self.may_be_cut = self.mode not in _IDLE
                self.stop(command.budget)
            case Verb.DRAIN:
                self.operator_drain = command.mode
        return ""

    def _obey_about_services(self, call: Call, command: m.Command) -> str | None:
        """One thing after the other: what was begun for an earlier master goes on."""
        left = self.services_busy_until - self.world.now
        if left > 0:
            self.world.at(left, lambda: self.act(lambda: self._answer_about_services(call, command)))
            return None
        return self._change_services(call, command)

    def _answer_about_services(self, call: Call, command: m.Command) -> None:
        error = self._change_services(call, command)
        if error is not None:
            self.world.shell.take_answer(self, call, error)

    def _change_services(self, call: Call, command: m.Command) -> str | None:
        begins = command.verb is Verb.SERVICES_ACTIVATE
        if begins and self.has("refuses services"):
            return "no broker"
        if not begins and self.has("never deactivates"):
            self.deaf = True
            return None
        if begins:
            self.services_active = True  # from now on they may be
            self.leads = self.leads or command.lead
        if not self.has("slow services"):
            self._have_changed(begins)
            return ""
        self.deaf = True
        slow_s = min(SLOW_SERVICES_S, command.budget)
        self.services_busy_until = self.world.now + slow_s

        def done() -> None:
            self._have_changed(begins)
            self.world.shell.take_answer(self, call, "")

        self.world.at(slow_s, lambda: self.act(done))
        return None

    def _have_changed(self, active: bool) -> None:
        if not active:
            self.services_active = self.leads = False

    def _swap(self, call: Call, command: m.SwapCommand) -> str | None:
        phase = command.verb.value.removeprefix("swap ")
        if self.has(f"dies in {phase}"):
            self.world.harm(self.key[0])
            self.die(-11, "crashed")
            return None
        if self.has(f"refuses {phase}"):
            return f"no {phase}"
        match command.verb:
            case Verb.SWAP_PREPARE:
                if self.has("hangs in prepare"):
                    late = lambda: self.world.shell.take_answer(self, call, "took too long")  # noqa: E731
                    self.world.at(PREPARE_LIMIT_S, lambda: self.act(late))
                    return None
                self.prepared[command.swap] = command.service, command.version
                call.report = {
                    "choices": dict(command.choices) | command.query,
                    "digest": str(self.key) if self.has("differs") else "same",
                    "build_s": PREPARE_S,
                }
            case Verb.SWAP_COMMIT:
                service, version = self.prepared.pop(command.swap)
                self.versions[service] = version
                call.report = {"rewired": ["cache", f"router-{self.key[1]}"], "moved": True}
                if self.has("silent commit"):
                    self.deaf = True
                    return None
            case _:
                self.prepared.pop(command.swap, None)
        return ""

"""The nouns of the lifecycle: states, events, effects. Data only; `segue.supervisor.lifecycle` moves it.

An *event* is something that happened: a signal, a request, a message of a worker, a death, time passing. An *effect*
is something that the shell (`segue.supervisor.master`) shall do. Neither does anything by itself. All times are
seconds of one monotonic clock.
"""

from __future__ import annotations

import enum
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import msgspec

from segue.handoff.messages import ServiceRecord


class GenerationState(enum.StrEnum):
    """Where a generation is. `TRANSITIONS` says how it gets on."""

    BOOTING = "booting"
    STAGED = "staged"
    """All its workers are ready; it is being activated."""
    ACTIVE = "active"
    DRAINING = "draining"
    RETIRED = "retired"
    FAILED = "failed"


TRANSITIONS: dict[GenerationState, frozenset[GenerationState]] = {
    GenerationState.BOOTING: frozenset({GenerationState.STAGED, GenerationState.FAILED}),
    GenerationState.STAGED: frozenset({GenerationState.ACTIVE, GenerationState.FAILED}),
    GenerationState.ACTIVE: frozenset({GenerationState.DRAINING}),
    GenerationState.DRAINING: frozenset({GenerationState.RETIRED}),
    GenerationState.RETIRED: frozenset(),
    GenerationState.FAILED: frozenset({GenerationState.RETIRED}),
}
"""What may follow on what. A failed generation is retired once its last process has ended."""


class WorkerState(enum.StrEnum):
    """Where a worker is, as the master knows it from its messages and answers."""

    BOOTING = "booting"
    READY = "ready"
    ACTIVATING = "activating"
    ACTIVE = "active"
    HUNG = "hung"
    """Active, but its event loop is silent: it is replaced first and killed after."""
    QUIETING = "quieting"
    """Told to stop accepting and adopting (first phase of a handover)."""
    QUIET = "quiet"
    """Has confirmed that; waits until all that leave with it have."""
    DRAINING = "draining"
    STOPPING = "stopping"
    KILLED = "killed"
    """Sent SIGKILL; only its death is still to come."""


SERVING = frozenset({WorkerState.ACTIVE, WorkerState.HUNG})
STARTING = frozenset({WorkerState.BOOTING, WorkerState.READY, WorkerState.ACTIVATING})
TAKING_PART = SERVING | {WorkerState.ACTIVATING}
"""Who takes part in a swap of a service."""
LEAVING = frozenset({WorkerState.QUIETING, WorkerState.QUIET, WorkerState.DRAINING})


class ServicesState(enum.StrEnum):
    """Whether a worker's services may take work of their own. What isn't known for certain counts as *may*."""

    IDLE = "idle"
    """They do not, for certain."""
    ACTIVATING = "activating"
    """Told to; until it has confirmed they may or may not."""
    ACTIVE = "active"
    DEACTIVATING = "deactivating"
    """They are to cease, and may not have yet: told to, or the worker stops, or was killed and is not yet gone."""


@dataclass(slots=True)
class Worker:
    """One process of a generation."""

    id: int
    state: WorkerState
    deadline: float | None
    """When the state is left by force; None for those that may last."""
    heard: float
    """When it was last heard of."""
    phase: str = "boot"
    started: bool = False
    """Whether its process has been heard of: a gated one may not have been started yet."""
    replaces: int | None = None
    """The worker that leaves once this one is active."""
    replace_why: str = ""
    """Why it is to be replaced. Its deadline, if any, says when that is tried again."""
    drain_mode: str | None = None
    """The operator's drain that this worker was last told of."""
    drains_unanswered: int = 0
    """How often it was told of one and has yet to answer."""
    handover_refused: bool = False
    """It did not take its handover, and is told again when it shows that it is alive."""
    cause: str = ""
    """Why it leaves or was killed, for the log."""
    handover: float | None = None
    """Seconds that its services may take to hand over; None: it has none, or isn't ready yet."""
    services: ServicesState = ServicesState.IDLE
    lead: bool = False
    """It has, or may have, the services active that one worker alone may have: from the command on until it has
    confirmed that it gave them up, or has died."""
    services_retry: float | None = None
    """When it is told of its services again, since the last time failed."""
    services_due: float | None = None
    """When what it was told of its services must have been answered; None: no answer is on its way."""
    blocks_until: float | None = None
    """Until then others wait for its services to cease."""
    swaps_seen: int = 0
    """`State.swap_count` when it was spawned: it starts with what had been decided by then."""
    swap_due: float | None = None
    """When a swap's commit or abort must have been answered; None: no answer is on its way."""


class Limits(msgspec.Struct, frozen=True):
    """A generation's deadlines, from the settings that it was started with. Seconds."""

    ready_timeout: float = 60.0
    drain_timeout: float = 300.0
    stop_timeout: float = 30.0
    heartbeat_timeout: float = 30.0


@dataclass(slots=True)
class Generation:
    """N workers started from one snapshot of code and settings."""

    id: int
    state: GenerationState
    since: float
    target: int = 0
    """How many workers it shall have."""
    limits: Limits = field(default_factory=Limits)
    workers: dict[int, Worker] = field(default_factory=dict)
    next_worker: int = 1
    deadline: float | None = None
    respawn_at: list[float] = field(default_factory=list)
    """When the workers that died are started again."""
    streak: int = 0
    """Starts that failed one after the other; the first success resets it."""
    missing: int = 0
    """Workers that aren't started again because the code on disk is no longer this generation's."""
    reason: str = ""
    """Why it failed."""

    def clone(self) -> Generation:
        """A copy that shares nothing that changes."""
        other = copy(self)
        other.workers = {key: copy(worker) for key, worker in self.workers.items()}
        other.respawn_at = list(self.respawn_at)
        return other

    def having(self, states: frozenset[WorkerState]) -> list[Worker]:
        """Its workers in one of `states`, in the order of their start."""
        return [worker for worker in self.workers.values() if worker.state in states]

    @property
    def wanted(self) -> int:
        """How many workers it is to run now: `target` less those held back."""
        return self.target - self.missing


@dataclass(slots=True)
class Change:
    """A reload (or the first start) under way, and who waits for it."""

    generation: int
    operations: tuple[int, ...]
    first: bool = False


@dataclass(slots=True)
class Scaling:
    """A change of the number of workers, and what to go back to."""

    operation: int | None
    generation: int
    before: int
    missing: int


@dataclass(slots=True)
class Stopping:
    """The stop of the whole instance."""

    operations: tuple[int, ...]
    begun: bool
    """False while ``stop_delay`` lasts."""
    deadline: float | None
    status: int
    """What the master will exit with."""


@dataclass(slots=True)
class DrainChange:
    """An operator's drain being told to the workers that have yet to confirm it."""

    operation: int
    pending: set[tuple[int, int]]


class SwapPhase(enum.StrEnum):
    """How far a swap is."""

    PREPARE = "prepare"
    """Every worker makes its new instance beside the old one."""
    COMMIT = "commit"
    """All have, and one worker tries it. Until it has confirmed nothing is decided."""
    FOLLOW = "follow"
    """Decided and recorded; the others follow."""
    UNDO = "undo"
    """Refused, and told; workers take back what they have prepared."""


@dataclass(slots=True)
class Share:
    """One worker's share in a swap."""

    awaits: Verb | None
    """The command whose answer is on its way."""
    prepared: dict[str, Any] | None = field(default=None, repr=False)
    """Its report, once it has prepared."""
    committed: dict[str, Any] | None = field(default=None, repr=False)
    """Its report, once it has committed."""


@dataclass(slots=True)
class Swap:
    """The replacement of one service in every worker of the current generation, all or nothing."""

    operation: int
    """Who waits for it; also its number in what workers are told."""
    service: str
    generation: int
    version: int
    """That of the new instance."""
    shares: dict[int, Share]
    """Worker → its share."""
    phase: SwapPhase = SwapPhase.PREPARE
    deadline: float | None = None
    """When those that have not followed are reported."""

    def clone(self) -> Swap:
        """A copy that shares nothing that changes."""
        other = copy(self)
        other.shares = {key: copy(share) for key, share in self.shares.items()}
        return other

    @property
    def decided(self) -> bool:
        """Whether it is recorded: from then on nothing undoes it."""
        return self.phase is SwapPhase.FOLLOW


@dataclass(slots=True)
class State:
    """Everything that the lifecycle knows."""

    generations: dict[int, Generation] = field(default_factory=dict)
    current: int | None = None
    next_generation: int = 1
    change: Change | None = None
    queued: tuple[int, ...] = ()
    """Operations that asked for a reload while one ran: the next one answers them all."""
    scaling: Scaling | None = None
    scale_delta: int = 0
    """TTIN and TTOU that came while a reload ran, or another change of the number of workers."""
    stopping: Stopping | None = None
    drain_mode: str | None = None
    drain_change: DrainChange | None = None
    drained_watch: dict[int, frozenset[int]] = field(default_factory=dict)
    """Generation promoted → the old ones that have yet to end before its reload counts as drained."""
    recover_at: float | None = None
    """When a reload is tried because nothing serves and the old code is gone."""
    recover_streak: int = 0
    services: dict[str, ServiceRecord] = field(default_factory=dict)
    """What was decided about services; it outlives generations. A service that was never swapped isn't in it."""
    swap: Swap | None = None
    """The one that runs: one at a time in the whole instance."""
    swaps_queued: tuple[SwapAsked, ...] = ()
    swaps_told: list[Swap] = field(default_factory=list)
    """Those that were answered, while workers owe the last answers of theirs."""
    swap_count: int = 0
    """Swaps committed so far."""
    scale_queued: ScaleAsked | None = None
    """A change of the number of workers that was asked for while a swap ran."""

    def clone(self) -> State:
        """A copy that shares nothing that changes."""
        other = copy(self)
        other.generations = {key: generation.clone() for key, generation in self.generations.items()}
        other.change = copy(self.change)
        other.scaling = copy(self.scaling)
        other.stopping = copy(self.stopping)
        other.drained_watch = dict(self.drained_watch)
        other.services = dict(self.services)
        other.swap = self.swap.clone() if self.swap is not None else None
        other.swaps_told = [swap.clone() for swap in self.swaps_told]
        if self.drain_change is not None:
            other.drain_change = DrainChange(self.drain_change.operation, set(self.drain_change.pending))
        return other

    @property
    def serving(self) -> bool:
        """Whether a worker of the current generation accepts."""
        return self.current is not None and bool(self.generations[self.current].having(SERVING))

    @property
    def ending(self) -> bool:
        """Whether a stop has begun: nothing is started any more."""
        return self.stopping is not None and self.stopping.begun

    @property
    def ready(self) -> bool:
        """What ``/readyz`` says."""
        return self.serving and self.drain_mode is None and self.stopping is None


# ---------------------------------------------------------------------------------------------------------- events


class ReloadAsked(msgspec.Struct, frozen=True):
    """Somebody asks for a new generation (also the first one, at start)."""

    operation: int


class ScaleAsked(msgspec.Struct, frozen=True):
    """Somebody asks for `count` workers, or for `delta` more."""

    operation: int | None
    count: int | None = None
    delta: int = 0


class DrainAsked(msgspec.Struct, frozen=True):
    """The operator's drain: a mode, or None to end it."""

    operation: int
    mode: str | None


class SwapAsked(msgspec.Struct, frozen=True):
    """Somebody asks for another instance of a service, in every worker of the current generation."""

    operation: int
    service: str
    query: dict[str, str]
    """What the new instance shall be like. May be secret: never to be logged or shown."""


class StopAsked(msgspec.Struct, frozen=True):
    """Stop the instance: gracefully, or now."""

    operation: int | None
    at_once: bool = False
    delay: float = 0.0
    budget: float = 30.0
    """Seconds that a graceful stop may take."""


class Prepared(msgspec.Struct, frozen=True):
    """Settings, directories and listeners of a new generation are there: it can be spawned."""

    generation: int
    workers: int
    limits: Limits


class PrepareFailed(msgspec.Struct, frozen=True):
    """They aren't."""

    generation: int
    reason: str


class TimePassed(msgspec.Struct, frozen=True):
    """A deadline may be due."""


class Paused(msgspec.Struct, frozen=True):
    """The master itself did not run for `seconds`: nobody else is to blame for silence."""

    seconds: float


class WorkerEvent(msgspec.Struct, frozen=True):
    """Something about one worker."""

    generation: int
    worker: int


class WorkerPhased(WorkerEvent, frozen=True):
    """It has come to another phase of its start."""

    phase: str


class WorkerReady(WorkerEvent, frozen=True):
    """Started and warmed up."""

    handover: float | None = None
    """Seconds that its services may take to hand over, the largest of them; None: it has no services."""


class WorkerBeat(WorkerEvent, frozen=True):
    """Its event loop is alive."""


class WorkerDrained(WorkerEvent, frozen=True):
    """It has no connection and no task left."""


class WorkerAsks(WorkerEvent, frozen=True):
    """It asks to be replaced."""

    why: str


class WorkerExited(WorkerEvent, frozen=True):
    """Its process has ended, or could not be started at all."""

    reason: str
    output: str = ""
    status: int | None = None
    """Exit status; negative for a signal; None if there was no process, or nobody can tell."""


class CodeChanged(WorkerEvent, frozen=True):
    """The code on disk is no longer that of its generation."""

    what: str


class Activated(WorkerEvent, frozen=True):
    """The answer to `activate`; `error` is empty when it was done."""

    error: str = ""


class Quieted(WorkerEvent, frozen=True):
    """The answer to `quiet`."""

    error: str = ""


class HandingOver(WorkerEvent, frozen=True):
    """The answer to `hand over`."""

    error: str = ""


class StopTaken(WorkerEvent, frozen=True):
    """The answer to `stop`."""

    error: str = ""


class DrainTold(WorkerEvent, frozen=True):
    """The answer to the operator's drain."""

    error: str = ""


class SwapPrepared(WorkerEvent, frozen=True):
    """The answer to `swap prepare`; `error` is empty when the new instance is there, beside the old one."""

    swap: int
    error: str = ""
    code: int = 409
    """HTTP status that the error would have."""
    details: dict[str, Any] = {}
    report: dict[str, Any] = {}
    """`choices` and `digest` must be the same in all workers; the rest is shown to whoever asked."""


class SwapCommitted(WorkerEvent, frozen=True):
    """The answer to `swap commit`; `error` is empty when the new instance has taken over."""

    swap: int
    error: str = ""
    report: dict[str, Any] = {}
    """`rewired`: the names of the dependents that were given the new instance; the rest is shown to whoever asked."""
    rolled_back: bool = False
    """With `error`: the worker has said itself that its old instance is in place. A call that broke, or was not
    answered, leaves it False: nobody knows which instance that worker has, and it is replaced."""


class SwapAborted(WorkerEvent, frozen=True):
    """The answer to `swap abort`, which succeeds also where nothing was prepared."""

    swap: int
    error: str = ""


class ServicesActivated(WorkerEvent, frozen=True):
    """The answer to `services activate`."""

    lead: bool
    """As in the command."""
    error: str = ""


class ServicesDeactivated(WorkerEvent, frozen=True):
    """The answer to `services deactivate`; `error` is empty only when none of its services takes work any more."""

    error: str = ""


Event = (
    ReloadAsked
    | ScaleAsked
    | SwapAsked
    | DrainAsked
    | StopAsked
    | Prepared
    | PrepareFailed
    | TimePassed
    | Paused
    | WorkerEvent
)


# --------------------------------------------------------------------------------------------------------- effects


class Prepare(msgspec.Struct, frozen=True):
    """Read settings and directories anew for this generation; answer `Prepared` or `PrepareFailed`."""

    generation: int


class Spawn(msgspec.Struct, frozen=True):
    """Start a worker. `gated`: only if the code is still the generation's, else answer `CodeChanged`."""

    generation: int
    worker: int
    gated: bool
    drain_mode: str | None
    services: dict[str, ServiceRecord]
    """What was decided about services by now; of one that isn't in it, the worker starts what the code says."""


class Verb(enum.StrEnum):
    """What the master tells a worker."""

    ACTIVATE = "activate"
    QUIET = "quiet"
    HAND_OVER = "hand over"
    STOP = "stop"
    DRAIN = "drain"
    SERVICES_ACTIVATE = "services activate"
    """Idempotent: what is active stays as it is."""
    SERVICES_DEACTIVATE = "services deactivate"
    SWAP_PREPARE = "swap prepare"
    SWAP_COMMIT = "swap commit"
    SWAP_ABORT = "swap abort"


class Command(msgspec.Struct, frozen=True):
    """Call a worker; its answer, or the lack of one within `timeout`, comes back as exactly one event.

    The calls to one worker are made one after the other, in the order of these effects; `timeout` counts from when
    it is a call's turn. Those about services are made in a row of their own, and each `swap prepare` (of
    `SwapCommand`) beside all others.
    """

    generation: int
    worker: int
    verb: Verb
    timeout: float
    budget: float = 0.0
    """For `hand over`, `stop` and both of `services`: how many seconds the worker may take to finish."""
    mode: str | None = None
    """For `drain`."""
    lead: bool = False
    """For `services activate`: also those that only one worker may have active."""


class SwapCommand(msgspec.Struct, frozen=True):
    """Call a worker about a swap; exactly one `SwapPrepared`, `SwapCommitted` or `SwapAborted` comes back.

    `swap commit` and `swap abort` take their turn among the other calls to that worker. `swap prepare` may take
    minutes and must not hold them up: it is made beside them. A worker is told to commit or to abort only after its
    prepare has been answered, and to prepare another swap only when nothing of the last is left to be answered.
    """

    generation: int
    worker: int
    verb: Verb
    """One of the three of a swap."""
    swap: int
    service: str
    query: dict[str, str]
    """For `swap prepare`; else empty."""
    version: int
    """That of the new instance."""
    choices: dict[str, str]
    """For `swap prepare`: those of the instance that is to be replaced; else empty."""
    timeout: float


class Kill(msgspec.Struct, frozen=True):
    """Signal a worker: SIGTERM, or with `now` SIGKILL to it and its children. A gated one may have no process yet."""

    generation: int
    worker: int
    now: bool


class Progress(msgspec.Struct, frozen=True):
    """An operation has come to another phase."""

    operations: tuple[int, ...]
    phase: str


class Settle(msgspec.Struct, frozen=True):
    """The one answer to an operation."""

    operation: int
    ok: bool
    reason: str = ""
    output: str = ""
    generation: int | None = None
    code: int = 409
    """HTTP status of a refusal."""
    details: dict[str, Any] = {}
    """What else there is to say about a refusal, for machines."""
    result: dict[str, Any] | None = None
    """What came of it: of a swap, what its workers report."""


class Promoted(msgspec.Struct, frozen=True):
    """Generation `generation` serves now, `previous` drains."""

    generation: int
    previous: int | None


class AllDrained(msgspec.Struct, frozen=True):
    """Everything that `generation` took over from has ended."""

    generation: int


class Released(msgspec.Struct, frozen=True):
    """A generation has ended: give back what it held."""

    generation: int
    failed: bool


class Say(msgspec.Struct, frozen=True):
    """One line of the log."""

    level: str
    event: str
    fields: dict[str, str | int | float] = {}


class Exit(msgspec.Struct, frozen=True):
    """The master ends."""

    status: int


Effect = (
    Prepare
    | Spawn
    | Command
    | SwapCommand
    | Kill
    | Progress
    | Settle
    | Promoted
    | AllDrained
    | Released
    | Say
    | Exit
)

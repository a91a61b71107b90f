"""The lifecycle's nouns: generations, workers, and what is under way. Data only; `segue.supervisor.model` has them all."""

from __future__ import annotations

import enum
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from segue.handoff.messages import ServiceRecord

if TYPE_CHECKING:
    from segue.supervisor.effects import Verb
    from segue.supervisor.events import ReloadAsked, ScaleAsked, SwapAsked


class GenerationState(enum.StrEnum):
    """Where a generation is. `TRANSITIONS` says how it gets on."""

    BOOTING = "booting"
    STAGED = "staged"
    """All its workers are ready and none serves; that may last."""
    ACTIVATING = "activating"
    """All its workers are told to serve, beside the generation that it takes over from."""
    MIXED = "mixed"
    """Some of its workers serve beside the current generation on purpose: a canary, or one worker at a time."""
    ACTIVE = "active"
    DRAINING = "draining"
    PARKED = "parked"
    """It serves nobody and could serve again at once. If it has no workers, they have to be started first."""
    RETIRED = "retired"
    """It can be had no more: its last processes end."""
    FAILED = "failed"


TRANSITIONS: dict[GenerationState, frozenset[GenerationState]] = {
    GenerationState.BOOTING: frozenset(
        {GenerationState.STAGED, GenerationState.MIXED, GenerationState.FAILED}
    ),
    GenerationState.STAGED: frozenset(
        {
            GenerationState.ACTIVATING,
            GenerationState.MIXED,
            GenerationState.RETIRED,
            GenerationState.FAILED,
        }
    ),
    GenerationState.ACTIVATING: frozenset(
        {GenerationState.ACTIVE, GenerationState.DRAINING, GenerationState.FAILED}
    ),
    GenerationState.MIXED: frozenset(
        {GenerationState.ACTIVATING, GenerationState.ACTIVE, GenerationState.FAILED}
    ),
    GenerationState.ACTIVE: frozenset({GenerationState.DRAINING}),
    GenerationState.DRAINING: frozenset(
        {
            GenerationState.PARKED,
            GenerationState.ACTIVATING,
            GenerationState.MIXED,
            GenerationState.RETIRED,
        }
    ),
    GenerationState.PARKED: frozenset(
        {GenerationState.ACTIVATING, GenerationState.MIXED, GenerationState.RETIRED}
    ),
    GenerationState.RETIRED: frozenset(),
    GenerationState.FAILED: frozenset({GenerationState.RETIRED}),
}
"""What may follow on what. A failed generation is retired once its last process has ended; only the current one, if it
does not come back after a try to replace it, isn't: it stays the current one until another is."""


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
    PARKED = "parked"
    """Has nothing left to do and stays, to be activated again."""
    STOPPING = "stopping"
    KILLED = "killed"
    """Sent SIGKILL; only its death is still to come."""


SERVING = frozenset({WorkerState.ACTIVE, WorkerState.HUNG})
STARTING = frozenset({WorkerState.BOOTING, WorkerState.READY, WorkerState.ACTIVATING})
TAKING_PART = SERVING | {WorkerState.ACTIVATING}
"""Who takes part in a swap of a service."""
LEAVING = frozenset({WorkerState.QUIETING, WorkerState.QUIET, WorkerState.DRAINING})


RETURNING = LEAVING | {WorkerState.PARKED}
"""Who has served, and can be activated again."""


class Strategy(enum.StrEnum):
    """How one generation takes over from another."""

    SURGE = "surge"
    """All its workers are started beside the old ones, then it takes over."""
    ROLLING = "rolling"
    """One worker at a time, for hosts that can't hold twice the workers."""
    REPLACE = "replace"
    """The old ones end before the new ones are started, for what can't run twice. Nothing serves meanwhile."""


class ServicesState(enum.StrEnum):
    """Whether a worker's services may take work of their own. What isn't known for certain counts as *may*."""

    IDLE = "idle"
    """They do not, for certain."""
    ACTIVATING = "activating"
    """Told to; until it has confirmed they may or may not."""
    ACTIVE = "active"
    DEACTIVATING = "deactivating"
    """They are to cease, and may not have yet: told to, or the worker stops, or was killed and is not yet gone."""


class Worker(msgspec.Struct):
    """One process of a generation."""

    id: int
    state: WorkerState
    deadline: float | None
    """When the state is left by force; None for those that may last."""
    heard: float
    """When it was last heard of."""
    doubted: float | None = None
    """So long it is waited for once more after it has been silent for too long: a message may have been lost."""
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
    quiets_unanswered: int = 0
    """How often it was told to be quiet and has yet to answer."""
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
    blocks_until: float | None = None
    """Until then others wait for its services to cease."""
    swaps_seen: int = 0
    """`State.swap_count` when it was spawned: it starts with what had been decided by then."""
    swap_due: float | None = None
    """When a swap's commit or abort must have been answered; None: no answer is on its way."""
    responses: int = 0
    errors: int = 0
    """How many responses it has said that it has sent, and how many of them were its own 5xx."""


class Limits(msgspec.Struct, frozen=True):
    """What the settings that a generation was started with say about its life. Seconds."""

    ready_timeout: float = 60.0
    drain_timeout: float = 300.0
    stop_timeout: float = 30.0
    heartbeat_timeout: float = 30.0
    park_for: float = 0.0
    """From its promote: how long the generation that it took over from stays warm."""
    probation: float = 0.0
    """From its promote: how long it is watched; 0: not at all."""
    probation_5xx: float = 0.2
    """Which share of 5xx, beyond that of the generation before, ends a probation or a canary."""
    strategy: Strategy = Strategy.SURGE
    replace_timeout: float = 10.0
    """With `Strategy.REPLACE`, how long the old generation may take to finish."""
    canary: int = 0
    """How many workers serve beside the old generation first; 0: none."""
    canary_for: float = 0.0
    """For how long."""


@dataclass(slots=True)
class Traffic:
    """What a generation has answered, so far and at two marks, of which the older one is the start of what is compared."""

    responses: int = 0
    errors: int = 0
    """Of them the application's own 5xx."""
    marks: tuple[tuple[float, int, int], ...] = ()
    """When, and how much by then; at most two."""


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
    warm_until: float | None = None
    """So long its drained workers stay; None: they end."""
    kept_until: float | None = None
    """So long it can be promoted again, if need be with workers that are started anew; None: it can't."""
    served_until: float = 0.0
    """When it ceased to be the current one."""
    scaled_at: float = 0.0
    """When its number of workers was last changed by hand."""
    ceded: int = 0
    """Places left to the other generation while one worker after the other is replaced."""
    drain_budget: float | None = None
    """Seconds that its workers have to finish, if they aren't `Limits.drain_timeout`."""
    traffic: Traffic = field(default_factory=Traffic)

    def clone(self) -> Generation:
        """A copy that shares nothing that changes."""
        other = copy(self)
        other.workers = {key: copy(worker) for key, worker in self.workers.items()}
        other.respawn_at = list(self.respawn_at)
        other.traffic = copy(self.traffic)
        return other

    def having(self, states: frozenset[WorkerState]) -> list[Worker]:
        """Its workers in one of `states`, in the order of their start."""
        return [worker for worker in self.workers.values() if worker.state in states]

    @property
    def is_leaving(self) -> bool:
        """Whether it drains and isn't kept any longer than that takes."""
        return self.state is GenerationState.DRAINING and self.kept_until is None

    @property
    def wanted(self) -> int:
        """How many workers it is to run now: `target` less those held back."""
        return self.target - self.missing - self.ceded


class ChangePhase(enum.StrEnum):
    """How far a change is."""

    PREPARE = "prepare"
    """Its settings are being read."""
    CHECK = "check"
    """It is being tried whether its code can be imported, before the old workers end (`Strategy.REPLACE`)."""
    BOOT = "boot"
    WAIT = "wait"
    """It can be promoted and waits until another promote is over."""


@dataclass(slots=True)
class Change:
    """A generation being brought up, to be staged or to be promoted as soon as it is ready; and who waits for it."""

    generation: int
    operations: tuple[int, ...]
    first: bool = False
    stage: bool = False
    """It is to be staged only."""
    strategy: Strategy | None = None
    """As asked for; None: as its settings say."""
    canary: int | None = None
    canary_for: float | None = None
    phase: ChangePhase = ChangePhase.PREPARE


class Outcome(enum.StrEnum):
    """How a probation ended."""

    PASSED = "passed"
    ROLLED_BACK = "rolled back"
    KEPT = "kept"
    """It failed, and serves on: there was nothing to go back to."""
    SUPERSEDED = "superseded"
    """Another generation took over before it was over, since somebody asked for that."""
    STOPPED = "stopped"


@dataclass(slots=True)
class Probation:
    """The watch over the current generation after its promote, or over a canary before it."""

    generation: int
    previous: int
    """To which segue goes back."""
    until: float
    since: tuple[int, int]
    """What `generation` had answered when it began: responses, and 5xx among them."""
    before: tuple[int, int]
    """The same of `previous`, at the begin of what is compared."""
    share_before: float = 0.0
    """Of 5xx in what `previous` has answered since then."""
    breach: str = ""
    """What was found wrong; it is gone back as soon as no other promote stands in the way."""


class PromoteKind(enum.StrEnum):
    """What a promote is part of."""

    RELOAD = "reload"
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    """Back to one that has served before: it isn't put on probation."""


class PromotePhase(enum.StrEnum):
    """How far a promote is."""

    CLEAR = "clear"
    """The old generation ends first (`Strategy.REPLACE`)."""
    MUSTER = "muster"
    """Workers that it lacks are being started."""
    CANARY = "canary"
    """Some of its workers serve beside the current generation, and are watched."""
    ROLLING = "rolling"
    """One worker at a time takes the place of an old one."""
    ACTIVATE = "activate"
    """All its workers are told to serve; when all have confirmed, it is the current generation."""


@dataclass(slots=True)
class Promote:
    """A generation being made the current one, and who waits for it. One at a time."""

    generation: int
    previous: int | None
    """The current one, which it takes over from."""
    kind: PromoteKind
    phase: PromotePhase
    strategy: Strategy
    asof: float
    """Since when `generation` can't have been told of changes of the number of workers."""
    operations: tuple[int, ...] = ()
    first: bool = False
    because: str = ""
    """Why segue itself goes back; empty: somebody asked."""
    watch: Probation | None = None
    """Over those of its workers that serve before all do."""
    until: float | None = None
    """So long the promote waits, while a canary serves."""
    waited: bool = False

    @property
    def is_mixed(self) -> bool:
        """Whether two generations serve on purpose."""
        return self.phase in {PromotePhase.CANARY, PromotePhase.ROLLING}

    @property
    def is_watched(self) -> bool:
        """Whether what is promoted is on probation afterwards: it is new, and there is something to go back to."""
        return self.kind is not PromoteKind.ROLLBACK and self.previous is not None


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
    promote: Promote | None = None
    probation: Probation | None = None
    queued: tuple[ReloadAsked, ...] = ()
    """Those who asked for a reload while one ran: the next one answers them all."""
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
    developing: bool = False
    """Development mode: a first generation that does not start is followed by the next save's, not by the end."""

    def clone(self) -> State:
        """A copy that shares nothing that changes."""
        other = copy(self)
        other.generations = {key: generation.clone() for key, generation in self.generations.items()}
        other.change = copy(self.change)
        other.promote = copy(self.promote)
        if other.promote is not None:
            other.promote.watch = copy(other.promote.watch)
        other.probation = copy(self.probation)
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
    def changing(self) -> bool:
        """Whether a generation is being brought up, or promoted."""
        return self.change is not None or self.promote is not None

    @property
    def may_serve(self) -> frozenset[int]:
        """The generations that serve, or may yet, or again: what they listen on must stay."""
        over = {GenerationState.RETIRED, GenerationState.FAILED}
        able = {g.id for g in self.generations.values() if g.state not in over and not g.is_leaving}
        coming = {each.generation for each in (self.change, self.promote) if each is not None}
        return frozenset({*able, *coming, *({self.current} if self.current is not None else ())})

    @property
    def ending(self) -> bool:
        """Whether a stop has begun: nothing is started any more."""
        return self.stopping is not None and self.stopping.begun

    @property
    def ready(self) -> bool:
        """What ``/readyz`` says."""
        return self.serving and self.drain_mode is None and self.stopping is None

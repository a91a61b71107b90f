"""The lifecycle's nouns: generations, their workers, and where they are. Data only; `segue.supervisor.model` has them all."""

from __future__ import annotations

import enum
from copy import copy

import msgspec


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
    unasked: bool = False
    """It has not told its new master what it is: whether it accepts is not known before it has been told to."""
    cause: str = ""
    """Why it leaves or was killed, for the log."""
    handover: float | None = None
    """Seconds that its services may take to hand over; None: it has none, or isn't ready yet."""
    services: ServicesState = ServicesState.IDLE
    lead: bool = False
    """It has, or may have, the services active that one worker alone may have: from the command on until it has
    confirmed that it gave them up, or has died."""
    services_unanswered: int = 0
    """How often it was told of them and has yet to answer: only the last answer says what they are."""
    services_retry: float | None = None
    """When it is told of its services again, since the last time failed."""
    blocks_until: float | None = None
    """Until then others wait for its services to cease."""
    swaps_seen: int = 0
    """`State.swap_count` as far as it goes along: it starts with what had been decided by then, and takes part in more."""
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


class Traffic(msgspec.Struct):
    """What a generation has answered, so far and at two marks, of which the older one is the start of what is compared."""

    responses: int = 0
    errors: int = 0
    """Of them the application's own 5xx."""
    marks: tuple[tuple[float, int, int], ...] = ()
    """When, and how much by then; at most two."""


class Generation(msgspec.Struct):
    """N workers started from one snapshot of code and settings."""

    id: int
    state: GenerationState
    since: float
    target: int = 0
    """How many workers it shall have."""
    limits: Limits = Limits()
    workers: dict[int, Worker] = {}
    next_worker: int = 1
    deadline: float | None = None
    respawn_at: list[float] = []
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
    traffic: Traffic = msgspec.field(default_factory=Traffic)

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

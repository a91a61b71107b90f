"""What is under way in an instance: reloads, promotes, swaps, a stop. Data only; `segue.supervisor.model` has them all."""

from __future__ import annotations

import enum
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from segue.supervisor.generations import Strategy

if TYPE_CHECKING:
    from segue.supervisor.effects import Verb


class ChangePhase(enum.StrEnum):
    """How far a change is."""

    PREPARE = "prepare"
    """Its settings are being read."""
    CHECK = "check"
    """It is being tried whether its code can be imported, before the old workers end (`Strategy.REPLACE`)."""
    BOOT = "boot"
    WAIT = "wait"
    """It can be promoted and waits until another promote is over."""


class Change(msgspec.Struct):
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


class Probation(msgspec.Struct):
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


class Promote(msgspec.Struct):
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
    note: str = ""
    """What whoever waits for it should know, though it has succeeded."""

    @property
    def may_go_short(self) -> bool:
        """Whether fewer workers than it shall have are enough: some that work are better than what is gone back from."""
        return self.kind is PromoteKind.ROLLBACK and self.strategy is Strategy.SURGE

    @property
    def is_mixed(self) -> bool:
        """Whether two generations serve on purpose."""
        return self.phase in {PromotePhase.CANARY, PromotePhase.ROLLING}

    @property
    def is_watched(self) -> bool:
        """Whether what is promoted is on probation afterwards: it is new, and there is something to go back to."""
        return self.kind is not PromoteKind.ROLLBACK and self.previous is not None


class Scaling(msgspec.Struct):
    """A change of the number of workers, and what to go back to."""

    operation: int | None
    generation: int
    before: int
    missing: int


class Stopping(msgspec.Struct):
    """The stop of the whole instance."""

    operations: tuple[int, ...]
    begun: bool
    """False while ``stop_delay`` lasts."""
    deadline: float | None
    status: int
    """What the master will exit with."""


class DrainChange(msgspec.Struct):
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


class Swap(msgspec.Struct):
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

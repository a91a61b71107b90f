"""The lifecycle's effects: what the shell shall do. Data only; `segue.supervisor.model` has them all."""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from segue.handoff.messages import ServiceRecord
from segue.supervisor.underway import Outcome


class Prepare(msgspec.Struct, frozen=True):
    """Read settings and directories anew for this generation; answer `Prepared` or `PrepareFailed`."""

    generation: int


class Check(msgspec.Struct, frozen=True):
    """Try in a throw-away process whether the code of this generation can be imported; answer `Checked`."""

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
    PARK = "park"
    """Stay, though nothing is left to be done."""
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
    """For `hand over`, `stop` and both of `services`: how many seconds the worker may take to finish. For `park`: how
    long it stays if nobody says anything else."""
    mode: str | None = None
    """For `drain`."""
    lead: bool = False
    """For `services activate`: also those that only one worker may have active."""
    watch: float = 0.0
    """For `activate`: how many seconds it shall tell at once how many responses it has sent."""


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
    generation: int | None = None
    """Which one it is about, once that is known."""


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
    """Generation `generation` serves now, `previous` drains. None: nothing has served in between."""

    generation: int
    previous: int | None


class RolledBack(msgspec.Struct, frozen=True):
    """`to`, which has served before, has taken over again from `generation`."""

    generation: int
    to: int
    because: str
    """What was wrong with `generation`; empty: somebody asked for it."""


class ProbationEnded(msgspec.Struct, frozen=True):
    """`generation` isn't watched any more."""

    generation: int
    outcome: Outcome
    reason: str = ""
    """What was found wrong, and if it is kept, why."""


class AllDrained(msgspec.Struct, frozen=True):
    """Everything that `generation` took over from has ended, or is parked."""

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
    | Check
    | Spawn
    | Command
    | SwapCommand
    | Kill
    | Progress
    | Settle
    | Promoted
    | RolledBack
    | ProbationEnded
    | AllDrained
    | Released
    | Say
    | Exit
)

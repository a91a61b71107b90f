"""The lifecycle's events: everything that can happen. Data only; `segue.supervisor.model` has them all."""

from __future__ import annotations

from typing import Any

import msgspec

from segue.supervisor.generations import Limits, Strategy


class ReloadAsked(msgspec.Struct, frozen=True):
    """Somebody asks for a new generation that takes over when it is ready (also the first one, at start)."""

    operation: int
    strategy: Strategy | None = None
    """None, here and below: as the settings of the new generation say."""
    canary: int | None = None
    canary_for: float | None = None
    overtakes: bool = False
    """What is still being started is given up for it: its code is older than what was saved since."""


class StageAsked(msgspec.Struct, frozen=True):
    """Somebody asks for a new generation that is ready and does not serve."""

    operation: int


class PromoteAsked(msgspec.Struct, frozen=True):
    """Somebody asks for a generation to take over: the staged one, or one that served before."""

    operation: int
    generation: int | None = None
    """None: the one that is staged."""
    strategy: Strategy | None = None
    canary: int | None = None
    canary_for: float | None = None


class DiscardAsked(msgspec.Struct, frozen=True):
    """Somebody gives a generation up: one that is staged, drains or is parked, or is being brought up."""

    operation: int
    generation: int | None = None
    """None: the one that is staged, or else the one that is being brought up."""


class RollbackAsked(msgspec.Struct, frozen=True):
    """Somebody asks for a generation that served before to take over again."""

    operation: int
    generation: int | None = None
    """None: the one that served last."""


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


class Checked(msgspec.Struct, frozen=True):
    """The answer to `Check`; `error` is empty when its code can be imported."""

    generation: int
    error: str = ""
    output: str = ""


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


class ResponsesCounted(WorkerEvent, frozen=True):
    """How many responses it has sent since it was started. What segue itself answers with 503 doesn't count."""

    total: int
    errors: int
    """Of them 5xx."""


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


class Parked(WorkerEvent, frozen=True):
    """The answer to `park`."""

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
    | StageAsked
    | PromoteAsked
    | DiscardAsked
    | RollbackAsked
    | ScaleAsked
    | SwapAsked
    | DrainAsked
    | StopAsked
    | Prepared
    | PrepareFailed
    | Checked
    | TimePassed
    | Paused
    | WorkerEvent
)

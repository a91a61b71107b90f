"""The state of the whole lifecycle. Data only; `segue.supervisor.model` has everything."""

from __future__ import annotations

from copy import copy

import msgspec

from segue.handoff.messages import BEFORE_STOP, ServiceRecord
from segue.supervisor.events import ReloadAsked, ScaleAsked, SwapAsked
from segue.supervisor.generations import SERVING, Generation, GenerationState, WorkerState
from segue.supervisor.underway import Change, DrainChange, Probation, Promote, Scaling, Stopping, Swap

_QUIETING = frozenset({WorkerState.QUIETING})


class State(msgspec.Struct):
    """Everything that the lifecycle knows."""

    generations: dict[int, Generation] = {}
    current: int | None = None
    next_generation: int = 1
    change: Change | None = None
    staged_lost: str = ""
    """What became of the last staged generation, if it has failed before anybody asked for it."""
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
    drained_watch: dict[int, frozenset[int]] = {}
    """Generation promoted → the old ones that have yet to end before its reload counts as drained."""
    recover_at: float | None = None
    """When a reload is tried because nothing serves and the old code is gone."""
    recover_streak: int = 0
    services: dict[str, ServiceRecord] = {}
    """What was decided about services; it outlives generations. A service that was never swapped isn't in it."""
    swap: Swap | None = None
    """The one that runs: one at a time in the whole instance."""
    swaps_queued: tuple[SwapAsked, ...] = ()
    swaps_told: list[Swap] = []
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
    def overlaps(self) -> bool:
        """Whether workers that are to accept no more have yet to say that they don't."""
        return any(generation.having(_QUIETING) for generation in self.generations.values())

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
    def told_mode(self) -> str | None:
        """The drain mode that workers are told: while a stop waits they say, too, that others are to be asked."""
        if self.drain_mode is None and self.stopping is not None and not self.stopping.begun:
            return BEFORE_STOP
        return self.drain_mode

    @property
    def ready(self) -> bool:
        """What ``/readyz`` says."""
        return self.serving and self.drain_mode is None and self.stopping is None

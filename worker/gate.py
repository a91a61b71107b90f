"""Whether new work is taken: the operator's drain, as one process knows it.

`segue.worker.reject` asks the gate for every request that the application has marked. Without a drain that is one look
at `Gate.open`. In the mode ``reject`` each is refused; in the mode ``queue`` each gets a *place* and waits, in the order
of arrival. Once the drain has been stopped those that wait go on a few per turn of the loop, so that nothing else
is kept waiting; until the last of them runs whoever arrives takes a place behind them and overtakes nobody.

A gate belongs to one event loop, the worker's: it may not be asked or told anything from another loop or thread.
(Without a drain any of them may pass: to look at `Gate.open` needs no loop.) Under plain uvicorn, and in tests of an
application, nothing ever drains.
"""

from __future__ import annotations

import asyncio
import itertools

from segue.handoff.messages import DRAIN_MODES
from segue.worker.reject import CLIENT_LEFT, Refusal, RejectIfDraining

QUEUE_LIMIT = 1000
QUEUE_TIMEOUT_S = 30.0

_REJECTED = Refusal("the service is draining; try again later")
_SHUT = Refusal("the service is stopping; try again later")
_LEFT = Refusal("the client has left", CLIENT_LEFT)

_STEP = 16
"""So many are answered in the first turn, and so many more in each that follows: however many
arrive meanwhile, those that wait come to an end."""

Place = asyncio.Future[Refusal | None]
"""Where a request waits for what becomes of it; None: it goes on."""


class Gate:
    """What every marked request has to pass."""

    def __init__(self) -> None:
        self.open = True
        """Whether a request may pass without asking: nothing drains, and nobody waits."""
        self.mode: str | None = None
        """What the operator wants done with marked requests: ``reject``, ``queue`` or, without a drain, None."""
        self.health_path: str | None = None
        """A path that is never refused, beside the usual ones."""
        self.rejected_total = 0
        """Refused by the mode ``reject``, for want of room in the queue, or because the process stops."""
        self.queued_total = 0
        """Had to wait, whatever became of them."""
        self.timed_out_total = 0
        """Refused because they had waited for too long."""
        self.left_total = 0
        """Gone while they waited: their client left, or their task was cancelled."""
        self._limit = QUEUE_LIMIT
        self._timeout_s = QUEUE_TIMEOUT_S
        self._shut = False
        self._held: dict[Place, asyncio.TimerHandle] = {}
        """Those that wait, in the order of arrival, and the end of each one's patience."""
        self._dismissing: asyncio.Handle | None = None
        self._batch = 0
        self._emptied = False

    @property
    def waiting(self) -> int:
        """How many requests wait now."""
        return len(self._held)

    def configure(self, limit: int, timeout_s: float, health_path: str | None) -> None:
        """Let at most `limit` requests wait, each for `timeout_s` at most (not those that wait already)."""
        self._limit = limit
        self._timeout_s = timeout_s
        self.health_path = health_path

    def set_mode(self, mode: str | None) -> None:
        """Begin, change or (None) end a drain; those that wait get their answer. Raises ValueError for other modes."""
        if mode is not None and mode not in DRAIN_MODES:
            raise ValueError(f"a drain's mode is {' or '.join(DRAIN_MODES)}, not {mode!r}")
        self.mode = mode
        self._changed()

    def shut(self) -> None:
        """The process stops: refuse those that wait and all that come."""
        self._shut = True
        self._changed()

    def enter(self) -> Place:
        """Take a place; it has an answer already unless the request has to wait."""
        place: Place = asyncio.get_running_loop().create_future()
        if self.open:
            place.set_result(None)
        elif (refusal := self._refusal()) is not None:
            self.rejected_total += 1
            place.set_result(refusal)
        else:
            self.queued_total += 1
            self._held[place] = place.get_loop().call_later(self._timeout_s, self._time_out, place)
        return place

    def leave(self, place: Place) -> None:
        """Give up a place; if it had an answer already nothing happens."""
        if self._answer(place, _LEFT):
            self.left_total += 1

    def _refusal(self) -> Refusal | None:
        """What a request that can't pass at once is told; None: that it has to wait."""
        if self._shut:
            return _SHUT
        if self.mode == "reject":
            return _REJECTED
        # when the drain is over there is no limit: who comes then waits for a few turns of the loop
        if self.mode == "queue" and len(self._held) >= self._limit:
            detail = f"the service is draining and {self._limit} requests wait already; try again later"
            return Refusal(detail)
        return None

    def _time_out(self, place: Place) -> None:
        detail = (
            f"the service is draining and this request has waited for {self._timeout_s:g} s; try again later"
        )
        if self._answer(place, Refusal(detail)):
            self.timed_out_total += 1

    def _answer(self, place: Place, refusal: Refusal | None) -> bool:
        """Whether `place` was still waiting for it."""
        timer = self._held.pop(place, None)
        if timer is None:
            return False
        timer.cancel()
        if not place.done():  # it is if the request's task was cancelled
            place.set_result(refusal)
        return True

    def _changed(self) -> None:
        self.open = self.mode is None and not self._shut and not self._held and self._dismissing is None
        if self._held and self._dismissing is None:
            self._batch, self._emptied = 0, False
            self._dismissing = next(iter(self._held)).get_loop().call_soon(self._dismiss)

    def _dismiss(self) -> None:
        """Answer the next few, and go on with the following turn of the loop."""
        self._dismissing = None
        if self.mode == "queue" and not self._shut:
            return
        # Those answered in the last turn have run by now. If nobody was left then, those who wait now came in between:
        # all go on together, since a gate that waited for a turn in which nobody comes might stay closed for ever.
        last = self._emptied
        self._batch += _STEP
        batch = list(itertools.islice(self._held, None if last else self._batch))
        refusal = self._refusal()
        for place in batch:
            self._answer(place, refusal)
        if refusal is not None:
            self.rejected_total += len(batch)
        self._emptied = not self._held
        if batch and not last:
            self._dismissing = batch[0].get_loop().call_soon(self._dismiss)
        else:
            self._changed()


gate = Gate()
"""The gate of this process."""

reject_if_draining = RejectIfDraining(gate)

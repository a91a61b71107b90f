"""Who goes on with the agent's subscription in another process, before it is activated: the other side of `recruiting`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from segue.worker.backend.hsp.errors import LinkError
from segue.worker.backend.hsp.mailbox import Mailbox
from segue.worker.backend.hsp.muster import LinedUp, Message, Order, Ready, Unable
from segue.worker.backend.hsp.sessions import Sessions
from segue.worker.backend.hsp.subscription import Mode, Subscription, Watch, ended, first

_log = logging.getLogger("segue.hsp")

_LEAVE_S = 1.0
"""How long the one before may take to leave its session."""
_UNUSED_S = 60.0
"""How long a recruit waits to be activated."""


class _Engagement:
    """With whoever holds the subscription."""

    def __init__(self, order: Order, subscription: Subscription) -> None:
        self.order = order
        self.subscription = subscription
        self.rehearsal = subscription.watch(order.rehearsal)
        self.cut = subscription.watch(order.cut, Mode.WAIT)
        self.dismissed = asyncio.Event()
        self.serving: asyncio.Task[None] | None = None

    async def comes(self, watch: Watch) -> bool:
        """Wait for a token."""
        await first(watch.seen, self.subscription.lost, self.dismissed)
        return watch.seen.is_set()


class Recruit:
    """Of one connector; most of the time there is nothing to do."""

    def __init__(
        self,
        mailbox: Mailbox,
        sessions: Sessions,
        limit_s: float,
        say: Callable[[Message], None],
        mark: Callable[[bytes], Awaitable[None]],
    ) -> None:
        """`limit_s`: how long lining up may take. `say` tells the others something, `mark` publishes a token."""
        self._mailbox = mailbox
        self._sessions = sessions
        self._limit_s = limit_s
        self._say = say
        self._mark = mark
        self._engagement: _Engagement | None = None

    def enlist(self, order: Order, stands_by: bool) -> None:
        """Do as somebody says who wants to leave, if this one `stands_by`."""
        seat = self._mailbox.seat
        if not stands_by or self._engagement is not None:
            self._say(Unable(order.cut, "it does not stand by any more"))
        elif seat is None or (seat.holder, seat.session) != (order.by, order.session):
            self._say(Unable(order.cut, f"it has not heard that the subscription is in {order.session}"))
        else:
            session = self._sessions.other(order.session)
            subscription = self._sessions.make(session, Mode.DROP, heard_before=order.heard)
            engagement = self._engagement = _Engagement(order, subscription)
            engagement.serving = asyncio.create_task(self._serve(engagement))

    def dismiss(self, cut: str) -> None:
        """It isn't needed."""
        if self._engagement is not None and cut == self._engagement.order.cut:
            self._engagement.dismissed.set()

    async def _serve(self, engagement: _Engagement) -> None:
        order, subscription = engagement.order, engagement.subscription
        try:
            async with asyncio.timeout(self._limit_s):
                await self._sessions.open(subscription, fresh=True, spare=True)
                await self._mark(engagement.rehearsal.token)
                if await engagement.comes(engagement.rehearsal):
                    self._say(Ready(order.cut, subscription.session, tuple(subscription.filters)))
                if await engagement.comes(engagement.cut):
                    self._say(LinedUp(order.cut, engagement.cut.counted))
            async with asyncio.timeout(_UNUSED_S):
                await first(engagement.dismissed, subscription.lost)
        except LinkError as error:
            self._say(Unable(order.cut, str(error)))
        except TimeoutError:
            _log.info("event=hsp-recruit-unused session=%s", subscription.session)
        if self._engagement is engagement:
            self._engagement = None
            self._sessions.leave(subscription)

    async def take_up(self) -> Subscription | None:
        """The subscription that was lined up, if the seat names it: then it is to be gone on with."""
        engagement = await self._released()
        if engagement is None:
            return None
        subscription = engagement.subscription
        if (
            engagement.cut.seen.is_set()
            and await self._is_seated(subscription.session)
            and subscription.alive
        ):
            # whose connection is broken before it has left is said to be offline
            self._sessions.forget(engagement.order.session, after_s=_LEAVE_S)
            return subscription
        self._sessions.leave(subscription)
        return None

    async def _is_seated(self, session: str) -> bool:
        seat = self._mailbox.seat
        if seat is None or seat.session != session:
            try:
                await self._mailbox.settle()
            except LinkError:
                return False
            seat = self._mailbox.seat
        return seat is not None and seat.session == session

    async def let_go(self) -> None:
        """It won't be activated: what the seat says is for somebody else."""
        engagement = await self._released()
        if engagement is not None:
            self._sessions.leave(engagement.subscription)

    async def _released(self) -> _Engagement | None:
        engagement, self._engagement = self._engagement, None
        if engagement is not None and engagement.serving is not None:
            await ended(engagement.serving)
        return engagement

"""Who holds the agent's subscription: takes it up, gets it back when it is lost, and passes it on.

A connector has one while a broker is configured. How a subscription passes on without losing a message is said in
`subscription`; here is when, and what is written down about it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

from segue.worker.backend.hsp.barrier import Probe, cut, rehearse
from segue.worker.backend.hsp.continuity import Continuity
from segue.worker.backend.hsp.errors import BarrierError, LinkError
from segue.worker.backend.hsp.inbox import Inbox
from segue.worker.backend.hsp.mailbox import Mailbox
from segue.worker.backend.hsp.recruiting import Recruiting
from segue.worker.backend.hsp.scout import rights, send_probes
from segue.worker.backend.hsp.sessions import Sessions
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.subscription import Mode, Subscription, ended
from segue.worker.backend.hsp.topics import Topics
from segue.worker.backend.hsp.trial import Trial, Witness

_log = logging.getLogger("segue.hsp")


class Holder:
    """Of one connector."""

    def __init__(
        self,
        settings: HSPSettings,
        topics: Topics,
        known: Continuity,
        mailbox: Mailbox,
        inbox: Inbox,
        will: bytes,
        announce: Callable[[], Awaitable[None]],
        stands_by: Callable[[], bool],
    ) -> None:
        """`will` is what the broker is to say when the connection is lost; `announce` says that the agent is there;
        `stands_by` tells whether the connector could come to hold it.
        """
        self.settings = settings
        self.topics = topics
        self.mailbox = mailbox
        self.prepared: Subscription | None = None
        """The one that is to be in use after a swap."""
        self.at_the_cut = False
        """Whether what is prepared has to be lined up with the old one's; if not, it has kept all since it was opened."""
        self.lined_up = False
        self.session: str | None = None
        """Where to go on, whatever the seat says."""
        self.subscription: Subscription | None = None
        """The one that is in use; only while it is wanted."""
        self.trouble: str | None = None
        """Why there is none though there should be."""
        self._known = known
        self._inbox = inbox
        self._announce = announce
        self._reserved: str | None = None
        """A session that was made before it was needed."""
        self._moves = False
        """Whether what is prepared is another agent's, or at another broker."""
        self._wanted = False
        self._seated = 0.0
        self._keeping: asyncio.Task[None] | None = None
        self._announcing: asyncio.Task[None] | None = None
        self._witness = Witness(settings, topics, mailbox.publish, lambda: self.subscription)
        self._sessions = Sessions(
            settings, topics, known.leaving, inbox.receive, known.begun, will, self._witness.overhear
        )
        self.recruiting = Recruiting(
            settings, topics, mailbox, self._sessions, lambda: self.prepared is None and stands_by()
        )
        self._untidy = False
        """Whether somebody who was recruited may have left a session that isn't needed."""

    @property
    def place(self) -> tuple[Any, ...]:
        """What has to be the same for two holders to have one subscription in common."""
        return self.settings.address, self.settings.identity, self.settings.topic_prefix

    @property
    def reason(self) -> str | None:
        """Why the subscription that should be there isn't."""
        if not self._wanted or (self.subscription is not None and self.subscription.alive):
            return None
        return self.trouble or "it is not subscribed"

    # ------------------------------------------------------------------------------------------------- taking it up

    async def try_out(self, *, compare: bool) -> None:
        """See whether the broker permits what is to be subscribed to, without disturbing who holds it; with `compare` also
        whether it serves that as well as it serves them. Raises `LinkError`.
        """
        trial = Trial(self.settings, self.topics, self.mailbox.publish)
        await trial.run(compare=compare, beside=self.mailbox.seat)

    async def reserve(self) -> None:
        """From here on the broker keeps what comes for an agent that nobody has spoken for yet. Raises `LinkError`.

        The generation that serves is another agent, or at another broker: there will be no session to go on with.
        """
        if self.mailbox.seat is not None:
            return
        if self._reserved is None:
            self._reserved = await self._sessions.reserve()

    async def prepare_beside(self, old: Holder) -> None:
        """Make a subscription that can take the place of `old`'s, if it has one. Raises `LinkError`."""
        theirs = old.subscription
        if theirs is None or not theirs.alive or not self.mailbox.connected:
            return
        moves = old.place != self.place
        shares = bool(old.settings.shared_group or self.settings.shared_group)
        self._moves, self.at_the_cut = moves, not moves and not shares
        if self.at_the_cut:
            new = self._sessions.make(
                self._sessions.other(theirs.session), Mode.DROP, heard_before=old.topics.stream
            )
            await self._sessions.open(new, fresh=True)
            self.prepared = new
            publish, timeout_s = self.mailbox.publish, self.settings.barrier_timeout_s
            await rehearse(theirs, new, self.topics, publish, self._prober(old), timeout_s)
            return
        trial = Trial(self.settings, self.topics, self.mailbox.publish)
        await trial.run(compare=moves)
        if moves:
            session, known = self._where()
            new = self._sessions.make(session, Mode.WAIT)
            await self._sessions.open(new, fresh=False, known=known)
        else:
            new = self._sessions.make(self._sessions.other(theirs.session), Mode.WAIT)
            await self._sessions.open(new, fresh=True)
        self.prepared = new

    def _prober(self, old: Holder) -> Probe:
        async def probe(topics: Collection[str], payload: bytes) -> set[str]:
            taken = await send_probes(old.settings, topics, payload)
            if rights(old.settings) != rights(self.settings):
                taken |= await send_probes(self.settings, topics, payload)
            return taken

        return probe

    async def hold(self) -> None:
        """Handle what comes from here on. If the broker isn't there, as soon as it is."""
        self._wanted = True
        self._seated = time.time()  # whoever had the seat until now has left it
        prepared, self.prepared = self.prepared, None
        if prepared is None and (prepared := await self.recruiting.here.take_up()) is not None:
            self.lined_up, self._untidy = True, False
            _log.info("event=hsp-recruited session=%s kept=%d", prepared.session, prepared.kept)
        if prepared is not None and self.lined_up and prepared.alive:
            self._known.counts.swaps += 1
            self._have(prepared)
            prepared.go()
            self._announcing = asyncio.create_task(self.appear())
        else:
            if prepared is not None and self.lined_up:  # it was lost since: what it has is in its session
                await prepared.leave()
            elif prepared is not None:
                await self._discard(prepared, self)
            try:
                await self._sit_down()
            except LinkError as error:
                self.trouble = str(error)
                _log.warning("event=hsp-not-subscribed reason=%s", error)
        self._keeping = asyncio.create_task(self._keep_holding())

    async def _sit_down(self) -> None:
        """Go on with the session in which the agent's messages wait. Raises `LinkError`."""
        mailbox = self.mailbox
        if not mailbox.connected:
            raise LinkError(mailbox.reason or "it is not connected")
        await mailbox.settle()
        seat = mailbox.seat
        session, known = self._where()
        subscription = self._sessions.make(session, Mode.RUN)
        await self._sessions.open(subscription, fresh=False, known=known)
        if seat is not None and not subscription.resumed:
            self._known.counts.gaps += 1
            self._known.problem(session, "the broker has not kept the session: messages may be lost")
        self._have(subscription)
        if seat is None or seat.holder != self.topics.instance or self._untidy:
            # a process may have died in the middle of a swap
            self._sessions.forget(self._sessions.other(session))
            self._untidy = False
        await self.appear()

    def _where(self) -> tuple[str, tuple[str, ...]]:
        """The session to go on with, and what it is said to be subscribed to."""
        seat = self.mailbox.seat
        session = self.session or (seat.session if seat else self._sessions.names[0])
        return session, seat.filters if seat and seat.session == session else ()

    def _have(self, subscription: Subscription) -> None:
        self.subscription, self.session = subscription, subscription.session
        self.trouble = None

    async def appear(self) -> None:
        """Say where the subscription is, and that the agent is there; with the next connection if that can't be now."""
        subscription = self.subscription
        if subscription is None:
            return
        try:
            self._seated = await self.mailbox.take_seat(subscription.session, tuple(subscription.filters))
            await self._announce()
        except LinkError as error:
            _log.warning("event=hsp-not-announced reason=%s", error)

    # -------------------------------------------------------------------------------------------------- keeping it

    async def _keep_holding(self) -> None:
        """Get the subscription back whenever it is lost."""
        pause_s = self.settings.reconnect_first_s
        while True:
            subscription = self.subscription
            if subscription is not None:
                pause_s = self.settings.reconnect_first_s
                await subscription.lost.wait()
                self.trouble = f"the subscription was lost: {subscription.reason}"
                _log.warning("event=hsp-subscription-lost reason=%s", subscription.reason)
                await subscription.finish()
                self.subscription = None
                # should somebody else have it now, that is known by then
                await asyncio.sleep(pause_s)
            try:
                if self._is_displaced():
                    return
                await self._sit_down()
            except LinkError as error:
                self.trouble = str(error)
                await asyncio.sleep(pause_s)
                pause_s = min(self.settings.reconnect_cap_s, pause_s * 2)

    def _is_displaced(self) -> bool:
        """Whether another process has taken the subscription over: to take it back would go on for ever."""
        seat = self.mailbox.seat
        if seat is None or seat.holder == self.topics.instance or seat.since <= self._seated:
            return False
        self.trouble = (
            f"another process has taken the subscription of {self.topics.ai_id} over: is there a second agent of that "
            "name? Give one of them another ai_id"
        )
        _log.error("event=hsp-displaced holder=%s ai_id=%s", seat.holder, self.topics.ai_id)
        return True

    # -------------------------------------------------------------------------------------------------- passing it on

    async def pass_on(self, heir: Holder | None) -> None:
        """Leave the subscription where `heir`, or else the next process, goes on with it."""
        await self._let_go()
        subscription, self.subscription = self.subscription, None
        self.session = None
        if subscription is None:
            return
        try:
            if heir is None:
                if not await self._recruit(subscription):
                    await self._step_down(subscription, drain=subscription.mode is Mode.RUN)
            elif not await self._hand_over(subscription, heir):
                await self._step_down(subscription, drain=False)
        except BaseException:
            self.subscription = subscription  # `close` leaves it
            raise

    async def _recruit(self, old: Subscription) -> bool:
        """Have a connector of another process go on after the same message, if one stands by. False if that can't be."""
        seat, mailbox = self.mailbox.seat, self.mailbox
        if self.settings.shared_group or not old.alive or not mailbox.connected or seat is None:
            return False
        if (seat.holder, seat.session) != (self.topics.instance, old.session):
            return False
        try:
            successor = await self.recruiting.recruit(old)
            if successor is None:
                return False
            self._untidy = True
            await old.stop()
            if old.unfinished:  # should it not come to its end here, the old session has it
                raise BarrierError(f"{old.unfinished} messages are still being worked on")
            await mailbox.give_seat(*successor)
            self._sessions.leave(old)  # beside: who goes on needn't wait for it
        except LinkError as error:
            self._untidy = True
            _log.warning("event=hsp-no-cut reason=%s", error)
            self.recruiting.dismiss()
            return False
        return True

    async def _step_down(self, subscription: Subscription, *, drain: bool) -> None:
        """Leave the session to whoever comes next; with `drain` not before all is handled that is in it now: the next one
        may be another agent, or at another broker.
        """
        if drain and subscription.alive and self.mailbox.connected:
            try:
                await subscription.drain(self._mark, self.settings.drain_timeout_s)
            except LinkError as error:
                _log.info("event=hsp-not-drained reason=%s", error)
        await subscription.stop()
        await subscription.leave()

    async def retire(self) -> None:
        """Give the subscription up for good; if that can't be, it is left."""
        await self._let_go()
        subscription, self.subscription = self.subscription, None
        if subscription is None:
            return
        try:
            await subscription.retire(self._mark)
        except LinkError as error:
            _log.warning("event=hsp-not-retired reason=%s", error)
            await subscription.stop()
            await subscription.leave()

    async def _hand_over(self, old: Subscription, heir: Holder) -> bool:
        """Line the heir's subscription up with this one, and end this one. False if that can't be."""
        prepared = heir.prepared
        if heir.place != self.place:  # it has its own, whatever becomes of this one
            heir.lined_up, heir.session = True, prepared.session if prepared is not None else None
        else:
            heir.session = old.session
            if prepared is None:
                return False
        try:
            if prepared is not None and heir.at_the_cut:
                await cut(old, prepared, heir.topics, heir.mailbox.publish, heir.settings.barrier_timeout_s)
                await old.halt()
                # from here on the rest is in the other session; not before that is written down may this one go
                await heir.mailbox.take_seat(prepared.session, tuple(prepared.filters))
                self._sessions.end(old)
            else:
                await old.retire(self._mark)
        except LinkError as error:
            _log.warning("event=hsp-no-cut reason=%s", error)
            return False
        heir.lined_up, heir.session = True, prepared.session if prepared is not None else None
        return True

    def _mark(self, token: bytes) -> Coroutine[Any, Any, None]:
        return self.mailbox.publish(self.topics.marker, token)

    async def skip(self, heir: Holder) -> None:
        """It was replaced before it came to hold anything: what waits for it, `heir` goes on with."""
        await self.recruiting.here.let_go()
        prepared, self.prepared = self.prepared, None
        if prepared is None:
            return
        if not self.lined_up:
            await self._discard(prepared, heir)
        elif heir.place == self.place:
            heir.session = prepared.session
            await prepared.leave()
        else:
            await self._retire(prepared, heir)

    async def _discard(self, prepared: Subscription, taker: Holder) -> None:
        """It isn't needed. What only it was given, as a member of a group, `taker` handles."""
        if prepared.resumed:
            await prepared.leave()
        elif self.at_the_cut or self._moves:
            await prepared.end()
        else:
            await self._retire(prepared, taker)

    async def _retire(self, prepared: Subscription, taker: Holder) -> None:
        prepared.go(taker._inbox.receive)
        try:
            await prepared.retire(self._mark)
        except LinkError as error:
            _log.warning("event=hsp-not-retired reason=%s", error)
            await prepared.stop()
            await prepared.leave()

    async def _let_go(self) -> None:
        self._wanted = False
        keeping, self._keeping = self._keeping, None
        if keeping is not None:
            await ended(keeping)
        if self._announcing is not None:  # where it is must not be said after its successor has said so
            await asyncio.wait({self._announcing}, timeout=self.settings.barrier_timeout_s)
        await self._witness.close()

    async def close(self, old: Holder | None) -> None:
        """The end; `old` goes on if this one was never used."""
        await self.recruiting.close()
        await self._let_go()
        prepared, self.prepared = self.prepared, None
        if prepared is not None and self.lined_up:  # whoever comes next finds it by its seat
            await prepared.leave()
        elif prepared is not None:
            await self._discard(prepared, old or self)
        if self.subscription is not None:
            await self.subscription.stop()
            await self.subscription.leave()
        if self._reserved is not None and not self._seated and self.mailbox.seat is None:
            self._sessions.forget(self._reserved)
        await self._sessions.all_gone()
        if self._announcing is not None:
            await ended(self._announcing)

"""The barrier between generations: whoever leaves the agent's subscription lines one of another process up with it.

Design. A connector whose worker serves and that has nothing to do yet *stands by*; as soon as the master tells the old one
to leave, those of the new generation do. All connectors of an agent hear each other on the marker topic, through their
mailboxes, beside what waits in the sessions.

1. Who leaves asks who stands by, and picks who will be activated, as far as can be told: of another generation, the newest,
   the worker that was started first.
2. That one opens the other one of the agent's two sessions, drops what it gets there, and sees a token come through it.
   The old one sees it come, too, and has gone on with its work until here.
3. A second token is the cut, as in a process: the old one stops at it, the new one keeps what follows, both have counted.
4. The old one writes the new session on the seat, and leaves. That is the commit: whoever is activated then goes on with the
   session that the seat names, the recruit on the connection that it has. The old session is forgotten by whoever goes on.

Before the seat moves, the old session has all that isn't handled; after that the new one has, and it may only move once the
old one has nothing left from before the cut. So whatever fails, and whoever is killed, nothing has to be undone: the recruit
leaves the session that it has made, and what the seat names is resumed as if there had been no recruit. It ends no session, and
doesn't open one that is still there: it may have been asleep, and the session be somebody else's by now.

Whoever doesn't know of others doesn't ask, and leaves at once, as it does at the end of a service. All say that they are there when
they connect, and again when somebody else takes the seat, who may be newer than they are; and that they are gone when they close.

Rejected: a topic of its own (an access list that has only the others would have broken the mailbox); to ask the master who comes next (it
collects its status from all workers, one of which may hang); recruits that are ready before (each would be given all messages
for as long as it waits).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import uuid
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from segue.worker.backend.hsp.errors import BarrierError, LinkError
from segue.worker.backend.hsp.mailbox import Mailbox
from segue.worker.backend.hsp.muster import (
    Dismissed,
    Gone,
    Here,
    LinedUp,
    Message,
    Order,
    Question,
    Ready,
    Unable,
    read,
)
from segue.worker.backend.hsp.recruit import Recruit
from segue.worker.backend.hsp.sessions import Sessions
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.subscription import Mode, Subscription, ended, first
from segue.worker.backend.hsp.topics import Topics
from segue.worker.events import activated
from segue.worker.services import host

_log = logging.getLogger("segue.hsp")

_ANSWER_S = 0.5
"""How long it is waited for the answer of those that are known; only one that has died gives none."""
_LIMIT_S = 4.0
"""How long lining up may take at most, whatever the settings say: the master waits 10 s for a service to let go."""
_CLOSE_S = 1.0
_KNOWN = 1000


class Successor(NamedTuple):
    """Who goes on, and where."""

    instance: str
    session: str
    filters: tuple[str, ...]


class _Recruitment:
    """As whoever leaves sees it."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.answered = asyncio.Event()
        self.answer: Ready | Unable | None = None
        self.lined_up = asyncio.Event()
        self.counted = 0


class Recruiting:
    """Of one connector, which may come to be on either side."""

    def __init__(
        self,
        settings: HSPSettings,
        topics: Topics,
        mailbox: Mailbox,
        sessions: Sessions,
        stands_by: Callable[[], bool],
    ) -> None:
        """`stands_by`: whether the connector has nothing to do and could be activated."""
        self._settings = settings
        self._topics = topics
        self._mailbox = mailbox
        self._sessions = sessions
        self._stands_by = stands_by
        self._limit_s = min(settings.barrier_timeout_s, _LIMIT_S)
        alike = settings.address, settings.client_id_prefix, settings.qos, settings.shared_group
        self._kind = hashlib.blake2b(repr(alike).encode(), digest_size=8).hexdigest()
        here = host.current()
        self._generation, self._worker = here.generation or 0, here.worker or 0
        self._others: dict[str, Here] = {}
        self._unheard: set[str] = set()
        """Whose answer is waited for."""
        self._all_heard = asyncio.Event()
        self._recruitment: _Recruitment | None = None
        self._saying: set[asyncio.Task[None]] = set()
        self.here = Recruit(mailbox, sessions, self._limit_s, self._say, self._mark)
        """For when this one is recruited."""
        mailbox.overhear, mailbox.seat_passed = self._overhear, self.present

    # -------------------------------------------------------------------------------------------------- what is said

    def present(self) -> None:
        """Tell the others that this one is there."""
        stands_by = self._stands_by() and activated.is_set()
        self._say(
            Here(self._topics.instance, self._kind, stands_by, self._generation, self._worker),
        )

    def _say(self, message: Message) -> None:
        saying = asyncio.create_task(self._publish(message))
        self._saying.add(saying)
        saying.add_done_callback(self._saying.discard)

    async def _publish(self, message: Message) -> None:
        with contextlib.suppress(LinkError):  # who doesn't hear it goes on without
            await self._mark(msgspec.json.encode(message))

    async def _mark(self, said: bytes) -> None:
        await self._mailbox.publish(self._topics.marker, said)

    def _overhear(self, said: bytes) -> None:
        match message := read(said):
            case Here() | Gone():
                self._hear_of(message)
            case Question(by) if by != self._topics.instance:
                self.present()
            case Order(to=to) if to == self._topics.instance:
                self.here.enlist(message, self._stands_by())
            case Dismissed(cut):
                self.here.dismiss(cut)
            case Ready() | LinedUp() | Unable():
                self._hear_from_recruit(message)

    def _hear_of(self, message: Here | Gone) -> None:
        if message.instance == self._topics.instance:
            return
        if isinstance(message, Gone):
            self._others.pop(message.instance, None)
        elif message.instance in self._others or len(self._others) < _KNOWN:
            self._others[message.instance] = message
        self._unheard.discard(message.instance)
        if not self._unheard:
            self._all_heard.set()

    def _hear_from_recruit(self, message: Ready | LinedUp | Unable) -> None:
        recruitment = self._recruitment
        if recruitment is None or recruitment.order.cut != message.cut:
            return
        if isinstance(message, LinedUp):
            recruitment.counted = message.counted
            recruitment.lined_up.set()
        else:
            recruitment.answer = message
            recruitment.answered.set()

    # ------------------------------------------------------------------------------------------------ whoever leaves

    async def recruit(self, old: Subscription) -> Successor | None:
        """Have somebody keep what comes after a token; `old` handles all before it, and begins nothing after.

        None: nobody stands by. Raises `LinkError`: somebody does, and could not be lined up; `old` may have stopped.
        """
        chosen = await self._choose()
        if chosen is None:
            return None
        order = Order(
            chosen.instance,
            self._topics.instance,
            old.session,
            self._topics.stream,
            uuid.uuid4().hex,
            uuid.uuid4().hex,
        )
        self._recruitment = _Recruitment(order)
        try:
            async with asyncio.timeout(self._limit_s):
                # it may still be on its way out since the last time
                await self._sessions.gone(self._sessions.other(old.session))
                return await self._line_up(old, self._recruitment)
        except TimeoutError:
            self.dismiss()
            raise BarrierError(
                f"worker {chosen.worker} of generation {chosen.generation} was not lined up within {self._limit_s:g} s"
            ) from None
        except BaseException:
            self.dismiss()
            raise

    def dismiss(self) -> None:
        """Who was lined up isn't needed after all."""
        recruitment, self._recruitment = self._recruitment, None
        if recruitment is not None:
            self._say(Dismissed(recruitment.order.cut))

    async def _choose(self) -> Here | None:
        """Who will be activated next, as far as can be told."""
        if not self._others:
            return None
        self._unheard = set(self._others)
        self._all_heard.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(_ANSWER_S, self._limit_s)):
                await self._mark(msgspec.json.encode(Question(self._topics.instance)))
                await self._all_heard.wait()
        for silent in self._unheard:
            del self._others[silent]
        able = [each for each in self._others.values() if each.stands_by and each.kind == self._kind]
        return max(
            able,
            key=lambda each: (each.generation != self._generation, each.generation, -each.worker),
            default=None,
        )

    async def _line_up(self, old: Subscription, recruitment: _Recruitment) -> Successor:
        order = recruitment.order
        rehearsal, cut = old.watch(order.rehearsal), old.watch(order.cut, Mode.STOP)
        try:
            await self._mark(msgspec.json.encode(order))
            await _until(recruitment.answered, old)
            answer = recruitment.answer
            if not isinstance(answer, Ready):
                raise BarrierError(answer.reason if answer is not None else "it gave no answer")
            await _until(rehearsal.seen, old)
            await self._mark(cut.token)
            await _until(cut.seen, old)
            await _until(recruitment.lined_up, old)
            if cut.counted != recruitment.counted:
                raise BarrierError(
                    f"of {cut.counted} messages the new connection was given {recruitment.counted}"
                )
        finally:
            old.unwatch(rehearsal)
            old.unwatch(cut)
        return Successor(order.to, answer.session, answer.filters)

    async def close(self) -> None:
        """The end."""
        await self.here.let_go()
        if self._mailbox.connected:
            self._say(Gone(self._topics.instance))
        if self._saying:
            await asyncio.wait(set(self._saying), timeout=_CLOSE_S)
        for each in set(self._saying):
            await ended(each)


async def _until(event: asyncio.Event, old: Subscription) -> None:
    await first(event, old.lost)
    if not event.is_set():
        raise LinkError(old.reason)

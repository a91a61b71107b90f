"""The agent's subscription: a session that the broker keeps, in which what others say waits until it is handled.

Design. What an agent hears is in one session at the broker, held by one connection at a time; where it is stands retained
on the topic of the *seat*. Nothing is acknowledged before it was handled (or, of much work at once, written down: `begun`). So whoever holds the session next, in this
process or another, after a graceful end or a `kill -9`, goes on with the first message that was not handled.

- In a process: the new instance makes a second session beside the first and drops what it gets there. A rehearsal (a token
  through both, and a probe for each filter) shows that both can be lined up and that the broker serves what it grants, else
  the swap is refused; the old one never noticed. After the commit a second token is *the cut*: the old one handles all
  before it, the new one all after; then the seat moves, and the old session goes. Until the cut nothing is held, so
  waiting for the other workers costs nothing, and giving up is closing the new one.
- Between processes the one that leaves lines one of the next generation up in the same way (`recruiting`). What that one
  would subscribe to was tried out when it started (`trial`).
- Wherever there is no cut, since nobody stands by, it fails or a process dies, the old one stops between two messages, lets the
  broker read its last acknowledgement, and leaves with DISCONNECT; the next one resumes the session that the seat names.
- If the next one is another agent, or at another broker, its session is made when it starts, the old one handles all that has
  come until it leaves, and the next one knows what it has handled (`records`).

Rejected: holding back from the rehearsal until the commit (as long as the slowest worker takes); handing what is held to the
successor by publishing it again (order); one fixed session (settings that don't work would be found out after the old one
has left, and nobody could begin before that).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from enum import Enum
from typing import Any

from segue.worker.backend.hsp import envelope as envelopes
from segue.worker.backend.hsp.begun import Begun, Unfinished
from segue.worker.backend.hsp.client import Will
from segue.worker.backend.hsp.errors import BarrierError, LinkError
from segue.worker.backend.hsp.link import Link, Message
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.topics import Topics, matches

_log = logging.getLogger("segue.hsp")

_PROBE = envelopes.PROBE.encode()

Take = Callable[[str, bytes, bool], Awaitable["asyncio.Future[None] | None"]]
"""Handles a message: topic, payload, whether it was retained. What goes on for longer is returned."""
Mark = Callable[[bytes], Awaitable[None]]
"""Publishes a token on the marker topic."""


class Mode(Enum):
    """What becomes of messages."""

    DROP = "drop"
    """Somebody else handles them."""
    WAIT = "wait"
    """They are kept, unacknowledged."""
    RUN = "run"
    STOP = "stop"
    """They stay with the broker."""


class Watch:
    """A token that is on its way through the broker, and what was seen before it."""

    def __init__(self, token: str, then: Mode | None = None) -> None:
        self.token = token.encode()
        self.then = then
        """Which mode begins with the token; None: it only shows that there is a way."""
        self.seen = asyncio.Event()
        self.counted = 0
        """How many messages came between the token before and this one; two connections have the same number."""
        self.probes: set[str] = set()
        """The topics on which the token came as a probe."""


class Subscription:
    """One connection to the agent's session, or to one that is to become it."""

    def __init__(
        self,
        settings: HSPSettings,
        topics: Topics,
        session: str,
        take: Take,
        begun: Begun,
        *,
        mode: Mode,
        durable: bool = True,
        will: Will | None = None,
        heard_before: Sequence[str] = (),
        overhear: Callable[[bytes], None] | None = None,
    ) -> None:
        """`begun` is where work is written down. `durable`: the broker keeps the session. `heard_before`: the filters of
        whoever handles what is dropped here. `overhear` is told what is said on the marker topic and is no
        token that is looked out for.
        """
        self.session = session
        self.mode = mode
        self._counted = 0
        """Messages since the last token."""
        self._settings = settings
        self._topics = topics
        self._take = take
        self._durable = durable
        self._heard_before = heard_before
        self._overhear = overhear
        self._watches: dict[bytes, Watch] = {}
        self._kept: deque[Message] = deque()
        self._going: asyncio.Task[None] | None = None
        self._unfinished = Unfinished(begun, self._acknowledge)
        self._idle = asyncio.Event()
        self._idle.set()
        self._waited = False
        """Whether it was given time to bring to an end what was begun."""
        self._will = will
        self._link = self._new_link()
        self.resumed = False
        """Whether the broker had kept the session."""

    def _new_link(self) -> Link:
        return Link(self._settings, self.session, self._receive, durable=self._durable, will=self._will)

    @property
    def alive(self) -> bool:
        """Whether it is connected."""
        return self._link.alive

    @property
    def kept(self) -> int:
        """How many messages it keeps."""
        return len(self._kept)

    @property
    def unfinished(self) -> int:
        """How many messages are being worked on."""
        return len(self._unfinished) + (not self._idle.is_set())

    @property
    def lost(self) -> asyncio.Event:
        """Set when the connection is gone."""
        return self._link.lost

    @property
    def reason(self) -> str:
        """Why it is gone."""
        return self._link.reason

    async def open(self, *, fresh: bool, known: Sequence[str] = (), spare: bool = False) -> None:
        """Connect and subscribe. `known`: what the session is said to be subscribed to, if the broker has kept it.

        If there is one that should be `fresh` it is ended first, or, to `spare` it, left as it is. Raises `LinkError`.
        """
        try:
            self.resumed = await self._link.open()
            if fresh and self.resumed and spare:
                raise LinkError(f"broker {self._settings.broker} has a session {self.session} already")
            if fresh and self.resumed:
                await self._begin_anew()
            wanted = self.filters
            there = known if self.resumed else ()
            # MQTT 5 doesn't send retained messages again for what is subscribed to already; 3.1.1 would
            new = wanted if self._settings.v5 else [each for each in wanted if each not in there]
            if new:
                await self._link.subscribe(new, self._settings.qos)
            # not before: a message that both match would fall between
            gone = [each for each in there if each not in wanted]
            if gone:
                await self._link.unsubscribe(gone)
        except BaseException:
            self.mode = Mode.STOP
            await self._link.close(keep=spare or not fresh)
            raise

    async def _begin_anew(self) -> None:
        """What a crash has left of a session is forgotten by ending it; MQTT has no other way that lasts (`client`)."""
        mode, self.mode = self.mode, Mode.STOP
        await self._link.close()
        self._link, self.mode = self._new_link(), mode
        self.resumed = await self._link.open()
        if self.resumed:
            raise LinkError(f"broker {self._settings.broker} does not let go of session {self.session}")

    @property
    def filters(self) -> list[str]:
        """What it subscribes to."""
        return [*map(self._topics.subscribed, self._topics.stream), self._topics.marker]

    # ------------------------------------------------------------------------------------------------- messages

    async def _receive(self, message: Message) -> None:
        if self._going is not None and not self._going.done():
            self._kept.append(message)  # behind what was kept, a token as well
        else:
            await self._sort(message)

    async def _sort(self, message: Message) -> None:
        topic = message.topic.value
        payload = message.payload if isinstance(message.payload, bytes) else bytes(message.payload)
        if topic == self._topics.marker:
            self._acknowledge_in_turn(message)
            self._line_up(payload)
            return
        if self._watches and self._is_probe(topic, payload):
            self._acknowledge_in_turn(message)
            return
        self._counted += not message.retain
        if self.mode is Mode.RUN:
            await self._handle(message, topic, payload)
        elif self.mode is Mode.WAIT or self._is_new(message, topic):
            self._kept.append(message)
        elif self.mode is Mode.DROP:
            self._link.acknowledge(message)

    def _acknowledge(self, message: Message) -> None:
        self._link.acknowledge(message)  # whichever it is now

    def _acknowledge_in_turn(self, message: Message) -> None:
        """A token or a probe may be far behind what isn't handled here. mosquitto 2.0, when one beyond its window of 20 is
        acknowledged before those, lets the next message that comes pass all that wait: handlers would see that one first.
        """
        if self.mode is Mode.WAIT and self._kept:
            self._kept.append(message)
        elif self.mode is not Mode.STOP:  # to whoever goes on with the session it means nothing
            self._link.acknowledge(message)

    async def _handle(self, message: Message, topic: str, payload: bytes) -> None:
        self._idle.clear()
        try:
            rest = await self._take(topic, payload, message.retain)
            if rest is None:
                self._link.acknowledge(message)
            else:
                await self._unfinished.add(rest, message)
        finally:
            self._idle.set()

    def _is_new(self, message: Message, topic: str) -> bool:
        """Whether it is a retained message that nobody has handled, since nobody had subscribed to it."""
        return (
            self.mode is Mode.DROP
            and bool(message.retain)
            and not any(matches(each, topic) for each in self._heard_before)
        )

    def _line_up(self, token: bytes) -> None:
        watch = self._watches.get(token)
        if watch is None:
            if self._overhear is not None:
                self._overhear(token)
            return
        watch.counted, self._counted = self._counted, 0
        if watch.then is not None:
            self.mode = watch.then
        watch.seen.set()

    def _is_probe(self, topic: str, payload: bytes) -> bool:
        for watch in self._watches.values():
            if watch.token in payload and _PROBE in payload:
                watch.probes.add(topic)
                return True
        return False

    # ------------------------------------------------------------------------------------------------ the barrier

    def watch(self, token: str, then: Mode | None = None) -> Watch:
        """Look out for a token."""
        watch = Watch(token, then)
        self._watches[watch.token] = watch
        return watch

    def unwatch(self, watch: Watch) -> None:
        """It isn't of interest any more."""
        self._watches.pop(watch.token, None)

    def go(self, take: Take | None = None) -> None:
        """Handle what was kept, in order, and then what comes; `take` does it, if somebody else is to."""
        self._take = take or self._take
        self.mode = Mode.RUN
        self._going = asyncio.create_task(self._catch_up())

    async def _catch_up(self) -> None:
        while self._kept and self.mode is Mode.RUN:
            try:
                await self._sort(self._kept.popleft())
            except Exception:  # noqa: BLE001 - the next message is handled all the same
                _log.exception("event=hsp-receive-failed")

    # ---------------------------------------------------------------------------------------------------- leaving

    async def halt(self) -> None:
        """Begin nothing more, and wait for the message that is being handled, `drain_timeout_s` at most.

        Then the session may go: work that lasts longer is written down.
        """
        self.mode = Mode.STOP
        await self._drained(self._between_messages())
        await self._unfinished.write_down()

    async def stop(self) -> None:
        """Begin nothing more, and wait for all that was begun, `drain_timeout_s` at most, once."""
        self.mode = Mode.STOP
        if not self._waited:
            self._waited = True
            await self._drained(self._at_rest())

    async def _drained(self, done: Coroutine[Any, Any, None]) -> None:
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await done
        except TimeoutError:
            _log.warning("event=hsp-unfinished seconds=%g", self._settings.drain_timeout_s)

    async def _between_messages(self) -> None:
        if self._going is not None:
            await asyncio.wait({self._going})
        await self._idle.wait()

    async def _at_rest(self) -> None:
        await self._between_messages()
        await self._unfinished.done()

    async def drain(self, mark: Mark, timeout_s: float) -> None:
        """Handle all that the broker has passed on until now, and begin nothing after it. Raises `LinkError`."""
        watch = self.watch(uuid.uuid4().hex, Mode.STOP)
        try:
            async with asyncio.timeout(timeout_s):
                await mark(watch.token)
                await first(watch.seen, self.lost)
        except TimeoutError:
            raise BarrierError(
                f"there is more to do than {timeout_s:g} s are enough for, or {self._topics.marker} isn't served"
            ) from None
        finally:
            self.unwatch(watch)
        if not watch.seen.is_set():
            raise LinkError(self.reason)

    async def retire(self, mark: Mark) -> None:
        """Unsubscribe, handle all that had come until then, and end. Raises `LinkError`, and then it has not ended.

        For a session that has no successor: the broker, the name or the way of sharing changes.
        """
        await self._link.unsubscribe(self.filters[:-1])
        await self.drain(mark, self._settings.barrier_timeout_s)
        await self.halt()
        await self.end()

    async def finish(self) -> None:
        """It was lost: handle what has arrived. Should that be delivered again, it is known."""
        await self._link.close(keep=True)
        if self._going is not None:
            _, hanging = await asyncio.wait({self._going}, timeout=self._settings.drain_timeout_s)
            for going in hanging:
                await ended(going)
        self.mode = Mode.STOP

    async def leave(self) -> None:
        """Disconnect; what isn't acknowledged waits in the session."""
        self.mode = Mode.STOP
        await self._link.close(keep=True)

    async def end(self) -> None:
        """Disconnect, and have the broker drop the session."""
        self.mode = Mode.STOP
        await self._link.close(self.filters)


async def first(*events: asyncio.Event) -> None:
    """Wait until one of them is set."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel a task, and wait until it has ended."""
    task.cancel()
    await asyncio.wait({task})

"""`HSPConnector`: the agent that the service is for others, over an MQTT broker, or in the process while there is none.

What it says goes out through `correspondence`, what it hears comes in through `holder` and `inbox`. One worker of the generation is activated and holds the agent's subscription; all of them may publish and request. How a
subscription passes on without losing a message is said in `subscription`. aiomqtt is imported once a broker is configured.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from segue.worker.backend.hsp import envelope as envelopes
from segue.worker.backend.hsp import payloads
from segue.worker.backend.hsp.continuity import Continuity, Handler, Offer, TaskHandler
from segue.worker.backend.hsp.correspondence import Correspondence
from segue.worker.backend.hsp.elsewhere import connected_elsewhere
from segue.worker.backend.hsp.envelope import Envelope
from segue.worker.backend.hsp.errors import HSPError, LinkError
from segue.worker.backend.hsp.inbox import Inbox
from segue.worker.backend.hsp.payloads import Advertisement, Capability, TaskResult
from segue.worker.backend.hsp.peers import Peer, Peers
from segue.worker.backend.hsp.records import Records
from segue.worker.backend.hsp.seen import Seen
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.topics import Topics

if TYPE_CHECKING:
    from segue.worker.backend.hsp.holder import Holder
    from segue.worker.backend.hsp.mailbox import Mailbox

_log = logging.getLogger("segue.hsp")

_FLUSH_S = 2.0
"""How long a publish in flight, or what was kept, may take when a connector leaves."""
_LOOK_AGAIN_S = 5.0
"""How often it looks for what nobody tells."""
_Status = Literal["online", "offline"]
_FALLBACK = "embedded fallback: messages stay in this process"


class Learning(Protocol):
    """What remembers other agents: `segue.worker.backend.learning.LearningManager`."""

    @property
    def peers(self) -> Peers:
        """Those that are known."""


class _OwnLearning:
    """Where there is no such service."""

    def __init__(self) -> None:
        self.peers = Peers()


class HSPConnector:
    """Speaks for the agent in this process."""

    def __init__(
        self,
        settings: HSPSettings,
        previous: HSPConnector | None = None,
        learning: Learning | None = None,
    ) -> None:
        self.settings = settings
        self.learning: Learning = learning or (previous.learning if previous else _OwnLearning())
        self._known: Continuity = previous._known if previous else Continuity(Seen(settings.dedupe_window))
        self._topics = Topics.of(settings, uuid.uuid4().hex[:8])
        self._records = Records(settings, self._topics.instance)
        self._inbox = Inbox(
            settings,
            self._topics,
            self._known,
            self._answer,
            heard=self._heard,
            acknowledged=self._acknowledged,
            resolved=self._resolved,
        )
        self._letters = Correspondence(
            settings, self._topics, self._records, self._inbox.receive, self._answered
        )
        self._mailbox: Mailbox | None = None
        self._holder: Holder | None = None
        """Both are there if, and only if, a broker is configured."""
        self._previous = previous
        self._heir: HSPConnector | None = None
        self._active = False
        self._closed = False
        self._said: list[Capability] = []
        """What was advertised last."""
        self._tasks: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------------------------------------------ verbs

    async def start(self) -> None:
        """Connect; without a broker, work in the process until it is there.

        Beside a connector that is connected, in this process or in the generation that serves, it has to do as well as
        that: raises `LinkError` if the broker can't be reached, refuses, or grants what it doesn't serve, and in this
        process also if the two can't be lined up.
        """
        self._spawn(self._letters.outbox.retry())
        self._spawn(self._look_again())
        previous = self._previous
        if self.settings.host:
            await self._connect(previous is not None and previous.connected)
        if previous is not None:
            if self._holder is not None and previous._holder is not None:
                await self._holder.prepare_beside(previous._holder)
            previous._heir = self

    async def _connect(self, must: bool) -> None:
        from segue.worker.backend.hsp.holder import Holder
        from segue.worker.backend.hsp.mailbox import Mailbox

        mailbox = Mailbox(self.settings, self._topics, self._inbox.receive, self._on_connected)
        will = self._letters.encoded(self._advertisement("offline"))
        self._mailbox = self._letters.mailbox = mailbox
        self._holder = Holder(
            self.settings,
            self._topics,
            self._known,
            mailbox,
            self._inbox,
            will,
            self._advertise,
            lambda: not self._active and not self._closed and self._heir is None,
        )
        beside = must or (self._previous is None and await connected_elsewhere())
        try:
            await mailbox.open()
            if self._previous is None:
                await self._holder.try_out(compare=beside)
                if beside:
                    await self._holder.reserve()
        except LinkError as error:
            if beside:
                raise
            _log.warning("event=hsp-fallback reason=%s", error)
        mailbox.keep()

    async def activate(self) -> None:
        """Hold the agent's subscription. If the broker isn't there, as soon as it is."""
        self._active = True
        self._known.seen.attach(self._records.window, self.settings.dedupe_window)
        before = self._records.begin()
        if before is not None:
            self._known.seen.learn(before)
        await self._go_on_with_what_is_left()
        if self._holder is not None:
            await self._take_over_from_skipped(self._holder)
            await self._holder.hold()

    async def _go_on_with_what_is_left(self) -> None:
        """What another process has begun, and may not be with the broker any more."""
        begun = self._known.begun
        left = begun.attach(self._records.begun)
        for each in left:
            begun.until_done(each.path, await self._inbox.receive(each.topic, each.payload, False))
        if left:
            _log.info("event=hsp-tasks-resumed count=%d", len(left))

    async def _take_over_from_skipped(self, holder: Holder) -> None:
        """Those before it that were replaced before they came to be activated."""
        each = self._previous
        while each is not None:
            if each._holder is not None:
                await each._holder.skip(holder)
            each = each._previous

    async def deactivate(self) -> None:
        """Begin nothing more, and leave the subscription where the next one goes on with it."""
        self._active = False
        heir = self._heir
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await self._letters.outbox.drained()
        if self._holder is not None:
            if heir is not None and heir._holder is None:
                await self._holder.retire()
            else:
                await self._holder.pass_on(heir._holder if heir is not None else None)
        self._records.end()
        if heir is None:
            self._known.seen.detach()
        elif self._is_other_agent(heir):
            await self._say_goodbye()

    async def close(self) -> None:
        """The end. What it hasn't brought to one, its successor goes on with, if there is one."""
        if self._closed:
            return
        self._closed, self._active = True, False
        heir, previous = self._heir, self._previous
        if previous is not None and previous._heir is self:
            previous._heir = None
        if self._holder is not None:
            await self._holder.close(previous._holder if previous is not None else None)
        if heir is not None:
            heir._inbox.adopt(self._inbox)
            heir._previous = None
            await self._letters.pass_on(heir._letters)
        else:
            await self._inbox.finish(self.settings.drain_timeout_s)
            await self._letters.finish(_FLUSH_S, self._say_goodbye if previous is None else None)
        for task in list(self._tasks):
            task.cancel()
            await asyncio.wait({task})
        if self._mailbox is not None:
            await self._mailbox.close()
        if heir is None and previous is None:
            self._known.seen.detach()
        self._records.close()
        self._previous = None

    def health(self) -> dict[str, Any]:
        """Not good while a broker that is configured can't be used; a new one is judged by its start."""
        reason = self._reason()
        return {
            "ok": reason is None or not self._active,
            "reason": reason,
            "kind": _FALLBACK if not self.connected else f"MQTT {self.settings.mqtt_version}",
            "broker": self.settings.broker if self.settings.host else "",
            "ai_id": self._topics.ai_id,
            "problems": list(self._known.problems),
        }

    def metrics(self) -> dict[str, Any]:
        """Of the connector that holds the subscription."""
        counts = self._known.counts
        return {
            "hsp_available": True,
            "is_connected": self._reason() is None and self._mailbox is not None,
            "fallback_enabled": not self.connected,
            "pending_acks_count": self._letters.outbox.pending,
            "retry_counts_active": self._letters.outbox.retrying,
            "received": counts.received,
            "handled": counts.handled,
            "invalid": counts.invalid,
            "duplicates": counts.duplicates,
            "handler_errors": counts.handler_errors,
            "tasks_done": counts.tasks,
            "tasks_running": self._inbox.tasks,
            "tasks_written_down": len(self._known.begun),
            "tasks_exposed": self._known.begun.exposed,
            "requests_waiting": len(self._letters.requests),
            "published": self._letters.outbox.published,
            "unacknowledged": self._letters.outbox.unacknowledged,
            "unsent": self._letters.outbox.unsent,
            "dropped": self._letters.outbox.dropped,
            "breakers_open": self._letters.outbox.breakers.open,
            "delivered_here": self._letters.fallback.delivered,
            "connections": self._mailbox.connections if self._mailbox else 0,
            "gaps": counts.gaps,
            "peers": len(self.learning.peers),
        }

    # ------------------------------------------------------------------------------------------------ what it does

    @property
    def connected(self) -> bool:
        """Whether there is a broker to publish to."""
        return self._letters.connected

    @property
    def ai_id(self) -> str:
        """The agent's name."""
        return self._topics.ai_id

    @property
    def capabilities(self) -> list[Capability]:
        """What it does for others."""
        return list(self._known.offered().values())

    @property
    def peers(self) -> list[Peer]:
        """The other agents that are known."""
        return self.learning.peers.all()

    async def publish_fact(
        self, topic_suffix: str, payload: Mapping[str, Any], *, requires_ack: bool = False
    ) -> str:
        """Tell all agents something; its message id. While the broker isn't there it waits, and is told in the process.

        With `requires_ack` it is sent again until somebody acknowledges it. Raises `HSPError`.
        """
        return await self._letters.tell(topic_suffix, payload, requires_ack=requires_ack)

    async def request_task(
        self,
        capability: str,
        payload: Mapping[str, Any],
        recipient: str | None = None,
        timeout_s: float = 30.0,
    ) -> dict[str, Any]:
        """Have another agent do something, and wait for the payload of its result.

        Without a recipient: one that is known to be able to, else whoever is. Raises `HSPError`: 404 when it can't do
        that, 502 when it fails to, 504 when there is no answer within `timeout_s`.
        """
        recipient = self.learning.peers.able(capability) if recipient is None else recipient
        return await self._letters.ask(capability, payload, recipient, timeout_s)

    def on(self, message_type: str, handler: Handler) -> Callable[[], None]:
        """Have `handler` called with each message of a type; returns what ends that. It goes on over swaps."""
        handlers = self._known.handlers.setdefault(message_type, [])
        handlers.append(handler)

        def end() -> None:
            if handler in handlers:
                handlers.remove(handler)

        return end

    def serve(self, capability: str, handler: TaskHandler, description: str = "") -> Callable[[], None]:
        """Do tasks for others with `handler`, and advertise that; returns what ends it. It goes on over swaps.

        After a crash, a task that was begun may be begun again.
        """
        self._known.served[capability] = handler
        self._known.capabilities[capability] = Capability(capability, description)
        self._advertise_soon()

        def end() -> None:
            if self._known.served.get(capability) is handler:
                del self._known.served[capability]
                self._known.capabilities.pop(capability, None)
                self._advertise_soon()

        return end

    def offer(self, offer: Offer) -> None:
        """Do what `offer` says, beside what is served, and advertise that. It goes on over swaps."""
        self._known.offer = offer
        self._advertise_soon()

    # ----------------------------------------------------------------------------------------------------- inside

    async def _on_connected(self) -> None:
        self._spawn(self._after_connecting())

    async def _after_connecting(self) -> None:
        if self._holder is not None:
            self._holder.recruiting.present()
        await self._letters.outbox.flush()
        await self._letters.resume()
        if self._active and self._holder is not None:
            await self._holder.appear()

    def _advertisement(self, status: _Status) -> Envelope:
        # at the end there may be nobody left to ask
        self._said = self.capabilities if status == "online" else []
        said = Advertisement(self._topics.ai_id, tuple(self._said), status)
        return envelopes.envelope(envelopes.ADVERTISEMENT, payloads.written(said), sender=self._topics.ai_id)

    async def _advertise(self) -> None:
        if self._active and self.connected:  # else it is said with the next connection
            await self._say("online")

    async def _say(self, status: _Status) -> None:
        with contextlib.suppress(HSPError):  # who may not be heard isn't kept from working
            await self._letters.say(self._topics.advertisement, self._advertisement(status), retain=True)

    async def _look_again(self) -> None:
        """What it can do may change, and another process leave something undone, without anybody saying so."""
        while True:
            await asyncio.sleep(_LOOK_AGAIN_S)
            if self._active and self.connected:
                await self._letters.resume()
                if self._said != self.capabilities:
                    await self._say("online")

    def _advertise_soon(self) -> None:
        self._spawn(self._advertise())

    async def _answer(self, topic: str, message: Envelope) -> None:
        await self._letters.answer(topic, message)

    def _acknowledged(self, message_id: str) -> None:
        if not self._letters.outbox.acknowledged(message_id) and self._heir is not None:
            self._heir._acknowledged(message_id)

    def _resolved(self, result: TaskResult) -> None:
        self._letters.requests.resolve(result)

    def _heard(self, advertisement: Advertisement) -> None:
        if advertisement.ai_id != self.ai_id:
            self.learning.peers.heard(advertisement)
        elif advertisement.availability_status == "offline" and self._active:
            # the broker says so of a connection that a process had which has died
            self._advertise_soon()

    def _answered(self, ai_id: str, ok: bool, seconds: float) -> None:
        self.learning.peers.answered(ai_id, ok, seconds)

    def _is_other_agent(self, heir: HSPConnector) -> bool:
        """Whether nobody speaks for this agent any more once the other one does."""
        before, now = self._holder, heir._holder
        return before is not None and (now is None or now.place != before.place)

    async def _say_goodbye(self) -> None:
        """Unless somebody else has taken over."""
        seat = self._mailbox.seat if self._mailbox is not None else None
        if self.connected and seat is not None and seat.holder == self._topics.instance:
            await self._say("offline")

    def _reason(self) -> str | None:
        """Why it does not do all that it should."""
        if self._mailbox is None or self._holder is None:
            return None
        if not self._mailbox.connected:
            return self._mailbox.reason or "it is not connected"
        return self._holder.reason

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("event=hsp-failed", exc_info=error)

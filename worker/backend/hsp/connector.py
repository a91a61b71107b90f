"""`HSPConnector`: the agent that the service is for others, over an MQTT broker, or in the process while there is none.

One worker of the generation is activated and holds the agent's subscription; all of them may publish and request. How a
subscription passes on without losing a message is said in `subscription`. aiomqtt is imported once a broker is configured.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import uuid
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from segue.worker.backend.hsp import envelope as envelopes
from segue.worker.backend.hsp import payloads
from segue.worker.backend.hsp.continuity import Continuity, Handler, Offer, TaskHandler
from segue.worker.backend.hsp.elsewhere import connected_elsewhere
from segue.worker.backend.hsp.envelope import Envelope, QoSParameters
from segue.worker.backend.hsp.errors import HSPError, InvalidMessageError, LinkError
from segue.worker.backend.hsp.fallback import Fallback
from segue.worker.backend.hsp.inbox import Inbox
from segue.worker.backend.hsp.outbox import Letter, Outbox
from segue.worker.backend.hsp.payloads import Advertisement, Capability, TaskRequest
from segue.worker.backend.hsp.peers import Peer, Peers
from segue.worker.backend.hsp.requests import Requests
from segue.worker.backend.hsp.seen import Seen
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.spool import Spool
from segue.worker.backend.hsp.topics import Topics
from segue.worker.backend.places import state_directory

if TYPE_CHECKING:
    from segue.worker.backend.hsp.holder import Holder
    from segue.worker.backend.hsp.mailbox import Mailbox

_log = logging.getLogger("segue.hsp")

_FLUSH_S = 2.0
"""How long a publish in flight, or what was kept, may take when a connector leaves."""
_LOOK_AGAIN_S = 5.0
"""How often it looks for what nobody tells."""
_MAX_TIMEOUT_S = 3600.0
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
        self._requests = Requests(self._answered)
        self._inbox = Inbox(
            settings,
            self._topics,
            self._known,
            self._answer,
            heard=self._heard,
            acknowledged=self._acknowledged,
            resolved=self._requests.resolve,
        )
        self._outbox = Outbox(settings, self._send, lambda: self.connected, self._deliver_here)
        self._fallback = Fallback(self._topics, self._inbox.receive)
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
        that: raises `LinkError` if the broker can't be reached or refuses, and in this process also if it grants what it
        doesn't serve, or if the two can't be lined up.
        """
        self._spawn(self._outbox.retry())
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
        will = self._encoded(self._advertisement("offline"))
        self._mailbox = mailbox
        self._holder = Holder(
            self.settings, self._topics, self._known, mailbox, self._inbox, will, self._advertise
        )
        try:
            await mailbox.open()
            if self._previous is None:
                await self._holder.try_out()
        except LinkError as error:
            if must or (self._previous is None and await connected_elsewhere()):
                raise
            _log.warning("event=hsp-fallback reason=%s", error)
        mailbox.keep()

    async def activate(self) -> None:
        """Hold the agent's subscription. If the broker isn't there, as soon as it is."""
        self._active = True
        self._known.seen.attach(self._window(), self.settings.dedupe_window)
        if self._holder is not None:
            await self._holder.hold()

    async def deactivate(self) -> None:
        """Begin nothing more, and leave the subscription where the next one goes on with it."""
        self._active = False
        heir = self._heir
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await self._outbox.drained()
        if self._holder is not None:
            if heir is not None and heir._holder is None:
                await self._holder.retire()
            else:
                await self._holder.pass_on(heir._holder if heir is not None else None)
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
        else:
            await self._inbox.finish(self.settings.drain_timeout_s)
        await self._fallback.close()
        self._requests.fail_all(HSPError(503, "the connector was closed before the result came"))
        if heir is not None:
            heir._outbox.adopt(self._outbox, heir._readdress)
            await heir._outbox.flush()
        else:
            await self._send_the_rest(last=previous is None)
        for task in list(self._tasks):
            task.cancel()
            await asyncio.wait({task})
        if self._mailbox is not None:
            await self._mailbox.close()
        if heir is None and previous is None:
            self._known.seen.detach()
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
            "pending_acks_count": self._outbox.pending,
            "retry_counts_active": self._outbox.retrying,
            "received": counts.received,
            "handled": counts.handled,
            "invalid": counts.invalid,
            "duplicates": counts.duplicates,
            "handler_errors": counts.handler_errors,
            "tasks_done": counts.tasks,
            "tasks_running": self._inbox.tasks,
            "requests_waiting": len(self._requests),
            "published": self._outbox.published,
            "unacknowledged": self._outbox.unacknowledged,
            "unsent": self._outbox.unsent,
            "dropped": self._outbox.dropped,
            "breakers_open": self._outbox.breakers.open,
            "delivered_here": self._fallback.delivered,
            "connections": self._mailbox.connections if self._mailbox else 0,
            "gaps": counts.gaps,
            "peers": len(self.learning.peers),
        }

    # ------------------------------------------------------------------------------------------------ what it does

    @property
    def connected(self) -> bool:
        """Whether there is a broker to publish to."""
        return self._mailbox is not None and self._mailbox.connected

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
        try:
            topic = self._topics.fact(topic_suffix)
        except ValueError as error:
            raise HSPError(400, str(error)) from None
        message = envelopes.envelope(
            envelopes.FACT,
            dict(payload),
            sender=self._topics.ai_id,
            qos=self._wants(requires_ack),
        )
        await self._outbox.post(self._letter(topic, message))
        return message.message_id

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
        if not 0 < timeout_s <= _MAX_TIMEOUT_S:
            raise HSPError(400, f"timeout takes seconds above 0, up to {_MAX_TIMEOUT_S:g}")
        if recipient is not None and (not recipient or len(recipient) > 128 or set(recipient) & set("/+#\0")):
            raise HSPError(400, f"{recipient!r} is no name of an agent")
        recipient = recipient or self.learning.peers.able(capability)
        request = TaskRequest(
            uuid.uuid4().hex, self._topics.ai_id, capability, dict(payload), self._topics.results
        )
        try:
            said = payloads.written(request)
        except InvalidMessageError as error:
            raise HSPError(400, str(error)) from None
        message = envelopes.envelope(
            envelopes.TASK_REQUEST,
            said,
            sender=self._topics.ai_id,
            recipient=recipient,
            pattern="request",
            correlation=request.request_id,
            # of all who hear it, those would acknowledge it, too, who can't do it
            qos=self._wants(recipient is not None),
        )
        letter = self._letter(self._topics.request(recipient), message)
        letter.given_up = lambda reason: self._requests.fail(request.request_id, HSPError(504, reason))
        result = self._requests.expect(request.request_id)
        try:
            async with asyncio.timeout(timeout_s):
                await self._outbox.post(letter)
                return await result
        except TimeoutError:
            who = recipient or "nobody"
            raise HSPError(504, f"{who} has not done {capability!r} within {timeout_s:g} s") from None
        finally:
            self._outbox.forget(letter.id)
            self._requests.forget(request.request_id)

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
        await self._outbox.flush()
        await self._resume_letters()
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
            await self._outbox.post(
                self._letter(self._topics.advertisement, self._advertisement(status), retain=True)
            )

    async def _look_again(self) -> None:
        """What it can do may change, and another process leave something undone, without anybody saying so."""
        while True:
            await asyncio.sleep(_LOOK_AGAIN_S)
            if self._active and self.connected:
                await self._resume_letters()
                if self._said != self.capabilities:
                    await self._say("online")

    def _advertise_soon(self) -> None:
        self._spawn(self._advertise())

    def _wants(self, requires_ack: bool) -> QoSParameters:
        return QoSParameters(
            requires_ack=requires_ack, ack_address=self._topics.acknowledgements if requires_ack else None
        )

    def _encoded(self, message: Envelope) -> bytes:
        return envelopes.encode(message, self.settings.max_message_bytes)

    def _letter(self, topic: str, message: Envelope, *, retain: bool = False) -> Letter:
        try:
            return Letter(topic, message, self._encoded(message), retain=retain)
        except InvalidMessageError as error:
            raise HSPError(400, f"it is no valid message: {error}") from None

    async def _answer(self, topic: str, message: Envelope) -> None:
        if self._closed and self._heir is not None:  # a task that has outlived this connector
            await self._heir._answer(topic, message)
            return
        await self._outbox.post(Letter(topic, message, self._encoded(message)))

    async def _send(self, letter: Letter) -> None:
        if self._mailbox is None:
            raise LinkError("no broker is configured")
        await self._mailbox.publish(letter.topic, letter.data, retain=letter.retain)

    def _deliver_here(self, letter: Letter) -> None:
        self._fallback.deliver(letter.topic, letter.data)

    def _heard(self, advertisement: Advertisement) -> None:
        self.learning.peers.heard(advertisement)

    def _answered(self, ai_id: str, ok: bool, seconds: float) -> None:
        self.learning.peers.answered(ai_id, ok, seconds)

    def _acknowledged(self, message_id: str) -> None:
        if not self._outbox.acknowledged(message_id) and self._heir is not None:
            self._heir._acknowledged(message_id)

    def _readdress(self, letter: Letter) -> None:
        """The one whom it was to be acknowledged to is gone."""
        letter.envelope = msgspec.structs.replace(letter.envelope, qos_parameters=self._wants(True))
        letter.data = self._encoded(letter.envelope)

    async def _send_the_rest(self, *, last: bool) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                seat = self._mailbox.seat if self._mailbox is not None else None
                if last and seat is not None and seat.holder == self._topics.instance:
                    await self._say_goodbye()  # nobody has taken over
                await self._outbox.flush()
                await self._outbox.drained()
        letters = self._outbox.unfinished() if self.settings.host else []
        try:
            self._spool().leave(letters)
        except OSError as error:
            _log.error("event=hsp-unsent count=%d reason=%s", len(letters), error)

    async def _resume_letters(self) -> None:
        """What a process before could not bring to an end."""
        letters = self._spool().take(self.settings.max_message_bytes)
        for letter in letters:
            if letter.wants_answer:
                self._readdress(letter)
        self._outbox.resume(letters)
        if letters:
            await self._outbox.flush()

    def _is_other_agent(self, heir: HSPConnector) -> bool:
        """Whether nobody speaks for this agent any more once the other one does."""
        before, now = self._holder, heir._holder
        return before is not None and (now is None or now.place != before.place)

    async def _say_goodbye(self) -> None:
        if self.connected:
            await self._say("offline")

    def _reason(self) -> str | None:
        """Why it does not do all that it should."""
        if self._mailbox is None or self._holder is None:
            return None
        if not self._mailbox.connected:
            return self._mailbox.reason or "it is not connected"
        return self._holder.reason

    def _spool(self) -> Spool:
        return Spool(self._window().with_suffix(""), self._topics.instance)

    def _window(self) -> Path:
        name = "\0".join((self.settings.broker, self.settings.topic_prefix, self._topics.ai_id))
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        try:
            return state_directory() / "hsp" / f"{digest}.seen"
        except OSError as error:
            _log.warning("event=hsp-window-not-kept reason=%s", error)
            return Path("/dev/null/hsp")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("event=hsp-failed", exc_info=error)

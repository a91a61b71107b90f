"""What an agent says to others, on its way until it has arrived or is given up: facts, requests, answers.

To the broker; while there is none, in the process. What a connector hasn't brought to an end its successor goes on with, in
this process or in the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from segue.worker.backend.hsp import envelope as envelopes
from segue.worker.backend.hsp import payloads
from segue.worker.backend.hsp.envelope import Envelope, QoSParameters
from segue.worker.backend.hsp.errors import HSPError, InvalidMessageError, LinkError
from segue.worker.backend.hsp.fallback import Fallback
from segue.worker.backend.hsp.outbox import Letter, Outbox
from segue.worker.backend.hsp.payloads import TaskRequest
from segue.worker.backend.hsp.records import Records
from segue.worker.backend.hsp.requests import Requests
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.topics import Topics

if TYPE_CHECKING:
    from segue.worker.backend.hsp.mailbox import Mailbox

_log = logging.getLogger("segue.hsp")

_MAX_TIMEOUT_S = 3600.0


class Correspondence:
    """Of one connector."""

    def __init__(
        self,
        settings: HSPSettings,
        topics: Topics,
        records: Records,
        receive: Callable[[str, bytes, bool], Awaitable[object]],
        answered: Callable[[str, bool, float], object],
    ) -> None:
        """`receive` is given what stays in the process; `answered` is told who has answered a request, whether with a
        result, and after how many seconds.
        """
        self.mailbox: Mailbox | None = None
        """Where it goes out; None: there is no broker."""
        self.outbox = Outbox(settings, self._send, lambda: self.connected, self._deliver_here)
        self.requests = Requests(answered)
        self.fallback = Fallback(topics, receive)
        self._settings = settings
        self._topics = topics
        self._records = records
        self._heir: Correspondence | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a broker to publish to."""
        return self.mailbox is not None and self.mailbox.connected

    # ------------------------------------------------------------------------------------------------ what is said

    async def tell(self, topic_suffix: str, payload: Mapping[str, Any], *, requires_ack: bool) -> str:
        """`HSPConnector.publish_fact`."""
        try:
            topic = self._topics.fact(topic_suffix)
        except ValueError as error:
            raise HSPError(400, str(error)) from None
        message = envelopes.envelope(
            envelopes.FACT, dict(payload), sender=self._topics.ai_id, qos=self.wants(requires_ack)
        )
        await self.outbox.post(self.letter(topic, message))
        return message.message_id

    async def ask(
        self, capability: str, payload: Mapping[str, Any], recipient: str | None, timeout_s: float
    ) -> dict[str, Any]:
        """`HSPConnector.request_task`; without a recipient: whoever can."""
        if not 0 < timeout_s <= _MAX_TIMEOUT_S:
            raise HSPError(400, f"timeout takes seconds above 0, up to {_MAX_TIMEOUT_S:g}")
        if recipient is not None and (not recipient or len(recipient) > 128 or set(recipient) & set("/+#\0")):
            raise HSPError(400, f"{recipient!r} is no name of an agent")
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
            qos=self.wants(recipient is not None),
        )
        letter = self.letter(self._topics.request(recipient), message)
        letter.given_up = lambda reason: self.requests.fail(request.request_id, HSPError(504, reason))
        result = self.requests.expect(request.request_id)
        try:
            async with asyncio.timeout(timeout_s):
                await self.outbox.post(letter)
                return await result
        except TimeoutError:
            who = recipient or "nobody"
            raise HSPError(504, f"{who} has not done {capability!r} within {timeout_s:g} s") from None
        finally:
            self.outbox.forget(letter.id)
            self.requests.forget(request.request_id)

    async def say(self, topic: str, message: Envelope, *, retain: bool = False) -> None:
        """Raises `HSPError`."""
        await self.outbox.post(self.letter(topic, message, retain=retain))

    async def answer(self, topic: str, message: Envelope) -> None:
        """For what others have sent; a task may have outlived this connector. Raises `HSPError`, `InvalidMessageError`."""
        if self._heir is not None:
            await self._heir.answer(topic, message)
        else:
            await self.outbox.post(Letter(topic, message, self.encoded(message)))

    def wants(self, requires_ack: bool) -> QoSParameters:
        """How a message of this connector wants to be treated."""
        return QoSParameters(
            requires_ack=requires_ack, ack_address=self._topics.acknowledgements if requires_ack else None
        )

    def letter(self, topic: str, message: Envelope, *, retain: bool = False) -> Letter:
        """A message on its way. Raises `HSPError`."""
        try:
            return Letter(topic, message, self.encoded(message), retain=retain)
        except InvalidMessageError as error:
            raise HSPError(400, f"it is no valid message: {error}") from None

    def encoded(self, message: Envelope) -> bytes:
        """As it goes out. Raises `InvalidMessageError`."""
        return envelopes.encode(message, self._settings.max_message_bytes)

    async def _send(self, letter: Letter) -> None:
        if self.mailbox is None:
            raise LinkError("no broker is configured")
        await self.mailbox.publish(letter.topic, letter.data, retain=letter.retain)

    def _deliver_here(self, letter: Letter) -> None:
        self.fallback.deliver(letter.topic, letter.data)

    # ------------------------------------------------------------------------------------------------- going on

    async def resume(self) -> None:
        """Go on with what a process before could not bring to an end."""
        letters = self._records.spool.take(self._settings.max_message_bytes)
        for letter in letters:
            if letter.wants_answer:
                self._readdress(letter)
        self.outbox.resume(letters)
        if letters:
            await self.outbox.flush()

    async def pass_on(self, heir: Correspondence) -> None:
        """The end; `heir` goes on with it."""
        await self._close()
        self._heir = heir
        heir.outbox.adopt(self.outbox, heir._readdress)
        await heir.outbox.flush()

    async def finish(self, timeout_s: float, last: Callable[[], Awaitable[None]] | None) -> None:
        """The end: say `last`, send what can still be sent, and leave the rest to the next process."""
        await self._close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                if last is not None:
                    await last()
                await self.outbox.flush()
                await self.outbox.drained()
        letters = self.outbox.unfinished() if self._settings.host else []
        try:
            self._records.spool.leave(letters)
        except OSError as error:
            _log.error("event=hsp-unsent count=%d reason=%s", len(letters), error)

    async def _close(self) -> None:
        await self.fallback.close()
        self.requests.fail_all(HSPError(503, "the connector was closed before the result came"))

    def _readdress(self, letter: Letter) -> None:
        """The one whom it was to be acknowledged to is gone."""
        letter.envelope = msgspec.structs.replace(letter.envelope, qos_parameters=self.wants(True))
        letter.data = self.encoded(letter.envelope)

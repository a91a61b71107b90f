"""What comes in: checked, taken once, given to whom it concerns, acknowledged if it asks for that.

Messages are handled one after the other, in the order in which they come; tasks, which may take long, beside one another.
What a handler raises is counted and reported: it must not keep the next message waiting, and trying again would not help.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from segue.worker.backend.hsp import envelope as envelopes
from segue.worker.backend.hsp import payloads
from segue.worker.backend.hsp.continuity import Continuity, Handler, TaskHandler
from segue.worker.backend.hsp.envelope import Envelope
from segue.worker.backend.hsp.errors import HSPError, InvalidMessageError
from segue.worker.backend.hsp.payloads import Acknowledgement, Advertisement, TaskRequest, TaskResult
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.topics import Topics

_log = logging.getLogger("segue.hsp")

Answer = Callable[[str, Envelope], Awaitable[None]]
"""Publishes a message on a topic. Raises `HSPError`."""


class Inbox:
    """Of one connector."""

    def __init__(
        self,
        settings: HSPSettings,
        topics: Topics,
        known: Continuity,
        answer: Answer,
        *,
        heard: Callable[[Advertisement], object],
        acknowledged: Callable[[str], object],
        resolved: Callable[[TaskResult], object],
    ) -> None:
        """`heard` is told what agents say of themselves, `acknowledged` and `resolved` of what this one has waited for."""
        self._settings = settings
        self._topics = topics
        self._known = known
        self._answer = answer
        self._heard = heard
        self._acknowledged = acknowledged
        self._resolved = resolved
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def tasks(self) -> int:
        """How many requests of other agents are being worked on."""
        return len(self._tasks)

    async def receive(self, topic: str, data: bytes, retained: bool) -> asyncio.Future[None] | None:
        """Take a message. What goes on for longer is returned: the message isn't handled before that is done.

        That may be since it came before: the broker delivers it again after a connection was lost.
        """
        counts = self._known.counts
        counts.received += 1
        try:
            message = envelopes.decode(data, self._settings.max_message_bytes)
            payload = self._payload(message)
        except InvalidMessageError as error:
            counts.invalid += 1
            self._known.problem(topic, str(error))
            return None
        if message.recipient_ai_id not in {None, envelopes.ALL, self._topics.ai_id}:
            return None
        if message.message_type == envelopes.PROBE:
            return None
        key = self._known.seen.key(message.sender_ai_id, message.message_id)
        repeated = retained and self._known.is_repeated(topic, message.message_id)
        if repeated or not self._known.seen.claim(key):
            # an advertisement comes again with every connection, and to an old and a new connector alike
            counts.duplicates += not isinstance(payload, Advertisement)
            if not retained:
                await self._acknowledge(message)  # the last one may not have arrived
            return self._known.running.get(key)
        try:
            task = await self._handle(message, payload)
        except BaseException:  # cut off in the middle: whoever gets it next handles it
            self._known.seen.release(key)
            raise
        if task is None:
            self._known.seen.done(key)
            counts.handled += 1
            await self._acknowledge(message)
            return None
        working = self._known.running[key] = asyncio.create_task(self._work(task, message, key))
        working.add_done_callback(lambda _: self._ended(key, working))
        self._keep(working)
        return working

    def _ended(self, key: int, working: asyncio.Task[None]) -> None:
        if self._known.running.get(key) is working:
            del self._known.running[key]

    def _keep(self, working: asyncio.Task[None]) -> None:
        self._tasks.add(working)
        working.add_done_callback(self._tasks.discard)

    def adopt(self, other: Inbox) -> None:
        """Tasks that `other` has begun come to their end here."""
        for working in other._tasks:
            self._keep(working)
        other._tasks = set()

    def _payload(self, message: Envelope) -> Any:
        kind = _KINDS.get(message.message_type)
        payload = payloads.read(kind, message.payload) if kind else message.payload
        if isinstance(payload, Advertisement) and payload.ai_id != message.sender_ai_id:
            raise InvalidMessageError(f"{message.sender_ai_id} advertises as {payload.ai_id}")
        if isinstance(payload, TaskResult) and payload.executing_ai_id != message.sender_ai_id:
            raise InvalidMessageError(f"{message.sender_ai_id} answers as {payload.executing_ai_id}")
        return payload

    async def _handle(self, message: Envelope, payload: Any) -> Coroutine[Any, Any, None] | None:
        if isinstance(payload, Advertisement):
            self._heard(payload)
        elif isinstance(payload, Acknowledgement):
            self._acknowledged(payload.target_message_id)
        elif isinstance(payload, TaskResult):
            self._resolved(payload)
        for handler in tuple(self._known.handlers.get(message.message_type, ())):
            await self._tell(handler, message)
        if isinstance(payload, TaskRequest):
            return await self._begin(message, payload)
        return None

    async def _tell(self, handler: Handler, message: Envelope) -> None:
        try:
            found = handler(message)
            if inspect.isawaitable(found):
                await found
        except Exception as error:  # noqa: BLE001 - a handler may raise what it likes
            self._known.counts.handler_errors += 1
            self._known.problem(message.message_type, f"a handler failed: {type(error).__name__}: {error}")

    # ------------------------------------------------------------------------------------------------------ tasks

    async def _begin(self, message: Envelope, request: TaskRequest) -> Coroutine[Any, Any, None] | None:
        handler = self._known.handler(request.capability)
        if handler is None:
            if message.recipient_ai_id == self._topics.ai_id:
                known = ", ".join(sorted(self._known.offered())) or "none"
                await self._give(
                    request, "rejected", {}, f"no capability {request.capability!r}; known: {known}"
                )
            return None
        if len(self._tasks) >= self._settings.max_tasks:
            # to wait would keep everything else waiting, too
            await self._give(request, "failure", {}, f"busy with {len(self._tasks)} requests; try again")
            return None
        return self._do(handler, request)

    async def _do(self, handler: TaskHandler, request: TaskRequest) -> None:
        self._known.counts.tasks += 1
        try:
            result = dict(await handler(request.parameters))
        except Exception as error:  # noqa: BLE001 - a handler may raise what it likes
            self._known.counts.handler_errors += 1
            self._known.problem(request.capability, f"a task failed: {type(error).__name__}: {error}")
            await self._give(request, "failure", {}, f"{type(error).__name__}: {error}"[:1000])
        else:
            await self._give(request, "success", result, "")

    async def _work(self, task: Coroutine[Any, Any, None], message: Envelope, key: int) -> None:
        # its taking is acknowledged at once, so that nobody asks for it again while it lasts
        await self._acknowledge(message)
        try:
            await task
        except BaseException:
            self._known.seen.release(key)
            raise
        self._known.seen.done(key)
        self._known.counts.handled += 1

    async def _give(self, request: TaskRequest, status: Any, payload: dict[str, Any], error: str) -> None:
        result = TaskResult(request.request_id, self._topics.ai_id, status, payload, error)
        message = envelopes.envelope(
            envelopes.TASK_RESULT,
            payloads.written(result),
            sender=self._topics.ai_id,
            recipient=request.requester_ai_id,
            pattern="response",
            correlation=request.request_id,
        )
        address = request.callback_address or self._topics.results_of(request.requester_ai_id)
        try:
            await self._answer(address, message)
        except InvalidMessageError as invalid:
            self._known.problem(request.capability, f"its result can't be sent: {invalid}")
            if status == "success":
                await self._give(request, "failure", {}, f"its result can't be sent: {invalid}"[:1000])
        except HSPError as refused:
            self._known.problem(request.capability, f"its result can't be sent: {refused}")

    # ------------------------------------------------------------------------------------------- acknowledgements

    async def _acknowledge(self, message: Envelope) -> None:
        if not message.qos_parameters.requires_ack or message.message_type == envelopes.ACKNOWLEDGEMENT:
            return
        ack = envelopes.envelope(
            envelopes.ACKNOWLEDGEMENT,
            payloads.written(Acknowledgement(message.message_id)),
            sender=self._topics.ai_id,
            recipient=message.sender_ai_id,
            pattern="acknowledgement",
            correlation=message.message_id,
        )
        own = self._topics.acknowledgements_of(message.sender_ai_id)
        try:
            await self._answer(message.qos_parameters.ack_address or own, ack)
        except (HSPError, InvalidMessageError) as error:
            self._known.problem(own, f"an acknowledgement can't be sent: {error}")

    async def finish(self, timeout_s: float) -> None:
        """Wait for the tasks that were begun; those that take longer are cancelled."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(set(self._tasks), timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            _log.warning("event=hsp-tasks-cancelled count=%d", len(late))
            await asyncio.wait(late)


_KINDS: dict[str, Any] = {
    envelopes.ADVERTISEMENT: Advertisement,
    envelopes.TASK_REQUEST: TaskRequest,
    envelopes.TASK_RESULT: TaskResult,
    envelopes.ACKNOWLEDGEMENT: Acknowledgement,
}

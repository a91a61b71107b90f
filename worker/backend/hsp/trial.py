"""A new generation's subscription tried out, while the one that serves holds the agent's session.

There is no second session beside the first, as in a process, in which the two could be compared. So the new one subscribes
under a name of its own, drops what it gets, and asks whoever holds the session, on the marker topic, to send probes with
its rights and to say which of them it got. What it got, the new one must get.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from segue.worker.backend.hsp.barrier import Publish, check_served, not_passed_on, probe_message
from segue.worker.backend.hsp.begun import Begun
from segue.worker.backend.hsp.errors import LinkError
from segue.worker.backend.hsp.mailbox import Seat
from segue.worker.backend.hsp.scout import send_probes
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.subscription import Mode, Subscription, ended, first
from segue.worker.backend.hsp.topics import Topics

_log = logging.getLogger("segue.hsp")

_AT_ONCE = 8
"""How many questions are answered at a time: every worker of a new generation has one."""

_Token = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]


class _Question(msgspec.Struct, frozen=True, tag="ask"):
    """Of a new connector to whoever holds the agent's session."""

    token: _Token
    topics: Annotated[tuple[str, ...], msgspec.Meta(max_length=1000)]
    """Where probes are to go."""


class _Answer(msgspec.Struct, frozen=True, tag="told"):
    token: _Token
    taken: tuple[str, ...]
    """Where the broker has taken one."""
    heard: tuple[str, ...]
    """Where one came in."""


class Trial:
    """Of one connector that is about to start."""

    def __init__(self, settings: HSPSettings, topics: Topics, publish: Publish) -> None:
        self._settings = settings
        # as a member of the group it would take what others wait for
        self._topics = dataclasses.replace(topics, group="")
        self._publish = publish
        self._token = uuid.uuid4().hex
        self._answer: _Answer | None = None
        self._answered = asyncio.Event()

    async def run(self, *, compare: bool, beside: Seat | None = None) -> None:
        """See whether the broker permits what is to be subscribed to, and with `compare` whether it serves it.

        `beside` is where the agent's subscription is now. Raises `LinkError`.
        """
        subscription = Subscription(
            self._settings,
            self._topics,
            f"{self._settings.client_id_prefix}-trial-{self._topics.instance}",
            _ignore,
            Begun(lambda *_: None),
            mode=Mode.DROP,
            durable=False,
            heard_before=self._topics.stream,
            overhear=self._overhear,
        )
        await subscription.open(fresh=True)
        try:
            if compare:
                await self._compare(subscription, beside)
        finally:
            await subscription.end()

    async def _compare(self, subscription: Subscription, seat: Seat | None) -> None:
        probes = tuple(self._topics.probes().values())
        watch = subscription.watch(self._token)
        taken = await send_probes(self._settings, probes, probe_message(self._token, self._topics.ai_id))
        answer = None
        if seat is not None and seat.answers:
            answer = await self._ask(_Question(self._token, probes), subscription)
        if answer is None:
            await self._wait_for_all(subscription)
        heard = set(answer.heard) if answer is not None else set()
        taken |= set(answer.taken) if answer is not None else set()
        check_served(self._topics, taken, heard, seat.filters if seat is not None else (), watch.probes)

    async def _ask(self, question: _Question, subscription: Subscription) -> _Answer | None:
        await self._publish(self._topics.marker, msgspec.json.encode(question))
        try:
            async with asyncio.timeout(self._settings.barrier_timeout_s):
                await first(self._answered, subscription.lost)
        except TimeoutError:
            _log.info("event=hsp-not-compared reason=whoever holds the session does not answer")
        if subscription.lost.is_set():
            raise LinkError(subscription.reason)
        return self._answer

    def _overhear(self, said: bytes) -> None:
        try:
            answer = msgspec.json.decode(said, type=_Answer)
        except msgspec.MsgspecError:
            return
        if answer.token == self._token:
            self._answer = answer
            self._answered.set()

    async def _wait_for_all(self, subscription: Subscription) -> None:
        """All that was published before has come when a token comes."""
        seen = subscription.watch(uuid.uuid4().hex)
        await self._publish(self._topics.marker, seen.token)
        try:
            async with asyncio.timeout(self._settings.barrier_timeout_s):
                await first(seen.seen, subscription.lost)
        except TimeoutError:
            raise not_passed_on(self._topics, self._settings.barrier_timeout_s) from None
        if subscription.lost.is_set():
            raise LinkError(subscription.reason)


class Witness:
    """Answers such questions, beside whatever else is done with the subscription."""

    def __init__(
        self,
        settings: HSPSettings,
        topics: Topics,
        publish: Publish,
        subscription: Callable[[], Subscription | None],
    ) -> None:
        """`subscription` is the one that is in use."""
        self._settings = settings
        self._topics = topics
        self._publish = publish
        self._subscription = subscription
        self._answering: set[asyncio.Task[None]] = set()

    def overhear(self, said: bytes) -> None:
        """Answer a question, if that is one."""
        try:
            question = msgspec.json.decode(said, type=_Question)
        except msgspec.MsgspecError:
            return
        subscription = self._subscription()
        if subscription is not None and len(self._answering) < _AT_ONCE:
            answering = asyncio.create_task(self._answer(question, subscription))
            self._answering.add(answering)
            answering.add_done_callback(self._answering.discard)

    async def _answer(self, question: _Question, subscription: Subscription) -> None:
        # who may write to the marker topic doesn't get to write just anywhere this way
        ours = [each for each in question.topics if each.startswith(f"{self._topics.prefix}/")]
        watch = subscription.watch(question.token)
        try:
            taken = await send_probes(self._settings, ours, probe_message(question.token, self._topics.ai_id))
            await self._publish(self._topics.marker, watch.token)
            async with asyncio.timeout(self._settings.barrier_timeout_s):
                await first(watch.seen, subscription.lost)
            answer = _Answer(question.token, tuple(sorted(taken)), tuple(sorted(watch.probes)))
            await self._publish(self._topics.marker, msgspec.json.encode(answer))
        except (LinkError, TimeoutError) as error:
            _log.info("event=hsp-not-compared reason=%s", error)
        finally:
            subscription.unwatch(watch)

    async def close(self) -> None:
        """Leave unanswered what isn't answered yet."""
        for each in set(self._answering):
            await ended(each)


async def _ignore(*_: Any) -> None:
    pass

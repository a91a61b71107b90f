"""What goes out: to the broker, or kept until it is back; sent again until it is acknowledged, where it asks for that."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from segue.worker.backend.hsp.breaker import Breakers
from segue.worker.backend.hsp.envelope import Envelope
from segue.worker.backend.hsp.errors import HSPError, LinkError, RefusedError
from segue.worker.backend.hsp.settings import HSPSettings

_log = logging.getLogger("segue.hsp")

_BACK_OFF_CAP_S = 300.0
_LOSSES = 5
"""A message with which so many connections were lost is given up: MQTT 3.1.1 has no other way to refuse one."""


class Letter:
    """A message on its way."""

    __slots__ = ("attempts", "data", "due", "envelope", "given_up", "losses", "owed", "retain", "topic")

    def __init__(self, topic: str, envelope: Envelope, data: bytes, *, retain: bool = False) -> None:
        self.topic = topic
        self.envelope = envelope
        self.data = data
        self.retain = retain
        self.losses = 0
        """How many connections were lost while it was being sent."""
        self.attempts = 0
        self.owed = False
        """Whether it was sent since it was last found to be overdue."""
        self.due = 0.0
        self.given_up: Callable[[str], None] | None = None
        """Called with the reason when it isn't acknowledged."""

    @property
    def id(self) -> str:
        """Of the message."""
        return self.envelope.message_id

    @property
    def wants_answer(self) -> bool:
        """Whether it is to be acknowledged."""
        return self.envelope.qos_parameters.requires_ack


class Outbox:
    """Of one connector. `send` raises `LinkError` and `RefusedError`; `local` delivers in the process."""

    def __init__(
        self,
        settings: HSPSettings,
        send: Callable[[Letter], Awaitable[None]],
        connected: Callable[[], bool],
        local: Callable[[Letter], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.published = 0
        """How many the broker has taken."""
        self.unacknowledged = 0
        """How many were given up."""
        self.dropped = 0
        """How many were never sent."""
        self.breakers = Breakers(settings.breaker_failures, settings.breaker_open_s, now)
        self._settings = settings
        self._send = send
        self._connected = connected
        self._local = local
        self._now = now
        self._pending: dict[str, Letter] = {}
        self._unsent: deque[Letter] = deque()
        self._in_flight = 0
        self._flushing = asyncio.Lock()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._changed = asyncio.Event()

    @property
    def pending(self) -> int:
        """Messages that are to be acknowledged and aren't yet."""
        return len(self._pending)

    @property
    def retrying(self) -> int:
        """Those of them that were sent more than once."""
        return sum(letter.attempts > 1 for letter in self._pending.values())

    @property
    def unsent(self) -> int:
        """Messages that wait for the broker."""
        return len(self._unsent)

    async def post(self, letter: Letter) -> None:
        """Send it, or keep it for a broker that isn't there, and deliver it in the process then.

        Raises `HSPError`: the broker refuses it, there is no room, or its addressee owes too many acknowledgements.
        """
        if letter.wants_answer:
            if not self.breakers.allows(letter.topic):
                raise HSPError(503, f"{letter.topic} does not acknowledge; it is left alone for a while")
            self._expect(letter)
        try:
            if not self._connected():
                self._keep(letter)
                self._local(letter)
            elif self._unsent:
                self._keep(letter)  # it must not overtake
                await self.flush()
            else:
                await self._attempt(letter)
        except BaseException:
            self.forget(letter.id)
            raise

    async def flush(self) -> None:
        """Send what was kept, in order, as far as the broker takes it."""
        async with self._flushing:
            while self._unsent and self._connected():
                letter = self._unsent[0]
                try:
                    await self._deliver(letter)
                except RefusedError as error:
                    self._drop(letter, str(error))
                except LinkError as error:
                    letter.losses += 1
                    if letter.losses < _LOSSES:
                        return
                    self._drop(letter, f"{error}, for the {letter.losses}th time with this message")
                if self._unsent and self._unsent[0] is letter:
                    self._unsent.popleft()

    def _drop(self, letter: Letter, reason: str) -> None:
        self.dropped += 1
        self.forget(letter.id)
        _log.error("event=hsp-refused topic=%s reason=%s", letter.topic, reason)
        if letter.given_up is not None:
            letter.given_up(reason)

    async def drained(self) -> None:
        """Wait until nothing is in flight: the broker has it, or the connection is lost."""
        await self._quiet.wait()

    async def _attempt(self, letter: Letter) -> None:
        try:
            await self._deliver(letter)
        except RefusedError as error:
            raise HSPError(502, str(error)) from error
        except LinkError:
            letter.losses += 1
            self._keep(letter)  # the broker may have it; its message_id tells that it is the same
            await self.flush()

    async def _deliver(self, letter: Letter) -> None:
        self._in_flight += 1
        self._quiet.clear()
        try:
            await self._send(letter)
            self.published += 1
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._quiet.set()

    def _keep(self, letter: Letter) -> None:
        if not self._settings.host:
            return
        if len(self._unsent) >= self._settings.outbox_limit:
            raise HSPError(
                503, f"{len(self._unsent)} messages wait for broker {self._settings.broker} already"
            )
        self._unsent.append(letter)

    # ------------------------------------------------------------------------------------------ acknowledgements

    def _expect(self, letter: Letter) -> None:
        letter.attempts, letter.owed = 1, True
        letter.due = self._now() + self._settings.ack_timeout_s
        self._pending[letter.id] = letter
        self._changed.set()

    def acknowledged(self, message_id: str) -> bool:
        """It has arrived. Whether it was waited for."""
        letter = self._pending.pop(message_id, None)
        if letter is None:
            return False
        self.breakers.succeeded(letter.topic)
        return True

    def forget(self, message_id: str) -> None:
        """Nobody waits for it any more."""
        self._pending.pop(message_id, None)

    async def retry(self) -> None:
        """Send again what is overdue, for ever."""
        while True:
            self._changed.clear()
            due = min((letter.due for letter in self._pending.values()), default=None)
            try:
                async with asyncio.timeout(None if due is None else max(0.0, due - self._now())):
                    await self._changed.wait()
            except TimeoutError:
                await self.retry_once()

    async def retry_once(self) -> None:
        """Send again what is overdue at this moment."""
        now = self._now()
        for letter in [each for each in self._pending.values() if each.due <= now]:
            if self._connected():
                if letter.owed:
                    letter.owed = False
                    self.breakers.failed(letter.topic)
                if letter.attempts > self._settings.ack_retries:
                    self._give_up(letter)
                    continue
            elif self._settings.host:
                # who could have acknowledged it? it waits for the broker
                letter.due = now + self._settings.ack_timeout_s
                continue
            else:
                self._give_up(letter)
                continue
            back_off_s = self._settings.ack_timeout_s * 2.0 ** min(letter.attempts, 20)
            letter.due = now + min(_BACK_OFF_CAP_S, back_off_s)
            if not self.breakers.allows(letter.topic):
                continue
            letter.attempts, letter.owed = letter.attempts + 1, True
            try:
                await self._deliver(letter)
            except LinkError as error:
                _log.info("event=hsp-retry-failed message=%s reason=%s", letter.id, error)

    def _give_up(self, letter: Letter) -> None:
        self._pending.pop(letter.id, None)
        self.unacknowledged += 1
        reason = f"{letter.topic} did not acknowledge message {letter.id}, sent {letter.attempts} times"
        _log.warning("event=hsp-unacknowledged topic=%s message=%s", letter.topic, letter.id)
        if letter.given_up is not None:
            letter.given_up(reason)

    # ------------------------------------------------------------------------------------------------------- swap

    def unfinished(self) -> list[Letter]:
        """What was not sent, or not acknowledged."""
        return list({each.id: each for each in (*self._unsent, *self._pending.values())}.values())

    def resume(self, letters: Sequence[Letter]) -> None:
        """Go on with what another process hasn't brought to an end; `flush` sends it."""
        for letter in letters:
            self._unsent.append(letter)
            if letter.wants_answer:
                self._expect(letter)

    def adopt(self, other: Outbox, readdress: Callable[[Letter], None]) -> None:
        """Go on with what another one hasn't brought to an end. `readdress` makes its acknowledgement come here."""
        for letter in other.unfinished():
            if letter.wants_answer:
                readdress(letter)
        # what is older goes first; there is room: both have been filled one after the other
        self._unsent.extendleft(reversed(other._unsent))
        other._unsent.clear()
        self._pending |= other._pending
        other._pending.clear()
        self._changed.set()

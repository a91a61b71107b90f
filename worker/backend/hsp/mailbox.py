"""A worker's own connection to the broker: what it publishes goes out here, and answers to it come in.

Nothing of it is kept by the broker: who waits for an answer does so in this process. It also hears what all agents
advertise, which is retained, where the agent's subscription is (`Seat`), and what its connectors tell each other.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable

import msgspec

from segue.worker.backend.hsp.errors import LinkError, RefusedError
from segue.worker.backend.hsp.link import Link, Message
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.subscription import first
from segue.worker.backend.hsp.topics import Topics

_log = logging.getLogger("segue.hsp")


class Seat(msgspec.Struct, frozen=True):
    """Where the agent's subscription is."""

    session: str
    """The client id to resume it with."""
    holder: str
    """Which connector holds it, or did last."""
    filters: tuple[str, ...]
    """What it is subscribed to."""
    since: float
    """Seconds since the epoch."""
    answers: bool = False
    """Whether the holder answers who asks it to compare (`trial`)."""


class Mailbox:
    """Connects, and again whenever the connection is lost."""

    def __init__(
        self,
        settings: HSPSettings,
        topics: Topics,
        receive: Callable[[str, bytes, bool], Awaitable[object]],
        on_connected: Callable[[], Awaitable[None]],
    ) -> None:
        self.seat: Seat | None = None
        self.up = asyncio.Event()
        """Set while it is connected."""
        self.reason: str | None = "it has not connected yet"
        """Why it isn't connected."""
        self.connections = 0
        self.overhear: Callable[[bytes], None] | None = None
        """Told what is said on the marker topic."""
        self.seat_passed: Callable[[], None] | None = None
        """Called when somebody else holds the subscription than before."""
        self._settings = settings
        self._topics = topics
        self._receive = receive
        self._on_connected = on_connected
        self._link: Link | None = None
        self._greeting = b""
        self._greeted = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether it is, as far as is known."""
        return self._link is not None and self._link.alive and self.up.is_set()

    async def open(self) -> None:
        """Connect once. Raises `LinkError`."""
        settings, topics = self._settings, self._topics
        name = f"{settings.client_id_prefix}-{topics.ai_id}-{topics.instance}"

        async def receive(message: Message) -> None:
            await self._take(message)
            link.acknowledge(message)

        link = Link(settings, name, receive)
        try:
            await link.open()
            await link.subscribe(topics.private, settings.qos)
            await self._greet(link)
        except LinkError as error:
            self.reason = str(error)
            await link.close()
            raise
        except BaseException:
            await link.close()
            raise
        self._link, self.reason = link, None
        self.connections += 1
        self.up.set()
        await self._on_connected()

    async def settle(self) -> None:
        """Once it returns, all that was published to this connector before has arrived. Raises `LinkError`."""
        if self._link is None:
            raise LinkError(self.reason or "it is closed")
        await self._greet(self._link)

    async def _greet(self, link: Link) -> None:
        """Speak to oneself: everything that is retained comes before the echo."""
        self._greeting = secrets.token_hex(8).encode()
        self._greeted.clear()
        await link.publish(self._topics.hello, self._greeting, self._settings.qos)
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await first(self._greeted, link.lost)
        except TimeoutError:
            raise RefusedError(
                f"broker {self._settings.broker} grants the subscription to {self._topics.hello}, but does not serve it: "
                "may this user read from and write to it?"
            ) from None
        if not self._greeted.is_set():
            raise LinkError(f"the connection to broker {self._settings.broker} was lost: {link.reason}")

    def keep(self) -> None:
        """From here on, connect again whenever the connection is lost."""
        self._keeping = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        pause_s, said = self._settings.reconnect_first_s, ""
        while True:
            link = self._link
            if link is not None:
                pause_s = self._settings.reconnect_first_s
                await link.lost.wait()
                self.up.clear()
                self.reason = f"the connection to broker {self._settings.broker} was lost: {link.reason}"
                _log.warning("event=hsp-disconnected broker=%s reason=%s", self._settings.broker, link.reason)
                self._link = None
                await link.close()
            try:
                await self.open()
                _log.info("event=hsp-connected broker=%s", self._settings.broker)
            except LinkError as error:
                if str(error) != said:  # once is enough
                    said = str(error)
                    _log.info("event=hsp-unreachable reason=%s", said)
                await asyncio.sleep(pause_s * (0.75 + secrets.randbelow(50) / 100))
                pause_s = min(self._settings.reconnect_cap_s, pause_s * 2)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish, and wait until the broker has it. Raises `LinkError`."""
        if self._link is None:
            raise LinkError(self.reason or "it is closed")
        await self._link.publish(topic, payload, self._settings.qos, retain=retain)

    async def take_seat(self, session: str, filters: tuple[str, ...]) -> float:
        """Let all know where the subscription is; since when, in seconds since the epoch. Raises `LinkError`."""
        self.seat = await self.give_seat(self._topics.instance, session, filters)
        return self.seat.since

    async def give_seat(self, holder: str, session: str, filters: tuple[str, ...]) -> Seat:
        """Let all know who goes on with the subscription, and where. Raises `LinkError`."""
        seat = Seat(session, holder, filters, time.time(), answers=True)
        await self.publish(self._topics.seat, msgspec.json.encode(seat), retain=True)
        return seat

    async def _take(self, message: Message) -> None:
        topic, payload = message.topic.value, bytes(message.payload)
        if topic == self._topics.seat:
            self._hear_of_seat(payload)
        elif topic == self._topics.marker:
            if self.overhear is not None:
                self.overhear(payload)
        elif topic == self._topics.hello:
            if payload == self._greeting:
                self._greeted.set()
        else:
            await self._receive(topic, payload, bool(message.retain))

    def _hear_of_seat(self, payload: bytes) -> None:
        try:
            seat = msgspec.json.decode(payload, type=Seat)
        except msgspec.MsgspecError:
            return
        before, self.seat = self.seat, seat
        passed = before is None or before.holder != seat.holder
        if passed and self.up.is_set() and self.seat_passed is not None:
            self.seat_passed()

    async def close(self) -> None:
        """Disconnect for good."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        self.up.clear()
        link, self._link = self._link, None
        self.reason = "it is closed"
        if link is not None:
            await link.close(self._topics.private)

"""The two sessions of an agent at its broker: their names, and connections to them.

Of the two one is in use, so there is never one that nobody knows of.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from segue.worker.backend.hsp.begun import Begun
from segue.worker.backend.hsp.client import Will
from segue.worker.backend.hsp.errors import LinkError
from segue.worker.backend.hsp.leaving import Leaving, Name
from segue.worker.backend.hsp.link import Link
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.subscription import Mode, Subscription, Take
from segue.worker.backend.hsp.topics import Topics

_RESERVE_TRIES = 5


class Sessions:
    """As one connector sees them."""

    def __init__(
        self,
        settings: HSPSettings,
        topics: Topics,
        leaving: Leaving,
        take: Take,
        begun: Begun,
        will: bytes,
        overhear: Callable[[bytes], None],
    ) -> None:
        """`will` is what the broker is to say when a connection is lost; `take`, `begun` and `overhear` are `Subscription`'s."""
        self._settings = settings
        self._topics = topics
        self._leaving = leaving
        self._take = take
        self._begun = begun
        self._will = Will(topics.advertisement, will)
        self._overhear = overhear
        name = f"{settings.client_id_prefix}-{topics.ai_id}"
        self.names = f"{name}-a", f"{name}-b"

    def other(self, session: str) -> str:
        """The one beside it."""
        one, other = self.names
        return one if session != one else other

    def make(self, session: str, mode: Mode, heard_before: tuple[str, ...] = ()) -> Subscription:
        """A subscription that is to be connected to a session."""
        return Subscription(
            self._settings,
            self._topics,
            session,
            self._take,
            self._begun,
            mode=mode,
            will=self._will,
            heard_before=heard_before,
            overhear=self._overhear,
        )

    async def open(
        self, subscription: Subscription, *, fresh: bool, known: tuple[str, ...] = (), spare: bool = False
    ) -> None:
        """`Subscription.open`, once what is under way with its session in this process is done. Raises `LinkError`."""
        await self.gone(subscription.session)
        await subscription.open(fresh=fresh, known=known, spare=spare)

    async def reserve(self) -> str:
        """Have the broker keep from here on what comes, in the first of them; returns its name. Raises `LinkError`."""
        tries = _RESERVE_TRIES
        while True:
            subscription = self.make(self.names[0], Mode.STOP)
            try:
                await self.open(subscription, fresh=False)
            except LinkError:  # perhaps another worker of the generation does the same
                tries -= 1
                if tries == 0:
                    raise
                await asyncio.sleep(self._settings.reconnect_first_s)
            else:
                await subscription.leave()
                return subscription.session

    async def gone(self, session: str) -> None:
        """Wait until what is under way with it in this process is done."""
        await self._leaving.gone(self._name(session))

    def end(self, subscription: Subscription) -> None:
        """Have the broker drop a session, beside; what was in it has been seen to."""
        self._leaving.begin(self._name(subscription.session), subscription.end())

    def leave(self, subscription: Subscription) -> None:
        """Disconnect from a session, beside; it stays."""
        self._leaving.begin(self._name(subscription.session), subscription.leave())

    def forget(self, session: str, after_s: float = 0.0) -> None:
        """Have the broker drop, beside, what somebody else has left of a session that isn't in use."""
        self._leaving.begin(self._name(session), self._forget(session, after_s))

    async def _forget(self, session: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        with contextlib.suppress(LinkError):
            await Link.forget(self._settings, session)

    async def all_gone(self) -> None:
        """Wait until all that was begun here beside is done."""
        await self._leaving.all_gone()

    def _name(self, session: str) -> Name:
        return self._settings.address, session

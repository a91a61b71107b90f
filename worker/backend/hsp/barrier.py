"""Two subscriptions of one agent lined up at the same message: a rehearsal, and the cut. `subscription` says why."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Collection

from segue.worker.backend.hsp import envelope as envelopes
from segue.worker.backend.hsp.errors import BarrierError
from segue.worker.backend.hsp.subscription import Mode, Subscription, Watch, first
from segue.worker.backend.hsp.topics import Topics, matches

Publish = Callable[[str, bytes], Awaitable[None]]
"""With the quality of service of the data: another one's messages take another way through the broker."""
Probe = Callable[[Collection[str], bytes], Awaitable[set[str]]]
"""Publishes a message to topics as far as that is permitted; returns where the broker has taken it for certain."""


async def rehearse(
    old: Subscription, new: Subscription, topics: Topics, publish: Publish, probe: Probe, timeout_s: float
) -> None:
    """Show that a cut is possible: a token goes through both, and a probe through every filter that is subscribed to.

    Raises `BarrierError`, `LinkError`.
    """
    token = uuid.uuid4().hex
    watches = [each.watch(token) for each in (old, new)]
    try:
        taken = await probe(topics.probes().values(), probe_message(token, topics.ai_id))
        await publish(topics.marker, token.encode())
        await _seen([old, new], watches, topics, timeout_s)
        check_served(topics, taken, watches[0].probes, old.filters, watches[1].probes)
    finally:
        for each, watch in zip((old, new), watches, strict=True):
            each.unwatch(watch)


def check_served(
    topics: Topics,
    taken: Collection[str],
    heard: Collection[str],
    listened: Collection[str],
    got: Collection[str],
) -> None:
    """Compare where probes went out with where they came in: a broker may grant a subscription that it never serves.

    What the old one `heard`, with filters `listened`, the new one must get, and what the broker has `taken` for a filter
    that the old one doesn't have. What it has taken and not even given to the old one says nothing. Raises `BarrierError`.
    """
    missing = [
        name
        for name, topic in topics.probes().items()
        if topic not in got
        and (topic in heard or (topic in taken and not any(matches(each, topic) for each in listened)))
    ]
    if missing:
        raise BarrierError(
            f"the broker grants the subscription to {', '.join(missing)}, but does not serve it"
        )


async def cut(
    old: Subscription, new: Subscription, topics: Topics, publish: Publish, timeout_s: float
) -> None:
    """The old one handles all before a token, and stops; the new one has kept all after it. Raises as `rehearse`.

    Then the old one may have stopped, but what it didn't handle is still in its session.
    """
    token = uuid.uuid4().hex
    both, watches = (old, new), [old.watch(token, Mode.STOP), new.watch(token, Mode.WAIT)]
    try:
        await publish(topics.marker, token.encode())
        await _seen(list(both), watches, topics, timeout_s)
        here, there = (watch.counted for watch in watches)
        if here != there:
            raise BarrierError(f"of {here} messages the new connection was given {there}")
    finally:
        for each, watch in zip(both, watches, strict=True):
            each.unwatch(watch)


async def _seen(both: list[Subscription], watches: list[Watch], topics: Topics, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            for each, watch in zip(both, watches, strict=True):
                await first(watch.seen, each.lost)
                if not watch.seen.is_set():
                    raise BarrierError(f"a connection of the swap was lost: {each.reason}")
    except TimeoutError:
        raise not_passed_on(topics, timeout_s) from None


def not_passed_on(topics: Topics, timeout_s: float) -> BarrierError:
    """A token did not come back."""
    return BarrierError(
        f"the broker did not pass a message on topic {topics.marker} on within {timeout_s:g} s: "
        "may this user read from and write to it?"
    )


def probe_message(token: str, ai_id: str) -> bytes:
    """One that means nothing to anybody but who looks out for `token`."""
    message = envelopes.envelope(envelopes.PROBE, {"token": token}, sender=ai_id, recipient=ai_id)
    return envelopes.encode(message)

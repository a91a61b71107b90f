"""Two subscriptions of one agent lined up at the same message: a rehearsal, and the cut. `subscription` says why."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

from segue.worker.backend.hsp import envelope as envelopes
from segue.worker.backend.hsp.errors import BarrierError
from segue.worker.backend.hsp.subscription import Mode, Subscription, Watch, first
from segue.worker.backend.hsp.topics import Topics

Publish = Callable[[str, bytes], Awaitable[None]]
"""With the quality of service of the data: another one's messages take another way through the broker."""


async def rehearse(
    old: Subscription | None,
    new: Subscription,
    topics: Topics,
    publish: Publish,
    probe: Callable[[list[str], bytes], Awaitable[None]],
    timeout_s: float,
) -> None:
    """Show that a cut is possible: a token goes through both, and a probe through every filter that is subscribed to.

    A broker may grant a subscription that it never serves, and take a message that it never passes on. So what the old
    one gets, the new one must get; where there is no old one, only the token counts. `probe` publishes a message to
    topics as far as that is permitted. Raises `BarrierError`, `LinkError`.
    """
    token = uuid.uuid4().hex
    both = [each for each in (old, new) if each is not None]
    watches = [each.watch(token) for each in both]
    try:
        probes = topics.probes() if old is not None else {}
        if probes:
            await probe(list(probes.values()), _probe(token, topics.ai_id))
        await publish(topics.marker, token.encode())
        await _seen(both, watches, topics, timeout_s)
        missing = [name for name, topic in probes.items() if topic in watches[0].probes - watches[-1].probes]
        if missing:
            raise BarrierError(
                f"the broker grants the subscription to {', '.join(missing)}, but does not serve it"
            )
    finally:
        for each, watch in zip(both, watches, strict=True):
            each.unwatch(watch)


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
        raise BarrierError(
            f"the broker did not pass a message on topic {topics.marker} on within {timeout_s:g} s: "
            "may this user read from and write to it?"
        ) from None


def _probe(token: str, ai_id: str) -> bytes:
    message = envelopes.envelope(envelopes.PROBE, {"token": token}, sender=ai_id, recipient=ai_id)
    return envelopes.encode(message)

"""Probes: a message for each filter of a subscription, to see which of them the broker serves.

They go out on connections of their own, one with the rights of the old connector and, if those differ, one with the new
one's: mosquitto closes a connection on which it has refused a message, and who may read a topic is often forbidden to
write to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterable

from segue.worker.backend.hsp.errors import LinkError, RefusedError
from segue.worker.backend.hsp.link import Link, Message
from segue.worker.backend.hsp.settings import HSPSettings


async def send_probes(settings: HSPSettings, topics: Iterable[str], payload: bytes) -> None:
    """Publish `payload` to each topic that may be published to; once it returns, the broker has them."""
    name = f"{settings.client_id_prefix}-probe-{secrets.token_hex(4)}"
    link: Link | None = None
    try:
        for topic in topics:
            for _ in range(2):  # the connection may have been closed for the topic before
                if link is None or not link.alive:
                    link = Link(settings, name, _ignore)
                    await link.open()
                try:
                    await link.publish(topic, payload, settings.qos)
                except RefusedError:
                    break
                except LinkError:
                    await link.close()
                else:
                    break
    except LinkError:
        pass  # what could not be probed says nothing
    finally:
        if link is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await link.close()


def rights(settings: HSPSettings) -> tuple[object, ...]:
    """Who one is for the broker."""
    return settings.username, settings.password.reveal(), settings.tls_cert, settings.client_id_prefix


async def _ignore(_: Message) -> None:
    pass

"""Probes: a message for each filter of a subscription, to see which of them the broker serves.

They go out on connections of their own, one with the rights of the old connector and, if those differ, one with the new
one's: mosquitto closes a connection on which it has refused a message, and who may read a topic is often forbidden to
write to it. With MQTT 5, if the broker speaks it: 3.1.1 acknowledges what it has thrown away. With the quality of service of
the data: one of QoS 1 is acknowledged before those of QoS 2 in front of it, and mosquitto lets others pass then, too.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection

import msgspec

from segue.worker.backend.hsp.errors import LinkError, RefusedError
from segue.worker.backend.hsp.link import Link, Message
from segue.worker.backend.hsp.settings import HSPSettings


async def send_probes(settings: HSPSettings, topics: Collection[str], payload: bytes) -> set[str]:
    """Publish `payload` to each topic that may be published to; returns those that the broker has taken for certain.

    Once it returns the broker has them. What can't be probed says nothing: nothing is raised.
    """
    if not topics:
        return set()
    try:
        return await _send(msgspec.structs.replace(settings, mqtt_version="5"), topics, payload)
    except LinkError:
        if not settings.v5:
            with contextlib.suppress(LinkError):
                await _send(settings, topics, payload)
        return set()


async def _send(settings: HSPSettings, topics: Collection[str], payload: bytes) -> set[str]:
    taken: set[str] = set()
    link = await _connected(settings)
    try:
        for topic in topics:
            for _ in range(2):  # the connection may have been closed for the topic before
                if not link.alive:
                    await link.close()
                    link = await _connected(settings)
                try:
                    await link.publish(topic, payload, settings.qos)
                except RefusedError:
                    break
                except LinkError:
                    continue
                taken.add(topic)
                break
    finally:
        await link.close()
    return taken


async def _connected(settings: HSPSettings) -> Link:
    link = Link(settings, f"{settings.client_id_prefix}-probe-{secrets.token_hex(4)}", _ignore)
    await link.open()
    return link


def rights(settings: HSPSettings) -> tuple[object, ...]:
    """Who one is for the broker."""
    return settings.username, settings.password.reveal(), settings.tls_cert, settings.client_id_prefix


async def _ignore(_: Message) -> None:
    pass

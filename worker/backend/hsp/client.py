"""An aiomqtt client as a link needs it: its settings, and paho below it taught to wait with acknowledgements.

paho can leave PUBACK to who has handled a message. At QoS 2 it can't: it sends PUBREC at once, keeps the message in memory
until the broker releases it, and loses it with the process. So PUBREC, too, waits here until the message was handled, and
the message is delivered with its PUBLISH: what is unhandled is still the broker's, and both qualities arrive in one order.
Nor does it look at what PUBREC says (MQTT 5), which is where a broker refuses a message of QoS 2.
This reaches into paho; the versions that it was tested with are in pyproject.toml.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from segue.worker.backend.hsp.settings import HSPSettings

_log = logging.getLogger("segue.hsp.mqtt")
_log.setLevel(logging.CRITICAL)  # each of what it says is an error of a call here, too

_RECEIVE_MAXIMUM = 1000
"""How many messages may be unacknowledged (MQTT 5; else the broker decides): the subscriber's loop may pause for a
moment, and the broker's own queue is often limited."""
_FAILED = 0x80
"""Reason codes from here on say no."""
_WILL_DELAY_S = 10
"""How long the broker waits before it says that the agent is offline (MQTT 5): another process may take over."""


class Will(NamedTuple):
    """What the broker is to say, retained, when the connection is lost."""

    topic: str
    payload: bytes


class Arrived(asyncio.Queue[aiomqtt.Message]):
    """Where aiomqtt puts what arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.items: deque[aiomqtt.Message] = deque()
        self.wake = asyncio.Event()

    def put_nowait(self, item: aiomqtt.Message) -> None:
        """Take one; there is always room."""
        self.items.append(item)
        self.wake.set()


def build(
    settings: HSPSettings, client_id: str, arrived: Arrived, *, durable: bool, will: Will | None
) -> aiomqtt.Client:
    """One that isn't connected yet. Raises `OSError` and `ValueError` for certificates that can't be used.

    A durable session is never begun with MQTT 5's clean start: mosquitto keeps such a one in memory, but doesn't write it
    down, whatever its expiry is, so that it is gone once the broker has crashed.
    """
    host, port = settings.address
    version = aiomqtt.ProtocolVersion.V5 if settings.v5 else aiomqtt.ProtocolVersion.V311
    properties = None
    if settings.v5:
        expiry_s = settings.session_expiry_s if durable else 0
        properties = properties_of(
            PacketTypes.CONNECT, ReceiveMaximum=_RECEIVE_MAXIMUM, SessionExpiryInterval=expiry_s
        )
    client = aiomqtt.Client(
        host,
        port,
        identifier=client_id,
        username=settings.username or None,
        password=settings.password.reveal() or None,
        protocol=version,
        clean_session=None if settings.v5 else not durable,
        # with MQTT 3.1.1 it must be this, and means nothing
        clean_start=not durable if settings.v5 else paho.MQTT_CLEAN_START_FIRST_ONLY,
        properties=properties,
        keepalive=settings.keepalive_s,
        timeout=settings.connect_timeout_s,
        tls_context=_tls(settings),
        socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        queue_type=cast("Any", lambda maxsize: arrived),
        will=_will(settings, will),
        logger=_log,
    )
    client._client.connect_timeout = settings.connect_timeout_s
    return client


def delay_acknowledgements(inner: paho.Client) -> Callable[[int], Any]:
    """From here on nothing is acknowledged by itself; what is returned sends the PUBREC of a message."""
    inner.manual_ack_set(True)
    hidden = cast("Any", inner)
    send_pubrec, handle_publish, handle_pubrel = (
        hidden._send_pubrec,
        hidden._handle_publish,
        hidden._handle_pubrel,
    )
    arrived: list[int] = []

    def hold_back(mid: int) -> Any:
        arrived.append(mid)
        return paho.MQTT_ERR_SUCCESS

    def published() -> Any:
        result = handle_publish()
        while arrived:  # at most one, at QoS 2: deliver it now, not with its PUBREL
            hidden._handle_on_message(hidden._in_messages.pop(arrived.pop()))
        return result

    def released() -> Any:
        inner.manual_ack_set(False)  # else PUBCOMP would be left to who acknowledges
        try:
            return handle_pubrel()
        finally:
            inner.manual_ack_set(True)

    hidden._send_pubrec = hold_back
    hidden._handle_publish = published
    hidden._handle_pubrel = released
    return cast("Callable[[int], Any]", send_pubrec)


def tell_refusals(inner: paho.Client) -> None:
    """From here on `on_publish` is told of a message of QoS 2 that is refused, as of one of QoS 1; it has no PUBREL."""
    hidden = cast("Any", inner)
    handle_pubrec = hidden._handle_pubrec

    def received() -> Any:
        packet = hidden._in_packet["packet"]
        if len(packet) < 3 or packet[2] < _FAILED:
            return handle_pubrec()
        mid, code = int.from_bytes(packet[:2], "big"), ReasonCode(PacketTypes.PUBREC, identifier=packet[2])
        with hidden._out_message_mutex:
            if mid in hidden._out_messages:
                return hidden._do_on_publish(mid, code, properties_of(PacketTypes.PUBREC))
        return paho.MQTT_ERR_SUCCESS

    hidden._handle_pubrec = received


def properties_of(packet: int, **values: int) -> Properties:
    """Of a packet of MQTT 5."""
    properties: Properties = cast("Any", Properties)(packet)
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def _will(settings: HSPSettings, will: Will | None) -> aiomqtt.Will | None:
    if will is None:
        return None
    properties = None
    if settings.v5:
        properties = properties_of(PacketTypes.WILLMESSAGE, WillDelayInterval=_WILL_DELAY_S)
    return aiomqtt.Will(will.topic, will.payload, 1, True, properties)


class _TLSSocket(ssl.SSLSocket):
    """paho leaves one whose handshake has failed open."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def _tls(settings: HSPSettings) -> ssl.SSLContext | None:
    if not settings.tls:
        return None
    context = ssl.create_default_context(cafile=settings.tls_ca or None)
    context.sslsocket_class = _TLSSocket
    if settings.tls_cert:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
    return context

"""What can be set about HSP."""

from __future__ import annotations

import os
import re
import socket
from typing import Annotated, Literal

import msgspec

from segue.worker.services.secret import Secret

_NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_LEVELS = re.compile(r"[^/+#\0]{1,64}(/[^/+#\0]{1,64}){0,3}")

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class HSPSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[services.hsp]``. Times in seconds."""

    host: str = ""
    """The broker; empty: none, and messages stay in the process."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 0
    """0: 1883, or 8883 with TLS."""
    mqtt_version: Literal["5", "3.1.1", 5] = "5"
    qos: Literal[1, 2] = 1
    """Of the subscription and of what is published. 1 with acknowledgements after the work is enough: what is
    delivered again after a crash is known by its ``message_id``."""
    username: str = ""
    password: Secret = Secret("")
    tls: bool = False
    tls_ca: str = ""
    """A file with the certificates to trust; empty: the system's."""
    tls_cert: str = ""
    """A file with the certificate to show, for brokers that ask for one, …"""
    tls_key: str = ""
    """… and its key, unless that is in the same file."""
    keepalive_s: Annotated[int, msgspec.Meta(ge=5, le=3600)] = 30
    """How long a connection may be silent before it is tried, and again before it is given up."""

    ai_id: str = ""
    """Who this agent is, the same on all workers and over all generations, and no other agent's; empty: made of the
    host's and the instance's names."""
    client_id_prefix: str = "segue"
    """What the ids of all connections begin with."""
    topic_prefix: str = "hsp"
    """What all topics begin with."""
    filters: tuple[str, ...] = ()
    """Topic filters to listen to beside what is addressed to this agent; empty: all facts."""
    shared_group: str = ""
    """Take facts and tasks for all as a member of this group (``$share``): each goes to one of its members, in no strict
    order. For agents of different names that share work."""

    offers: tuple[str, ...] = ("*",)
    """What the built-in backend does for other agents: patterns (``*``, ``?``) of names of tools, and ``chat``."""

    connect_timeout_s: _Seconds = 5.0
    reconnect_first_s: _Seconds = 0.2
    """How long to wait before a broker that was lost is tried again; doubled each time …"""
    reconnect_cap_s: _Seconds = 15.0
    """… up to this."""
    session_expiry_s: Annotated[int, msgspec.Meta(ge=10, le=2_592_000)] = 3600
    """How long the broker keeps what arrives while nobody holds the subscription (MQTT 5; with 3.1.1 it decides itself)."""
    barrier_timeout_s: _Seconds = 3.0
    """How long the two connections of a swap may take to meet at the same message."""
    drain_timeout_s: _Seconds = 3.0
    """How long work that was begun may go on before its connector lets go of it."""

    ack_timeout_s: _Seconds = 5.0
    """How long an acknowledgement may take before a message is sent again; doubled each time."""
    ack_retries: Annotated[int, msgspec.Meta(ge=0, le=100)] = 3
    """How often it is sent again."""
    breaker_failures: _Count = 5
    """After so many acknowledgements in a row that an addressee owes, nothing is sent that it would have to acknowledge …"""
    breaker_open_s: _Seconds = 30.0
    """… for so long; then it is tried with one message."""

    outbox_limit: _Count = 1000
    """How many messages are kept for a broker that can't be reached."""
    dedupe_window: _Count = 10_000
    """How many messages are remembered, so that they aren't taken twice."""
    max_message_bytes: _Count = 1_000_000
    max_tasks: _Count = 100
    """How many requests of other agents are worked on at once."""

    def __post_init__(self) -> None:
        if self.ai_id and _NAME.fullmatch(self.ai_id) is None:
            raise ValueError(
                "ai_id is made of letters, digits, dots, colons, dashes and underscores, at most 64 of them"
            )
        if _NAME.fullmatch(self.client_id_prefix) is None:
            raise ValueError(
                "client_id_prefix is made of letters, digits, dots, colons, dashes and underscores"
            )
        if _LEVELS.fullmatch(self.topic_prefix) is None or self.topic_prefix.startswith("$"):
            raise ValueError("topic_prefix is one to four levels of a topic, without wildcards")
        if self.shared_group and _NAME.fullmatch(self.shared_group) is None:
            raise ValueError("shared_group is made of letters, digits, dots, colons, dashes and underscores")
        for each in self.filters:
            _check_filter(each)
        if not self.tls and (self.tls_ca or self.tls_cert or self.tls_key):
            raise ValueError("tls_ca, tls_cert and tls_key are of no use without tls = true")
        if self.tls_key and not self.tls_cert:
            raise ValueError("tls_key is of no use without tls_cert")
        if self.password and not self.username:
            raise ValueError("a password needs a username")

    @property
    def v5(self) -> bool:
        """Whether it is MQTT 5."""
        return str(self.mqtt_version) == "5"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the broker."""
        return self.host, self.port or (8883 if self.tls else 1883)

    @property
    def broker(self) -> str:
        """For messages."""
        host, port = self.address
        return f"{host}:{port}"

    @property
    def identity(self) -> str:
        """The agent's name."""
        if self.ai_id:
            return self.ai_id
        name = f"{socket.gethostname()}-{os.environ.get('SEGUE_INSTANCE_NAME') or 'default'}"
        return re.sub(r"[^A-Za-z0-9._:-]", "-", name)[-64:]


def _check_filter(text: str) -> None:
    levels = text.split("/")
    right = (
        0 < len(text.encode()) <= 1000
        and "\0" not in text
        and not text.startswith("$")
        and all(level in {"+", "#"} or not set(level) & {"+", "#"} for level in levels)
        and "#" not in levels[:-1]
    )
    if not right:
        raise ValueError(f"{text!r} is no topic filter")

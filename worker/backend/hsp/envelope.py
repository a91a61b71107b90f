"""The envelope of every message, checked on its way out as on its way in.

Members that aren't known are ignored, at every level: a later minor version may add some. Another major version than 0
is refused. What a payload has to be is said in `payloads`, for the types that this agent acts on itself.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec

from segue.worker.backend.hsp.errors import InvalidMessageError

VERSION = "0.1"

FACT = "HSP::Fact_v0.1"
ADVERTISEMENT = "HSP::CapabilityAdvertisement_v0.1"
TASK_REQUEST = "HSP::TaskRequest_v0.1"
TASK_RESULT = "HSP::TaskResult_v0.1"
ACKNOWLEDGEMENT = "HSP::Acknowledgement_v0.1"
PROBE = "HSP::Probe_v0.1"
"""Goes through the broker and back, to see which filters are served; means nothing to anyone else."""

ALL = "all"
"""As a recipient: everybody."""

Pattern = Literal["publish", "request", "response", "acknowledgement", "negative_acknowledgement"]

_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Version = Annotated[str, msgspec.Meta(pattern=r"^0\.\d{1,3}$")]
_Time = Annotated[datetime, msgspec.Meta(tz=True)]
_Text = Annotated[str, msgspec.Meta(max_length=500)]


class QoSParameters(msgspec.Struct, frozen=True):
    """How a message wants to be treated."""

    requires_ack: bool = False
    priority: Literal["low", "medium", "high"] = "medium"
    ack_address: _Text | None = None
    """The topic for the acknowledgement; none: the sender's own."""


class Envelope(msgspec.Struct, frozen=True):
    """One message."""

    message_id: _Id
    """The same if, and only if, it is the same message."""
    sender_ai_id: _Id
    timestamp_sent: _Time
    message_type: Annotated[str, msgspec.Meta(pattern=r"^HSP::[A-Za-z][A-Za-z0-9]{0,63}_v\d+\.\d+$")]
    communication_pattern: Pattern
    payload: dict[str, Any]
    hsp_envelope_version: _Version
    protocol_version: _Version
    correlation_id: _Id | None = None
    """What it belongs to: the request of a result, the message of an acknowledgement."""
    recipient_ai_id: _Id | None = None
    """None, or ``all``: everybody who hears it."""
    qos_parameters: QoSParameters = QoSParameters()
    payload_schema_uri: _Text | None = None


_decoder = msgspec.json.Decoder(Envelope)
_encoder = msgspec.json.Encoder()


def envelope(
    message_type: str,
    payload: dict[str, Any],
    *,
    sender: str,
    pattern: Pattern = "publish",
    recipient: str | None = None,
    correlation: str | None = None,
    qos: QoSParameters | None = None,
) -> Envelope:
    """A new message of this moment."""
    name = message_type.removeprefix("HSP::").partition("_v")
    return Envelope(
        message_id=uuid.uuid4().hex,
        sender_ai_id=sender,
        timestamp_sent=datetime.now(UTC),
        message_type=message_type,
        communication_pattern=pattern,
        payload=payload,
        hsp_envelope_version=VERSION,
        protocol_version=VERSION,
        correlation_id=correlation,
        recipient_ai_id=recipient,
        qos_parameters=qos or QoSParameters(),
        payload_schema_uri=f"hsp:schema:payload/{name[0]}/{name[2]}",
    )


def encode(message: Envelope, limit: int = 1_000_000) -> bytes:
    """As it is sent. Raises `InvalidMessageError` for what no receiver would take, or more than `limit` bytes."""
    try:
        data = _encoder.encode(message)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMessageError(f"it can't be written as JSON: {error}") from None
    decode(data, limit)
    return data


def decode(data: bytes, limit: int = 1_000_000) -> Envelope:
    """What was received. Raises `InvalidMessageError`."""
    if len(data) > limit:
        raise InvalidMessageError(f"it has {len(data)} bytes, more than {limit}")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidMessageError(str(error) or type(error).__name__) from None

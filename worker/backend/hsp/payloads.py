"""The payloads of messages that an agent acts on itself. Those of facts are whatever agents agree upon."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from segue.worker.backend.hsp.errors import InvalidMessageError

T = TypeVar("T")

_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Topic = Annotated[str, msgspec.Meta(min_length=1, max_length=500, pattern=r"^[^+#\x00]*$")]
_Text = Annotated[str, msgspec.Meta(max_length=10_000)]


class Capability(msgspec.Struct, frozen=True):
    """Something that an agent does for others."""

    name: _Id
    description: _Text = ""
    version: Annotated[str, msgspec.Meta(max_length=64)] = ""


class Advertisement(msgspec.Struct, frozen=True):
    """What an agent says of itself; the last one counts."""

    ai_id: _Id
    capabilities: Annotated[tuple[Capability, ...], msgspec.Meta(max_length=1000)] = ()
    availability_status: Literal["online", "offline"] = "online"


class TaskRequest(msgspec.Struct, frozen=True):
    """Somebody wants something done."""

    request_id: _Id
    requester_ai_id: _Id
    capability: _Id
    parameters: dict[str, Any] = {}
    callback_address: _Topic | None = None
    """The topic for the result; none: the requester's own."""


class TaskResult(msgspec.Struct, frozen=True):
    """What became of it."""

    request_id: _Id
    executing_ai_id: _Id
    status: Literal["success", "failure", "rejected"]
    payload: dict[str, Any] = {}
    error: _Text = ""


class Acknowledgement(msgspec.Struct, frozen=True):
    """A message has arrived and was dealt with."""

    target_message_id: _Id
    status: Literal["received", "failed"] = "received"


def read(kind: type[T], payload: dict[str, Any]) -> T:
    """A payload as what it has to be. Raises `InvalidMessageError`."""
    try:
        return msgspec.convert(payload, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InvalidMessageError(f"payload: {error}") from None


def written(payload: Any) -> dict[str, Any]:
    """A payload as it goes into an envelope. Raises `InvalidMessageError` for what no receiver would take."""
    found: dict[str, Any] = msgspec.to_builtins(payload)
    read(type(payload), found)
    return found

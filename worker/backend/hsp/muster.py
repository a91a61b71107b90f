"""What the connectors of one agent tell each other on the marker topic when the subscription passes on (`recruiting`)."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Name = Annotated[str, msgspec.Meta(max_length=200)]
_Token = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]
_Filters = Annotated[tuple[str, ...], msgspec.Meta(max_length=1000)]


class Here(msgspec.Struct, frozen=True, tag="here"):
    """A connector of this agent is there."""

    instance: _Name
    kind: _Name
    """Those of one kind can be lined up."""
    stands_by: bool
    generation: int
    worker: int


class Gone(msgspec.Struct, frozen=True, tag="gone"):
    """It is not there any more."""

    instance: _Name


class Question(msgspec.Struct, frozen=True, tag="who"):
    """Who is there?"""

    by: _Name


class Order(msgspec.Struct, frozen=True, tag="recruit"):
    """To line up with whoever holds the subscription."""

    to: _Name
    by: _Name
    session: _Name
    """Where it is now."""
    heard: _Filters
    """What whoever holds it has subscribed to."""
    rehearsal: _Token
    cut: _Token


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The first token has come to the recruit."""

    cut: _Token
    session: _Name
    filters: _Filters


class LinedUp(msgspec.Struct, frozen=True, tag="lined-up"):
    """The second one has."""

    cut: _Token
    counted: int
    """How many messages there were between the two."""


class Unable(msgspec.Struct, frozen=True, tag="unable"):
    """The recruit can't."""

    cut: _Token
    reason: str


class Dismissed(msgspec.Struct, frozen=True, tag="dismissed"):
    """Its session isn't needed."""

    cut: _Token


Message = Here | Gone | Question | Order | Ready | LinedUp | Unable | Dismissed
_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def read(said: bytes) -> Message | None:
    """What was said, if it is one of these."""
    try:
        return _decoder.decode(said)
    except msgspec.MsgspecError:
        return None

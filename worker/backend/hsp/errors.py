"""What can go wrong with HSP, by who has to do something about it."""

from __future__ import annotations

from segue.worker.backend.errors import ToldError


class LinkError(ConnectionError):
    """A connection to the broker can't be had, or was lost; the message says which broker and why."""


class RefusedError(LinkError):
    """The broker is there and says no: to who connects, to a subscription, or to a message. Asking again won't help."""


class BarrierError(LinkError):
    """Two connections could not be lined up."""


class InvalidMessageError(ValueError):
    """Something that is no message of HSP; the message says what is wrong with it."""


class HSPError(ToldError):
    """What was asked of another agent, or of the broker, can't be; has an HTTP status."""

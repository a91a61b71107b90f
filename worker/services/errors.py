"""What can go wrong with services, by who has to do something about it."""

from __future__ import annotations

from collections.abc import Iterable


class DeclarationError(ValueError):
    """The declared services can't be: the message names them, and the chain of a cycle."""


class NotRunningError(LookupError):
    """A service was asked for while none is running."""


def not_running(name: str) -> NotRunningError:
    """What to do about it."""
    return NotRunningError(
        f"service {name!r} is not running: its registry is started by 'async with services:', for example with "
        "FastAPI(lifespan=services.lifespan)"
    )


class VerbError(Exception):
    """A service didn't do what it was told; the message is one line for a person."""


class OptionsError(ValueError):
    """A setting can't be used; the message names the key and where it comes from, never a value."""


class Unknown(LookupError):  # noqa: N818 - it is what happened, and reads so
    """Raised by a service that is asked for something that it doesn't have: who asked gets 404 with what there is."""

    def __init__(self, what: str, given: str, known: Iterable[str]) -> None:
        self.known = sorted(known)
        super().__init__(f"there is no {what} {given!r}; known: {', '.join(self.known) or 'none'}")


class UnknownServiceError(LookupError):
    """No service has that name."""

    def __init__(self, name: str, known: list[str]) -> None:
        self.known = known
        super().__init__(f"there is no service {name!r}; known: {', '.join(known) or 'none'}")


class SwapRefusedError(Exception):
    """The swap can't be, and nothing has changed; the message is one line for a person."""


class BusyError(Exception):
    """Another swap of the process is under way."""

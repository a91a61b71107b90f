"""What an application says of its services, checked before anything is built."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from segue.worker.services import schema
from segue.worker.services.errors import DeclarationError

Role = Literal["worker", "generation"]
Verb = Callable[[Any], Any]
VERBS = ("start", "activate", "deactivate", "close")

START_TIMEOUT_S = 60.0
HEALTH_TIMEOUT_S = 5.0
VERB_TIMEOUT_S = 10.0
LEASE_TIMEOUT_S = 600.0
HANDOVER_TIMEOUT_S = 10.0

_NAME = re.compile(r"(?=.{1,63}$)[a-z][a-z0-9]*(_[a-z0-9]+)*")
"""Without two underscores in a row, which part a name from a key in the environment."""
_OFFERED = frozenset({"settings", "options", "previous"})
"""What a factory may ask for beside the services that it requires."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """One service as it was declared. Times in seconds."""

    name: str
    factory: Callable[..., Any]
    requires: tuple[str, ...] = ()
    per: Role = "worker"
    title: str | None = None
    """How answers name it among what was rewired, if not by its name."""
    settings: type | None = None
    """The type of its settings: a `msgspec.Struct`, a dataclass or a TypedDict."""
    options: type | None = None
    """The type of what one swap may be told, and no later one remembers."""
    verbs: Mapping[str, Verb | None] = field(default_factory=dict)
    """Functions of the instance that take the place of its methods of these names; None: it has none."""
    start_timeout: float = START_TIMEOUT_S
    health_timeout: float = HEALTH_TIMEOUT_S
    activate_timeout: float = VERB_TIMEOUT_S
    deactivate_timeout: float = VERB_TIMEOUT_S
    close_timeout: float = VERB_TIMEOUT_S
    lease_timeout: float = LEASE_TIMEOUT_S
    """How long the leases of an instance that was replaced may last before it is closed all the same."""
    handover_timeout: float = HANDOVER_TIMEOUT_S
    """How long a new generation waits for the old one to let go of the service."""
    takes: frozenset[str] = frozenset()
    """Which arguments its factory takes."""

    def check(self) -> None:
        """Raises `DeclarationError` for what can be seen without the others."""
        if not _NAME.fullmatch(self.name) or self.name in _OFFERED:
            raise DeclarationError(
                f"a service can't be called {self.name!r}: lower-case letters, digits and single underscores "
                f"between them, and none of {', '.join(sorted(_OFFERED))}"
            )
        if self.per not in {"worker", "generation"}:
            raise DeclarationError(
                f"service {self.name!r}: per is 'worker' or 'generation', not {self.per!r}"
            )
        if not callable(self.factory):
            raise DeclarationError(f"service {self.name!r}: its factory can't be called")
        for what, kind in (("settings", self.settings), ("options", self.options)):
            if kind is not None and not schema.is_schema(kind):
                raise DeclarationError(
                    f"service {self.name!r}: {what} is a msgspec.Struct, a dataclass or a TypedDict"
                )
        both = schema.fields(self.settings) & schema.fields(self.options)
        if both:
            raise DeclarationError(
                f"service {self.name!r}: {', '.join(sorted(both))} is a setting and an option; one or the other"
            )
        self._check_verbs()
        if self.name in self.requires:
            raise DeclarationError(f"services require one another in a circle: {self.name} → {self.name}")
        self._check_factory()

    def _check_verbs(self) -> None:
        unknown = set(self.verbs) - {*VERBS, "health", "metrics"}
        if unknown:
            raise DeclarationError(f"service {self.name!r} has no verb {', '.join(sorted(unknown))}")
        for name in self.__slots__:
            if name.endswith("_timeout") and not _is_duration(getattr(self, name)):
                raise DeclarationError(f"service {self.name!r}: {name} is a number of seconds above 0")
        for verb, do in self.verbs.items():
            if do is not None and not callable(do):
                raise DeclarationError(f"service {self.name!r}: its {verb} can't be called")

    def _check_factory(self) -> None:
        missing = [name for name in self.requires if name not in self.takes]
        if missing:
            raise DeclarationError(
                f"the factory of service {self.name!r} takes no argument called {' or '.join(missing)}, "
                "which it is given because it requires them"
            )
        left = [name for name in _needed(self.factory) if name not in self.takes]
        if left:
            raise DeclarationError(
                f"the factory of service {self.name!r} takes {' and '.join(left)}, which nobody gives it: it requires "
                f"{', '.join(self.requires) or 'no other service'}"
            )


def _is_duration(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )


def _parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):  # some classes written in C have no signature
        return []


def _needed(factory: Callable[..., Any]) -> list[str]:
    """The arguments without which it can't be called."""
    optional = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    return [
        each.name for each in _parameters(factory) if each.default is each.empty and each.kind not in optional
    ]


def arguments(factory: Callable[..., Any], offered: Sequence[str]) -> frozenset[str]:
    """Which of `offered` a factory can be given by keyword."""
    parameters = _parameters(factory)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return frozenset(offered)
    named = {
        parameter.name
        for parameter in parameters
        if parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    }
    return frozenset(offered) & named


def declare(name: str, factory: Callable[..., Any], requires: Sequence[str], **more: Any) -> Declaration:
    """A checked declaration."""
    offered = (*requires, *_OFFERED)
    declaration = Declaration(
        name, factory, tuple(dict.fromkeys(requires)), takes=arguments(factory, offered), **more
    )
    declaration.check()
    return declaration


def order(declarations: Mapping[str, Declaration], *, complete: bool = True) -> list[str]:
    """The names in the order in which they are started: each after all that it requires.

    Raises `DeclarationError` for a circle, with its chain, and, unless more is to come (`complete` is False), for a
    name that nobody declared.
    """
    done: dict[str, None] = {}
    for name in declarations:
        _visit(name, declarations, complete, done, ())
    return list(done)


def _visit(
    name: str,
    declarations: Mapping[str, Declaration],
    complete: bool,
    done: dict[str, None],
    chain: tuple[str, ...],
) -> None:
    if name in done:
        return
    if name in chain:
        circle = (*chain[chain.index(name) :], name)
        raise DeclarationError(f"services require one another in a circle: {' → '.join(circle)}")
    if name not in declarations:
        if not complete:
            return
        raise DeclarationError(
            f"service {chain[-1]!r} requires {name!r}, which nobody declared ({' → '.join((*chain, name))}); "
            f"declared: {', '.join(sorted(declarations))}"
        )
    for required in declarations[name].requires:
        _visit(required, declarations, complete, done, (*chain, name))
    done[name] = None

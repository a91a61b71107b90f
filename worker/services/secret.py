"""A setting that must not be seen, and how texts are kept free of such values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

_HIDDEN = "********"
_SHORT = 4
"""A value of fewer characters is hidden only where it stands for itself: it would be found in every other word."""


class Secret:
    """A setting whose value shows in no log and no traceback; `reveal` returns it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return _HIDDEN


def secrets_in(value: Any) -> list[str]:
    """The values of all secrets in settings, however deep."""
    if isinstance(value, Secret):
        return [value.reveal()]
    if isinstance(value, Mapping):
        parts: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        parts = value
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, each.name, None) for each in dataclasses.fields(value)]
    else:
        parts = [getattr(value, name, None) for name in getattr(value, "__struct_fields__", ())]
    return [secret for part in parts for secret in secrets_in(part)]


def hide(text: str, values: Iterable[str]) -> str:
    """`text`, in one line, without any of `values`."""
    text = " ".join(text.split())
    plain = {" ".join(value.split()) for value in values}
    for value in sorted(plain - {""}, key=len, reverse=True):
        if len(value) < _SHORT:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", _HIDDEN, text)
        else:
            text = text.replace(value, _HIDDEN)
    return text

"""Types of settings: `msgspec.Struct`, dataclass or TypedDict, seen alike."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import msgspec


def is_schema(kind: object) -> bool:
    """Whether it is such a type."""
    return isinstance(kind, type) and (
        issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)
    )


def fields(kind: type | None) -> frozenset[str]:
    """The keys that can be set; none of no type."""
    return frozenset(_encoded(kind))


def encoded(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` under the names that msgspec expects, which a Struct may change (``rename=``)."""
    names = _encoded(kind)
    return {names[key]: value for key, value in values.items()}


def field_of(kind: type, name: str) -> str:
    """The key of which msgspec says `name`."""
    return next((key for key, encoded in _encoded(kind).items() if encoded == name), name)


def hints(kind: type) -> dict[str, Any]:
    """The types of the keys; empty if they can't be known."""
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except NameError:
        return {}


def fits(value: object, kind: type | None) -> bool:
    """Whether `value` is of that type."""
    if kind is None:
        return False
    return isinstance(value, dict if typing.is_typeddict(kind) else kind)


def values_of(settings: Any, kind: type) -> dict[str, Any]:
    """What settings of that type say; None says nothing."""
    if settings is None:
        return {}
    if isinstance(settings, Mapping):
        return {key: value for key, value in settings.items() if key in fields(kind)}
    return {name: getattr(settings, name) for name in fields(kind)}


def _encoded(kind: type | None) -> dict[str, str]:
    """By key, what msgspec calls it."""
    if kind is None:
        return {}
    if issubclass(kind, msgspec.Struct):
        return dict(zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True))
    if dataclasses.is_dataclass(kind):
        return {each.name: each.name for each in dataclasses.fields(kind) if each.init}
    return {name: name for name in kind.__annotations__}

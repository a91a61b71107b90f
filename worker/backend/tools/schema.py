"""From the signature of a function to the JSON schema of its arguments, and from JSON to checked arguments.

msgspec does both: a Struct is made of the parameters. What the function has a default for is left out of the call where
nobody gives it, so that the default is the function's own.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec

from segue.worker.backend.tools.context import ToolContext

_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")
_SECTION = re.compile(r"(Args|Arguments|Parameters):\s*$")
_DESCRIBED = re.compile(r"\*{0,2}(?P<name>\w+)\s*(\([^)]*\))?\s*:\s*(?P<text>.*)$")
_UNFIT = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


class SignatureError(TypeError):
    """A function can't be a tool; the message says which parameter is to blame."""


class ArgumentsError(ValueError):
    """Arguments don't fit; the message names the argument."""


class Signature:
    """What a tool takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Raises `SignatureError`."""
        self.description, described = documentation(function)
        """The first paragraph of the docstring."""
        self.context: str | None = None
        """The name of the parameter that is a `ToolContext`."""
        hints = _hints(function)
        fields: list[tuple[str, Any, Any] | tuple[str, Any]] = []
        defaults: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            name = parameter.name
            if parameter.kind in _UNFIT:
                raise SignatureError(f"parameter {name}: it can't be given by name")
            if name not in hints:
                raise SignatureError(f"parameter {name} has no type")
            if hints[name] is ToolContext:
                self.context = name
                continue
            kind = _described(hints[name], described.get(name), name)
            if parameter.default is parameter.empty:
                fields.append((name, kind))
            else:
                defaults[name] = parameter.default
                fields.append((name, kind | msgspec.UnsetType, msgspec.UNSET))
        self._type: type[msgspec.Struct] = msgspec.defstruct(
            function.__name__, fields, kw_only=True, forbid_unknown_fields=True
        )
        self.parameters = _schema(self._type, defaults)
        """A JSON schema of type object."""

    def decode(self, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
        """The arguments to call the function with, from JSON text or what was read from it.

        Nothing at all (which models write for a tool without parameters) is no arguments. Raises `ArgumentsError`.
        """
        try:
            if isinstance(arguments, str):
                text = arguments.strip()
                found = msgspec.json.decode(text if text not in {"", "null"} else "{}", type=self._type)
            else:
                found = msgspec.convert(dict(arguments), self._type)
        except msgspec.ValidationError as error:
            raise ArgumentsError(self._explain(str(error))) from None
        except Exception as error:  # noqa: BLE001 - what a model writes may be anything
            raise ArgumentsError(f"the arguments are no JSON: {error}") from None
        given = {name: getattr(found, name) for name in self._type.__struct_fields__}
        return {name: value for name, value in given.items() if value is not msgspec.UNSET}

    def _explain(self, text: str) -> str:
        at = _AT.match(text)
        what, path = (at["what"], at["path"]) if at else (text, None)
        if path:
            return f"argument {path}: {what[:1].lower()}{what[1:]}"
        if missing := _MISSING.match(what):
            return f"argument {missing['name']} is missing"
        if unknown := _UNKNOWN.match(what):
            takes = ", ".join(self._type.__struct_fields__) or "none"
            return f"there is no argument {unknown['name']}; it takes {takes}"
        return f"the arguments are one JSON object: {what[:1].lower()}{what[1:]}"


def documentation(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The first paragraph of the docstring, and what its section ``Args:`` says of each parameter (Google's style)."""
    lines = (inspect.getdoc(function) or "").splitlines()
    paragraph: list[str] = []
    for line in lines:
        if not line.strip() and paragraph:
            break
        paragraph.append(line.strip())
    described: dict[str, str] = {}
    inside, margin, name = False, 0, ""
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if _SECTION.match(line):
            inside, margin, name = True, 0, ""
        elif inside and line.strip():
            if indent == 0:
                inside = False
                continue
            margin = margin or indent
            entry = _DESCRIBED.match(line.strip()) if indent <= margin else None
            if entry:
                name = entry["name"]
                described[name] = entry["text"].strip()
            elif name:
                described[name] = f"{described[name]} {line.strip()}".strip()
    return " ".join(paragraph).strip(), described


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise SignatureError(f"its types can't be read: {type(error).__name__}: {error}") from error


def _described(kind: Any, text: str | None, name: str) -> Any:
    """`kind` with its description: what a text in ``Annotated`` says, else the docstring."""
    metadata = list(getattr(kind, "__metadata__", ()))
    texts = [each for each in metadata if isinstance(each, str)]
    rest = [each for each in metadata if isinstance(each, msgspec.Meta)]
    plain = kind.__origin__ if metadata else kind
    for each in rest:
        plain = Annotated[plain, each]
    try:
        msgspec.json.schema(plain)
    except Exception as error:
        raise SignatureError(f"parameter {name}: {_first_line(error)}") from error
    description = texts[0] if texts else text
    return Annotated[plain, msgspec.Meta(description=description)] if description else plain


def _schema(kind: type[msgspec.Struct], defaults: Mapping[str, Any]) -> dict[str, Any]:
    try:
        document = msgspec.json.schema(kind)
    except Exception as error:
        raise SignatureError(_first_line(error)) from error
    definitions: dict[str, Any] = document.pop("$defs")
    schema: dict[str, Any] = definitions.pop(document["$ref"].removeprefix("#/$defs/"))
    schema.pop("title", None)
    for name, value in defaults.items():
        with contextlib.suppress(Exception):  # a default that JSON can't say isn't said
            schema["properties"][name]["default"] = msgspec.to_builtins(value, str_keys=True)
    return schema | ({"$defs": definitions} if definitions else {})


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

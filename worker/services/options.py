"""A service's settings: where they come from, and in which order they count.

Low to high: what its type has as default; what the instance before it had; ``[services.NAME]`` of the settings file;
the env-file and the environment (``SEGUE_SERVICES__NAME__KEY``); what was chosen at run time and is remembered; what
this swap says. A swap drops what was chosen before where file or environment say something themselves.

The value of ``KEY`` may stand in a file of its own, named by ``KEY_file`` (relative to the settings file's directory, or
to the working directory), or in the systemd credential ``NAME.KEY`` (systemd.exec(5), ``LoadCredential=``), which counts
less than the settings file. All files are read anew each time; a newline at their end is no part of the value.

Text becomes what the setting's type asks for: numbers, booleans (``true``, ``false``, ``1``, ``0``), enums, literals,
dates, paths. What isn't made of one text (lists, mappings, structs) is written as JSON: ``["a", "b"]``.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any

import msgspec

from segue.worker.services import schema
from segue.worker.services.declaration import Declaration
from segue.worker.services.errors import OptionsError, Unknown
from segue.worker.services.secret import Secret, hide, secrets_in

__all__ = ["PREFIX", "Given", "Place", "Resolved", "Secret", "resolve"]

PREFIX = "SEGUE_SERVICES__"
_FILE_SUFFIX = "_file"
_AT = re.compile(r" - at `\$\.?(?P<key>[^`.\[]*)[^`]*`$")
_ENUM = "Invalid enum value"


@dataclasses.dataclass(frozen=True)
class Given:
    """A value and who says it."""

    value: Any
    source: str


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process looks for the settings of its services."""

    file: str | None = None
    env_file: str | None = None
    environ: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))
    """As it was before the env-file was read into it: a variable of its own goes before the file's."""

    def given(self, name: str, fields: frozenset[str]) -> dict[str, Given]:
        """What file and environment say explicitly of service `name`, which has `fields`. Raises `OptionsError`."""
        return (
            self._from_credentials(name, fields)
            | self._from_file(name, fields)
            | _from_environment(name, fields, self._env_file(), f"{self.env_file}: ")
            | _from_environment(name, fields, self.environ, "environment ")
        )

    def known_sections(self) -> frozenset[str]:
        """The services of which the settings file says something."""
        return frozenset(self._sections())

    def _sections(self) -> dict[str, Any]:
        if self.file is None:
            return {}
        try:
            with open(self.file, "rb") as stream:
                document: Any = tomllib.load(stream)
        except (OSError, ValueError) as error:  # ValueError: not TOML, or not UTF-8
            raise OptionsError(f"{self.file} can't be read: {_why(error)}") from None
        if os.path.basename(self.file) == "pyproject.toml":
            for key in ("tool", "segue"):
                document = document.get(key, {}) if isinstance(document, dict) else {}
        sections = document.get("services", {}) if isinstance(document, dict) else {}
        if not isinstance(sections, dict) or not all(isinstance(each, dict) for each in sections.values()):
            raise OptionsError(f"{self.file}: services is a table of tables, [services.NAME]")
        return sections

    def _from_file(self, name: str, fields: frozenset[str]) -> dict[str, Given]:
        found = {key.replace("-", "_"): value for key, value in self._sections().get(name, {}).items()}
        directory = os.path.dirname(self.file or "")
        return _with_files(found, fields, lambda key: f"{self.file}: services.{name}.{key}", directory)

    def _env_file(self) -> Mapping[str, str | None]:
        if self.env_file is None:
            return {}
        from dotenv import dotenv_values

        try:
            with open(self.env_file, encoding="utf-8") as stream:
                return dotenv_values(stream=stream)
        except (OSError, ValueError) as error:
            raise OptionsError(f"{self.env_file} can't be read: {_why(error)}") from None

    def _from_credentials(self, name: str, fields: frozenset[str]) -> dict[str, Given]:
        directory = self.environ.get("CREDENTIALS_DIRECTORY")
        if directory is None:
            return {}
        # of the names there only these are ours: others belong to whatever else the unit runs
        paths = {key: os.path.join(directory, f"{name}.{key}") for key in fields}
        sources = {key: f"credential {name}.{key}" for key in fields}
        return {
            key: Given(_read(path, sources[key]), sources[key])
            for key, path in paths.items()
            if os.path.isfile(path)
        }


def _from_environment(
    name: str, fields: frozenset[str], environ: Mapping[str, str | None], where: str
) -> dict[str, Given]:
    prefix = f"{PREFIX}{name.upper()}__"
    spelled = {key.upper(): key for each in fields for key in (each, each + _FILE_SUFFIX)}
    found = {
        spelled.get(variable[len(prefix) :].upper(), variable[len(prefix) :].lower()): value
        for variable, value in environ.items()
        if variable.startswith(prefix) and value is not None
    }
    return _with_files(found, fields, lambda key: f"{where}{prefix}{key.upper()}", os.getcwd())


def _with_files(
    found: Mapping[str, Any], fields: frozenset[str], source: Callable[[str], str], directory: str
) -> dict[str, Given]:
    given: dict[str, Given] = {}
    for key, value in found.items():
        target = key.removesuffix(_FILE_SUFFIX)
        if key == target or key in fields or target not in fields:
            given[key] = Given(value, source(key))
            continue
        if target in found:
            raise OptionsError(f"{source(key)}: {target} is given as well; one of them is enough")
        if not isinstance(value, str):
            raise OptionsError(f"{source(key)}: it is the path of a file")
        given[target] = Given(_read(os.path.join(directory, value), source(key)), source(key))
    return given


def _read(path: str, where: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read().rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise OptionsError(f"{where}: {path} can't be read: {_why(error)}") from None


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):  # whose message has some of the content
        return "it isn't UTF-8"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """The settings of an instance that is to be built."""

    settings: Any
    options: Any
    choices: dict[str, str]
    """What is to be remembered for instances that are built later."""
    digest: str
    """The same in two workers if, and only if, the settings are."""


def resolve(
    declaration: Declaration,
    place: Place,
    base: Any,
    choices: Mapping[str, str],
    query: Mapping[str, str] | None,
) -> Resolved:
    """Settings for a new instance: `base` is what the one before has, None at the first start.

    `choices` was remembered; `query` is what a swap says, None at a start. Raises `OptionsError`.
    """
    name, kind = declaration.name, declaration.settings
    said = dict(query or {})
    fields = schema.fields(kind)
    passing = {key: said.pop(key) for key in list(said) if key in schema.fields(declaration.options)}
    unknown = sorted(set(said) - fields)
    if unknown:
        takes = ", ".join(sorted(fields | schema.fields(declaration.options))) or "nothing"
        raise OptionsError(f"service {name!r} takes no {', '.join(unknown)}; it takes {takes}")
    options = _options(declaration, passing, at_start=query is None)
    given = place.given(name, fields)
    strange = sorted(set(given) - fields)
    if strange:
        has = ", ".join(sorted(fields)) or "none"
        raise OptionsError(
            f"service {name!r} has no setting {strange[0]} ({given[strange[0]].source}); it has {has}"
        )
    if kind is None:
        return Resolved(None, options, {}, "")
    remembered = {key: value for key, value in choices.items() if key in fields}
    if query is not None:
        remembered = {key: value for key, value in remembered.items() if key not in given}
    values = (
        {key: Given(value, "as before") for key, value in schema.values_of(base, kind).items()}
        | given
        | {key: Given(value, "chosen before") for key, value in remembered.items()}
        | {key: Given(value, "this swap") for key, value in said.items()}
    )
    settings = _convert(name, values, kind)
    return Resolved(settings, options, remembered | said, _digest(settings))


def _options(declaration: Declaration, said: Mapping[str, str], at_start: bool) -> Any:
    """What one swap says for itself; None at a start, where nobody says anything, unless all have a default."""
    if declaration.options is None:
        return None
    try:
        values = {key: Given(value, "this swap") for key, value in said.items()}
        return _convert(declaration.name, values, declaration.options)
    except OptionsError:
        if at_start:
            return None
        raise


def _convert(name: str, given: Mapping[str, Given], kind: type) -> Any:
    hints = schema.hints(kind)
    values = {key: _structured(each.value, hints.get(key, Any)) for key, each in given.items()}
    try:
        return msgspec.convert(
            schema.encoded(kind, values), kind, strict=False, from_attributes=True, dec_hook=_decode
        )
    except Unknown:
        raise
    except Exception as error:  # noqa: BLE001 - a type may raise what it likes
        # nothing of the error itself goes on: its text, and its traceback, may show values
        raise OptionsError(f"settings of service {name!r}: {_explain(error, given, kind, hints)}") from None


def _explain(error: Exception, given: Mapping[str, Given], kind: type, hints: Mapping[str, Any]) -> str:
    text = str(error) if isinstance(error, msgspec.ValidationError) else f"{type(error).__name__}: {error}"
    at = _AT.search(text)
    text = text[: at.start()] if at else text
    key = schema.field_of(kind, at["key"]) if at else ""
    if text.startswith(_ENUM):
        known = ", ".join(_choices(hints.get(key)))
        text = f"it is one of {known}" if known else _ENUM
    elif error.__cause__ is not None or not isinstance(error, msgspec.ValidationError):
        # not msgspec's own words, but those of a `__post_init__`, which may name what it doesn't like
        shown = [value for each in given.values() for value in _texts(each)]
        text = hide(text, shown)
    return f"{key} ({given[key].source}): {text}" if key in given else text


def _choices(hint: Any) -> Iterable[str]:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [str(each.value) for each in hint]
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return [str(each) for each in parts]
    return [each for part in parts for each in _choices(part)]


def _texts(given: Given) -> list[str]:
    """What must not be shown of a value."""
    found = secrets_in(given.value)
    if given.source != "as before" and isinstance(given.value, str | int | float):
        found.append(str(given.value))
    return found


def _structured(value: Any, hint: Any) -> Any:
    """A text that is JSON, unless the setting's type takes it as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in {"[", "{"}:
        return value
    try:
        return msgspec.convert(value, hint, strict=False, dec_hook=_decode)
    except Exception:  # noqa: BLE001 - whatever it is, the conversion of all of them says it
        try:
            return msgspec.json.decode(value)
        except msgspec.DecodeError:
            return value


def _decode(kind: type, value: Any) -> Any:
    if kind is Secret:
        if isinstance(value, Secret):
            return value
        if isinstance(value, str):
            return Secret(value)
        raise TypeError("a secret is a text")
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and issubclass(kind, PurePath):
        return kind(value)
    raise NotImplementedError(f"settings of type {kind.__name__} can't be read from text")


def _encode(value: Any) -> str:
    return value.reveal() if isinstance(value, Secret) else repr(value)


def _digest(settings: Any) -> str:
    encoded = msgspec.json.encode(settings, enc_hook=_encode, order="deterministic")
    return hashlib.sha256(encoded).hexdigest()[:16]

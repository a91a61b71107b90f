"""A service's settings: where they come from, and in which order they count.

Low to high: what its type has as default; what the instance before it had; ``[services.NAME]`` of the settings file;
the env-file and the environment (``SEGUE_SERVICES__NAME__KEY``); what was chosen at run time and is remembered; what
this swap says. A swap drops what was chosen before where file or environment say something themselves.

The value of ``KEY`` may stand in a file of its own, named by ``KEY_file``, or in the systemd credential ``NAME.KEY``
(systemd.exec(5), ``LoadCredential=``). All files are read anew each time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tomllib
from collections.abc import Mapping
from typing import Any

import msgspec

from segue.worker.services.declaration import Declaration
from segue.worker.services.errors import OptionsError, Unknown

PREFIX = "SEGUE_SERVICES__"
_FILE_SUFFIX = "_file"


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
        return "********"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process looks for the settings of its services."""

    file: str | None = None
    env_file: str | None = None
    environ: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))
    """As it was before the env-file was read into it: a variable of its own goes before the file's."""

    def given(self, name: str) -> dict[str, Any]:
        """What file and environment say explicitly of service `name`. Raises `OptionsError`."""
        return self._from_credentials(name) | self._from_file(name) | self._from_environment(name)

    def known_sections(self) -> frozenset[str]:
        """The services of which the settings file says something."""
        return frozenset(self._sections())

    def _sections(self) -> dict[str, Any]:
        if self.file is None:
            return {}
        try:
            with open(self.file, "rb") as stream:
                document = tomllib.load(stream)
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise OptionsError(f"{self.file} can't be read: {error}") from error
        if os.path.basename(self.file) == "pyproject.toml":
            document = document.get("tool", {}).get("segue", {})
        sections = document.get("services", {})
        if not isinstance(sections, dict) or not all(isinstance(each, dict) for each in sections.values()):
            raise OptionsError(f"{self.file}: services is a table of tables, [services.NAME]")
        return sections

    def _from_file(self, name: str) -> dict[str, Any]:
        directory = os.path.dirname(self.file or "")
        found = {key.replace("-", "_"): value for key, value in self._sections().get(name, {}).items()}
        return _with_files(found, f"{self.file}: services.{name}", directory)

    def _from_environment(self, name: str) -> dict[str, Any]:
        prefix = f"{PREFIX}{name.upper()}__"
        environ: dict[str, str | None] = {**self._env_file(), **self.environ}
        found = {
            variable[len(prefix) :].lower(): value
            for variable, value in environ.items()
            if variable.startswith(prefix) and value is not None
        }
        return _with_files(found, f"environment {prefix}", os.getcwd())

    def _env_file(self) -> dict[str, str | None]:
        if self.env_file is None:
            return {}
        from dotenv import dotenv_values

        return dict(dotenv_values(self.env_file))

    def _from_credentials(self, name: str) -> dict[str, Any]:
        directory = self.environ.get("CREDENTIALS_DIRECTORY")
        if directory is None or not os.path.isdir(directory):
            return {}
        return {
            entry.name[len(name) + 1 :]: _read(entry.path, f"credential {entry.name}")
            for entry in os.scandir(directory)
            if entry.name.startswith(f"{name}.") and entry.is_file()
        }


def _with_files(found: Mapping[str, Any], where: str, directory: str) -> dict[str, Any]:
    values = dict(found)
    for key, path in found.items():
        if key.endswith(_FILE_SUFFIX) and isinstance(path, str):
            del values[key]
            place = os.path.join(directory, path)
            values[key[: -len(_FILE_SUFFIX)]] = _read(place, f"{where}.{key}")
    return values


def _read(path: str, where: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionsError(f"{where}: {path} can't be read: {error}") from error


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
    said = dict(query or {})
    fields = _fields(declaration.settings)
    passing = {key: said.pop(key) for key in list(said) if key in _fields(declaration.options)}
    unknown = sorted(set(said) - fields)
    if unknown:
        takes = sorted(fields | _fields(declaration.options))
        raise OptionsError(
            f"service {declaration.name!r} takes no {', '.join(unknown)}; it takes {', '.join(takes) or 'nothing'}"
        )
    options = None
    if declaration.options is not None:
        options = _convert(declaration, passing, declaration.options)
    if declaration.settings is None:
        return Resolved(None, options, {}, "")
    given = place.given(declaration.name)
    strange = sorted(set(given) - fields)
    if strange:
        raise OptionsError(
            f"service {declaration.name!r} has no setting {', '.join(strange)} "
            f"({place.file or 'environment'}); it has {', '.join(sorted(fields))}"
        )
    remembered = {key: value for key, value in choices.items() if key in fields}
    if query is not None:
        remembered = {key: value for key, value in remembered.items() if key not in given}
    remembered |= said
    values = _values(base, declaration.settings) | given | remembered
    settings = _convert(declaration, values, declaration.settings)
    return Resolved(settings, options, remembered, _digest(settings))


def _fields(kind: type | None) -> frozenset[str]:
    if kind is None:
        return frozenset()
    if dataclasses.is_dataclass(kind):
        return frozenset(each.name for each in dataclasses.fields(kind))
    return frozenset(getattr(kind, "__struct_fields__", None) or getattr(kind, "__annotations__", {}))


def _values(base: Any, kind: type) -> dict[str, Any]:
    if base is None:
        return {}
    if isinstance(base, Mapping):
        return dict(base)
    return {name: getattr(base, name) for name in _fields(kind)}


def _convert(declaration: Declaration, values: dict[str, Any], kind: type) -> Any:
    try:
        return msgspec.convert(values, kind, strict=False, from_attributes=True, dec_hook=_decode)
    except Unknown:
        raise
    except Exception as error:
        raise OptionsError(f"settings of service {declaration.name!r}: {error}") from error


def _decode(kind: type, value: Any) -> Any:
    if kind is Secret:
        if isinstance(value, Secret):
            return value
        if isinstance(value, str):
            return Secret(value)
        raise TypeError("a secret is a text")
    if isinstance(value, kind):
        return value
    raise NotImplementedError(f"settings of type {kind.__name__} can't be read from text")


def _encode(value: Any) -> str:
    return value.reveal() if isinstance(value, Secret) else repr(value)


def _digest(settings: Any) -> str:
    encoded = msgspec.json.encode(settings, enc_hook=_encode, order="deterministic")
    return hashlib.sha256(encoded).hexdigest()[:16]

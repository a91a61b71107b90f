"""Where settings come from: flags, environment, settings file; found, checked for their type, and named.

The order of precedence is that of `collect`'s levels. A value is checked only where it is the one that counts, so
that a flag mends a wrong variable; but a settings file is checked whole, since a key in it that is wrong or unknown
is a mistake also on the day when something else overrides it.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import msgspec

from segue.supervisor.addresses import absolute
from segue.supervisor.setting_schema import ADDRESS_FORMS, OTHER_VARIABLES, Form, Kind, Setting, SettingsError
from segue.supervisor.setting_table import BY_KEY, REFUSED, TABLE

PREFIX = "SEGUE_"
SERVICES = "services"
"""The section that belongs to the application's services: ``[services.NAME]``. Workers read it, with every swap anew."""
SERVICES_PREFIX = "SEGUE_SERVICES__"
DEFAULT_FILES = ("segue.toml", "pyproject.toml")
_TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})
_FALSE = frozenset({"0", "false", "f", "no", "n", "off"})
_TYPES: dict[Kind, Any] = {
    Kind.TEXT: str,
    Kind.FILE: str,
    Kind.DIRECTORY: str,
    Kind.INTEGER: int,
    Kind.NUMBER: float,
    Kind.SIZE: int,
    Kind.SWITCH: bool,
    Kind.LIST: list[str],
}
_EMPTY_COUNTS = frozenset({"uds", "forwarded-allow-ips"})
"""Elsewhere an empty text is as good as none: it turns off what a lower place has set. Here it is a mistake, or
means to trust nobody."""
_KUBERNETES = re.compile(r"SEGUE_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_.*)")
"""What Kubernetes sets in every container of a namespace that has a Service called segue."""


class Value(msgspec.Struct, frozen=True):
    """A value and where it was given."""

    value: Any
    source: str
    """``flag --port``, ``environment SEGUE_PORT``, a file's path (with ``[tool.segue]``) or ``default``."""
    parsed: bool = True
    """False: text out of the environment, still to be read as what the setting is."""


class Given(msgspec.Struct, frozen=True):
    """What was given, each key from the place that counts. What nobody gave is not in it."""

    values: dict[str, Value]
    file: str | None
    """The settings file that was read."""
    file_source: str
    """Who named it; ``default`` if it was found, or none was."""

    def get(self, key: str) -> Any:
        """The value of `key`, or its default."""
        return self.values[key].value if key in self.values else BY_KEY[key].default

    def source(self, key: str) -> str:
        """Where it comes from."""
        return self.values[key].source if key in self.values else "default"

    def place(self, key: str) -> str:
        """Key and place, for an error: ``ssl-keyfile (flag --ssl-keyfile)``."""
        return f"{key} ({self.source(key)})"


_Level = dict[str, Value]


def collect(flags: Mapping[str, Any], environ: Mapping[str, str], base_dir: str) -> Given:
    """Find what was given, and check its types. Reads the settings file. Raises `SettingsError`."""
    _refuse_unknown_variables(environ)
    from_flags = _flags(flags)
    path, file_source = _named_file(flags, environ)
    file, from_file = _file(path, file_source, base_dir)
    levels = (from_flags, _own_environment(environ), _uvicorn_environment(environ), from_file)
    skipped = _settle_address(levels)
    values: _Level = {}
    for setting in TABLE:
        if setting.key in skipped:
            continue
        for level in levels:
            if setting.key in level:
                values[setting.key] = _convert(setting, level[setting.key])
                break
    return Given(values, file, file_source)


def fail(key: str, value: Any, source: str, expected: str) -> NoReturn:
    """Raise the `SettingsError` for one wrong value. A secret is not shown."""
    setting = BY_KEY[key]
    shown = "" if setting.secret else f" = {value!r}"
    default = setting.shown_default or setting.default
    default = f"{default:g}" if isinstance(default, float) else default
    usual = f" for the default ({default})" if default not in {None, "", ()} else ""
    raise SettingsError(
        f"{key}{shown} ({source}): expected {expected}; correct it, or leave it out{usual}"
    ) from None


def _flags(flags: Mapping[str, Any]) -> _Level:
    level: _Level = {}
    for name, value in flags.items():
        key = name.replace("_", "-")
        if key in REFUSED:
            _refuse(key, f"flag --{key}")
        setting = BY_KEY.get(key)
        if setting is None:
            continue  # --config, and what a command has beside the settings
        source = f"flag --{key}"
        if setting.key == "app":
            source = "argument APP"
        elif setting.form is Form.PAIR and value is False:
            source = f"flag --no-{key}"
        level[key] = Value(list(value) if isinstance(value, tuple) else value, source)
    return level


def _refuse(key: str, source: str) -> NoReturn:
    raise SettingsError(
        f"{key} ({source}) is an option of uvicorn that segue does not take: {REFUSED[key].reason}"
    )


def _own_environment(environ: Mapping[str, str]) -> _Level:
    level: _Level = {}
    for setting in TABLE:
        variable = _own_variable(setting.key)
        if environ.get(variable) and not _from_kubernetes(variable, environ[variable]):
            level[setting.key] = Value(environ[variable], f"environment {variable}", parsed=False)
    return level


def _uvicorn_environment(environ: Mapping[str, str]) -> _Level:
    for key, refused in REFUSED.items():
        variable = f"UVICORN_{refused.uvicorn.upper()}"
        value = environ.get(variable, "")
        if value and refused.variable and not (refused.switch and value.strip().lower() in _FALSE):
            _refuse(key, f"environment {variable}")
    level: _Level = {}
    for setting in TABLE:
        if setting.uvicorn is None:
            continue
        variable = f"UVICORN_{setting.uvicorn.upper()}"
        if environ.get(variable):
            text: Any = environ[variable]
            is_list = setting.kind is Kind.LIST
            level[setting.key] = Value(
                text.split() if is_list else text, f"environment {variable}", parsed=is_list
            )
        elif setting.variable and setting.variable in environ:
            text = environ[setting.variable]
            if text or setting.key in _EMPTY_COUNTS:
                level[setting.key] = Value(text, f"environment {setting.variable}", parsed=False)
    return level


def _own_variable(key: str) -> str:
    return PREFIX + key.replace("-", "_").upper()


def _from_kubernetes(variable: str, value: str) -> bool:
    is_link = variable == "SEGUE_PORT" and re.match(r"(tcp|udp|sctp)://", value) is not None
    return is_link or _KUBERNETES.fullmatch(variable) is not None


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = OTHER_VARIABLES | {_own_variable(setting.key) for setting in TABLE}
    for variable in sorted(environ):
        if (
            not variable.startswith(PREFIX)
            or variable in known
            or variable.startswith(SERVICES_PREFIX)
            or _from_kubernetes(variable, environ[variable])
        ):
            continue
        key = variable.removeprefix(PREFIX).lower().replace("_", "-")
        if key in REFUSED:
            if REFUSED[key].switch and environ[variable].strip().lower() in _FALSE | {""}:
                continue
            _refuse(key, f"environment {variable}")
        raise SettingsError(
            f"{variable} (environment) is not a setting of segue{_suggest(variable, known)}; "
            "unset it, or see 'segue serve --help'"
        )


def _named_file(flags: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[str | None, str]:
    if flags.get("config"):
        return str(flags["config"]), "flag --config"
    if environ.get("SEGUE_CONFIG"):
        return environ["SEGUE_CONFIG"], "environment SEGUE_CONFIG"
    return None, "default"


def _file(named: str | None, source: str, base_dir: str) -> tuple[str | None, _Level]:
    if named is not None:
        path = absolute(named, base_dir)
        table = _read(path)
        if table is None:
            raise SettingsError(f"config = {named!r} ({source}): there is no file {path}; correct the path")
        if os.path.basename(path) == "pyproject.toml":
            section = _section(table, path)
            if section is None:
                raise SettingsError(
                    f"config = {named!r} ({source}): {path} has no section [tool.segue]; add it"
                )
            return path, _level(section, f"{path} [tool.segue]")
        return path, _level(table, path)
    for name in DEFAULT_FILES:
        path = absolute(name, base_dir)
        table = _read(path)
        if table is None:
            continue
        if name != "pyproject.toml":
            return path, _level(table, path)
        section = _section(table, path)
        if section is not None:
            return path, _level(section, f"{path} [tool.segue]")
    return None, {}


def _read(path: str) -> dict[str, Any] | None:
    """The file's content; None if there is no such file."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SettingsError(
            f"{path} can't be read: {error.strerror}; mend it, or name another with --config"
        ) from error
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SettingsError(f"{path}, line {line}: is not UTF-8 text; save it as UTF-8") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        where = re.search(r"line (\d+)", str(error))
        line = int(where[1]) if where else data.rstrip().count(b"\n") + 1
        raise SettingsError(f"{path}, line {line}: is not TOML: {error}; correct the line") from error


def _section(table: dict[str, Any], path: str) -> dict[str, Any] | None:
    tool = table.get("tool", {})
    section = tool.get("segue") if isinstance(tool, dict) else None
    if section is not None and not isinstance(section, dict):
        raise SettingsError(
            f"tool.segue = {section!r} ({path}): expected a section; write [tool.segue] above the keys"
        )
    return section


def _level(table: dict[str, Any], source: str) -> _Level:
    level: _Level = {}
    for written, value in table.items():
        key = written.replace("_", "-")
        if key == SERVICES:
            if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
                raise SettingsError(
                    f"services ({source}): expected sections; write [services.NAME] above the keys"
                )
            continue
        if key in REFUSED:
            if value is False:
                continue
            _refuse(key, source)
        setting = BY_KEY.get(key)
        if setting is None:
            hint = _suggest(key, BY_KEY)
            if key == "tool":
                hint = "; in this file the keys stand at the top, without [tool.segue]"
            raise SettingsError(
                f"{written} ({source}) is not a setting of segue{hint}; correct or remove it "
                "('segue serve --help' has them all)"
            )
        if key in level:
            raise SettingsError(f"{key} ({source}) is given twice, with '-' and with '_'; remove one of them")
        level[key] = _convert(setting, Value(value, source))
    return level


def _suggest(word: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _settle_address(levels: Iterable[_Level]) -> set[str]:
    """The keys that don't count, because a higher level says in another way where to listen.

    Two ways at one level contradict each other: `SettingsError`.
    """
    for level in levels:
        present = [(form, key) for form, keys in ADDRESS_FORMS.items() for key in keys if key in level]
        if not present:
            continue
        form, key = present[0]
        for other_form, other in present[1:]:
            if other_form != form:
                raise SettingsError(
                    f"{key} ({level[key].source}) and {other} ({level[other].source}) both say where to listen; "
                    "keep one of them (bind may be given several times)"
                )
        return {key for other, keys in ADDRESS_FORMS.items() if other != form for key in keys}
    return set()


def expected(setting: Setting) -> str:
    """What a setting takes, for a person."""
    if setting.choices:
        choices = ", ".join(repr(choice) for choice in setting.choices)
        return f"one of {choices}" + (
            ", or an import string (module:attribute)" if setting.importable else ""
        )
    if setting.kind is Kind.LIST:
        return "a list of texts" + (" or one text" if setting.key == "bind" else "")
    if setting.kind is Kind.SIZE:
        least = "above 0" if setting.above is not None else "from 0"
        return f"a number of bytes {least} up to 1024T, also with K, M, G or T after it ('512M')"
    if setting.kind not in {Kind.INTEGER, Kind.NUMBER}:
        return {Kind.SWITCH: "true or false", Kind.TEXT: "a text"}.get(
            setting.kind, f"the {setting.kind.value}"
        )
    words = ["a whole number" if setting.kind is Kind.INTEGER else "a number"]
    if setting.unit:
        words.append(f"of {setting.unit}")
    if setting.above is not None:
        words.append(f"above {setting.above:g}")
    if setting.minimum is not None:
        words.append(f"from {setting.minimum:g}")
    if setting.maximum is not None:
        words.append(f"up to {setting.maximum:.0f}")
    return " ".join(words)


def _convert(setting: Setting, given: Value) -> Value:
    """Check the type and the limits."""
    raw = given.value
    try:
        value = raw if given.parsed else _parse(setting, raw)
        if setting.key == "bind" and isinstance(value, str):
            value = [value]
        if setting.kind is Kind.SIZE and isinstance(value, str) and value:
            value = parse_size(value)
        value = msgspec.convert(value, type=_TYPES[setting.kind], strict=True)
        if setting.kind in {Kind.INTEGER, Kind.SIZE} and isinstance(raw, float):
            raise ValueError
        value = tuple(value) if isinstance(value, list) else value
        if value == "" and setting.default is None and setting.key not in _EMPTY_COUNTS:
            value = None  # given as empty: off
        elif not _within(setting, value):
            raise ValueError
    except (ValueError, OverflowError):  # msgspec.ValidationError is a ValueError
        fail(setting.key, raw, given.source, expected(setting))
    return Value(value, given.source)


def _within(setting: Setting, value: Any) -> bool:
    if setting.choices:
        return value in setting.choices or (setting.importable and _IMPORT.fullmatch(value) is not None)
    if setting.kind not in {Kind.INTEGER, Kind.NUMBER, Kind.SIZE}:
        return True
    return (
        math.isfinite(value)
        and (setting.minimum is None or value >= setting.minimum)
        and (setting.above is None or value > setting.above)
        and (setting.maximum is None or value <= setting.maximum)
    )


_IMPORT = re.compile(r"[^\s:]+:[^\s:]+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """``512M``, ``1.5GiB`` or ``1000`` as bytes; the letters are powers of 1024, as to systemd. Raises `ValueError`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    power = " KMGT".index((match[2] or " ").upper())
    return int(float(match[1]) * 1024**power)


def show_size(size: int) -> str:
    """The shortest way to write it without loss."""
    for power, letter in enumerate("TGMK"):
        unit = 1024 ** (4 - power)
        if size and size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


def _parse(setting: Setting, text: str) -> Any:
    """Read a variable as what the setting is. Raises `ValueError`."""
    if setting.kind is Kind.INTEGER:
        return int(text)
    if setting.kind is Kind.NUMBER:
        return float(text)
    if setting.kind is Kind.SWITCH:
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise ValueError
        return word in _TRUE
    if setting.kind is Kind.LIST:
        if setting.key == "header":  # values may hold commas and blanks
            return [line.strip() for line in text.splitlines() if line.strip()]
        return [item for item in re.split(r"[,\s]+", text) if item]
    return text

"""What a setting is: its type, its limits and its names. The settings themselves are in `setting_table`."""

from __future__ import annotations

import enum
from typing import Any

import msgspec


class SettingsError(Exception):
    """Settings that can't be used; the message names key, place, value, what is expected and the next step."""


class Kind(enum.Enum):
    """What a value is."""

    TEXT = "text"
    INTEGER = "whole number"
    NUMBER = "number"
    SIZE = "number of bytes"
    SWITCH = "true or false"
    LIST = "list of texts"
    FILE = "path of a file that exists"
    DIRECTORY = "path of a directory that exists"


class Form(enum.Enum):
    """How a `Kind.SWITCH` looks on the command line; uvicorn has all three."""

    ON = "--key"
    PAIR = "--key/--no-key"
    VALUE = "--key true"


class Group(enum.StrEnum):
    """Headings of the help, in this order."""

    APPLICATION = "Application"
    LISTEN = "Where to listen"
    PROCESSES = "Instance and workers"
    DEPLOYS = "Reloads and rollbacks"
    DEVELOPMENT = "Development"
    HEALTH = "Health and control"
    HTTP = "HTTP"
    WEBSOCKETS = "WebSockets"
    TLS = "TLS"
    PROXIES = "Proxies and headers"
    LOGGING = "Logging"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One setting."""

    key: str
    """Its name in the settings file; with ``--`` before it, its flag."""
    kind: Kind
    group: Group
    help: str
    default: Any = None
    """None: off, or left to uvicorn. Otherwise what `Settings` holds."""
    shown_default: str | None = None
    """What None amounts to, for the help and ``segue config``."""
    uvicorn: str | None = None
    """Its name in uvicorn's command and ``uvicorn.Config``, if uvicorn has it: gives ``UVICORN_<NAME>``, too."""
    variable: str | None = None
    """A further environment variable of uvicorn that gives it."""
    choices: tuple[str, ...] = ()
    importable: bool = False
    """Beside `choices` it takes the import string (``module:attribute``) of an implementation."""
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    unit: str = ""
    metavar: str | None = None
    form: Form = Form.VALUE
    alias: str | None = None
    """Another flag for the same."""
    secret: bool = False
    """Never shown, not in errors either."""
    restart: bool = False
    """A reload doesn't apply it; only a restart of the master does."""

    @property
    def name(self) -> str:
        """Its name as a Python identifier, in `Settings` and among the flags."""
        return self.key.replace("-", "_")

    @property
    def flag(self) -> str:
        """What people type."""
        return "APP" if self.key == "app" else f"--{self.key}"

    @property
    def in_config(self) -> bool:
        """Whether the worker passes it to ``uvicorn.Config``."""
        return self.uvicorn is not None and self.uvicorn not in SUPERVISED


class Refused(msgspec.Struct, frozen=True):
    """An option of uvicorn that is understood and not taken."""

    reason: str
    """What to do instead."""
    uvicorn: str
    switch: bool = False
    variable: bool = True
    """Whether its environment variable is refused, too."""


SUPERVISED = frozenset(
    {
        *("app", "host", "port", "uds", "fd", "workers", "app_dir"),
        *("reload", "reload_dirs", "reload_includes", "reload_excludes", "reload_delay"),
    }
)
"""Options of uvicorn that the supervisor itself carries out."""

ADDRESS_FORMS: dict[str, tuple[str, ...]] = {
    "bind": ("bind",),
    "uds": ("uds",),
    "fd": ("fd",),
    "tcp": ("host", "port"),
}
"""The ways to say where to listen: one at a time."""

OTHER_VARIABLES = frozenset({"SEGUE_INSTANCE_NAME", "SEGUE_CONFIG", "SEGUE_FDS"})
"""Variables with our prefix that are not settings."""

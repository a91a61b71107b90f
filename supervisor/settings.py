"""The effective settings of an instance, and where each of them comes from.

Precedence: flag, ``SEGUE_<KEY>``, uvicorn's variables (``UVICORN_<NAME>``, ``WEB_CONCURRENCY``,
``FORWARDED_ALLOW_IPS``), settings file, default. Where to listen is one decision: the highest of these places that
says anything about it (``bind``, or ``uds``, or ``fd``, or ``host`` and ``port``) puts the other ways aside.

`load` is called again at every reload and reads files again. It checks everything that can be known without
importing the application, so that a reload with a mistake is refused with the reason. Paths are made absolute and
never resolved: ``/srv/current`` may lead elsewhere at the next reload. Neither uvicorn nor ssl is imported here.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from typing import Any

import msgspec

from segue.supervisor import setting_checks as checks
from segue.supervisor.addresses import absolute
from segue.supervisor.setting_schema import ADDRESS_FORMS, Kind, SettingsError
from segue.supervisor.setting_sources import collect, show_size
from segue.supervisor.setting_table import BY_KEY, TABLE

__all__ = [
    "Effective",
    "Settings",
    "SettingsError",
    "load",
    "logical_cwd",
    "read_token",
    "restart_only",
    "show",
    "show_running",
]

MIN_TOKEN_LENGTH = 16
MAX_TOKEN_LENGTH = 1024
_MASK = "********"
_WIDEST = 40
"""Columns; what is longer pushes only its own line to the right."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every effective value. Times in seconds; paths absolute, with their symbolic links as given."""

    app: str | None
    """``module:attribute``; None for the built-in application."""
    factory: bool
    app_dir: str
    base_dir: str
    """The logical working directory at start."""
    python: str
    """The interpreter of the workers."""
    binds: tuple[str, ...]
    """As `addresses.normalize` writes them: ``127.0.0.1:8000``, ``[::1]:8000``, ``:8000``, ``unix:/path``, ``fd:3``."""
    workers: int
    name: str
    runtime_dir: str | None
    """As given; None: the default search."""
    ready_timeout: float
    drain_timeout: float
    timeout_graceful_shutdown: float
    idle_grace: float
    queue_limit: int
    queue_timeout: float
    timeout_keep_alive: int
    heartbeat_timeout: float
    warm_up: tuple[str, ...]
    health_path: str | None
    request_metrics: bool
    log_format: str
    access_log_format: str
    admin: str | None
    control_group: str | None
    """Written as a bind."""
    token_file: str | None
    stop_delay: float
    strategy: str
    """``surge``, ``rolling`` or ``replace``."""
    replace_timeout: float
    canary: int | None
    """Workers; None: there is no canary."""
    canary_for: float
    probation: float
    probation_5xx: float
    """A share from 0 to 1, on top of what the previous generation had."""
    park_for: float | None
    """None: as long as the probation."""
    max_worker_rss: int | None
    """Bytes."""
    max_worker_rss_jitter: int | None
    """Bytes; None: a tenth of the limit."""
    max_worker_age: float | None
    max_worker_age_jitter: float | None
    """None: a tenth of the limit."""
    uvicorn: dict[str, Any]
    """Keyword arguments of ``uvicorn.Config``; what is not set is not in it, so that uvicorn's own default counts."""
    backlog: int
    reload: bool = False
    """Development mode: each save is a reload."""
    reload_dir: tuple[str, ...] = ()
    """Absolute; empty: the working directory and that of the application."""
    reload_include: tuple[str, ...] = ()
    reload_exclude: tuple[str, ...] = ()
    reload_delay: float = 0.25
    reload_pages: bool = True

    def __repr__(self) -> str:
        """Without secrets."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        secret = {setting.uvicorn for setting in TABLE if setting.secret}
        shown["uvicorn"] = {name: _MASK if name in secret else value for name, value in self.uvicorn.items()}
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class Effective(msgspec.Struct, frozen=True):
    """Settings, and where each key comes from."""

    settings: Settings
    sources: dict[str, str]
    """By key; the address in all its forms is ``bind``."""
    file: str | None
    """The settings file that was read."""


def load(flags: Mapping[str, Any], environ: Mapping[str, str], base_dir: str) -> Effective:
    """Find and check the settings. `flags` are those that were given on the command line, by parameter name.

    Reads files: not for the event loop. Raises `SettingsError`.
    """
    given = collect(flags, environ, base_dir)
    checks.check_encoding(given, base_dir)
    values = {setting.key: given.get(setting.key) for setting in TABLE}
    for setting in TABLE:
        if setting.kind in {Kind.FILE, Kind.DIRECTORY} and values[setting.key] is not None:
            values[setting.key] = checks.existing(setting, given, base_dir)
    python = checks.interpreter(given, environ, base_dir)
    checks.check_texts(given)
    checks.check_combinations(given, python)
    binds, bind_source = checks.settle_binds(given, base_dir)
    values["header"] = checks.split_headers(given)
    settings = Settings(
        app=values["app"],
        factory=values["factory"],
        app_dir=values["app-dir"] or base_dir,
        base_dir=base_dir,
        python=python,
        binds=binds,
        workers=values["workers"],
        name=values["name"],
        runtime_dir=values["runtime-dir"],
        ready_timeout=values["ready-timeout"],
        drain_timeout=values["drain-timeout"],
        timeout_graceful_shutdown=values["timeout-graceful-shutdown"],
        idle_grace=values["idle-grace"],
        queue_limit=values["queue-limit"],
        queue_timeout=values["queue-timeout"],
        timeout_keep_alive=values["timeout-keep-alive"],
        heartbeat_timeout=values["heartbeat-timeout"],
        warm_up=values["warm-up"],
        health_path=values["health-path"],
        request_metrics=values["request-metrics"],
        log_format=values["log-format"],
        access_log_format=values["access-log-format"],
        admin=checks.settle_admin(given, binds, base_dir),
        control_group=values["control-group"],
        token_file=values["token-file"],
        stop_delay=values["stop-delay"],
        strategy=values["strategy"],
        replace_timeout=values["replace-timeout"],
        canary=values["canary"],
        canary_for=values["canary-for"],
        # whoever has saved a mistake wants to see it
        probation=0.0 if values["reload"] and "probation" not in given.values else values["probation"],
        probation_5xx=values["probation-5xx"],
        park_for=values["park-for"],
        max_worker_rss=values["max-worker-rss"],
        max_worker_rss_jitter=values["max-worker-rss-jitter"],
        max_worker_age=values["max-worker-age"],
        max_worker_age_jitter=values["max-worker-age-jitter"],
        uvicorn={
            str(setting.uvicorn): values[setting.key]
            for setting in TABLE
            if setting.in_config and values[setting.key] is not None
        },
        backlog=values["backlog"],
        reload=values["reload"],
        reload_dir=checks.settle_reload_dirs(given, base_dir),
        reload_include=values["reload-include"],
        reload_exclude=values["reload-exclude"],
        reload_delay=values["reload-delay"],
        reload_pages=values["reload-pages"],
    )
    inputs = {key for keys in ADDRESS_FORMS.values() for key in keys}
    sources = {setting.key: given.source(setting.key) for setting in TABLE if setting.key not in inputs}
    sources |= {"bind": bind_source, "config": given.file_source}
    return Effective(settings, sources, given.file)


def read_token(path: str) -> str:
    """The bearer token in `path`, without the white space around it. Raises `SettingsError`.

    Refused: shorter than 16 characters, or not one word of printable ASCII; a file that users outside its group can
    use, or that its group can write to. Its group may read: that is how Kubernetes (``fsGroup``) and systemd hand
    secrets to a service.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            data = file.read(MAX_TOKEN_LENGTH + 3) if stat.S_ISREG(found.st_mode) else None
    except OSError as error:
        raise SettingsError(
            f"token-file {path} can't be read: {error.strerror}; mend it or name another"
        ) from error
    if data is None:
        raise SettingsError(f"token-file {path} is not a regular file; name another")
    if found.st_mode & 0o027:
        mode = stat.S_IMODE(found.st_mode)
        raise SettingsError(
            f"token-file {path} is open to other users (mode {mode:04o}); 'chmod 0600 {path}', or 0640 for its group"
        )
    token = data.decode("latin-1").strip()
    if not token:
        raise SettingsError(
            f"token-file {path} is empty; write a token of {MIN_TOKEN_LENGTH} characters or more into it"
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise SettingsError(
            f"token-file {path} must hold one word of printable ASCII; write such a token into it"
        )
    if not MIN_TOKEN_LENGTH <= len(token) <= MAX_TOKEN_LENGTH:
        raise SettingsError(
            f"token-file {path} holds a token of {len(token)} characters; "
            f"expected {MIN_TOKEN_LENGTH} to {MAX_TOKEN_LENGTH}"
        )
    return token


def restart_only(old: Settings, new: Settings) -> list[str]:
    """The keys that differ and that a reload does not apply, only a restart of the master."""
    return [
        setting.key
        for setting in TABLE
        if setting.restart and getattr(old, setting.name) != getattr(new, setting.name)
    ]


def differing(old: Settings, new: Settings) -> list[str]:
    """The keys whose values differ."""
    values = [
        {
            setting.key: msgspec.json.encode(
                settings.uvicorn.get(setting.uvicorn or "")
                if setting.in_config
                else getattr(settings, setting.name, None)
            )
            for setting in TABLE
        }
        | {"bind": msgspec.json.encode(settings.binds)}
        for settings in (old, new)
    ]
    return sorted(key for key in values[0] if values[0][key] != values[1][key])


def show(effective: Effective, as_json: bool) -> str:
    """Key, value and where it comes from, as a table or as JSON (``{key: {"value": …, "source": …}}``).

    Secrets are masked in both.
    """
    rows = {key: (_effective_value(key, effective), source) for key, source in effective.sources.items()}
    if as_json:
        document = {key: {"value": value, "source": source} for key, (value, source) in sorted(rows.items())}
        return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    return _table(rows)


def show_running(running: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What runs, and after it what a command given `here` would have instead. Both are JSON documents of `show`.

    What the running master was given as a flag stays over a reload, so that only another flag differs from it.
    """
    rows = {}
    for key, shown in running.items():
        source = shown["source"]
        other = here.get(key, shown)
        given = _is_flag(other["source"]) or not _is_flag(source)
        if given and other["value"] != shown["value"]:
            source += f"   (here: {_readable(key, other['value'])})"
        rows[key] = (shown["value"], source)
    return _table(rows)


def _is_flag(source: str) -> bool:
    return source.startswith(("flag ", "argument "))


def _table(rows: Mapping[str, tuple[Any, str]]) -> str:
    order = ["config", *(setting.key for setting in TABLE if setting.key in rows)]
    cells = [("KEY", "VALUE", "FROM")] + [(key, _readable(key, rows[key][0]), rows[key][1]) for key in order]
    widths = [min(max(len(row[column]) for row in cells), _WIDEST) for column in (0, 1)]
    return "\n".join(f"{key:{widths[0]}}  {value:{widths[1]}}  {source}" for key, value, source in cells)


def logical_cwd(environ: Mapping[str, str]) -> str:
    """The working directory by the name under which it was entered (``$PWD``), if that is where we are.

    Its symbolic links stay, so that each reload resolves them anew. A service manager that could not go where its unit says
    (``WorkingDirectory=-…``) leaves us in ``/``: it is still that one. Raises `SettingsError` if it is gone.
    """
    logical = environ.get("PWD", "")
    if not logical.startswith("/") or {".", ".."} & set(logical.split("/")):
        logical = ""
    try:
        if logical and os.path.samefile(logical, "."):
            return absolute(logical, "/")
    except (OSError, ValueError):
        pass  # a stale or broken $PWD
    try:
        physical = os.getcwd()
    except OSError as error:
        raise SettingsError(
            f"the working directory can't be found: {error.strerror}; change to one that exists"
        ) from error
    of_unit = environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())
    return absolute(logical, "/") if logical and physical == "/" and of_unit else physical


def _effective_value(key: str, effective: Effective) -> Any:
    settings = effective.settings
    if key == "config":
        return effective.file
    if key == "bind":
        return settings.binds
    setting = BY_KEY[key]
    value = (
        settings.uvicorn.get(setting.uvicorn or "") if setting.in_config else getattr(settings, setting.name)
    )
    return _MASK if setting.secret and value is not None else value


def _readable(key: str, value: Any) -> str:
    if value is None or value in ("", (), []):
        shown = BY_KEY[key].shown_default if key in BY_KEY else None
        return f"({shown})" if shown else "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if key in BY_KEY and BY_KEY[key].kind is Kind.SIZE:
        return show_size(value)
    if isinstance(value, float):
        return f"{value:.15g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(item if isinstance(item, str) else ": ".join(item) for item in value)
    return str(value)

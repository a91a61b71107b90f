"""What a setting's type doesn't say: texts with a form of their own, files that must exist, combinations.

Each check takes what was `Given`, so that its error can name the place, and raises `SettingsError`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping
from typing import Any

from segue.handoff.lines import sayable
from segue.handoff.messages import HOT
from segue.supervisor import addresses
from segue.supervisor.addresses import AddressError, absolute
from segue.supervisor.setting_schema import ADDRESS_FORMS, Kind, Setting, SettingsError
from segue.supervisor.setting_sources import Given, fail
from segue.supervisor.setting_table import TABLE

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_APP = re.compile(r"[^\s:/]+:[^\s:/]+")
_PATH = re.compile(r"/[!-~]*")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


def existing(setting: Setting, given: Given, base_dir: str) -> str:
    """The absolute path of a file or directory that must be there already. A fifo counts as a file: not opened."""
    path = absolute(given.get(setting.key), base_dir)
    reason = ""
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
        if is_directory != (setting.kind is Kind.DIRECTORY):
            reason = "it is a directory" if is_directory else "it is not a directory"
        elif not os.access(path, os.R_OK, effective_ids=True):
            reason = "permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError:
        reason = "it has a zero byte"
    if reason:
        noun = "directory" if setting.kind is Kind.DIRECTORY else "file"
        wanted = f"the path of a {noun} that can be read, but {path}: {reason}"
        fail(setting.key, given.get(setting.key), given.source(setting.key), wanted)
    return path


def interpreter(given: Given, environ: Mapping[str, str], base_dir: str) -> str:
    """The absolute path of the workers' interpreter; a bare name is looked up in ``PATH``."""
    python = given.get("python")
    if python is None:
        return sys.executable
    path = absolute(python, base_dir)
    if "/" not in python:
        found = shutil.which(python, path=environ.get("PATH", os.defpath))
        path = absolute(found, base_dir) if found else path
    if not os.path.isfile(path) or not os.access(path, os.X_OK, effective_ids=True):
        fail("python", python, given.source("python"), f"an interpreter, but there is none to run at {path}")
    return path


def check_encoding(given: Given, base_dir: str) -> None:
    """Everything is written down in a journal and told in JSON: names of files may have bytes that can't be."""
    if sayable(base_dir) != base_dir:
        raise SettingsError(
            f"the working directory {sayable(base_dir)} has a name that is not UTF-8; rename it, or start from another "
            "with --app-dir"
        )
    for key, found in given.values.items():
        for text in found.value if isinstance(found.value, (tuple, list)) else (found.value,):
            if isinstance(text, str) and sayable(text) != text:
                fail(key, text, found.source, "text in UTF-8")


def check_texts(given: Given) -> None:
    """Texts that have a form of their own."""

    def check(key: str, fits: bool, expected: str, value: Any = None) -> None:
        if not fits:
            fail(key, given.get(key) if value is None else value, given.source(key), expected)

    app, name, health = given.get("app"), given.get("name"), given.get("health-path")
    check(
        "app",
        app is None or _APP.fullmatch(app) is not None,
        f"module:attribute, for example {_example(app)}",
    )
    check(
        "name",
        _NAME.fullmatch(name) is not None,
        "1 to 64 of the characters A-Z, a-z, 0-9, '_', '.' and '-', the first not '.' or '-'",
    )
    expected = "a path that starts with '/', in printable ASCII without blanks (percent-encode others)"
    for path in given.get("warm-up"):
        check("warm-up", _PATH.fullmatch(path) is not None and "#" not in path, expected, path)
    if health is not None:
        check("health-path", _PATH.fullmatch(health) is not None, expected)
        check("health-path", not {"?", "#"} & set(health), "a path without '?' and '#'")
        check("health-path", health != HOT and not health.startswith(f"{HOT}/"), f"a path outside {HOT}")


def _example(app: str | None) -> str:
    module = (app or "").removesuffix(".py").strip("/").replace("/", ".")
    return f"{module}:app" if re.fullmatch(r"[\w.]+", module) else "shop.app:app"


def check_combinations(given: Given, python: str) -> None:
    """What contradicts itself; each message names both keys."""
    place = given.place
    if given.get("factory") and given.get("app") is None:
        raise SettingsError(
            f"{place('factory')} needs an app; name APP, the function that returns the application"
        )
    if given.get("limit-max-requests-jitter") and given.get("limit-max-requests") is None:
        raise SettingsError(
            f"{place('limit-max-requests-jitter')} is added to limit-max-requests, which is not set; set it, too"
        )
    for limit in ("max-worker-rss", "max-worker-age"):
        if given.get(f"{limit}-jitter") is not None and given.get(limit) is None:
            raise SettingsError(
                f"{place(f'{limit}-jitter')} is added to {limit}, which is not set; set it, too"
            )
    check_deploys(given)
    if given.get("ssl-certfile") is None:
        for key in (setting.key for setting in TABLE if setting.key.startswith("ssl-")):
            if given.get(key) is not None:
                raise SettingsError(f"{place(key)} needs ssl-certfile, which is not set; set it, too")
    if given.get("http2") and given.get("http") != "zttp":
        raise SettingsError(
            f"{place('http2')} needs http = 'zttp', but it is {given.get('http')!r} ({given.source('http')}); set it, too"
        )
    # another interpreter has its own packages: it says so itself when the worker starts
    if given.get("http") == "zttp" and python == sys.executable:
        importlib.invalidate_caches()
        if importlib.util.find_spec("zttp") is None:
            both = f"{place('http2')} needs it" if given.get("http2") else "or choose another"
            raise SettingsError(
                f"http = 'zttp' ({given.source('http')}): it is not installed for {python}; 'pip install zttp' ({both})"
            )


def check_deploys(given: Given) -> None:
    """How generations follow on one another."""
    place, strategy, canary = given.place, given.get("strategy"), given.get("canary")
    if canary is not None and strategy != "surge":
        raise SettingsError(
            f"{place('canary')} and strategy = {strategy!r} ({given.source('strategy')}) contradict each other: "
            "a canary runs beside all old workers; leave one of them out"
        )
    if canary is not None and canary > given.get("workers"):
        raise SettingsError(
            f"canary = {canary} ({given.source('canary')}) is more than workers = {given.get('workers')} "
            f"({given.source('workers')}); choose at most as many"
        )
    if strategy == "replace" and given.get("park-for"):
        raise SettingsError(
            f"{place('park-for')} keeps old workers beside the new ones, and strategy = 'replace' "
            f"({given.source('strategy')}) is for what can't run twice; leave one of them out"
        )


def settle_binds(given: Given, base_dir: str) -> tuple[tuple[str, ...], str]:
    """Where to listen, in normal form, and who says so."""
    form = next((form for form, keys in ADDRESS_FORMS.items() if set(keys) & set(given.values)), "tcp")
    if form == "bind" and not given.get("bind"):
        fail("bind", [], given.source("bind"), "at least one address")
    key = "host" if form == "tcp" else form
    written = list(given.get("bind")) if form == "bind" else [given.get(key)]
    binds: list[str] = []
    for text in written:
        try:
            if form == "tcp":
                bind = addresses.tcp(text or "", given.get("port"))
            elif form == "uds":
                bind = addresses.unix(text, base_dir)
            else:
                bind = addresses.normalize(f"fd:{text}" if form == "fd" else text, base_dir)
        except AddressError as error:
            raise SettingsError(f"{key} = {text!r} ({given.source(key)}) {error}") from error
        if bind in binds:
            other = written[binds.index(bind)]
            raise SettingsError(
                f"bind = {text!r} ({given.source('bind')}) is the same as bind = {other!r}; remove one"
            )
        binds.append(bind)
    origins = dict.fromkeys(given.source(part) for part in ADDRESS_FORMS[form])
    if len(origins) > 1:
        origins.pop("default", None)
    return tuple(binds), ", ".join(origins)


def settle_admin(given: Given, binds: tuple[str, ...], base_dir: str) -> str | None:
    """The address of the admin listener in normal form; not one of `binds`."""
    text = given.get("admin")
    if text is None:
        return None
    source = given.source("admin")
    if text.startswith("fd:"):
        fail("admin", text, source, "HOST:PORT, [IPv6]:PORT, :PORT or unix:PATH")
    try:
        admin = addresses.normalize(text, base_dir)
    except AddressError as error:
        raise SettingsError(f"admin = {text!r} ({source}) {error}") from error
    if admin in binds and not admin.endswith(":0"):
        raise SettingsError(
            f"admin = {text!r} ({source}) is the same as a bind ({admin}); choose another port"
        )
    return admin


def settle_reload_dirs(given: Given, base_dir: str) -> tuple[str, ...]:
    """The absolute paths of the directories to watch; each must be there if anything is watched."""
    paths = tuple(absolute(path, base_dir) for path in given.get("reload-dir"))
    if given.get("reload"):
        for written, path in zip(given.get("reload-dir"), paths, strict=True):
            if not os.path.isdir(path):
                wanted = f"directories, but {path} is none"
                fail("reload-dir", written, given.source("reload-dir"), wanted)
    return paths


def split_headers(given: Given) -> list[list[str]]:
    """The response headers as ``[name, value]``, without the blanks around either."""
    headers: list[list[str]] = []
    for text in given.get("header"):
        name, colon, value = (part.strip() for part in text.partition(":"))
        if not colon or not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            fail("header", text, given.source("header"), "'Name: value' (Latin-1, on one line)")
        headers.append([name, value])
    return headers

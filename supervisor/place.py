"""What a unit file for systemd says of one place: its paths, its addresses, its time-outs, and who runs it."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from segue.supervisor import settings as config
from segue.supervisor.finding import ANSWER_TIMEOUT_S, LAST_CHANCE_S
from segue.supervisor.lifecycle import PREPARE_TIMEOUT_S
from segue.supervisor.setting_schema import Form, Kind, Setting
from segue.supervisor.setting_table import TABLE
from segue.supervisor.turn import ACTIVATE_TIMEOUT_S, SLACK_S

NOTIFY_RELOAD, NOTIFY = "notify-reload", "notify"
NOTIFY_RELOAD_SINCE = 253
"""The first version of systemd that has it."""
TEMPLATE_NAME = "%i"
_STOP_SLACK_S = 30
_ACCOUNT = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,30}|[0-9]{1,10}")
"""A user or a group, as systemd takes it: by name or by number."""


class UnitError(Exception):
    """No unit can be made of these settings; the message says why and what to do."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What differs from one unit to another. Paths are absolute, with their symbolic links as given."""

    command: tuple[str, ...]
    """What runs segue."""
    arguments: tuple[str, ...] = ()
    """Of ``segue serve``: the application and its options."""
    app: str | None = None
    """None is the built-in one."""
    user: str
    group: str | None = None
    """Whose members may control it."""
    directory: str
    name: str = "default"
    """The instance's; `TEMPLATE_NAME` in a template."""
    runtime_dir: str | None = None
    """If it isn't one that systemd makes."""
    binds: tuple[str, ...] = ("127.0.0.1:8000",)
    ready_timeout: float = 60.0
    stop_delay: float = 0.0
    graceful_timeout: float = 30.0
    type: str = NOTIFY_RELOAD

    @property
    def is_template(self) -> bool:
        """Whether it is for several instances."""
        return self.name == TEMPLATE_NAME

    @property
    def unit(self) -> str:
        """The name of its files, without what follows the dot."""
        if self.is_template:
            return "segue@"
        return "segue" if self.name == "default" else f"segue-{self.name}"

    @property
    def base(self) -> str:
        """The name of its directories in /run and /var/lib."""
        return "segue-%i" if self.is_template else self.unit

    @property
    def start_timeout_s(self) -> int:
        """Longer than all that a start can take by segue's own deadlines, one after the other."""
        found = ANSWER_TIMEOUT_S + LAST_CHANCE_S
        return _rounded(found + PREPARE_TIMEOUT_S + self.ready_timeout + ACTIVATE_TIMEOUT_S + SLACK_S)

    @property
    def stop_timeout_s(self) -> int:
        """The same for a stop."""
        return _rounded(self.stop_delay + self.graceful_timeout + _STOP_SLACK_S)

    @property
    def writable(self) -> list[str]:
        """Directories in which segue itself has to make something, beside those that systemd makes for it."""
        sockets = {
            os.path.dirname(bind.removeprefix("unix:")) for bind in self.binds if bind.startswith("unix:")
        }
        return sorted(sockets - {"/run"} | ({self.runtime_dir} if self.runtime_dir else set()))

    @property
    def paths(self) -> list[str]:
        """What the unit's user has to be able to read."""
        return [self.directory, self.command[0]]


EXAMPLE = Place(
    command=("/srv/segue/venv/bin/segue",),
    arguments=("shop.app:app", "--workers", "2", "--bind", "127.0.0.1:8000"),
    app="shop.app:app",
    user="segue",
    directory="/srv/segue/current",
)
"""Of whom the files in ``systemd/`` are."""
EXAMPLE_TEMPLATE = msgspec.structs.replace(
    EXAMPLE,
    arguments=("--config", "/etc/segue/%i.toml"),
    name=TEMPLATE_NAME,
    binds=("unix:/run/segue-%i.sock",),
)


def here(
    flags: Mapping[str, Any], environ: Mapping[str, str], user: str | None, template: bool, type_: str | None
) -> tuple[Place, list[str]]:
    """A unit for what lies here, and what its user should know. Raises `SettingsError` and `UnitError`."""
    base_dir = config.logical_cwd(environ)
    if template and flags.get("name"):
        raise UnitError("a template has no name of its own: each instance is called by what follows 'segue@'")
    user = _user() if user is None else user
    if _ACCOUNT.fullmatch(user) is None:
        raise UnitError(f"user = {user!r} (flag --user): expected the name or the number of a user")
    loaded = {key: value for key, value in flags.items() if not (template and key in {"config", "name"})}
    effective = config.load(loaded, environ, base_dir)
    settings = effective.settings
    if template:
        flags = {"config": "/etc/segue/%i.toml"} | dict(flags)
    arguments = _arguments(flags, settings, base_dir, template=template)
    binds = settings.binds
    if template and effective.sources["bind"] == "default":
        binds = EXAMPLE_TEMPLATE.binds
    found = Place(
        command=_command(),
        arguments=arguments,
        app=settings.app,
        user=user,
        group=settings.control_group,
        directory=base_dir,
        name=TEMPLATE_NAME if template else settings.name,
        runtime_dir=settings.runtime_dir and os.path.abspath(settings.runtime_dir),
        binds=binds,
        ready_timeout=settings.ready_timeout,
        stop_delay=settings.stop_delay,
        graceful_timeout=settings.timeout_graceful_shutdown,
        type=type_ or _type(),
    )
    return found, _notes(found, effective)


def _command() -> tuple[str, ...]:
    script = os.path.join(os.path.dirname(sys.executable), "segue")
    return (script,) if os.access(script, os.X_OK) else (sys.executable, "-m", "segue")


def _user() -> str:
    return "segue" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name


def _type() -> str:
    """What this machine's systemd has, or the newer one if it can't be asked."""
    try:
        said = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        said = ""
    version = re.match(r"systemd (\d+)", said)
    return NOTIFY if version and int(version[1]) < NOTIFY_RELOAD_SINCE else NOTIFY_RELOAD


def _notes(found: Place, effective: config.Effective) -> list[str]:
    notes = []
    seen = [
        f"{key} ({source})" for key, source in effective.sources.items() if source.startswith("environment")
    ]
    if seen:
        notes.append(f"set in this environment, and not in the unit's: {', '.join(seen)}")
    if not _is_known(found.user, pwd.getpwnam, pwd.getpwuid):
        notes.append(f"there is no user {found.user}" + _made(found.user, "sudo useradd --system"))
    if found.group and not _is_known(found.group, grp.getgrnam, grp.getgrgid):
        notes.append(f"there is no group {found.group}" + _made(found.group, "sudo groupadd"))
    if "--ssl-keyfile-password" in found.arguments:
        notes.append(
            "everybody can read the unit, and the key's password in it: put it into the settings file"
        )
    if any(path.startswith("/root/") for path in found.paths) and found.user != "root":
        notes.append(f"user {found.user} can't read what is in /root: move it, for example to /srv")
    return notes


def _made(account: str, command: str) -> str:
    """How to make it, for one that has a name."""
    return "" if account.isdigit() else f": {command} {account}"


def unwritable(found: Place) -> list[str]:
    """What the user of a service should know of the directories in which it has to make a socket."""
    notes = [
        f"there is no directory {path}: sudo install -d -o {found.user} {shlex.quote(path)}"
        for path in found.writable
        if not os.path.isdir(path)
    ]
    if found.user != "root" and any(os.path.dirname(bind) == "unix:/run" for bind in found.binds):
        notes.append(
            f"user {found.user} can't make a socket in /run: let systemd do it, with segue unit --socket"
        )
    return notes


def _is_known(account: str, by_name: Callable[[str], object], by_number: Callable[[int], object]) -> bool:
    try:
        by_number(int(account)) if account.isdigit() else by_name(account)
    except (KeyError, OverflowError):
        return False
    return True


def _arguments(
    flags: Mapping[str, Any], settings: config.Settings, base_dir: str, *, template: bool
) -> tuple[str, ...]:
    """The command line of ``segue serve`` again, with absolute paths."""
    words: list[str] = []
    for setting in TABLE:
        value = flags.get(setting.name)
        if value is None or value == () or setting.key in {"bind", "host", "port", "uds", "fd", "name"}:
            continue
        words += _words(setting, value, base_dir)
    if flags.get("config") is not None:
        words += ["--config", os.path.join(base_dir, flags["config"])]
    if any(
        flags.get(key) is not None and flags.get(key) != () for key in ("bind", "host", "port", "uds", "fd")
    ):
        for bind in settings.binds:
            words += ["--bind", bind]
    if not template and flags.get("name"):
        words += ["--name", settings.name]
    return tuple(words)


def _words(setting: Setting, value: Any, base_dir: str) -> list[str]:
    if setting.key == "app":
        return [value]
    if setting.kind is Kind.SWITCH and setting.form is not Form.VALUE:
        return (
            [setting.flag if value else f"--no-{setting.key}"] if value or setting.form is Form.PAIR else []
        )
    values = value if isinstance(value, list | tuple) else [value]
    if setting.kind in {Kind.FILE, Kind.DIRECTORY} or (setting.key == "python" and "/" in value):
        values = [os.path.join(base_dir, each) for each in values]
    return [word for each in values for word in (setting.flag, _text(each))]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _rounded(seconds: float) -> int:
    return int(-(-seconds // 10) * 10)

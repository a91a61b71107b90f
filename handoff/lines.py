"""What a line of the log looks like, master's or worker's: for a person, or JSON, with a priority for the journal.

A line of JSON has ``time`` (RFC 3339), ``level``, ``logger``, and ``event`` or ``message``; then its fields.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from datetime import datetime

import msgspec

TEXT, JSON = "text", "json"
PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7, "trace": 7}
"""Of syslog(3), as ``<N>`` before a line tells them to the journal, sd-daemon(3)."""

_PRIORITY = re.compile(r"^<[0-7]>", re.M)


def chosen(wanted: str, fd: int) -> str:
    """`TEXT` or `JSON`, for a setting that may be ``auto``: text on a terminal, JSON elsewhere."""
    if wanted in {TEXT, JSON}:
        return wanted
    try:
        return TEXT if os.isatty(fd) else JSON
    except OSError:
        return JSON


def is_journal(fd: int, environ: Mapping[str, str]) -> bool:
    """Whether what is written to `fd` goes to systemd's journal (``JOURNAL_STREAM``, systemd.exec(5))."""
    with contextlib.suppress(OSError):
        found = os.fstat(fd)
        return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
    return False


def with_priority(text: str, level: str) -> str:
    """`text` with the priority of `level` before each of its lines."""
    prefix = f"<{PRIORITIES.get(level, 6)}>"
    return prefix + text.replace("\n", "\n" + prefix)


def json_line(seconds: float, level: str, logger: str, fields: Mapping[str, object]) -> str:
    """One line of JSON; `seconds` is Unix time. What would steer a terminal is escaped in it, and means the same."""
    time = datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")
    line: dict[str, object] = {"time": time, "level": level, "logger": logger}
    line |= {key: value for key, value in fields.items() if value is not None}
    try:
        text = msgspec.json.encode(line, enc_hook=str).decode()
    except (UnicodeEncodeError, RecursionError):
        text = msgspec.json.encode({key: sayable(str(value)) for key, value in line.items()}).decode()
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    """JSON leaves most that can't be printed as it is: DEL, the second set of control characters, U+2028, U+202E."""
    return character if character.isprintable() else json.dumps(character)[1:-1]


def sayable(text: str) -> str:
    """`text` as it can be written down: names of files may have bytes that are no UTF-8, which are lone surrogates in it."""
    return text.encode(errors="backslashreplace").decode()


def quoted(value: object) -> str:
    """What stands after ``key=`` in a line for a person.

    Some of it may be a stranger's: it neither begins a line of its own nor tells a terminal what to do.
    """
    text = str(value).replace("\n", "; ")
    if not text.isprintable():
        text = "".join(
            each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
        )
    if not text or any(character in ' "=' for character in text):
        return '"' + text.replace('"', "'") + '"'
    return text


class _Line(msgspec.Struct, frozen=True):
    """What a person wants to see of a line of JSON."""

    level: str
    logger: str
    message: str = ""
    exception: str = ""


def readable(text: str) -> str:
    """`text`, lines of a log among others, for a person: without priorities, and JSON of ours as what it says."""
    lines = []
    for line in _PRIORITY.sub("", text).splitlines():
        shown = line
        if line.startswith('{"time":"'):
            with contextlib.suppress(msgspec.MsgspecError):
                found = msgspec.json.decode(line, type=_Line)
                shown = f"{found.level.upper()}: {found.message}\n{found.exception}".rstrip()
        lines.append(shown)
    return "\n".join(lines)

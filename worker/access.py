"""The access log in formats of our own: a line for each response when it is over, with what it took.

uvicorn writes its line when a response begins, and knows neither its duration nor its size. Here a response that its
client did not wait for has a line, too: with status 499 if it had not begun.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from segue.handoff import lines
from segue.worker.logs import style

LOGGER = "segue.access"
CLIENT_LEFT = 499
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f"\\]')


class AccessLog:
    """Of one worker; writes to the logger `LOGGER`, which goes to stdout unless a ``--log-config`` names it."""

    def __init__(self, form: str) -> None:
        self._logger = logging.getLogger(LOGGER)
        if not self._logger.handlers:
            handler = logging.StreamHandler(sys.stdout)
            handler.setFormatter(_Formatter(form))
            self._logger.addHandler(handler)
            self._logger.propagate = False
            self._logger.setLevel(logging.INFO)

    def write(self, scope: Mapping[str, Any], status: int, size: int, seconds: float, aborted: bool) -> None:
        """One line."""
        query = scope["query_string"]
        entry = {
            "client": scope["client"][0] if scope.get("client") else None,
            "method": scope["method"],
            "path": _text(scope.get("raw_path") or scope["path"].encode())
            + (f"?{_text(query)}" if query else ""),
            "http_version": scope["http_version"],
            "status": status or CLIENT_LEFT,
            "bytes": size,
            "referer": _header(scope, b"referer"),
            "user_agent": _header(scope, b"user-agent"),
            "seconds": round(seconds, 6),
            "aborted": aborted or None,
        }
        self._logger.info("%(method)s %(path)s %(status)d", entry, extra={"access": entry})


class _Formatter(logging.Formatter):
    def __init__(self, form: str) -> None:
        super().__init__()
        self._form = form
        self._second, self._stamp = 0, ""

    def format(self, record: logging.LogRecord) -> str:
        """The line of `AccessLog.write`, or what somebody else has logged here."""
        entry: dict[str, Any] | None = getattr(record, "access", None)
        if entry is None:
            return super().format(record)
        if self._form == lines.JSON:
            text = lines.json_line(record.created, "info", record.name, entry | style.where)
        else:
            text = self._combined(entry, record.created)
        return lines.with_priority(text, "info") if "stdout" in style.journal else text

    def _combined(self, entry: dict[str, Any], created: float) -> str:
        if int(created) != self._second:
            self._second = int(created)
            self._stamp = time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(created))
        shown = {
            key: "-" if value is None else _UNSAFE.sub(_escaped, str(value)) for key, value in entry.items()
        }
        return (
            '{client} - - [{stamp}] "{method} {path} HTTP/{http_version}" {status} {bytes} "{referer}" '
            '"{user_agent}" {seconds} {generation}.{worker}'
        ).format(stamp=self._stamp, **shown, **style.where)


def _text(value: bytes) -> str:
    return value.decode("latin-1")


def _header(scope: Mapping[str, Any], name: bytes) -> str | None:
    return next((_text(value) for key, value in scope["headers"] if key == name), None)


def _escaped(found: re.Match[str]) -> str:
    return f"\\x{ord(found[0]):02X}"

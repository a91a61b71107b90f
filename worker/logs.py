"""A worker's log: uvicorn's lines, the application's, and the access log, each with generation and worker.

uvicorn's own logging configuration is used as it is but for the form of its lines. Whoever gives ``--log-config``
decides everything; the numbers are in each record then (``%(generation)s``, ``%(worker)s``). What an application prints
stays as it is.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import re
import sys
from typing import Any, TextIO

from segue.handoff import lines

_EVENT = re.compile(r"""([a-z_]+)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\S*)""")
"""A field of a line of segue's own: ``event=ready workers=2 reason='it is'``."""
_STREAMS = {"stdout": 1, "stderr": 2}

_USUAL = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {
    *("message", "asctime", "color_message", "taskName")
}
"""What every record has; the rest is the application's ``extra``."""
_OURS = frozenset({"time", "level", "logger", "generation", "worker", "pid", "exception", "stack"})


class Style:
    """How this worker writes its lines."""

    def __init__(
        self, form: str, generation: int, worker: int, journal: frozenset[str] = frozenset()
    ) -> None:
        self.form = form
        self.where = {"generation": generation, "worker": worker}
        self.journal = journal
        """Names of the streams that go to the journal."""


style = Style(lines.TEXT, 0, 0)
"""Of this process."""


class Formatter(logging.Formatter):
    """Lines of one handler. `inner` makes the text."""

    def __init__(self, inner: logging.Formatter, stream: str = "stderr") -> None:
        super().__init__()
        self.inner = inner
        self._stream = stream

    def format(self, record: logging.LogRecord) -> str:
        """One line, or several with an exception."""
        level = record.levelname.lower()
        if style.form == lines.JSON:
            text = lines.json_line(record.created, level, record.name, self._fields(record))
        else:
            number(record)
            text = self.inner.format(record)
        return lines.with_priority(text, level) if self._stream in style.journal else text

    def _fields(self, record: logging.LogRecord) -> dict[str, object]:
        message = record.getMessage()
        fields: dict[str, object] = {"message": message} | style.where | {"pid": record.process}
        for key, value in vars(record).items():
            if key not in _USUAL:
                fields[f"extra_{key}" if key in _OURS else key] = value
        if record.name.startswith("segue") and message.startswith("event="):
            fields |= {key: value.strip("'\"") for key, value in _EVENT.findall(message)}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        return fields


class Default(Formatter):
    """For uvicorn's messages, made by logging.config from `configuration`."""

    def __init__(self, use_colors: bool | None = None) -> None:
        from uvicorn.logging import DefaultFormatter

        fmt = "%(levelprefix)s [%(generation)s.%(worker)s] %(message)s"
        super().__init__(DefaultFormatter(fmt, use_colors=use_colors))


class Access(Formatter):
    """For uvicorn's access log."""

    def __init__(self, use_colors: bool | None = None) -> None:
        from uvicorn.logging import AccessFormatter

        fmt = (
            '%(levelprefix)s [%(generation)s.%(worker)s] %(client_addr)s - "%(request_line)s" %(status_code)s'
        )
        super().__init__(AccessFormatter(fmt, use_colors=use_colors), "stdout")


class _Prefixed(logging.Formatter):
    """The lines of an application's own formatter, with generation and worker."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        text = self._inner.format(record)
        return f"[{style.where['generation']}.{style.where['worker']}] {text}"


def begin(form: str, generation: int, worker: int, stdout: int, stderr: int) -> None:
    """How this process writes its lines from now on. `stdout` and `stderr` are where its output will go."""
    style.form, style.where = form, {"generation": generation, "worker": worker}
    fds = {"stdout": stdout, "stderr": stderr}
    style.journal = frozenset(name for name, fd in fds.items() if lines.is_journal(fd, os.environ))


def number(record: logging.LogRecord) -> bool:
    """Let `record` know where it comes from: a filter that lets everything pass.

    Not earlier, when it is made: an application that passes ``extra={"worker": …}`` would be refused.
    """
    for key, value in style.where.items():
        vars(record).setdefault(key, value)
    return True


def number_all() -> None:
    """Do so for every handler that there is, those of a ``--log-config``."""
    for handler in _handlers():
        handler.addFilter(number)


def _handlers() -> set[logging.Handler]:
    root = logging.getLogger()
    loggers = [root, *(each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger))]
    return {handler for logger in loggers for handler in logger.handlers}


def configuration() -> dict[str, Any]:
    """The configuration that uvicorn has by itself, with our formatters."""
    from uvicorn.config import LOGGING_CONFIG

    config = copy.deepcopy(LOGGING_CONFIG)
    config["formatters"] = {
        "default": {"()": f"{__name__}.Default", "use_colors": None},
        "access": {"()": f"{__name__}.Access", "use_colors": None},
    }
    return config


def dress_last_resort() -> None:
    """Do the same with warnings and worse of loggers for which nobody has made a handler, those of an import included."""
    if logging.lastResort is not None:
        inner = logging.Formatter("%(levelname)s: %(name)s: %(message)s")
        logging.lastResort.setFormatter(Formatter(_Prefixed(inner)))


def dress_application() -> None:
    """Do the same with what the application logs by itself, where that goes to this process' output.

    After its import, so that its own `logging.basicConfig` isn't ignored. A formatter of a class of its own stays.
    """
    for handler in _handlers():
        stream = _name(handler)
        if stream is not None and type(handler.formatter) in {logging.Formatter, type(None)}:
            handler.setFormatter(Formatter(_Prefixed(handler.formatter), stream))


def _name(handler: logging.Handler) -> str | None:
    """``stdout`` or ``stderr``, if `handler` writes there."""
    stream: TextIO | None = getattr(handler, "stream", None)
    if stream is None:
        return None
    for name in _STREAMS:
        if stream in {getattr(sys, name), getattr(sys, f"__{name}__")}:
            return name
    try:
        return next((name for name, fd in _STREAMS.items() if stream.fileno() == fd), None)
    except (OSError, ValueError, io.UnsupportedOperation, AttributeError):
        return None

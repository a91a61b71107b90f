"""What a person sees on a terminal: colours where they are wanted, and that something goes on where it takes long."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

import click

SHOWN_AFTER_S = 1.0
"""What takes less is not spoken of."""
_EVERY_S = 0.25
_STYLES = {
    "active": "green",
    "ready": "green",
    "ok": "green",
    "booting": "cyan",
    "staged": "cyan",
    "activating": "cyan",
    "draining": "yellow",
    "quiet": "yellow",
    "quieting": "yellow",
    "parked": "blue",
    "stopping": "yellow",
    "hung": "red",
    "killed": "red",
    "failed": "red",
    "refused": "red",
    "rolled back": "red",
    "mixed": "cyan",
    "healthy": "green",
    "degraded": "yellow",
    "unhealthy": "red",
    "NOT READY": "red",
}


def coloured(stream: TextIO | None = None) -> bool:
    """Whether to use colours: on a terminal, unless ``NO_COLOR`` is set; everywhere with ``FORCE_COLOR``."""
    if os.environ.get("FORCE_COLOR"):
        return True
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    stream = sys.stdout if stream is None else stream
    return stream is not None and stream.isatty()


def colour_of(word: str) -> str | None:
    """The colour of a state or an outcome."""
    return _STYLES.get(word)


def health_of(service: Mapping[str, Any]) -> str:
    """What a service says of itself; ``-``: nothing."""
    if service["degraded"]:
        return f"degraded: {service['degraded']}"
    if service["healthy"] is None:
        return "-"
    return "healthy" if service["healthy"] else "unhealthy"


def seconds_of(operation: Mapping[str, Any]) -> float:
    """What an operation took from the request to its outcome; what is left to finish in the old generation is no part of it.

    Of one that runs, since the request.
    """
    if operation["outcome"] is None:
        return max(0.0, time.time() - float(operation["started"]))
    return float(sum(seconds for phase, seconds in operation["phases"].items() if phase != "drain"))


def echo(text: str, *, err: bool = False) -> None:
    """Print, with its colours where they are wanted."""
    click.echo(text, err=err, color=coloured(sys.stderr if err else sys.stdout))


class Progress:
    """Says on standard error, if that is a terminal, what is waited for and for how long: once it takes a second.

    A context manager; in the end nothing of it is left on the screen.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._begun = time.monotonic()
        self._ended = threading.Event()
        self._shown = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        """Begin."""
        if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def say(self, what: str) -> None:
        """It is something else by now."""
        self._what = what

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._shown:
            self._write("\r\033[K")

    def _run(self) -> None:
        wait = SHOWN_AFTER_S
        while not self._ended.wait(wait):
            wait, self._shown = _EVERY_S, True
            self._write(f"\r\033[K{self._what} … {time.monotonic() - self._begun:.0f} s")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

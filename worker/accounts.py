"""A worker's figures, written down every half second; and, by the same timer, how late its event loop runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from segue.handoff.figures import FiguresFile
from segue.handoff.messages import Figures

_log = logging.getLogger("segue.worker")

_EVERY_S = 0.5
_LAG_WINDOW_S = 5.0


class Accounts:
    """Writes into `path`, if there is one, from `start` on."""

    def __init__(
        self, path: str | None, figures: Callable[[], Figures], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._figures = figures
        self._loop = loop
        self._file: FiguresFile | None = None
        self._complained = False
        self._timer: asyncio.TimerHandle | None = None
        self._worst_s, self._before_s = 0.0, 0.0
        self._due = self._window_began = loop.time()
        if path is not None:
            try:
                self._file = FiguresFile(path)
            except OSError as error:
                self._complain(error)

    @property
    def lag_s(self) -> float:
        """The longest delay of the timer in the last five to ten seconds; one that still lasts is part of it."""
        late_s = 0.0 if self._timer is None else self._loop.time() - self._due
        return round(max(self._worst_s, self._before_s, late_s), 6)

    def start(self) -> None:
        """Write from now on."""
        self._write()
        self._arm()

    def _arm(self) -> None:
        self._due = self._loop.time() + _EVERY_S
        self._timer = self._loop.call_at(self._due, self._look)

    def close(self) -> None:
        """Write for the last time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._write()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _look(self) -> None:
        now = self._loop.time()
        self._worst_s = max(self._worst_s, now - self._due)
        if now - self._window_began > _LAG_WINDOW_S:
            self._window_began, self._before_s, self._worst_s = now, self._worst_s, 0.0
        self._write()
        self._arm()

    def _write(self) -> None:
        if self._file is None:
            return
        try:
            self._file.write(self._figures())
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("event=figures-not-written reason=%r", str(error))

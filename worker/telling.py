"""What a worker tells its master, unasked: datagrams that may be lost, so what matters is repeated.

READY is repeated until a first command shows that it was heard, DRAINED until the next command, less often when they have
been for a while (a staged worker gets no command for hours); afterwards each heartbeat proves that the event loop turns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from segue.handoff.messages import NotifyKey, WorkerMode, WorkerPhase
from segue.handoff.notify import Notifier

_REPEAT_S = 1.0
_REPEATS = 10
"""So often in a row; then with the heartbeats."""
_WATCHED_S = 0.2
"""Between two of them while the worker is watched."""
_FULL_S = 0.25
"""After the master's queue was full: soon enough for it not to believe in silence once it reads on."""
_FAILURE_TRIES = 50
"""If there is nobody who reads it, as in the moment between two masters."""
_FAILURE_TRIES_FULL = 1500
"""If there is, and stands still: a while longer than any pause after which somebody still waits for the reason."""
_FAILURE_PAUSE_S = 0.02


class Telling:
    """Speaks to the master's notify socket, and never blocks."""

    def __init__(self, notify_socket: str, heartbeat_s: float) -> None:
        self._notifier = Notifier(notify_socket)
        self._heartbeat_s = heartbeat_s
        self._mode = WorkerMode.BOOTING
        self._unconfirmed = True
        self._repeated = 0
        self.handover_s: float | None = None
        """How long the services, if there are any, may take to hand over."""
        self.responses: Callable[[], tuple[int, int]] | None = None
        """How many responses were sent, and how many of them were 5xx; None: that isn't counted."""
        self._watched_until = 0.0
        self._recycle: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._phase = WorkerPhase.BOOT

    def phase(self, phase: WorkerPhase) -> None:
        """What booting has come to."""
        self._phase = phase
        self._notifier.send({NotifyKey.PHASE: phase, NotifyKey.STATE: WorkerMode.BOOTING})

    def alive(self) -> None:
        """The event loop turns, though booting has not come to another phase."""
        self._notifier.send({NotifyKey.STATE: WorkerMode.BOOTING, NotifyKey.WATCHDOG: 1})

    def failed(self, reason: str) -> None:
        """Booting has failed. Waits until the master's queue has room, half a minute at most; a second if there is no master."""
        fields: dict[str, object] = {
            NotifyKey.FAILED: reason,
            NotifyKey.STATUS: f"{self._phase}: {reason}",
            NotifyKey.PHASE: self._phase,
        }
        for tried in range(_FAILURE_TRIES_FULL):
            if self._notifier.send(fields) or (tried >= _FAILURE_TRIES and not self._notifier.full):
                return
            time.sleep(_FAILURE_PAUSE_S)  # nothing else is left to do here

    def mode(self, mode: WorkerMode) -> None:
        """The worker is in another mode; repeated until the next command where it matters."""
        self._mode = mode
        self._unconfirmed, self._repeated = mode in {WorkerMode.READY, WorkerMode.DRAINED}, 0
        self._beat()

    def confirmed(self) -> None:
        """A command has come: what was told has been heard."""
        self._unconfirmed = False

    def watched(self, seconds: float) -> None:
        """Say for so long, and often, how many responses were sent."""
        self._watched_until = time.monotonic() + seconds
        self._beat()

    def ask_to_recycle(self, reason: str) -> None:
        """Say with each heartbeat that this worker should be replaced."""
        if self._recycle is None:
            self._recycle = reason
            self._beat()

    def close(self) -> None:
        """Say nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        self._notifier.close()

    def _beat(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        fields: dict[str, object] = {NotifyKey.STATE: self._mode}
        if self._mode is WorkerMode.STOPPING:
            fields["STOPPING"] = 1
        else:
            fields[NotifyKey.READY] = 1
        if self._mode is not WorkerMode.READY or not self._unconfirmed:
            fields[NotifyKey.WATCHDOG] = 1
        if self.handover_s is not None:
            fields[NotifyKey.HANDOVER] = f"{self.handover_s:g}"
        if self._recycle is not None:
            fields[NotifyKey.RECYCLE] = self._recycle
        if self.responses is not None:
            fields[NotifyKey.RESPONSES] = "{} {}".format(*self.responses())
        self._notifier.send(fields)
        repeats = self._unconfirmed and self._repeated < _REPEATS
        self._repeated += repeats
        interval = min(_REPEAT_S, self._heartbeat_s) if repeats else self._heartbeat_s
        if self._notifier.full:
            interval = min(interval, _FULL_S)
        if time.monotonic() < self._watched_until:
            interval = min(interval, _WATCHED_S)
        self._timer = asyncio.get_running_loop().call_later(interval, self._beat)

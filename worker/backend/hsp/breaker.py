"""A circuit breaker per addressee: who never acknowledges isn't written to for a while."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

_ADDRESSEES = 1000


class _State:
    __slots__ = ("failures", "until")

    def __init__(self) -> None:
        self.failures = 0
        self.until: float | None = None
        """When one may try again; None: closed."""


class Breakers:
    """All of them. Addressees are topics."""

    def __init__(self, failures: int, open_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._failures = failures
        self._open_s = open_s
        self._now = now
        self._states: OrderedDict[str, _State] = OrderedDict()

    def allows(self, addressee: str) -> bool:
        """Whether to write to it now. Once open, one message is let through after a while, to try."""
        state = self._states.get(addressee)
        if state is None or state.until is None:
            return True
        if self._now() < state.until:
            return False
        # should nothing be heard of this try, there is another one later
        state.until = self._now() + self._open_s
        return True

    def failed(self, addressee: str) -> None:
        """It owed an acknowledgement."""
        state = self._states.setdefault(addressee, _State())
        self._states.move_to_end(addressee)
        if len(self._states) > _ADDRESSEES:
            self._states.popitem(last=False)
        state.failures += 1
        if state.failures >= self._failures:
            state.until = self._now() + self._open_s

    def succeeded(self, addressee: str) -> None:
        """It has acknowledged."""
        self._states.pop(addressee, None)

    @property
    def open(self) -> int:
        """How many are open."""
        return sum(state.until is not None for state in self._states.values())

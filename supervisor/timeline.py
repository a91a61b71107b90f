"""Which generation was in which state since when: the last ones, for the dashboard's time line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from segue.supervisor.model import State

if TYPE_CHECKING:
    from segue.supervisor.snapshot import Snapshot

KEPT = 20


class Span(msgspec.Struct, frozen=True):
    """A state, and since when a generation has been in it."""

    state: str
    since: float
    """Unix time."""


class Row(msgspec.Struct):
    """A generation."""

    fingerprint: str | None = None
    """Of its code; None as long as that isn't known."""
    states: list[Span] = []


class Timeline:
    """The states of the last generations."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}

    def restore(self, known: dict[int, Row], state: State, snapshots: Mapping[int, Snapshot]) -> None:
        """Go on with what an earlier master has seen. What is no longer there has ended in between."""
        self._rows = dict(known)
        self.note(state, snapshots)
        for number in self._rows.keys() - state.generations.keys():
            self._add(number, "retired")

    def note(self, state: State, snapshots: Mapping[int, Snapshot]) -> None:
        """Look at what has become of each generation."""
        for number, generation in state.generations.items():
            self._add(number, str(generation.state))
            if number in snapshots:
                self._rows[number].fingerprint = snapshots[number].fingerprint
        while len(self._rows) > KEPT:
            del self._rows[min(self._rows)]

    def ended(self, number: int, failed: bool) -> None:
        """Nothing of it is left."""
        if failed:  # it may have begun and ended in one step
            self._add(number, "failed")
        self._add(number, "retired")

    def _add(self, number: int, state: str) -> None:
        states = self._rows.setdefault(number, Row()).states
        if not states or states[-1].state != state:
            states.append(Span(state, round(time.time(), 3)))

    def rows(self) -> dict[int, Row]:
        """By generation."""
        return self._rows

    def document(self) -> list[dict[str, Any]]:
        """As JSON, in the order of the generations."""
        return [{"id": number} | msgspec.to_builtins(row) for number, row in sorted(self._rows.items())]

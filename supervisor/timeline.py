"""Which generation was in which state since when: the last ones, for the dashboard's time line."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from segue.supervisor.model import State

KEPT = 20


class Span(msgspec.Struct, frozen=True):
    """A state, and since when a generation has been in it."""

    state: str
    since: float
    """Unix time."""


class Timeline:
    """The states of the last generations."""

    def __init__(self) -> None:
        self._spans: dict[int, list[Span]] = {}

    def restore(self, known: dict[int, list[Span]], state: State) -> None:
        """Go on with what an earlier master has seen. What is no longer there has ended in between."""
        self._spans = {number: list(spans) for number, spans in known.items()}
        self.note(state)
        for number in self._spans.keys() - state.generations.keys():
            self._add(number, "retired")

    def note(self, state: State) -> None:
        """Look at what has become of each generation."""
        for number, generation in state.generations.items():
            self._add(number, str(generation.state))
        while len(self._spans) > KEPT:
            del self._spans[min(self._spans)]

    def ended(self, number: int, failed: bool) -> None:
        """Nothing of it is left."""
        if failed:  # it may have begun and ended in one step
            self._add(number, "failed")
        self._add(number, "retired")

    def _add(self, number: int, state: str) -> None:
        spans = self._spans.setdefault(number, [])
        if not spans or spans[-1].state != state:
            spans.append(Span(state, round(time.time(), 3)))

    def spans(self) -> dict[int, list[Span]]:
        """By generation."""
        return self._spans

    def document(self) -> list[dict[str, Any]]:
        """As JSON, in the order of the generations."""
        return [
            {"id": number, "states": msgspec.to_builtins(spans)}
            for number, spans in sorted(self._spans.items())
        ]

"""Operations: what somebody asked for, how far it is, and its one outcome.

An operation outlives whoever asked: a caller that leaves cancels nothing, and can come back with its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Any

from segue.supervisor.model import Settle

_KEPT = 100
"""How many ended operations can still be asked for."""
_REMEMBERED = frozenset({"reload", "upgrade"})
_REMEMBERED_COUNT = 20
_MAX_OUTPUT_CHARS = 2000


class Operation:
    """One request for a change."""

    def __init__(self, number: int, kind: str, asked_by: str, service: str = "") -> None:
        self.number = number
        self.service = service
        """The service that a swap is about."""
        self.kind = kind
        self.asked_by = asked_by
        self.started = time.time()
        self.ended: float | None = None
        self.phase = "queued"
        self.phases: dict[str, float] = {}
        self.ok: bool | None = None
        self.reason = ""
        self.output = ""
        self.generation: int | None = None
        self.code = 409
        """HTTP status of a refusal."""
        self.details: dict[str, Any] = {}
        self.result: dict[str, Any] | None = None
        self.generation_code: dict[str, Any] | None = None
        """Of a reload: which code its generation runs."""
        self.changes: dict[str, Any] | None = None
        """And how that differs from what served before."""
        self.drained = False
        self.notes: list[str] = []
        self._phase_began = time.monotonic()
        self._changed = asyncio.Event()

    @property
    def state(self) -> str:
        """``running``, ``succeeded`` or ``refused``."""
        if self.ok is None:
            return "running"
        return "succeeded" if self.ok else "refused"

    def progress(self, phase: str) -> None:
        """It has come to `phase`."""
        self._close_phase()
        self.phase = phase
        self._notify()

    def settle(self, outcome: Settle) -> None:
        """Give its outcome: the only one."""
        if self.ok is not None:
            raise AssertionError(
                f"operation {self.number} has two outcomes: {self.reason!r} and {outcome.reason!r}"
            )
        self._close_phase()
        self.ok, self.reason, self.output = outcome.ok, outcome.reason, outcome.output
        self.generation, self.result = outcome.generation, outcome.result
        self.code, self.details = outcome.code, outcome.details
        self.phase = "serving" if outcome.ok and self.kind == "reload" else "ended"
        self.ended = time.time()
        self._notify()

    def mark_drained(self) -> None:
        """What it replaced has ended, too."""
        self._close_phase("drain")
        self.drained, self.phase = True, "drained"
        self._notify()

    def _close_phase(self, name: str | None = None) -> None:
        now = time.monotonic()
        self.phases[name or self.phase] = round(
            self.phases.get(name or self.phase, 0.0) + now - self._phase_began, 4
        )
        self._phase_began = now

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, seconds: float, *, drained: bool = False, phase: str | None = None) -> None:
        """Return when it has ended (or, asked for, is drained; or is no longer in `phase`), or after `seconds`."""
        deadline = time.monotonic() + seconds
        while not self._reached(drained, phase):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _reached(self, drained: bool, phase: str | None) -> bool:
        if phase is not None and self.phase != phase:
            return True
        return self.ok is False or (self.ok is True and (self.drained or not drained))

    @classmethod
    def restore(cls, document: dict[str, Any]) -> Operation:
        """One that an earlier master has told of in this form. Raises `KeyError`."""
        operation = cls(document["id"], document["kind"], document["asked_by"], document.get("service", ""))
        operation.started, operation.ended = document["started"], document["ended"]
        operation.phase, operation.phases = document["phase"], document["phases"]
        operation.ok = None if document["outcome"] is None else document["outcome"] == "ok"
        operation.reason, operation.output = document["reason"], document["output"]
        operation.generation, operation.drained = document["generation"], document["drained"]
        operation.notes = document["notes"]
        operation.generation_code, operation.changes = document.get("code"), document.get("changes")
        return operation

    def document(self) -> dict[str, Any]:
        """As JSON."""
        result = self.result or {}
        return {
            "id": self.number,
            "kind": self.kind,
            "state": self.state,
            "phase": self.phase,
            "asked_by": self.asked_by,
            "started": self.started,
            "ended": self.ended,
            "outcome": None if self.ok is None else ("ok" if self.ok else "refused"),
            "reason": self.reason,
            "output": self.output,
            "generation": self.generation,
            "drained": self.drained,
            "phases": self.phases,
            **({"service": self.service} if self.service else {}),
            **({"code": self.generation_code, "changes": self.changes} if self.generation_code else {}),
            **result,
            "notes": [*self.notes, *result.get("notes", ())],
        }


class Operations:
    """All that run, and the last ones that ended."""

    def __init__(self) -> None:
        self._by_number: dict[int, Operation] = {}
        self._order: deque[int] = deque()
        self._next = 1

    @property
    def next_number(self) -> int:
        """What the next one will be called."""
        return self._next

    def remembered(self) -> dict[int, dict[str, Any]]:
        """Documents of those that the next master should know of, cut to a size that is fit to be written down."""
        kept = [o for number in self._order if (o := self._by_number[number]).kind in _REMEMBERED]
        return {
            o.number: o.document() | {"output": o.output[-_MAX_OUTPUT_CHARS:]}
            for o in kept[-_REMEMBERED_COUNT:]
        }

    def restore(self, documents: dict[int, dict[str, Any]], next_number: int) -> None:
        """Know those of an earlier master again; what can't be read is left out."""
        for number in sorted(documents):
            with contextlib.suppress(KeyError):
                operation = Operation.restore(documents[number])
                self._by_number[operation.number] = operation
                self._order.append(operation.number)
        self._next = max([next_number, *(number + 1 for number in self._order)])

    def running(self) -> list[Operation]:
        """Those that have no outcome yet."""
        return [o for number in self._order if (o := self._by_number[number]).ok is None]

    def create(self, kind: str, asked_by: str, service: str = "") -> Operation:
        """A new one."""
        operation = Operation(self._next, kind, asked_by, service)
        self._next += 1
        self._by_number[operation.number] = operation
        self._order.append(operation.number)
        while len(self._order) > _KEPT and self._by_number[self._order[0]].ok is not None:
            del self._by_number[self._order.popleft()]
        return operation

    def get(self, number: int) -> Operation | None:
        """The one with this number, if it is still known."""
        return self._by_number.get(number)

    def last(self, kind: str, count: int) -> list[Operation]:
        """The last `count` of a kind, newest last."""
        return [o for n in self._order if (o := self._by_number[n]).kind == kind][-count:]

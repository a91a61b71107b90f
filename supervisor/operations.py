"""Operations: what somebody asked for, how far it is, and its one outcome.

An operation outlives whoever asked: a caller that leaves cancels nothing, and can come back with its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from segue.supervisor.model import Settle

_KEPT = 100
"""How many ended operations can still be asked for."""
DEPLOYS = frozenset({"reload", "stage", "promote", "discard", "rollback"})
"""What makes one generation follow on another: the history of an instance."""
_PROMOTING = frozenset({"reload", "promote", "rollback"})
_REMEMBERED = DEPLOYS | {"upgrade"}
_REMEMBERED_COUNT = 20
_MAX_OUTPUT_CHARS = 2000
_QUIETING = "quieting"
"""The phase in which an operation has its outcome, and what it replaced may still accept."""


UNTIL = ("serving", "drained", "probation")
"""How far an operation can be waited for. Whoever connects meets the new generation; nothing is left to finish in those that it took over
from (they have ended, or are parked); it has passed its probation."""


def reached(operation: Mapping[str, Any], until: str) -> bool:
    """Whether an operation, as its `Operation.document`, has come so far, or to another end."""
    if operation["outcome"] != "ok":
        return operation["outcome"] is not None
    if until == "drained":
        return bool(operation["drained"])
    if until == "probation":
        return bool(operation["probation"] != "running")
    return bool(operation["phase"] != _QUIETING)


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
        self.probation: str | None = None
        """``running``, or how it ended (`segue.supervisor.model.Outcome`); None where there is none."""
        self.rolled_back: dict[str, Any] | None = None
        """If it was done and taken back since: when (``at``), to which generation (``to``), and why (``reason``)."""
        self.notes: list[str] = []
        self._phase_began = time.monotonic()
        self._changed = asyncio.Event()

    @property
    def state(self) -> str:
        """``running``, ``succeeded``, ``refused`` or ``rolled back``."""
        return {None: "running", "ok": "succeeded"}.get(self.outcome, self.outcome or "")

    @property
    def promotes(self) -> bool:
        """Whether it makes a generation serve."""
        return self.kind in _PROMOTING

    @property
    def outcome(self) -> str | None:
        """``ok``, ``refused``, ``rolled back``, or None as long as it runs."""
        if self.ok is None:
            return None
        if self.rolled_back is not None:
            return "rolled back"
        return "ok" if self.ok else "refused"

    def progress(self, phase: str, generation: int | None = None) -> None:
        """It has come to `phase`, in which it is about `generation`."""
        self._close_phase()
        self.phase, self.generation = phase, generation
        self._notify()

    def settle(self, outcome: Settle) -> None:
        """Give its outcome: the only one."""
        if self.ok is not None:
            raise AssertionError(
                f"operation {self.number} has two outcomes: {self.reason!r} and {outcome.reason!r}"
            )
        self._close_phase()
        self.ok, self.reason, self.output = outcome.ok, outcome.reason, outcome.output
        self.generation, self.result = outcome.generation or self.generation, outcome.result
        self.code, self.details = outcome.code, outcome.details
        self.phase = "serving" if outcome.ok and self.promotes else "ended"
        self.ended = time.time()
        self._notify()

    def begin_quieting(self) -> None:
        """It is done, but those that it replaced may still accept."""
        self.phase = _QUIETING

    def end_quieting(self) -> None:
        """They don't, or are not waited for any longer."""
        if self.phase == _QUIETING:
            self._close_phase()
            self.phase = "serving"
            self._notify()

    def mark_drained(self) -> None:
        """What it replaced has ended, too."""
        self._close_phase("drain")
        self.drained, self.phase = True, "drained"
        self._notify()

    def begin_probation(self) -> None:
        """What it has promoted is watched from now on."""
        self.probation = "running"

    def end_probation(self, outcome: str, reason: str = "") -> None:
        """It is watched no more; `reason` says what was found wrong, if it serves on all the same."""
        self.probation, self.reason = outcome, reason or self.reason
        self._notify()

    def roll_back(self, to: int | None, reason: str) -> None:
        """What it has promoted was taken back."""
        self.rolled_back = {"at": time.time(), "to": to, "reason": reason}
        self.reason = reason
        self.probation = None if self.probation is None else "rolled back"
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

    async def wait(self, seconds: float, *, until: str = "serving", phase: str | None = None) -> None:
        """Return when it has come so far (or, asked for, is no longer in `phase`), or after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (phase is not None and self.phase != phase) and not reached(self.document(), until):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                return

    @classmethod
    def restore(cls, document: dict[str, Any]) -> Operation:
        """One that an earlier master has told of in this form. Raises `KeyError`."""
        operation = cls(document["id"], document["kind"], document["asked_by"], document.get("service", ""))
        operation.started, operation.ended = document["started"], document["ended"]
        operation.phase, operation.phases = document["phase"], document["phases"]
        if operation.phase == _QUIETING:
            operation.phase = "serving"
        operation.ok = None if document["outcome"] is None else document["outcome"] != "refused"
        operation.probation, operation.rolled_back = document.get("probation"), document.get("rolled_back")
        operation.result = document.get("result")
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
            "outcome": self.outcome,
            "reason": self.reason,
            "output": self.output,
            "generation": self.generation,
            "drained": self.drained,
            "probation": self.probation,
            "rolled_back": self.rolled_back,
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
            o.number: o.document() | {"output": o.output[-_MAX_OUTPUT_CHARS:], "result": o.result}
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

    def deploys(self, count: int = _KEPT) -> list[Operation]:
        """The last `count` of `DEPLOYS`, newest last."""
        return [o for n in self._order if (o := self._by_number[n]).kind in DEPLOYS][-count:]

    def promoting(self, generation: int) -> list[Operation]:
        """Those that have made this generation serve, the last time that it did."""
        made = [o for o in self.deploys() if o.promotes and o.ok and o.rolled_back is None]
        return [o for o in made if o.generation == generation]

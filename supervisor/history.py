"""What became of what was asked for: marked on the operations, written to the log, told to the service manager."""

from __future__ import annotations

import asyncio

from segue.supervisor import model
from segue.supervisor.log import Log
from segue.supervisor.operations import Operation, Operations
from segue.supervisor.systemd import ServiceManager

START = "start"
"""Who asked for the first generation."""
RESTART = "restart"
"""Who asked for the generation that follows on those that a restart of the unit has left."""
PROBATION = "probation"
"""Who asked for a rollback that nobody asked for."""
_BY_HAND = "somebody asked for it"
_OVERLAP_S = 2.0
"""So long at most whoever asked waits for old workers to say that they accept no more: one that hangs does not say it."""


class History:
    """Of one instance."""

    def __init__(self, operations: Operations, log: Log, service: ServiceManager) -> None:
        self._operations = operations
        self._log = log
        self._service = service
        self._quieting: list[Operation] = []

    def resume(self, state: model.State) -> None:
        """Another master goes on: what it does not watch any more is waited for by nobody."""
        watched = state.probation.generation if state.probation is not None else None
        for operation in self._operations.deploys():
            if operation.probation == "running" and operation.generation != watched:
                operation.end_probation(model.Outcome.STOPPED, "nobody watched it to the end")

    def settled(self, effect: model.Settle, state: model.State) -> None:
        """An operation has its outcome."""
        operation = self._operations.get(effect.operation)
        if operation is None:
            return
        probation = state.probation
        operation.settle(effect)
        if operation.promotes and probation is not None and probation.generation == effect.generation:
            operation.begin_probation()
        if operation.promotes and effect.ok and state.overlaps:
            operation.begin_quieting()
            self._quieting.append(operation)
            asyncio.get_running_loop().call_later(_OVERLAP_S, operation.end_quieting)
        fields = {
            "operation": operation.number,
            "asked_by": operation.asked_by,
            "reason": effect.reason or None,
        }
        self._log(
            "info" if effect.ok else "error",
            name_of(operation),
            outcome="ok" if effect.ok else "refused",
            generation=effect.generation,
            seconds=sum(operation.phases.values()),
            **fields,
            service=operation.service or None,
            output=effect.output,
        )
        if effect.ok and operation.kind in {"promote", "rollback"}:
            self._service.status(f"generation {effect.generation} serves")

    def quiet(self) -> None:
        """Nobody accepts any more who shall not."""
        while self._quieting:
            self._quieting.pop().end_quieting()

    def drained(self, generation: int) -> None:
        """Nothing is left to finish in what this generation has taken over from."""
        for operation in self._operations.promoting(generation):
            if operation.drained:
                continue
            operation.mark_drained()
            if operation.asked_by != START:
                self._log("info", "drained", replaced_by=generation, operation=operation.number)

    def rolled_back(self, effect: model.RolledBack) -> None:
        """A generation was taken back; if nobody has asked for that, it is an entry of its own."""
        for operation in self._operations.promoting(effect.generation):
            operation.roll_back(effect.to, effect.because or _BY_HAND)
        if effect.because:
            operation = self._operations.create("rollback", PROBATION)
            operation.settle(model.Settle(operation.number, True, effect.because, generation=effect.to))
            self._service.status(
                f"generation {effect.to} serves; generation {effect.generation} was rolled back: {effect.because}"
            )

    def probation_ended(self, effect: model.ProbationEnded) -> None:
        """A generation isn't watched any more."""
        for operation in self._operations.promoting(effect.generation):
            if operation.probation == "running":
                operation.end_probation(effect.outcome, effect.reason)
        if effect.outcome is model.Outcome.KEPT:
            self._log(
                "error", "probation", generation=effect.generation, outcome="kept", reason=effect.reason
            )
            self._service.status(
                f"generation {effect.generation} serves, but did not pass its probation: {effect.reason}"
            )
        elif effect.outcome is not model.Outcome.ROLLED_BACK:
            self._log("info", "probation", generation=effect.generation, outcome=effect.outcome)


def name_of(operation: Operation) -> str:
    """What people call it."""
    return operation.asked_by if operation.asked_by in {START, RESTART} else operation.kind

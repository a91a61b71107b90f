"""What is asked of a master, by the control API, a signal or a save: an operation, and an event in the queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from segue.supervisor import model
from segue.supervisor.operations import Operation, Operations
from segue.supervisor.readiness import Readiness
from segue.supervisor.snapshots import Snapshots
from segue.supervisor.systemd import ServiceManager

_STOP_SLACK_S = 30.0
"""What the end of a stop may take beyond the budget of its workers."""


class Manner(NamedTuple):
    """How a generation shall take over from another; None: as its settings say."""

    strategy: model.Strategy | None = None
    canary: int | None = None
    canary_for: float | None = None


AS_SET = Manner()


class Requests:
    """Each verb returns the operation by which its outcome can be waited for."""

    def __init__(
        self,
        operations: Operations,
        snapshots: Snapshots,
        readiness: Readiness,
        service: ServiceManager,
        put: Callable[[model.Event], None],
        begin_upgrade: Callable[[Operation], object],
    ) -> None:
        """`put` is the way into the queue. An upgrade isn't the lifecycle's: it is begun with `begin_upgrade`."""
        self._operations = operations
        self._snapshots = snapshots
        self._readiness = readiness
        self._service = service
        self._put = put
        self._begin_upgrade = begin_upgrade

    def ask(self, kind: str, asked_by: str, event: Callable[[int], model.Event]) -> Operation:
        """Ask for what `event` says, made with the operation's number."""
        operation = self._operations.create(kind, asked_by)
        self._put(event(operation.number))
        return operation

    def reload(self, asked_by: str, manner: Manner = AS_SET, overtakes: bool = False) -> Operation:
        """Ask for a new generation; with `overtakes` instead of one that is still being started."""
        self._readiness.reloading(asked_by)
        return self.ask(
            "reload", asked_by, lambda number: model.ReloadAsked(number, *manner, overtakes=overtakes)
        )

    def scale(self, asked_by: str, count: int) -> Operation:
        """Ask for `count` workers."""
        return self.ask("scale", asked_by, lambda number: model.ScaleAsked(number, count=count))

    def scale_by(self, delta: int) -> None:
        """Ask for `delta` workers more; nobody waits for the outcome."""
        self._put(model.ScaleAsked(None, delta=delta))

    def drain(self, asked_by: str, mode: str | None) -> Operation:
        """Begin the operator's drain in `mode`, or end it."""
        return self.ask("drain", asked_by, lambda number: model.DrainAsked(number, mode))

    def swap(self, asked_by: str, service: str, query: dict[str, str]) -> Operation:
        """Ask for another instance of a service in every worker of the current generation."""
        operation = self._operations.create("swap", asked_by, service=service)
        self._put(model.SwapAsked(operation.number, service, query))
        return operation

    def stop(self, asked_by: str, at_once: bool = False) -> Operation:
        """Ask for the end of the instance."""
        return self.ask("stop", asked_by, lambda number: self._stop_event(number, at_once))

    def end(self, at_once: bool) -> None:
        """Ask for the end of the instance; nobody waits for the outcome."""
        self._put(self._stop_event(None, at_once))

    def _stop_event(self, operation: int | None, at_once: bool) -> model.StopAsked:
        self._service.stopping("stopping")
        current = self._snapshots.current
        delay = current.settings.stop_delay if current else 0.0
        budget = current.settings.timeout_graceful_shutdown if current else 10.0
        self._service.extend(delay + budget + _STOP_SLACK_S)
        return model.StopAsked(operation, at_once, delay, budget)

    def upgrade(self, asked_by: str) -> Operation:
        """Ask for new code and settings of this master itself."""
        operation = self._operations.create("upgrade", asked_by)
        self._begin_upgrade(operation)
        return operation

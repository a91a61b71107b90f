"""When the service manager is told that a start, a reload or a restart of the unit is over."""

from __future__ import annotations

from segue.supervisor import model
from segue.supervisor.history import name_of
from segue.supervisor.instance import Instance
from segue.supervisor.operations import Operation, Operations
from segue.supervisor.systemd import ServiceManager


class Readiness:
    """Of one instance, as its service manager sees it."""

    def __init__(self, instance: Instance, operations: Operations, service: ServiceManager) -> None:
        self._instance, self._operations, self._service = instance, operations, service
        self.told = False
        """It has been told once: the start is over."""
        self.restarting = False
        """What was adopted is to be followed by the code on the disk before this start is done."""
        self._due = False
        """A reload has ended, and the service manager waits to be told."""

    def reloading(self, asked_by: str) -> None:
        """A reload has been asked for."""
        if self.told:
            self._service.reloading(f"a new generation is being started, asked for by {asked_by}")

    def ended(self, operation: Operation) -> bool:
        """A reload has its outcome. The service manager is told after the last of those that wait.

        Else one that is still queued would count as done. Returns False if it was that of a restart, and was refused.
        """
        if operation.kind != "reload" or any(each.kind == "reload" for each in self._operations.running()):
            return True
        if self.restarting:
            self.restarting = False
            self._instance.take_restart_mark()
            if not operation.ok:
                return False
        self._due = self._due or bool(operation.ok) or self.told
        return True

    def is_due(self, state: model.State) -> bool:
        """Whether it must be told now.

        Whoever connects after READY meets the new code: it waits until the old one has stopped accepting.
        """
        return self._due and not state.overlaps

    def tell(self, status: str) -> None:
        """The first generation serves, or a reload has ended; a last one that was refused is named."""
        self._due, self.told = False, True
        last = [each for each in self._operations.deploys() if each.kind == "reload"]
        if last and last[-1].ok is False:
            status += f"; the last {name_of(last[-1])} was refused: {last[-1].reason}"
        self._service.ready(status)

"""The services of an application, as its worker sees them: there are some once its lifespan has started them."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from segue.worker.services.host import Host
from segue.worker.services.report import Reporter
from segue.worker.services.running import Running
from segue.worker.services.swap import Swaps


class Standing(msgspec.Struct, frozen=True):
    """How the services of a worker stand, for a master that has just found it."""

    active: bool = False
    """One of them takes work, or may."""
    lead: bool = False
    """So does, or may, one of those that one worker alone may have active."""
    versions: dict[str, int] = {}


class Hosted:
    """Of one worker."""

    def __init__(self, host: Host) -> None:
        self.swaps: Swaps | None = None
        self._running: Running | None = None
        self._reporter: Reporter | None = None
        host.on_start = self._on_start

    def _on_start(self, running: Running, swaps: Swaps) -> None:
        if self._running is not None and not self._running.closed:
            raise RuntimeError(
                "an application has one segue.Services; a second one has been started in this worker"
            )
        self._running, self.swaps, self._reporter = running, swaps, Reporter(running)

    @property
    def handover_s(self) -> float | None:
        """How long all services may take to hand over; None: there are none."""
        return self._running.handover_s if self._running is not None and self._running.units else None

    async def activate(self, lead: bool, timeout_s: float) -> None:
        """Let them take work. Returns when they do, or after `timeout_s` seconds: one that can't is tried again."""
        if self._running is not None:
            await asyncio.wait({self._running.spawn(self._running.activate(lead))}, timeout=timeout_s)

    async def deactivate(self, timeout_s: float) -> bool:
        """Let them take no more. False: a service of the generation may still do so."""
        if self._running is None:
            return True
        task = self._running.spawn(self._running.deactivate())
        await asyncio.wait({task}, timeout=timeout_s)
        return task.done() and task.result()

    def standing(self) -> Standing:
        """What isn't known for certain counts as active."""
        running = self._running
        if running is None:
            return Standing()
        busy = [
            unit
            for unit in running.units.values()
            for instance in (unit.slot.current, *unit.retiring)
            if instance is not None and instance.active
        ]
        return Standing(
            active=running.active or bool(busy),
            lead=running.lead or any(unit.declaration.per == "generation" for unit in busy),
            versions={unit.name: unit.version for unit in running.units.values()},
        )

    def leases(self) -> dict[str, int]:
        """How many are out, by name; those on instances that retire are counted with them."""
        if self._running is None:
            return {}
        return {
            unit.name: sum(each.leases for each in (unit.slot.current, *unit.retiring) if each is not None)
            for unit in self._running.units.values()
        }

    async def report(self) -> dict[str, dict[str, Any]]:
        """By name."""
        return {} if self._reporter is None else await self._reporter.report()

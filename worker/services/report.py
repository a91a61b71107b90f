"""What is told of the services of a process: never waits on one of them for longer than a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from segue.worker.lifespan import describe
from segue.worker.services.declaration import Declaration
from segue.worker.services.errors import VerbError
from segue.worker.services.instance import Instance
from segue.worker.services.running import Running, Unit
from segue.worker.services.swap import as_json, unhealthy
from segue.worker.services.verbs import bounded, method

PATIENCE_S = 0.3
"""How long a status waits for the services; one that takes longer is shown without figures, and why."""


class Shared(msgspec.Struct, frozen=True, tag_field="kind", tag="shared"):
    """A metric of a store that all workers share: read once, not summed over them."""

    value: float


class Rate(msgspec.Struct, frozen=True, tag_field="kind", tag="rate"):
    """A metric that is a mean: weighted with `count` over the workers, not summed."""

    value: float
    count: int


class Reporter:
    """Asks the services how they are. A question that is still open isn't asked twice."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self._open: dict[tuple[Instance[Any], str], asyncio.Task[tuple[Any, str | None]]] = {}

    async def report(self) -> dict[str, dict[str, Any]]:
        """By name of the service."""
        units = list(self.running.units.values())
        return dict(zip((u.name for u in units), await asyncio.gather(*map(self._unit, units)), strict=True))

    async def _unit(self, unit: Unit) -> dict[str, Any]:
        instance = unit.slot.current
        document: dict[str, Any] = {
            "per": unit.declaration.per,
            "version": unit.version,
            "initialized": instance is not None,
            "active": instance is not None and instance.active,
            "expected_active": self.running.should_be_active(unit),
            "degraded": instance.degraded if instance else None,
            "since": instance.since if instance else None,
            "leases": instance.leases if instance else 0,
            "retiring": [
                {"version": old.version, "leases": old.leases, "since": old.since} for old in unit.retiring
            ],
            "errors": [{"time": time, "error": text} for time, text in unit.errors],
        }
        if instance is None:
            return document | {"health": None, "metrics": None, "unknown_because": "it isn't started"}
        health, metrics = await asyncio.gather(
            self._ask(unit, instance, "health"), self._ask(unit, instance, "metrics")
        )
        return document | health | metrics

    async def _ask(self, unit: Unit, instance: Instance[Any], what: str) -> dict[str, Any]:
        do = method(unit.declaration, instance.value, what)
        if do is None:
            return {"health": {"ok": True}} if what == "health" else {"metrics": {}}
        key = (instance, what)
        task = self._open.get(key)
        if task is None:
            task = self._open[key] = self.running.spawn(_call(do, unit.declaration, instance, what))
            task.add_done_callback(lambda _: self._open.pop(key, None))
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
        if not done or task.cancelled():
            return {what: None, f"{what}_unknown_because": f"it takes longer than {PATIENCE_S:g} s"}
        found, error = task.result()
        if what == "metrics":
            return {"metrics": found} | ({} if error is None else {"metrics_unknown_because": error})
        extra = found if isinstance(found, dict) else {}
        return {"health": extra | ({"ok": True} if error is None else {"ok": False, "reason": error})}


async def _call(
    do: Callable[[], Any], declaration: Declaration, instance: Instance[Any], what: str
) -> tuple[Any, str | None]:
    """What it answers, as JSON has it, or None and what is wrong."""
    named = f"{what} of service {declaration.name!r}"
    try:
        found = await bounded(do, {}, declaration.health_timeout, named, instance.settings)
        reason = unhealthy(found) if what == "health" else None
        if isinstance(found, Mapping):
            found = dict(found)
        elif what == "metrics":
            return None, f"{what}() returned no dict"
        return as_json(found), reason
    except Exception as error:  # noqa: BLE001 - whatever a service answers is its report
        return None, str(error) if isinstance(error, VerbError) else f"{named}: {describe(error)}"

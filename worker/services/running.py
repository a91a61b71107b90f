"""The services of this process while they run: started, activated, deactivated, closed, in the order of their needs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, TypeVar

from segue.handoff.messages import ServiceRecord
from segue.worker.services.declaration import Declaration, order
from segue.worker.services.errors import OptionsError, VerbError
from segue.worker.services.host import Host
from segue.worker.services.instance import Instance, Slot
from segue.worker.services.options import Resolved, resolve
from segue.worker.services.verbs import bounded, has, tell

T = TypeVar("T")
_log = logging.getLogger("segue.services")

_RETRY_FIRST_S = 0.5
_RETRY_CAP_S = 30.0
_ERRORS_KEPT = 10


class Unit:
    """One service in this process."""

    def __init__(self, declaration: Declaration, slot: Slot[Any], record: ServiceRecord) -> None:
        self.declaration = declaration
        self.slot = slot
        self.choices = dict(record.choices)
        self.version = record.version
        self.retiring: list[Instance[Any]] = []
        """Those that were replaced and are not closed yet."""
        self.errors: deque[tuple[float, str]] = deque(maxlen=_ERRORS_KEPT)
        self.moving = asyncio.Lock()
        """One activation or deactivation at a time."""
        self.retry: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """As declared."""
        return self.declaration.name

    @property
    def instance(self) -> Instance[Any]:
        """The current one."""
        assert self.slot.current is not None
        return self.slot.current

    def fail(self, reason: str) -> None:
        """Remember and log an error."""
        self.errors.append((time.time(), reason))
        _log.error("event=service-error service=%s reason=%s", self.name, reason)


class Running:
    """All services of one registry."""

    def __init__(
        self,
        declarations: Mapping[str, Declaration],
        slots: Mapping[str, Slot[Any]],
        host: Host,
        elsewhere: Collection[str] = (),
    ) -> None:
        """`elsewhere`: what other registries of the process declare, of which the settings file may speak as well."""
        self.host = host
        self.closed = False
        """Its end has begun, or was reached."""
        self._elsewhere = elsewhere
        self.lead = False
        """Whether this process is the one on which services of the generation are active."""
        self.active = False
        self._loop = asyncio.get_running_loop()
        self.units = {
            name: Unit(declarations[name], slots[name], host.records.get(name, ServiceRecord()))
            for name in order(declarations)
        }
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ends: set[asyncio.Task[Any]] = set()

    @property
    def handover_s(self) -> float:
        """How long a handover of all of them may take at most."""
        return max((unit.declaration.handover_timeout for unit in self.units.values()), default=0.0)

    def dependents(self, name: str) -> list[Unit]:
        """The services that require `name` themselves."""
        return [unit for unit in self.units.values() if name in unit.declaration.requires]

    def spawn(self, work: Awaitable[T]) -> asyncio.Task[T]:
        """Do something beside, until the end at most."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def ending(self, work: Awaitable[T]) -> asyncio.Task[T]:
        """Do something beside that comes to an end by itself, and must, even while all is being closed."""
        task = asyncio.ensure_future(work)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
        return task

    async def finish(self, work: Awaitable[T]) -> T:
        """Wait for such work; it goes on if whoever waits is cancelled."""
        return await asyncio.shield(self.ending(work))

    # ------------------------------------------------------------------------------------------ start and close

    async def start(self) -> None:
        """Start all. If one fails, it and those before it are closed; raises `VerbError`, `OptionsError`, `Unknown`."""
        stray = self.host.place.known_sections() - self.units.keys() - set(self._elsewhere)
        if stray:
            raise OptionsError(
                f"{self.host.place.file}: services.{sorted(stray)[0]}: no such service; "
                f"declared: {', '.join(sorted(self.units)) or 'none'}"
            )
        try:
            for unit in self.units.values():
                resolved = resolve(unit.declaration, self.host.place, None, unit.choices, None)
                instance = await self.build(unit, resolved, unit.version)
                try:
                    await tell(unit.declaration, instance, "start")
                except BaseException:
                    await self.finish(self.close_instance(unit, instance))
                    raise
                unit.slot.current = instance
        except BaseException:
            await self.finish(self.close())
            raise

    async def build(self, unit: Unit, resolved: Resolved, version: int) -> Instance[Any]:
        """Make an instance. Raises `VerbError` and `Unknown`."""
        declaration = unit.declaration
        previous = unit.slot.current
        offered = {name: self.units[name].instance.value for name in declaration.requires} | {
            "settings": resolved.settings,
            "options": resolved.options,
            "previous": None if previous is None else previous.value,
        }
        named = {name: value for name, value in offered.items() if name in declaration.takes}
        what = f"the factory of service {declaration.name!r}"
        value = await bounded(
            declaration.factory, named, declaration.start_timeout, what, (resolved.settings, resolved.options)
        )
        return Instance(value, resolved.settings, version, self._loop)

    async def close(self) -> None:
        """Deactivate and close all, each before what it requires, and what is left of those that were replaced.

        Leases that are still out are waited for, all of them together for as long as the services' `close_timeout`.
        """
        self.closed = True
        began = self._loop.time()
        try:
            await self.deactivate()
            for unit in reversed(self.units.values()):
                current, unit.slot.current = unit.slot.current, None  # nobody gets it any more
                for instance in (*unit.retiring, *([] if current is None else [current])):
                    left_s = began + unit.declaration.close_timeout - self._loop.time()
                    if not await instance.unleased(max(0.0, left_s)):
                        unit.fail(
                            f"{instance.leases} leases are still out at the end; it is closed all the same"
                        )
                    await self.close_instance(unit, instance)
                unit.retiring.clear()
        finally:
            for unit in self.units.values():
                unit.slot.current = None
            for task in list(self._tasks):
                task.cancel()

    async def close_instance(self, unit: Unit, instance: Instance[Any]) -> str | None:
        """Close it once, however many ask for it; returns why it failed to."""
        if instance.closing is None:
            instance.closing = asyncio.ensure_future(self._close_instance(unit, instance))
        return await asyncio.shield(instance.closing)

    async def _close_instance(self, unit: Unit, instance: Instance[Any]) -> str | None:
        try:
            await tell(unit.declaration, instance, "close")
        except VerbError as error:
            unit.fail(str(error))
            return str(error)
        if has(unit.declaration, instance.value, "close"):
            instance.active = False
        return None

    # --------------------------------------------------------------------------------- activate and deactivate

    async def activate(self, lead: bool) -> None:
        """Let them take work of their own; services of the generation only with `lead`.

        One that can't is degraded and tried again; nothing is raised.
        """
        self.active, self.lead = True, self.lead or lead
        await self._in_order(self._activate_one, reverse=False)

    async def deactivate(self) -> bool:
        """Let none of them take work. False if a service of the generation may still do so."""
        self.active = self.lead = False
        done = await self._in_order(self._deactivate_one, reverse=True)
        return all(done)

    async def activate_now(self, unit: Unit) -> None:
        """Activate the current instance, if it is to be active; again later if it can't be now."""
        if not await self._activate_instance(unit) and (unit.retry is None or unit.retry.done()):
            unit.retry = self.spawn(self._retry(unit))

    def should_be_active(self, unit: Unit) -> bool:
        """Whether it is to take work here."""
        return self.active and (self.lead or unit.declaration.per == "worker")

    async def _in_order(self, do: Callable[[Unit], Awaitable[bool]], reverse: bool) -> list[bool]:
        """All at once, but each only after those that it requires (or, `reverse`, that require it)."""
        tasks: dict[str, asyncio.Task[bool]] = {}

        async def after(unit: Unit, before: list[asyncio.Task[bool]]) -> bool:
            if before:
                await asyncio.wait(before)
            return await do(unit)

        for unit in reversed(self.units.values()) if reverse else self.units.values():
            names = (
                [each.name for each in self.dependents(unit.name)] if reverse else unit.declaration.requires
            )
            tasks[unit.name] = asyncio.ensure_future(after(unit, [tasks[name] for name in names]))
        return list(await asyncio.gather(*tasks.values()))

    async def _activate_one(self, unit: Unit) -> bool:
        await self.activate_now(unit)
        return True

    async def _activate_instance(self, unit: Unit) -> bool:
        """Activate its current instance, if it is to be active and isn't for certain."""
        async with unit.moving:
            instance = unit.slot.current
            if instance is None or not self.should_be_active(unit):
                return True
            if instance.active and instance.degraded is None:
                return True
            reason = await self._obstacle(unit, instance)
            if reason is None:
                instance.active = True
                try:
                    await tell(unit.declaration, instance, "activate")
                except VerbError as error:
                    unit.fail(str(error))
                    reason = str(error)
                    await self._undo(unit, instance)
                except BaseException:
                    instance.degraded = "its activation was cut short"
                    raise
            instance.degraded = reason
            return reason is None

    async def _obstacle(self, unit: Unit, instance: Instance[Any]) -> str | None:
        """Why an instance can't be activated now."""
        if instance.closing is not None:
            return "it was closed, since it did not let go of its work; a swap makes a new one"
        for old in list(unit.retiring):
            if not await self.deactivate_instance(unit, old):
                return f"version {old.version} has not let go of its work"
        return None

    async def _undo(self, unit: Unit, instance: Instance[Any]) -> None:
        """An activation has failed, and may have come half way. If this fails too, the instance counts as active."""
        try:
            await tell(unit.declaration, instance, "deactivate")
        except VerbError as error:
            unit.fail(str(error))
        else:
            instance.active = False

    async def _retry(self, unit: Unit) -> None:
        pause_s = _RETRY_FIRST_S
        while self.should_be_active(unit):
            await asyncio.sleep(pause_s)
            if await self._activate_instance(unit):
                return
            pause_s = min(_RETRY_CAP_S, pause_s * 2)

    async def _deactivate_one(self, unit: Unit) -> bool:
        async with unit.moving:
            instances = [*unit.retiring, *filter(None, [unit.slot.current])]
            return all([await self.deactivate_instance(unit, instance) for instance in instances])

    async def deactivate_instance(self, unit: Unit, instance: Instance[Any]) -> bool:
        """Let it take no more work.

        A service of the generation that doesn't manage to is closed: it must not be active twice. Returns whether it is
        certain that it takes none.
        """
        if not instance.active:
            return True
        try:
            await tell(unit.declaration, instance, "deactivate")
        except VerbError as error:
            unit.fail(str(error))
            instance.degraded = str(error)
            if unit.declaration.per == "generation":
                await self.close_instance(unit, instance)
                if instance.active:
                    instance.closing = None  # so that it is tried again
                    return False
        else:
            instance.degraded = None
        instance.active = False
        return True

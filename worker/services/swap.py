"""One service replaced by another instance of it: prepared beside, moved in one synchronous step, then retired.

`prepare` builds, starts and probes; nothing has changed if it fails. `commit` moves the reference and rewires the
dependents without giving up control once in between, and undoes all of it if one of them can't be rewired. What begins
work after it gets the new instance; what holds a lease goes on with the old one, which is closed after its last lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from segue.worker.lifespan import describe
from segue.worker.services import schema
from segue.worker.services.errors import BusyError, SwapRefusedError, UnknownServiceError, VerbError
from segue.worker.services.instance import Instance
from segue.worker.services.options import Resolved, resolve
from segue.worker.services.running import Running, Unit
from segue.worker.services.secret import hide, secrets_in
from segue.worker.services.verbs import tell

_log = logging.getLogger("segue.services")

DECISION_TIMEOUT_S = 120.0
"""How long a prepared instance waits to be committed before it is given up, beside the time that other workers may
take to prepare theirs."""
_REPORT_WAIT_S = 1.0
"""How long the answer to a commit waits for the old instance to be deactivated and the new one to be activated."""
_ENDING = "the services of this process are being closed"


class _Candidate:
    """A new instance on its way."""

    def __init__(self, number: int, unit: Unit, version: int, resolved: Resolved) -> None:
        self.number = number
        self.unit = unit
        self.version = version
        self.resolved = resolved
        self.building: asyncio.Task[None] | None = None
        self.instance: Instance[Any] | None = None
        self.expiry: asyncio.TimerHandle | None = None
        """Set while it waits for the decision, and only then."""
        self.given_up = False
        self.seconds: dict[str, float] = {}
        self.health: Any = None
        """What the new instance says of itself when it is probed."""
        self.rewired: list[str] = []


class Swaps:
    """The swaps of one process: one at a time."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._candidate: _Candidate | None = None
        self._committed: tuple[int, asyncio.Task[dict[str, Any]] | str] | None = None
        """Number of the last one and its report, or why it was refused: who asks again gets the same answer."""
        self._own_numbers = -1

    async def prepare(
        self, number: int, name: str, query: Mapping[str, str], version: int, choices: Mapping[str, str]
    ) -> dict[str, Any]:
        """Build, start and probe an instance beside the current one, and report on it.

        Raises `UnknownServiceError`, `BusyError`, `OptionsError`, `Unknown` and `SwapRefusedError`.
        """
        if self._running.closed:
            raise SwapRefusedError(_ENDING)
        unit = self._running.units.get(name)
        if unit is None:
            raise UnknownServiceError(name, sorted(self._running.units))
        if self._candidate is not None:
            if self._candidate.number == number and self._candidate.expiry is not None:
                return _prepared(self._candidate)
            raise BusyError(f"a swap of service {self._candidate.unit.name!r} is under way")
        if unit.slot.current is None:
            raise SwapRefusedError(f"service {name!r} isn't started yet")
        resolved = resolve(unit.declaration, self._running.host.place, _settings_of(unit), choices, query)
        self._committed = None
        candidate = self._candidate = _Candidate(number, unit, version, resolved)
        candidate.building = self._running.spawn(self._prepare(candidate))
        try:
            await asyncio.wait({candidate.building})
            if candidate.given_up or candidate.building.cancelled():
                raise SwapRefusedError(_ENDING if self._running.closed else "the swap was given up meanwhile")
            candidate.building.result()
        except BaseException as error:
            await self._running.finish(self._discard(candidate))
            if isinstance(error, VerbError):
                raise SwapRefusedError(str(error)) from error
            raise
        wait_s = DECISION_TIMEOUT_S + 2 * unit.declaration.start_timeout
        candidate.expiry = asyncio.get_running_loop().call_later(wait_s, self._expire, candidate, wait_s)
        return _prepared(candidate)

    async def _prepare(self, candidate: _Candidate) -> None:
        unit = candidate.unit
        for dependent, instance in self._dependents(unit):
            _check_rewirable(instance.value, dependent.name, unit.name)
        with _timed(candidate, "build"):
            candidate.instance = await self._running.build(unit, candidate.resolved, candidate.version)
        with _timed(candidate, "start"):
            await tell(unit.declaration, candidate.instance, "start")
        with _timed(candidate, "probe"):
            health = await tell(unit.declaration, candidate.instance, "health")
        with contextlib.suppress(Exception):  # what JSON can't say keeps nobody from being healthy
            candidate.health = as_json(health)
        try:
            reason = unhealthy(health)
        except Exception as error:  # noqa: BLE001 - a mapping of its own may do what it likes
            reason = describe(error)
        if reason is not None:
            reason = hide(reason, secrets_in(candidate.resolved.settings))
            raise SwapRefusedError(f"the new instance of service {unit.name!r} is not healthy: {reason}")

    async def commit(self, number: int) -> dict[str, Any]:
        """Move the reference, rewire, and begin to retire the old instance.

        Told twice, it answers the same. Raises `SwapRefusedError` when a dependent can't be rewired (all are as before)
        or when there is no such swap.
        """
        if self._committed is not None and self._committed[0] == number:
            return await self._told(self._committed[1])
        candidate = self._candidate
        if candidate is None or candidate.number != number or candidate.expiry is None:
            raise SwapRefusedError(f"no swap {number} is prepared here")
        candidate.expiry.cancel()
        candidate.expiry = None
        old = candidate.unit.instance
        try:
            with _timed(candidate, "commit"):
                self._move(candidate)
        except BaseException as error:
            if isinstance(error, VerbError):
                self._committed = (number, str(error))
            await self._running.finish(self._discard(candidate))
            if isinstance(error, VerbError):
                raise SwapRefusedError(str(error)) from error
            raise
        self._candidate = None
        report = self._running.ending(self._retiring(candidate, old))
        self._committed = (number, report)
        return await self._told(report)

    async def abort(self, number: int) -> None:
        """Give an instance up that is being, or is, prepared; nothing happens if there is none of that number."""
        candidate = self._candidate
        if candidate is not None and candidate.number == number:
            await self._running.finish(self._discard(candidate))

    async def close(self) -> None:
        """Give up what is being prepared or waits for a decision, and prepare nothing more: the process ends."""
        self._running.closed = True
        if self._candidate is not None:
            await self._running.finish(self._discard(self._candidate))

    async def swap(self, name: str, query: Mapping[str, str]) -> dict[str, Any]:
        """All of it, in this process alone; raises what `prepare` and `commit` raise."""
        self._own_numbers -= 1
        number = self._own_numbers
        unit = self._running.units.get(name)
        version, choices = (unit.version + 1, unit.choices) if unit else (0, {})
        prepared = await self.prepare(number, name, query, version, choices)
        report = {**prepared, **await self.commit(number)}
        return {key: value for key, value in report.items() if key not in {"choices", "digest"}}

    # ------------------------------------------------------------------------------------------------- the step

    def _dependents(self, unit: Unit) -> list[tuple[Unit, Instance[Any]]]:
        """What has to be rewired: an instance that only finishes its work must not be left with a closed one."""
        return [
            (dependent, instance)
            for dependent in self._running.dependents(unit.name)
            for instance in (dependent.instance, *dependent.retiring)
        ]

    def _move(self, candidate: _Candidate) -> None:
        """The one synchronous step. Raises `VerbError`, and then everything is as before."""
        unit, new, old = candidate.unit, candidate.instance, candidate.unit.instance
        assert new is not None
        done: list[tuple[Unit, Instance[Any]]] = []
        for dependent, instance in self._dependents(unit):
            done.append((dependent, instance))
            try:
                _rewire(instance.value, unit.name, new.value)
            except BaseException as error:
                for each, theirs in reversed(done):
                    _rewire_back(each, theirs, unit.name, old.value)
                if not isinstance(error, Exception):
                    raise
                reason = hide(describe(error), secrets_in((new.settings, instance.settings)))
                raise VerbError(
                    f"service {dependent.name!r} can't be rewired to the new {unit.name!r}: {reason}"
                ) from None
        unit.slot.current = new
        unit.version, unit.choices = candidate.version, candidate.resolved.choices
        unit.retiring.append(old)
        titles = [each.declaration.title or each.name for each, _ in done]
        candidate.rewired = list(dict.fromkeys(titles))

    async def _retiring(self, candidate: _Candidate, old: Instance[Any]) -> dict[str, Any]:
        """Begin to retire the old instance, and report on that."""
        assert candidate.instance is not None
        moved = self._running.spawn(self._exchange(candidate, old))
        await asyncio.wait({moved}, timeout=_REPORT_WAIT_S)
        report: dict[str, Any] = {
            "version": candidate.version,
            "rewired": candidate.rewired,
            "seconds": dict(candidate.seconds),
            "leases_out": old.leases,
        }
        if candidate.instance.degraded:
            report["degraded"] = candidate.instance.degraded
        _log.info(
            "event=swapped service=%s version=%d leases_out=%d",
            candidate.unit.name,
            candidate.version,
            old.leases,
        )
        return report

    @staticmethod
    async def _told(outcome: asyncio.Task[dict[str, Any]] | str) -> dict[str, Any]:
        if isinstance(outcome, str):
            raise SwapRefusedError(outcome)
        return await asyncio.shield(outcome)

    async def _exchange(self, candidate: _Candidate, old: Instance[Any]) -> None:
        """The old one takes no more work, then the new one does; then the old one is retired, beside.

        Unless a service of the generation has let go for certain, its successor isn't activated yet, but later.
        """
        unit = candidate.unit
        with _timed(candidate, "deactivate"):
            async with unit.moving:
                await self._running.deactivate_instance(unit, old)
        with _timed(candidate, "activate"):
            await self._running.activate_now(unit)
        self._running.spawn(self._retire(unit, old))

    async def _retire(self, unit: Unit, old: Instance[Any]) -> None:
        if not await old.unleased(unit.declaration.lease_timeout):
            unit.fail(
                f"{old.leases} leases of version {old.version} were still out after "
                f"{unit.declaration.lease_timeout:g} s; it is closed all the same"
            )
        await self._running.close_instance(unit, old)
        # one that is possibly active stays: whenever its successor is to be activated it is told again to let go
        if not old.active and old in unit.retiring:
            unit.retiring.remove(old)

    # ------------------------------------------------------------------------------------------------- giving up

    def _expire(self, candidate: _Candidate, waited_s: float) -> None:
        candidate.unit.fail(f"the swap to version {candidate.version} was not decided within {waited_s:g} s")
        self._running.spawn(self._discard(candidate))

    async def _discard(self, candidate: _Candidate) -> None:
        candidate.given_up = True  # from here on it can't be committed
        if candidate.expiry is not None:
            candidate.expiry.cancel()
            candidate.expiry = None
        if candidate.building is not None and not candidate.building.done():
            candidate.building.cancel()
            await asyncio.wait({candidate.building})
        if candidate.instance is not None:
            await self._running.close_instance(candidate.unit, candidate.instance)
        if self._candidate is candidate:
            self._candidate = None


def unhealthy(health: Any) -> str | None:
    """Why what `health()` returned isn't good, or None: None and True are, False isn't, a mapping says ``ok``."""
    if isinstance(health, Mapping):
        ok = health.get("ok", True)
        return None if ok else str(health.get("reason") or "it says so")
    return "it says so" if health is False else None


def as_json(told: Any) -> Any:
    """What a service tells of itself, as JSON has it. Raises what msgspec raises for what JSON can't say."""
    return msgspec.json.decode(msgspec.json.encode(told, enc_hook=str))


def _settings_of(unit: Unit) -> Any:
    """What the current instance says its settings are, else what it was built with."""
    instance = unit.instance
    try:
        own = getattr(instance.value, "settings", None)
    except Exception as error:  # noqa: BLE001 - a property may do what it likes
        unit.fail(f"its settings can't be read: {type(error).__name__}")
        own = None
    return own if schema.fits(own, unit.declaration.settings) else instance.settings


def _prepared(candidate: _Candidate) -> dict[str, Any]:
    return {
        "version": candidate.version,
        "seconds": dict(candidate.seconds),
        "health": candidate.health,
        "choices": candidate.resolved.choices,
        "digest": candidate.resolved.digest,
    }


class _timed(contextlib.AbstractContextManager[None]):  # noqa: N801 - reads as a statement
    def __init__(self, candidate: _Candidate, phase: str) -> None:
        self._candidate, self._phase = candidate, phase

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._candidate.seconds[self._phase] = round(time.perf_counter() - self._began, 6)


def _check_rewirable(value: Any, dependent: str, name: str) -> None:
    try:
        setter = getattr(value, f"set_{name}", None)
        possible = setter is not None or hasattr(value, name)
    except Exception as error:
        raise SwapRefusedError(f"service {dependent!r} can't be rewired: {describe(error)}") from error
    if inspect.iscoroutinefunction(setter):
        raise SwapRefusedError(f"set_{name}() of service {dependent!r} is async; the step is synchronous")
    if not possible:
        raise SwapRefusedError(
            f"service {dependent!r} has neither set_{name}() nor an attribute {name}: it can't be given the new one"
        )


def _rewire(value: Any, name: str, new: Any) -> None:
    setter = getattr(value, f"set_{name}", None)
    if setter is None:
        setattr(value, name, new)
        return
    promised = setter(new)
    if inspect.isawaitable(promised):
        if inspect.iscoroutine(promised):
            promised.close()
        raise TypeError(f"set_{name}() returns something to be awaited; the step is synchronous")


def _rewire_back(dependent: Unit, instance: Instance[Any], name: str, old: Any) -> None:
    try:
        _rewire(instance.value, name, old)
    except Exception as error:  # noqa: BLE001 - the others must be rewired back all the same
        reason = hide(describe(error), secrets_in(instance.settings))
        dependent.fail(f"can't be rewired back to the old {name!r}: {reason}")

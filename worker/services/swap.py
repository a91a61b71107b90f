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

from segue.worker.services.errors import BusyError, SwapRefusedError, UnknownServiceError, VerbError
from segue.worker.services.instance import Instance
from segue.worker.services.options import Resolved, resolve
from segue.worker.services.running import Running, Unit
from segue.worker.services.verbs import tell

_log = logging.getLogger("segue.services")

DECISION_TIMEOUT_S = 120.0
"""How long a prepared instance waits to be committed before it is given up."""
_REPORT_WAIT_S = 1.0
"""How long the answer to a commit waits for the old instance to be deactivated and the new one to be activated."""


class _Candidate:
    """A new instance that waits for the decision."""

    def __init__(self, number: int, unit: Unit, version: int, resolved: Resolved) -> None:
        self.number = number
        self.unit = unit
        self.version = version
        self.resolved = resolved
        self.instance: Instance[Any] | None = None
        self.seconds: dict[str, float] = {}
        self.expiry: asyncio.TimerHandle | None = None
        self.rewired: list[str] = []


class Swaps:
    """The swaps of one process: one at a time."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._candidate: _Candidate | None = None
        self._committed: tuple[int, dict[str, Any]] | None = None
        """Number and report of the last one: who asks again gets the same answer."""
        self._own_numbers = -1

    async def prepare(
        self, number: int, name: str, query: Mapping[str, str], version: int, choices: Mapping[str, str]
    ) -> dict[str, Any]:
        """Build, start and probe an instance beside the current one, and report on it.

        Raises `UnknownServiceError`, `BusyError`, `options.OptionsError`, `options.Unknown` and `SwapRefusedError`.
        """
        unit = self._running.units.get(name)
        if unit is None:
            raise UnknownServiceError(name, sorted(self._running.units))
        if self._candidate is not None:
            if self._candidate.number == number and self._candidate.expiry is not None:
                return _prepared(self._candidate)
            raise BusyError(f"a swap of service {self._candidate.unit.name!r} is under way")
        base = getattr(unit.instance.value, "settings", None)
        if unit.declaration.settings is None or not isinstance(base, unit.declaration.settings):
            base = unit.instance.settings
        resolved = resolve(unit.declaration, self._running.host.place, base, choices, query)
        self._committed = None
        candidate = self._candidate = _Candidate(number, unit, version, resolved)
        try:
            await self._prepare(candidate)
            if self._candidate is not candidate:
                raise SwapRefusedError("the swap was given up meanwhile")
        except BaseException as error:
            await asyncio.shield(self._discard(candidate))
            if isinstance(error, VerbError):
                raise SwapRefusedError(str(error)) from error
            raise
        loop = asyncio.get_running_loop()
        candidate.expiry = loop.call_later(DECISION_TIMEOUT_S, self._expire, candidate)
        return _prepared(candidate)

    async def _prepare(self, candidate: _Candidate) -> None:
        unit, declaration = candidate.unit, candidate.unit.declaration
        for dependent in self._running.dependents(unit.name):
            _check_rewirable(dependent.instance.value, dependent.name, unit.name)
        with _timed(candidate, "build"):
            candidate.instance = await self._running.build(unit, candidate.resolved, candidate.version)
        value = candidate.instance.value
        with _timed(candidate, "start"):
            await tell(declaration, value, "start", declaration.start_timeout)
        with _timed(candidate, "probe"):
            health = await tell(declaration, value, "health", declaration.health_timeout)
        reason = unhealthy(health)
        if reason is not None:
            raise SwapRefusedError(f"the new instance of service {unit.name!r} is not healthy: {reason}")

    async def commit(self, number: int) -> dict[str, Any]:
        """Move the reference, rewire, and begin to retire the old instance.

        Told twice, it answers the same. Raises `SwapRefusedError` when a dependent can't be rewired (all are as before)
        or when there is no such swap.
        """
        if self._committed is not None and self._committed[0] == number:
            return self._committed[1]
        candidate = self._candidate
        if candidate is None or candidate.number != number or candidate.expiry is None:
            raise SwapRefusedError(f"no swap {number} is prepared here")
        candidate.expiry.cancel()
        unit, old = candidate.unit, candidate.unit.instance
        try:
            with _timed(candidate, "commit"):
                self._move(candidate)
        except VerbError as error:
            await asyncio.shield(self._discard(candidate))
            raise SwapRefusedError(str(error)) from error
        self._candidate = None
        report: dict[str, Any] = {"version": candidate.version, "rewired": candidate.rewired}
        self._committed = (number, report)
        moved = self._running.spawn(self._exchange(candidate, old))
        await asyncio.wait({moved}, timeout=_REPORT_WAIT_S)
        report |= {"seconds": dict(candidate.seconds), "leases_out": old.leases}
        assert candidate.instance is not None
        if candidate.instance.degraded:
            report["degraded"] = candidate.instance.degraded
        _log.info(
            "event=swapped service=%s version=%d leases_out=%d", unit.name, candidate.version, old.leases
        )
        return report

    async def abort(self, number: int) -> None:
        """Give a prepared instance up; nothing happens if there is none of that number."""
        candidate = self._candidate
        if candidate is None or candidate.number != number:
            return
        if candidate.expiry is None:
            self._candidate = None  # what prepares it sees that, and discards it
        else:
            await self._discard(candidate)

    async def close(self) -> None:
        """Give up what waits for a decision: the process ends."""
        if self._candidate is not None:
            await self._discard(self._candidate)

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

    def _move(self, candidate: _Candidate) -> None:
        """The one synchronous step. Raises `VerbError`, and then everything is as before."""
        unit, new, old = candidate.unit, candidate.instance, candidate.unit.instance
        assert new is not None
        done: list[Unit] = []
        for dependent in self._running.dependents(unit.name):
            done.append(dependent)
            try:
                _rewire(dependent.instance.value, unit.name, new.value)
            except Exception as error:
                for each in reversed(done):
                    _rewire_back(each, unit.name, old.value)
                raise VerbError(
                    f"service {dependent.name!r} can't be rewired to the new {unit.name!r}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        unit.slot.current = new
        unit.version, unit.choices = candidate.version, candidate.resolved.choices
        unit.retiring.append(old)
        candidate.rewired = [each.declaration.title or each.name for each in done]

    async def _exchange(self, candidate: _Candidate, old: Instance[Any]) -> None:
        """The old one takes no more work, then the new one does; then the old one is retired, beside."""
        unit = candidate.unit
        with _timed(candidate, "deactivate"):
            async with unit.moving:
                certain = await self._running.deactivate_instance(unit, old)
        if certain:
            with _timed(candidate, "activate"):
                await self._running.activate_now(unit)
        self._running.spawn(self._retire(unit, old, certain))

    async def _retire(self, unit: Unit, old: Instance[Any], certain: bool) -> None:
        if not await old.unleased(unit.declaration.lease_timeout):
            unit.fail(
                f"{old.leases} leases of version {old.version} were still out after "
                f"{unit.declaration.lease_timeout:g} s; it is closed all the same"
            )
        await self._running.close_instance(unit, old)
        unit.retiring.remove(old)
        if not certain:  # closed, it takes no work either
            await self._running.activate_now(unit)

    # ------------------------------------------------------------------------------------------------- giving up

    def _expire(self, candidate: _Candidate) -> None:
        candidate.unit.fail(f"swap {candidate.number} was not decided within {DECISION_TIMEOUT_S:g} s")
        self._running.spawn(self._discard(candidate))

    async def _discard(self, candidate: _Candidate) -> None:
        if candidate.expiry is not None:
            candidate.expiry.cancel()
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


def _prepared(candidate: _Candidate) -> dict[str, Any]:
    return {
        "version": candidate.version,
        "seconds": dict(candidate.seconds),
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
    setter = getattr(value, f"set_{name}", None)
    if inspect.iscoroutinefunction(setter):
        raise SwapRefusedError(f"set_{name}() of service {dependent!r} is async; the step is synchronous")
    if setter is None and not hasattr(value, name):
        raise SwapRefusedError(
            f"service {dependent!r} has neither set_{name}() nor an attribute {name}: it can't be given the new one"
        )


def _rewire(value: Any, name: str, new: Any) -> None:
    setter = getattr(value, f"set_{name}", None)
    if setter is None:
        setattr(value, name, new)
    else:
        setter(new)


def _rewire_back(dependent: Unit, name: str, old: Any) -> None:
    try:
        _rewire(dependent.instance.value, name, old)
    except Exception as error:  # noqa: BLE001 - the others must be rewired back all the same
        dependent.fail(f"can't be rewired back to the old {name!r}: {type(error).__name__}: {error}")

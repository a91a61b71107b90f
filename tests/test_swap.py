"""Swaps within one process: built beside, moved in one step, retired; and everything that can keep one from being."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

import segue
from segue.handoff.messages import SwapOrder
from segue.worker.services import endpoints
from segue.worker.services import running as runnings
from segue.worker.services import swap as swaps_
from segue.worker.services.running import Running
from segue.worker.services.swap import Swaps

PATIENT_S = 60.0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no settings file lies, and where a report is whole however slow the machine is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(swaps_, "_REPORT_WAIT_S", PATIENT_S)


def run(work: Coroutine[Any, Any, Any]) -> None:
    asyncio.run(asyncio.wait_for(work, PATIENT_S))


@asynccontextmanager
async def started(services: segue.Services) -> AsyncIterator[tuple[Running, Swaps]]:
    async with services:
        assert services.running is not None
        yield services.running


class Settings(msgspec.Struct, frozen=True):
    number: int = 1


class Options(msgspec.Struct, frozen=True):
    loudly: bool = False


class Thing:
    """Says what is done with it, and can be told to fail."""

    def __init__(
        self,
        settings: Settings | None = None,
        options: Options | None = None,
        previous: Thing | None = None,
        **required: Any,
    ) -> None:
        self.settings, self.options, self.previous = settings, options, previous
        self.number: int = 1 if previous is None else previous.number + 1
        self.log: list[str] = [] if previous is None else previous.log
        self.closed = asyncio.Event()
        self.say("build")
        vars(self).update(required)

    def say(self, what: str) -> None:
        self.log.append(f"{what} {self.number}")

    async def start(self) -> None:
        self.say("start")

    async def health(self) -> bool:
        self.say("health")
        return True

    async def activate(self) -> None:
        self.say("activate")

    async def deactivate(self) -> None:
        self.say("deactivate")

    async def close(self) -> None:
        self.say("close")
        self.closed.set()


def later(cls: type[Thing], verb: str, does: Callable[[Any], Awaitable[Any]]) -> type[Thing]:
    """`cls` of which all but the first instance do something else."""

    async def do(self: Thing) -> Any:
        if self.number > 1:
            return await does(self)
        return await getattr(cls, verb)(self)

    return type(cls.__name__, (cls,), {verb: do})


async def fail(_: Any) -> None:
    raise ConnectionError("no route")


async def hang(_: Any) -> None:
    await asyncio.Event().wait()


# --------------------------------------------------------------------------------------------- the swap that works


def test_a_swap_builds_starts_and_probes_beside_then_moves_then_retires() -> None:
    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", Thing)
        async with services:
            old = thing.current
            report = await services.reload("thing")
            new = thing.current
            await old.closed.wait()
            assert new is not old
            assert new.previous is old
            assert thing.version == 2
            assert old.log == [
                *("build 1", "start 1", "activate 1"),
                *("build 2", "start 2", "health 2", "deactivate 1", "activate 2", "close 1"),
            ]
            assert (report["version"], report["rewired"], report["leases_out"]) == (2, [], 0)
            assert set(report["seconds"]) == {
                *("build", "start", "probe"),
                *("commit", "deactivate", "activate"),
            }
            assert not {"choices", "digest", "degraded"} & set(report)

    run(work())


def test_a_lease_pins_the_old_instance_and_a_look_up_gives_the_new_one() -> None:
    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", Thing)
        async with started(services) as (running, _):
            with thing.lease() as old:
                assert (await services.reload("thing"))["leases_out"] == 1
                with thing.lease() as new:
                    assert new is thing.current is not old
                await services.reload("thing")
                assert [each.version for each in running.units["thing"].retiring] == [1, 2]
                await new.closed.wait()
                assert not old.closed.is_set()
            await old.closed.wait()
            assert old.log.count("close 1") == 1

    run(work())


def test_leases_that_outlast_their_timeout_are_reported_and_the_old_one_is_closed() -> None:
    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", Thing, lease_timeout=0.01)
        async with started(services) as (running, _):
            with thing.lease() as old:
                await services.reload("thing")
                await old.closed.wait()
                assert (
                    "1 leases of version 1 were still out after 0.01 s" in running.units["thing"].errors[0][1]
                )

    run(work())


def test_dependents_are_rewired_by_setter_or_attribute_and_named_by_their_titles() -> None:
    async def work() -> None:
        class Setting:
            def __init__(self, base: Thing) -> None:
                self._base = base

            def set_base(self, base: Thing) -> None:
                self._base = base

        services = segue.Services()
        base = services.declare("base", Thing)
        services.declare("by_attribute", Thing, requires=["base"])
        services.declare("by_setter", Setting, requires=["base"], title="The setter")
        services.declare("further", Thing, requires=["by_setter"])
        async with services:
            report = await services.reload("base")
            assert report["rewired"] == ["by_attribute", "The setter"]
            assert services["by_attribute"].current.base is base.current
            assert services["by_setter"].current._base is base.current

    run(work())


def test_the_step_is_seen_whole_or_not_at_all() -> None:
    async def work() -> None:
        class Watching:
            def __init__(self, base: Thing) -> None:
                self.base = base
                self.version = 1

            def set_base(self, value: Thing) -> None:
                self.base = value
                self.version += 1

        services = segue.Services()
        base = services.declare("base", Thing)
        one = services.declare("one", Watching, requires=["base"])
        two = services.declare("two", Watching, requires=["base"])
        torn: list[str] = []

        async def watch() -> None:
            while True:
                seen = {id(base.current), id(one.current.base), id(two.current.base)}
                if len(seen) > 1 or len({base.version, one.current.version, two.current.version}) > 1:
                    torn.append("torn")
                await asyncio.sleep(0)

        async with services:
            watching = asyncio.ensure_future(watch())
            for _ in range(20):
                await services.reload("base")
            watching.cancel()
        assert not torn

    run(work())


def test_a_dependent_that_only_finishes_its_work_is_not_left_with_a_closed_one() -> None:
    async def work() -> None:
        services = segue.Services()
        base = services.declare("base", Thing)
        top = services.declare("top", Thing, requires=["base"])
        async with services:
            first = base.current
            with top.lease() as old_top:
                await services.reload("top")
                await services.reload("base")
                await first.closed.wait()
                assert old_top.base is base.current  # type: ignore[attr-defined]
                assert not base.current.closed.is_set()

    run(work())


def test_a_query_is_remembered_as_choices_and_an_option_is_not() -> None:
    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", Thing, settings=Settings, options=Options)
        async with started(services) as (running, swaps):
            assert thing.current.options == Options()
            query = {"number": "5", "loudly": "1"}
            report = await swaps.prepare(1, "thing", query, 2, {})
            assert report["choices"] == {"number": "5"}
            await swaps.commit(1)
            assert thing.current.settings == Settings(5)
            assert thing.current.options == Options(loudly=True)
            await services.reload("thing")
            assert thing.current.settings == Settings(5)
            assert thing.current.options == Options()
            assert running.units["thing"].choices == {"number": "5"}

    run(work())


# ---------------------------------------------------------------------------------------- the swap that can't be


async def _refused(
    services: segue.Services, thing: segue.Service[Thing], message: str, error: type[Exception] | None = None
) -> Thing:
    """Swap in vain: the old one stays as it was, and the candidate is closed. Returns the old one."""
    old = thing.current
    with pytest.raises(error or segue.SwapRefusedError, match=message):
        await services.reload("thing")
    assert thing.current is old
    assert thing.version == 1
    assert not old.closed.is_set()
    assert "deactivate 1" not in old.log
    assert services.running is not None
    assert services.running[1]._candidate is None
    return old


def test_a_factory_that_raises_changes_nothing() -> None:
    async def work() -> None:
        def factory(previous: Thing | None) -> Thing:
            if previous is not None:
                raise MemoryError("it doesn't fit")
            return Thing()

        services = segue.Services()
        thing = services.declare("thing", factory)
        async with services:
            await _refused(
                services, thing, "the factory of service 'thing' failed: MemoryError: it doesn't fit"
            )

    run(work())


@pytest.mark.parametrize(
    ("verb", "does", "message"),
    [
        ("start", fail, "start of service 'thing' failed: ConnectionError: no route"),
        ("start", hang, r"start of service 'thing' took longer than 0\.02 s"),
        ("health", fail, "health of service 'thing' failed"),
        ("health", hang, "health of service 'thing' took longer"),
    ],
)
def test_a_start_or_probe_that_fails_or_hangs_changes_nothing_and_closes_the_candidate(
    verb: str, does: Callable[[Any], Awaitable[Any]], message: str
) -> None:
    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", later(Thing, verb, does), start_timeout=0.02, health_timeout=0.02)
        async with services:
            old = await _refused(services, thing, message)
            assert old.log[-1] == "close 2"

    run(work())


class _OddMapping(dict[str, Any]):
    def get(self, key: str, default: Any = None) -> Any:
        raise RuntimeError("odd")


@pytest.mark.parametrize(
    ("health", "message"),
    [
        (False, "is not healthy: it says so"),
        ({"ok": False, "reason": "cold"}, "is not healthy: cold"),
        ({"ok": 0}, "is not healthy: it says so"),
        (_OddMapping(ok=1), "is not healthy: RuntimeError: odd"),
    ],
)
def test_an_unhealthy_candidate_changes_nothing(health: Any, message: str) -> None:
    async def unhealthy(_: Any) -> Any:
        return health

    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", later(Thing, "health", unhealthy))
        async with services:
            old = await _refused(services, thing, message)
            assert old.log[-1] == "close 2"

    run(work())


@pytest.mark.parametrize("error", [ValueError("not this one"), asyncio.CancelledError(), SystemExit(3)])
def test_a_setter_that_raises_puts_back_what_was_rewired(error: BaseException) -> None:
    async def work() -> None:
        class Dependent:
            def __init__(self, thing: Thing) -> None:
                self.thing = thing
                self.told: list[int] = []

            def set_thing(self, thing: Thing) -> None:
                self.told.append(thing.number)
                self.thing = thing

        class Refusing(Dependent):
            def set_thing(self, thing: Thing) -> None:
                super().set_thing(thing)
                if thing.number > 1:
                    raise error

        services = segue.Services()
        thing = services.declare("thing", Thing)
        first = services.declare("first", Dependent, requires=["thing"])
        second = services.declare("second", Refusing, requires=["thing"])
        third = services.declare("third", Dependent, requires=["thing"])
        async with services:
            kind: type[Any] = segue.SwapRefusedError if isinstance(error, Exception) else type(error)
            old = await _refused(services, thing, "not this one|3|^$", kind)
            assert old.log[-1] == "close 2"
            assert {id(each.current.thing) for each in (first, second, third)} == {id(old)}
            assert (first.current.told, second.current.told, third.current.told) == ([2, 1], [2, 1], [])

    run(work())


def test_a_setter_that_can_not_be_put_back_is_reported_and_the_others_are() -> None:
    async def work() -> None:
        class Stuck:
            def __init__(self, thing: Thing) -> None:
                pass

            def set_thing(self, _: Thing) -> None:
                raise ValueError("never")

        services = segue.Services()
        thing = services.declare("thing", Thing)
        first = services.declare("first", Thing, requires=["thing"])
        services.declare("stuck", Stuck, requires=["thing"])
        async with started(services) as (running, _):
            old = await _refused(services, thing, "service 'stuck' can't be rewired to the new 'thing'")
            assert first.current.thing is old  # type: ignore[attr-defined]
            assert "can't be rewired back" in running.units["stuck"].errors[0][1]

    run(work())


def test_a_dependent_that_can_not_be_rewired_is_noticed_before_anything_is_built() -> None:
    async def work() -> None:
        class Hidden:
            def __init__(self, thing: Thing) -> None:
                self._hidden = thing

        class Async:
            def __init__(self, thing: Thing) -> None:
                self.thing = thing

            async def set_thing(self, thing: Thing) -> None: ...

        class Odd:
            def __init__(self, thing: Thing) -> None: ...

            @property
            def thing(self) -> None:
                raise RuntimeError("odd")

        for kind, message in ((Hidden, "neither"), (Async, "is async"), (Odd, "RuntimeError: odd")):
            services = segue.Services()
            thing = services.declare("thing", Thing)
            services.declare("dependent", kind, requires=["thing"])
            async with services:
                old = await _refused(services, thing, message)
                assert "build 2" not in old.log

    run(work())


def test_a_setter_that_turns_out_to_be_async_or_an_attribute_read_only_is_refused() -> None:
    async def work() -> None:
        async def really(_: Any) -> None: ...

        class Disguised:
            def __init__(self, thing: Thing) -> None: ...

            def set_thing(self, thing: Thing) -> Any:
                return really(thing)

        class ReadOnly(msgspec.Struct, frozen=True):
            thing: Any

        for kind in (Disguised, ReadOnly):
            services = segue.Services()
            thing = services.declare("thing", Thing)
            services.declare("dependent", kind, requires=["thing"])
            async with services:
                await _refused(services, thing, "service 'dependent' can't be rewired")

    run(work())


@pytest.mark.parametrize("where", ["settings", "factory", "start"])
def test_what_is_unknown_is_told_with_what_is_known(where: str) -> None:
    async def work() -> None:
        def unknown(number: int) -> None:
            if number == 7:
                raise segue.Unknown("model", "seven", ["two", "one"])

        class Checked(msgspec.Struct):
            number: int = 1

            def __post_init__(self) -> None:
                if where == "settings":
                    unknown(self.number)

        class Model(Thing):
            def __init__(self, settings: Checked, previous: Thing | None) -> None:
                super().__init__(None, None, previous)
                self.wanted = settings.number
                if where == "factory":
                    unknown(self.wanted)

            async def start(self) -> None:
                if where == "start":
                    unknown(self.wanted)

        services = segue.Services()
        thing = services.declare("thing", Model, settings=Checked)
        async with started(services) as (_, swaps):
            old = thing.current
            with pytest.raises(segue.Unknown, match="there is no model 'seven'; known: one, two"):
                await services.reload("thing", number="7")
            assert (old.log[-1] == "close 2") is (where == "start")
            response = await endpoints.reload(swaps, "thing", {"number": "7"})
            assert (response.status, response.json()["known"]) == (404, ["one", "two"])
            assert thing.current is old
            await services.reload("thing", number="8")

    run(work())


def test_unknown_is_for_nothing_else() -> None:
    async def unknown(_: Any) -> None:
        raise segue.Unknown("thing", "x", [])

    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", later(Thing, "health", unknown))
        async with services:
            await _refused(services, thing, "health of service 'thing' failed: Unknown")
        services = segue.Services()
        services.declare("thing", type("T", (Thing,), {"activate": unknown, "deactivate": unknown}))
        async with started(services) as (running, _):
            assert "Unknown: there is no thing" in str(running.units["thing"].instance.degraded)

    run(work())


def test_a_swap_of_what_is_not_declared_or_not_running_names_what_there_is() -> None:
    async def work() -> None:
        services = segue.Services()
        services.declare("thing", Thing)
        with pytest.raises(segue.NotRunningError):
            await services.reload("thing")
        async with services:
            with pytest.raises(segue.UnknownServiceError, match="no service 'x'; known: thing") as caught:
                await services.reload("x")
            assert caught.value.known == ["thing"]

    run(work())


def test_one_swap_at_a_time() -> None:
    async def work() -> None:
        go, entered = asyncio.Event(), asyncio.Event()

        async def wait(_: Any) -> None:
            entered.set()
            await go.wait()

        services = segue.Services()
        services.declare("thing", later(Thing, "start", wait))
        services.declare("other", Thing)
        async with services:
            first = asyncio.ensure_future(services.reload("thing"))
            await entered.wait()
            with pytest.raises(segue.BusyError, match="a swap of service 'thing' is under way"):
                await services.reload("other")
            go.set()
            await first
            await services.reload("other")

    run(work())


# ------------------------------------------------------------------------------------ prepare, commit and abort


def test_prepare_and_commit_told_twice_answer_the_same() -> None:
    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", Thing)
        async with started(services) as (_, swaps):
            first = await swaps.prepare(4, "thing", {}, 9, {})
            assert await swaps.prepare(4, "thing", {}, 9, {}) == first
            both = await asyncio.gather(swaps.commit(4), swaps.commit(4))
            assert both[0] == both[1] == await swaps.commit(4)
            assert both[0]["version"] == thing.version == 9
            assert both[0]["seconds"]["activate"] >= 0
            assert thing.current.log.count("build 2") == 1
            await swaps.abort(4)  # it is too late for that
            assert thing.version == 9

    run(work())


def test_a_commit_that_was_refused_is_refused_for_the_same_reason_again() -> None:
    async def work() -> None:
        class Refusing:
            def __init__(self, thing: Thing) -> None: ...

            def set_thing(self, thing: Thing) -> None:
                if thing.number > 1:
                    raise ValueError("not this one")

        services = segue.Services()
        services.declare("thing", Thing)
        services.declare("refusing", Refusing, requires=["thing"])
        async with started(services) as (_, swaps):
            await swaps.prepare(1, "thing", {}, 2, {})
            for _ in range(2):
                with pytest.raises(segue.SwapRefusedError, match="not this one"):
                    await swaps.commit(1)

    run(work())


def test_a_commit_of_what_was_not_prepared_is_refused() -> None:
    async def work() -> None:
        services = segue.Services()
        services.declare("thing", Thing)
        async with started(services) as (_, swaps):
            with pytest.raises(segue.SwapRefusedError, match="no swap 1 is prepared here"):
                await swaps.commit(1)
            await swaps.prepare(1, "thing", {}, 2, {})
            with pytest.raises(segue.SwapRefusedError, match="no swap 2 is prepared here"):
                await swaps.commit(2)
            await swaps.abort(2)
            await swaps.commit(1)

    run(work())


def test_an_aborted_candidate_is_closed_and_can_not_be_committed_meanwhile() -> None:
    async def work() -> None:
        closing, go = asyncio.Event(), asyncio.Event()

        async def close(self: Thing) -> None:
            closing.set()
            await go.wait()
            self.say("close")

        services = segue.Services()
        thing = services.declare("thing", later(Thing, "close", close))
        async with started(services) as (_, swaps):
            await swaps.prepare(1, "thing", {}, 2, {})
            abort = asyncio.ensure_future(swaps.abort(1))
            await closing.wait()
            with pytest.raises(segue.SwapRefusedError):
                await swaps.commit(1)
            go.set()
            await abort
            assert thing.version == 1
            assert thing.current.log[-1] == "close 2"
            await swaps.abort(1)
            await services.reload("thing")

    run(work())


def test_a_candidate_that_nobody_decides_about_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swaps_, "DECISION_TIMEOUT_S", 0.01)

    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", Thing, start_timeout=0.02)
        async with started(services) as (running, swaps):
            await swaps.prepare(1, "thing", {}, 2, {})
            candidate = swaps._candidate
            assert candidate is not None
            assert candidate.instance is not None
            await candidate.instance.value.closed.wait()
            with pytest.raises(segue.SwapRefusedError):
                await swaps.commit(1)
            assert "was not decided within" in running.units["thing"].errors[0][1]
            assert thing.version == 1

    run(work())


@pytest.mark.parametrize("how", ["abort", "cancel", "end"])
def test_a_prepare_given_up_while_it_is_still_building_ends_at_once_and_closes(how: str) -> None:
    async def work() -> None:
        entered = asyncio.Event()

        async def wait(self: Thing) -> None:
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.say("unwound")

        services = segue.Services()
        thing = services.declare("thing", later(Thing, "start", wait))
        await services.__aenter__()
        assert services.running is not None
        _, swaps = services.running
        log = thing.current.log
        prepare = asyncio.ensure_future(swaps.prepare(1, "thing", {}, 2, {}))
        await entered.wait()
        if how == "abort":
            await swaps.abort(1)
        elif how == "cancel":
            prepare.cancel()
        else:
            await services.__aexit__(None, None, None)
        if how == "cancel":
            with pytest.raises(asyncio.CancelledError):
                await prepare
        else:
            with pytest.raises(segue.SwapRefusedError, match=r"given up|being closed"):
                await prepare
        assert log.index("unwound 2") < log.index("close 2")
        if how == "end":
            assert log.index("close 2") < log.index("close 1")
            with pytest.raises(segue.SwapRefusedError, match="being closed"):
                await swaps.prepare(2, "thing", {}, 2, {})
        else:
            assert thing.version == 1
            assert "close 1" not in log
            await services.__aexit__(None, None, None)

    run(work())


def test_a_candidate_that_waits_when_the_process_ends_is_closed_before_what_it_requires() -> None:
    async def work() -> None:
        services = segue.Services()
        base = services.declare("base", Thing)
        thing = services.declare("thing", Thing, requires=["base"])
        async with started(services) as (_, swaps):
            required, log = base.current, thing.current.log
            await swaps.prepare(1, "thing", {}, 2, {})
            candidate = swaps._candidate
            assert candidate is not None
            assert candidate.instance is not None
            closed = candidate.instance.value.closed
            closed_first: list[bool] = []
            real = required.close

            async def close() -> None:
                closed_first.append(closed.is_set())
                await real()

            required.close = close  # type: ignore[method-assign]
        assert closed_first == [True]
        assert log[-2:] == ["close 2", "close 1"] or log[-1] == "close 1"
        with pytest.raises(segue.SwapRefusedError):
            await swaps.commit(1)

    run(work())


def test_the_end_closes_what_is_still_retiring() -> None:
    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", Thing, close_timeout=0.05)
        lease = thing.lease()
        async with services:
            old = lease.__enter__()
            await services.reload("thing")
        assert old.log[-2:] == ["close 1", "close 2"]
        lease.__exit__(None, None, None)

    run(work())


def test_the_end_waits_for_a_close_that_has_begun() -> None:
    async def work() -> None:
        closing, go = asyncio.Event(), asyncio.Event()

        class Slow(Thing):
            async def close(self) -> None:
                closing.set()
                await go.wait()
                await super().close()

        services = segue.Services()
        thing = services.declare("thing", Slow)
        await services.__aenter__()
        old = thing.current
        await services.reload("thing")
        await closing.wait()
        end = asyncio.ensure_future(services.__aexit__(None, None, None))
        await asyncio.sleep(0)
        go.set()
        await end
        assert [line for line in old.log if line.startswith("close")] == ["close 1", "close 2"]

    run(work())


def test_tasks_of_swaps_leave_nothing_unsaid(caplog: pytest.LogCaptureFixture) -> None:
    """No exception that nobody retrieves, no coroutine that nobody awaits, whatever goes wrong."""

    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", later(Thing, "activate", fail), close_timeout=0.02)
        services.declare("slow", later(Thing, "start", hang), start_timeout=0.01)
        lease = thing.lease()
        async with services:
            lease.__enter__()
            for _ in range(3):
                await services.reload("thing")
                with pytest.raises(segue.SwapRefusedError):
                    await services.reload("slow")

    gc.collect()  # what others have left is not said here
    with caplog.at_level(logging.ERROR, logger="asyncio"):
        run(work())
        gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


# -------------------------------------------------------------------------------------------- who may be active


def test_a_service_of_the_generation_is_never_active_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runnings, "_RETRY_FIRST_S", 0.001)

    async def work() -> None:
        active: set[int] = set()
        most: list[int] = []
        let_go, second = asyncio.Event(), asyncio.Event()

        class One(Thing):
            async def activate(self) -> None:
                active.add(self.number)
                most.append(len(active))
                if self.number == 2:
                    second.set()

            async def deactivate(self) -> None:
                if self.number == 1 and not let_go.is_set():
                    raise OSError("it doesn't let go")
                active.discard(self.number)

            async def close(self) -> None:
                if self.number == 1 and not let_go.is_set():
                    raise OSError("nor close")
                active.discard(self.number)

        services = segue.Services()
        services.declare("one", One, per="generation")
        async with started(services) as (running, _):
            report = await services.reload("one")
            assert report["degraded"] == "version 1 has not let go of its work"
            assert active == {1}
            assert not running.units["one"].instance.active
            assert not await running.deactivate()  # the old one may still be active
            await running.activate(lead=True)
            let_go.set()
            await second.wait()
            assert active == {2}
            assert max(most) == 1
            retry = running.units["one"].retry
            assert retry is not None
            await retry
            assert running.units["one"].instance.degraded is None

    run(work())


def test_a_swap_whose_new_instance_can_not_be_activated_is_done_degraded_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runnings, "_RETRY_FIRST_S", 0.001)

    async def work() -> None:
        tries: list[int] = []

        async def flaky(self: Thing) -> None:
            tries.append(self.number)
            if len(tries) < 3:
                raise ConnectionError("no route")

        services = segue.Services()
        thing = services.declare("thing", later(Thing, "activate", flaky))
        async with started(services) as (running, _):
            report = await services.reload("thing")
            assert report["degraded"] == "activate of service 'thing' failed: ConnectionError: no route"
            assert thing.version == 2
            retry = running.units["thing"].retry
            assert retry is not None
            await retry
            assert running.units["thing"].instance.active
            assert tries == [2, 2, 2]

    run(work())


def test_a_commit_answers_within_a_moment_even_if_the_old_one_is_slow_to_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swaps_, "_REPORT_WAIT_S", 0.01)

    async def work() -> None:
        go = asyncio.Event()

        class Slow(Thing):
            async def deactivate(self) -> None:
                await go.wait()

        services = segue.Services()
        thing = services.declare("thing", Slow)
        async with services:
            report = await services.reload("thing")
            assert "deactivate" not in report["seconds"]
            assert "activate 2" not in thing.current.log
            go.set()
            await thing.current.previous.closed.wait()  # type: ignore[union-attr]
            assert "activate 2" in thing.current.log

    run(work())


def test_services_that_are_not_to_be_active_are_not_activated_by_a_swap() -> None:
    async def work() -> None:
        services = segue.Services()
        thing = services.declare("thing", Thing)
        async with started(services) as (running, _):
            await running.deactivate()
            await services.reload("thing")
            assert "activate 2" not in thing.current.log

    run(work())


# -------------------------------------------------------------------------------------------- the HTTP answers


def test_each_refusal_has_its_status() -> None:
    async def work() -> None:
        class Level(msgspec.Struct):
            level: Literal["low", "high"] = "low"

        services = segue.Services()
        thing = services.declare("thing", later(Thing, "start", fail))
        services.declare("level", lambda settings: settings, settings=Level)
        assert (await endpoints.reload(None, "thing", {})).status == 404

        async with started(services) as (_, swaps):

            async def phase(which: str, **order: Any) -> tuple[int, Any]:
                body = msgspec.json.encode(SwapOrder(**order))
                response = await endpoints.phase(swaps, which, body)
                return response.status, response.json()

            async def reload(name: str, **query: str) -> tuple[int, Any]:
                response = await endpoints.reload(swaps, name, query)
                return response.status, response.json()

            status, answer = await reload("nothing")
            assert (status, answer["known"]) == (404, ["level", "thing"])
            status, answer = await reload("level", level="medium")
            assert status == 400
            assert (
                answer["detail"] == "settings of service 'level': level (this swap): it is one of low, high"
            )
            status, answer = await reload("level", nonsense="1")
            assert (status, answer["detail"]) == (400, "service 'level' takes no nonsense; it takes level")
            status, answer = await reload("thing", level="high")
            assert (status, answer["detail"]) == (400, "service 'thing' takes no level; it takes nothing")
            status, answer = await reload("thing")
            assert (status, "no route" in answer["detail"]) == (409, True)
            status, answer = await reload("level", level="high")
            assert (status, answer["version"]) == (200, 2)

            assert (await endpoints.phase(swaps, "prepare", b"{")).status == 400
            assert (await endpoints.phase(None, "prepare", b'{"swap": 1, "service": "x"}')).status == 404
            assert (await endpoints.phase(None, "abort", b'{"swap": 1, "service": "x"}')).status == 200
            status, answer = await phase(
                "prepare", swap=1, service="level", version=9, choices={"level": "low"}
            )
            assert (status, answer["choices"]) == (200, {"level": "low"})
            status, _ = await phase("prepare", swap=2, service="thing")
            assert status == 423
            status, _ = await phase("commit", swap=2)
            assert status == 409
            status, answer = await phase("commit", swap=1)
            assert (status, answer["version"]) == (200, 9)
            assert (await phase("abort", swap=7)) == (200, {})
            assert thing.version == 1

    run(work())

"""The registry: what can be declared, in which order it starts and closes, verbs, leases, activation, the report."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from scenario import ROOT

import segue
from segue.handoff.messages import ServiceRecord
from segue.worker.services import host as hosts
from segue.worker.services import report as reports
from segue.worker.services import running as runnings
from segue.worker.services import swap as swapping
from segue.worker.services.host import Host
from segue.worker.services.hosted import Hosted
from segue.worker.services.options import Place
from segue.worker.services.report import Reporter

PATIENT_S = 60.0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no settings file lies, and where reports are whole however slow the machine is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reports, "PATIENCE_S", PATIENT_S)
    monkeypatch.setattr(swapping, "_REPORT_WAIT_S", PATIENT_S)


@pytest.fixture
def hosted() -> Iterator[Hosted]:
    """A worker around this process."""
    host = Host(Place(environ={}))
    hosts.enter(host)
    yield Hosted(host)
    hosts._hosts.clear()


def run(work: Coroutine[Any, Any, Any]) -> None:
    asyncio.run(asyncio.wait_for(work, PATIENT_S))


class Log(list[str]):
    """What happened, and a way to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()

    def say(self, text: str) -> None:
        self.append(text)
        self._changed.set()

    async def until(self, text: str, times: int = 1) -> None:
        while self.count(text) < times:
            self._changed.clear()
            await self._changed.wait()


def service(log: Log, name: str, **fails: Exception) -> type:
    """A class that says what is done with it; `fails` by verb."""

    def verb(what: str) -> Callable[[Any], Awaitable[None]]:
        async def do(self: Any) -> None:
            log.say(f"{what} {name}")
            await asyncio.sleep(0)
            if what in fails:
                raise fails[what]

        return do

    def init(self: Any, **required: Any) -> None:
        log.say(f"build {name}")
        vars(self).update(required)
        if "build" in fails:
            raise fails["build"]

    verbs: dict[str, Any] = {what: verb(what) for what in ("start", "activate", "deactivate", "close")}
    return type(name.title(), (), {"__init__": init, **verbs})


class Thing:
    def __init__(self, **required: Any) -> None:
        vars(self).update(required)


# ------------------------------------------------------------------------------------------------------ declaring


def test_a_name_is_declared_once() -> None:
    services = segue.Services()
    services.declare("a", Thing)
    with pytest.raises(segue.DeclarationError, match="'a' is declared twice"):
        services.declare("a", Thing)


def test_a_circle_is_refused_where_it_is_closed_and_its_chain_is_named() -> None:
    services = segue.Services()
    services.declare("a", Thing, requires=["b"])
    services.declare("b", Thing, requires=["c"])
    with pytest.raises(segue.DeclarationError, match="a → b → c → a"):
        services.declare("c", Thing, requires=["a"])
    with pytest.raises(segue.DeclarationError, match="d → d"):
        services.declare("d", Thing, requires=["d"])
    services.declare("c", Thing)  # what was refused isn't declared
    assert services.check() == ["c", "b", "a"]


def test_an_unknown_name_is_refused_by_check_and_start_since_it_may_come_later() -> None:
    services = segue.Services()
    services.declare("a", Thing, requires=["b"])
    services.declare("b", Thing, requires=["nobody"])
    with pytest.raises(
        segue.DeclarationError, match=r"'b' requires 'nobody'.*a → b → nobody.*declared: a, b"
    ):
        services.check()

    async def start() -> None:
        with pytest.raises(segue.DeclarationError, match="a → b → nobody"):
            await services.__aenter__()
        services.declare("nobody", Thing)
        async with services:
            pass

    run(start())


@pytest.mark.parametrize(
    "name", ["", "A", "9a", "a-b", "a b", "a__b", "a_", "_a", "settings", "previous", "é", "a" * 64, "a\n"]
)
def test_a_name_that_can_be_no_key_of_a_settings_file_and_no_variable_is_refused(name: str) -> None:
    with pytest.raises(segue.DeclarationError, match="can't be called"):
        segue.Services().declare(name, Thing)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"per": "host"}, "per is 'worker' or 'generation'"),
        ({"start_timeout": 0}, "start_timeout is a number of seconds above 0"),
        ({"start_timeout": float("nan")}, "start_timeout is a number of seconds above 0"),
        ({"lease_timeout": float("inf")}, "lease_timeout is a number of seconds above 0"),
        ({"close_timeout": "10"}, "close_timeout is a number of seconds above 0"),
        ({"verbs": {"stop": print}}, "has no verb stop"),
        ({"verbs": {"close": "aclose"}}, "its close can't be called"),
        ({"settings": int}, "settings is a msgspec.Struct, a dataclass or a TypedDict"),
        ({"options": dict}, "options is a msgspec.Struct, a dataclass or a TypedDict"),
    ],
)
def test_what_can_be_no_service_is_refused_when_it_is_declared(more: dict[str, Any], message: str) -> None:
    with pytest.raises(segue.DeclarationError, match=message):
        segue.Services().declare("a", Thing, **more)


def test_a_factory_that_can_not_be_called_with_what_there_is_is_refused_when_it_is_declared() -> None:
    services = segue.Services()
    with pytest.raises(segue.DeclarationError, match="takes no argument called b"):
        services.declare("a", lambda: None, requires=["b"])
    with pytest.raises(segue.DeclarationError, match="takes dsn, which nobody gives it"):
        services.declare("a", lambda dsn: dsn)
    with pytest.raises(segue.DeclarationError, match="can't be called"):
        services.declare("a", None)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="takes no argument timeout"):
        services.declare("a", Thing, timeout=3)


def test_a_requirement_is_a_name_or_a_service_of_the_same_registry() -> None:
    one, other = segue.Services(), segue.Services()
    base = one.declare("base", Thing)
    other.declare("base", Thing)
    one.declare("by_name", Thing, requires="base")
    one.declare("by_service", Thing, requires=[base])
    assert one.check() == ["base", "by_name", "by_service"]
    with pytest.raises(segue.DeclarationError, match="requires 'base' of another registry"):
        other.declare("wrong", Thing, requires=[base])


def test_nothing_is_declared_while_the_services_run() -> None:
    async def work() -> None:
        services = segue.Services()
        async with services:
            with pytest.raises(segue.DeclarationError, match="after the services have been started"):
                services.declare("a", Thing)
            with pytest.raises(RuntimeError, match="running already"):
                await services.__aenter__()
        services.declare("a", Thing)

    run(work())


def test_a_service_is_found_by_its_name() -> None:
    services = segue.Services()
    services.declare("a", Thing)
    assert "a" in services
    assert "b" not in services
    assert services["a"].name == "a"
    assert repr(services["a"]) == "<segue service 'a'>"
    with pytest.raises(KeyError, match="no service 'b' is declared; declared: a"):
        services["b"]


@pytest.mark.timeout(600)  # it reads all of segue
def test_mypy_knows_the_type_of_what_one_gets(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(
        textwrap.dedent("""
        import segue

        class Prices:
            def __init__(self, settings: object) -> None: ...

        def sync_factory() -> Prices:
            return Prices(None)

        async def async_factory(previous: Prices | None) -> Prices:
            return Prices(None)

        services = segue.Services()
        a = services.declare("a", Prices)
        b = services.declare("b", sync_factory, requires=[a, "z"])
        c = services.declare("c", async_factory, per="generation", start_timeout=3)
        d = services.declare("d", lambda: Prices(None))
        reveal_type(a)
        reveal_type(b)
        reveal_type(c)
        reveal_type(d)
        reveal_type(c.current)
        with c.lease() as pinned:
            reveal_type(pinned)

        async def use() -> None:
            async for given in c():
                reveal_type(given)
            reveal_type(await services.reload("a", currency="USD"))
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "snippet.py"],
        check=False,
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    revealed = [line.split("Revealed type is ")[1] for line in done.stdout.splitlines() if "Revealed" in line]
    service_ = '"segue.worker.services.registry.Service[snippet.Prices]"'
    plain = '"snippet.Prices"'
    assert revealed[:7] == [service_] * 4 + [plain] * 3, done.stdout + done.stderr
    assert "dict[" in revealed[7]
    assert not [
        line for line in done.stdout.splitlines() if line.startswith("snippet.py") and "error:" in line
    ]


# ---------------------------------------------------------------------------------------------- start and close


def test_each_starts_after_what_it_requires_and_closes_before() -> None:
    async def work() -> None:
        log = Log()
        services = segue.Services()
        services.declare("top", service(log, "top"), requires=["left", "right"])
        services.declare("left", service(log, "left"), requires=["base"])
        services.declare("right", service(log, "right"), requires=["base"])
        base = services.declare("base", service(log, "base"))
        async with services:
            assert services["top"].current.left.base is base.current
            started = [line for line in log if line.startswith("start")]
            assert started == ["start base", "start left", "start right", "start top"]
            activated = [line for line in log if line.startswith("activate")]
            assert activated[0] == "activate base"
            assert activated[-1] == "activate top"
            log.clear()
        assert [line for line in log if line.startswith("close")] == [
            "close top",
            "close right",
            "close left",
            "close base",
        ]
        assert log.index("deactivate top") < log.index("deactivate left") < log.index("deactivate base")
        assert log.index("deactivate base") < log.index("close top")

    run(work())


@pytest.mark.parametrize("verb", ["build", "start"])
def test_a_failing_start_closes_what_had_started_and_names_the_reason(verb: str) -> None:
    async def work() -> None:
        log = Log()
        services = segue.Services()
        services.declare("a", service(log, "a"))
        failing: dict[str, Exception] = {verb: ConnectionError("no route")}
        services.declare("b", service(log, "b", **failing), requires=["a"])
        services.declare("c", service(log, "c"), requires=["b"])
        with pytest.raises(Exception, match="service 'b' failed: ConnectionError: no route"):
            await services.__aenter__()
        # what was built is closed, whether it has started or not
        expected = ["close a"] if verb == "build" else ["close b", "close a"]
        assert [line for line in log if line.startswith("close")] == expected
        assert "build c" not in log
        with pytest.raises(segue.NotRunningError):
            services["a"].current  # noqa: B018

    run(work())


def test_nobody_gets_a_service_before_it_has_started_nor_while_it_is_closed() -> None:
    async def work() -> None:
        services = segue.Services()
        seen: list[str] = []

        class Early:
            def look(self) -> None:
                with pytest.raises(segue.NotRunningError, match="'early' is not running"), early.lease():
                    pass
                with pytest.raises(segue.NotRunningError):
                    early.current  # noqa: B018
                with pytest.raises(segue.NotRunningError):
                    early.version  # noqa: B018
                seen.append("looked")

            start = close = look

        early = services.declare("early", Early)
        async with services:
            assert early.version == 1
        assert seen == ["looked", "looked"]

    run(work())


def test_a_start_that_hangs_is_cut_at_its_deadline_and_closed_only_after_it_has_unwound() -> None:
    async def work() -> None:
        log: list[str] = []

        class Slow:
            async def start(self) -> None:
                try:
                    await asyncio.Event().wait()
                finally:
                    log.append("unwound")

            def close(self) -> None:
                log.append("closed")

        services = segue.Services()
        services.declare("slow", Slow, start_timeout=0.01)
        with pytest.raises(Exception, match=r"start of service 'slow' took longer than 0\.01 s"):
            await services.__aenter__()
        assert log == ["unwound", "closed"]

    run(work())


def test_a_verb_that_ignores_its_cancellation_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segue.worker.services.verbs._UNWIND_S", 0.01)

    async def work() -> None:
        release = asyncio.Event()

        class Stubborn:
            async def start(self) -> None:
                while not release.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await release.wait()

        services = segue.Services()
        services.declare("stubborn", Stubborn, start_timeout=0.01)
        with pytest.raises(Exception, match="took longer"):
            await services.__aenter__()
        release.set()

    run(work())


def test_a_start_cancelled_half_way_closes_what_had_started() -> None:
    async def work() -> None:
        log = Log()
        waiting = asyncio.Event()

        class Slow:
            async def start(self) -> None:
                waiting.set()
                await asyncio.Event().wait()

            def close(self) -> None:
                log.say("close slow")

        services = segue.Services()
        services.declare("a", service(log, "a"))
        services.declare("slow", Slow)
        task = asyncio.ensure_future(services.__aenter__())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log[-2:] == ["close slow", "close a"]

    run(work())


def test_a_start_cancelled_while_it_activates_closes_all() -> None:
    async def work() -> None:
        log = Log()
        waiting = asyncio.Event()

        class Slow:
            async def activate(self) -> None:
                waiting.set()
                await asyncio.Event().wait()

            def deactivate(self) -> None:
                log.say("deactivate")

            def close(self) -> None:
                log.say("close")

        services = segue.Services()
        services.declare("slow", Slow)
        task = asyncio.ensure_future(services.__aenter__())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["deactivate", "close"]
        assert services.running is None

    run(work())


@pytest.mark.parametrize(
    "error", [ValueError("x"), segue.Unknown("thing", "x", []), asyncio.CancelledError()]
)
def test_a_close_that_raises_keeps_nobody_from_closing(error: BaseException) -> None:
    async def work() -> None:
        log = Log()

        class Bad:
            async def close(self) -> None:
                raise error

        services = segue.Services()
        services.declare("a", service(log, "a"))
        services.declare("bad", Bad, requires=[])
        services.declare("b", service(log, "b"))
        async with services:
            pass
        assert [line for line in log if line.startswith("close")] == ["close b", "close a"]

    run(work())


def test_a_registry_is_started_again_from_scratch() -> None:
    async def work() -> None:
        log = Log()
        services = segue.Services()
        a = services.declare("a", service(log, "a"))
        async with services:
            first = a.current
            await services.reload("a")
            assert a.version == 2
        with pytest.raises(segue.NotRunningError, match="async with services"):
            a.current  # noqa: B018
        async with services:
            assert a.version == 1
            assert a.current is not first

    for _ in range(2):  # and in another loop
        run(work())


def test_two_registries_know_nothing_of_each_other(tmp_path: Path) -> None:
    (tmp_path / "segue.toml").write_text("[services.a]\n[services.b]\n")

    async def work() -> None:
        log = Log()
        one, other = segue.Services(), segue.Services()
        one.declare("a", service(log, "one"))
        other.declare("a", service(log, "other"))
        other.declare("b", service(log, "b"))
        async with one, other:
            await one.reload("a")
            assert (one["a"].version, other["a"].version) == (2, 1)
            with pytest.raises(segue.UnknownServiceError):
                await one.reload("b")
        assert log.count("close other") == 1

    run(work())


def test_verbs_can_be_other_functions_or_none_and_sync() -> None:
    async def work() -> None:
        log: list[str] = []

        class Foreign:
            def start(self) -> None:
                log.append("thread started")

            def shut(self) -> None:
                log.append("shut")

            async def ping(self) -> bool:
                log.append("ping")
                return True

        services = segue.Services()
        verbs: dict[str, Any] = {"start": None, "close": Foreign.shut, "health": Foreign.ping}
        services.declare("foreign", Foreign, verbs=verbs)
        async with services:
            await services.reload("foreign")
        assert log == ["ping", "shut", "shut"]

    run(work())


def test_factories_are_sync_async_or_return_something_to_be_awaited() -> None:
    async def work() -> None:
        class Pool:
            def __await__(self) -> Any:
                return self._connect().__await__()

            async def _connect(self) -> Pool:
                self.connected = True
                return self

        async def factory() -> str:
            await asyncio.sleep(0)
            return "async"

        services = segue.Services()
        a = services.declare("a", lambda: "sync")
        b = services.declare("b", factory)
        c = services.declare("c", Pool)
        d = services.declare("d", lambda: None)
        async with services:
            assert (a.current, b.current, c.current.connected, d.current) == ("sync", "async", True, None)

    run(work())


# ------------------------------------------------------------------------------------------------------- leases


def test_leases_that_are_out_at_the_end_are_waited_for_but_not_for_ever() -> None:
    async def work() -> None:
        log = Log()
        services = segue.Services()
        a = services.declare("a", service(log, "a"), close_timeout=0.05)
        lease = a.lease()
        async with services:
            running = services.running
            assert running is not None
            lease.__enter__()
        assert log[-1] == "close a"
        assert "1 leases are still out" in running[0].units["a"].errors[0][1]
        lease.__exit__(None, None, None)

    run(work())


def test_a_lease_that_a_thread_returns_at_the_end_is_waited_for() -> None:
    async def work() -> None:
        services = segue.Services()
        a = services.declare("a", Thing, close_timeout=60)
        lease = a.lease()
        async with services:
            lease.__enter__()
            running = services.running
            assert running is not None
            # as sync endpoints do, while the end waits
            asyncio.get_running_loop().call_soon(
                threading.Thread(target=lease.__exit__, args=(None, None, None)).start
            )
        assert not running[0].units["a"].errors

    run(work())


def test_a_lease_returned_after_the_loop_has_ended_harms_nobody() -> None:
    services = segue.Services()
    a = services.declare("a", Thing, close_timeout=0.01)
    lease = a.lease()

    async def work() -> None:
        async with services:
            lease.__enter__()

    run(work())
    lease.__exit__(None, None, None)


def test_a_lease_is_for_one_block_at_a_time() -> None:
    async def work() -> None:
        services = segue.Services()
        a = services.declare("a", Thing)
        async with services:
            lease = a.lease()
            with lease, pytest.raises(RuntimeError, match="taken once"):
                lease.__enter__()
            with lease as instance:
                assert instance is a.current
            running = services.running
            assert running is not None
            assert running[0].units["a"].instance.leases == 0

    run(work())


def test_no_instance_is_closed_while_a_thread_holds_a_lease_on_it() -> None:
    threads, swaps = 8, 150

    async def work() -> None:
        wrong: list[str] = []

        class Fragile:
            closed = False

            def close(self) -> None:
                self.closed = True

        services = segue.Services()
        fragile = services.declare("fragile", Fragile)
        stop = threading.Event()
        used = [0] * threads

        def use(number: int) -> None:
            while not stop.is_set():
                with fragile.lease() as instance:
                    for _ in range(20):
                        if instance.closed:
                            wrong.append("closed while leased")
                used[number] += 1

        old_interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        workers = [threading.Thread(target=use, args=(number,)) for number in range(threads)]
        try:
            async with services:
                for each in workers:
                    each.start()
                instances = []
                for _ in range(swaps):
                    instances.append(fragile.current)
                    await services.reload("fragile")
                while not all(used):
                    await asyncio.sleep(0)
                stop.set()
                for each in workers:
                    await asyncio.to_thread(each.join)
                running = services.running
                assert running is not None
                unit = running[0].units["fragile"]
                assert unit.instance.leases == 0
        finally:
            stop.set()
            sys.setswitchinterval(old_interval)
        assert not wrong
        assert all(instance.closed for instance in instances)

    run(work())


# --------------------------------------------------------------------------------------------------- activation


def test_under_a_worker_services_are_active_only_when_it_says_so_and_of_the_generation_only_with_lead(
    hosted: Hosted,
) -> None:
    async def work() -> None:
        log = Log()
        services = segue.Services()
        services.declare("each", service(log, "each"))
        services.declare("one", service(log, "one"), per="generation", handover_timeout=25)
        assert hosted.handover_s is None
        async with services:
            assert hosted.handover_s == 25
            assert not [line for line in log if line.startswith("activate")]
            await hosted.activate(lead=False, timeout_s=10)
            assert log[-1] == "activate each"
            report = await hosted.report()
            assert (report["each"]["active"], report["each"]["expected_active"]) == (True, True)
            assert (report["one"]["active"], report["one"]["expected_active"]) == (False, False)
            await hosted.activate(lead=True, timeout_s=10)
            await hosted.activate(lead=False, timeout_s=10)  # takes nothing away, and repeats nothing
            assert log[-1] == "activate one"
            assert log.count("activate each") == 1
            assert await hosted.deactivate(10)
            assert await hosted.deactivate(10)
            assert (log.count("deactivate each"), log.count("deactivate one")) == (1, 1)
            await hosted.activate(lead=False, timeout_s=10)
            assert (log.count("activate each"), log.count("activate one")) == (2, 1)
        assert hosted.swaps is not None

    run(work())


def test_a_worker_has_one_registry_at_a_time(hosted: Hosted) -> None:
    async def work() -> None:
        one, other = segue.Services(), segue.Services()
        one.declare("a", Thing)
        async with one:
            with pytest.raises(RuntimeError, match=r"one segue\.Services"):
                await other.__aenter__()
        async with one:
            assert set(await hosted.report()) == {"a"}
        async with other:
            assert await hosted.report() == {}
            assert hosted.handover_s is None

    run(work())


def test_a_worker_that_starts_later_begins_with_what_was_decided() -> None:
    async def work() -> None:
        services = segue.Services()
        a = services.declare("a", Thing)
        async with services:
            assert a.version == 7

    hosts.enter(Host(Place(environ={}), {"a": ServiceRecord(version=7)}))
    try:
        run(work())
    finally:
        hosts._hosts.clear()


def test_an_activation_that_fails_is_degraded_undone_and_tried_again_until_it_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runnings, "_RETRY_FIRST_S", 0.001)

    async def work() -> None:
        log = Log()

        class Flaky:
            tries = 0

            async def activate(self) -> None:
                self.tries += 1
                log.say("try")
                if self.tries < 4:
                    raise ConnectionError("the broker is down")
                log.say("works")

            async def deactivate(self) -> None:
                log.say("undo")

        services = segue.Services()
        services.declare("flaky", Flaky)
        async with services:
            running = services.running
            assert running is not None
            unit = running[0].units["flaky"]
            assert (
                unit.instance.degraded
                == "activate of service 'flaky' failed: ConnectionError: the broker is down"
            )
            assert not unit.instance.active
            await log.until("works")
            assert unit.retry is not None
            await unit.retry
            assert log == ["try", "undo"] * 3 + ["try", "works"]
            assert unit.instance.active
            assert unit.instance.degraded is None
            assert len(unit.errors) == 3

    run(work())


def test_an_activation_whose_undoing_fails_too_is_tried_again_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runnings, "_RETRY_FIRST_S", 0.001)

    async def work() -> None:
        log = Log()

        class Broken:
            connected = False

            async def activate(self) -> None:
                log.say("activate")
                if log.count("activate") < 3:
                    raise ConnectionError("down")
                self.connected = True
                log.say("works")

            async def deactivate(self) -> None:
                if not self.connected:
                    raise RuntimeError("not connected")

            def close(self) -> None:
                log.say("close")

        services = segue.Services()
        services.declare("broken", Broken, per="generation")
        async with services:
            await log.until("works")
            assert "close" not in log

    run(work())


def test_what_is_no_longer_wanted_is_not_tried_again(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runnings, "_RETRY_FIRST_S", 0.001)

    async def work() -> None:
        log = Log()
        services = segue.Services()
        services.declare("a", service(log, "a", activate=OSError("no")))
        async with services:
            await hosted.activate(lead=False, timeout_s=10)
            await log.until("activate a", times=3)
            assert await hosted.deactivate(10)
            running = services.running
            assert running is not None
            retry = running[0].units["a"].retry
            assert retry is not None
            await retry
            tried = log.count("activate a")
            await hosted.activate(lead=False, timeout_s=10)
            assert log.count("activate a") == tried + 1

    run(work())


def test_a_deactivation_overtakes_an_activation_that_hangs(hosted: Hosted) -> None:
    async def work() -> None:
        entered, log = asyncio.Event(), Log()

        class Slow:
            async def activate(self) -> None:
                entered.set()
                await asyncio.Event().wait()

            def deactivate(self) -> None:
                log.say("deactivate")

        services = segue.Services()
        services.declare("slow", Slow, activate_timeout=0.2)
        services.declare("after", service(log, "after"), requires=["slow"])
        async with services:
            activation = asyncio.ensure_future(hosted.activate(lead=False, timeout_s=10))
            await entered.wait()
            assert await hosted.deactivate(10)
            await activation
            assert "activate after" not in log  # its turn came when nobody wanted it any more
            report = await hosted.report()
            assert not report["slow"]["active"]
            assert not report["after"]["active"]

    run(work())


def test_a_service_of_the_generation_that_does_not_let_go_is_closed(hosted: Hosted) -> None:
    async def work() -> None:
        log = Log()
        services = segue.Services()
        services.declare("one", service(log, "one", deactivate=OSError("no")), per="generation")
        async with services:
            await hosted.activate(lead=True, timeout_s=10)
            assert await hosted.deactivate(10)
            assert log[-2:] == ["deactivate one", "close one"]
            # a closed one isn't activated again, and says why; a swap makes another one
            await hosted.activate(lead=True, timeout_s=10)
            assert log.count("activate one") == 1
            report = (await hosted.report())["one"]
            assert "a swap makes a new one" in report["degraded"]
            assert not report["active"]
            await services.reload("one")
            assert log.count("activate one") == 2
            assert (await hosted.report())["one"]["degraded"] is None
        assert log.count("close one") == 2

    run(work())


def test_only_if_closing_fails_too_it_may_still_be_active(hosted: Hosted) -> None:
    async def work() -> None:
        log = Log()
        failing = service(log, "one", deactivate=OSError("no"), close=OSError("neither"))
        services = segue.Services()
        services.declare("one", failing, per="generation")
        services.declare("each", service(log, "each", deactivate=OSError("no")))
        async with services:
            await hosted.activate(lead=True, timeout_s=10)
            for again in (1, 2):
                assert not await hosted.deactivate(10)
                assert log.count("close one") == again
            report = await hosted.report()
            assert report["one"]["active"]
            assert not report["each"]["active"]
            assert "close each" not in log

    run(work())


def test_without_a_close_a_service_of_the_generation_that_does_not_let_go_may_still_be_active(
    hosted: Hosted,
) -> None:
    async def work() -> None:
        class Plain:
            def deactivate(self) -> None:
                raise OSError("no")

        services = segue.Services()
        services.declare("one", Plain, per="generation")
        async with services:
            await hosted.activate(lead=True, timeout_s=10)
            assert not await hosted.deactivate(10)

    run(work())


# --------------------------------------------------------------------------------------------------- the report


def test_the_report_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "PATIENCE_S", 0.05)

    async def work() -> None:
        asked, release = Log(), asyncio.Event()

        class Silent:
            async def health(self) -> bool:
                asked.say("health")
                await release.wait()
                return True

            def metrics(self) -> dict[str, int]:
                return {"n": 1}

        services = segue.Services()
        services.declare("silent", Silent)
        async with services:
            running = services.running
            assert running is not None
            reporter = Reporter(running[0])
            for _ in range(3):
                report = (await reporter.report())["silent"]
                assert report["health"] is None
                assert report["health_unknown_because"] == "it takes longer than 0.05 s"
                assert report["metrics"] == {"n": 1}
            assert asked == ["health"]  # one question at a time
            release.set()
            monkeypatch.setattr(reports, "PATIENCE_S", PATIENT_S)
            assert (await reporter.report())["silent"]["health"] == {"ok": True}

    run(work())


def test_the_report_of_a_service_that_is_swapped_meanwhile_is_of_one_of_them() -> None:
    async def work() -> None:
        entered, go = asyncio.Event(), asyncio.Event()

        class Slow:
            built = 0

            def __init__(self) -> None:
                Slow.built += 1

            async def start(self) -> None:
                if Slow.built > 1:
                    entered.set()
                    await go.wait()

        services = segue.Services()
        slow = services.declare("slow", Slow)
        async with services:
            running = services.running
            assert running is not None
            reporter = Reporter(running[0])
            swap = asyncio.ensure_future(services.reload("slow"))
            await entered.wait()
            with slow.lease():
                report = (await reporter.report())["slow"]
                assert (report["version"], report["leases"], report["retiring"]) == (1, 1, [])
                go.set()
                await swap
                report = (await reporter.report())["slow"]
                assert (report["version"], report["leases"]) == (2, 0)
                assert [(each["version"], each["leases"]) for each in report["retiring"]] == [(1, 1)]

    run(work())


class _Odd(dict[str, Any]):
    def get(self, key: str, default: Any = None) -> Any:
        raise RuntimeError("odd")


@pytest.mark.parametrize(
    ("health", "expected"),
    [
        (None, {"ok": True}),
        (True, {"ok": True}),
        (False, {"ok": False, "reason": "it says so"}),
        ({"ok": False, "reason": "cold", "at": 3}, {"ok": False, "reason": "cold", "at": 3}),
        ({"load": object}, {"load": str(object), "ok": True}),
        (_Odd(), {"ok": False, "reason": "health of service 'a': RuntimeError: odd"}),
        (ValueError("bad"), {"ok": False, "reason": "health of service 'a' failed: ValueError: bad"}),
        (asyncio.CancelledError(), {"ok": False, "reason": "health of service 'a' was cancelled"}),
    ],
)
@pytest.mark.parametrize("sync", [True, False])
def test_health_is_told_whatever_it_answers(health: Any, expected: dict[str, Any], sync: bool) -> None:
    async def work() -> None:
        def answer(self: Any) -> Any:
            if isinstance(health, BaseException):
                raise health
            return health

        async def async_answer(self: Any) -> Any:
            return answer(self)

        services = segue.Services()
        services.declare("a", type("A", (), {"health": answer if sync else async_answer}))
        async with services:
            running = services.running
            assert running is not None
            assert (await Reporter(running[0]).report())["a"]["health"] == expected

    run(work())


def _loop() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    return loop


@pytest.mark.parametrize(
    ("metrics", "expected", "because"),
    [
        ({"n": 1}, {"n": 1}, None),
        (
            {"rate": segue.Rate(0.5, 4), "all": segue.Shared(3)},
            {"rate": {"kind": "rate", "value": 0.5, "count": 4}, "all": {"kind": "shared", "value": 3.0}},
            None,
        ),
        ({"when": segue.Secret("hunter2"), 1: 2}, {"when": "********", "1": 2}, None),
        ([1], None, "metrics() returned no dict"),
        (None, None, "metrics() returned no dict"),
        (_loop(), None, "metrics of service 'a': RecursionError"),
        ({"a": "\ud800"}, None, "metrics of service 'a': UnicodeEncodeError"),
        (ValueError("bad"), None, "metrics of service 'a' failed: ValueError: bad"),
    ],
)
def test_metrics_that_are_none_are_null_with_the_reason_beside(
    metrics: Any, expected: Any, because: str | None
) -> None:
    async def work() -> None:
        def answer(self: Any) -> Any:
            if isinstance(metrics, BaseException):
                raise metrics
            return metrics

        services = segue.Services()
        services.declare("a", type("A", (), {"metrics": answer}))
        async with services:
            running = services.running
            assert running is not None
            report = (await Reporter(running[0]).report())["a"]
            assert report["metrics"] == expected
            if because is None:
                assert "metrics_unknown_because" not in report
            else:
                assert because in report["metrics_unknown_because"]

    run(work())


def test_a_report_during_the_start_and_after_the_end_says_that_nothing_is_started(hosted: Hosted) -> None:
    async def work() -> None:
        entered, go = asyncio.Event(), asyncio.Event()

        class Slow:
            async def start(self) -> None:
                entered.set()
                await go.wait()

        services = segue.Services()
        services.declare("slow", Slow)
        start = asyncio.ensure_future(services.__aenter__())
        await entered.wait()
        report = (await hosted.report())["slow"]
        assert (report["initialized"], report["health"], report["unknown_because"]) == (
            False,
            None,
            "it isn't started",
        )
        go.set()
        await start
        assert (await hosted.report())["slow"]["initialized"]
        await services.__aexit__(None, None, None)
        assert not (await hosted.report())["slow"]["initialized"]

    run(work())

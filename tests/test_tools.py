"""Tools: typed functions in files, called with whatever a model writes, reloaded while they run."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from scenario import ROOT

import segue
from segue.worker.backend.conversation import Tool
from segue.worker.backend.lis import LIS, LISSettings
from segue.worker.backend.tools import ToolDispatcher, ToolOptions, ToolResult, ToolSettings
from segue.worker.backend.tools.threads import DeadlineError, Threads

pytestmark = pytest.mark.anyio

Write = Callable[..., Path]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class NoServers:
    """An MCP connector without servers, or with one tool."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def tools(self) -> list[Tool]:
        return [Tool(name, "", {"type": "object"}) for name in self.names]

    def knows(self, name: str) -> bool:
        return name in self.names

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        if arguments.get("hang"):
            await asyncio.Event().wait()
        if arguments.get("bad"):
            return ToolResult(False, "", "it does not like that")
        return ToolResult(True, f"{name} {json.dumps(arguments)}")


class Echo:
    """A model that says what it is asked."""

    def __init__(self, name: str = "echo") -> None:
        self.name = name

    async def complete(self, messages: Any) -> Any:
        class Said:
            text = f"{self.name}: {messages[-1].content}"

        return Said()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a tool file; returns the directory."""
    directory = tmp_path / "tools"
    directory.mkdir()

    def one(key: str, code: str) -> Path:
        (directory / f"{key}.py").write_text(textwrap.dedent(code))
        return directory

    return one


def lis() -> LIS:
    return LIS(LISSettings())


def built(
    directory: Path | str, previous: ToolDispatcher | None = None, tool: str | None = None, **more: Any
) -> ToolDispatcher:
    settings = ToolSettings(directory=str(directory), **more)
    return ToolDispatcher(
        settings=settings,
        llm=Echo(),
        mcp=NoServers(),
        lis=previous.lis if previous else lis(),
        previous=previous,
        options=ToolOptions(tool=tool),
    )


async def started(*positional: Any, **named: Any) -> ToolDispatcher:
    dispatcher = built(*positional, **named)
    await dispatcher.start()
    dispatcher.activate()
    return dispatcher


async def called(dispatcher: ToolDispatcher, name: str, **arguments: Any) -> str:
    result = await dispatcher.call(name, json.dumps(arguments))
    assert result.ok, result
    return result.text


def names(dispatcher: ToolDispatcher) -> list[str]:
    return [tool.name for tool in dispatcher.tools()]


# ----------------------------------------------------------------------------------------------- schema, arguments

TYPED = """
    from __future__ import annotations
    import dataclasses, datetime, enum
    from typing import Annotated, Any, Literal, TypedDict
    import msgspec

    class Colour(enum.Enum):
        RED = "red"
        BLUE = "blue"

    @dataclasses.dataclass
    class Point:
        x: int
        y: int = 0

    class Box(msgspec.Struct):
        corner: Point

    class Label(TypedDict):
        text: str

    def draw(
        colour: Colour,
        at: Point,
        size: Literal["small", "large"] = "small",
        boxes: list[Box] = [],
        label: Label | None = None,
        weights: dict[str, float] = {},
        when: datetime.date = datetime.date(2026, 1, 2),
        solid: bool = True,
        width: Annotated[int, "how wide", msgspec.Meta(ge=1)] = 1,
    ) -> dict[str, Any]:
        \"\"\"Draw a
        shape.

        More about it.

        Args:
            colour: Which colour
                it has.
            at (Point): Where.

        Returns:
            nothing: of use
        \"\"\"
        return {"colour": colour, "at": at, "size": size, "boxes": boxes, "label": label, "weights": weights,
                "when": when, "solid": solid, "width": width}
"""


async def test_the_schema_comes_from_the_signature(write: Write) -> None:
    dispatcher = await started(write("draw", TYPED))
    (tool,) = dispatcher.tools()
    assert (tool.name, tool.description) == ("draw", "Draw a shape.")
    schema = tool.parameters
    assert schema["type"] == "object"
    assert schema["required"] == ["colour", "at"]
    assert schema["additionalProperties"] is False
    properties = schema["properties"]
    assert properties["colour"]["description"] == "Which colour it has."
    assert properties["at"]["description"] == "Where."
    assert properties["size"] == {"enum": ["large", "small"], "default": "small"}
    assert properties["when"]["default"] == "2026-01-02"
    assert properties["width"] == {
        "type": "integer",
        "minimum": 1,
        "description": "how wide",
        "default": 1,
    }
    assert schema["$defs"]["Colour"]["enum"] == ["blue", "red"]
    json.dumps(schema)


async def test_arguments_become_what_the_signature_says(write: Write) -> None:
    dispatcher = await started(write("draw", TYPED))
    text = await called(
        dispatcher,
        "draw",
        colour="red",
        at={"x": 1, "y": 0},
        boxes=[{"corner": {"x": 2, "y": 3}}],
        label={"text": "a"},
    )
    assert json.loads(text) == {
        "colour": "red",
        "at": {"x": 1, "y": 0},
        "size": "small",
        "boxes": [{"corner": {"x": 2, "y": 3}}],
        "label": {"text": "a"},
        "weights": {},
        "when": "2026-01-02",
        "solid": True,
        "width": 1,
    }
    # what was read from JSON already is taken just the same
    result = await dispatcher.call("draw", {"colour": "blue", "at": {"x": 1}})
    assert json.loads(result.text)["colour"] == "blue"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ('{"colour": "red"}', "argument at is missing"),
        ('{"colour": "green", "at": {"x": 1}}', "argument colour: invalid enum value 'green'"),
        ('{"colour": "red", "at": {"x": "1"}}', "argument at.x: expected `int`, got `str`"),
        ('{"colour": "red", "at": {"x": 1}, "width": 0}', "argument width: expected `int` >= 1"),
        (
            '{"colour": "red", "at": {"x": 1}, "colur": 1}',
            "there is no argument colur; it takes colour, at, size",
        ),
        ("[1]", "the arguments are one JSON object: expected `object`, got `array`"),
        ('{"colour": "red', "the arguments are no JSON: "),
        ('{"colour": "\ud800"}', "the arguments are no JSON: "),
        ("[" * 100_000, "the arguments are "),
        ("", "argument colour is missing"),
        ("null", "argument colour is missing"),
    ],
)
async def test_an_argument_that_does_not_fit_is_named(write: Write, arguments: str, reason: str) -> None:
    dispatcher = await started(write("draw", TYPED))
    result = await dispatcher.call("draw", arguments)
    assert not result.ok
    assert result.error is not None
    assert result.error.startswith(reason)
    assert result.error in result.text
    for _ in range(5):  # whose fault it is: no breaker opens
        await dispatcher.call("draw", arguments)
    assert (await dispatcher.call("draw", '{"colour": "red", "at": {"x": 1}}')).ok


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ('def f(a):\n    "Do."\n', "f can't be a tool: parameter a has no type"),
        ('def f(*a: int):\n    "Do."\n', "f can't be a tool: parameter a: it can't be given by name"),
        ('def f(a: int, /):\n    "Do."\n', "f can't be a tool: parameter a: it can't be given by name"),
        ('def f(a: "Nobody"):\n    "Do."\n', "f can't be a tool: its types can't be read: NameError"),
        ('def f(a: open):\n    "Do."\n', "f can't be a tool: "),
        ('def f(a: complex):\n    "Do."\n', "f can't be a tool: parameter a: "),
        ('def f():\n    "Do."\n    yield 1\n', "f is a generator"),
        ("def f(): pass\n", "it has no tools"),
        ('__all__ = ["f"]\ndef f(): pass\n', "f in __all__ has no docstring"),
        ('__all__ = ["g"]\n', "g in __all__ is no function"),
        (f'def {"f" * 65}():\n    "Do."\n', "the name of a tool is made of"),
        ("def f(:\n", "SyntaxError"),
        ("import nowhere_to_be_found\n", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("\0", "null bytes"),
    ],
)
async def test_a_file_that_can_t_be_one_is_reported_and_stops_no_other(
    write: Write, code: str, reason: str
) -> None:
    write("good", 'def good() -> str:\n    "Do."\n    return "yes"\n')
    dispatcher = await started(write("bad", code))
    assert names(dispatcher) == ["good"]
    assert list(dispatcher.problems) == ["bad"]
    assert reason in dispatcher.problems["bad"]
    assert dispatcher.health()["problems"] == dispatcher.problems
    assert not [name for name in sys.modules if name.startswith("segue_tools.bad")]


async def test_only_documented_functions_of_the_file_itself_are_tools(write: Write) -> None:
    code = """
        from os.path import join
        from functools import wraps
        def helper(): pass
        def _private() -> int:
            "No."
        class Thing:
            "No."
        def traced(function):
            @wraps(function)
            def around(*args, **named):
                return function(*args, **named) + "!"
            return around
        @traced
        def shout(text: str) -> str:
            "Say it."
            return text
    """
    dispatcher = await started(write("some", code))
    assert names(dispatcher) == ["shout"]
    assert await called(dispatcher, "shout", text="hey") == "hey!"


# ---------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(
    ("returns", "text"),
    [
        ("'as it is'", "as it is"),
        ("''", ""),
        ("None", "null"),
        ("{'a': [1, 2.5, True]}", '{"a":[1,2.5,true]}'),
        ("'\\ud800'", "?"),
    ],
)
async def test_a_result_becomes_text(write: Write, returns: str, text: str) -> None:
    dispatcher = await started(write("a", f'def f():\n    "Do."\n    return {returns}\n'))
    assert await called(dispatcher, "f") == text


async def test_a_result_that_is_no_json_or_too_long_is_told(write: Write) -> None:
    code = """
        def odd():
            "Do."
            return object()
        def long():
            "Do."
            return "x" * 1000
        def forgetful():
            "Do."
            async def work(): pass
            return work()
    """
    dispatcher = await started(write("a", code), max_result_chars=100)
    assert "neither text nor JSON" in str((await dispatcher.call("odd", "")).error)
    assert "async def" in str((await dispatcher.call("forgetful", "")).error)
    assert await called(dispatcher, "long") == f"{'x' * 100}… (cut: 1000 characters)"


@pytest.mark.parametrize("keyword", ["def", "async def"])
@pytest.mark.parametrize(
    ("raises", "reason"),
    [
        ("ValueError('no\\nsuch')", "ValueError: no such"),
        ("SystemExit(1)", "SystemExit: 1"),
        ("KeyboardInterrupt()", "KeyboardInterrupt"),
        ("GeneratorExit()", "GeneratorExit"),
        ("StopIteration(1)", "StopIteration"),
        ("__import__('asyncio').TimeoutError()", "TimeoutError"),
    ],
)
async def test_a_tool_that_raises_fails_alone(write: Write, keyword: str, raises: str, reason: str) -> None:
    dispatcher = await started(write("a", f'{keyword} f():\n    "Do."\n    raise {raises}\n'))
    result = await dispatcher.call("f", "{}")
    assert not result.ok
    assert reason in str(result.error)


async def test_a_tool_that_cancels_itself_has_failed_and_a_caller_that_leaves_is_no_failure(
    write: Write,
) -> None:
    code = """
        import asyncio
        BEGUN = asyncio.Event()
        async def gives_up():
            "Do."
            raise asyncio.CancelledError
        async def waits():
            "Do."
            BEGUN.set()
            await asyncio.Event().wait()
    """
    dispatcher = await started(write("a", code))
    assert (await dispatcher.call("gives_up", "")).error == "it has cancelled itself"
    task = asyncio.create_task(dispatcher.call("waits", ""))
    function = dispatcher.library.tools["waits"].function
    await function.__globals__["BEGUN"].wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert dispatcher.statistics().keys() == {"gives_up"}


# -------------------------------------------------------------------------------------------------------- deadlines

SLOW = """
    import asyncio, threading
    RELEASE = threading.Event()
    def hangs() -> str:
        "Do."
        RELEASE.wait(600)
        return "late"
    async def sleeps() -> str:
        "Do."
        await asyncio.Event().wait()
    async def stubborn() -> str:
        "Do."
        while not RELEASE.is_set():
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                pass
    def quick() -> str:
        "Do."
        return threading.current_thread().name
"""


@pytest.fixture
async def slow(write: Write) -> AsyncIterator[ToolDispatcher]:
    dispatcher = await started(write("slow", SLOW), deadline_s=3.0, max_threads=2, max_hanging=2)
    yield dispatcher
    dispatcher.library.tools["hangs"].function.__globals__["RELEASE"].set()


@pytest.mark.parametrize("name", ["hangs", "sleeps", "stubborn"])
async def test_a_tool_that_hangs_ends_at_its_deadline(slow: ToolDispatcher, name: str) -> None:
    result = await slow.call(name, "")
    assert result.error == "it took longer than 3 s"
    assert 3.0 <= result.seconds < 60
    assert await called(slow, "quick") == "tool"


async def test_threads_that_hang_are_counted_and_are_in_nobody_s_way(slow: ToolDispatcher) -> None:
    slow.lis = LIS(LISSettings(failures=100))
    errors = [result.error for result in await asyncio.gather(*(slow.call("hangs", "") for _ in range(2)))]
    assert errors == ["it took longer than 3 s"] * 2
    assert slow.metrics()["abandoned_threads"] == slow.metrics()["hanging"] == 2
    # the tool itself is refused, without waiting for the deadline
    refused = await slow.call("hangs", "")
    assert "2 calls of hangs have not ended" in str(refused.error)
    # both threads of the pool are gone, and others are there
    assert await asyncio.gather(*(called(slow, "quick") for _ in range(20))) == ["tool"] * 20
    slow.library.tools["hangs"].function.__globals__["RELEASE"].set()
    await until(lambda: slow.metrics()["abandoned_threads"] == 0)
    assert slow.metrics()["hanging"] == 0
    assert await called(slow, "hangs") == "late"


class Owner:
    hanging = 0


async def test_work_that_gets_no_thread_in_time_says_so_and_never_begins() -> None:
    threads, owner, release, done = Threads(1), Owner(), threading.Event(), []
    long = asyncio.create_task(threads.run(lambda: release.wait(60), 60, owner))
    await asyncio.sleep(0)
    with pytest.raises(DeadlineError, match=r"no thread was free for it within 0\.1 s"):
        await threads.run(lambda: done.append("late"), 0.1, owner)
    left = asyncio.create_task(threads.run(lambda: done.append("left"), 60, owner))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.wait({left})
    release.set()
    assert await long
    await threads.run(lambda: done.append("next"), 60, owner)
    assert (done, owner.hanging, threads.abandoned) == (["next"], 0, 0)


async def test_work_whose_caller_has_left_keeps_its_deadline() -> None:
    threads, owner, begun, release = Threads(1), Owner(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        release.wait(60)

    left = asyncio.create_task(threads.run(work, 3.0, owner))
    await until(begun.is_set)
    left.cancel()
    assert await threads.run(lambda: "next", 60, owner) == "next"
    assert owner.hanging == 1
    release.set()
    await until(lambda: owner.hanging == 0)


async def test_a_task_that_ignores_its_end_is_counted(slow: ToolDispatcher) -> None:
    await slow.call("stubborn", "")
    await until(lambda: slow.metrics()["hanging"] == 1)
    slow.library.tools["hangs"].function.__globals__["RELEASE"].set()
    await until(lambda: slow.metrics()["hanging"] == 0)


async def test_a_file_whose_import_hangs_is_given_up_and_the_others_load(write: Write) -> None:
    write("good", 'def good() -> str:\n    "Do."\n    return "yes"\n')
    directory = write("bad", "import threading\nthreading.Event().wait(20)\n")
    dispatcher = await started(directory, load_deadline_s=5.0)
    assert names(dispatcher) == ["good"]
    assert dispatcher.problems == {"bad": "bad.py: it took longer than 5 s"}


async def test_the_loop_goes_on_while_tools_compute(write: Write) -> None:
    code = """
        import threading
        BEGUN, RELEASE = threading.Event(), threading.Event()
        def f() -> None:
            "Do."
            BEGUN.set()
            RELEASE.wait(60)
    """
    dispatcher = await started(write("a", code))
    shared = dispatcher.library.tools["f"].function.__globals__
    task = asyncio.create_task(dispatcher.call("f", ""))
    await until(shared["BEGUN"].is_set)
    for _ in range(10):
        await asyncio.sleep(0.01)
    assert not task.done()
    shared["RELEASE"].set()
    assert (await task).ok


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


# ----------------------------------------------------------------------------------------------------------- reload


def version(number: object) -> str:
    return f'def which() -> str:\n    "Do."\n    return "{number}"\n'


async def test_a_reload_rescans(write: Write) -> None:
    directory = write("a", version(1))
    write("gone", 'def gone() -> str:\n    "Do."\n    return "here"\n')
    write("same", 'import os\ndef same() -> str:\n    "Do."\n    return str(id(os.environ))\n')
    old = await started(directory)
    write("a", version(2))
    (directory / "gone.py").unlink()
    write("new", 'def new() -> str:\n    "Do."\n    return "new"\n')
    new = await started(directory, old)
    assert names(new) == ["which", "new", "same"]
    assert (await called(new, "which"), await called(old, "which")) == ("2", "1")
    assert new.library.files["same"] is old.library.files["same"]
    assert await called(old, "gone") == "here"
    result = await new.call("gone", "")
    assert result.error == "there is no tool 'gone'; known: new, same, which"


async def test_calls_end_on_the_code_on_which_they_began(write: Write) -> None:
    code = """
        import asyncio, threading
        BEGUN, GO, GO_ON = threading.Event(), threading.Event(), asyncio.Event()
        def _which(): return "{0}"
        def in_thread() -> str:
            "Do."
            BEGUN.set()
            GO.wait(60)
            return _which()
        async def on_loop() -> str:
            "Do."
            await GO_ON.wait()
            return _which()
    """
    directory = write("a", code.format(1))
    old = await started(directory)
    names_ = old.library.tools["in_thread"].function.__globals__
    calls = [asyncio.create_task(old.call(name, "")) for name in ("in_thread", "on_loop")]
    await until(names_["BEGUN"].is_set)
    write("a", code.format(2))
    new = await started(directory, old)
    del old
    gc.collect()
    assert names_["__name__"] in sys.modules
    names_["GO"].set()
    names_["GO_ON"].set()
    assert [result.text for result in await asyncio.gather(*calls)] == ["1", "1"]
    fresh = new.library.tools["in_thread"].function.__globals__
    assert fresh["_which"]() == "2"
    assert fresh["__name__"] != names_["__name__"]
    # with its last call the old module goes
    del calls
    await until(lambda: gc.collect() >= 0 and names_["__name__"] not in sys.modules)


async def test_a_file_that_does_not_load_leaves_the_old_version(write: Write) -> None:
    directory = write("a", version(1))
    old = await started(directory)
    write("a", "def _inner():\n    raise RuntimeError('not today')\n_inner()\n")
    new = await started(directory, old)
    assert await called(new, "which") == "1"
    problem = new.problems["a"]
    assert problem.startswith("a.py: Traceback (most recent call last):")
    assert problem.endswith("RuntimeError: not today")
    assert f'{directory}/a.py", line 2, in _inner' in problem
    assert "loading.py" not in problem
    # tried again with each reload
    write("a", version(3))
    newest = await started(directory, new)
    assert (newest.problems, await called(newest, "which")) == ({}, "3")


async def test_one_tool_is_reloaded_alone(write: Write) -> None:
    directory = write("a", version(1))
    write("b", 'def other() -> str:\n    "Do."\n    return "1"\n')
    old = await started(directory)
    write("a", version(2))
    write("b", 'def other() -> str:\n    "Do."\n    return "2"\n')
    new = await started(directory, old, tool="b")
    assert (await called(new, "which"), await called(new, "other")) == ("1", "2")
    # by the tool's name, too
    newer = await started(directory, new, tool="which")
    assert await called(newer, "which") == "2"
    # a new file can be named, and one that is gone
    write("c", 'def third() -> str:\n    "Do."\n    return "3"\n')
    (directory / "a.py").unlink()
    newest = await started(directory, newer, tool="c")
    assert sorted(names(newest)) == ["other", "third", "which"]
    assert sorted(names(await started(directory, newest, tool="a"))) == ["other", "third"]


async def test_one_tool_that_does_not_load_refuses_its_reload(write: Write) -> None:
    directory = write("a", version(1))
    old = await started(directory)
    write("a", "1 / 0\n")
    with pytest.raises(Exception, match=r"tool file a\.py: Traceback[\s\S]*ZeroDivisionError"):
        await started(directory, old, tool="a")
    assert await called(old, "which") == "1"


@pytest.mark.parametrize(
    "key", ["nobody", "../a", "/etc/passwd", "a.py", "a/b", "..", "", "_hidden", "a\0", "ä"]
)
async def test_an_unknown_key_is_told_the_known_ones(write: Write, key: str) -> None:
    directory = write("a", version(1))
    (directory.parent / "outside.py").write_text(version("outside"))
    write("_hidden", version("hidden"))
    old = await started(directory)
    with pytest.raises(segue.Unknown) as raised:
        await started(directory, old, tool=key)
    assert raised.value.known == ["a", "which"]


async def test_keys_can_t_leave_the_directory(write: Write, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(version("outside"))
    directory = write("real", version("inside"))
    (directory / "link.py").symlink_to(tmp_path / "outside.py")
    (directory / "inner.py").symlink_to("real.txt")
    (directory / "real.txt").write_text('def inner() -> str:\n    "Do."\n    return "linked"\n')
    (directory / "a.b.py").write_text(version("dots"))
    (directory / "fifo.py").mkdir()
    dispatcher = await started(directory)
    assert sorted(names(dispatcher)) == ["inner", "which"]
    assert {key: reason.partition(": ")[2] for key, reason in dispatcher.problems.items()} == {
        "a.b.py": "the name of a tool file is made of letters, digits, _ and -, and .py",
        "fifo": "Is a directory",
        "link": "it is a link that leads out of the directory",
    }


async def test_a_fifo_and_a_huge_file_are_no_tools(write: Write) -> None:
    directory = write("a", version(1))
    os.mkfifo(directory / "pipe.py")
    (directory / "huge.py").write_text("#" * (1 << 20) + "\n")
    dispatcher = await started(directory, load_deadline_s=5)
    assert names(dispatcher) == ["which"]
    assert dispatcher.problems.keys() == {"pipe", "huge"}


async def test_a_directory_that_can_t_be_read_is_an_error(write: Write, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"nowhere can't be read: No such file or directory"):
        await started(tmp_path / "nowhere")
    old = await started(write("a", version(1)))
    with pytest.raises(Exception, match="can't be read"):
        await started(tmp_path / "nowhere", old)
    with pytest.raises(Exception, match="keeps the directory"):
        await started(tmp_path, old, tool="a")


async def test_two_files_with_the_same_tool(write: Write) -> None:
    directory = write("b", version("b"))
    old = await started(directory)
    write("a", version("a"))
    new = await started(directory, old)
    assert await called(new, "which") == "b"
    assert new.problems == {"a": "a.py: there is a tool which in b.py already"}
    # a tool that moves from one file to another is no double
    write("b", 'def other() -> str:\n    "Do."\n    return "b"\n')
    newest = await started(directory, new)
    assert (await called(newest, "which"), newest.problems) == ("a", {})


async def test_fifty_reloads_under_a_hundred_concurrent_calls_fail_none(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        import asyncio, time
        def in_thread(number: int) -> dict:
            "Do."
            time.sleep(0.002)
            return {{"number": number, "version": {0}}}
        async def on_loop(number: int) -> dict:
            "Do."
            await asyncio.sleep(0.002)
            return {{"number": number, "version": {0}}}
    """
    directory = write("a", code.format(0))
    services = segue.Services()
    model = services.declare("llm", Echo)
    servers = services.declare("mcp", NoServers, settings=None)
    immune = services.declare("lis", lis)
    tools = services.declare(
        "tools",
        ToolDispatcher,
        requires=[model, servers, immune],
        settings=ToolSettings,
        options=ToolOptions,
    )
    stop, failures, seen = False, [], set()

    async def caller(number: int) -> int:
        count = 0
        while not stop:
            with tools.lease() as leased:
                result = await leased.call(("in_thread", "on_loop")[number % 2], {"number": number})
            count += 1
            document = json.loads(result.text) if result.ok else {}
            if document.get("number") != number:
                failures.append(result)
            seen.add(document.get("version"))
        return count

    monkeypatch.setenv("SEGUE_SERVICES__TOOLS__DIRECTORY", str(directory))
    async with services:
        callers = [asyncio.create_task(caller(number)) for number in range(100)]
        for number in range(1, 51):
            write("a", code.format(number))
            query = {"tool": "a"} if number % 2 else {}
            report = await services.reload("tools", **query)
            assert report["version"] == number + 1
            await until(lambda number=number: number in seen)  # type: ignore[misc]
        stop = True
        counts = await asyncio.gather(*callers)
        totals = tools.current.totals()
    assert failures == []
    assert min(counts) > 0
    assert seen == set(range(51))
    assert totals["total_invocations"] == sum(counts)
    assert totals["recent_failures"] == 0
    assert totals["success_rate"] == 1.0
    # a thread may still be letting go of its last call
    await until(
        lambda: gc.collect() >= 0 and sum(name.startswith("segue_tools.a__") for name in sys.modules) <= 1
    )


async def test_a_reload_that_is_refused_changes_nothing(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write("a", version(1))
    monkeypatch.setenv("SEGUE_SERVICES__TOOLS__DIRECTORY", str(directory))
    services = segue.Services()
    requires: list[Any] = [
        services.declare("llm", Echo),
        services.declare("mcp", NoServers),
        services.declare("lis", lis),
    ]
    tools = services.declare(
        "tools", ToolDispatcher, requires=requires, settings=ToolSettings, options=ToolOptions
    )
    async with services:
        with pytest.raises(segue.Unknown, match="there is no tool 'b'; known: a, which"):
            await services.reload("tools", tool="b")
        write("a", "1 / 0\n")
        with pytest.raises(segue.SwapRefusedError, match="ZeroDivisionError"):
            await services.reload("tools", tool="a")
        with pytest.raises(segue.OptionsError, match="deadline_s"):
            await services.reload("tools", deadline_s="0")
        assert tools.version == 1
        assert await called(tools.current, "which") == "1"
        # all of them: the old version goes on, the reason is among the problems
        await services.reload("tools")
        assert tools.version == 2
        assert await called(tools.current, "which") == "1"
        assert "ZeroDivisionError" in tools.current.problems["a"]
        # dependents of what the tools use
        await services.reload("llm")
        assert tools.current.llm is services["llm"].current


# --------------------------------------------------------------------------------------------- statistics, immunity


async def test_statistics_go_on_over_reloads(write: Write) -> None:
    code = (
        'def f(fail: bool = False) -> str:\n    "Do."\n    if fail: raise ValueError("no")\n    return ""\n'
    )
    directory = write("a", code)
    old = await started(directory)
    await called(old, "f")
    await old.call("f", '{"fail": true}')
    new = await started(directory, old)
    await called(old, "f")  # one that is late
    await called(new, "f")
    await new.call("unknown", "")
    found = new.statistics()["f"]
    assert (found["invocations"], found["failures"], found["recent_failures"]) == (4, 1, 1)
    assert (found["success_rate"], found["last_error"]) == (0.75, "ValueError: no")
    totals = new.totals()
    assert totals.keys() == {"total_invocations", "recent_failures", "success_rate", "avg_latency"}
    assert (totals["total_invocations"], totals["recent_failures"], totals["success_rate"]) == (4, 1, 0.75)
    assert 0 < totals["avg_latency"] < 60_000
    metrics = new.metrics()
    assert metrics["success_rate"] == segue.Rate(0.75, 4)
    assert metrics["tools"] == 1


async def test_a_tool_that_fails_again_and_again_is_not_called_until_its_code_changes(write: Write) -> None:
    directory = write("a", 'def f() -> str:\n    "Do."\n    raise ValueError("no")\n')
    old = await started(directory)
    for _ in range(3):
        assert (await old.call("f", "")).error == "ValueError: no"
    result = await old.call("f", "")
    assert result.error == "f has failed several times and is not called for a while"
    assert old.statistics()["f"]["invocations"] == 3
    unchanged = await started(directory, old)
    assert "not called" in str((await unchanged.call("f", "")).error)
    write("a", 'def f() -> str:\n    "Do."\n    return "well"\n')
    assert await called(await started(directory, unchanged), "f") == "well"


async def test_a_tool_can_ask_the_model(write: Write) -> None:
    code = """
        from segue.worker.backend.tools import ToolContext
        async def ask(question: str, context: ToolContext) -> str:
            "Ask."
            return context.tool + " " + await context.ask(question)
    """
    dispatcher = await started(write("a", code))
    assert list(dispatcher.tools()[0].parameters["properties"]) == ["question"]
    assert await called(dispatcher, "ask", question="why?") == "ask echo: why?"
    dispatcher.llm = Echo("other")
    assert await called(dispatcher, "ask", question="why?") == "ask other: why?"
    assert not (await dispatcher.call("ask", '{"question": "", "context": {}}')).ok


async def test_tools_of_servers_are_among_them(write: Write) -> None:
    dispatcher = await started(write("a", version(1)), deadline_s=1.0)
    dispatcher.mcp = NoServers("files__read", "which")
    assert names(dispatcher) == ["which", "files__read"]
    assert await called(dispatcher, "files__read", path="x") == 'files__read {"path": "x"}'
    assert (await dispatcher.call("files__read", "[")).error is not None
    assert (await dispatcher.call("files__read", '{"bad": 1}')).error == "it does not like that"
    assert (await dispatcher.call("files__read", '{"hang": 1}')).error == "it took longer than 1 s"
    assert dispatcher.statistics()["files__read"]["invocations"] == 4


# ------------------------------------------------------------------------------------------------- the bundled ones


async def test_the_bundled_tools_work() -> None:
    dispatcher = await started("")
    assert dispatcher.problems == {}
    assert sorted(names(dispatcher)) == ["calculate", "convert_units", "current_time", "days_between"]
    assert all(tool.description and tool.parameters["properties"] for tool in dispatcher.tools())
    assert await called(dispatcher, "calculate", expression="2 * 21") == "42"
    assert await called(dispatcher, "calculate", expression="sqrt(16) ^ 2 / 3 + -pi") != ""
    assert await called(dispatcher, "convert_units", value=1, from_unit="mi", to_unit="km") == "1.609344 km"
    assert await called(dispatcher, "convert_units", value=212, from_unit="F", to_unit="C") == "100 C"
    assert (await called(dispatcher, "current_time")).endswith("+00:00")
    assert await called(dispatcher, "days_between", first="2026-01-01", second="2026-12-25") == "358"


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').getpid()",
        "().__class__",
        "9 ** 9 ** 9",
        "(2 ** 9999) * 4 ** 9999",
        "1 / 0",
        "'a' * 10",
        "[x for x in (1,)]",
        "True",
        "sqrt",
        "sqrt(-1)",
        "(-1) ** 0.5",
        "10.0 ** 400",
        "(" * 300 + "1" + ")" * 300,
        "-" * 490 + "1",
        "1" * 501,
        "max()",
        "lambda: 1",
    ],
)
async def test_the_calculator_does_nothing_but_arithmetic(expression: str) -> None:
    dispatcher = await started("")
    result = await dispatcher.call("calculate", {"expression": expression})
    assert not result.ok or expression.startswith("-")
    assert result.seconds < 20  # less than its deadline


def test_no_thread_keeps_the_process(write: Write) -> None:
    """One that hangs is a daemon: the process ends without it."""
    directory = write("slow", SLOW)
    code = f"""
        import asyncio, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import test_tools
        async def main():
            dispatcher = await test_tools.started({str(directory)!r}, deadline_s=3.0)
            print((await dispatcher.call("hangs", "")).error)
        asyncio.run(main())
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert (ended.returncode, ended.stdout) == (0, "it took longer than 3 s\n"), ended.stderr

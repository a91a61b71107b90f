"""The memory: shared by many processes, bounded, and true to its word."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scenario import ROOT, environment

import segue
from segue.worker.backend.memory import (
    HAMMemoryManager,
    MemoryFailedError,
    MemoryRefusedError,
    MemorySettings,
    words,
)
from segue.worker.backend.places import PlaceError, state_directory

T = TypeVar("T")

WRITER = """
import asyncio, sys
from segue.worker.backend.memory import HAMMemoryManager, MemorySettings

async def main(path, name):
    memory = HAMMemoryManager(MemorySettings(path=path, busy_timeout_s=60.0))
    await memory.start()
    print("open", flush=True)
    sys.stdin.readline()
    number = 0
    while True:
        await memory.add(f"{name} says {number}")
        print(number, flush=True)
        number += 1
        if number == int(sys.argv[3]):
            break
    await memory.close()
asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@contextlib.asynccontextmanager
async def memory(path: Path | str, **more: Any) -> AsyncIterator[HAMMemoryManager]:
    opened = HAMMemoryManager(MemorySettings(path=str(path), **more))
    try:
        await opened.start()
        await opened.activate()
        yield opened
    finally:
        await opened.close()


def writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )


def test_what_is_remembered_is_found_by_its_words_best_fit_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with memory(tmp_path / "m.db") as ham:
            number = await ham.add("The green teapot is in the cellar", meta={"by": "Ada"})
            await ham.add("Coffee is in the kitchen")
            await ham.add("A teapot, a green one: green as grass", kind="fact")
            found = await ham.search("Where is the GREEN teapot?")
            assert {each.id for each in found} == {number, number + 2}
            assert found[0].score >= found[1].score
            assert [each.id for each in await ham.search('"green teapot"')] == [number]
            assert [each.text for each in await ham.search("coff")] == ["Coffee is in the kitchen"]
            assert [each.id for each in await ham.search("", limit=2)] == [number + 2, number + 1]
            assert (await ham.search('"green teapot"'))[0].meta == {"by": "Ada"}
            assert ham.size() == 3

    run(scenario())


def test_a_conversation_sees_nothing_of_another_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with memory(tmp_path / "m.db") as ham:
            await ham.add_turn("one", "user", "my secret is a walnut")
            await ham.add("walnut trees grow slowly")
            await ham.add("walnut of the other", session="two")
            assert len(await ham.search("walnut")) == 3
            assert {each.session for each in await ham.search("walnut", session="two")} == {None, "two"}
            assert {each.session for each in await ham.search("", session="two")} == {None, "two"}

    run(scenario())


def test_turns_come_back_in_order_with_their_sessions(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with memory(tmp_path / "m.db") as ham:
            for number in range(4):
                await ham.add_turn("one", "user", f"question {number}")
                await ham.add_turn("one", "assistant", f"answer {number}", {"model": "m"})
            await ham.add_turn("two", "user", "hello")
            last = await ham.turns("one", 3)
            assert [turn.content for turn in last] == ["answer 2", "question 3", "answer 3"]
            assert last[-1].meta == {"model": "m"}
            assert [(each.session, each.turns) for each in await ham.sessions(10)] == [("two", 1), ("one", 8)]
            assert await ham.turns("three", 5) == []
            first = last[0].id
            found = await ham.search("answer", session="one", turns_before=first)
            assert {each.text for each in found} == {"answer 0", "answer 1"}

    run(scenario())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(codec=None, exclude_categories=[]), max_size=60)
    | st.text('"*()^:-+ANDORNEAR{} ab', max_size=30)
)
def test_no_text_breaks_the_search(text: str) -> None:
    query = words.query(text)
    connection = sqlite3.connect(":memory:")
    with contextlib.closing(connection):
        connection.execute("CREATE VIRTUAL TABLE words USING fts5 (text)")
        if query is not None:
            connection.execute("SELECT * FROM words WHERE words MATCH ?", (query,)).fetchall()


def test_any_text_can_be_remembered(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with memory(tmp_path / "m.db") as ham:
            for text in ("half \ud800 a pair", "nul \0 inside", "' OR 1=1; --", "日本語のメモ", "🫖"):
                await ham.add(text, meta={text: text})
                assert await ham.search(text) or text == "🫖"
            with pytest.raises(MemoryRefusedError, match="empty"):
                await ham.add("  ")
            with pytest.raises(MemoryRefusedError, match="kind"):
                await ham.add("x", kind="turn")

    run(scenario())


# ------------------------------------------------------------------------------------------------------------ bounds


def test_the_oldest_notes_make_room_first_and_turns_only_when_there_are_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with memory(tmp_path / "m.db", max_items=6) as ham:
            for number in range(3):
                await ham.add_turn("s", "user", f"turn {number}")
            for number in range(10):
                await ham.add(f"note {number}")
            assert sorted(each.text for each in await ham.search("note")) == ["note 7", "note 8", "note 9"]
            assert len(await ham.turns("s", 10)) == 3
            for number in range(3, 9):
                await ham.add_turn("s", "user", f"turn {number}")
            assert await ham.search("note") == []
            assert [turn.content for turn in await ham.turns("s", 10)] == [f"turn {n}" for n in range(3, 9)]
            assert ham.size() == 6

    run(scenario())


def test_bytes_are_bounded_and_so_is_the_file(tmp_path: Path) -> None:
    limit = 200_000

    async def scenario() -> None:
        async with memory(tmp_path / "m.db", max_bytes=limit, max_item_bytes=5000) as ham:
            for number in range(400):
                await ham.add(f"{number} " + "some words to fill it " * 200)
            metrics = await ham.metrics()
            assert metrics["bytes"].value <= limit
            assert metrics["ham_store_size"].value == ham.size() > 20
            with pytest.raises(MemoryRefusedError, match="longer than 5000 bytes"):
                await ham.add("x" * 5001)
            await ham.add_turn("s", "user", "ü" * 5001)
            (turn,) = await ham.turns("s", 1)
            assert (len(turn.content), turn.meta) == (2500, {"shortened": True})

    run(scenario())
    assert (tmp_path / "m.db").stat().st_size < 4 * limit


def test_smaller_limits_hold_from_the_swap_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        services = segue.Services()
        ham = services.declare("memory", HAMMemoryManager, settings=MemorySettings)
        os.environ["SEGUE_SERVICES__MEMORY__PATH"] = str(tmp_path / "m.db")
        try:
            async with services:
                for number in range(300):
                    await ham.current.add(f"note {number}")
                await services.reload("memory", max_items="10")
                assert ham.current.size() == 10
                assert len(await ham.current.search("note", 100)) == 10
        finally:
            del os.environ["SEGUE_SERVICES__MEMORY__PATH"]

    run(scenario())


# --------------------------------------------------------------------------------------------------------- processes


def test_several_processes_open_it_at_once_for_the_first_time_and_share_it(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "m.db"
    processes = [writer(path, f"writer{number}", 20) for number in range(6)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.split() == ["open", *map(str, range(20))]

    async def scenario() -> None:
        async with memory(path) as ham:
            assert ham.size() == 120
            assert len(await ham.search("writer3", 100)) == 20

    run(scenario())
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("durability", ["process", "power"])
def test_an_acknowledged_write_survives_a_kill(tmp_path: Path, durability: str) -> None:
    path = tmp_path / "m.db"
    process = writer(path, "killed", 10**9)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    acknowledged = -1
    for line in process.stdout:
        acknowledged = int(line)
        if acknowledged == 300:
            process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()

    async def scenario() -> None:
        async with memory(path, durability=durability) as ham:
            found = {each.text for each in await ham.search("killed", 10**6)}
            assert {f"killed says {number}" for number in range(acknowledged + 1)} <= found
            assert len(found) <= acknowledged + 2

    run(scenario())
    assert acknowledged >= 300


FULL = """
import asyncio, subprocess, sys
from segue.worker.backend.memory import HAMMemoryManager, MemoryFailedError, MemorySettings

async def main(directory):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], check=True)
    ham = HAMMemoryManager(MemorySettings(path=directory + "/m.db"))
    await ham.start()
    number, failure = 0, None
    while failure is None:
        try:
            await ham.add(f"walnut {number} " + "filler " * 500)
            number += 1
        except MemoryFailedError as error:
            failure = error
    print(failure)
    assert ham.health()["ok"] is False, ham.health()
    assert len(await ham.search("walnut", 10**6)) == number, "it goes on reading, and has what was acknowledged"
    second = HAMMemoryManager(MemorySettings(path=directory + "/m.db"))
    await second.start()
    assert len(await second.search("walnut", 10**6)) == number, "a swap finds the same"
    await second.close()
    subprocess.run(["mount", "-o", "remount,size=8m", directory], check=True)
    await ham.add("there is room again")
    assert ham.health()["ok"] is True
    await ham.close()
    print("fine")
asyncio.run(main(sys.argv[1]))
"""


def test_on_a_full_disk_writing_fails_with_the_reason_and_reading_goes_on(tmp_path: Path) -> None:
    possible = subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=False, capture_output=True
    )
    if possible.returncode:
        pytest.skip(f"no file system can be mounted here: {possible.stderr.decode().strip()}")
    done = subprocess.run(
        ["unshare", "-Urm", sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reason, fine = done.stdout.splitlines()
    assert "m.db: database or disk is full (SQLITE_FULL)" in reason
    assert fine == "fine"


# --------------------------------------------------------------------------------------------------------- bad files


def damaged(path: Path, how: str) -> None:
    if how == "no database":
        path.write_bytes(b"this is no database, but something of value\n" * 1000)
        return
    if how == "another database":
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE invoices (amount)")
            connection.commit()
        return
    if how == "a directory":
        path.mkdir()
        return

    async def fill() -> None:
        async with memory(path) as ham:
            for number in range(200):
                await ham.add(f"note {number}")

    run(fill())
    if how == "a newer version":
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version = 99")
    else:
        content = bytearray(path.read_bytes())
        content[4096:] = os.urandom(len(content) - 4096)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no database", "file is not a database"),
        ("another database", "is a database of something else"),
        ("a directory", "Is a directory"),
        ("a newer version", "written by a newer segue"),
        ("damaged", "malformed"),
    ],
)
def test_a_file_that_cant_be_used_refuses_the_swap_and_is_left_as_it_is(
    tmp_path: Path, how: str, reason: str
) -> None:
    bad = tmp_path / "bad.db"
    damaged(bad, how)
    before = bad.read_bytes() if bad.is_file() else None

    async def scenario() -> None:
        services = segue.Services()
        ham = services.declare("memory", HAMMemoryManager, settings=MemorySettings)
        os.environ["SEGUE_SERVICES__MEMORY__PATH"] = str(tmp_path / "good.db")
        try:
            async with services:
                await ham.current.add("still here")
                with pytest.raises(segue.SwapRefusedError, match=reason) as told:
                    await services.reload("memory", path=str(bad))
                assert str(bad) in str(told.value)
                assert len(await ham.current.search("still")) == 1
        finally:
            del os.environ["SEGUE_SERVICES__MEMORY__PATH"]

    run(scenario())
    assert (bad.read_bytes() if bad.is_file() else None) == before


def test_a_memory_that_keeps_nothing_says_so() -> None:
    async def scenario() -> None:
        async with memory(":memory:") as ham:
            await ham.add("for now")
            assert len(await ham.search("now")) == 1
            assert "nothing is kept" in ham.health()["note"]

    run(scenario())


def test_a_closed_memory_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with memory(tmp_path / "m.db") as ham:
            writing = [asyncio.ensure_future(ham.add(f"note {number}")) for number in range(50)]
            await asyncio.sleep(0)
        await asyncio.gather(*writing)  # what was begun is finished
        with pytest.raises(MemoryFailedError, match="closed"):
            await ham.add("late")

    run(scenario())


# ------------------------------------------------------------------------------------------------------------ places


def test_the_state_directory_is_where_it_was_told_to_be(tmp_path: Path) -> None:
    one = state_directory(
        {"STATE_DIRECTORY": f"{tmp_path}/a:{tmp_path}/b", "XDG_STATE_HOME": f"{tmp_path}/x"}
    )
    assert one == tmp_path / "a"
    two = state_directory({"XDG_STATE_HOME": f"{tmp_path}/x", "SEGUE_INSTANCE_NAME": "shop"})
    assert two == tmp_path / "x/segue/shop"
    three = state_directory({"HOME": str(tmp_path)})
    assert three == tmp_path / ".local/state/segue/default"
    assert {each.stat().st_mode & 0o777 for each in (one, two, three)} == {0o700}


def test_without_a_home_the_state_directory_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environ = {"HOME": "/nonexistent"}
    assert state_directory(environ) == tmp_path / f"segue-state-{os.geteuid()}/default"
    (tmp_path / f"segue-state-{os.geteuid()}").chmod(0o755)
    with pytest.raises(PlaceError, match="of this user alone"):
        state_directory(environ)


def test_what_was_named_as_state_directory_must_be_usable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlaceError, match="can't be made"):
        state_directory({"STATE_DIRECTORY": str(tmp_path / "file" / "x")})
    with pytest.raises(PlaceError, match="can't be named"):
        state_directory({"SEGUE_INSTANCE_NAME": "../x"})

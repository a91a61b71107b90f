"""Conversations: prompt, tools, turns, and what happens when somebody leaves or something fails."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from openai_server import OpenAIServer, openai_server, refused_url

import segue
from segue.worker.backend.conversation import Message, Tool
from segue.worker.backend.dialogue import DialogueError, DialogueManager, DialogueSettings, Reply
from segue.worker.backend.dialogue.prompt import build
from segue.worker.backend.emotion import Emotion, EmotionSettings, EmotionSystem
from segue.worker.backend.lis import LIS, LISSettings
from segue.worker.backend.llm import LLMSettings, MultiLLMService, Provider
from segue.worker.backend.memory import HAMMemoryManager, MemorySettings, Turn
from segue.worker.backend.personality import PersonalityManager, PersonalitySettings
from segue.worker.backend.tools import ToolResult

T = TypeVar("T")
CALCULATOR = Tool(
    "calculate", "Arithmetic.", {"type": "object", "properties": {"expression": {"type": "string"}}}
)


class Tools:
    """Stands in for the dispatcher: one tool, whose results the test says."""

    def __init__(self, llm: Any = None, result: str = "42", ok: bool = True) -> None:
        self.llm = llm
        self.calls: list[tuple[str, str | dict[str, Any]]] = []
        self._result = ToolResult(ok, result, None if ok else result, 0.01)

    def tools(self) -> list[Tool]:
        return [CALCULATOR]

    async def call(self, name: str, arguments: str | dict[str, Any]) -> ToolResult:
        self.calls.append((name, arguments))
        return self._result


@dataclass
class Parts:
    dialogue: DialogueManager
    llm: MultiLLMService
    tools: Any
    personality: PersonalityManager
    emotion: EmotionSystem
    memory: HAMMemoryManager
    lis: LIS

    async def say(self, text: str, session: str = "s") -> list[Reply]:
        return [reply async for reply in self.dialogue.reply(session, text)]

    async def turns(self, session: str = "s") -> list[tuple[str, str]]:
        return [(turn.role, turn.content) for turn in await self.memory.turns(session)]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with openai_server() as running:
        yield running


@contextlib.asynccontextmanager
async def parts(
    directory: Path,
    url: str | None = None,
    tools: Any = None,
    profile: str = "plain",
    previous: DialogueManager | None = None,
    **settings: Any,
) -> AsyncIterator[Parts]:
    lis = LIS(LISSettings())
    providers = () if url is None else (Provider("main", base_url=url, model="m", retries=0),)
    llm = MultiLLMService(LLMSettings(providers=providers, offline_pause_s=0), lis)
    memory = HAMMemoryManager(MemorySettings(path=str(directory / "memory.db")))
    personality = PersonalityManager(PersonalitySettings(profile))
    emotion = EmotionSystem(EmotionSettings(), personality, None, lambda: 1e9)  # nothing fades meanwhile
    used: Any = tools or Tools(llm)
    dialogue = DialogueManager(
        DialogueSettings(**({"memory_timeout_s": 60.0} | settings)),
        llm,
        used,
        personality,
        emotion,
        memory,
        lis,
        previous,
    )
    try:
        await llm.start()
        await memory.start()
        yield Parts(dialogue, llm, used, personality, emotion, memory, lis)
    finally:
        await dialogue.close()
        await memory.close()
        await llm.close()


def text_of(replies: list[Reply]) -> str:
    return "".join(reply.text for reply in replies)


# ----------------------------------------------------------------------------------------------------------- answers


def test_an_answer_streams_and_ends_with_who_gave_it(tmp_path: Path, server: OpenAIServer) -> None:
    async def scenario() -> None:
        async with parts(tmp_path, server.url(), profile="warm") as them:
            replies = await them.say("hello")
            assert [reply.text for reply in replies[:-1]] == ["You ", "said ", "hello"]
            final = replies[-1].final
            assert final is not None
            assert (final.provider, final.model, final.personality) == ("main", "m", "warm")
            assert final.emotion.valence == pytest.approx(0.4, abs=1e-3)
            assert final.problems == ()
            assert await them.turns() == [("user", "hello"), ("assistant", "You said hello")]
            (turn,) = await them.memory.turns("s", 1)
            assert turn.meta["model"] == "m"
            assert turn.meta["personality"] == "warm"
            assert "cut" not in turn.meta
        body = server.seen()[0]["body"]
        assert body["temperature"] == 0.9
        assert "warm and attentive" in body["messages"][0]["content"]
        assert "You feel glad" in body["messages"][0]["content"]

    run(scenario())


def test_a_conversation_goes_on_in_another_process_since_its_turns_are_remembered(
    tmp_path: Path, server: OpenAIServer
) -> None:
    async def scenario() -> None:
        async with parts(tmp_path, server.url()) as them:
            await them.memory.add("The walnut tree was planted in 1900")
            await them.say("I hate, hate, hate this")
            felt = them.emotion.state("s")
        async with parts(tmp_path, server.url()) as them:
            await them.say("and the walnut?")
            assert them.emotion.state("s").valence == pytest.approx(felt.valence, abs=0.001)
            assert felt.valence < -0.2
            await them.say("other", session="t")
        second, other = (seen["body"]["messages"] for seen in server.seen()[1:])
        assert [(message["role"], message["content"]) for message in second[1:]] == [
            ("user", "I hate, hate, hate this"),
            ("assistant", "You said I hate, hate, hate this"),
            ("user", "and the walnut?"),
        ]
        assert "planted in 1900" in second[0]["content"]
        assert [message["content"] for message in other[1:]] == ["other"]
        assert "hate" not in other[0]["content"], "nothing of one conversation is told in another"

    run(scenario())


def test_the_model_calls_tools_and_answers_with_their_results(tmp_path: Path, server: OpenAIServer) -> None:
    async def scenario() -> None:
        async with parts(tmp_path, server.url("tool")) as them:
            replies = await them.say("please")
            (use,) = [reply.tool for reply in replies if reply.tool]
            assert (use.name, use.arguments, use.ok, use.text) == (
                "calculate", '{"expression": "2*21"}', True, "42",
            )  # fmt: skip
            assert text_of(replies) == "You said 42"
            assert them.tools.calls == [("calculate", '{"expression": "2*21"}')]
            (turn,) = await them.memory.turns("s", 1)
            assert turn.meta["tools"] == [{"name": "calculate", "ok": True}]

    run(scenario())


def test_a_model_that_wants_ever_more_tools_has_to_answer_at_last(
    tmp_path: Path, server: OpenAIServer
) -> None:
    async def scenario() -> None:
        async with parts(tmp_path, server.url("tools")) as them:
            replies = await them.say("please")
            assert len(them.tools.calls) == 8
            assert text_of(replies) == "You said 42"
            assert "tools" not in server.seen()[-1]["body"]

    run(scenario())


def test_a_tool_that_fails_is_told_to_the_model_and_a_long_result_is_shortened(
    tmp_path: Path, server: OpenAIServer
) -> None:
    async def scenario() -> None:
        tools = Tools(None, "no " * 1000, ok=False)
        async with parts(tmp_path, server.url("tool"), tools, max_tool_characters=100) as them:
            (use,) = [reply.tool for reply in await them.say("please") if reply.tool]
            assert use.ok is False
            told = server.seen()[-1]["body"]["messages"][-1]
            assert told["role"] == "tool"
            assert told["content"] == ("no " * 1000)[:100] + "\n[2900 more characters]"

    run(scenario())


def test_with_nothing_configured_the_offline_responder_talks_and_uses_tools(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with parts(tmp_path) as them:
            assert "no language model" in text_of(await them.say("hello"))
            assert text_of(await them.say("calculate 6*7")) == "calculate says: 42"
            assert "message 3 of this conversation" in text_of(await them.say("and now?"))

    run(scenario())


# --------------------------------------------------------------------------------------------- somebody leaves, fails


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_turn_cut_by_a_leaving_client_is_kept_as_such(
    tmp_path: Path, server: OpenAIServer, how: str
) -> None:
    async def scenario() -> None:
        async with parts(tmp_path, server.url("endless")) as them:
            heard = asyncio.Event()

            async def listen() -> None:
                async for reply in them.dialogue.reply("s", "count to 9"):
                    if reply.text.startswith("1"):
                        heard.set()

            if how == "close":
                replies = them.dialogue.reply("s", "count to 9")
                assert (await anext(replies)).text == "0 "
                assert (await anext(replies)).text == "1 "
                await replies.aclose()
            else:
                task = asyncio.ensure_future(listen())
                await heard.wait()
                while not task.done():  # as often as it takes, at any point: as a task group does it
                    task.cancel()
                    await asyncio.sleep(0)
                assert task.cancelled()
            await asyncio.to_thread(server.wait, "cancelled", 1)
            # the next message waits until the cut turn is kept
            await asyncio.to_thread(server.wait, "requests", 1)
            following = them.dialogue.reply("s", "go on")
            await anext(following)
            await following.aclose()
            body = server.seen()[1]["body"]
            assert [message["content"] for message in body["messages"][1:]] == [
                "count to 9", "0 1  [cut off here]", "go on",
            ]  # fmt: skip
            turn = (await them.memory.turns("s"))[1]
            assert (turn.content, turn.meta["cut"]) == ("0 1 ", "the client left")
            assert them.dialogue.metrics()["active"] == 0

    run(scenario())


def test_a_stream_that_is_cut_off_ends_the_answer_with_the_reason(
    tmp_path: Path, server: OpenAIServer
) -> None:
    async def scenario() -> None:
        async with parts(tmp_path, server.url("cut")) as them:
            with pytest.raises(DialogueError, match="cut off") as told:
                await them.say("count to 9")
            assert told.value.status == 502
            await them.dialogue.close()
            turn = (await them.memory.turns("s"))[1]
            assert turn.content == "0 1 "
            assert "cut off" in turn.meta["cut"]

    run(scenario())


def test_without_any_answer_what_the_user_said_is_kept_and_said_again_with_the_next(
    tmp_path: Path, server: OpenAIServer
) -> None:
    async def scenario() -> None:
        async with parts(tmp_path, refused_url()) as them:
            with pytest.raises(DialogueError, match="can't be reached"):
                await them.say("first")
            assert them.dialogue.metrics()["failed"] == 1
        async with parts(tmp_path, server.url()) as them:
            await them.say("second")
        messages = server.seen()[0]["body"]["messages"]
        assert [(message["role"], message["content"]) for message in messages[1:]] == [
            ("user", "first\n\nsecond")
        ]

    run(scenario())


def test_when_the_memory_fails_the_answer_comes_all_the_same_and_says_so(
    tmp_path: Path, server: OpenAIServer
) -> None:
    async def scenario() -> None:
        async with parts(tmp_path, server.url()) as them:
            await them.say("before")
            with contextlib.closing(sqlite3.connect(tmp_path / "memory.db")) as other:
                other.execute("DROP TABLE items")
                other.commit()
            replies = await them.say("hello")
            assert text_of(replies) == "You said hello"
            final = replies[-1].final
            assert final is not None
            assert any("no such table" in problem for problem in final.problems)
            assert any(problem.startswith("not kept: ") for problem in final.problems)
            assert them.memory.health()["ok"] is False

    run(scenario())


# -------------------------------------------------------------------------------------------------------------- order


def test_messages_of_one_conversation_are_answered_one_after_the_other_in_order(
    tmp_path: Path, server: OpenAIServer
) -> None:
    async def scenario() -> None:
        async with parts(tmp_path, server.url()) as them:
            said = [f"message {number}" for number in range(8)]
            tasks = []
            for text in said:
                tasks.append(asyncio.ensure_future(them.say(text)))
                await asyncio.sleep(0)  # so that it is in the queue
            tasks.append(asyncio.ensure_future(them.say("beside", session="other")))
            await asyncio.gather(*tasks)
            expected = [turn for text in said for turn in (("user", text), ("assistant", f"You said {text}"))]
            assert await them.turns() == expected
            assert them.dialogue.metrics()["sessions_active"] == 0

    run(scenario())


def test_too_many_waiting_messages_of_one_conversation_are_refused(
    tmp_path: Path, server: OpenAIServer
) -> None:
    async def scenario() -> None:
        async with parts(tmp_path, server.url("endless")) as them:
            waiting = [asyncio.ensure_future(them.say("count to 9")) for _ in range(17)]
            await asyncio.to_thread(server.wait, "requests", 1)
            with pytest.raises(DialogueError, match="wait in this conversation") as told:
                await them.say("one more")
            assert told.value.status == 429
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await them.dialogue.close()
            assert them.dialogue.metrics()["sessions_active"] == 0

    run(scenario())


# -------------------------------------------------------------------------------------------------------------- swaps


def test_an_answer_ends_on_what_it_began_with_and_the_next_one_uses_the_new(
    tmp_path: Path, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGUE_SERVICES__MEMORY__PATH", str(tmp_path / "memory.db"))
    monkeypatch.setenv("SEGUE_SERVICES__LLM__BASE_URL", server.url("paced"))
    monkeypatch.setenv("SEGUE_SERVICES__LLM__MODEL", "old")
    monkeypatch.setenv("SEGUE_SERVICES__DIALOGUE__MEMORY_TIMEOUT_S", "60")

    async def scenario() -> None:
        services = segue.Services()
        memory = services.declare("memory", HAMMemoryManager, settings=MemorySettings)
        lis = services.declare("lis", LIS, settings=LISSettings)
        llm = services.declare("llm", MultiLLMService, requires=[lis], settings=LLMSettings)
        tools = services.declare("tools", Tools, requires=[llm], title="ToolDispatcher")
        personality = services.declare("personality", PersonalityManager, settings=PersonalitySettings)
        emotion = services.declare(
            "emotion", EmotionSystem, requires=[personality], settings=EmotionSettings, title="EmotionSystem"
        )
        dialogue = services.declare(
            "dialogue",
            DialogueManager,
            requires=[llm, tools, personality, emotion, memory, lis],
            settings=DialogueSettings,
            title="DialogueManager",
        )

        async def say(text: str, swap: bool) -> tuple[str, tuple[str, str]]:
            with contextlib.ExitStack() as leases:
                for service in (memory, lis, llm, tools, personality, emotion):
                    leases.enter_context(service.lease())
                replies = leases.enter_context(dialogue.lease()).reply("s", text)
                heard = [await anext(replies)]
                if swap:
                    report = await services.reload("llm", model="new")
                    assert report["rewired"] == ["ToolDispatcher", "DialogueManager"]
                    report = await services.reload("personality", profile="terse")
                    assert report["rewired"] == ["EmotionSystem", "DialogueManager"]
                    for name in ("memory", "emotion", "lis", "dialogue", "tools"):
                        await services.reload(name)
                heard += [reply async for reply in replies]
            final = heard[-1].final
            assert final is not None
            assert final.problems == ()
            return text_of(heard), (final.model, final.personality)

        async with services:
            whole = "".join(f"{number} " for number in range(20))
            assert await say("count to 20", swap=True) == (whole, ("old", "plain"))
            assert await say("hello", swap=False) == ("You said hello", ("new", "terse"))
            messages = server.seen()[1]["body"]["messages"]
            assert [message["content"] for message in messages[1:]] == ["count to 20", whole, "hello"]

    run(scenario())


# ------------------------------------------------------------------------------------------------------------- prompt


def turn(number: int, role: Any, content: str, **meta: Any) -> Turn:
    return Turn(number, "s", role, content, float(number), meta)


def test_the_prompt_keeps_the_last_turns_that_fit_and_alternates() -> None:
    profile = PersonalityManager(PersonalitySettings("terse")).profile
    turns = [
        turn(1, "user", "x" * 90),
        turn(2, "assistant", "old"),
        turn(3, "user", "unanswered"),
        turn(4, "assistant", "", cut="the client left"),
        turn(5, "user", "again"),
        turn(6, "assistant", "half an", cut="the client left"),
    ]
    messages = build(profile, Emotion(-0.8, 0.5), [], turns, "go on", 60)
    assert messages[1:] == [
        Message("assistant", "old"),
        Message("user", "unanswered\n\nagain"),
        Message("assistant", "half an [cut off here]"),
        Message("user", "go on"),
    ]
    assert "very sad and stirred" in messages[0].content
    assert "little warmth, humor, verbosity" in messages[0].content

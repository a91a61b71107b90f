"""Several providers behind one interface: who is asked, what is tried again, and what never is."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from openai_server import OpenAIServer, openai_server, refused_url
from scenario import ROOT, environment

import segue
from segue.worker.backend.conversation import Chunk, Message, Sampling, Tool, ToolCall
from segue.worker.backend.lis import LIS, LISSettings, repeated
from segue.worker.backend.llm import Completion, LLMError, LLMSettings, MultiLLMService, Provider

T = TypeVar("T")
HELLO = [Message("user", "hello")]
CALCULATOR = Tool(
    "calculate",
    "Arithmetic.",
    {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
)
CLOCK = Tool("current_time", "The time.", {"type": "object", "properties": {"timezone": {"type": "string"}}})


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with openai_server() as running:
        yield running


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def provider(name: str, url: str, **more: Any) -> Provider:
    return Provider(name, base_url=url, model=more.pop("model", "m"), **more)


@contextlib.asynccontextmanager
async def service(
    *providers: Provider, lis: LIS | None = None, previous: MultiLLMService | None = None, **settings: Any
) -> AsyncIterator[MultiLLMService]:
    llm = MultiLLMService(LLMSettings(providers=providers, **settings), lis or LIS(LISSettings()), previous)
    try:
        await llm.start()
        yield llm
    finally:
        await llm.close()


async def ask(*providers: Provider, said: str = "hello", **settings: Any) -> Completion:
    async with service(*providers, **settings) as llm:
        return await llm.complete([Message("user", said)])


# ---------------------------------------------------------------------------------------------------------- answers


def test_an_answer_streams_with_provider_model_and_usage(server: OpenAIServer) -> None:
    async def scenario() -> list[Chunk]:
        async with service(provider("main", server.url(), api_key=segue.Secret("k3y-of-mine"))) as llm:
            return [
                chunk async for chunk in llm.stream(HELLO, sampling=Sampling(temperature=0.5, max_tokens=7))
            ]

    chunks = run(scenario())
    assert [chunk.text for chunk in chunks] == ["You ", "said ", "hello", ""]
    assert {(chunk.provider, chunk.model) for chunk in chunks} == {("main", "m")}
    assert chunks[-1].finish == "stop"
    assert chunks[-1].usage == {"prompt_tokens": 3, "completion_tokens": 3}
    (seen,) = server.seen()
    assert seen["authorization"] == "Bearer k3y-of-mine"
    assert (seen["body"]["temperature"], seen["body"]["max_tokens"]) == (0.5, 7)
    assert "top_p" not in seen["body"]
    assert "tools" not in seen["body"]


def test_tool_calls_come_whole_and_go_back_as_they_came(server: OpenAIServer) -> None:
    async def scenario() -> tuple[list[Chunk], Completion]:
        async with service(provider("main", server.url("tool"))) as llm:
            chunks = [chunk async for chunk in llm.stream(HELLO, tools=[CALCULATOR])]
            calls = chunks[-1].tool_calls
            turn = [*HELLO, Message("assistant", "", calls), Message("tool", "42", tool_call_id=calls[0].id)]
            return chunks, await llm.complete(turn, tools=[CALCULATOR])

    chunks, completion = run(scenario())
    assert chunks[-1].tool_calls == (ToolCall("c1", "calculate", '{"expression": "2*21"}'),)
    assert chunks[-1].finish == "tool_calls"
    assert completion.text == "You said 42"
    first, second = server.seen()
    assert first["body"]["tools"][0]["function"]["parameters"] == CALCULATOR.parameters
    assert second["body"]["messages"][1]["tool_calls"][0]["id"] == "c1"
    assert second["body"]["messages"][2] == {"role": "tool", "content": "42", "tool_call_id": "c1"}


# -------------------------------------------------------------------------------------------------------- fail-over


@pytest.mark.parametrize(
    ("fault", "asked"),
    [("429", 2), ("500", 2), ("503", 2), ("slow", 1), ("silent", 1), ("garbage", 2), ("shapes", 2),
     ("html", 2), ("nothing", 2), ("told", 2), ("401", 1), ("404", 1), ("429later", 1)],
)  # fmt: skip
def test_a_provider_that_does_not_begin_to_answer_is_replaced_by_the_next(
    server: OpenAIServer, fault: str, asked: int
) -> None:
    # those that say something must have the time for it, however busy the machine is
    patience_s = 3.0 if fault in {"slow", "silent"} else 20.0
    bad = provider("bad", server.url(fault), retries=1, first_token_timeout_s=patience_s)
    answer = run(ask(bad, provider("good", server.url())))
    assert (answer.provider, answer.text) == ("good", "You said hello")
    assert [seen["fault"] for seen in server.seen()] == [fault] * asked + ["ok"]


def test_a_refused_connection_is_replaced_by_the_next(server: OpenAIServer) -> None:
    bad = provider("bad", refused_url(), retries=1)
    assert run(ask(bad, provider("good", server.url()))).provider == "good"


@pytest.mark.parametrize("fault", ["429x2", "500x2", "garbagex2"])
def test_the_same_provider_is_tried_again_before_the_next_one_is(server: OpenAIServer, fault: str) -> None:
    answer = run(ask(provider("first", server.url(fault), retries=2), provider("second", server.url())))
    assert answer.provider == "first"
    assert server.count("requests") == 3


def test_without_any_answer_the_caller_gets_every_reason(server: OpenAIServer) -> None:
    bad = provider("one", server.url("500"), retries=0)
    worse = provider("two", refused_url(), retries=0)
    with pytest.raises(LLMError, match=r"one answers 500: .*two can't be reached") as told:
        run(ask(bad, worse))
    assert told.value.status == 502


def test_a_time_out_is_told_as_one(server: OpenAIServer) -> None:
    with pytest.raises(LLMError, match=r"no token within 5 s") as told:
        run(ask(provider("one", server.url("slow"), first_token_timeout_s=5.0)))
    assert told.value.status == 504


def test_a_request_that_is_itself_at_fault_is_not_taken_elsewhere(server: OpenAIServer) -> None:
    with pytest.raises(LLMError, match="told to say 400") as told:
        run(ask(provider("one", server.url("400")), provider("two", server.url())))
    assert told.value.status == 400
    assert server.count("requests") == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("cut", "cut off"), ("unfinished", "cut off"), ("endless", r"nothing came for 5 s")],
)
def test_after_the_first_token_nothing_is_begun_again(server: OpenAIServer, fault: str, reason: str) -> None:
    text = ""

    async def scenario() -> None:
        nonlocal text
        first = provider("one", server.url(fault), silence_timeout_s=5.0 if fault == "endless" else 20.0)
        async with service(first, provider("two", server.url())) as llm:
            async for chunk in llm.stream([Message("user", "count to 5")]):
                text += chunk.text

    with pytest.raises(LLMError, match=reason):
        run(scenario())
    assert text.startswith("0 1 ")
    assert server.count("requests") == 1


def test_a_reader_that_takes_its_time_is_not_the_silence_of_the_provider(server: OpenAIServer) -> None:
    async def scenario() -> str:
        async with service(provider("one", server.url(), silence_timeout_s=3.0)) as llm:
            stream = llm.stream([Message("user", "count to 400")])
            text = (await anext(stream)).text
            await asyncio.sleep(3.5)
            return text + "".join([chunk.text async for chunk in stream])

    assert run(scenario()) == "".join(f"{number} " for number in range(400))


def test_closing_the_stream_cancels_the_request_at_the_provider(server: OpenAIServer) -> None:
    async def scenario() -> dict[str, Any]:
        async with service(provider("one", server.url("endless"))) as llm:
            stream = llm.stream([Message("user", "count to 5")])
            await anext(stream)
            await stream.aclose()
            await asyncio.to_thread(server.wait, "cancelled", 1)
            return llm.metrics()

    metrics = run(scenario())
    assert (metrics["cancelled"], metrics["active"], metrics["failed"]) == (1, 0, 0)


def test_cancelling_the_task_cancels_the_request_at_the_provider(server: OpenAIServer) -> None:
    async def scenario() -> None:
        async with service(provider("one", server.url("silent"))) as llm:
            task = asyncio.ensure_future(llm.complete(HELLO))
            await asyncio.to_thread(server.wait, "requests", 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(server.wait, "cancelled", 1)

    run(scenario())


# ------------------------------------------------------------------------------------------------------------ choice


def test_a_model_that_is_named_is_asked_only_of_those_who_offer_it(server: OpenAIServer) -> None:
    async def scenario() -> list[tuple[str, str]]:
        small = provider("one", server.url(), model="small", models=("large",))
        big = provider("two", server.url("500"), model="huge", retries=0)
        async with service(small, big) as llm:
            assert llm.models == ["small", "large", "huge"]
            answers = [await llm.complete(HELLO, model=model) for model in (None, "large")]
            with pytest.raises(LLMError, match="two answers 500"):
                await llm.complete(HELLO, model="huge")
            with pytest.raises(LLMError, match="known: small, large, huge") as told:
                await llm.complete(HELLO, model="none")
            assert told.value.status == 404
            return [(answer.provider, answer.model) for answer in answers]

    assert run(scenario()) == [("one", "small"), ("one", "large")]


def test_flat_settings_make_a_provider_that_is_asked_first(server: OpenAIServer) -> None:
    other = provider("other", server.url("500"), model="o")
    answer = run(ask(other, base_url=server.url(), model="flat", api_key=segue.Secret("key-1")))
    assert (answer.provider, answer.model) == ("default", "flat")
    assert server.seen()[0]["authorization"] == "Bearer key-1"


def test_a_configured_provider_is_not_silently_replaced_by_the_offline_responder() -> None:
    url = refused_url()
    down = LLMSettings(providers=(provider("one", url, retries=0),))
    assert [each.name for each in down.asked()] == ["one"]
    with pytest.raises(LLMError, match="can't be reached"):
        run(ask(provider("one", url, retries=0)))
    answer = run(ask(provider("one", url, retries=0), fallback_offline=True))
    assert answer.provider == "offline"
    assert "no language model" in answer.text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"base_url": "http://127.0.0.1:1"}, "model is missing"),
        ({"providers": [{"name": "a", "model": "m", "base_url": "ftp://x"}]}, "base_url is http"),
        ({"providers": [{"name": "a"}]}, "model is missing"),
        ({"providers": [{"name": "a", "model": "m"}, {"name": "a", "model": "n"}]}, "two providers named a"),
        ({"providers": [{"name": "a", "model": "m", "colour": 1}]}, "unknown field `colour`"),
        ({"providers": [{"name": "a", "model": "m", "retries": "many"}]}, "retries"),
    ],
)
def test_settings_that_cant_be_are_refused_with_what_is_wrong(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(settings, LLMSettings)


def test_an_unknown_model_in_the_settings_names_the_known_ones() -> None:
    with pytest.raises(segue.Unknown, match="known: m, n"):
        LLMSettings(
            providers=(Provider("a", model="m", models=("n",), base_url="http://127.0.0.1"),), model="x"
        )


def test_a_key_comes_from_a_file_or_a_variable(
    server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    monkeypatch.setenv("MY_KEY", "from-variable")
    run(ask(provider("a", server.url(), api_key_file=str(file))))
    run(ask(provider("a", server.url(), api_key_env="MY_KEY")))
    assert [seen["authorization"] for seen in server.seen()] == ["Bearer from-file", "Bearer from-variable"]
    with pytest.raises(LLMError, match=r"\$OTHER is not set"):
        run(ask(provider("a", server.url(), api_key_env="OTHER")))
    with pytest.raises(LLMError, match="can't be read: No such file"):
        run(ask(provider("a", server.url(), api_key_file=str(tmp_path / "none"))))


def test_a_key_that_a_server_repeats_is_not_shown(server: OpenAIServer) -> None:
    with pytest.raises(LLMError, match="bad credentials") as told:
        run(ask(provider("a", server.url("indiscreet"), api_key=segue.Secret("very-s3cret"))))
    assert "s3cret" not in str(told.value)
    assert "s3cret" not in repr(
        LLMSettings(providers=(provider("a", "", api_key=segue.Secret("very-s3cret")),))
    )


def test_openais_own_server_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(LLMError, match="api_key is missing"):
        run(ask(Provider("own", model="m")))


# ------------------------------------------------------------------------------------------------------------- swaps


def declared(settings: LLMSettings) -> tuple[segue.Services, segue.Service[MultiLLMService]]:
    services = segue.Services()
    lis = services.declare("lis", LIS, settings=LISSettings)

    def make(lis: LIS, previous: MultiLLMService | None, settings: LLMSettings) -> MultiLLMService:
        first = settings if settings != LLMSettings() else given
        return MultiLLMService(first, lis, previous)

    given = settings
    return services, services.declare("llm", make, requires=[lis], settings=LLMSettings)


def test_a_hundred_swaps_break_none_of_fifty_streams(server: OpenAIServer) -> None:
    streams, swaps, words = 50, 100, 20

    async def scenario() -> tuple[int, int, dict[str, Any]]:
        # at a pace at which this process has time for the swaps, too, however slow the machine is
        services, llm = declared(
            LLMSettings(base_url=server.url("leisurely"), model="m", probe_timeout_s=60.0)
        )
        swapped = asyncio.Event()
        whole = broken = 0

        async def client() -> None:
            nonlocal whole, broken
            while not swapped.is_set():
                with llm.lease() as leased:
                    said = ""
                    try:
                        async for chunk in leased.stream([Message("user", f"count to {words}")]):
                            said += chunk.text
                    except LLMError:
                        broken += 1
                        continue
                    good = said == "".join(f"{number} " for number in range(words))
                    whole, broken = whole + good, broken + (not good)

        async with services:
            clients = [asyncio.ensure_future(client()) for _ in range(streams)]
            for number in range(swaps):
                # every tenth goes to another address, with a new client; the others keep the old one's connections
                if number % 10 == 9:
                    await services.reload("llm", base_url=server.url(f"leisurely{number}"))
                else:
                    await services.reload("llm")
            swapped.set()
            await asyncio.gather(*clients)
            assert llm.version == swaps + 1
            return whole, broken, llm.current.metrics()

    whole, broken, metrics = run(scenario())
    assert broken == 0
    assert whole >= streams
    assert (metrics["failed"], metrics["broken"], metrics["active"]) == (0, 0, 0)
    assert metrics["requests"] == whole, "the counts go on over swaps"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "answers 500"),
        ("401", "wrong key"),
        ("html", "isn't JSON"),
        ("silent", "did not answer within 3 s"),
        (None, "can't be reached"),
    ],
)
def test_a_swap_to_a_provider_that_does_not_serve_is_refused_and_the_old_one_goes_on(
    server: OpenAIServer, fault: str | None, reason: str
) -> None:
    limit_s = 3.0 if fault == "silent" else 60.0

    async def scenario() -> None:
        one = provider("one", server.url())
        services, llm = declared(LLMSettings(providers=(one,), probe_timeout_s=limit_s))
        async with services:
            before = llm.current
            url = refused_url() if fault is None else server.url(fault)
            with pytest.raises(segue.SwapRefusedError, match=reason):
                await services.reload("llm", base_url=url, model="m")
            assert llm.current is before
            assert (await llm.current.complete(HELLO)).text == "You said hello"
            await services.reload("llm", base_url=url, model="m", probe="false")
            assert llm.version == 2

    run(scenario())


def test_a_provider_that_is_down_keeps_no_worker_from_starting_and_no_other_swap_from_happening() -> None:
    async def scenario() -> None:
        services, llm = declared(LLMSettings(providers=(provider("one", refused_url(), retries=0),)))
        async with services:
            with pytest.raises(LLMError):
                await llm.current.complete(HELLO)
            assert llm.current.health()["ok"] is False
            await services.reload("llm", fallback_offline="true")
            assert (await llm.current.complete(HELLO)).provider == "offline"

    run(scenario())


def test_without_the_extra_the_error_names_it_and_nothing_else_needs_it() -> None:
    code = """
import asyncio, sys
sys.modules["openai"] = None
from segue.worker.backend.lis import LIS, LISSettings
from segue.worker.backend.llm import LLMError, LLMSettings, MultiLLMService, Provider
from segue.worker.backend.conversation import Message

async def main():
    llm = MultiLLMService(LLMSettings(), LIS(LISSettings()))
    await llm.start()
    print((await llm.complete([Message("user", "hello")])).text)
    try:
        await MultiLLMService(
            LLMSettings(base_url="http://127.0.0.1:1/v1", model="m"), LIS(LISSettings())).start()
    except LLMError as error:
        print(error)
    print(sorted(name for name in ("httpx2", "mcp", "pydantic") if name in sys.modules))
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment(), check=True
    )
    answer, error, imported = done.stdout.splitlines()
    assert "no language model" in answer
    assert "pip install 'segue[ai]'" in error
    assert imported == "[]"


# ----------------------------------------------------------------------------------------------------------- offline


def test_the_offline_responder_says_what_it_is_and_always_the_same() -> None:
    first, second = (run(ask(said="how are you?", offline_pause_s=0)) for _ in range(2))
    assert first == second
    assert (first.provider, first.model) == ("offline", "offline")
    assert "no language model" in first.text
    assert "how are you?" in first.text


@pytest.mark.parametrize(
    ("said", "call"),
    [
        ("what time is it?", ("current_time", "{}")),
        ("Calculate 2*21", ("calculate", '{"expression": "2*21"}')),
        ("how much is (1+2) * 3?", ("calculate", '{"expression": "(1+2) * 3"}')),
        ('use calculate {"expression": "1"}', ("calculate", '{"expression": "1"}')),
        ("call current_time", ("current_time", "{}")),
        ("use nothing at all", None),
        ("what is love?", None),
    ],
)
def test_the_offline_responder_calls_the_tool_that_is_asked_for(
    said: str, call: tuple[str, str] | None
) -> None:
    async def scenario() -> Completion:
        async with service(offline_pause_s=0) as llm:
            return await llm.complete([Message("user", said)], tools=[CLOCK, CALCULATOR])

    answer = run(scenario())
    assert [(each.name, each.arguments) for each in answer.tool_calls] == ([call] if call else [])


def test_the_offline_responder_tells_what_the_tool_said() -> None:
    async def scenario() -> Completion:
        call = ToolCall("x", "calculate", "{}")
        turn = [*HELLO, Message("assistant", "", (call,)), Message("tool", "42", tool_call_id="x")]
        async with service(offline_pause_s=0) as llm:
            return await llm.complete(turn, tools=[CALCULATOR])

    assert run(scenario()).text == "calculate says: 42"


# --------------------------------------------------------------------------------------------------------------- LIS


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lis_at(**settings: Any) -> tuple[LIS, Clock]:
    clock = Clock()
    return LIS(LISSettings(**settings), None, clock), clock


def counts(lis: LIS) -> tuple[int, int]:
    metrics = lis.metrics()
    return metrics["incidents_recent"], metrics["antibodies_recent"]


def test_three_failures_within_a_minute_are_an_incident_and_open_a_breaker() -> None:
    lis, clock = lis_at()
    for seconds in (0, 31, 31):  # the first is too old by the third
        clock.now += seconds
        lis.failed("tool:a", "no")
    assert counts(lis) == (0, 0)
    clock.now += 5
    lis.failed("tool:a", "no")
    assert counts(lis) == (1, 0)
    assert not lis.breaker_open("tool:b")
    assert lis.breaker_open("tool:a")
    assert counts(lis) == (1, 1), "a caller was kept away"


def test_an_open_breaker_lets_one_try_and_closes_or_stays_open_for_longer() -> None:
    lis, clock = lis_at(cool_down_s=30)
    for _ in range(3):
        lis.failed("llm:a", "no")
    clock.now += 31
    assert [lis.breaker_open("llm:a") for _ in range(3)] == [False, True, True]
    lis.failed("llm:a", "still not")
    clock.now += 59
    assert lis.breaker_open("llm:a")
    clock.now += 2
    assert not lis.breaker_open("llm:a")
    lis.answered("llm:a", "here I am")
    assert not any(lis.breaker_open("llm:a") for _ in range(3))
    assert counts(lis) == (1, 1)


def test_a_try_of_which_nothing_is_heard_makes_way_for_another() -> None:
    lis, clock = lis_at(cool_down_s=30)
    for _ in range(3):
        lis.failed("llm:a", "no")
    clock.now += 31
    assert not lis.breaker_open("llm:a")
    clock.now += 31
    assert not lis.breaker_open("llm:a")


def test_incidents_and_antibodies_are_recent_for_an_hour() -> None:
    lis, clock = lis_at()
    lis.answered("llm:a", "  ")
    assert lis.advice("llm:a") == Sampling(temperature=0.9)
    lis.answered("llm:a", "good", advised=True)
    assert counts(lis) == (1, 1)
    clock.now += 3599
    assert counts(lis) == (1, 1)
    clock.now += 2
    assert counts(lis) == (0, 0)
    assert lis.advice("llm:a") is None


def test_an_antibody_counts_only_once_it_has_helped() -> None:
    lis, _ = lis_at()
    lis.answered("llm:a", "x" * 200)
    assert counts(lis) == (1, 0)
    lis.answered("llm:a", "x" * 200, advised=True)
    assert counts(lis) == (2, 0)
    assert lis.advice("llm:a") == Sampling(temperature=1.0, frequency_penalty=1.2), (
        "stronger, since it did not help"
    )
    lis.answered("llm:a", "good", advised=True)
    assert counts(lis) == (2, 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x" * 199, False),
        ("x" * 200, True),
        ("The same sentence, which is longer than forty characters. " * 4, False),
        ("The same sentence, which is longer than forty characters. " * 5, True),
        (" ".join(map(str, range(500))), False),
        ("", False),
    ],
)
def test_a_repetition_is_the_same_forty_characters_five_times(text: str, found: bool) -> None:
    assert (repeated(text) is not None) is found


def test_a_tool_may_answer_nothing() -> None:
    lis, _ = lis_at()
    assert lis.answered("tool:a", "")
    assert counts(lis) == (0, 0)


def test_what_was_learnt_goes_on_over_a_swap() -> None:
    lis, clock = lis_at()
    for _ in range(3):
        lis.failed("llm:a", "no")
    new = LIS(LISSettings(), lis, clock)
    assert new.breaker_open("llm:a")
    assert counts(new) == (1, 1)


def test_an_empty_answer_is_asked_for_again_with_other_sampling(server: OpenAIServer) -> None:
    async def scenario() -> tuple[Sequence[str], LIS]:
        lis = LIS(LISSettings())
        async with service(provider("one", server.url("empty-at-first")), lis=lis) as llm:
            first = await llm.complete(HELLO, sampling=Sampling(temperature=0.1))
            second = await llm.complete(HELLO)
            return [first.text, second.text], lis

    answers, lis = run(scenario())
    assert answers == ["You said hello", "You said hello"]
    assert [seen["body"].get("temperature") for seen in server.seen()] == [0.1, 0.9, 0.9]
    assert counts(lis) == (1, 1)


def test_an_answer_that_stays_empty_is_given_as_it_is(server: OpenAIServer) -> None:
    lis = LIS(LISSettings())
    answer = run(ask(provider("one", server.url("empty")), lis=lis))
    assert (answer.text, answer.finish) == ("", "stop")
    assert server.count("requests") == 2
    assert counts(lis) == (2, 0)


def test_after_an_answer_that_repeats_itself_the_next_one_is_sampled_otherwise(server: OpenAIServer) -> None:
    async def scenario() -> LIS:
        lis = LIS(LISSettings())
        async with service(provider("one", server.url("loop")), lis=lis) as llm:
            await llm.complete(HELLO)
            await llm.complete(HELLO, sampling=Sampling(temperature=0.2))
        return lis

    lis = run(scenario())
    assert counts(lis) == (2, 0)
    first, second = (seen["body"] for seen in server.seen())
    assert "frequency_penalty" not in first
    assert (second["temperature"], second["frequency_penalty"]) == (0.2, 0.5), "what the caller says stays"


def test_a_provider_that_fails_again_and_again_is_left_out(server: OpenAIServer) -> None:
    async def scenario() -> LIS:
        lis = LIS(LISSettings())
        bad = provider("bad", server.url("500"), retries=0)
        async with service(bad, provider("good", server.url()), lis=lis) as llm:
            for _ in range(6):
                assert (await llm.complete(HELLO)).provider == "good"
        return lis

    lis = run(scenario())
    tally = [
        (fault, len(list(group)))
        for fault, group in itertools.groupby(sorted(s["fault"] for s in server.seen()))
    ]
    assert tally == [("500", 3), ("ok", 6)]
    assert counts(lis) == (1, 1)

"""The built-in backend under a real master, as its clients meet it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from scenario import HOT, Segue, supervised


@contextlib.contextmanager
def backend(directory: Path, settings: str = "", workers: int = 2) -> Iterator[Segue]:
    (directory / "segue.toml").write_text(settings)
    env = {"XDG_STATE_HOME": str(directory / "state"), "HOME": str(directory)}
    with supervised("--workers", str(workers), cwd=directory, env=env) as master:
        yield master
        master.stop(None)


@pytest.fixture
def http(tmp_path: Path) -> Iterator[httpx2.Client]:
    """A client of a backend with nothing configured."""
    with backend(tmp_path) as master, httpx2.Client(base_url=f"http://127.0.0.1:{master.port}") as client:
        client.master = master  # type: ignore[attr-defined]
        yield client


def master_of(client: httpx2.Client) -> Segue:
    return client.master  # type: ignore[attr-defined, no-any-return]


def events(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def test_a_chat_works_with_nothing_configured_and_says_that_it_is_no_model(http: httpx2.Client) -> None:
    said = http.post("/api/v1/chat", json={"message": "tell me about yourself", "session": "a"}).json()
    assert said["provider"] == "offline"
    assert "no language model" in said["text"] + said["model"]
    assert said["generation"] == 1
    streamed = http.post("/api/v1/chat", json={"message": "calculate 6*7", "session": "a", "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    names = [name for name, _ in events(streamed.text)]
    assert names[0] == "start"
    assert names[-1] == "done"
    assert "tool" in names
    done = events(streamed.text)[-1][1]
    assert "42" in done["text"]
    assert "".join(data["text"] for name, data in events(streamed.text) if name == "token") == done["text"]
    turns = http.get("/api/v1/sessions/a").json()
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert [session["session"] for session in http.get("/api/v1/sessions").json()] == ["a"]


def test_tools_and_memory(http: httpx2.Client) -> None:
    listed = http.get("/api/v1/tools").json()
    names = [tool["name"] for tool in listed["tools"]]
    assert names
    assert listed["problems"] == {}
    unknown = http.post("/api/v1/tools/nothing", json={"arguments": {}})
    assert unknown.status_code == 404
    assert unknown.json()["known"] == sorted(names)
    wrong = http.post(f"/api/v1/tools/{names[0]}", json={"arguments": {"surely": "wrong"}}).json()
    assert wrong["ok"] is False
    assert http.post("/api/v1/memory", json={"text": "the tea is in the blue box"}).status_code == 201
    found = http.get("/api/v1/memory", params={"q": "blue tea"}).json()
    assert found[0]["text"] == "the tea is in the blue box"
    assert http.get("/api/v1/memory", params={"q": "\"' OR * NEAR("}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/v1/chat", {"message": " "}, 400),
        ("/api/v1/chat", {"message": 1}, 400),
        ("/api/v1/chat", {"massage": "x"}, 400),
        ("/api/v1/chat", {"message": "x", "session": "../etc"}, 400),
        ("/api/v1/chat", {"message": "x" * 200_000}, 413),
        ("/api/v1/memory", {"text": ""}, 400),
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "model": "none"}, 404),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
    ],
)
def test_bad_input_is_refused_with_the_reason(
    http: httpx2.Client, path: str, body: dict[str, Any], status: int
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == status, answer.text
    document = answer.json()
    assert document["error"]["message"] if path.startswith("/v1/") else document["detail"]
    broken = http.post(path, content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400


def test_the_description_names_every_endpoint(http: httpx2.Client) -> None:
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert {"/api/v1/chat", "/v1/chat/completions", "/v1/models", "/api/v1/memory"} <= document[
        "paths"
    ].keys()
    text = json.dumps(document)
    for name in document["components"]["schemas"]:
        assert text.count(f'#/components/schemas/{name}"') >= 1, name


def test_swaps_name_what_was_rewired_and_unknown_names_are_told(http: httpx2.Client) -> None:
    master = master_of(http)
    for target, rewired in (
        ("llm", {"ToolDispatcher", "DialogueManager"}),
        ("personality?profile=warm", {"EmotionSystem", "DialogueManager"}),
        ("tools", {"DialogueManager"}),
        ("tools?tool=clock", {"DialogueManager"}),
        ("mcp", {"ToolDispatcher"}),
        ("memory", {"DialogueManager"}),
    ):
        code, answer = master.call("POST", f"{HOT}/reload/{target}")
        assert code == 200, answer
        assert rewired <= set(answer["rewired"]), (target, answer["rewired"])
    code, answer = master.call("POST", f"{HOT}/reload/personality?profile=nobody")
    assert (code, "warm" in answer["known"]) == (404, True), answer
    code, answer = master.call("POST", f"{HOT}/reload/tools?tool=nothing")
    assert (code, "clock" in answer["known"]) == (404, True), answer
    assert http.get("/api/v1/about").json()["personality"] == "warm"
    master.reload("--wait", "drained")
    assert http.get("/api/v1/about").json()["personality"] == "warm"
    assert master.command("reload", "personality", "--profile", "plain").returncode == 0
    assert master.command("reload", "tools", "--tool", "clock").returncode == 0
    document = master.status()
    assert all(
        document["services_initialized"][key]
        for key in ("llm_interface", "ham_manager", "personality_manager")
    )
    assert document["mcp"]["fallback_enabled"] is True
    assert document["metrics"]["memory"]["ham_store_size"] == 0
    lis = document["metrics"]["lis"]
    assert (lis["incidents_recent"], lis["antibodies_recent"]) == (0, 0)
    tools = document["metrics"]["tools"]
    assert tools.keys() >= {"total_invocations", "recent_failures", "success_rate", "avg_latency"}


def test_a_drain_rejects_what_creates_work_and_answers_the_rest(http: httpx2.Client) -> None:
    master = master_of(http)
    assert master.command("drain", "start").returncode == 0
    assert http.post("/api/v1/chat", json={"message": "x"}).status_code == 503
    assert http.post("/v1/chat/completions", json={"messages": []}).status_code == 503
    assert http.get("/api/v1/about").status_code == 200
    assert http.get("/").status_code == 200
    assert master.command("drain", "stop").returncode == 0
    assert http.post("/api/v1/chat", json={"message": "x"}).status_code == 200


def test_the_official_client_streams_over_generation_swaps_and_llm_swaps_on_one_connection(
    tmp_path: Path,
) -> None:
    with backend(tmp_path, "[services.llm]\noffline_pause_s = 0.02\n") as master:
        pool = httpx2.Client(limits=httpx2.Limits(max_connections=1, max_keepalive_connections=1))
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{master.port}/v1", api_key="none", max_retries=0, http_client=pool
        )
        model = client.models.list().data[0].id
        ask: Any = {
            "model": model,
            "messages": [{"role": "user", "content": "repeat after me: " + " ".join(map(str, range(60)))}],
        }
        expected = client.chat.completions.create(**ask).choices[0].message.content
        assert expected
        ended, told = threading.Event(), threading.Event()
        swaps: list[int] = []
        errors: list[str] = []

        def change() -> None:
            for number in range(20):
                for target in ("/reload", "/reload/llm"):
                    code, answer = master.call("POST", f"{HOT}{target}")
                    if code != 200:
                        errors.append(json.dumps(answer))
                swaps.append(number)
                told.set()
            ended.set()

        changer = threading.Thread(target=change)
        changer.start()
        outlasting = 0
        while not ended.is_set():
            before = len(swaps)
            said = ""
            with client.chat.completions.create(**ask, stream=True) as stream:
                for chunk in stream:
                    said += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            assert said == expected
            outlasting += len(swaps) > before
            assert client.chat.completions.create(**ask).choices[0].message.content == expected
        changer.join(60)
        assert not errors
        assert outlasting
        pool.close()

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
from backends import Backend, backend, events
from openai_server import openai_server
from scenario import HOT

import segue


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Backend]:
    """A backend with nothing configured."""
    with backend(tmp_path) as found:
        yield found


@pytest.fixture
def http(running: Backend) -> httpx2.Client:
    return running.http


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


REWIRED = {
    "llm": ["ToolDispatcher", "DialogueManager"],
    "personality?profile=warm": ["EmotionSystem", "DialogueManager"],
    "tools": ["DialogueManager"],
    "tools?tool=clock": ["DialogueManager"],
    "mcp": ["ToolDispatcher"],
    "emotion": ["DialogueManager"],
    "memory": ["DialogueManager"],
    "lis": ["MultiLLMService", "ToolDispatcher", "DialogueManager"],
    "dialogue": [],
}


def test_swaps_name_what_was_rewired_and_unknown_names_are_told(running: Backend) -> None:
    master = running.master
    for target, rewired in REWIRED.items():
        code, answer = master.call("POST", f"{HOT}/reload/{target}")
        assert (code, answer["rewired"]) == (200, rewired), (target, answer)
        for worker in answer["workers"]:
            assert worker["rewired"] == rewired
            assert worker["health"] is None or worker["health"]["ok"], worker
    for target, known in (
        ("personality?profile=nobody", "warm"),
        ("tools?tool=nothing", "clock"),
        ("nothing", "llm"),
    ):
        code, answer = master.call("POST", f"{HOT}/reload/{target}")
        assert (code, known in answer["known"]) == (404, True), answer
        assert known in answer["detail"]
    for arguments, known in (
        (("personality", "--profile", "nobody"), "terse"),
        (("tools", "--tool", "nothing"), "clock"),
        (("nothing",), "personality"),
    ):
        done = master.command("reload", *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            f"there is no {arguments[-2].removeprefix('--') if len(arguments) > 1 else 'service'}"
            in done.stderr
        )
        assert known in done.stderr
    assert running.http.get("/api/v1/about").json()["personality"] == "warm"
    master.reload("--wait", "drained")
    assert running.http.get("/api/v1/about").json()["personality"] == "warm", "it is remembered"
    done = master.command("reload", "personality", "--profile", "plain")
    assert done.returncode == 0
    assert "rewired: EmotionSystem, DialogueManager" in done.stdout
    assert master.command("reload", "tools", "--tool", "clock").returncode == 0
    assert master.command("reload", "llm").returncode == 0


def test_the_status_has_what_is_asked_of_every_application(running: Backend) -> None:
    document = running.master.status()
    assert document["draining"] is False
    initialized = document["services_initialized"]
    assert all(initialized[key] is True for key in ("llm_interface", "ham_manager", "personality_manager"))
    assert document["mcp"] == {"mcp_available": True, "is_connected": False, "fallback_enabled": True}
    metrics = document["metrics"]
    assert metrics["mcp"]["is_connected"] is False
    assert metrics["mcp"]["fallback_initialized"] is True
    assert metrics["memory"]["ham_store_size"] == 0
    assert (metrics["lis"]["incidents_recent"], metrics["lis"]["antibodies_recent"]) == (0, 0)
    assert metrics["tools"].keys() >= {"total_invocations", "recent_failures", "success_rate", "avg_latency"}
    running.say("hello")
    running.say("what time is it?")
    running.call("calculate", expression="1+1")
    metrics = running.master.status()["metrics"]
    assert metrics["memory"]["ham_store_size"] == 4, "a store that all workers share is counted once"
    assert metrics["tools"]["total_invocations"] == 2
    assert metrics["tools"]["success_rate"] == 1.0


def test_each_part_is_a_class_of_its_name_in_a_module_of_its_own() -> None:
    from segue.worker.backend import assembly

    declared = segue.Services()
    assembly.declare(declared)
    kinds = [each.factory for each in declared._declarations.values()]
    assert [kind.__name__ for kind in kinds] == [each.title for each in declared._declarations.values()]
    assert {kind.__name__ for kind in kinds} >= {
        "MultiLLMService",
        "ToolDispatcher",
        "PersonalityManager",
        "EmotionSystem",
        "DialogueManager",
        "HAMMemoryManager",
        "MCPConnector",
        "LIS",
    }
    assert len({kind.__module__ for kind in kinds}) == len(kinds)


def test_a_drain_rejects_what_creates_work_and_answers_the_rest(running: Backend) -> None:
    master, http = running.master, running.http
    assert master.command("drain", "start").returncode == 0
    for path, body in (
        ("/api/v1/chat", {"message": "x"}),
        ("/api/v1/tools/clock", {}),
        ("/api/v1/memory", {"text": "x"}),
        ("/v1/chat/completions", {"messages": []}),
    ):
        refused = http.post(path, json=body)
        assert (refused.status_code, refused.json()["status"]) == (503, 503), path
        assert int(refused.headers["retry-after"]) > 0
    for path in ("/", "/api/v1/about", "/api/v1/tools", "/api/v1/sessions", "/v1/models", "/openapi.json"):
        assert http.get(path).status_code == 200, path
    assert master.command("drain", "stop").returncode == 0
    assert http.post("/api/v1/chat", json={"message": "x"}).status_code == 200


def test_a_drain_that_queues_holds_a_chat_and_answers_it_after(running: Backend) -> None:
    master = running.master
    assert master.command("drain", "start", "--mode", "queue").returncode == 0
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(running.say("patience")))
    asking.start()
    master.wait_status(lambda s: any(w["queue"]["waiting"] for g in s["generations"] for w in g["workers"]))
    assert not answers
    assert master.command("drain", "stop").returncode == 0
    asking.join(60)
    assert "patience" in answers[0]["text"]


def test_what_is_not_there_is_told_as_a_problem(http: httpx2.Client) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/api/v1/nothing", 404),
        ("PUT", "/api/v1/chat", 405),
        ("POST", "/", 405),
    ):
        answer = http.request(method, path)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert path in answer.json()["detail"]
    assert http.request("PUT", "/api/v1/chat").headers["allow"] == "POST"


def test_the_page_asks_nothing_of_other_hosts_and_other_sites_ask_nothing_of_it(http: httpx2.Client) -> None:
    page = http.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    again = http.get("/chat.js", headers={"If-None-Match": http.get("/chat.js").headers["etag"]})
    assert again.status_code == 304
    for site, status in (("cross-site", 403), ("same-origin", 200), ("none", 200)):
        asked = http.post("/api/v1/chat", json={"message": "x"}, headers={"Sec-Fetch-Site": site})
        assert asked.status_code == status, site


def test_a_conversation_without_a_name_gets_one_of_its_own(http: httpx2.Client) -> None:
    first, second = (http.post("/api/v1/chat", json={"message": "hello"}).json() for _ in range(2))
    assert first["session"] != second["session"]
    assert "(message 1 of this" in second["text"]
    again = http.post("/api/v1/chat", json={"message": "more", "session": first["session"]}).json()
    assert "(message 2 of this" in again["text"]
    asked = http.post("/api/v1/chat", json={"message": "x"}, headers={"Accept": "text/event-stream"})
    assert events(asked.text)[0][1]["session"] == events(asked.text)[-1][1]["session"]


def test_models_are_listed_and_found_by_name(running: Backend) -> None:
    client = openai.OpenAI(base_url=f"{running.http.base_url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["offline"]
    assert client.models.retrieve("offline").object == "model"
    with pytest.raises(openai.NotFoundError, match="known: offline"):
        client.models.retrieve("nobody/nothing")
    client.close()


def test_what_a_client_asks_of_the_model_reaches_it(tmp_path: Path) -> None:
    with openai_server() as server:
        settings = f'[services.llm]\nbase_url = "{server.url()}"\nmodel = "m"\n'
        with backend(tmp_path, settings, workers=1) as running:
            client = openai.OpenAI(base_url=f"{running.http.base_url}/v1", api_key="none", max_retries=0)
            client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "hello"}],
                temperature=0.5,
                max_tokens=7,
                seed=3,
                presence_penalty=0.5,
                response_format={"type": "json_object"},
                tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
                tool_choice="none",
                extra_body={"top_k": 40},
            )
            client.close()
        (asked,) = server.seen()
        for key, value in {
            "model": "m",
            "temperature": 0.5,
            "max_tokens": 7,
            "seed": 3,
            "presence_penalty": 0.5,
            "response_format": {"type": "json_object"},
            "tool_choice": "none",
            "top_k": 40,
            "stream": True,
        }.items():
            assert asked["body"][key] == value, key


COUNT = 60


class Draining(httpx2.SyncByteStream):
    """The official client hangs up when it has read ``[DONE]``; this reads what is left of the answer, so that it needn't."""

    def __init__(self, stream: httpx2.SyncByteStream) -> None:
        self._stream, self._pieces = stream, iter(stream)

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def close(self) -> None:
        for _ in self._pieces:
            pass
        self._stream.close()


class OneConnection(httpx2.HTTPTransport):
    """A pool of one connection, which notes each that it has ever had."""

    def __init__(self) -> None:
        super().__init__(limits=httpx2.Limits(max_connections=1, max_keepalive_connections=1))
        self.seen: set[Any] = set()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        self.seen.add(response.extensions["network_stream"].get_extra_info("client_addr"))
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = Draining(response.stream)
        return response


@pytest.mark.timeout(600)
def test_the_official_client_streams_over_generation_swaps_and_llm_swaps_on_one_connection(
    tmp_path: Path,
) -> None:
    """Each stream is held in the middle until a generation and the model have been replaced under it."""
    with openai_server() as server, contextlib.ExitStack() as stack:
        settings = f'[services.llm]\nbase_url = "{server.url("held")}"\nmodel = "m"\n'
        master = stack.enter_context(backend(tmp_path, settings, workers=1)).master
        pool = OneConnection()
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{master.port}/v1",
            api_key="none",
            max_retries=0,
            http_client=stack.enter_context(httpx2.Client(transport=pool)),
        )
        for number in range(1, 21):
            ask: Any = {"model": "m", "stream": True}
            ask["messages"] = [{"role": "user", "content": f"count to {COUNT + number}, and hold"}]
            with client.chat.completions.create(**ask) as streamed:
                server.wait("held", number)
                for target in ("/reload", "/reload/llm"):
                    code, answer = master.call("POST", f"{HOT}{target}")
                    assert code == 200, answer
                server.release()
                tokens = [chunk.choices[0].delta.content for chunk in streamed if chunk.choices]
            assert [token for token in tokens if token] == [f"{n} " for n in range(COUNT + number)]
            whole = client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": f"count to {number}"}]
            )
            assert whole.choices[0].message.content == "".join(f"{n} " for n in range(number))
            assert whole.usage is not None
            assert whole.usage.completion_tokens == number
        assert master.status()["current"] == 21
        assert len(pool.seen) == 1, "the one connection was never closed"
        assert server.count("cancelled") == 0

"""Two agents, each a real master with workers, and a broker between them: what their users see over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
from hsp_harness import broker
from scenario import DEADLINE_S, HOT, Segue, supervised

from bench.broker import Broker


def written(server: Broker | None, name: str, more: str = "") -> str:
    where = f'host = "127.0.0.1"\nport = {server.port}\n' if server is not None else ""
    quick, patient = "reconnect_first_s = 0.05\n", "connect_timeout_s = 20\nbarrier_timeout_s = 20\n"
    return f'[services.hsp]\n{where}ai_id = "{name}"\n{quick}{patient}{more}'


@contextlib.contextmanager
def serving(directory: Path, settings: str, workers: int = 1) -> Iterator[tuple[Segue, httpx2.Client]]:
    directory.mkdir(exist_ok=True)
    (directory / "segue.toml").write_text(settings)
    env = {"XDG_STATE_HOME": str(directory / "state"), "HOME": str(directory)}
    with (
        supervised("--workers", str(workers), cwd=directory, env=env) as master,
        httpx2.Client(base_url=f"http://127.0.0.1:{master.port}", timeout=DEADLINE_S) as client,
    ):
        yield master, client
        master.stop(None)


def connected(document: dict[str, Any]) -> bool:
    hsp: dict[str, Any] = document["hsp"]
    return hsp == {"hsp_available": True, "is_connected": True, "fallback_enabled": False}


def know(count: int) -> Callable[[dict[str, Any]], bool]:
    """Whether each worker has heard of so many others: whichever is asked over HTTP has."""

    def holds(document: dict[str, Any]) -> bool:
        current = next(each for each in document["generations"] if each["current"])
        found = [each["services"]["learning"]["metrics"]["known_ai_count"] for each in current["workers"]]
        return all(each["value"] == count for each in found)

    return holds


def test_without_a_broker_it_says_so_and_works_in_the_process(tmp_path: Path) -> None:
    with serving(tmp_path / "alpha", "") as (master, http):
        status = master.status()
        assert status["hsp"] == {"hsp_available": True, "is_connected": False, "fallback_enabled": True}
        assert status["services_initialized"]["hsp_connector"] is True
        assert status["services"]["hsp"]["healthy"] is True
        learning = status["metrics"]["learning"]
        assert learning == {
            "known_ai_count": 0,
            "tools": {"total_invocations": 0, "recent_failures": 0, "success_rate": 0.0, "avg_latency": 0.0},
        }
        assert http.post("/api/v1/tools/calculate", json={"arguments": {"expression": "6*7"}}).json()["ok"]
        http.post("/api/v1/tools/calculate", json={"arguments": {"expression": "1/0"}})
        tools = master.status()["metrics"]["learning"]["tools"]
        assert (tools["total_invocations"], tools["recent_failures"]) == (2, 1)
        assert isinstance(tools["recent_failures"], int)
        assert tools["success_rate"] == 0.5
        assert isinstance(tools["avg_latency"], float)
        assert tools["avg_latency"] > 0
        assert http.get("/api/v1/peers").json() == []
        assert "fallback" in http.get("/api/v1/hsp").json()["kind"]
        said = http.post("/api/v1/hsp/facts", json={"topic": "weather", "payload": {"it": "rains"}})
        assert said.status_code == 202
        assert said.json()["waits_for_broker"] is True
        asked = http.post("/api/v1/hsp/tasks", json={"capability": "fly", "timeout_s": 0.2})
        assert asked.status_code == 504
        code, report = master.call("POST", f"{HOT}/reload/hsp")
        assert (code, report["rewired"]) == (200, [])
        assert master.command("reload", "hsp").returncode == 0
        assert master.command("reload", "learning").returncode == 0
        tools = master.status()["metrics"]["learning"]["tools"]
        assert tools["total_invocations"] == 2


BAD: list[tuple[str, dict[str, Any]]] = [
    ("facts", {"topic": "a/#", "payload": {}}),
    ("facts", {"topic": "", "payload": {}}),
    ("facts", {"topic": "a", "payload": []}),
    ("facts", {"payload": {}}),
    ("facts", {"topic": "a", "payload": {}, "ack": True}),
    ("facts", {"topic": "a", "payload": {"x": "y" * 1_000_001}}),
    ("tasks", {}),
    ("tasks", {"capability": ""}),
    ("tasks", {"capability": "x" * 200}),
    ("tasks", {"capability": "x", "timeout_s": -1}),
    ("tasks", {"capability": "x", "timeout_s": 1e9}),
    ("tasks", {"capability": "x", "recipient": "a/+"}),
    ("tasks", {"capability": "x", "parameters": 1}),
]


def test_bad_input_is_refused_with_the_reason(tmp_path: Path) -> None:
    with serving(tmp_path / "alpha", "") as (_, http):
        for path, body in BAD:
            answer = http.post(f"/api/v1/hsp/{path}", json=body)
            assert answer.status_code == 400, (path, body, answer.text)
            assert answer.json()["detail"]


def test_the_endpoints_are_described_and_what_makes_work_is_rejected_while_draining(tmp_path: Path) -> None:
    with serving(tmp_path / "alpha", "") as (master, http):
        paths = http.get("/openapi.json").json()["paths"]
        assert {"/api/v1/peers", "/api/v1/hsp", "/api/v1/hsp/facts", "/api/v1/hsp/tasks"} <= paths.keys()
        assert master.command("drain", "start").returncode == 0
        for path, body in (("facts", {"topic": "a", "payload": {}}), ("tasks", {"capability": "x"})):
            assert http.post(f"/api/v1/hsp/{path}", json=body).status_code == 503
        assert http.get("/api/v1/peers").status_code == 200
        assert master.command("drain", "stop").returncode == 0
        assert http.post("/api/v1/hsp/facts", json={"topic": "a", "payload": {}}).status_code == 202


def test_two_agents_know_each_other_and_work_for_each_other_over_swaps_and_reloads(tmp_path: Path) -> None:
    with (
        broker(tmp_path) as server,
        serving(tmp_path / "alpha", written(server, "alpha"), workers=2) as (alpha, http),
        serving(tmp_path / "beta", written(server, "beta")) as (beta, _),
    ):
        for master in (alpha, beta):
            master.wait_status(connected)
        alpha.wait_status(know(1))

        def peer() -> dict[str, Any]:
            found = http.get("/api/v1/peers").json()
            assert [each["ai_id"] for each in found] == ["beta"]
            return dict(found[0])

        assert peer()["online"] is True
        assert http.get("/api/v1/hsp").json()["kind"] == "MQTT 5"
        said = http.post("/api/v1/hsp/facts", json={"topic": "x", "payload": {"a": 1}, "requires_ack": True})
        assert said.json()["waits_for_broker"] is False
        wrong = http.post("/api/v1/hsp/tasks", json={"capability": "fly", "recipient": "beta"})
        assert wrong.status_code == 404
        assert "known: " in wrong.json()["detail"]
        alpha.wait_status(lambda _: "chat" in [each["name"] for each in peer()["capabilities"]])
        assert "calculate" in [each["name"] for each in peer()["capabilities"]]

        def ask(capability: str, **parameters: Any) -> httpx2.Response:
            order = {"capability": capability, "parameters": parameters, "recipient": "beta"}
            return http.post("/api/v1/hsp/tasks", json=order)

        assert "42" in ask("calculate", expression="6*7").json()["result"]["text"]
        assert "no language model" in ask("chat", message="tell me about yourself").json()["result"]["text"]
        assert ask("calculate", expression="1/0").status_code == 502
        assert ask("chat", message=7).status_code == 502
        for change in (["reload", "hsp"], ["reload"]):
            assert beta.command(*change).returncode == 0
            beta.wait_status(connected)
            assert "42" in ask("calculate", expression="6*7").json()["result"]["text"]
            assert alpha.command(*change).returncode == 0
            alpha.wait_status(connected)
        document = alpha.wait_status(know(1))
        assert document["metrics"]["learning"]["known_ai_count"] == 1
        beta.stop(None)
        alpha.wait_status(lambda _: not peer()["online"])

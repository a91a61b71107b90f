"""What bad input gets from a backend that serves: the old instance goes on, whoever asked gets the reason, nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from backends import LIGHT, MCP_SERVER, PATIENT, Backend, backend, mcp_child
from openai_server import OpenAIServer, openai_server, refused_url
from scenario import HOT, ROOT, NotStarted, free_port, made_directory


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    with openai_server() as found:
        yield found


@contextlib.contextmanager
def own_server() -> Iterator[OpenAIServer]:
    """One whose counts are the test's own."""
    with openai_server() as found:
        yield found


def swap_refused(running: Backend, target: str, reason: str, code: int = 409) -> None:
    """That swap is refused with the reason, over HTTP, and nothing has changed."""
    service = target.partition("?")[0]
    before = running.version(service)
    found, answer = running.master.call("POST", f"{HOT}/reload/{target}")
    assert (found, reason in answer["detail"]) == (code, True), answer
    assert running.version(service) == before


# ------------------------------------------------------------------------------------------------------------- llm


def provider(url: str, **more: Any) -> str:
    values = {"base_url": url, "model": "m"} | more
    return "[services.llm]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def providers(*given: dict[str, Any]) -> str:
    lines = []
    for each in given:
        lines.append("[[services.llm.providers]]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in ({"model": "m"} | each).items()]
    return "\n".join(lines) + "\n"


REMEMBERS = "[services.dialogue]\nmemory_timeout_s = 60.0\n"
"""So that an answer has what is remembered, however slow the machine is."""


def test_a_swap_to_a_provider_that_does_not_serve_changes_nothing(
    tmp_path: Path, server: OpenAIServer
) -> None:
    with backend(tmp_path, provider(server.url(), probe_timeout_s=8.0)) as running:
        for url, reason in {
            server.url("500"): "answers 500",
            server.url("401"): "wrong key",
            server.url("html"): "isn't JSON",
            server.url("silent"): "did not answer within 8 s",
            refused_url(): "can't be reached",
            "ftp://nowhere": "base_url",
        }.items():
            swap_refused(running, f"llm?base_url={url}", reason, 400 if url.startswith("ftp") else 409)
            assert running.say("still there?")["text"] == "You said still there?"
        done = running.master.command("reload", "llm", "--set", f"base_url={server.url('500')}")
        assert done.returncode == 1
        assert "answers 500" in done.stderr
        code, _ = running.master.call("POST", f"{HOT}/reload/llm?base_url={server.url('paced')}")
        assert code == 200
        assert running.say("and now?")["text"] == "You said and now?"


def test_a_provider_that_does_not_begin_to_answer_is_replaced_by_the_next_and_nobody_notices(
    tmp_path: Path, server: OpenAIServer
) -> None:
    faults = ["500", "429", "slow", "silent", "garbage", "shapes", "html", "nothing"]
    bad = [
        {"name": f"bad-{fault}", "base_url": server.url(fault), "first_token_timeout_s": 0.5, "retries": 1}
        for fault in faults
    ]
    good = {"name": "good", "base_url": server.url(), "first_token_timeout_s": 60.0}
    settings = providers(*bad, good) + REMEMBERS
    with backend(tmp_path, settings, workers=1) as running:
        said = running.say("hello")
        assert (said["text"], said["provider"], said["problems"]) == ("You said hello", "good", [])
        metrics = running.master.status()["metrics"]["llm"]
        assert (metrics["failovers"], metrics["failed"]) == (len(faults), 0)
        known = running.current_health("llm")["providers"]
        assert known.pop("good") == "ok"
        assert all(reason != "ok" for reason in known.values()), known


def test_an_answer_that_is_cut_off_says_so_and_the_conversation_goes_on(
    tmp_path: Path, server: OpenAIServer
) -> None:
    settings = provider(server.url("cut"))
    with backend(tmp_path, settings, workers=1) as running:
        name, data = running.stream("hello")[-1]
        assert (name, "cut off" in data["detail"]) == ("error", True), data
        client = openai.OpenAI(base_url=f"{running.http.base_url}/v1", api_key="none", max_retries=0)
        asked: Any = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        with (
            pytest.raises(openai.APIError, match="cut off"),
            client.chat.completions.create(**asked, stream=True) as stream,
        ):
            for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError, match="cut off"):
            client.chat.completions.create(**asked)
        client.close()
        running.configure(provider(server.url()))
        code, answer = running.master.call("POST", f"{HOT}/reload/llm")
        assert code == 200, answer
        assert running.say("again")["text"] == "You said again"
        turns = running.http.get("/api/v1/sessions/talk").json()
        assert [turn["content"] for turn in turns] == ["hello", "You said ", "again", "You said again"]
        assert "cut off" in turns[1]["meta"]["cut"]


def test_when_no_provider_answers_the_caller_gets_every_reason(tmp_path: Path, server: OpenAIServer) -> None:
    settings = providers(
        {"name": "one", "base_url": refused_url(), "retries": 0},
        {"name": "two", "base_url": server.url("500"), "retries": 0},
    )
    with backend(tmp_path, settings, workers=1) as running:
        answer = running.http.post("/api/v1/chat", json={"message": "hello"})
        assert answer.status_code == 502
        assert "one can't be reached" in answer.json()["detail"]
        assert "two answers 500: Error code: 500 - told to say 500" in answer.json()["detail"]
        asked = {"messages": [{"role": "user", "content": "hello"}]}
        for stream in (False, True):
            answer = running.http.post("/v1/chat/completions", json=asked | {"stream": stream})
            assert answer.status_code == 502, "before the first token it is an error with a status"
            assert "two answers 500" in answer.json()["error"]["message"]
        # three failures within a minute are an incident, and each source is left alone for a while
        lis = running.master.status()["metrics"]["lis"]
        assert (lis["incidents_recent"], lis["breakers_open"], lis["antibodies_recent"]) == (2, 2, 0)
        before = server.count("requests")
        answer = running.http.post("/api/v1/chat", json={"message": "hello"})
        assert "left out for a while" in answer.json()["detail"]
        assert server.count("requests") == before
        assert running.master.status()["metrics"]["lis"]["antibodies_recent"] == 2, "they have helped"


@pytest.mark.parametrize("fault", ["endless", "slow"])
def test_a_client_that_leaves_cancels_the_request_at_the_provider(tmp_path: Path, fault: str) -> None:
    """Before its first token and after it, of either kind."""
    message = [{"role": "user", "content": "hello"}]
    asked = [
        (path, body | {"stream": stream})
        for path, body in (
            ("/v1/chat/completions", {"messages": message}),
            ("/api/v1/chat", {"message": "hello", "session": "talk"}),
        )
        for stream in (False, True)
    ]
    with own_server() as server, backend(tmp_path, provider(server.url(fault)), workers=1) as running:
        for number, (path, body) in enumerate(asked, 1):
            data = json.dumps(body).encode()
            with socket.create_connection(("127.0.0.1", running.master.port)) as client:
                head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
                client.sendall(head.encode() + data)
                server.wait("requests", number)
            server.wait("cancelled", number)
        running.master.wait_status(lambda s: s["metrics"]["llm"]["active"] == 0)
        assert running.master.status()["metrics"]["llm"]["cancelled"] == len(asked)


# ------------------------------------------------------------------------------------------------------------- lis


def lis(running: Backend) -> dict[str, int]:
    found: dict[str, int] = running.master.status()["metrics"]["lis"]
    return found


def test_an_answer_that_is_empty_or_repeats_itself_is_an_incident(tmp_path: Path) -> None:
    with own_server() as server, backend(tmp_path, provider(server.url("empty")), workers=1) as running:
        assert running.say("hello")["text"] == ""
        assert lis(running)["incidents_recent"] == 2, "so was the one that was asked for then"
        first, second = (each["body"].get("temperature") for each in server.seen())
        assert first != second, "with other sampling"
        running.configure(provider(server.url("loop")))
        for service in ("llm", "lis"):
            assert running.master.call("POST", f"{HOT}/reload/{service}")[0] == 200
        assert lis(running)["incidents_recent"] == 2, "it goes on over a swap"
        assert running.say("help me")["text"].count("I would be glad") == 6
        assert lis(running)["incidents_recent"] == 3, "the same 40 characters five times over"
        assert lis(running)["antibodies_recent"] == 0, "no rule has helped"


def test_a_rule_counts_once_it_has_kept_an_incident_from_recurring(tmp_path: Path) -> None:
    with own_server() as server, backend(tmp_path, provider(server.url("empty9")), workers=1) as running:
        assert running.say("hello")["text"] == "You said hello", "it was asked again, with other sampling"
        assert (lis(running)["incidents_recent"], lis(running)["antibodies_recent"]) == (1, 1)
        assert running.say("more")["text"] == "You said more"
        assert lis(running)["incidents_recent"] == 1, "it has not recurred"


# ------------------------------------------------------------------------------------------------------------- mcp


def test_mcp_servers_over_stdio_and_http_are_called_and_swapped(tmp_path: Path) -> None:
    with over_http() as url:
        settings = PATIENT + mcp_child("near") + f'[services.mcp.servers.far]\nurl = "{url}"\n'
        with backend(tmp_path, settings) as running:
            listed = {tool["name"] for tool in running.http.get("/api/v1/tools").json()["tools"]}
            assert listed >= {"near__add", "far__add", "calculate"}
            assert running.call("near__add", a=1, b=2)["text"] == "3"
            assert running.call("far__add", a=1, b=2)["text"] == "3"
            said = running.say('use far__add {"a": 20, "b": 22}')
            assert "42" in said["text"], "the model calls it, too"
            document = running.master.status()
            assert document["mcp"] == {"mcp_available": True, "is_connected": True, "fallback_enabled": False}
            assert document["metrics"]["mcp"]["fallback_initialized"] is False
            before = {int(json.loads(running.call("near__whoami")["text"])["pid"])}
            code, answer = running.master.call("POST", f"{HOT}/reload/mcp")
            assert (code, answer["rewired"]) == (200, ["ToolDispatcher"])
            assert int(json.loads(running.call("near__whoami")["text"])["pid"]) not in before
            running.master.reload("--wait", "drained")
            assert running.call("near__add", a=1, b=2)["text"] == "3"


@contextlib.contextmanager
def over_http() -> Iterator[str]:
    """An MCP server over streamable HTTP."""
    port = free_port()
    process = subprocess.Popen([sys.executable, MCP_SERVER, "http", str(port)])
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


OTHER_VERSION = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("method") == "initialize":
        answer = {"result": {"protocolVersion": "1999-01-01", "capabilities": {},
                             "serverInfo": {"name": "odd", "version": "1"}}}
    else:
        answer = {"error": {"code": -32601, "message": "no such method"}}
    if "id" in asked:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"]} | answer), flush=True)
"""


def test_a_swap_to_an_mcp_server_that_does_not_come_changes_nothing(tmp_path: Path) -> None:
    limits = "[services.mcp]\nconnect_timeout_s = 8.0\npatience_s = 60.0\n"
    good = limits + mcp_child("good", sys.executable, "-c", textwrap.dedent(LIGHT))
    with backend(tmp_path, good) as running:
        for bad, reason in {
            mcp_child("bad", "/nowhere/server"): "/nowhere/server can't be started",
            mcp_child("bad", sys.executable, "-c", "import sys; sys.exit('no licence')"): "no licence",
            mcp_child("bad", sys.executable, "-c", "import time; time.sleep(1000)"): "not shaken hands",
            mcp_child("bad", sys.executable, "-c", OTHER_VERSION): "1999-01-01",
            '[services.mcp.servers.bad]\nurl = "http://127.0.0.1:9/mcp"\n': "MCP server bad can't be reached",
        }.items():
            running.configure(good + bad)
            swap_refused(running, "mcp", reason)
            assert running.call("good__add", a=1, b=2)["text"] == "3"
            # a worker that starts doesn't wait for it, and a reload doesn't fail for it
        running.master.reload("--wait", "drained")
        assert running.call("good__add", a=1, b=2)["text"] == "3"
        document = running.master.status()
        assert document["mcp"]["is_connected"] is False
        servers = document["services"]["mcp"]["metrics"]["servers"]
        assert (servers["good"]["connected"], servers["bad"]["connected"]) == (True, False)


def test_an_mcp_server_that_dies_fails_its_call_with_the_reason_and_is_there_again(tmp_path: Path) -> None:
    settings = PATIENT + "retry_first_s = 0.05\n" + mcp_child("one") + mcp_child("two")
    with backend(tmp_path, settings, workers=1) as running:
        died = running.call("one__die")
        assert (died["ok"], "one was lost during the call" in died["error"]) == (False, True), died
        assert running.call("two__add", a=1, b=2)["text"] == "3"
        assert running.call("one__add", a=1, b=2)["text"] == "3", "a call waits for it to come back"


def test_no_mcp_child_outlives_its_worker_that_is_killed(tmp_path: Path) -> None:
    shell = mcp_child("shell", "sh", "-c", f"{sys.executable} {MCP_SERVER} stdio; true")
    with backend(tmp_path, PATIENT + mcp_child("plain") + shell) as running:
        master = running.master
        master.wait_status(lambda s: s["services"]["mcp"]["metrics"]["servers_connected"] == 4)
        victim, other = master.worker_pids()
        theirs = descendants(victim)
        assert len(theirs) >= 5, "two keepers, a child each, and one that a shell has started"
        with contextlib.ExitStack() as stack:
            watched = [os.pidfd_open(pid) for pid in theirs]
            for pidfd in watched:
                stack.callback(os.close, pidfd)
            os.kill(victim, 9)
            for pidfd in watched:
                assert select.select([pidfd], [], [], 30)[0], "an MCP child has outlived its worker"
        master.wait_status(
            lambda s: (
                victim not in pids(s)
                and len(pids(s)) == 2
                and s["services"]["mcp"]["metrics"]["servers_connected"] == 4
            )
        )
        assert other in master.worker_pids()
        assert running.call("plain__add", a=1, b=2)["text"] == "3"


def pids(document: dict[str, Any]) -> list[int]:
    current = next(g for g in document["generations"] if g["current"])
    return [worker["pid"] for worker in current["workers"] if worker["state"] == "active"]


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = list(parents.get(pid, []))
    for each in found:
        found += parents.get(each, [])
    return found


# -------------------------------------------------------------------------------------------------------- settings

WRONG = [
    ("llm", "[services.llm]\nmodell = 'm'\n", "service 'llm' has no setting modell", "it has"),
    ("llm", "[services.llm]\nfallback_offline = 'perhaps'\n", "fallback_offline", "Expected `bool`"),
    ("llm", "[services.llm]\nmodel = 'm'\n", "model", "known: offline"),
    ("llm", "[[services.llm.providers]]\nname = 'x'\nmodle = 'm'\n", "providers", "unknown field `modle`"),
    ("memory", "[services.memory]\nmax_items = 0\n", "max_items", ">= 1"),
    ("emotion", "[services.emotion]\nsensitivity = 7\n", "sensitivity", "<= 1"),
    ("tools", "[services.tools]\ndeadline_s = 'soon'\n", "deadline_s", "Expected `float`"),
    ("tools", "[services.tools]\ndirectory = '/nowhere/tools'\n", "/nowhere/tools", "No such file"),
    (
        "mcp",
        "[services.mcp.servers.x]\ncommand = 'a'\nurl = 'http://b'\n",
        "servers",
        "either a command or a url",
    ),
    ("personality", "[services.personality]\nprofile = 'nobody'\n", "'nobody'", "known: plain, terse, warm"),
    ("lis", "[services.lis]\nfailures = 'many'\n", "failures", "Expected `int`"),
    ("dialogue", "[services.dialogue]\nturns = -1\n", "turns", ">= 0"),
    (None, "[services.dialog]\nturns = 1\n", "services.dialog: no such service", "dialogue"),
    (None, "[services.llm\n", "segue.toml", "]"),
]
"""The service that a swap would be of, the settings, and two pieces of what is told."""


def test_settings_that_can_not_be_used_are_refused_with_key_and_reason_and_the_old_ones_go_on(
    tmp_path: Path,
) -> None:
    with backend(tmp_path) as running:
        for service, settings, what, why in WRONG:
            running.configure(settings)
            if service is not None:
                code, answer = running.master.call("POST", f"{HOT}/reload/{service}")
                assert code in {400, 404, 409}, answer
                assert what in answer["detail"], answer
                assert why in answer["detail"], answer
                assert running.version(service) == 1
            done = running.master.command("reload")
            assert done.returncode == 1, settings
            assert what in done.stderr, done.stderr
            assert why in done.stderr, done.stderr
            assert running.say("still there?")["generation"] == 1
        running.configure("")
        running.master.reload()


@pytest.mark.parametrize(("_", "settings", "what", "why"), [WRONG[0], WRONG[6], WRONG[9]])
def test_settings_that_can_not_be_used_keep_it_from_starting(
    tmp_path: Path, _: str, settings: str, what: str, why: str
) -> None:
    with pytest.raises(NotStarted) as raised, backend(tmp_path, settings):
        pass
    assert raised.value.status == 3
    assert what in raised.value.output
    assert why in raised.value.output


# ----------------------------------------------------------------------------------------------------------- tools

GOOD = """
import os, time

def version() -> str:
    "Which one it is."
    return "{0}"

def hang(seconds: float) -> str:
    "Take its time."
    time.sleep(seconds)
    return "woken"

def broken() -> str:
    "Raise."
    raise RuntimeError("no luck today")

def leave() -> str:
    "End the process, if it could."
    raise SystemExit(3)
"""


@pytest.fixture
def tools(tmp_path: Path) -> Callable[[str, str], None]:
    directory = tmp_path / "tools"
    directory.mkdir()

    def write(name: str, code: str) -> None:
        (directory / f"{name}.py").write_text(textwrap.dedent(code))

    return write


def test_a_tool_that_does_not_import_is_told_with_its_traceback_and_its_old_version_goes_on(
    tmp_path: Path, tools: Callable[[str, str], None]
) -> None:
    tools("good", GOOD.format(1))
    with backend(tmp_path, '[services.tools]\ndirectory = "tools"\n') as running:
        tools("good", GOOD.format(2) + "\nimport not_there_at_all\n")
        tools("other", 'def other() -> str:\n    "Say."\n    return "here"\n')
        tools("half", "def half(:\n")
        code, answer = running.master.call("POST", f"{HOT}/reload/tools")
        assert code == 200, answer
        told = "\n".join(answer["notes"])
        assert "good.py: Traceback (most recent call last):" in told
        assert "ModuleNotFoundError: No module named 'not_there_at_all'" in told
        assert "its old version goes on" in told
        assert "half.py: " in told
        assert "SyntaxError" in told
        for worker in answer["workers"]:
            assert worker["health"]["problems"].keys() == {"good", "half"}
        assert running.call("version")["text"] == "1"
        assert running.call("other")["text"] == "here"
        done = running.master.command("reload", "tools")
        assert done.returncode == 0
        assert "note: good.py: Traceback" in done.stderr
        assert "No module named 'not_there_at_all'" in done.stderr
        done = running.master.command("reload", "tools", "--tool", "good")
        assert done.returncode == 1
        assert "No module named 'not_there_at_all'" in done.stderr
        assert running.call("version")["text"] == "1"
        tools("good", GOOD.format(3))
        (tmp_path / "tools" / "half.py").unlink()
        code, answer = running.master.call("POST", f"{HOT}/reload/tools")
        assert (code, answer["notes"]) == (200, [])
        assert running.call("version")["text"] == "3"


def test_a_tool_that_hangs_or_raises_ends_its_own_call_and_no_other(
    tmp_path: Path, tools: Callable[[str, str], None]
) -> None:
    tools("good", GOOD.format(1))
    settings = '[services.tools]\ndirectory = "tools"\ndeadline_s = 5.0\nmax_hanging = 2\n'
    with backend(tmp_path, settings, workers=1) as running:
        hung = running.call("hang", seconds=600.0)
        assert (hung["ok"], "longer than 5 s" in hung["error"]) == (False, True), hung
        assert running.call("version")["text"] == "1"
        for _ in range(2):
            raised = running.call("broken")
            assert (raised["ok"], raised["error"]) == (False, "RuntimeError: no luck today")
        assert running.call("leave")["error"] == "SystemExit: 3"
        statistics = running.http.get("/api/v1/tools").json()["statistics"]
        assert (statistics["broken"]["invocations"], statistics["broken"]["failures"]) == (2, 2)
        assert statistics["version"]["success_rate"] == 1.0
        assert running.master.status()["metrics"]["lis"]["incidents_recent"] == 0
        running.call("broken")
        assert running.master.status()["metrics"]["lis"]["incidents_recent"] == 1, (
            "three times within a minute"
        )
        kept = running.call("broken")
        assert "not called for a while" in kept["error"]
        lis = running.master.status()["metrics"]["lis"]
        assert (lis["incidents_recent"], lis["antibodies_recent"]) == (1, 1)


# ---------------------------------------------------------------------------------------------------------- memory


def test_a_full_disk_under_the_memory_is_told_and_loses_nothing(tmp_path: Path) -> None:
    """On a file system of 2 MiB of its own, with something on it that can be removed."""
    place = Path(made_directory("segue-full-"))
    mount = (
        f'mount -t tmpfs -o size=3m tmpfs {place} && head -c 1000000 /dev/zero >{place}/ballast && exec "$@"'
    )
    possible = subprocess.run(["unshare", "-Urm", "sh", "-c", mount, "sh", "true"], check=False)
    if possible.returncode:
        pytest.skip("no file system can be mounted here")
    settings = f'[services.memory]\npath = "{place}/memory.db"\n{REMEMBERS}'
    with backend(tmp_path, settings, prefix=("unshare", "-Urm", "sh", "-c", mount, "sh")) as running:
        kept: list[str] = []
        while True:
            text = f"walnut {len(kept)} " + "filler " * 500
            answer = running.http.post("/api/v1/memory", json={"text": text})
            if answer.status_code != 201:
                break
            kept.append(text)
        assert answer.status_code == 503
        assert "database or disk is full" in answer.json()["detail"]
        assert f"{place}/memory.db" in answer.json()["detail"]
        found = running.http.get("/api/v1/memory", params={"q": "walnut", "limit": 1000}).json()
        assert {each["text"] for each in found} == set(kept), "what was acknowledged is there, and is found"
        said = running.say("hello")
        assert "hello" in said["text"]
        assert any("not kept" in problem and "full" in problem for problem in said["problems"])
        document = running.master.status()
        assert document["services"]["memory"]["healthy"] is False
        assert running.version("memory") == 1
        ballast = Path(f"/proc/{running.master.process.pid}/root{place}/ballast")
        ballast.unlink()
        assert running.http.post("/api/v1/memory", json={"text": "room again"}).status_code == 201
        assert running.say("and now?")["problems"] == []
        running.master.wait_status(lambda s: s["services"]["memory"]["healthy"])
        code, swapped = running.master.call("POST", f"{HOT}/reload/memory")
        assert code == 200, swapped
        found = running.http.get("/api/v1/memory", params={"q": "walnut", "limit": 1000}).json()
        assert {each["text"] for each in found} == set(kept)


@pytest.mark.parametrize("what", ["no database", "a directory"])
def test_a_memory_that_can_not_be_used_refuses_the_swap_and_the_reload(tmp_path: Path, what: str) -> None:
    with backend(tmp_path) as running:
        assert (
            running.http.post("/api/v1/memory", json={"text": "the tea is in the blue box"}).status_code
            == 201
        )
        bad = tmp_path / "bad.db"
        if what == "a directory":
            bad.mkdir()
        else:
            bad.write_text("something of value\n" * 1000)
        swap_refused(running, f"memory?path={bad}", f"{bad} can't be used as memory")
        running.configure(f'[services.memory]\npath = "{bad}"\n')
        done = running.master.command("reload")
        assert done.returncode == 1
        assert f"{bad} can't be used as memory" in done.stderr
        (found,) = running.http.get("/api/v1/memory", params={"q": "tea"}).json()
        assert found["text"] == "the tea is in the blue box"


def test_an_acknowledged_write_survives_the_death_of_every_worker(tmp_path: Path) -> None:
    with backend(tmp_path) as running:
        kept: list[str] = []
        enough, stop = threading.Event(), threading.Event()

        def write(number: int) -> None:
            with httpx2.Client(base_url=running.http.base_url, timeout=60) as client:
                for count in range(10**6):
                    text = f"acorn{number} {count}"
                    with contextlib.suppress(httpx2.TransportError):
                        if client.post("/api/v1/memory", json={"text": text}).status_code == 201:
                            kept.append(text)
                    if len(kept) > 100:
                        enough.set()
                    if stop.is_set():
                        return

        writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for each in writers:
            each.start()
        assert enough.wait(60)
        before = running.master.worker_pids()
        for pid in before:
            os.kill(pid, 9)
        stop.set()
        for each in writers:
            each.join(60)
        running.master.wait_status(lambda s: len(pids(s)) == 2 and not set(pids(s)) & set(before))
        for text in kept:
            number, _, count = text.partition(" ")
            found = running.http.get("/api/v1/memory", params={"q": f'"{number} {count}"', "limit": 1}).json()
            assert [each["text"] for each in found] == [text]


# ------------------------------------------------------------------------------------------------ without the extra

HIDDEN = """
import importlib.machinery
real = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {"openai", "mcp", "mcp_types"} else real(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
"""As if they weren't installed."""
MODULES = """
import sys

def modules() -> list[str]:
    "What is imported."
    return sorted(sys.modules)
"""


@pytest.fixture
def without_extra(tmp_path: Path) -> dict[str, str]:
    place = tmp_path / "hidden"
    place.mkdir()
    (place / "sitecustomize.py").write_text(HIDDEN)
    return {"PYTHONPATH": f"{place}:{ROOT}"}


def test_without_the_extra_all_of_it_works_and_nothing_of_the_extra_is_imported(
    tmp_path: Path, tools: Callable[[str, str], None], without_extra: dict[str, str]
) -> None:
    tools("modules", MODULES)
    settings = '[services.tools]\ndirectory = "tools"\n'
    extra = {"openai", "mcp", "mcp_types", "httpx2", "httpx", "pydantic", "anthropic"}
    with backend(tmp_path, settings, workers=1) as running:
        imported = set(json.loads(running.call("modules")["text"]))
        assert not imported & extra, "installed, and yet not imported while nothing is configured"
        assert "aiomqtt" not in imported
    with backend(tmp_path, settings, workers=1, env=without_extra) as running:
        assert "no language model" in running.say("hello")["text"]
        assert running.http.get("/v1/models").status_code == 200
        document = running.master.status()
        assert document["mcp"] == {"mcp_available": False, "is_connected": False, "fallback_enabled": True}
        assert running.http.get("/").status_code == 200
        for service in ("llm", "mcp", "tools", "personality"):
            assert running.master.call("POST", f"{HOT}/reload/{service}")[0] == 200


def test_what_needs_the_extra_says_so(tmp_path: Path, without_extra: dict[str, str]) -> None:
    with backend(tmp_path, env=without_extra) as running:
        needs = "pip install 'segue[ai]'"
        swap_refused(running, "llm?base_url=http://127.0.0.1:9/v1&model=m", needs)
        running.configure(mcp_child("one"))
        swap_refused(running, "mcp", needs)
        done = running.master.command("reload")
        assert (done.returncode, needs in done.stderr) == (1, True), done.stderr
        assert "no language model" in running.say("hello")["text"]
    for settings in (mcp_child("one"), provider("http://127.0.0.1:9/v1")):
        with (
            pytest.raises(NotStarted) as raised,
            backend(tmp_path, settings, env=without_extra),
        ):
            pass
        assert raised.value.status == 3
        assert "pip install 'segue[ai]'" in raised.value.output

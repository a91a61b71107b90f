"""The connector to MCP servers: real ones, as children and over HTTP, and such as do not behave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from backends import LIGHT
from conftest import marked
from scenario import DEADLINE_S, MARK, ROOT, free_port

import segue
from segue.worker.backend.lis import LIS, LISSettings
from segue.worker.backend.mcp_connector import MCPConnector, MCPServer, MCPSettings, MCPUnreachableError
from segue.worker.backend.mcp_connector.naming import names as names_of
from segue.worker.backend.tools import ToolDispatcher, ToolSettings

pytestmark = pytest.mark.anyio

SERVER = str(ROOT / "tests" / "mcp_server.py")
KEEPER = str(ROOT / "segue" / "worker" / "backend" / "mcp_connector" / "keeper.py")
ANSWERS_WITH = """
    import json, sys
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get("method") == "initialize":
            answer = {"result": {"protocolVersion": "%s", "capabilities": {},
                                 "serverInfo": {"name": "odd", "version": "1"}}}
        else:
            answer = {"error": {"code": -32601, "message": "no such method"}}
        if "id" in asked:
            print(json.dumps({"jsonrpc": "2.0", "id": asked["id"]} | answer), flush=True)
"""


def child(*arguments: str, **more: Any) -> MCPServer:
    """A server as a child, marked as the test's own."""
    arguments = arguments or (SERVER, "stdio")
    return MCPServer(command=sys.executable, args=arguments, inherit=(MARK,), **more)


def script(code: str, **more: Any) -> MCPServer:
    return child("-c", textwrap.dedent(code), **more)


def settings(servers: dict[str, MCPServer], **more: Any) -> MCPSettings:
    patient = {"retry_first_s": 0.05, "retry_cap_s": 0.5, "patience_s": 60.0, "connect_timeout_s": 60.0}
    return MCPSettings(servers=servers, **(patient | more))


@contextlib.asynccontextmanager
async def connected(
    previous: MCPConnector | None = None, /, **servers: MCPServer
) -> AsyncIterator[MCPConnector]:
    connector = MCPConnector(settings(servers), previous)
    await connector.start()
    try:
        yield connector
    finally:
        await connector.close()


async def called(connector: MCPConnector, name: str, /, **arguments: Any) -> str:
    result = await connector.call(name, arguments)
    assert result.ok, result
    return result.text


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


def names(connector: MCPConnector) -> list[str]:
    return [tool.name for tool in connector.tools()]


def processes() -> list[str]:
    """Command lines of the children that are there."""
    return [command for _, command in marked(os.environ[MARK])]


@contextlib.contextmanager
def over_http(token: str = "", port: int = 0) -> Iterator[MCPServer]:
    port = port or free_port()
    process = subprocess.Popen([sys.executable, SERVER, "http", str(port), token], cwd=ROOT)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
        yield MCPServer(url=f"http://127.0.0.1:{port}/mcp", token=segue.Secret(token))
    finally:
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------------------ two kinds


@pytest.mark.parametrize("protocol", ["auto", "legacy"])
async def test_a_child_s_tools_can_be_called(protocol: Any, tmp_path: Path) -> None:
    server = child(protocol=protocol, env={"API_KEY": segue.Secret("x1")}, cwd=str(tmp_path))
    async with connected(test=server) as connector:
        assert connector.metrics()["is_connected"]
        assert connector.metrics()["servers"]["test"]["protocol"] == (
            "2026-07-28" if protocol == "auto" else "2025-11-25"
        )
        assert "test__add" in names(connector)
        assert await called(connector, "test__add", a=1, b=2) == "3"
        assert await called(connector, "test__odd_name_of_it") == "odd"
        given = json.loads(await called(connector, "test__whoami"))
        assert given["cwd"] == str(tmp_path)
        assert given["environment"].keys() <= {
            "API_KEY",
            "PATH",
            "HOME",
            "USER",
            "LOGNAME",
            "SHELL",
            "TERM",
            MARK,
            "LC_CTYPE",
        }
        assert given["environment"]["API_KEY"] == "x1"
        failed = await connector.call("test__fail", {})
        assert not failed.ok
        assert "fail" in str(failed.error)
        assert not (await connector.call("test__add", {"a": "x"})).ok
        assert "no MCP tool 'test__nothing'" in str((await connector.call("test__nothing", {})).error)
    assert processes() == []


@pytest.mark.parametrize("protocol", ["auto", "legacy"])
@pytest.mark.parametrize("kind", ["stdio", "http"])
async def test_a_new_tool_appears(protocol: Any, kind: str) -> None:
    with over_http() if kind == "http" else contextlib.nullcontext(child()) as server:
        changes = []
        async with connected(test=msgspec.structs.replace(server, protocol=protocol)) as connector:
            unsubscribe = connector.subscribe(lambda: changes.append(names(connector)))
            # before 2026 a server over HTTP tells nobody until the client listens, which it does beside
            await called(connector, "test__learn", name="fresh", heard=(protocol, kind) == ("legacy", "http"))
            await until(lambda: bool(changes))
            assert "test__fresh" in changes[0]
            assert await called(connector, "test__fresh") == "learnt"
            unsubscribe()


async def test_what_changes_before_it_listens_is_seen_once_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from segue.worker.backend.mcp_connector.session import ServerSession

    learnt, listen = asyncio.Event(), ServerSession._listen

    async def late(session: ServerSession, client: Any) -> None:
        await learnt.wait()
        await listen(session, client)

    monkeypatch.setattr(ServerSession, "_listen", late)
    connector = MCPConnector(settings({"test": child()}, refresh_s=3600.0))
    await connector.start()
    try:
        await called(connector, "test__learn", name="fresh")
        learnt.set()
        await until(lambda: "test__fresh" in names(connector))
    finally:
        await connector.close()


async def test_a_server_over_http_with_a_token(tmp_path: Path) -> None:
    with over_http(token="s3cret-token") as server:
        async with connected(test=server) as connector:
            assert await called(connector, "test__add", a=1, b=2) == "3"
        file = tmp_path / "token"
        file.write_text("s3cret-token\n")
        from_file = MCPServer(url=server.url, token_file=str(file), required=True)
        async with connected(test=from_file) as connector:
            assert await called(connector, "test__add", a=1, b=2) == "3"
        with pytest.raises(MCPUnreachableError) as raised:
            async with connected(
                test=MCPServer(url=server.url, token=segue.Secret("wr0ng-token"), required=True)
            ):
                pass
        assert "wr0ng-token" not in str(raised.value)
        with pytest.raises(MCPUnreachableError, match=r"token_file .* can't be read"):
            async with connected(test=MCPServer(url=server.url, token_file="/nowhere", required=True)):
                pass


# ------------------------------------------------------------------------------------------ those that do not behave

SHORT_S = 4.0
"""Who doesn't shake hands is waited for so long."""
BROKEN = {
    "isn't there": (MCPServer(command="/nowhere/server"), "/nowhere/server can't be started: No such file"),
    "ends at once": (script("import sys; sys.exit('no licence')"), "it said: no licence"),
    "hangs": (script("import time; time.sleep(1000)"), f"it has not shaken hands within {SHORT_S:g} s"),
    "writes nonsense": (
        script("import sys, time; print('hello'); print('{}', flush=True); time.sleep(1000)"),
        f"it has not shaken hands within {SHORT_S:g} s",
    ),
    "speaks another version": (script(ANSWERS_WITH % "1999-01-01"), "1999-01-01"),
    "is nowhere": (MCPServer(url="http://127.0.0.1:9/mcp"), "ConnectError"),
    "has no such directory": (child(cwd="/nowhere"), "/nowhere"),
}


def limit_s(how: str) -> float:
    """For shaking hands; the others need no limit."""
    return SHORT_S if "shaken hands" in BROKEN[how][1] else 60.0


@pytest.mark.parametrize("how", BROKEN)
async def test_a_server_that_does_not_behave_stops_no_other_and_is_told(how: str) -> None:
    server, reason = BROKEN[how]
    connector = MCPConnector(settings({"bad": server, "good": script(LIGHT)}, connect_timeout_s=limit_s(how)))
    await connector.start()
    try:
        assert await called(connector, "good__add", a=1, b=2) == "3"
        await until(lambda: reason in connector.metrics()["servers"]["bad"]["reason"])
        metrics, health = connector.metrics(), connector.health()
        assert not metrics["is_connected"]
        assert metrics["servers_connected"] == 1
        assert health["ok"]
        assert health["servers"]["good"] == "connected"
        assert reason in metrics["servers"]["bad"]["reason"]
        assert reason in health["servers"]["bad"]
    finally:
        await connector.close()
    assert processes() == []


@pytest.mark.parametrize("how", BROKEN)
async def test_one_that_is_required_keeps_it_from_starting(how: str) -> None:
    server, reason = BROKEN[how]
    needed = msgspec.structs.replace(server, required=True)
    connector = MCPConnector(settings({"bad": needed, "good": script(LIGHT)}, connect_timeout_s=limit_s(how)))
    with pytest.raises(MCPUnreachableError) as raised:
        await connector.start()
    assert str(raised.value).startswith("MCP server bad can't be reached: ")
    assert reason in str(raised.value)
    assert processes() == []


async def test_while_it_is_tried_again_the_reason_is_that_of_the_last_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from segue.worker.backend.mcp_connector.session import ServerSession

    told, hung_up = [], ServerSession._hung_up

    def noted(session: ServerSession) -> None:
        hung_up(session)
        told.append(session.reason)

    monkeypatch.setattr(ServerSession, "_hung_up", noted)
    connector = MCPConnector(settings({"bad": MCPServer(command="/nowhere/server")}))
    await connector.start()
    try:
        await until(lambda: len(told) > 1)
        assert "/nowhere/server can't be started" in str(told[1])
    finally:
        await connector.close()


async def test_a_server_that_dies_is_there_again_and_only_its_call_fails() -> None:
    async with connected(a=child(), b=child()) as connector:
        slow = asyncio.create_task(connector.call("b__wait", {"seconds": 0.5}))
        died = await connector.call("a__die", {})
        assert died.error == "the connection to MCP server a was lost during the call"
        # one that comes meanwhile waits for the next session
        assert await called(connector, "a__add", a=1, b=2) == "3"
        assert (await slow).text == "waited 0.5 s"
        servers = connector.metrics()["servers"]
        assert (servers["a"]["connections"], servers["b"]["connections"]) == (2, 1)


async def test_a_server_that_is_killed_while_idle_is_noticed() -> None:
    async with connected(a=child()) as connector:
        pid = json.loads(await called(connector, "a__whoami"))["pid"]
        changes: list[int] = []
        connector.subscribe(lambda: changes.append(len(connector.tools())))
        os.kill(pid, signal.SIGKILL)
        await until(lambda: connector.metrics()["servers"]["a"]["connections"] == 2)
        assert changes == [0, 7]


async def test_a_server_over_http_that_restarts_is_there_again() -> None:
    with over_http() as server:
        # of one that is gone, what it was asked is waited for as long as a connection
        connector = MCPConnector(settings({"a": server}, refresh_s=0.2, connect_timeout_s=20.0))
        await connector.start()
        assert await called(connector, "a__add", a=1, b=2) == "3"
    try:
        await until(lambda: not connector.metrics()["is_connected"])
        assert "ConnectError" in connector.metrics()["servers"]["a"]["reason"] or connector.tools() == []
        with over_http(port=int(server.url.split(":")[2].split("/")[0])):
            assert await called(connector, "a__add", a=1, b=2) == "3"
    finally:
        await connector.close()


async def test_a_call_that_takes_too_long_is_ended_and_no_other() -> None:
    connector = MCPConnector(settings({"a": child()}, call_timeout_s=5.0))
    await connector.start()
    try:
        result = await connector.call("a__wait", {"seconds": 60})
        assert result.error == "MCP server a has not answered within 5 s"
        assert await called(connector, "a__add", a=1, b=2) == "3"
        assert connector.metrics()["servers"]["a"]["connections"] == 1
    finally:
        await connector.close()


# ------------------------------------------------------------------------------------------------------------- swap


async def test_a_swap_starts_the_new_sessions_before_it_ends_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_SERVICES__MCP__SERVERS", as_json(a=child()))
    for limit in ("PATIENCE", "CONNECT_TIMEOUT"):
        monkeypatch.setenv(f"SEGUE_SERVICES__MCP__{limit}_S", "60")
    services = segue.Services()
    mcp = services.declare("mcp", MCPConnector, settings=MCPSettings)
    immune = services.declare("lis", lambda: LIS(LISSettings()))
    model = services.declare("llm", lambda: None)
    tools = services.declare("tools", ToolDispatcher, requires=[model, mcp, immune], settings=ToolSettings)
    async with services:
        old = mcp.current
        before = json.loads((await tools.current.call("a__whoami", "")).text)["pid"]
        with mcp.lease(), tools.lease() as leased:
            slow = asyncio.create_task(leased.call("a__wait", {"seconds": 1}))
            swap = asyncio.create_task(services.reload("mcp"))
            while not swap.done():
                result = await tools.current.call("a__add", {"a": 1, "b": 2})
                assert result.text == "3"
            assert (await swap)["rewired"] == ["tools"]
            assert tools.current.mcp is mcp.current is not old
            assert json.loads((await tools.current.call("a__whoami", "")).text)["pid"] != before
            # what began on the old one ends on it
            assert (await slow).text == "waited 1 s"
        await until(lambda: not old.connected_to("a"))
        await until(lambda: len(processes()) == 2)
    assert processes() == []


@pytest.mark.parametrize("how", BROKEN)
async def test_a_swap_that_would_lose_a_server_is_refused(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server, reason = BROKEN[how]
    monkeypatch.setenv("SEGUE_SERVICES__MCP__SERVERS", as_json(a=script(LIGHT)))
    monkeypatch.setenv("SEGUE_SERVICES__MCP__CONNECT_TIMEOUT_S", str(limit_s(how)))
    services = segue.Services()
    mcp = services.declare("mcp", MCPConnector, settings=MCPSettings)
    async with services:
        with pytest.raises(segue.SwapRefusedError) as raised:
            await services.reload("mcp", servers=as_json(a=server))
        assert "MCP server a can't be reached: " in str(raised.value)
        assert reason in str(raised.value)
        # one that is new and can't be reached, too, unless it says that it isn't needed
        with pytest.raises(segue.SwapRefusedError, match="MCP server b can't be reached"):
            await services.reload("mcp", servers=as_json(a=script(LIGHT), b=server))
        assert mcp.version == 1
        assert await called(mcp.current, "a__add", a=1, b=2) == "3"
        assert len(processes()) == 2
        unneeded = msgspec.structs.replace(server, required=False)
        await services.reload("mcp", servers=as_json(a=script(LIGHT), b=unneeded), patience_s="0.5")
        assert mcp.version == 2
        assert await called(mcp.current, "a__add", a=1, b=2) == "3"
        # it was not there before either: no reason to refuse
        await services.reload("mcp", servers=as_json(a=script(LIGHT), b=unneeded))
        assert mcp.version == 3
    assert processes() == []


@pytest.mark.parametrize(
    "servers",
    [
        {"a": {}},
        {"a": {"command": "x", "url": "http://y"}},
        {"a": {"url": "ftp://y"}},
        {"a": {"command": "x", "argz": []}},
        {"a": {"command": 1}},
        {"a__b": {"command": "x"}},
        {"../a": {"command": "x"}},
        {"a": {"url": "http://y", "token": "t", "token_file": "f"}},
    ],
)
async def test_settings_that_can_t_be_are_refused(servers: Any) -> None:
    services = segue.Services()
    mcp = services.declare("mcp", MCPConnector, settings=MCPSettings)
    async with services:
        with pytest.raises(segue.OptionsError, match="servers"):
            await services.reload("mcp", servers=json.dumps(servers))
        assert mcp.version == 1


def as_json(**servers: MCPServer) -> str:
    """As in an environment variable or a query."""
    return msgspec.json.encode(servers, enc_hook=lambda secret: secret.reveal()).decode()


# --------------------------------------------------------------------------------------------- nothing is left over

HOLDS = """
    import asyncio, sys
    from segue.worker.backend.mcp_connector import MCPConnector, MCPServer, MCPSettings
    import msgspec
    async def main():
        servers = msgspec.json.decode(sys.argv[1], type=dict[str, dict])
        settings = MCPSettings(servers={name: MCPServer(**server) for name, server in servers.items()})
        connector = MCPConnector(settings)
        await connector.start()
        while connector.metrics()["servers_connected"] < len(servers):
            await asyncio.sleep(0.02)
        print(connector.metrics()["servers_connected"], flush=True)
        await asyncio.Event().wait()
    asyncio.run(main())
"""
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)  # own session"], start_new_session=True)
{}
while True: time.sleep(1)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_no_child_outlives_its_worker(number: int) -> None:
    """Not a shell's child either, nor one that ignores SIGTERM and the end of its input, nor what it has started."""
    servers = {
        "plain": {"command": sys.executable, "args": [SERVER, "stdio"], "inherit": [MARK]},
        "shell": {
            "command": "sh",
            "args": ["-c", f"{sys.executable} {SERVER} stdio; true"],
            "inherit": [MARK],
        },
        "stubborn": {
            "command": sys.executable,
            "args": ["-c", STUBBORN.format(f"subprocess.run([sys.executable, {SERVER!r}, 'stdio'])")],
            "inherit": [MARK],
        },
    }
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDS), json.dumps(servers)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"3\n"
    assert len(processes()) > 3 + 3
    worker.send_signal(number)
    worker.wait()
    worker.stdout.close()
    await until(lambda: processes() == [])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_no_child_outlives_its_keeper(number: int) -> None:
    async with connected(a=child()) as connector:
        keepers = [
            pid for pid, command in marked(os.environ[MARK]) if KEEPER in command or "keeper.py" in command
        ]
        assert len(keepers) == 1
        os.kill(keepers[0], number)
        await until(lambda: connector.metrics()["servers"]["a"]["connections"] == 2)
        await until(lambda: len(processes()) == 2)


async def test_the_keeper_passes_on_how_the_program_ended() -> None:
    def kept(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-I", "-S", KEEPER, str(os.getpid()), *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    assert kept("sh", "-c", "echo out; echo err >&2; exit 7").returncode == 7
    assert kept("sh", "-c", "echo out").stdout == "out\n"
    assert kept("sh", "-c", "kill -9 $$").returncode == 128 + 9
    missing = kept("/nowhere/to/be/found")
    assert (missing.returncode, missing.stderr) == (
        127,
        "/nowhere/to/be/found can't be started: No such file or directory\n",
    )
    # what it leaves behind ends with it, and whoever waits for the end of its output is not kept waiting
    assert kept("sh", "-c", "sleep 1000 & echo done").stdout == "done\n"
    assert processes() == []


# ------------------------------------------------------------------------------------------------- nothing to do


async def test_with_nothing_configured_it_is_a_fallback_that_says_so_and_imports_nothing() -> None:
    code = """
        import asyncio, sys
        from segue.worker.backend.mcp_connector import MCPConnector, MCPSettings
        async def main():
            connector = MCPConnector(MCPSettings())
            await connector.start()
            print(connector.metrics(), connector.health(), connector.tools())
            print((await connector.call("a__b", {})).error)
            await connector.close()
            print([name for name in ("mcp", "mcp_types", "pydantic", "anyio", "httpx2") if name in sys.modules])
        asyncio.run(main())
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    metrics, error, imported = ended.stdout.splitlines()
    assert "'is_connected': False, 'fallback_enabled': True, 'fallback_initialized': True" in metrics
    assert "embedded fallback: no MCP server is configured" in metrics
    assert error == "there is no MCP tool 'a__b'; known: none"
    assert imported == "[]"


async def test_without_the_sdk_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not MCPConnector(MCPSettings()).metrics()["mcp_available"]
    with pytest.raises(RuntimeError, match=r"pip install 'segue\[ai\]'"):
        await MCPConnector(settings({"a": child()})).start()


def test_names_are_such_as_models_can_call() -> None:
    found = names_of("s", ["a.b", "a/b", "a_b", "ä", "x" * 100, "y" * 61 + "1", "y" * 61 + "2"])
    assert found["s__a_b"] == "a_b"
    assert sorted(found.values()) == sorted(
        ["a.b", "a/b", "a_b", "ä", "x" * 100, "y" * 61 + "1", "y" * 61 + "2"]
    )
    assert all(len(name) <= 64 and name.isascii() for name in found)
    assert names_of("s", ["a/b", "a_b"])["s__a_b"] == "a_b"

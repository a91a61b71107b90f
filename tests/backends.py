"""The built-in backend under a real master, with what tests of it need."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
from scenario import MARK, ROOT, Segue, supervised

MCP_SERVER = str(ROOT / "tests" / "mcp_server.py")
LIGHT = """
    import json, sys
    for line in sys.stdin:
        asked = json.loads(line)
        method, error = asked["method"], None
        if method == "initialize":
            result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                      "serverInfo": {"name": "light", "version": "1"}}
        elif method == "tools/list":
            result = {"tools": [{"name": "add", "inputSchema": {"type": "object"}}]}
        elif method == "tools/call":
            given = asked["params"]["arguments"]
            result = {"content": [{"type": "text", "text": str(given["a"] + given["b"])}]}
        else:
            result, error = None, {"code": -32601, "message": "no such method"}
        if "id" in asked:
            answer = {"error": error} if error else {"result": result}
            print(json.dumps({"jsonrpc": "2.0", "id": asked["id"]} | answer), flush=True)
"""
"""A server without the SDK, which takes most of a second to import."""
PATIENT = "[services.mcp]\npatience_s = 60.0\nconnect_timeout_s = 60.0\n"
"""Settings with which a start waits for MCP servers, and a call for one that comes back, however slow the machine is."""


class Backend:
    """A running one, and a client of it."""

    def __init__(self, master: Segue, directory: Path) -> None:
        self.master = master
        self.directory = directory
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{master.port}", timeout=60)

    def configure(self, settings: str) -> None:
        """Write the settings file anew; what is running doesn't notice."""
        (self.directory / "segue.toml").write_text(settings)

    def say(self, message: str, session: str = "talk") -> dict[str, Any]:
        """What it answers, which must be an answer."""
        answer = self.http.post("/api/v1/chat", json={"message": message, "session": session})
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def stream(self, message: str, session: str = "talk") -> list[tuple[str, Any]]:
        """The events of its answer."""
        asked = {"message": message, "session": session, "stream": True}
        return events(self.http.post("/api/v1/chat", json=asked).text)

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """What a tool returns."""
        answer = self.http.post(f"/api/v1/tools/{tool}", json={"arguments": arguments})
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def version(self, service: str) -> int:
        """Of a service in all workers."""
        return int(self.master.status()["services"][service]["version"])

    def current_health(self, service: str) -> dict[str, Any]:
        """What a service of the first worker says of itself."""
        health: dict[str, Any] = self.master.current()["workers"][0]["services"][service]["health"]
        return health


@contextlib.contextmanager
def backend(
    directory: Path, settings: str = "", workers: int = 2, env: dict[str, str] | None = None, **options: Any
) -> Iterator[Backend]:
    """Run it in `directory`, with that as its settings file; it must stop without complaint."""
    (directory / "segue.toml").write_text(settings)
    private = {"XDG_STATE_HOME": str(directory / "state"), "HOME": str(directory)}
    with supervised("--workers", str(workers), cwd=directory, env=private | (env or {}), **options) as master:
        running = Backend(master, directory)
        with running.http:
            yield running
        master.stop(None)


def events(text: str) -> list[tuple[str, Any]]:
    """Server-sent events: names and data."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        if lines:
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found


def mcp_child(name: str, *command: str, **more: Any) -> str:
    """The settings of an MCP server that is a child, marked as the test's own."""
    program, *arguments = command or (sys.executable, MCP_SERVER, "stdio")
    lines = {"command": program, "args": arguments, "inherit": [MARK], **more}
    return f"[services.mcp.servers.{name}]\n" + "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in lines.items()
    )

"""An MCP server to test with: ``python mcp_server.py stdio`` or ``python mcp_server.py http PORT [TOKEN]``."""

from __future__ import annotations

import os
import sys
from typing import Any

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context

server = MCPServer("test", instructions="For tests.")
listened_to = anyio.Event()
"""Somebody listens to what no request has asked for, over HTTP."""


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(name="odd.name/of it", description="Its name can't be a function's.")
def odd() -> str:
    return "odd"


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("not today")


@server.tool()
def whoami() -> dict[str, Any]:
    """Tell the process and what it was given."""
    return {"pid": os.getpid(), "cwd": os.getcwd(), "environment": dict(os.environ)}


@server.tool()
async def wait(seconds: float) -> str:
    """Wait."""
    await anyio.sleep(seconds)
    return f"waited {seconds:g} s"


@server.tool()
def die() -> str:
    """End at once."""
    os._exit(3)


@server.tool()
async def learn(name: str, context: Context[Any], heard: bool = False) -> str:
    """Get a new tool; not before that is heard over HTTP, if so asked."""
    if heard:
        await listened_to.wait()
    server.add_tool(lambda: "learnt", name=name, description="New.")
    await context.notify_tools_changed()  # those who listen, as of 2026
    await context.session.send_tool_list_changed()  # everybody, before
    return "learnt"


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        print("ready to serve", file=sys.stderr, flush=True)
        server.run("stdio")
    else:
        import uvicorn
        from starlette.types import ASGIApp, Message, Receive, Scope, Send

        class Guarded:
            def __init__(self, app: ASGIApp, token: str) -> None:
                self.app, self.token = app, token

            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                given = dict(scope.get("headers", ())).get(b"authorization", b"").decode()
                if scope["type"] == "http" and self.token and given != f"Bearer {self.token}":
                    await send({"type": "http.response.start", "status": 401, "headers": []})
                    await send({"type": "http.response.body", "body": b"who are you?"})
                    return

                async def begun(message: Message) -> None:
                    if scope.get("method") == "GET":
                        listened_to.set()
                    await send(message)

                await self.app(scope, receive, begun)

        app = Guarded(server.streamable_http_app(), sys.argv[3] if len(sys.argv) > 3 else "")
        uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")

"""`MCPConnector`: all MCP servers of a worker.

A swap starts the new sessions beside the old, and refuses if a server gets lost by it (`MCPServer.required`); the old ones
end once nobody uses the old connector any more. Without servers it is an embedded fallback: it has no tools, and says so.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from segue.worker.backend.conversation import Tool
from segue.worker.backend.mcp_connector.settings import MCPSettings
from segue.worker.backend.tools.result import ToolResult, failed

if TYPE_CHECKING:
    from segue.worker.backend.mcp_connector.session import ServerSession

_log = logging.getLogger("segue.mcp")

_CALLS_END_S = 1.0
"""How long an end waits for calls that nobody holds a lease for."""
_FALLBACK = "embedded fallback: no MCP server is configured"


class MCPUnreachableError(ConnectionError):
    """A server that is needed can't be reached; the message says which and why."""


class MCPConnector:
    """The MCP servers."""

    def __init__(self, settings: MCPSettings, previous: MCPConnector | None = None) -> None:
        self.settings = settings
        self._needed = _needed(settings, previous)
        self._sessions: dict[str, ServerSession] = {}
        self._listeners: list[Callable[[], None]] = []
        self._started = False
        self._closed = False

    @property
    def kind(self) -> str:
        """What this is."""
        return f"{len(self.settings.servers)} MCP servers" if self.settings.servers else _FALLBACK

    async def start(self) -> None:
        """Connect to all servers; to those that can be done without for a moment only, and later if need be.

        Raises `MCPUnreachableError` for a server that is needed, and RuntimeError if the SDK isn't installed.
        """
        if self.settings.servers:
            await self._connect()
        self._started = True

    async def _connect(self) -> None:
        if not _has_sdk():
            raise RuntimeError(
                "MCP servers need the MCP SDK, which is not installed: pip install 'segue[ai]'"
            )
        # half a second of importing, which a worker that serves can't do on its loop
        home = "segue.worker.backend.mcp_connector.session"
        module = await asyncio.to_thread(importlib.import_module, home)
        settings = self.settings
        for name, server in settings.servers.items():
            session: ServerSession = module.ServerSession(name, server, settings, self._changed)
            self._sessions[name] = session
            session.begin()
        brief_s = min(settings.patience_s, settings.connect_timeout_s)
        # a session that is late says so itself; what is added is for it to unwind
        long_s = settings.connect_timeout_s + 5.0
        connected = await asyncio.gather(
            *(
                session.settled(long_s if name in self._needed else brief_s)
                for name, session in self._sessions.items()
            )
        )
        missing = [
            f"MCP server {name} can't be reached: {session.reason}"
            for (name, session), there in zip(self._sessions.items(), connected, strict=True)
            if name in self._needed and not there
        ]
        if missing:
            await self.close()
            raise MCPUnreachableError("; ".join(missing))

    async def close(self) -> None:
        """Leave all sessions; children have ended then."""
        self._closed = True
        await asyncio.gather(*(session.end(_CALLS_END_S) for session in self._sessions.values()))

    # ---------------------------------------------------------------------------------------------------- tools

    def tools(self) -> list[Tool]:
        """Of all servers that are there, as ``SERVER__TOOL``."""
        return [tool for session in self._sessions.values() for tool in session.tools]

    def knows(self, name: str) -> bool:
        """Whether it is a tool of one of the servers, even if that isn't there at the moment."""
        return any(session.knows(name) for session in self._sessions.values())

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Call a tool. Raises nothing but a cancellation; a server that is connecting again is waited for a moment."""
        for session in self._sessions.values():
            if session.knows(name):
                return await session.call(name, arguments)
        known = ", ".join(tool.name for tool in self.tools()) or "none"
        return failed(f"there is no MCP tool {name!r}; known: {known}")

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called, on the loop, whenever the list of tools has changed; returns what ends that."""
        self._listeners.append(callback)

        def unsubscribe() -> None:
            if callback in self._listeners:
                self._listeners.remove(callback)

        return unsubscribe

    def _changed(self) -> None:
        for callback in list(self._listeners):
            try:
                callback()
            except Exception:  # noqa: BLE001 - one that fails must not keep it from the others
                _log.exception("event=mcp-listener-failed")

    # -------------------------------------------------------------------------------------------------- telling

    def connected_to(self, name: str) -> bool:
        """Whether there is a session with that server."""
        session = self._sessions.get(name)
        return session is not None and session.connected

    def metrics(self) -> dict[str, Any]:
        """For the status. ``is_connected``: there are servers, and all are there."""
        connected = [session.connected for session in self._sessions.values()]
        return {
            "mcp_available": _has_sdk(),
            "is_connected": bool(connected) and all(connected),
            "fallback_enabled": not self.settings.servers,
            "fallback_initialized": not self.settings.servers and self._started,
            "servers_connected": sum(connected),
            "tools": len(self.tools()),
            "servers": {name: self._detail(session) for name, session in self._sessions.items()},
        }

    def health(self) -> dict[str, Any]:
        """Good unless a server with ``required = true`` isn't there; says of each how it is."""
        lost = [
            f"MCP server {name} can't be reached: {session.reason}"
            for name, session in self._sessions.items()
            if session.server.required and not session.connected
        ]
        servers = {name: session.reason or "connected" for name, session in self._sessions.items()}
        return {"ok": not lost, "reason": "; ".join(lost) or None, "kind": self.kind, "servers": servers}

    @staticmethod
    def _detail(session: ServerSession) -> dict[str, Any]:
        return {
            "connected": session.connected,
            "tools": len(session.tools),
            "connections": session.connections,
            "reason": session.reason or "",
            "protocol": session.protocol or "",
        }


def _needed(settings: MCPSettings, previous: MCPConnector | None) -> frozenset[str]:
    """The servers without which there is no start."""
    needed = {name for name, server in settings.servers.items() if server.required}
    if previous is not None:
        before = previous.settings.servers
        needed |= {
            name
            for name, server in settings.servers.items()
            if server.required is None and (before.get(name) != server or previous.connected_to(name))
        }
    return frozenset(needed)


def _has_sdk() -> bool:
    return importlib.util.find_spec("mcp") is not None

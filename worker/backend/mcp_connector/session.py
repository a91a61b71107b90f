"""One server: its session, entered and left in one task of its own, lost and made again with a back-off.

The SDK's transports are made of task groups and cancel scopes, which have to be left by the task that entered them, in
reverse order. So nobody else enters or leaves anything here: who wants the session to end cancels the scope that is
outermost in the task, and a deadline for connecting is a timer that does the same (a scope around the entering alone would
have to end in the middle of those entered in it).

Imports the SDK: to be imported itself only when a server is configured.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import anyio
import httpx2
import mcp_types
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp_types import CONNECTION_CLOSED, REQUEST_TIMEOUT

import segue
from segue.worker.backend.conversation import Tool
from segue.worker.backend.mcp_connector import keeper
from segue.worker.backend.mcp_connector.content import as_text
from segue.worker.backend.mcp_connector.naming import names
from segue.worker.backend.mcp_connector.said import Said
from segue.worker.backend.mcp_connector.settings import MCPServer, MCPSettings
from segue.worker.backend.tools.result import ToolResult, failed
from segue.worker.services.secret import hide, secrets_in

_log = logging.getLogger("segue.mcp")

_MAX_PAGES = 100
_STEADY_S = 60.0
"""A session that lasted so long begins the back-off anew when it is lost."""
_END_S = 8.0
"""How long the end of a session may take: the SDK gives a child 2 s after the end of its input and 2 s after SIGTERM."""


class _Brief(logging.Filter):
    """What a server writes that is no message, a greeting for one, is worth a line, but not a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """All pass."""
        record.exc_info = record.exc_text = None
        return True


logging.getLogger("mcp.client.stdio").addFilter(_Brief())


class SessionError(Exception):
    """A session can't be had, or was lost; the message is the reason."""


class ServerSession:
    """What there is of one server."""

    def __init__(
        self, name: str, server: MCPServer, settings: MCPSettings, on_change: Callable[[], None]
    ) -> None:
        self.name = name
        self.server = server
        self.reason: str | None = "it is being connected to"
        """Why there is no session; None: there is one."""
        self.attempts = 0
        """How often a session was tried since the last one stood."""
        self.connections = 0
        """How many sessions there were."""
        self.tools: list[Tool] = []
        """Those that can be called now, under the names that models use."""
        self.protocol: str | None = None
        """The version of the protocol that is spoken."""
        self._known: dict[str, str] = {}
        self._settings = settings
        self._on_change = on_change
        self._client: Client | None = None
        self._settled = asyncio.Event()
        self._up = asyncio.Event()
        self._poke = asyncio.Event()
        self._ending = asyncio.Event()
        self._scope: anyio.CancelScope | None = None
        self._calls = 0
        self._no_calls = asyncio.Event()
        self._no_calls.set()
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a session."""
        return self._client is not None

    def begin(self) -> None:
        """Connect, and stay so, in a task of its own."""
        self._task = asyncio.create_task(self._run(), name=f"mcp {self.name}")

    async def settled(self, timeout_s: float) -> bool:
        """Wait until the first attempt has come to something; returns whether there is a session."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        return self.connected

    async def end(self, patience_s: float = 0.0) -> None:
        """Leave the session, after the calls in flight if they take no longer than `patience_s`; a child is gone then."""
        if self._task is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._no_calls.wait()
        self._ending.set()
        if self._scope is not None:
            self._scope.cancel()
        done, _ = await asyncio.wait({self._task}, timeout=_END_S)
        if not done:
            _log.error("event=mcp-session-hangs server=%s", self.name)
            self._task.cancel()

    def knows(self, name: str) -> bool:
        """Whether it has, or had when it was there last, a tool of that name; of one that was never there: may have."""
        return name in self._known if self.connections else name.startswith(f"{self.name}__")

    # -------------------------------------------------------------------------------------------------- calling

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Call a tool by the name that models use."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self._client is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.patience_s):
                    await self._up.wait()
        client = self._client
        if client is None:
            return failed(f"MCP server {self.name} can't be reached: {self.reason}", loop.time() - began)
        if name not in self._known:
            return failed(f"MCP server {self.name} has no tool {name!r}", loop.time() - began)
        self._calls += 1
        self._no_calls.clear()
        try:
            result = await client.call_tool(
                self._known[name], arguments, read_timeout_seconds=self._settings.call_timeout_s
            )
        except Exception as error:  # noqa: BLE001 - whatever the SDK raises, the call has failed
            self._poke.set()  # is it still there?
            return failed(self._why_call(error), loop.time() - began)
        finally:
            self._calls -= 1
            if not self._calls:
                self._no_calls.set()
        text, seconds = as_text(result), loop.time() - began
        return failed(text, seconds) if result.is_error else ToolResult(True, text, None, seconds)

    def _why_call(self, error: Exception) -> str:
        if isinstance(error, MCPError) and error.code == REQUEST_TIMEOUT:
            return f"MCP server {self.name} has not answered within {self._settings.call_timeout_s:g} s"
        if isinstance(error, MCPError) and error.code == CONNECTION_CLOSED:
            return f"the connection to MCP server {self.name} was lost during the call"
        return f"MCP server {self.name}: {self._describe(error)}"

    # -------------------------------------------------------------------------------------------------- the task

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = self._settings.retry_first_s
        while not self._ending.is_set():
            began, before = loop.time(), self.connections
            self.attempts += 1
            reason = await self._session()
            if self._ending.is_set():
                reason = "it is closed"
            elif self.connections > before and loop.time() - began > _STEADY_S:
                pause_s = self._settings.retry_first_s
            self.reason = reason
            self._settled.set()
            if not self._ending.is_set():
                _log.warning(
                    "event=mcp-server-lost server=%s again_in_s=%.1f reason=%s", self.name, pause_s, reason
                )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s * random.uniform(0.8, 1.2)):  # noqa: S311 - no secret
                        await self._ending.wait()
                pause_s = min(self._settings.retry_cap_s, pause_s * 2)

    async def _session(self) -> str:
        """One session from begin to end; returns why it ended."""
        said: Said | None = None
        late = False
        reason: str | None = None

        def expire() -> None:
            nonlocal late
            late = True
            # whoever waits for it need not wait for the end of a child, too
            self.reason = f"it has not shaken hands within {self._settings.connect_timeout_s:g} s"
            self._settled.set()
            scope.cancel()

        with anyio.CancelScope() as scope:
            self._scope = scope
            timer = asyncio.get_running_loop().call_later(self._settings.connect_timeout_s, expire)
            try:
                async with contextlib.AsyncExitStack() as stack:
                    if self.server.command:
                        said = Said(self.name)
                        stack.callback(said.close)
                    client = await stack.enter_async_context(await self._client_for(stack, said))
                    tools = await self._list(client)
                    timer.cancel()
                    self._stand(client, tools)
                    # first of all that is undone: nobody is to begin a call on what is being left
                    stack.callback(self._fall)
                    await self._stay(client)
            except Exception as error:  # noqa: BLE001 - groups, too; the SDK's own are many
                reason = self._describe(error)
            finally:
                timer.cancel()
                self._scope = None
        if late:
            reason = self.reason
        if said is not None and said.last and not self._ending.is_set():
            reason = f"{reason} (it said: {hide(said.last, secrets_in(self.server))})"
        return reason or "it was lost"

    async def _client_for(self, stack: contextlib.AsyncExitStack, said: Said | None) -> Client:
        if said is None:
            http = await stack.enter_async_context(self._http())
            transport = _Watched(streamable_http_client(self.server.url, http_client=http), self._hung_up)
        else:
            transport = _Watched(
                stdio_client(self._child(), errlog=said.file), self._hung_up, said.file.close
            )
        return Client(
            transport,
            mode=self.server.protocol,
            read_timeout_seconds=self._settings.connect_timeout_s,
            message_handler=self._on_message,
            client_info=mcp_types.Implementation(name="segue", version=segue.__version__),
            cache=None,
        )

    def _child(self) -> StdioServerParameters:
        server = self.server
        if server.cwd and not Path(server.cwd).is_dir():  # what the system says of it doesn't name it
            raise SessionError(f"its working directory {server.cwd} is not there")
        inherited = {name: os.environ[name] for name in server.inherit if name in os.environ}
        return StdioServerParameters(
            command=sys.executable,
            args=["-I", "-S", keeper.__file__, str(os.getpid()), server.command, *server.args],
            env=inherited | {name: value.reveal() for name, value in server.env.items()},
            cwd=server.cwd or None,
        )

    def _http(self) -> httpx2.AsyncClient:
        headers = {name: value.reveal() for name, value in self.server.headers.items()}
        token = self.server.token.reveal()
        if self.server.token_file:
            try:
                token = Path(self.server.token_file).read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                raise SessionError(f"token_file {self.server.token_file} can't be read: {error}") from None
        if token:
            headers["Authorization"] = f"Bearer {token}"
        return create_mcp_http_client(headers=headers)

    async def _on_message(self, message: object) -> None:
        if isinstance(message, mcp_types.ToolListChangedNotification):
            self._poke.set()

    # ------------------------------------------------------------------------------------------------- standing

    def _stand(self, client: Client, tools: list[mcp_types.Tool]) -> None:
        self._client, self.reason, self.attempts = client, None, 0
        self.connections += 1
        self.protocol = client.protocol_version
        self._offer(tools)
        self._up.set()
        self._settled.set()
        _log.info(
            "event=mcp-server-connected server=%s protocol=%s tools=%d", self.name, self.protocol, len(tools)
        )

    def _hung_up(self) -> None:
        """The other side has closed the connection: from now on calls wait for the next one."""
        self._fall()
        self._poke.set()

    def _fall(self) -> None:
        if self._client is None:  # it never stood, or has fallen: why is known better
            return
        self._client, self.reason = None, "its connection has just been lost"
        self._up.clear()
        if self.tools:
            self.tools = []
            self._on_change()

    def _offer(self, tools: list[mcp_types.Tool]) -> None:
        by_name = {tool.name: tool for tool in tools}
        known = names(self.name, by_name)
        offered = [
            Tool(name, by_name[own].description or by_name[own].title or "", by_name[own].input_schema)
            for name, own in sorted(known.items())
        ]
        self._known = known
        if offered != self.tools:
            self.tools = offered
            self._on_change()

    async def _stay(self, client: Client) -> None:
        """Until the session is lost (raises) or the scope is cancelled; keeps the list of tools up to date."""
        async with self._told_of_changes(client):
            while True:
                self._poke.clear()
                with anyio.move_on_after(self._settings.refresh_s):
                    await self._poke.wait()
                if self._client is None:
                    raise SessionError("it has closed the connection")
                try:
                    self._offer(await self._list(client))
                except MCPError as error:
                    # one that works on a call may not answer meanwhile
                    if error.code != REQUEST_TIMEOUT or not self._calls:
                        raise

    @contextlib.asynccontextmanager
    async def _told_of_changes(self, client: Client) -> AsyncIterator[None]:
        """The version of 2026 tells of changes only those who listen; older ones tell everybody."""
        capability = client.server_capabilities.tools
        if client.session.initialize_result is not None or not (capability and capability.list_changed):
            yield
            return
        async with anyio.create_task_group() as group:
            group.start_soon(self._listen, client)
            yield
            group.cancel_scope.cancel()

    async def _listen(self, client: Client) -> None:
        try:
            async with client.listen(tools_list_changed=True) as events:
                self._poke.set()  # what has changed since they were listed isn't told
                async for _ in events:
                    self._poke.set()
        except Exception as error:  # noqa: BLE001 - without it the list is asked for now and then all the same
            _log.debug("event=mcp-not-told-of-changes server=%s reason=%s", self.name, error)

    async def _list(self, client: Client) -> list[mcp_types.Tool]:
        if client.server_capabilities.tools is None:
            return []
        tools: list[mcp_types.Tool] = []
        cursor: str | None = None
        for _ in range(_MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if cursor is None:
                break
        return tools

    def _describe(self, error: BaseException) -> str:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        said = str(error) or type(error).__name__
        if not isinstance(error, MCPError | SessionError | RuntimeError) and str(error):
            said = f"{type(error).__name__}: {said}"
        return hide(said, secrets_in(self.server))


class _Watched:
    """A transport that says when the other side has gone, even while nobody asks anything of it."""

    def __init__(
        self, transport: Any, on_end: Callable[[], None], on_begin: Callable[[], None] | None = None
    ) -> None:
        self._transport = transport
        self._on_end = on_end
        self._on_begin = on_begin

    async def __aenter__(self) -> tuple[Any, Any]:
        read, write = await self._transport.__aenter__()
        if self._on_begin is not None:
            self._on_begin()
        return _WatchedStream(read, self._on_end), write

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool | None:
        ended: bool | None = await self._transport.__aexit__(kind, error, where)
        return ended


class _WatchedStream:
    """What is received; all else is the stream's own."""

    def __init__(self, stream: Any, on_end: Callable[[], None]) -> None:
        self._stream = stream
        self._on_end = on_end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __aiter__(self) -> _WatchedStream:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._stream.__anext__()
        except (StopAsyncIteration, anyio.ClosedResourceError, anyio.EndOfStream):
            self._on_end()
            raise

    async def __aenter__(self) -> _WatchedStream:
        await self._stream.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool | None:
        ended: bool | None = await self._stream.__aexit__(kind, error, where)
        return ended

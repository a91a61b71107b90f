"""`ToolDispatcher`: all tools there are, those in files and those of MCP servers, called by name.

A reload makes a new one beside the old: it takes over what has not changed, the statistics and the threads, and leaves the
old one as it is, since the swap may still be given up. Calls that run go on with the code on which they began.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

import segue
from segue.worker.backend.conversation import Tool
from segue.worker.backend.tools import loading
from segue.worker.backend.tools.context import ToolContext
from segue.worker.backend.tools.loading import Library, LoadedTool, LoadError
from segue.worker.backend.tools.result import ToolResult, failed
from segue.worker.backend.tools.running import Runner, ToolFailedError
from segue.worker.backend.tools.schema import ArgumentsError
from segue.worker.backend.tools.settings import ToolOptions, ToolSettings
from segue.worker.backend.tools.statistics import Statistics
from segue.worker.backend.tools.threads import Threads

_log = logging.getLogger("segue.tools")


class ToolServers(Protocol):
    """Tools of other processes: `segue.worker.backend.mcp_connector.MCPConnector`."""

    def tools(self) -> list[Tool]:
        """Those that can be called now."""

    def knows(self, name: str) -> bool:
        """Whether it is one of theirs, even if it can't be called now."""

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Never raises but for cancellation."""


class Immunity(Protocol):
    """What learns from failures: `segue.worker.backend.lis.LIS`. Sources are ``tool:NAME``."""

    def breaker_open(self, source: str) -> bool:
        """Whether the source isn't to be asked for a while."""

    def failed(self, source: str, reason: str) -> None:
        """It has failed."""

    def answered(self, source: str, text: str) -> object:
        """It has answered."""


class Learning(Protocol):
    """What remembers how tools have worked: `segue.worker.backend.learning.LearningManager`."""

    @property
    def tools(self) -> Statistics:
        """All calls."""


class ToolDispatcher:
    """The tools of a worker."""

    def __init__(
        self,
        settings: ToolSettings,
        llm: Any,
        mcp: ToolServers,
        lis: Immunity,
        previous: ToolDispatcher | None = None,
        options: ToolOptions | None = None,
        learning: Learning | None = None,
    ) -> None:
        self.settings = settings
        self.llm = llm
        self.mcp = mcp
        self.lis = lis
        self._only = options.tool if options is not None else None
        self._before: Library | None = previous.library if previous is not None else None
        self._statistics: Statistics
        if learning is not None:
            self._statistics = learning.tools
        else:
            self._statistics = previous._statistics if previous is not None else Statistics()
        threads: Threads | None = previous._threads if previous is not None else None
        if threads is None or threads.limit != settings.max_threads:
            threads = Threads(settings.max_threads)
        self._threads: Threads = threads
        self._runner = Runner(settings, threads)
        self.library: Library = Library(settings.directory)
        """What is loaded."""
        self._tools: dict[str, LoadedTool] = {}
        self._changed: list[str] = []

    def set_learning(self, learning: Learning) -> None:
        """From here on calls are told to this one."""
        self._statistics = learning.tools

    @property
    def problems(self) -> dict[str, str]:
        """By key of the file: why it isn't loaded as it is now, with the traceback. Its old version goes on."""
        return dict(self.library.problems)

    async def start(self) -> None:
        """Load what is new or has changed.

        Raises `segue.Unknown` if there is no tool of the name that this one reload is about, and
        `segue.worker.backend.tools.loading.LoadError` if that one can't be loaded, or the directory can't be read.
        """
        directory = self.settings.directory or loading.bundled()
        before, self._before = self._before, None
        only = None
        if before is not None and before.directory != directory:
            if self._only is not None:
                raise LoadError("a reload of one tool keeps the directory; reload them all")
            before = None
        if self._only is not None:
            only = await self._find(self._only, directory, before)
        self.library = await loading.build(
            directory, before, only, self._threads, self.settings.load_deadline_s
        )
        self._tools = self.library.tools
        old = before.tools if before is not None else {}
        self._changed = [name for name, tool in self._tools.items() if name in old and old[name] is not tool]
        for key, reason in self.library.problems.items():
            lines = reason.splitlines()
            _log.error(
                "event=tool-not-loaded tool=%s old_version_goes_on=%s reason=%s",
                key,
                key in self.library.files,
                lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}",
            )

    def activate(self) -> None:
        """What the old code of a tool did is not held against the new one: it may be called at once."""
        while self._changed:
            self.lis.answered(f"tool:{self._changed.pop()}", "")

    async def _find(self, name: str, directory: str, before: Library | None) -> str:
        """The key of the file that `name` is about: one that is there now, or was."""
        found = before.key_of(name) if before is not None else None
        if found is not None:
            return found
        now = await loading.look(directory, self._threads, self.settings.load_deadline_s)
        if name in now:
            return name
        raise segue.Unknown("tool", name, {*now, *(before.known if before is not None else ())})

    # -------------------------------------------------------------------------------------------------- calling

    def tools(self) -> list[Tool]:
        """What can be called now, for a model; of two with the same name the one in a file counts."""
        own = [
            Tool(tool.name, tool.signature.description, tool.signature.parameters)
            for tool in self._tools.values()
        ]
        return own + [tool for tool in self.mcp.tools() if tool.name not in self._tools]

    def knows(self, name: str) -> bool:
        """Whether there is such a tool, even if its server isn't there at the moment: a call waits for it then."""
        return name in self._tools or self.mcp.knows(name)

    async def call(self, name: str, arguments: str | Mapping[str, Any]) -> ToolResult:
        """Call a tool; `arguments` as JSON text, which may be anything, or as what was read from it.

        Raises nothing but a cancellation: what goes wrong is in the result.
        """
        began = time.perf_counter()
        try:
            return await self._call(name, arguments, began)
        except Exception as error:  # noqa: BLE001 - a part that breaks its promise must not break the dialogue
            _log.exception("event=tool-call-failed tool=%s", name)
            return failed(f"{type(error).__name__}: {error}", time.perf_counter() - began)

    async def _call(self, name: str, arguments: str | Mapping[str, Any], began: float) -> ToolResult:
        tool, mcp, lis, source = self._tools.get(name), self.mcp, self.lis, f"tool:{name}"
        if tool is None and not mcp.knows(name):
            known = ", ".join(sorted(each.name for each in self.tools())) or "none"
            return failed(f"there is no tool {name!r}; known: {known}")
        if lis.breaker_open(source):
            return failed(f"{name} has failed several times and is not called for a while")
        text, error, is_its_own = "", None, True
        try:
            if tool is not None:
                text = await self._run(tool, arguments)
            else:
                text = await self._ask(mcp, name, arguments)
        except ArgumentsError as wrong:
            error, is_its_own = str(wrong), False
        except ToolFailedError as broken:
            error = str(broken)
        seconds = time.perf_counter() - began
        self._statistics.add(name, seconds, error)
        if error is None:
            lis.answered(source, text)
            return ToolResult(True, text, None, seconds)
        if is_its_own:  # wrong arguments are the fault of who gave them
            lis.failed(source, error)
            _log.warning(
                "event=tool-failed tool=%s seconds=%.3f reason=%s", name, seconds, " ".join(error.split())
            )
        return failed(error, seconds)

    async def _run(self, tool: LoadedTool, arguments: str | Mapping[str, Any]) -> str:
        decoded = tool.signature.decode(arguments)
        if tool.signature.context is not None:
            decoded[tool.signature.context] = ToolContext(tool.name, self.llm)
        return await self._runner.run(tool, decoded)

    async def _ask(self, mcp: ToolServers, name: str, arguments: str | Mapping[str, Any]) -> str:
        try:
            async with asyncio.timeout(self.settings.deadline_s):
                result = await mcp.call(name, _object(arguments))
        except TimeoutError:
            raise ToolFailedError(f"it took longer than {self.settings.deadline_s:g} s") from None
        if not result.ok:
            raise ToolFailedError(result.error or result.text)
        limit = self.settings.max_result_chars
        text = result.text
        return text if len(text) <= limit else f"{text[:limit]}… (cut: {len(text)} characters)"

    # --------------------------------------------------------------------------------------------------- telling

    def statistics(self) -> dict[str, dict[str, Any]]:
        """By name of the tool: ``invocations``, ``failures``, ``recent_failures``, ``success_rate``, ``avg_latency``."""
        return self._statistics.by_tool()

    def totals(self) -> dict[str, Any]:
        """Over all tools: ``total_invocations``, ``recent_failures``, ``success_rate``, ``avg_latency`` (ms)."""
        return self._statistics.totals()

    def metrics(self) -> dict[str, Any]:
        """For the status; rates are weighted over the workers."""
        return self._statistics.metrics() | {
            "tools": len(self.tools()),
            "problems": len(self.library.problems),
            "hanging": sum(tool.hanging for tool in self._tools.values()),
            "abandoned_threads": self._threads.abandoned,
        }

    def health(self) -> dict[str, Any]:
        """Good; with the problems, since files that can't be loaded stop no other. Who reloads is told of them."""
        return {
            "ok": True,
            "directory": self.library.directory,
            "problems": self.problems,
            "notes": [
                f"{reason}\n({'its old version goes on' if key in self.library.files else 'it has no tools'})"
                for key, reason in self.library.problems.items()
            ],
        }


def _object(arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(arguments, str):
        return dict(arguments)
    text = arguments.strip()
    try:
        return msgspec.json.decode(text if text not in {"", "null"} else "{}", type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ArgumentsError(f"the arguments are one JSON object: {error}") from None

"""One call of a loaded tool: in a thread or on the loop, until its deadline, its result as text.

Whatever a tool does (SystemExit, a cancellation of its own, results that are no JSON) ends its call and nothing else.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from collections.abc import Coroutine, Mapping
from typing import Any

import msgspec

from segue.worker.backend.tools.loading import LoadedTool
from segue.worker.backend.tools.settings import ToolSettings
from segue.worker.backend.tools.threads import DeadlineError, Threads

_log = logging.getLogger("segue.tools")

_UNWIND_S = 1.0
"""A task that was cancelled may take so long to end; from then on it hangs."""


class ToolFailedError(Exception):
    """A call has failed; the message is one line for a person or a model."""


class Runner:
    """Runs tools, any number at once."""

    def __init__(self, settings: ToolSettings, threads: Threads) -> None:
        self._settings = settings
        self._threads = threads
        self._tasks: set[asyncio.Task[str]] = set()

    async def run(self, tool: LoadedTool, arguments: Mapping[str, Any]) -> str:
        """What the tool returns, as text. Raises `ToolFailedError`."""
        if tool.hanging >= self._settings.max_hanging:
            raise ToolFailedError(
                f"{tool.hanging} calls of {tool.name} have not ended since their deadline; it is not called before "
                "one of them has, or its file has been changed and reloaded"
            )
        try:
            if tool.asynchronous:
                text = await self._on_loop(tool, arguments)
            else:
                text = await self._threads.run(
                    lambda: self._in_thread(tool, arguments), self._settings.deadline_s, tool
                )
        except DeadlineError as error:
            raise ToolFailedError(str(error)) from None
        limit = self._settings.max_result_chars
        return text if len(text) <= limit else f"{text[:limit]}… (cut: {len(text)} characters)"

    def _in_thread(self, tool: LoadedTool, arguments: Mapping[str, Any]) -> str:
        try:
            return _text(tool.function(**arguments))
        except ToolFailedError:
            raise
        except BaseException as error:  # noqa: BLE001 - SystemExit of a tool is a failure of the tool
            raise _failure(tool, error) from None

    async def _on_loop(self, tool: LoadedTool, arguments: Mapping[str, Any]) -> str:
        task = asyncio.ensure_future(_guarded(tool, tool.function(**arguments)))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        try:
            done, _ = await asyncio.wait({task}, timeout=self._settings.deadline_s)
        except asyncio.CancelledError:
            self._cut(tool, task)
            raise
        if not done:
            self._cut(tool, task)
            raise DeadlineError(f"it took longer than {self._settings.deadline_s:g} s")
        if task.cancelled():
            raise ToolFailedError("it has cancelled itself")
        return task.result()

    def _ended(self, task: asyncio.Task[str]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may be waiting any more; it is no news then

    def _cut(self, tool: LoadedTool, task: asyncio.Task[str]) -> None:
        """Cancel it, and count it as hanging if that doesn't end it."""

        def look() -> None:
            if not task.done():
                tool.hanging += 1
                task.add_done_callback(back)

        def back(_: object) -> None:
            tool.hanging -= 1

        task.cancel()
        asyncio.get_running_loop().call_later(_UNWIND_S, look)


async def _guarded(tool: LoadedTool, work: Coroutine[Any, Any, Any]) -> str:
    try:
        return _text(await work)
    except (ToolFailedError, asyncio.CancelledError):
        raise
    except BaseException as error:  # noqa: BLE001 - SystemExit would end the whole loop
        raise _failure(tool, error) from None


def _failure(tool: LoadedTool, error: BaseException) -> ToolFailedError:
    _log.debug("event=tool-raised tool=%s\n%s", tool.name, "".join(traceback.format_exception(error)))
    try:
        said = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - an exception of a tool may be anything
        said = ""
    return ToolFailedError(f"{type(error).__name__}: {said}" if said else type(error).__name__)


def _text(result: Any) -> str:
    """A text as it is, anything else as JSON. Raises `ToolFailedError`."""
    if isinstance(result, str):
        return result.encode(errors="replace").decode()  # half a surrogate pair could be sent nowhere
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise ToolFailedError("it has returned something to wait for; such a tool is written with async def")
    try:
        return msgspec.json.encode(result).decode()
    except Exception as error:
        raise ToolFailedError(
            f"it has returned a {type(result).__name__}, which is neither text nor JSON: {error}"
        ) from error

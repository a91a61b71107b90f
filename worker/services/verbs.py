"""How an instance is told something: its method or the declared function, sync or async, under a deadline."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from segue.worker.lifespan import describe
from segue.worker.services.declaration import Declaration
from segue.worker.services.errors import Unknown, VerbError

_MISSING = object()


def has(declaration: Declaration, value: Any, verb: str) -> bool:
    """Whether the service has this verb."""
    return method(declaration, value, verb) is not None


async def tell(declaration: Declaration, value: Any, verb: str, timeout_s: float) -> Any:
    """Do `verb`, if there is one. Raises `VerbError` when it raises, or isn't done within `timeout_s` seconds."""
    do = method(declaration, value, verb)
    if do is None:
        return None
    return await bounded(do, (), {}, timeout_s, f"{verb} of service {declaration.name!r}")


async def bounded(
    do: Any, arguments: tuple[Any, ...], named: dict[str, Any], timeout_s: float, what: str
) -> Any:
    """Call `do` and await what it returns if that can be awaited. Raises `VerbError` and `Unknown`."""
    task: asyncio.Task[Any] | None = None
    try:
        found = do(*arguments, **named)
        if not inspect.isawaitable(found):
            return found
        # in a task of its own: one that ignores its cancellation must not keep whoever waits for it
        task = asyncio.ensure_future(_await(found))
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not done:
            task.cancel()
            task.add_done_callback(_consume)
            raise VerbError(f"{what} took longer than {timeout_s:g} s")
        return task.result()
    except (VerbError, Unknown):
        raise
    except asyncio.CancelledError:
        if task is not None and task.done():  # it was cancelled by itself
            raise VerbError(f"{what} was cancelled") from None
        if task is not None:
            task.cancel()
            task.add_done_callback(_consume)
        raise
    except Exception as error:
        raise VerbError(f"{what} failed: {describe(error)}") from error


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _consume(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


def method(declaration: Declaration, value: Any, verb: str) -> Any:
    """What does `verb` for this instance, to be called without arguments; None if it has no such verb."""
    declared = declaration.verbs.get(verb, _MISSING)
    if declared is None:
        return None
    if declared is not _MISSING:
        assert callable(declared)
        return lambda: declared(value)
    method = getattr(value, verb, None)
    return method if callable(method) else None

"""How an instance is told something: its method or the declared function, sync or async, under a deadline.

What is async runs in a task of its own, so that nobody waits longer than the deadline for one that ignores its
cancellation. What is sync runs on the loop, and keeps everything waiting for as long as it takes.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from segue.worker.lifespan import describe
from segue.worker.services.declaration import Declaration
from segue.worker.services.errors import Unknown, VerbError
from segue.worker.services.instance import Instance
from segue.worker.services.secret import hide, secrets_in

_MISSING = object()
_UNWIND_S = 1.0
"""How long one that was cancelled may take to end, before whoever waits goes on without it."""


def has(declaration: Declaration, value: Any, verb: str) -> bool:
    """Whether the service has this verb."""
    return method(declaration, value, verb) is not None


async def tell(declaration: Declaration, instance: Instance[Any], verb: str) -> Any:
    """Do `verb`, if there is one, and return what it returns.

    Raises `VerbError` when it raises, or isn't done within the declared time; `start` may raise `Unknown`, too.
    """
    do = method(declaration, instance.value, verb)
    if do is None:
        return None
    timeout_s: float = getattr(declaration, f"{verb}_timeout")
    what = f"{verb} of service {declaration.name!r}"
    try:
        return await bounded(do, {}, timeout_s, what, instance.settings)
    except Unknown as error:
        if verb == "start":
            raise
        raise _failed(what, error, instance.settings) from error


async def bounded(do: Any, named: dict[str, Any], timeout_s: float, what: str, settings: Any = None) -> Any:
    """Call `do` and await what it returns if that can be awaited. Raises `VerbError` and `Unknown`.

    No secret of `settings` shows in a `VerbError`.
    """
    try:
        try:
            found = do(**named)
        except asyncio.CancelledError:  # its own: that of whoever waits is raised where it waits
            raise VerbError(f"{what} was cancelled") from None
        if not inspect.isawaitable(found):
            return found
        task = asyncio.ensure_future(_await(found))
        try:
            done, _ = await asyncio.wait({task}, timeout=timeout_s)
            if not done:
                raise VerbError(f"{what} took longer than {timeout_s:g} s")
        finally:
            await _end(task)
        if task.cancelled():
            raise VerbError(f"{what} was cancelled")
        return task.result()
    except (VerbError, Unknown):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a service raises is why it failed
        failed = _failed(what, error, settings)
        # a traceback of the cause would show what the message doesn't
        raise failed from (error if str(failed).endswith(describe(error)) else None)


def _failed(what: str, error: Exception, settings: Any) -> VerbError:
    return VerbError(f"{what} failed: {hide(describe(error), secrets_in(settings))}")


async def _await(awaitable: Any) -> Any:
    return await awaitable


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel it unless it is done, and let it unwind: what follows, `close` for one, isn't to run beside it."""
    task.add_done_callback(_consume)
    if not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_UNWIND_S)


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

"""An agent that does what a test wants to go wrong while the subscription passes to another process: once, in whoever is first.

The file ``fault`` beside the application names the step at which its process is killed, or what is done instead.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hsp_app  # type: ignore[import-not-found]

from segue.worker.backend.hsp import recruiting
from segue.worker.backend.hsp.mailbox import Mailbox, Seat
from segue.worker.backend.hsp.muster import LinedUp, Ready
from segue.worker.backend.hsp.recruit import Recruit
from segue.worker.backend.hsp.recruiting import Recruiting
from segue.worker.backend.hsp.sessions import Sessions

# the machine may be busy with others; both are less than the master waits
recruiting._ANSWER_S, recruiting._LIMIT_S = 3.0, 8.0
app = hsp_app.app
_FAULT = Path(hsp_app.__file__).with_name("fault")


def _is_due(name: str) -> bool:
    try:
        if _FAULT.read_text() != name:
            return False
        _FAULT.rename(f"{_FAULT}.{name}")
    except FileNotFoundError:
        return False
    return True


def _die_at(name: str) -> None:
    if _is_due(name):
        os.kill(os.getpid(), signal.SIGKILL)


def _dying_after(owner: Any, method: str, name: str, due: Callable[..., bool]) -> None:
    """Once it has done that; `due` is asked with whose method it was, its result and its arguments by name."""
    do = getattr(owner, method)

    async def dying(self: Any, *arguments: Any, **more: Any) -> Any:
        result = await do(self, *arguments, **more)
        if due(self, result, **more):
            _die_at(name)
        return result

    setattr(owner, method, dying)


def _found(_: Any, result: Any) -> bool:
    return result is not None


def _spares(_: Sessions, __: None, *, spare: bool = False, **___: Any) -> bool:
    return spare


def _is_passed_on(mailbox: Mailbox, seat: Seat) -> bool:
    return seat.holder != mailbox._topics.instance


_dying_after(Sessions, "open", "recruit-has-opened", _spares)
_dying_after(Recruiting, "recruit", "old-has-stopped", _found)
_dying_after(Mailbox, "give_seat", "old-has-given-the-seat", _is_passed_on)
_dying_after(Recruit, "take_up", "recruit-is-activated", _found)
_publish, _enlist, _choose = Recruiting._publish, Recruit.enlist, Recruiting._choose


async def _publishing(self: Recruiting, message: Any) -> None:
    if isinstance(message, LinedUp):
        _die_at("recruit-is-at-the-cut")
    await _publish(self, message)
    if isinstance(message, Ready):
        _die_at("recruit-is-ready")
    if isinstance(message, LinedUp):
        _die_at("recruit-has-lined-up")


def _enlisting(self: Recruit, order: Any, stands_by: bool) -> None:
    if not _is_due("recruit-is-deaf"):
        _enlist(self, order, stands_by)


async def _choosing(self: Recruiting) -> Any:
    chosen = await _choose(self)
    if chosen is not None and _is_due("wrong-one-is-recruited"):
        others = [each for each in self._others.values() if each.stands_by and each != chosen]
        return max(others, key=lambda each: (each.generation, each.worker))
    return chosen


Recruiting._publish = _publishing  # type: ignore[method-assign]
Recruit.enlist = _enlisting  # type: ignore[method-assign]
Recruiting._choose = _choosing  # type: ignore[method-assign]

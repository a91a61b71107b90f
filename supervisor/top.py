"""``segue top``: generations, workers, reloads and events of an instance, as they are now, and single keys to steer it.

One thread draws and reads keys; what was asked for with a key runs in another, so that one sees it happen. The terminal
gets back what it had however this ends: on its own screen, with its own settings (a kill -9 excepted).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live

from segue.handoff.messages import HOT
from segue.supervisor import client
from segue.supervisor.instance import Instance, InstanceError
from segue.supervisor.look import Look, Picture
from segue.supervisor.terminal import coloured

_INTERRUPTED = 128


class Action:
    """What a key does."""

    def __init__(self, key: str, name: str, path: str, ask_first: bool = False) -> None:
        self.key, self.name, self.path, self.ask_first = key, name, path, ask_first

    def target(self, document: dict[str, Any]) -> str:
        """What to POST."""
        workers = next((g["workers_wanted"] for g in document["generations"] if g["current"]), 1)
        match self.key:
            case "+":
                return f"{self.path}?workers={workers + 1}"
            case "-":
                return f"{self.path}?workers={max(1, workers - 1)}"
            case "d":
                return f"{self.path}/{'stop' if document['draining'] else 'start'}"
        return self.path


ACTIONS = (
    Action("r", "reload", f"{HOT}/reload"),
    Action("s", "stage", f"{HOT}/stage"),
    Action("p", "promote", f"{HOT}/promote", ask_first=True),
    Action("x", "discard", f"{HOT}/discard", ask_first=True),
    Action("b", "rollback", f"{HOT}/rollback", ask_first=True),
    Action("+", "scale up", f"{HOT}/scale"),
    Action("-", "scale down", f"{HOT}/scale"),
    Action("d", "drain", f"{HOT}/drain", ask_first=True),
)


def available(endpoints: frozenset[str]) -> list[Action]:
    """The actions that this master knows."""
    return [action for action in ACTIONS if action.path in endpoints or f"{action.path}/start" in endpoints]


class _Ended(BaseException):
    """A signal has come."""

    def __init__(self, status: int) -> None:
        self.status = status


class Asked:
    """What was asked for with a key: asks in a thread of its own, and tells the outcome."""

    def __init__(self, instance: Instance, changed: Callable[[], None]) -> None:
        self._instance, self._changed = instance, changed
        self._lock = threading.Lock()
        self._busy = False
        self.message = ""
        self.waiting: tuple[Action, str] | None = None
        """What is to be confirmed."""

    def press(self, action: Action, document: dict[str, Any]) -> None:
        """Do it, or ask whether it is meant."""
        target = action.target(document)
        with self._lock:
            if self._busy:
                self.message = "one thing at a time"
            elif action.ask_first:
                self.waiting, self.message = (
                    (action, target),
                    f"{action.name}? [y] to do it, any other key not to",
                )
            else:
                self._start(action, target)

    def confirm(self, key: str) -> None:
        """The answer to the question."""
        waiting, self.waiting, self.message = self.waiting, None, ""
        if waiting is not None and key == "y":
            self._start(*waiting)

    def _start(self, action: Action, target: str) -> None:
        self._busy, self.message = True, f"{action.name} …"
        threading.Thread(target=self._run, args=(action, target), daemon=True).start()

    def _run(self, action: Action, target: str) -> None:
        try:
            operation = client.post(self._instance, target)
            operation = client.follow(
                self._instance, operation, lambda phase: self._say(f"{action.name}: {phase} …")
            )
            refused = operation["outcome"] != "ok"
            outcome = f"refused: {operation['reason']}" if refused else "done"
        except (InstanceError, KeyError, ValueError) as error:
            outcome = str(error)
        with self._lock:  # who reads it may press the next key
            self._busy, self.message = False, f"{action.name}: {outcome}"
        self._changed()

    def _say(self, message: str) -> None:
        self.message = message
        self._changed()


def run(look: Look, interval: float) -> int:
    """Draw and obey until ``q``; returns the exit status."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def wake() -> None:
        with contextlib.suppress(OSError):
            os.write(write, b"\0")

    asked = Asked(look.instance, wake)
    console = Console(no_color=not coloured(), highlight=False)
    try:
        with (
            _signals(wake) as stopped,
            _keys() as keys,
            Live(
                console=console, screen=True, auto_refresh=False, transient=True, vertical_overflow="crop"
            ) as live,
        ):
            return _loop(look, interval, asked, live, keys, read, stopped)
    except _Ended as ended:
        return ended.status
    finally:
        os.close(read)
        os.close(write)


def _loop(
    look: Look,
    interval: float,
    asked: Asked,
    live: Live,
    keys: Callable[[bool], None],
    wakes: int,
    stopped: list[bool],
) -> int:
    due = 0.0
    while True:
        if stopped:  # Ctrl-Z: the shell gets its terminal back for as long as it likes
            stopped.clear()
            live.stop()
            keys(False)
            os.kill(os.getpid(), signal.SIGSTOP)
            keys(True)
            live.start()
        if time.monotonic() >= due:
            look.take()
            due = time.monotonic() + interval
        names = [f"[{action.key}] {action.name}" for action in available(look.endpoints)]
        live.update(Picture(look, [*names, "[q] quit"], asked.message), refresh=True)
        ready, _, _ = select.select([0, wakes], [], [], max(0.0, due - time.monotonic()))
        if wakes in ready:
            os.read(wakes, 4096)
        if 0 in ready:
            typed = os.read(0, 64).decode(errors="replace")
            if not typed:
                return 0  # the terminal is gone
            for key in typed:
                if asked.waiting is not None:
                    asked.confirm(key)
                elif key in "qQ\x03\x04":
                    return 0
                elif look.document is not None and (action := _action(look, key)) is not None:
                    asked.press(action, look.document)
                    due = 0.0


def _action(look: Look, key: str) -> Action | None:
    key = "+" if key == "=" else key
    return next((action for action in available(look.endpoints) if action.key == key), None)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[bool], None]]:
    """Let single keys come without being shown; what the terminal was before, it is again in the end."""
    before = termios.tcgetattr(0)

    def switch(on: bool) -> None:
        if on:
            tty.setcbreak(0, termios.TCSADRAIN)
        else:
            termios.tcsetattr(0, termios.TCSADRAIN, before)

    try:
        switch(True)
        yield switch
    finally:
        switch(False)


@contextlib.contextmanager
def _signals(wake: Callable[[], None]) -> Iterator[list[bool]]:
    """End by an exception, so that everything is put back; a stop by the terminal is left to the loop."""
    stopped: list[bool] = []

    def end(number: int, _: FrameType | None) -> None:
        raise _Ended(_INTERRUPTED + number)

    def stop(_: int, __: FrameType | None) -> None:
        stopped.append(True)
        wake()

    handlers: dict[signal.Signals, Any] = dict.fromkeys(
        (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT), end
    )
    handlers |= {signal.SIGTSTP: stop, signal.SIGWINCH: lambda *_: wake()}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

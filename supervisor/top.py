"""``segue top``: generations, workers, reloads and events of an instance, as they are now, and single keys to steer it.

One thread draws and reads keys; what was asked for with a key runs in another, so that one sees it happen. The terminal
gets back what it had however this ends: on its own screen, with its own settings (a kill -9 excepted).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from segue.handoff.messages import HOT
from segue.supervisor import client
from segue.supervisor.instance import Instance, InstanceError
from segue.supervisor.terminal import colour_of, coloured

_RELOADS = 5
_EVENTS = 6
_MIB = 2**20
_LEVELS = {"warning": "yellow", "error": "red", "critical": "red"}
_INTERRUPTED = 128


class Look:
    """What is to be seen of an instance, look by look: rates are between two of them."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.document: dict[str, Any] | None = None
        self.events: list[dict[str, Any]] = []
        self.gone = ""
        """Why nothing can be seen now."""
        self.endpoints: frozenset[str] = frozenset()
        self._before: dict[tuple[int, int], tuple[float, int]] = {}

    def take(self) -> None:
        """Look again."""
        try:
            answer = client.get(self.instance, f"{HOT}/status")
            document: dict[str, Any] = answer.json()
            self.events = client.get(self.instance, f"{HOT}/events?last={_EVENTS}").json().get("events", [])
            if not self.endpoints:
                self.endpoints = frozenset(client.get(self.instance, f"{HOT}/").json().get("known", ()))
        except InstanceError as error:
            self.gone = str(error)
            return
        self.gone = ""
        self._count(document, time.monotonic())
        self.document = document

    def _count(self, document: dict[str, Any], now: float) -> None:
        counted: dict[tuple[int, int], tuple[float, int]] = {}
        for generation in document["generations"]:
            for worker in generation["workers"]:
                key = (generation["id"], worker["id"])
                worker["requests_per_second"] = None
                if worker["requests_total"] is not None:
                    counted[key] = (now, worker["requests_total"])
                    if key in self._before:
                        then, total = self._before[key]
                        rate = (worker["requests_total"] - total) / max(now - then, 1e-6)
                        worker["requests_per_second"] = round(max(0.0, rate), 1)
        self._before = counted


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


# ------------------------------------------------------------------------------------------------------- drawing


def draw(look: Look, message: str = "", keys: bool = True) -> RenderableType:
    """The whole picture."""
    document = look.document
    if document is None:
        return Text(look.gone or "looking …", style="red" if look.gone else "")
    parts: list[RenderableType] = [_head(document, look.gone), Text(), _workers(document)]
    if document["reloads"]:
        parts += [Text(), _reloads(document)]
    if look.events:
        parts += [Text(), *(_event(event) for event in look.events)]
    if keys:
        names = [f"[{action.key}] {action.name}" for action in available(look.endpoints)]
        parts += [Text(), Text("   ".join([*names, "[q] quit"]), style="dim"), Text(message, style="bold")]
    return Group(*parts)


def _head(document: dict[str, Any], gone: str) -> Text:
    master = document["master"]
    state = "ready" if document["ready"] else "NOT READY"
    text = Text.assemble(
        (f"segue {document['instance']} ", "bold"),
        (state, f"bold {colour_of(state) or 'green'}"),
        no_wrap=True,
    )
    if document["stopping"]:
        text.append("  stopping", "yellow")
    if document["draining"]:
        text.append(f"  draining ({document['drain_mode']})", "yellow")
    rate = sum(w["requests_per_second"] or 0 for g in document["generations"] for w in g["workers"])
    text.append(f"  {rate:,.0f} requests/s")
    text.append(f"   master pid {master['pid']}, {master['version']}, {_mib(master['rss_bytes'])}", "dim")
    text.append("   " + ", ".join(listener["address"] for listener in document["listeners"]), "dim")
    for difference in master["differs_on_disk"]:
        text.append(f"\nnote: {difference}", "yellow")
    if gone:
        text.append(f"\n{gone}", "red")
    return text


def _workers(document: dict[str, Any]) -> Table:
    table = _table("GEN", "STATE", "AGE")
    table.add_column("CODE", overflow="ellipsis")  # on a narrow terminal it gives way first
    for head in ("WORKER", "PID", "STATE"):
        table.add_column(head, no_wrap=True)
    for head in ("CONNS", "BUSY", "REQ/S", "CPU", "MEMORY"):
        table.add_column(head, justify="right", no_wrap=True)
    for generation in document["generations"]:
        state = generation["state"] + (" (short)" if generation["workers_missing"] else "")
        cells = [
            Text(str(generation["id"]), style="bold" if generation["current"] else ""),
            _state(state, generation["state"]),
            _age(generation["since"]),
            (generation["fingerprint"] or "-")[:12],
        ]
        for worker in generation["workers"] or [{}]:
            rate = worker.get("requests_per_second")
            cpu = worker.get("cpu_percent")
            table.add_row(
                *cells,
                _text(worker.get("id")),
                _text(worker.get("pid")),
                _state(worker.get("state", "-")),
                _text(worker.get("connections")),
                _text(worker.get("in_flight")),
                "-" if rate is None else f"{rate:,.0f}",
                "-" if cpu is None else f"{cpu:.0f}%",
                _mib(worker.get("rss_bytes")),
            )
            cells = ["", "", "", ""]
    return table


def _reloads(document: dict[str, Any]) -> Table:
    table = _table("#", "WHAT", "GEN", "ASKED BY", "OUTCOME", "SECONDS")
    table.add_column("REASON", ratio=1, no_wrap=True, overflow="ellipsis")
    for reload in reversed(document["reloads"][-_RELOADS:]):
        outcome = reload["outcome"] or f"running ({reload['phase']})"
        seconds = sum(s for phase, s in reload["phases"].items() if phase not in {"queued", "drain"})
        table.add_row(
            str(reload["number"]),
            reload["kind"],
            str(reload["generation"] or "-"),
            reload["asked_by"],
            _state(outcome),
            f"{seconds:.2f}",
            reload["reason"],
        )
    return table


def _event(event: dict[str, Any]) -> Text:
    words = " ".join(f"{key}={value}" for key, value in event["fields"].items())
    stamp = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    style = _LEVELS.get(event["level"], "")
    return Text.assemble(
        (f"{stamp} ", "dim"), (event["event"], style), (f" {words}", "dim"), no_wrap=True, overflow="ellipsis"
    )


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, no_wrap=True)
    return table


def _state(text: str, word: str | None = None) -> Text:
    return Text(text, style=colour_of(word or text) or "")


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / _MIB:.0f} MiB"


def _age(since: float) -> str:
    seconds = max(0, int(time.time() - since))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def print_once(look: Look, interval: float, as_json: bool) -> None:
    """Look twice, for the rates, and print it. Raises what ends a command if there is nothing to see."""
    look.take()
    if not look.gone:
        time.sleep(interval)
        look.take()
    if look.gone or look.document is None:
        from segue.supervisor.commanding import fail
        from segue.supervisor.exits import Status

        fail(look.gone, Status.INSTANCE)
    if as_json:
        click.echo(json.dumps(look.document | {"events": look.events}, indent=2))
        return
    wide = {} if sys.stdout.isatty() else {"width": 160}
    console = Console(no_color=not coloured(), force_terminal=coloured() or None, highlight=False, **wide)  # type: ignore[arg-type]
    console.print(draw(look, keys=False))


# ---------------------------------------------------------------------------------------------------- interactive


class _Ended(BaseException):
    """A signal has come."""

    def __init__(self, status: int) -> None:
        self.status = status


class _Asked:
    """What was asked for with a key: asks in a thread of its own, and tells the outcome."""

    def __init__(self, instance: Instance, changed: Callable[[], None]) -> None:
        self._instance, self._changed = instance, changed
        self._thread: threading.Thread | None = None
        self.message = ""
        self.waiting: tuple[Action, str] | None = None
        """What is to be confirmed."""

    def press(self, action: Action, document: dict[str, Any]) -> None:
        """Do it, or ask whether it is meant."""
        target = action.target(document)
        if self._thread is not None and self._thread.is_alive():
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
        self.message = f"{action.name} …"
        self._thread = threading.Thread(target=self._run, args=(action, target), daemon=True)
        self._thread.start()

    def _run(self, action: Action, target: str) -> None:
        try:
            operation = client.post(self._instance, target)
            operation = client.follow(
                self._instance, operation, lambda phase: self._say(f"{action.name}: {phase} …")
            )
            refused = operation["outcome"] != "ok"
            self._say(f"{action.name}: {'refused: ' + operation['reason'] if refused else 'done'}")
        except (InstanceError, KeyError, ValueError) as error:
            self._say(f"{action.name}: {error}")

    def _say(self, message: str) -> None:
        self.message = message
        self._changed()


def run(look: Look, interval: float) -> int:
    """Draw and obey until ``q``; returns the exit status."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def wake() -> None:
        with contextlib.suppress(OSError):
            os.write(write, b"\0")

    asked = _Asked(look.instance, wake)
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
    asked: _Asked,
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
        live.update(draw(look, asked.message), refresh=True)
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

"""What is to be seen of an instance, and how ``segue top`` draws it."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from segue.handoff.messages import HOT
from segue.supervisor import client
from segue.supervisor.instance import Instance, InstanceError
from segue.supervisor.terminal import colour_of, coloured, health_of, seconds_of

_RELOADS = 5
_EVENTS = 6
_MIB = 2**20
_WIDE = 120
"""From so many columns on there is room for how slow workers are."""
_LATENCY_OVER_S = 10.0
_LEVELS = {"warning": "yellow", "error": "red", "critical": "red"}


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
        self._latency: dict[int, deque[tuple[float, list[int]]]] = {}
        """By pid: how many responses had taken how long, in the last seconds."""

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
        self._measure(document, now)

    def _measure(self, document: dict[str, Any], now: float) -> None:
        workers = [worker for generation in document["generations"] for worker in generation["workers"]]
        seen = {worker["pid"]: worker for worker in workers if worker.get("latency")}
        self._latency = {pid: self._latency.get(pid, deque()) for pid in seen}
        for pid, worker in seen.items():
            kept = self._latency[pid]
            kept.append((now, worker["latency"]))
            while len(kept) > 2 and now - kept[0][0] > _LATENCY_OVER_S:
                kept.popleft()
            counts = [late - early for late, early in zip(worker["latency"], kept[0][1], strict=False)]
            for name, part in (("p50", 0.5), ("p99", 0.99)):
                worker[name] = _quantile(counts, document["latency_bounds_s"], part)


class Picture:
    """The whole of it; `keys` say what can be pressed, `message` what became of the last.

    Where there is not enough room for everything, keys and message stay: a question must be seen before it is answered.
    """

    def __init__(self, look: Look, keys: Sequence[str] = (), message: str = "") -> None:
        self._look, self._keys, self._message = look, keys, message

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Line by line."""
        body = console.render_lines(self._body(options.max_width), options, pad=False)
        foot: list[list[Segment]] = []
        if self._keys:
            foot = console.render_lines(self._foot(), options, pad=False)[: max(1, console.height - 1)]
            body = body[: console.height - len(foot)]
        for line in [*body, *foot]:
            yield from line
            yield Segment.line()

    def _body(self, width: int) -> RenderableType:
        look, document = self._look, self._look.document
        if document is None:
            return Text(look.gone or "looking …", style="red" if look.gone else "")
        parts: list[RenderableType] = [_head(document, look.gone), Text(), _workers(document, width)]
        if document["services"]:
            parts += [Text(), _services(document)]
        if document["reloads"]:
            parts += [Text(), _reloads(document)]
        if look.events:
            parts += [Text(), *(_event(event) for event in look.events)]
        return Group(*parts)

    def _foot(self) -> RenderableType:
        return Group(Text(), Text(self._message, style="bold"), Text("   ".join(self._keys), style="dim"))


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


def _workers(document: dict[str, Any], width: int) -> Table:
    wide = width >= _WIDE
    table = _table("GEN", "STATE", "AGE")
    table.add_column("CODE", overflow="ellipsis")  # on a narrow terminal it gives way first
    for head in ("WORKER", "PID", "STATE"):
        table.add_column(head, no_wrap=True)
    slow = ("P50", "P99", "LAG") if wide else ()
    for head in ("CONNS", "BUSY", "REQ/S", *slow, "CPU", "MEMORY"):
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
            lag = worker.get("loop_lag_s")
            slowness = (worker.get("p50", "-"), worker.get("p99", "-"), "-" if lag is None else _short(lag))
            table.add_row(
                *cells,
                _text(worker.get("id")),
                _text(worker.get("pid")),
                _state(worker.get("state", "-")),
                _text(worker.get("connections")),
                _text(worker.get("in_flight")),
                "-" if rate is None else f"{rate:,.0f}",
                *(slowness if wide else ()),
                "-" if cpu is None else f"{cpu:.0f}%",
                _mib(worker.get("rss_bytes")),
            )
            cells = ["", "", "", ""]
    return table


def _services(document: dict[str, Any]) -> Table:
    table = _table("SERVICE", "VERSION", "HEALTH", "LEASES", "RETIRING")
    for name, service in document["services"].items():
        table.add_row(
            name,
            ", ".join(map(str, service["versions"])),
            _state(health_of(service), health_of(service).partition(":")[0]),
            str(service["leases"]),
            str(service["retiring"]),
        )
    return table


def _reloads(document: dict[str, Any]) -> Table:
    table = _table("#", "WHAT", "GEN", "ASKED BY", "OUTCOME", "SECONDS")
    table.add_column("REASON", ratio=1, no_wrap=True, overflow="ellipsis")
    for reload in reversed(document["reloads"][-_RELOADS:]):
        outcome = reload["outcome"] or f"running ({reload['phase']})"
        table.add_row(
            str(reload["number"]),
            reload["kind"],
            str(reload["generation"] or "-"),
            reload["asked_by"],
            _state(outcome),
            f"{seconds_of(reload):.2f}",
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


def _quantile(counts: Sequence[int], bounds: Sequence[float], part: float) -> str:
    """The upper bound of the bucket in which it lies: what is known for certain."""
    wanted, seen = sum(counts) * part, 0
    for count, bound in zip(counts, bounds, strict=False):
        seen += count
        if seen >= wanted > 0:
            return f"≤{_short(bound)}"
    return f">{_short(bounds[-1])}" if wanted else "-"


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


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
        time.sleep(interval)  # rates are measured over it
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
    console.print(Picture(look))

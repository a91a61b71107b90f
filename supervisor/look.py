"""What is to be seen of an instance, and how ``segue top`` draws it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from segue.handoff.messages import HOT
from segue.supervisor import client
from segue.supervisor.instance import Instance, InstanceError
from segue.supervisor.terminal import colour_of, coloured, seconds_of

_RELOADS = 5
_EVENTS = 6
_MIB = 2**20
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


def draw(look: Look, keys: Sequence[str] = (), message: str = "") -> RenderableType:
    """The whole picture; `keys` say what can be pressed, `message` what became of the last."""
    document = look.document
    if document is None:
        return Text(look.gone or "looking …", style="red" if look.gone else "")
    parts: list[RenderableType] = [_head(document, look.gone), Text(), _workers(document)]
    if document["services"]:
        parts += [Text(), _services(document)]
    if document["reloads"]:
        parts += [Text(), _reloads(document)]
    if look.events:
        parts += [Text(), *(_event(event) for event in look.events)]
    if keys:
        parts += [Text(), Text("   ".join(keys), style="dim"), Text(message, style="bold")]
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


def _services(document: dict[str, Any]) -> Table:
    table = _table("SERVICE", "VERSION", "HEALTH", "LEASES", "RETIRING")
    for name, service in document["services"].items():
        table.add_row(
            name,
            ", ".join(map(str, service["versions"])),
            _health(service),
            str(service["leases"]),
            str(service["retiring"]),
        )
    return table


def _health(service: dict[str, Any]) -> Text:
    if service["degraded"]:
        return Text(f"degraded: {service['degraded']}", style="yellow")
    if service["healthy"] is None:
        return Text("-")
    return Text("healthy", style="green") if service["healthy"] else Text("unhealthy", style="red")


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
    console.print(draw(look))

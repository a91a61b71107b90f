"""``segue status`` for a person, with colours: who prints it takes them away where they aren't wanted."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click

from segue.supervisor.terminal import colour_of, health_of, seconds_of

_RELOADS_SHOWN = 5


def status_table(document: dict[str, Any]) -> str:
    """The master's status as text."""
    master = document["master"]
    word = "ready" if document["ready"] else "NOT READY"
    head = click.style(word, fg=colour_of(word), bold=True)
    if document["stopping"]:
        head += ", stopping"
    if document["draining"]:
        head += f", draining ({document['drain_mode']})"
    lines = [
        f"instance {document['instance']}: {head}",
        f"master   pid {master['pid']}, segue {master['version']}, up {_age(master['started'])}, {_mib(master['rss_bytes'])}",
        "listens  " + (", ".join(listener["address"] for listener in document["listeners"]) or "nowhere yet"),
        *(f"admin    {_link(address)}" for address in document.get("admin", ())),  # an older master has none
        *(_code(generation) for generation in document["generations"] if generation["code"]),
        *(f"note     {difference}" for difference in master["differs_on_disk"]),
        "",
    ]
    rows = []
    for generation in document["generations"]:
        for worker in generation["workers"] or [{}]:
            rows.append(
                [
                    str(generation["id"]),
                    _state(generation, document["probation"]),
                    str(generation["fingerprint"] or ""),
                    *_worker_cells(worker),
                ]
            )
    lines += _columns(["GEN", "STATE", "CODE", *_WORKER_HEADS], rows)
    if document["services"]:
        lines += ["", *_columns(["SERVICE", "VERSION", "HEALTH", "LEASES"], _service_rows(document))]
    if document["reloads"]:
        lines += [
            "",
            *_columns(
                ["#", "WHAT", "GEN", "ASKED BY", "OUTCOME", "SECONDS", "REASON"], _reload_rows(document)
            ),
        ]
    return "\n".join(lines)


def _link(address: str) -> str:
    """The dashboard's address."""
    return address if address.startswith("unix:") else f"http://{address}/"


def _code(generation: dict[str, Any]) -> str:
    """Which code a generation runs."""
    code = generation["code"]
    python = f", Python {code['python']}" if code["python"] else ""
    line = f"code     {generation['id']}: {code['title']}{python}, {len(code['distributions'])} distributions"
    return f"{line}; changed: {generation['changes']['summary']}" if generation["changes"] else line


def _state(generation: dict[str, Any], probation: dict[str, Any] | None) -> str:
    """A generation's, with what there is to know of how long it lasts."""
    notes = ["short"] if generation["workers_missing"] else []
    if probation is not None and probation["generation"] == generation["id"]:
        watch = "canary" if generation["state"] == "mixed" else "probation"
        notes.append(f"{watch}, {_left(probation['until'])}")
    if generation["state"] in {"draining", "parked"} and generation["kept_until"] is not None:
        warm = generation["state"] == "draining" or generation["workers"]
        notes.append(f"{'' if warm else 'cold, '}can be taken back, {_left(generation['kept_until'])}")
    state: str = generation["state"]
    return state + (f" ({'; '.join(notes)})" if notes else "")


def _left(until: float) -> str:
    return f"{max(0.0, until - time.time()):.0f} s"


def orphan_table(workers: Iterable[dict[str, Any]]) -> str:
    """Workers that have lost their master, as text."""
    rows = [
        [
            str(worker["generation"]),
            *_worker_cells(worker | {"id": worker["worker"], "state": worker["mode"]}),
        ]
        for worker in workers
    ]
    lines = ["these workers have lost their master and go on serving; 'segue stop' ends them", ""]
    return "\n".join(lines + _columns(["GEN", *_WORKER_HEADS], rows))


_WORKER_HEADS = ["WORKER", "PID", "STATE", "CONNS", "BUSY", "REQUESTS", "CPU", "RSS"]


def _worker_cells(worker: dict[str, Any]) -> list[str]:
    cpu = worker.get("cpu_percent")
    return [
        _text(worker.get("id")),
        _text(worker.get("pid")),
        _text(worker.get("state")),
        _text(worker.get("connections")),
        _text(worker.get("in_flight")),
        _text(worker.get("requests_total")),
        "-" if cpu is None else f"{cpu:.0f}%",
        _mib(worker.get("rss_bytes")),
    ]


def _service_rows(document: dict[str, Any]) -> list[list[str]]:
    return [
        [name, ", ".join(map(str, service["versions"])), health_of(service), str(service["leases"])]
        for name, service in document["services"].items()
    ]


def _reload_rows(document: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(reload["number"]),
            reload["kind"],
            _text(reload["generation"]),
            reload["asked_by"],
            reload["outcome"] or f"running ({reload['phase']})",
            f"{seconds_of(reload):.2f}",
            reload["reason"],
        ]
        for reload in document["reloads"][-_RELOADS_SHOWN:]
    ]


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(_coloured(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    head = "  ".join(cell.ljust(width) for cell, width in zip(heads, widths, strict=True)).rstrip()
    return [click.style(head, bold=True), *lines]


def _coloured(cell: str, width: int) -> str:
    colour = colour_of(cell) or colour_of(re.split("[ :]", cell, maxsplit=1)[0])
    return (click.style(cell, fg=colour) if colour else cell) + " " * (width - len(cell))


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f} MiB"


def _age(since: float) -> str:
    seconds = max(0, int(time.time() - since))
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

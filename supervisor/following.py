"""The events of a running master, for a person or a script: the last ones, and those that come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import click

from segue.handoff.http_client import CallError, follow
from segue.handoff.lines import quoted
from segue.handoff.messages import HOT
from segue.supervisor.instance import Instance, InstanceError

_SILENCE_S = 60.0
"""A master says something at least every quarter of this."""
_AWAY_S = 10.0
"""How long a master may be gone before it counts as ended: it may be renewing itself, or be followed by another."""
_RETRY_S = 0.1
_LAST_EVENT = "exit"
_COLOURS = {"warning": "yellow", "error": "red", "critical": "red"}


def line_of(event: dict[str, Any]) -> str:
    """One event as the log writes it, with colours."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    level = event["level"]
    words = [f"{click.style(f'{key}=', dim=True)}{quoted(value)}" for key, value in event["fields"].items()]
    head = [
        click.style(stamp, dim=True),
        click.style(f"{level.upper():<7}", fg=_COLOURS.get(level)),
        click.style(event["event"], bold=True, fg=_COLOURS.get(level)),
    ]
    lines = [" ".join([*head, *words])]
    lines += [click.style("    | ", dim=True) + line for line in event.get("output", "").splitlines()]
    return "\n".join(lines)


async def events_of(instance: Instance, after: str | None, last: int) -> AsyncIterator[dict[str, Any]]:
    """The last events, and all that come until the master has ended.

    A connection that is lost is made again, and nothing is told twice. Raises `InstanceError` when the master is gone
    without having said that it ends.
    """
    number, count = after, last
    while True:
        try:
            async for event in _stream(instance, number, count):
                number, count = event["id"], 1_000_000
                yield event
                if event["event"] == _LAST_EVENT:
                    return
        except CallError as error:
            await _wait_for_master(instance, error)


async def _wait_for_master(instance: Instance, error: CallError) -> None:
    deadline = time.monotonic() + _AWAY_S
    while True:
        await asyncio.sleep(_RETRY_S)
        if instance.locked_by() is not None:
            return
        if time.monotonic() > deadline:
            raise InstanceError(
                f"the master of instance {instance.name!r} is gone ({instance.directory})"
            ) from error


async def _stream(instance: Instance, after: str | None, count: int) -> AsyncIterator[dict[str, Any]]:
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
    text = b""
    async for piece in follow(
        instance.control, f"{HOT}/events?last={count}", timeout_s=_SILENCE_S, headers=headers
    ):
        *blocks, text = (text + piece).split(b"\n\n")
        for block in blocks:
            data = [line[6:] for line in block.split(b"\n") if line.startswith(b"data: ")]
            if data:
                event: dict[str, Any] = json.loads(b"\n".join(data))
                yield event
    raise CallError("the stream has ended")

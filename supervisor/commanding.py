"""What commands have in common: which instance they mean, how they ask it, and how they end."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import click

from segue.supervisor.exits import Status

_F = TypeVar("_F", bound=Callable[..., Any])


def fail(message: str, status: Status) -> NoReturn:
    """End the program, saying why."""
    click.echo(f"segue: {message}", err=True)
    sys.exit(status)


def instance_options(command: _F) -> _F:
    """The options that say which instance is meant."""
    for option in (
        click.option(
            "--name", default=None, envvar="SEGUE_NAME", help="The instance; needed only if several run."
        ),
        click.option(
            "--runtime-dir", default=None, help="Where instances live; default: where `serve` puts them."
        ),
    ):
        command = option(command)
    return command


class Waiting(NamedTuple):
    """How long a command waits for what it has asked for, and how it tells the outcome."""

    no_wait: bool = False
    timeout_s: float | None = None
    as_json: bool = False


class Seconds(click.FloatRange):
    """A length of time; what is no number at all is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click's own."""
        converted = super().convert(value, param, ctx)
        if math.isnan(converted):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return converted


def waiting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command that changes something be told its `Waiting`."""

    @functools.wraps(command)
    def waiting(*, no_wait: bool, timeout: float | None, as_json: bool, **others: Any) -> None:
        command(waiting=Waiting(no_wait, timeout, as_json), **others)

    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the operation as JSON."),
        click.option("--timeout", type=Seconds(min=0), default=None, help="Seconds to wait at most."),
        click.option("--no-wait", is_flag=True, help="Return at once."),
    ):
        waiting = option(waiting)
    return waiting


def find(runtime_dir: str | None, name: str | None) -> Any:
    """The instance that is meant; ends the program if there is none, or there are several."""
    from segue.supervisor.instance import InstanceError
    from segue.supervisor.instance import find as search

    try:
        return search(runtime_dir, name, os.environ)
    except InstanceError as error:
        fail(str(error), Status.INSTANCE)


def ask(instance: Any, target: str) -> Any:
    """The document that its master answers a GET with; ends the program if it doesn't."""
    from segue.supervisor.client import get
    from segue.supervisor.instance import InstanceError
    from segue.supervisor.terminal import Progress

    try:
        with Progress("asking the master"):
            answer = get(instance, target)
    except InstanceError as error:
        fail(str(error), Status.INSTANCE)
    if answer.status >= 400:
        fail(answer.json()["detail"], Status.REFUSED)
    return answer.json()


def change(instance: Any, target: str, waiting: Waiting, until: str = "serving") -> dict[str, Any]:
    """Ask for a change, show its phases, and end the program unless it was done."""
    from segue.supervisor.client import follow, post
    from segue.supervisor.instance import InstanceError
    from segue.supervisor.terminal import Progress

    operation: dict[str, Any] = {}
    try:
        with Progress("asking the master"):
            operation = post(instance, target)
        if waiting.no_wait and operation["id"] is not None:
            begun = f"operation {operation['id']} has begun"
            click.echo(json.dumps(operation, indent=2) if waiting.as_json else begun)
            sys.exit(Status.OK)
        with Progress("waiting") as progress:
            operation = follow(instance, operation, progress.say, until=until, timeout_s=waiting.timeout_s)
    except KeyboardInterrupt:
        goes_on = (
            f"{operation['kind']} goes on (operation {operation['id']})" if operation else "it may go on"
        )
        click.echo(f"segue: interrupted; {goes_on}: 'segue status' tells how it ends", err=True)
        sys.exit(Status.INTERRUPTED)
    except InstanceError as error:
        fail(str(error), Status.INSTANCE)
    if waiting.as_json:
        click.echo(json.dumps(operation, indent=2))
    conclude(operation, until)
    if waiting.as_json:
        sys.exit(Status.OK)
    return operation


def conclude(operation: dict[str, Any], until: str = "serving") -> None:
    """Tell an operation's outcome, and end the program unless it was done."""
    from segue.supervisor.operations import reached

    for note in operation.get("notes", ()):
        click.echo(f"note: {note}", err=True)
    if operation["outcome"] == "refused":
        click.echo(f"refused: {operation['reason']}", err=True)
        echo_output(operation["output"])
        sys.exit(Status.REFUSED)
    if operation["outcome"] == "rolled back":
        click.echo(f"rolled back: {operation['reason']}", err=True)
        sys.exit(Status.ROLLED_BACK)
    if until == "probation" and operation["probation"] in {"kept", "stopped"}:
        why = operation["reason"] or "segue was stopped before it was over"
        click.echo(f"generation {operation['generation']} did not pass its probation: {why}", err=True)
        sys.exit(Status.ROLLED_BACK)
    if not reached(operation, until):
        click.echo(f"still in phase {operation['phase']} (operation {operation['id']})", err=True)
        sys.exit(Status.LATE)


def echo_output(output: str) -> None:
    """The last lines of a worker that did not start."""
    if output:
        click.echo("last lines of its output:", err=True)
        for line in output.splitlines():
            click.echo(f"    | {line}", err=True)

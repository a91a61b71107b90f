"""What commands have in common: which instance they mean, how they ask it, and how they end when that fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

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

    try:
        answer = get(instance, target)
    except InstanceError as error:
        fail(str(error), Status.INSTANCE)
    if answer.status >= 400:
        fail(answer.json()["detail"], Status.REFUSED)
    return answer.json()

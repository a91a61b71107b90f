"""The commands that make one generation follow on another: reload, stage, promote, discard, rollback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

import click

from segue.handoff.messages import HOT, MAX_COUNT, MAX_WAIT_S, MAX_WORKERS
from segue.supervisor import exits
from segue.supervisor.commanding import Seconds, Waiting, change, find, instance_options, waiting_options
from segue.supervisor.terminal import seconds_of

_STRATEGIES = ("surge", "rolling", "replace")
_until = click.option(
    "--wait",
    type=click.Choice(["serving", "drained", "probation"]),
    default="serving",
    show_default=True,
    help="Return when the new generation serves, when nothing is left to finish in the old ones, or when its "
    "probation is over.",
)


def _manner(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command be told how a generation takes over, this time: by name, None as the settings say."""

    @functools.wraps(command)
    def taking_over(
        *, strategy: str | None, canary: int | None, canary_for: float | None, **others: Any
    ) -> None:
        command(manner={"strategy": strategy, "canary": canary, "canary_for": canary_for}, **others)

    for option in (
        click.option("--canary-for", type=Seconds(0, MAX_WAIT_S), metavar="SECONDS", help="For so long."),
        click.option(
            "--canary",
            type=click.IntRange(0, MAX_WORKERS),
            metavar="N",
            help="This time, let so many workers serve beside the old ones first; 0: none.",
        ),
        click.option(
            "--strategy", type=click.Choice(_STRATEGIES), help="This time, instead of what the settings say."
        ),
    ):
        taking_over = option(taking_over)
    return taking_over


_generation = click.argument("generation", metavar="[ID]", type=click.IntRange(1, MAX_COUNT), required=False)


@click.command(epilog=exits.DEPLOY_EPILOG)
@instance_options
@click.argument("service", metavar="[SERVICE]", required=False)
@click.option(
    "--set",
    "choices",
    metavar="KEY=VALUE",
    multiple=True,
    help="A setting of the new instance of SERVICE; may be repeated.",
)
@click.option("--tool", metavar="NAME", help="Of SERVICE tools: reload only this one (--set tool=NAME).")
@click.option("--profile", metavar="NAME", help="Of SERVICE personality: which one (--set profile=NAME).")
@_manner
@_until
@waiting_options
def reload(
    name: str | None,
    runtime_dir: str | None,
    service: str | None,
    choices: tuple[str, ...],
    tool: str | None,
    profile: str | None,
    manner: dict[str, Any],
    wait: str,
    waiting: Waiting,
) -> None:
    """Start a new generation and move every connection to it; refused if it does not get ready.

    With SERVICE, swap that service inside the running workers instead: all or none of them get the new instance.
    """
    choices += (f"tool={tool}",) if tool is not None else ()
    choices += (f"profile={profile}",) if profile is not None else ()
    if service is not None:
        if set(manner.values()) != {None}:
            raise click.UsageError("--strategy and --canary are for a reload of all, not of a service")
        _swap(find(runtime_dir, name), service, choices, wait, waiting)
        return
    if choices:
        raise click.UsageError("settings are for a service: segue reload SERVICE --set KEY=VALUE")
    target = _target("reload", **manner)
    operation = change(find(runtime_dir, name), target, waiting, until=wait)
    click.echo(_served(operation, wait))


def _swap(
    instance: Any,
    service: str,
    choices: tuple[str, ...],
    wait: str,
    waiting: Waiting,
) -> None:
    if wait != "serving":
        raise click.UsageError(f"a swap of a service has nothing to wait for with --wait {wait}")
    pairs = [choice.partition("=") for choice in choices]
    if any(not key or not equals for key, equals, _ in pairs):
        raise click.UsageError("--set takes KEY=VALUE")
    query = urlencode({key: value for key, _, value in pairs})
    target = f"{HOT}/reload/{quote(service, safe='')}" + (f"?{query}" if query else "")
    operation = change(instance, target, waiting)
    leases = sum(worker.get("leases_out", 0) for worker in operation["workers"])
    click.echo(
        f"{service} is version {operation['version']} in {len(operation['workers'])} workers "
        f"({seconds_of(operation):.2f} s)"
        + (f"; rewired: {', '.join(operation['rewired'])}" if operation["rewired"] else "")
        + (f"; {leases} leases still on the old one" if leases else "")
    )


@click.command(epilog=exits.EPILOG)
@instance_options
@waiting_options
def stage(name: str | None, runtime_dir: str | None, waiting: Waiting) -> None:
    """Start a new generation that is ready and warmed up, but serves nothing until it is promoted.

    Prints the private sockets on which its application can be asked.
    """
    operation = change(find(runtime_dir, name), _target("stage"), waiting)
    generation = operation["generation"]
    click.echo(f"generation {generation} is staged ({seconds_of(operation):.2f} s); it serves nothing yet")
    for probe in operation["probes"]:
        click.echo(f"    curl --unix-socket {probe['socket']} http://x/")
    click.echo(f"next: segue promote {generation}, or segue discard {generation}")


@click.command(epilog=exits.DEPLOY_EPILOG)
@instance_options
@_generation
@_manner
@_until
@waiting_options
def promote(
    name: str | None,
    runtime_dir: str | None,
    generation: int | None,
    manner: dict[str, Any],
    wait: str,
    waiting: Waiting,
) -> None:
    """Let a generation that is staged or parked (ID, or the staged one) serve, and move every connection to it."""
    target = _target("promote", generation=generation, **manner)
    operation = change(find(runtime_dir, name), target, waiting, until=wait)
    click.echo(_served(operation, wait))


@click.command(epilog=exits.EPILOG)
@instance_options
@_generation
@waiting_options
def discard(
    name: str | None,
    runtime_dir: str | None,
    generation: int | None,
    waiting: Waiting,
) -> None:
    """End a generation (ID, or the staged one) that is staged or parked, or give one up that is being started."""
    target = _target("discard", generation=generation)
    operation = change(find(runtime_dir, name), target, waiting)
    click.echo(f"generation {operation['generation']} is discarded")


@click.command(epilog=exits.EPILOG)
@instance_options
@_generation
@click.option(
    "--wait",
    type=click.Choice(["serving", "drained"]),
    default="serving",
    show_default=True,
    help="Return when the old generation serves again, or when nothing is left to finish in the other.",
)
@waiting_options
def rollback(
    name: str | None,
    runtime_dir: str | None,
    generation: int | None,
    wait: str,
    waiting: Waiting,
) -> None:
    """Take the previous generation (or ID) back, as long as it is still draining or parked."""
    target = _target("rollback", generation=generation)
    operation = change(find(runtime_dir, name), target, waiting, until=wait)
    click.echo(f"generation {operation['generation']} serves again ({seconds_of(operation):.3f} s)")


_PROBATIONS = {
    "passed": "serves and has passed its probation",
    "superseded": "served until another one took over, before its probation was over",
    None: "serves, and is on no probation",
}
"""What is said of a generation whose probation has been waited for; the other outcomes are failures."""
COMMANDS: tuple[click.Command, ...] = (reload, stage, promote, discard, rollback)


def _target(path: str, **query: Any) -> str:
    given = urlencode({key.replace("_", "-"): value for key, value in query.items() if value is not None})
    return f"{HOT}/{path}" + (f"?{given}" if given else "")


def _served(operation: dict[str, Any], wait: str) -> str:
    does = _PROBATIONS[operation["probation"]] if wait == "probation" else "serves"
    changes = operation.get("changes")
    changed = f"\nchanged: {changes['summary']}" if changes else ""
    return f"generation {operation['generation']} {does} ({seconds_of(operation):.2f} s){changed}"

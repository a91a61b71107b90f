"""The commands that look on: events, logs, top; and the completion of all of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from typing import Any

import click

from segue.handoff.messages import HOT
from segue.supervisor import exits
from segue.supervisor.commanding import ask, fail, find, instance_options
from segue.supervisor.exits import Status
from segue.supervisor.terminal import echo

_FOLLOW_LAST = 10
_SHOW_LAST = 100


@click.command(epilog=exits.EPILOG)
@instance_options
@click.option("-f", "--follow", is_flag=True, help="Go on with those that come, also over an upgrade.")
@click.option(
    "-n",
    "--last",
    type=click.IntRange(0),
    default=None,
    help=f"How many of the last ones. [default: {_SHOW_LAST}; {_FOLLOW_LAST} with --follow]",
)
@click.option("--after", metavar="ID", default=None, help="Only those after this one (see --json).")
@click.option("--json", "as_json", is_flag=True, help="A JSON document a line.")
def events(
    name: str | None,
    runtime_dir: str | None,
    follow: bool,
    last: int | None,
    after: str | None,
    as_json: bool,
) -> None:
    """Show what has happened: the lines of the master's log, of which the last 500 are kept."""
    from urllib.parse import quote

    from segue.supervisor.following import events_of, line_of
    from segue.supervisor.instance import InstanceError

    def show(event: dict[str, Any]) -> None:
        echo(json.dumps(event) if as_json else line_of(event))
        sys.stdout.flush()

    instance = find(runtime_dir, name)
    if last is None:
        last = 1_000_000 if after else _FOLLOW_LAST if follow else _SHOW_LAST
    if not follow:
        query = f"?last={last}" + (f"&after={quote(after)}" if after else "")
        for event in ask(instance, f"{HOT}/events{query}")["events"]:
            show(event)
        return

    async def run() -> None:
        async for event in events_of(instance, after, last):
            show(event)

    try:
        asyncio.run(run())
    except InstanceError as error:
        fail(str(error), Status.INSTANCE)


@click.command(epilog=exits.EPILOG)
@instance_options
@click.argument("which", metavar="[GENERATION|WORKER]", required=False)
@click.option("-f", "--follow", is_flag=True, help="Under systemd: go on with what comes.")
@click.option("-n", "--lines", type=click.IntRange(0), default=200, show_default=True, help="Of the journal.")
@click.option("--json", "as_json", is_flag=True, help="What was printed at the start, as JSON.")
def logs(
    name: str | None, runtime_dir: str | None, which: str | None, follow: bool, lines: int, as_json: bool
) -> None:
    """Show what workers print.

    What they print while they start is kept by the master, that of the last starts that failed, too. From then on they
    print where `segue serve` does; where that is the journal of systemd, it is shown as well.

    GENERATION is a number (3), WORKER one of a generation (3/1).
    """
    from segue.supervisor import outputs

    query, chosen = "", None
    if which is not None:
        try:
            chosen = outputs.selected(which)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        query = f"?generation={chosen[0]}" + ("" if chosen[1] is None else f"&worker={chosen[1]}")
    instance = find(runtime_dir, name)
    owner = instance.locked_by()
    if owner is None:
        fail(instance.without_master, Status.INSTANCE)
    printed = ask(instance, f"{HOT}/logs{query}")["logs"]
    if as_json:
        click.echo(json.dumps(printed, indent=2))
        if printed or chosen is None:
            return
    unit = outputs.journal_unit(owner.pid)
    if not printed and (chosen is not None or unit is None):
        known = ask(instance, f"{HOT}/logs")["logs"]
        there = ", ".join(f"{each['generation']}/{each['worker']}" for each in known) or "none"
        fail(
            f"nothing is kept of {which or 'any worker'} (there is: {there}); what workers print once they are ready "
            f"goes to the output of 'segue serve' (pid {owner.pid})",
            Status.REFUSED,
        )
    if follow and unit is None:
        fail(
            f"there is no journal to follow: workers print to the output of 'segue serve' (pid {owner.pid})",
            Status.REFUSED,
        )
    if unit is not None:  # what is ready has its start in the journal, too
        kept = [each for each in printed if each["state"] in {"booting", "failed"}]
    else:
        kept = printed
    if kept and not follow:
        echo(outputs.show(kept))
    if unit is not None:
        pids = [] if chosen is None else [each["pid"] for each in printed if each["state"] != "failed"]
        if chosen is None or pids:
            sys.stdout.flush()
            with contextlib.suppress(KeyboardInterrupt):
                subprocess.run(outputs.journal_command(unit, pids, lines, follow), check=False)


@click.command(epilog=exits.EPILOG)
@instance_options
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 60),
    default=1.0,
    show_default=True,
    help="Seconds between looks.",
)
@click.option("--once", is_flag=True, help="Look once, print it, and end; as if there were no terminal.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def top(name: str | None, runtime_dir: str | None, interval: float, once: bool, as_json: bool) -> None:
    """Watch generations, workers and reloads, and steer them with single keys."""
    from segue.supervisor.look import Look, print_once
    from segue.supervisor.top import run

    instance = find(runtime_dir, name)
    can_draw = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if as_json or once or not can_draw:
        print_once(Look(instance), interval, as_json)
    else:
        sys.exit(run(Look(instance), interval))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def completion(shell: str, as_json: bool) -> None:
    """Print what makes SHELL complete commands and options of segue.

    \b
    bash: eval "$(segue completion bash)" in ~/.bashrc
    zsh:  eval "$(segue completion zsh)" in ~/.zshrc
    fish: segue completion fish > ~/.config/fish/completions/segue.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    source = kind(root, {}, "segue", "_SEGUE_COMPLETE").source()
    click.echo(json.dumps({"shell": shell, "source": source}, indent=2) if as_json else source)


COMMANDS = (top, events, logs, completion)

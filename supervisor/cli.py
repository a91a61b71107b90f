"""The command line: ``segue serve`` and what steers it."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from typing import Any

import click

from segue import __version__
from segue.handoff.lines import is_journal, with_priority
from segue.handoff.messages import DRAIN_MODES, HOT, MAX_WORKERS
from segue.supervisor import deploying, exits, reaping, views
from segue.supervisor.commanding import (
    Seconds,
    Waiting,
    ask,
    change,
    conclude,
    echo_output,
    fail,
    find,
    instance_options,
    waiting_options,
)
from segue.supervisor.exits import Status
from segue.supervisor.options import ServeCommand, serve_options
from segue.supervisor.terminal import Progress, echo, seconds_of

_STOP_BUDGET_S = 30.0
_NOT_PRINTED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What writing into a file can end with. A pipe that nobody reads is click's matter."""


class _Commands(click.Group):
    """For click an interrupt is a failure like others; its status would say that nothing was done."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that is meant."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(Status.INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="segue")
def cli() -> None:
    """Serve an ASGI application, and change everything in it without a client noticing."""


@cli.command(cls=ServeCommand, epilog=exits.SERVE_EPILOG)
@serve_options
def serve(**flags: Any) -> None:
    """Serve APP (module:attribute); without APP a small built-in application."""
    from segue.supervisor.serve import StartError
    from segue.supervisor.serve import serve as run

    try:
        sys.exit(run(flags, os.environ))
    except StartError as error:
        text = f"segue: {error}"
        click.echo(with_priority(text, "error") if is_journal(2, os.environ) else text, err=True)
        sys.exit(error.status)


@cli.command(cls=ServeCommand, epilog=exits.CHECK_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
@serve_options
def check(as_json: bool, **flags: Any) -> None:
    """Import, start and warm up APP in a throw-away worker: the verdict that a reload would give."""
    from segue.supervisor.check import check as run
    from segue.supervisor.settings import SettingsError

    try:
        with Progress("starting it"):
            verdict = run(flags, os.environ)
    except SettingsError as error:
        fail(str(error), Status.USAGE)
    if as_json:
        import msgspec

        click.echo(json.dumps(msgspec.to_builtins(verdict), indent=2))
        sys.exit(Status.OK if verdict.ok else Status.NOT_STARTED)
    if verdict.ok:
        click.echo(f"ok: it would start (fingerprint {verdict.fingerprint})")
        return
    click.echo(f"refused: {verdict.reason}", err=True)
    echo_output(verdict.output)
    sys.exit(Status.NOT_STARTED)


@cli.command(cls=ServeCommand, epilog=exits.EPILOG)
@click.option("--socket", "socket", is_flag=True, help="The socket unit: systemd holds the addresses.")
@click.option("--template", is_flag=True, help="For several instances, each with a configuration of its own.")
@click.option("--user", help="Who the service runs as. [default: who runs this, or 'segue' if that is root]")
@click.option(
    "--type",
    "type_",
    type=click.Choice(["notify-reload", "notify"]),
    help="notify-reload needs systemd 253. [default: what the systemd of this machine has]",
)
@click.option("--json", "as_json", is_flag=True, help="The unit and the notes on it as JSON.")
@serve_options
def unit(
    socket: bool, template: bool, user: str | None, type_: str | None, as_json: bool, **flags: Any
) -> None:
    """Print a unit file for systemd that serves APP with these options, from here."""
    from segue.supervisor import place as places
    from segue.supervisor import unit as units
    from segue.supervisor.settings import SettingsError

    try:
        place, notes = places.here(flags, os.environ, user, template, type_)
        text = units.socket(place) if socket else units.service(place)
        notes += [] if socket else places.unwritable(place)
    except (SettingsError, places.UnitError) as error:
        fail(str(error), Status.USAGE)
    if as_json:
        click.echo(json.dumps({"unit": text, "notes": list(notes)}, indent=2))
        return
    click.echo(text, nl=False)
    for note in notes:
        click.echo(f"note: {note}", err=True)


@cli.command(epilog=exits.EPILOG)
@click.option(
    "--running", is_flag=True, help="What the running instance's current generation was started with."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@serve_options
def config(running: bool, as_json: bool, **flags: Any) -> None:
    """Print each effective setting and where it comes from."""
    from segue.supervisor import settings

    if running:
        _config_running(flags, as_json)
        return
    click.echo(settings.show(_load(flags), as_json))


def _load(flags: dict[str, Any]) -> Any:
    from segue.supervisor import settings

    try:
        return settings.load(flags, os.environ, settings.logical_cwd(os.environ))
    except settings.SettingsError as error:
        fail(str(error), Status.USAGE)


def _config_running(flags: dict[str, Any], as_json: bool) -> None:
    from segue.supervisor import settings

    running = ask(find(flags.get("runtime_dir"), flags.get("name")), f"{HOT}/config")
    if as_json:
        click.echo(json.dumps(running, indent=2))
        return
    here = json.loads(settings.show(_load(flags), as_json=True))
    click.echo(settings.show_running(running, here))


@cli.command(epilog=exits.EPILOG)
@instance_options
@click.argument("workers", type=click.IntRange(1, MAX_WORKERS))
@waiting_options
def scale(name: str | None, runtime_dir: str | None, workers: int, waiting: Waiting) -> None:
    """Run WORKERS workers from now on, until the setting itself is changed."""
    change(find(runtime_dir, name), f"{HOT}/scale?workers={workers}", waiting)
    click.echo("1 worker serves" if workers == 1 else f"{workers} workers serve")


@cli.command(epilog=exits.EPILOG)
@instance_options
@waiting_options
def upgrade(name: str | None, runtime_dir: str | None, waiting: Waiting) -> None:
    """Let the master itself take on the segue and the settings that are on disk; the workers serve on."""
    operation = change(find(runtime_dir, name), f"{HOT}/upgrade", waiting)
    click.echo(f"the master was upgraded ({seconds_of(operation):.2f} s)")


@cli.group()
def drain() -> None:
    """The operator's drain: readiness is off, so that balancers send elsewhere; what still comes is answered."""


@drain.command("start", epilog=exits.EPILOG)
@instance_options
@click.option("--mode", type=click.Choice(DRAIN_MODES), default=DRAIN_MODES[0], show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the operation as JSON.")
def drain_start(name: str | None, runtime_dir: str | None, mode: str, as_json: bool) -> None:
    """Begin it in every worker, and in those to come."""
    change(find(runtime_dir, name), f"{HOT}/drain/start?mode={mode}", Waiting(as_json=as_json))
    click.echo(f"draining ({mode})")


@drain.command("stop", epilog=exits.EPILOG)
@instance_options
@click.option("--json", "as_json", is_flag=True, help="Print the operation as JSON.")
def drain_stop(name: str | None, runtime_dir: str | None, as_json: bool) -> None:
    """End it."""
    change(find(runtime_dir, name), f"{HOT}/drain/stop", Waiting(as_json=as_json))
    click.echo("not draining")


@cli.command(epilog=exits.EPILOG)
@instance_options
@click.option("--now", is_flag=True, help="At once: what is in flight is cut off.")
@click.option("--timeout", type=Seconds(min=0), default=None, help="Seconds to wait at most.")
@click.option("--json", "as_json", is_flag=True, help="Print the operation as JSON.")
@click.option(
    "--unit",
    metavar="UNIT",
    help="Be ExecStop= and ExecStopPost= of this systemd unit (%n): a stop leaves no process, in a restart "
    "and after a crash the workers serve on.",
)
def stop(
    name: str | None,
    runtime_dir: str | None,
    now: bool,
    timeout: float | None,
    as_json: bool,
    unit: str | None,
) -> None:
    """Stop the instance; also workers that have lost their master."""
    if unit is not None:
        from segue.supervisor import hooks
        from segue.supervisor.instance import default_runtime_dir

        sys.exit(hooks.run(unit, runtime_dir or default_runtime_dir(os.environ), os.environ))
    from segue.supervisor import client
    from segue.supervisor.instance import InstanceError

    instance = find(runtime_dir, name)
    if instance.locked_by() is None:
        with Progress("stopping"):
            pids = client.stop_orphans(instance, 0.0 if now else (timeout or _STOP_BUDGET_S))
        if as_json:
            click.echo(json.dumps({"master": None, "workers": pids}, indent=2))
        else:
            click.echo(f"stopped the workers that had lost their master ({len(pids)})")
        return
    try:
        with Progress("stopping"):
            operation = client.stop(instance, now, timeout)
    except KeyboardInterrupt:
        fail("interrupted; the stop goes on", Status.INTERRUPTED)
    except InstanceError as error:
        fail(str(error), Status.INSTANCE)
    if as_json:
        click.echo(json.dumps(operation, indent=2))
    conclude(operation)
    if not as_json:
        click.echo("stopped")


@cli.command(epilog=exits.EPILOG)
@instance_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def status(name: str | None, runtime_dir: str | None, as_json: bool) -> None:
    """Show generations, workers, listeners and the last reloads."""
    from segue.supervisor.client import orphans
    from segue.supervisor.table import orphan_table, status_table

    instance = find(runtime_dir, name)
    if instance.locked_by() is None:
        workers = orphans(instance)
        if not workers:
            fail(f"instance {instance.name!r} does not run ({instance.directory})", Status.INSTANCE)
        orphaned = {"master": None, "workers": workers}
        click.echo(json.dumps(orphaned, indent=2)) if as_json else echo(orphan_table(workers))
        return
    document = ask(instance, f"{HOT}/status")
    click.echo(json.dumps(document, indent=2)) if as_json else echo(status_table(document))


for _command in (*deploying.COMMANDS, *views.COMMANDS):
    cli.add_command(_command)


def main() -> None:
    """The program's entry point."""
    if reaping.is_first():
        ends = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
        (reaping.hold_back if sys.argv[1:2] == ["serve"] else reaping.end_by)(ends)
    _open_missing_streams()
    try:
        cli(complete_var="_SEGUE_COMPLETE")
    except OSError as error:
        if error.errno not in _NOT_PRINTED:
            raise
        sys.exit(f"segue: this can't be printed: {error.strerror}")


def _open_missing_streams() -> None:
    """Keep 0, 1 and 2 from becoming a socket or a file, into which somebody would print."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


if __name__ == "__main__":
    main()

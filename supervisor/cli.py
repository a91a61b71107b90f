"""The command line: ``segue serve`` and what steers it."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import click

from segue import __version__
from segue.handoff.messages import HOT
from segue.supervisor import exits, reaping, views
from segue.supervisor.commanding import ask as _ask_get
from segue.supervisor.commanding import fail as _fail
from segue.supervisor.commanding import find as _find
from segue.supervisor.commanding import instance_options as _instance_options
from segue.supervisor.exits import Status
from segue.supervisor.options import ServeCommand, serve_options
from segue.supervisor.terminal import Progress, echo

_STOP_BUDGET_S = 30.0
MAX_WORKERS = 1024


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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
        _fail(str(error), error.status)


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
        _fail(str(error), Status.USAGE)
    if as_json:
        import msgspec

        click.echo(json.dumps(msgspec.to_builtins(verdict), indent=2))
        sys.exit(Status.OK if verdict.ok else Status.NOT_STARTED)
    if verdict.ok:
        click.echo(f"ok: it would start (fingerprint {verdict.fingerprint})")
        return
    click.echo(f"refused: {verdict.reason}", err=True)
    _echo_output(verdict.output)
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
@serve_options
def unit(socket: bool, template: bool, user: str | None, type_: str | None, **flags: Any) -> None:
    """Print a unit file for systemd that serves APP with these options, from here."""
    from segue.supervisor import unit as units
    from segue.supervisor.settings import SettingsError

    try:
        place, notes = units.place(flags, os.environ, user, template, type_)
        click.echo(units.socket(place) if socket else units.service(place), nl=False)
    except (SettingsError, units.UnitError) as error:
        _fail(str(error), Status.USAGE)
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
        _fail(str(error), Status.USAGE)


def _config_running(flags: dict[str, Any], as_json: bool) -> None:
    from segue.supervisor import settings

    running = _ask_get(_find(flags.get("runtime_dir"), flags.get("name")), f"{HOT}/config")
    if as_json:
        click.echo(json.dumps(running, indent=2))
        return
    here = json.loads(settings.show(_load(flags), as_json=True))
    click.echo(settings.show_running(running, here))


@cli.command(epilog=exits.EPILOG)
@_instance_options
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
@click.option(
    "--wait",
    type=click.Choice(["serving", "drained"]),
    default="serving",
    show_default=True,
    help="Return when the new generation serves, or when the old ones have ended, too.",
)
@click.option("--no-wait", is_flag=True, help="Return at once.")
@click.option("--timeout", type=click.FloatRange(min=0), default=None, help="Seconds to wait at most.")
@click.option("--json", "as_json", is_flag=True, help="Print the operation as JSON.")
def reload(
    name: str | None,
    runtime_dir: str | None,
    service: str | None,
    choices: tuple[str, ...],
    tool: str | None,
    profile: str | None,
    wait: str,
    no_wait: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Start a new generation and move every connection to it; refused if it does not get ready.

    With SERVICE, swap that service inside the running workers instead: all or none of them get the new instance.
    """
    choices += (f"tool={tool}",) if tool is not None else ()
    choices += (f"profile={profile}",) if profile is not None else ()
    if service is not None:
        _swap(_find(runtime_dir, name), service, choices, wait, no_wait, timeout, as_json)
        return
    if choices:
        raise click.UsageError("settings are for a service: segue reload SERVICE --set KEY=VALUE")
    operation = _change(
        _find(runtime_dir, name), f"{HOT}/reload", no_wait, timeout, as_json, drained=wait == "drained"
    )
    seconds = sum(seconds for phase, seconds in operation["phases"].items() if phase != "queued")
    click.echo(f"generation {operation['generation']} serves ({seconds:.2f} s)")
    if operation.get("changes"):
        click.echo(f"changed: {operation['changes']['summary']}")


def _swap(
    instance: Any,
    service: str,
    choices: tuple[str, ...],
    wait: str,
    no_wait: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    from urllib.parse import quote, urlencode

    if wait == "drained":
        raise click.UsageError("a swap of a service has nothing to wait for with --wait drained")
    pairs = [choice.partition("=") for choice in choices]
    if any(not key or not equals for key, equals, _ in pairs):
        raise click.UsageError("--set takes KEY=VALUE")
    query = urlencode({key: value for key, _, value in pairs})
    target = f"{HOT}/reload/{quote(service, safe='')}" + (f"?{query}" if query else "")
    operation = _change(instance, target, no_wait, timeout, as_json)
    seconds = sum(seconds for phase, seconds in operation["phases"].items() if phase != "queued")
    leases = sum(worker.get("leases_out", 0) for worker in operation["workers"])
    click.echo(
        f"{service} is version {operation['version']} in {len(operation['workers'])} workers ({seconds:.2f} s)"
        + (f"; rewired: {', '.join(operation['rewired'])}" if operation["rewired"] else "")
        + (f"; {leases} leases still on the old one" if leases else "")
    )


@cli.command(epilog=exits.EPILOG)
@_instance_options
@click.argument("workers", type=click.IntRange(1, MAX_WORKERS))
@click.option("--no-wait", is_flag=True, help="Return at once.")
@click.option("--timeout", type=click.FloatRange(min=0), default=None, help="Seconds to wait at most.")
@click.option("--json", "as_json", is_flag=True, help="Print the operation as JSON.")
def scale(
    name: str | None,
    runtime_dir: str | None,
    workers: int,
    no_wait: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Run WORKERS workers from now on, until the setting itself is changed."""
    _change(_find(runtime_dir, name), f"{HOT}/scale?workers={workers}", no_wait, timeout, as_json)
    click.echo("1 worker serves" if workers == 1 else f"{workers} workers serve")


@cli.command(epilog=exits.EPILOG)
@_instance_options
@click.option("--no-wait", is_flag=True, help="Return at once.")
@click.option("--timeout", type=click.FloatRange(min=0), default=None, help="Seconds to wait at most.")
@click.option("--json", "as_json", is_flag=True, help="Print the operation as JSON.")
def upgrade(
    name: str | None, runtime_dir: str | None, no_wait: bool, timeout: float | None, as_json: bool
) -> None:
    """Let the master itself take on the segue and the settings that are on disk; the workers serve on."""
    operation = _change(_find(runtime_dir, name), f"{HOT}/upgrade", no_wait, timeout, as_json)
    click.echo(f"the master was upgraded ({sum(operation['phases'].values()):.2f} s)")


@cli.group()
def drain() -> None:
    """The operator's drain: readiness is off, so that balancers send elsewhere; what still comes is answered."""


@drain.command("start", epilog=exits.EPILOG)
@_instance_options
@click.option("--mode", type=click.Choice(["reject", "queue"]), default="reject", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the operation as JSON.")
def drain_start(name: str | None, runtime_dir: str | None, mode: str, as_json: bool) -> None:
    """Begin it in every worker, and in those to come."""
    _change(_find(runtime_dir, name), f"{HOT}/drain/start?mode={mode}", False, None, as_json)
    click.echo(f"draining ({mode})")


@drain.command("stop", epilog=exits.EPILOG)
@_instance_options
@click.option("--json", "as_json", is_flag=True, help="Print the operation as JSON.")
def drain_stop(name: str | None, runtime_dir: str | None, as_json: bool) -> None:
    """End it."""
    _change(_find(runtime_dir, name), f"{HOT}/drain/stop", False, None, as_json)
    click.echo("not draining")


@cli.command(epilog=exits.EPILOG)
@_instance_options
@click.option("--now", is_flag=True, help="At once: what is in flight is cut off.")
@click.option("--timeout", type=click.FloatRange(min=0), default=None, help="Seconds to wait at most.")
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

    instance = _find(runtime_dir, name)
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
    except InstanceError as error:
        _fail(str(error), Status.INSTANCE)
    if as_json:
        click.echo(json.dumps(operation, indent=2))
    _conclude(operation)
    if not as_json:
        click.echo("stopped")


@cli.command(epilog=exits.EPILOG)
@_instance_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def status(name: str | None, runtime_dir: str | None, as_json: bool) -> None:
    """Show generations, workers, listeners and the last reloads."""
    from segue.supervisor.client import orphans
    from segue.supervisor.table import orphan_table, status_table

    instance = _find(runtime_dir, name)
    if instance.locked_by() is None:
        workers = orphans(instance)
        if not workers:
            _fail(f"instance {instance.name!r} does not run ({instance.directory})", Status.INSTANCE)
        orphaned = {"master": None, "workers": workers}
        click.echo(json.dumps(orphaned, indent=2)) if as_json else echo(orphan_table(workers))
        return
    document = _ask_get(instance, f"{HOT}/status")
    click.echo(json.dumps(document, indent=2)) if as_json else echo(status_table(document))


def _change(
    instance: Any, target: str, no_wait: bool, timeout: float | None, as_json: bool, drained: bool = False
) -> dict[str, Any]:
    """Ask for a change, show its phases, and end the program unless it was done."""
    from segue.supervisor.client import follow, post
    from segue.supervisor.instance import InstanceError

    try:
        operation = post(instance, target)
        if no_wait and operation["id"] is not None:
            click.echo(
                json.dumps(operation, indent=2) if as_json else f"operation {operation['id']} has begun"
            )
            sys.exit(Status.OK)
        with Progress("waiting") as progress:
            operation = follow(instance, operation, progress.say, drained=drained, timeout_s=timeout)
    except InstanceError as error:
        _fail(str(error), Status.INSTANCE)
    if as_json:
        click.echo(json.dumps(operation, indent=2))
    _conclude(operation, drained)
    if as_json:
        sys.exit(Status.OK)
    return operation


def _conclude(operation: dict[str, Any], drained: bool = False) -> None:
    """Tell an operation's outcome, and end the program unless it was done."""
    for note in operation.get("notes", ()):
        click.echo(f"note: {note}", err=True)
    if operation["outcome"] == "refused":
        click.echo(f"refused: {operation['reason']}", err=True)
        _echo_output(operation["output"])
        sys.exit(Status.REFUSED)
    if operation["outcome"] is None or (drained and not operation["drained"]):
        click.echo(f"still in phase {operation['phase']} (operation {operation['id']})", err=True)
        sys.exit(Status.LATE)


def _echo_output(output: str) -> None:
    if output:
        click.echo("last lines of its output:", err=True)
        for line in output.splitlines():
            click.echo(f"    | {line}", err=True)


for _command in views.COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """The program's entry point."""
    if reaping.is_first():
        ends = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
        (reaping.hold_back if sys.argv[1:2] == ["serve"] else reaping.end_by)(ends)
    _open_missing_streams()
    cli(complete_var="_SEGUE_COMPLETE")


def _open_missing_streams() -> None:
    """Keep 0, 1 and 2 from becoming a socket or a file, into which somebody would print."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


if __name__ == "__main__":
    main()

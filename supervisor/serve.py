"""``segue serve``: become the master of an instance and run it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Coroutine, Mapping, MutableMapping
from typing import Any

from segue.handoff.descriptors import raise_limit
from segue.handoff.listeners import BindError, address_of, open_listeners
from segue.supervisor import journal, memory
from segue.supervisor import settings as config
from segue.supervisor.control import Control
from segue.supervisor.exits import Status
from segue.supervisor.inherited import CONTROL, Inherited, admin_name
from segue.supervisor.instance import Instance, InstanceError, default_runtime_dir
from segue.supervisor.log import Log
from segue.supervisor.master import Master
from segue.supervisor.mastership import Mastership, take
from segue.supervisor.setting_table import BY_KEY
from segue.supervisor.systemd import inherited_fds
from segue.supervisor.upgrade import TRIAL, TRIAL_TIMEOUT_S

_ADMIN_BACKLOG = 64
_OF_RELOAD = ("reload-dir", "reload-include", "reload-exclude", "reload-delay")


class StartError(Exception):
    """The master could not start; the message says why and what to do."""

    def __init__(self, message: str, status: Status) -> None:
        super().__init__(message)
        self.status = status


def serve(flags: Mapping[str, Any], environ: MutableMapping[str, str]) -> int:
    """Run an instance until it is stopped; returns the exit status. Raises `StartError`."""
    trial = environ.pop(TRIAL, None) is not None
    if trial:
        signal.alarm(2 * TRIAL_TIMEOUT_S)  # who tries it may be gone when it hangs
    try:
        inherited = Inherited(inherited_fds(environ))
    except OSError as error:
        raise StartError(f"the sockets that were passed can't be used: {error}", Status.USAGE) from error
    try:
        base_dir = config.logical_cwd(environ)
    except config.SettingsError as error:
        raise StartError(str(error), Status.USAGE) from error
    log, refusal = Log(), ""
    try:
        _check_directory(base_dir)
        effective = config.load(flags, environ, base_dir)
    except config.SettingsError as error:
        known = None if trial else _known_settings(flags, environ)
        if known is None:
            raise StartError(str(error), Status.USAGE) from error
        effective, refusal = known, f"the settings on disk are refused: {error}"
        log("error", "settings-refused", reason=str(error), action="go on with those of the living workers")
    settings = effective.settings
    log.set_format(settings.log_format)
    without_effect = [key for key in _OF_RELOAD if effective.sources[key].startswith("flag ")]
    if without_effect and not settings.reload and not trial:
        log("warning", "not-watching", reason=f"{', '.join(without_effect)}: no effect without --reload")
    parent = os.path.abspath(settings.runtime_dir or default_runtime_dir(environ))
    instance = Instance(os.path.join(parent, settings.name), _group(settings.control_group))
    if trial:
        return Status.OK
    try:
        loop = asyncio.new_event_loop()
        mastership = take(instance, settings.binds, inherited, log)
    except InstanceError as error:
        raise StartError(str(error), Status.INSTANCE) from error
    except OSError as error:
        raise _not_started(error) from error
    raise_limit()  # connections in flight in the relay count against it, too
    os.chdir("/")  # paths were made absolute; no directory is kept from being unmounted or replaced
    return _run_to_end(loop, _run(mastership, flags, environ, base_dir, effective, refusal, log))


def _check_directory(path: str) -> None:
    """That settings and code can be looked for there. Raises `SettingsError`."""
    if not os.path.isdir(path) or not os.access(path, os.X_OK):
        reason = "can't be entered" if os.path.exists(path) else "is not there"
        raise config.SettingsError(f"the working directory {path} {reason}")


def _not_started(error: OSError) -> StartError:
    where = f": {error.filename}" if error.filename else ""
    return StartError(f"the master can't start: {error.strerror or error}{where}", Status.NOT_STARTED)


def _group(name: str | None) -> int | None:
    """The number of the group whose members may control the instance."""
    if name is None or name.isdecimal():
        return None if name is None else int(name)
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise StartError(f"control-group: there is no group {name!r} on this machine", Status.USAGE) from None


def _known_settings(flags: Mapping[str, Any], environ: MutableMapping[str, str]) -> config.Effective | None:
    """Those of workers that have lost their master and serve: a mistake on the disk must not keep them from another."""
    parent = flags.get("runtime_dir") or environ.get("SEGUE_RUNTIME_DIR") or default_runtime_dir(environ)
    name = flags.get("name") or environ.get("SEGUE_NAME") or BY_KEY["name"].default
    return memory.living_settings(
        memory.recall(journal.read(Instance(os.path.join(os.path.abspath(parent), str(name))).journal))
    )


def _run_to_end(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, int]) -> int:
    """`asyncio.run` without its wait for threads: it starts one to wait in, which a full system may refuse."""
    try:
        return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


async def _run(
    mastership: Mastership,
    flags: Mapping[str, Any],
    environ: MutableMapping[str, str],
    base_dir: str,
    effective: config.Effective,
    refusal: str,
    log: Log,
) -> int:
    settings, inherited = effective.settings, mastership.inherited
    asyncio.get_running_loop().set_exception_handler(log.mistake)
    try:
        master = Master(mastership, flags, environ, base_dir, effective, log)
        control = Control(master)
        master.sockets[CONTROL] = control.listen(inherited.take(CONTROL))
        if refusal:
            master.codes.differs_on_disk.append(refusal)
    except OSError as error:
        raise _not_started(error) from error
    if settings.admin is not None:
        try:
            for number, sock in enumerate(_admin_sockets(settings.admin, inherited)):
                control.listen_admin(sock, settings.admin.rpartition(":")[0].strip("[]"))
                master.sockets[admin_name(settings.admin, number)] = sock.fileno()
                master.admin.append(address_of(sock))
                log("info", "admin-listening", address=master.admin[-1])
        except BindError as error:
            control.close()
            raise StartError(f"admin: {error}", Status.USAGE) from error
    inherited.close()
    try:
        return await master.run()
    finally:
        control.close()


def _admin_sockets(bind: str, inherited: Inherited) -> list[socket.socket]:
    """Those that this process has had since before it began anew, or new ones. Raises `BindError`."""
    kept: list[socket.socket] = []
    while (fd := inherited.take(admin_name(bind, len(kept)))) is not None:
        kept.append(socket.socket(fileno=fd))
    return kept or [listener.sock for listener in open_listeners(bind, _ADMIN_BACKLOG)]

"""``segue serve``: become the master of an instance and run it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine, Mapping, MutableMapping
from typing import Any

from segue.handoff.descriptors import raise_limit
from segue.handoff.listeners import BindError, open_listeners
from segue.supervisor import settings as config
from segue.supervisor.control import Control
from segue.supervisor.exits import Status
from segue.supervisor.instance import Instance, InstanceError, default_runtime_dir
from segue.supervisor.master import Master


class StartError(Exception):
    """The master could not start; the message says why and what to do."""

    def __init__(self, message: str, status: Status) -> None:
        super().__init__(message)
        self.status = status


def serve(flags: Mapping[str, Any], environ: MutableMapping[str, str]) -> int:
    """Run an instance until it is stopped; returns the exit status. Raises `StartError`."""
    try:
        base_dir = config.logical_cwd(environ)
        effective = config.load(flags, environ, base_dir)
    except config.SettingsError as error:
        raise StartError(str(error), Status.USAGE) from error
    settings = effective.settings
    parent = os.path.abspath(settings.runtime_dir or default_runtime_dir(environ))
    instance = Instance(os.path.join(parent, settings.name))
    try:
        instance.create()
        instance.lock(list(settings.binds))
        refuse_orphans(instance)
    except InstanceError as error:
        raise StartError(str(error), Status.INSTANCE) from error
    raise_limit()  # connections in flight in the relay count against it, too
    os.chdir("/")  # paths were made absolute; no directory is kept from being unmounted or replaced
    return _run_to_end(_run(instance, flags, environ, base_dir, settings))


def _run_to_end(main: Coroutine[Any, Any, int]) -> int:
    """`asyncio.run` without its wait for threads: it starts one to wait in, which a full system may refuse."""
    loop = asyncio.new_event_loop()
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
    instance: Instance,
    flags: Mapping[str, Any],
    environ: MutableMapping[str, str],
    base_dir: str,
    settings: config.Settings,
) -> int:
    try:
        master = Master(instance, flags, environ, base_dir)
        control = Control(master)
        await control.listen()
    except OSError as error:
        raise StartError(f"the master can't start: {error.strerror or error}", Status.NOT_STARTED) from error
    if settings.admin is not None:
        try:
            for listener in open_listeners(settings.admin, 64):
                await control.listen_admin(listener.sock)
        except BindError as error:
            control.close()
            raise StartError(f"admin: {error}", Status.USAGE) from error
    try:
        return await master.run()
    finally:
        control.close()


def refuse_orphans(instance: Instance) -> None:
    """Raise `InstanceError` if workers of a master that died still serve; remove what killed ones left behind."""
    alive = []
    for path in instance.worker_sockets():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(path)
                alive.append(path)
            except (ConnectionRefusedError, FileNotFoundError):
                os.unlink(path)
            except OSError:
                alive.append(path)  # it is there, only slow to answer
    if alive:
        raise InstanceError(
            f"{len(alive)} workers of instance {instance.name!r} still serve, but their master has died "
            f"({instance.directory}): 'segue stop --name {instance.name}' ends them, 'segue status' shows them"
        )

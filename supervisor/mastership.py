"""Becoming the master of an instance: one way, whether it is the first, or follows on a crash, an upgrade or a restart.

Take the lock; be the next epoch; look for sockets, in what was inherited and with living workers; look for workers. What
they are is then told to the lifecycle (`segue.supervisor.adoption`), which carries on.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence

import msgspec

from segue.handoff.listeners import Listener
from segue.supervisor import finding, journal, memory
from segue.supervisor import settings as config
from segue.supervisor.inherited import LOCK, NOTIFY, Inherited
from segue.supervisor.instance import Instance
from segue.supervisor.log import Log
from segue.supervisor.snapshot import Snapshot
from segue.supervisor.spawning import Lifeline, Relay, resolve_interpreter


class Mastership(msgspec.Struct, frozen=True):
    """What a master begins with."""

    instance: Instance
    identity: str
    """A random name of the instance, the same for all of its masters."""
    epoch: int
    known: memory.Memory
    inherited: Inherited
    found: finding.Found
    relay: Relay
    lifeline: Lifeline
    notify: int | None
    """The socket to which workers report, if it is open already."""


def take(instance: Instance, binds: Sequence[str], inherited: Inherited, log: Log) -> Mastership:
    """Become master. Raises `InstanceError` if somebody else is, or the directory can't be used."""
    instance.create()
    instance.lock(list(binds), inherited.take(LOCK))
    known = memory.recall(journal.read(instance.journal))
    last = known.instance
    epoch = 1 if last is None else last.epoch + 1
    lifeline = inherited.lifeline or Lifeline.create()
    has_sockets = inherited.relay is not None and bool(inherited.listeners or inherited.passed)
    found = finding.find(instance, known, lifeline, epoch, log, has_sockets=has_sockets)
    told = [worker.told for worker in found.workers if worker.told is not None]
    identity = last.identity if last is not None else next((each.identity for each in told), "")
    relay = inherited.relay or found.relay or Relay.create()
    if found.relay is not None and found.relay is not relay:
        found.relay.close()
    return Mastership(
        instance=instance,
        identity=identity or secrets.token_hex(8),
        epoch=epoch,
        known=known,
        inherited=inherited,
        found=found,
        relay=relay,
        lifeline=lifeline,
        notify=_living(inherited.take(NOTIFY), instance.notify),
    )


def _living(fd: int | None, path: str) -> int | None:
    """A bound socket is of use as long as its name is there."""
    if fd is not None and not os.path.exists(path):
        os.close(fd)
        return None
    return fd


def snapshots(
    mastership: Mastership, listeners: Mapping[str, Listener], now: config.Effective, log: Log
) -> dict[int, Snapshot]:
    """What the generations of the workers that were found were made from, by what was written down, else as it is now.

    Also of those without a worker that are kept, if it was written down.
    """
    found: dict[int, Snapshot] = {}
    grouped = finding.by_generation(mastership.found.workers)
    for number in memory.kept(mastership.known):
        kept = mastership.known.generations[number].sources
        again = memory.snapshot_of(kept, listeners, now) if kept is not None else None
        if number not in grouped and again is not None:
            found[number] = msgspec.structs.replace(again, token=_token(again.settings, log))
    for number, workers in grouped.items():
        written = mastership.known.generations.get(number)
        sources = written.sources if written is not None else None
        settings = now.settings
        taken = None
        if sources is not None:
            taken = memory.snapshot_of(sources, listeners, now)
        if taken is None:
            told = next((worker.told for worker in workers if worker.told is not None), None)
            infos = told.listeners if told is not None else ()
            taken = Snapshot(
                effective=now,
                working_dir=os.path.realpath(settings.base_dir),
                app_dir=os.path.realpath(settings.app_dir),
                python=resolve_interpreter(settings.python),
                token=None,
                fingerprint=told.fingerprint if told is not None else "",
                listeners=tuple(listeners[info.name] for info in infos if info.name in listeners),
                workers=settings.workers,
            )
        found[number] = msgspec.structs.replace(taken, token=_token(taken.settings, log))
    return found


def _token(settings: config.Settings, log: Log) -> str | None:
    try:
        return config.read_token(settings.token_file) if settings.token_file else None
    except config.SettingsError as error:
        log("error", "no-token", reason=str(error))
        return None

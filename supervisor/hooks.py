"""What systemd runs beside the master: ``segue stop --unit %n`` as ``ExecStop=`` and as ``ExecStopPost=`` of its unit.

Three things can happen to a unit, and systemd calls the same two hooks: a *stop* leaves no process. A *restart* is a stop
and a start; it need not be an outage, so the master ends alone, and the next one takes its workers over and starts the
code on the disk beside them. After a *crash* of the master nothing is ended: systemd starts the next one.

Which of them it is, systemd knows: it has a job for the unit. It is asked by its own client, `systemctl`; when that can't
be had, a stop is taken for a stop.

Between the moment in which it was asked after a crash, or in a restart, and the start of the next master a stop may come of
which no hook is told any more. A guard stays behind for that long, and ends the workers if nobody comes for them.

Rejected: stopping all workers in a restart too, with their idle connections waiting in the relay. It works, but who comes
new waits for as long as the slowest request, or stream, of the old code takes.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping

from segue.supervisor import jobs, journal, leftovers, memory
from segue.supervisor.client import stop
from segue.supervisor.exits import Status
from segue.supervisor.instance import LOCK, Instance, InstanceError
from segue.supervisor.jobs import RESTART, STOP, job, say

_STARTED = "ExecMainStartTimestampMonotonic"
_YOUNG_S = 5.0
_PAUSE_S = 1.0
"""After the death of a master that was younger than `_YOUNG_S`, so that `RestartSec=` can be next to nothing."""
_GUARD_S = 10.0
"""How long the next master may take to be there after a crash; one that starts is seen to by systemd."""
_GUARD_PAUSE_S = 0.05
_OF_A_STOP = ("ActiveState", "InvocationID", "Job", "Restart", "RestartPreventExitStatus")
"""What of a unit says whether it was stopped."""
_BUDGET_S = 30.0
"""For workers of which nobody has written down how long their stop may take."""


def run(unit: str, runtime_dir: str, environ: Mapping[str, str]) -> int:
    """Be the hook that `environ` says (systemd.exec(5)); returns the exit status."""
    what = job(unit)
    instances = list(_instances(runtime_dir))
    result = environ.get("SERVICE_RESULT", "success")
    if environ.get("MAINPID"):
        return _before(what, instances)
    if result != "success" and what not in {STOP, RESTART}:
        _let_settle(unit)
        what = job(unit)
    if what == RESTART:
        _mark(instances)
    elif what == STOP or result == "success":
        return _sweep(unit, instances)
    killed = environ.get("EXIT_CODE") in {"killed", "dumped"}
    if (what == RESTART or killed) and os.fork() == 0:
        os._exit(_guard(unit, instances, environ.get("INVOCATION_ID", ""), restarts=what == RESTART))
    return Status.OK


def _before(what: str | None, instances: list[Instance]) -> int:
    """``ExecStop=``: the master runs still. After this systemd sends it SIGTERM, if it hasn't ended by then."""
    if what == RESTART:
        say("a restart: the workers serve on until the new master has started the code on the disk")
        _mark(instances)
        return Status.OK
    for instance in instances:
        instance.take_restart_mark()
        if instance.locked_by() is not None:
            with contextlib.suppress(InstanceError):  # it hangs: systemd's own signals come next
                stop(instance, at_once=False, timeout_s=None)
    return Status.OK


def _mark(instances: list[Instance]) -> None:
    for instance in instances:
        try:
            instance.mark_restart()
        except OSError as error:
            say(f"{instance.directory} can't be marked for a restart: {error.strerror}")


def _guard(unit: str, instances: list[Instance], invocation: str, restarts: bool) -> int:
    """Stay until the next master is there, or end what waits for it in vain; `invocation` is that of the last one."""
    deadline = time.monotonic() + _GUARD_S
    while time.monotonic() < deadline and all(instance.locked_by() is None for instance in instances):
        with contextlib.suppress(leftovers.NotInUnitError, OSError):
            found = leftovers.members()  # before it is asked: who comes later belongs to another start
            now = jobs.properties(unit, *_OF_A_STOP)
            if now.get("InvocationID") not in {None, "", invocation}:
                break  # it was started: that it runs, or is tried again, is seen to by systemd
            if now and _is_stopped(now, restarts):
                return _sweep(unit, instances, among=found)
        time.sleep(_GUARD_PAUSE_S)
    return Status.OK


def _is_stopped(now: Mapping[str, str], restarts: bool) -> bool:
    """Whether somebody has stopped the unit after its main process ended; else systemd starts the next one, or gives up
    because of a limit, or since it was told not to restart, and then the workers serve on. With `restarts` it was
    restarted, and none of this is a reason.
    """
    if now.get("Job", "0") not in {"", "0"}:
        return False
    if not restarts and now["Restart"] in {"no", "on-success"}:
        return False
    if now["ActiveState"] == "failed":
        return restarts or not re.search(r"[A-Z]", now["RestartPreventExitStatus"])
    return now["ActiveState"] == "inactive"


def _sweep(unit: str, instances: list[Instance], among: Collection[int] | None = None) -> int:
    """``ExecStopPost=`` of a stop: nothing is left."""
    known = [memory.recall(journal.read(instance.journal)) for instance in instances]
    try:
        leftovers.end_all(unit, max(map(_budget_s, known), default=_BUDGET_S), say, among)
    except (leftovers.NotInUnitError, OSError) as error:
        say(f"--unit {unit}: {error}; nothing was ended")
        return Status.REFUSED
    for instance in instances:
        instance.take_restart_mark()
        if instance.locked_by() is None:
            for key in instance.worker_keys():
                instance.forget_worker(*key)
            instance.release()
    return Status.OK


def _budget_s(known: memory.Memory) -> float:
    written = [each.sources.settings for each in known.generations.values() if each.sources is not None]
    values = [settings.get("timeout_graceful_shutdown") for settings in written]
    return max((float(value) for value in values if isinstance(value, int | float)), default=_BUDGET_S)


def _instances(runtime_dir: str) -> Iterator[Instance]:
    """Those in the unit's runtime directory."""
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(runtime_dir)):
            instance = Instance(os.path.join(runtime_dir, name))
            if os.path.exists(os.path.join(instance.directory, LOCK)):
                yield instance


def _let_settle(unit: str) -> None:
    """A master that dies soon after its start, again and again, must not be started without a pause."""
    shown = jobs.properties(unit, _STARTED).get(_STARTED, "")
    started = int(shown) / 1e6 if shown.isdigit() else 0.0
    if time.clock_gettime(time.CLOCK_MONOTONIC) - started < _YOUNG_S:
        time.sleep(_PAUSE_S)

"""``segue check``: the verdict that a reload would give, from a throw-away worker."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import Mapping
from typing import Any

import msgspec

from segue.handoff.messages import NotifyKey, WorkerSpec
from segue.handoff.notify import NotifySocket
from segue.supervisor import reaping, snapshot, spawning
from segue.supervisor import settings as config
from segue.supervisor.instance import Instance


class Verdict(msgspec.Struct, frozen=True):
    """Whether the application would start; if not, why, and what it printed."""

    ok: bool
    reason: str = ""
    output: str = ""
    fingerprint: str = ""


def check(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Verdict:
    """Import, start up, warm up and shut down the application in a worker that serves nobody.

    Raises `SettingsError`. A signal that ends this process ends the worker, too, which may hang and would not notice.
    """
    ends = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    reaping.end_by([number for number in ends if signal.getsignal(number) is signal.SIG_DFL])
    effective = config.load(flags, environ, config.logical_cwd(environ))
    return asyncio.run(try_out(snapshot.take(effective), environ))


async def try_out(
    taken: snapshot.Snapshot, environ: Mapping[str, str], *, import_only: bool = False
) -> Verdict:
    """The same of what `taken` is; with `import_only` without start-up and warm-up. Raises `OSError`."""
    with tempfile.TemporaryDirectory(prefix="segue-check-") as directory:
        return await _try_out(taken, Instance(directory), environ, import_only)


async def _try_out(
    taken: snapshot.Snapshot, instance: Instance, environ: Mapping[str, str], import_only: bool
) -> Verdict:
    plain = taken.spec(instance, 1, 1)
    spec = msgspec.structs.replace(plain, check_only=True, import_only=import_only, probe_path=None)
    with contextlib.ExitStack() as opened:
        relay = spawning.Relay.create()
        opened.callback(relay.close)
        lifeline = spawning.Lifeline.create()
        opened.callback(lifeline.close)
        notify = NotifySocket(instance.notify)
        opened.callback(notify.close)
        return await _outcome(taken, spec, relay, lifeline, notify, environ)


async def _outcome(
    taken: snapshot.Snapshot,
    spec: WorkerSpec,
    relay: spawning.Relay,
    lifeline: spawning.Lifeline,
    notify: NotifySocket,
    environ: Mapping[str, str],
) -> Verdict:
    phase, failure = "boot", ""

    def read() -> None:
        nonlocal phase, failure
        for notification in notify.receive():
            phase = notification.fields.get(NotifyKey.PHASE, phase)
            failure = notification.fields.get(NotifyKey.FAILED, failure)

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        process = spawning.spawn(taken.python, spec, {}, relay, lifeline, environ)
    except spawning.SpawnError as error:
        return Verdict(ok=False, reason=f"the worker {error}")
    reaping.leave(process.pid)
    loop.add_reader(notify.fileno(), read)
    loop.add_reader(process.pidfd, ended.set)
    try:
        timeout = taken.settings.ready_timeout
        late = False
        try:
            async with asyncio.timeout(timeout):
                await ended.wait()
        except TimeoutError:
            late = True
            process.kill()
            await ended.wait()
        read()
        status = process.reap()
        if status == 0 and not late:
            return Verdict(ok=True, fingerprint=taken.fingerprint)
        reason = spawning.describe_exit(status, failure)
        if late:
            reason = f"was not ready within {timeout:g} s (ready-timeout); it was in {phase}"
        return Verdict(ok=False, reason=f"the worker {reason}", output=process.tail())
    finally:
        if not ended.is_set():  # whoever asked is gone
            process.kill()
        reaping.done(process.pid)
        loop.remove_reader(process.pidfd)
        loop.remove_reader(notify.fileno())
        process.close()

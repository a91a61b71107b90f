"""An upgrade: this process takes on new code of segue and new settings, in place, with the same pid.

The same command is first tried in a process that is thrown away: it imports segue and loads the settings, and changes
nothing. Only if it can, this process writes its journal and executes it, holding on to its sockets and its lock, and
starts as any master does (`segue.supervisor.mastership`). Its workers stay its children, and notice nothing.

Rejected: a second master beside the first that takes over from it. Its pid would be another, its children not its own,
and for a moment there would be two.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from segue.handoff import signals
from segue.supervisor import reaping
from segue.supervisor.model import State
from segue.supervisor.systemd import pass_fds

TRIAL = "SEGUE_TRIAL"
"""In the environment of ``segue serve``: only say whether it would start."""
TRIAL_TIMEOUT_S = 30
_MAX_REASON_BYTES = 4096


def command() -> list[str]:
    """What this process was started with."""
    return [sys.executable, *sys.orig_argv[1:]]


def obstacle(state: State) -> str:
    """Why this is not the moment for an upgrade; empty if it is."""
    if state.stopping is not None:
        return "segue is stopping"
    if state.changing or state.queued or state.current is None:
        return "a reload is running; try again when it has ended"
    if state.swap is not None or state.swaps_queued:
        return "a service is being swapped; try again when that has ended"
    if state.scaling is not None or state.scale_queued is not None or state.drain_change is not None:
        return "the number of workers or the drain is being changed; try again when that has ended"
    return ""


async def try_out(environ: Mapping[str, str], directory: str) -> str:
    """Run the command in a throw-away process. Returns why it would not start; empty if it would."""
    output = os.memfd_create("segue-trial", os.MFD_CLOEXEC)
    try:
        return await _outcome(_start(environ, directory, output), output)
    except OSError as error:
        return f"it can't be started: {error.strerror or error}: {error.filename or command()[0]}"
    finally:
        os.close(output)


def _start(environ: Mapping[str, str], directory: str, output: int) -> int:
    with signals.held_back():
        process = subprocess.Popen(
            command(),
            cwd=directory,
            env={**environ, TRIAL: "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    process.returncode = 0  # it is ours to wait for, through its pidfd
    reaping.leave(process.pid)
    return process.pid


async def _outcome(pid: int, output: int) -> str:
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(pid)
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    late = False
    try:
        try:
            async with asyncio.timeout(TRIAL_TIMEOUT_S):
                await ended.wait()
        except TimeoutError:
            late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            await ended.wait()
        _, status = os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - it has ended
    finally:
        if not ended.is_set():  # this master ends
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        reaping.done(pid)
        loop.remove_reader(pidfd)
        os.close(pidfd)
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and not late:
        return ""
    size = os.fstat(output).st_size
    said = (
        os.pread(output, _MAX_REASON_BYTES, max(0, size - _MAX_REASON_BYTES)).decode(errors="replace").strip()
    )
    if late:
        return f"it did not come to an end within {TRIAL_TIMEOUT_S:g} s; {said}"
    return said or f"it ended with {code}, and said nothing"


def execute(environ: Mapping[str, str], directory: str, fds: Sequence[tuple[str, int]]) -> NoReturn:
    """Become the new code, holding on to `fds`. Raises OSError; then nothing has changed."""
    try:
        os.chdir(directory)
        os.execve(command()[0], command(), {**environ, **pass_fds(fds)})  # noqa: S606 - no shell is wanted
    finally:  # it is this code still
        os.chdir("/")
        for _, fd in fds:
            os.set_inheritable(fd, False)

"""Runs a program that must not outlive its worker, with all that it starts: ``python keeper.py WORKER_PID COMMAND ARG…``

It stands between the worker and the program, gives its standard streams to the program, and waits for the end of either,
on their pidfds. A parent-death signal alone would not do: it goes when the *thread* ends that made the child, and it isn't
passed on to grandchildren (``npx`` starts ``sh``, which starts ``node``). A pipe that the worker holds open would do, but
the SDK passes on no descriptor. So that nothing gets away, the keeper is the reaper of all descendants; and if the keeper
itself is killed, a parent-death signal ends the program.

Run as a script, by an interpreter without site-packages: it imports nothing of segue.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 1.0
"""Between SIGTERM and SIGKILL; less than the SDK waits before it kills the keeper."""
_PAUSE_S = 0.005
_EXIT_NOT_FOUND = 127


def main(worker: int, command: list[str]) -> int:
    """Run `command` until it or the process `worker` ends; returns its exit status, 128 + N for signal N."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    try:
        worker_fd = os.pidfd_open(worker)
    except ProcessLookupError:
        return 0
    if os.getppid() != worker:  # it had ended before, and the number is another one's by now
        return 0
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    told_read, told_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(told_write, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    keeper = os.getpid()
    child = os.fork()
    if child == 0:
        _become(command, keeper, prctl)
    child_fd = os.pidfd_open(child)
    # who reads what the program writes is to see its end, and who writes to it, too
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    poll = select.poll()
    for descriptor in (worker_fd, child_fd, told_read):
        poll.register(descriptor, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll()]
    if child_fd not in ready:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
        _wait(child_fd, _GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    _end_all()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _become(command: list[str], keeper: int, prctl: object) -> None:
    """The child: never returns."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        assert callable(prctl)
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == keeper:
            os.execvp(command[0], command)  # noqa: S606 - a shell is what isn't wanted
    except OSError as error:
        os.write(2, f"{command[0]} can't be started: {error.strerror}\n".encode(errors="replace"))
    finally:
        os._exit(_EXIT_NOT_FOUND)


def _wait(descriptor: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(seconds * 1000)


def _end_all() -> None:
    """Kill what is left of the descendants; each that dies leaves its own children to the keeper."""
    until = time.monotonic() + _GRACE_S
    while time.monotonic() < until:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(_PAUSE_S)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Of this process. Not all kernels list them, so all processes are looked at."""
    own, found = os.getpid(), []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stream:
            # the name of a program, in parentheses, may have any character in it
            if int(stream.read().rpartition(b")")[2].split()[1]) == own:
                found.append(int(name))
    return found


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1]), sys.argv[2:]))

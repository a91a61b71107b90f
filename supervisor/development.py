"""Development mode, ``segue serve --reload``: each save is a reload.

Another process watches (`segue.supervisor.watcher`); what it reports comes in through the loop like everything else. A
save gives up a generation that is still being started from older code, so that a start that hangs is mended by the
next save. A first generation that does not start is waited for in the same way: the listeners stay open.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping

import msgspec

from segue.supervisor import reaping
from segue.supervisor.log import Log
from segue.supervisor.settings import Settings
from segue.supervisor.watcher import Order, Report

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0
_END_S = 2.0
_NAMED = 3
"""How many of the files that were saved are named."""
_READ_BYTES = 64 * 1024


class Development:
    """Runs the process that watches, and passes on what it reports."""

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        log: Log,
        *,
        saved: Callable[[str], object],
        watching: Callable[[], object],
    ) -> None:
        """`saved` is called with a few words on what was saved; `watching` when nothing is missed from now on."""
        directories = settings.reload_dir or tuple(dict.fromkeys((settings.base_dir, settings.app_dir)))
        self._order = Order(
            directories, settings.reload_include, settings.reload_exclude, settings.reload_delay
        )
        self._base_dir = settings.base_dir
        self._environ = environ
        self._log = log
        self._saved, self._watching = saved, watching
        self._process: _Process | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = FIRST_RETRY_S
        self._failure = ""

    def start(self) -> None:
        """Begin to watch, and go on: a watcher that ends is followed by another."""
        self._retry = None
        try:
            self._process = _Process(
                self._order, self._base_dir, self._environ, self._on_report, self._on_end
            )
        except OSError as error:
            self._failure = error.strerror or str(error)
            self._on_end(None)

    async def stop(self) -> None:
        """Watch no more; the process has ended when this returns."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        process, self._process = self._process, None
        if process is not None:
            await process.end()

    def _on_report(self, report: Report) -> None:
        if report.watching:
            self._retry_s = FIRST_RETRY_S
            self._log("info", "watching", directories=", ".join(map(self._short, self._order.directories)))
            self._watching()
        if report.saved:
            names = [self._short(path) for path in report.saved[:_NAMED]]
            more = len(report.saved) - len(names)
            what = ", ".join(names) + (f" and {more} more" if more else "")
            self._log("info", "saved", files=what)
            self._saved(f"save of {what}")
        self._failure = report.failed or self._failure

    def _on_end(self, status: int | None) -> None:
        self._process = None
        reason = self._failure or f"the watching process ended ({status})"
        self._failure = ""
        hint = "; raise fs.inotify.max_user_watches, or name fewer directories with --reload-dir"
        self._log(
            "error",
            "not-watching",
            reason=reason + (hint if "watch" in reason and "limit" in reason else ""),
            retry_s=self._retry_s,
        )
        self._retry = asyncio.get_running_loop().call_later(self._retry_s, self.start)
        self._retry_s = min(LAST_RETRY_S, 2 * self._retry_s)

    def _short(self, path: str) -> str:
        relative = os.path.relpath(path, os.path.realpath(self._base_dir))
        return path if relative.startswith("..") else relative


class _Process:
    """The watcher, and the pipe from it. Its standard input ends with this process, whatever becomes of that."""

    def __init__(
        self,
        order: Order,
        directory: str,
        environ: Mapping[str, str],
        on_report: Callable[[Report], None],
        on_end: Callable[[int | None], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_report, self._on_end = on_report, on_end
        self._ended = asyncio.Event()
        self._text = b""
        command = [
            sys.executable,
            "-P",
            "-m",
            "segue.supervisor.watcher",
            msgspec.json.encode(order).decode(),
        ]
        ours, self._life = os.pipe2(os.O_CLOEXEC)
        self._reports, theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reports, False)
        try:
            process = subprocess.Popen(
                command, cwd=directory, env=dict(environ), stdin=ours, stdout=theirs, start_new_session=True
            )
            process.returncode = 0  # it is ours to wait for, through its pidfd
            reaping.leave(process.pid)
            self._pid, self._pidfd = process.pid, os.pidfd_open(process.pid)
        except OSError:
            os.close(self._reports)
            os.close(self._life)
            raise
        finally:
            os.close(ours)
            os.close(theirs)
        self._loop.add_reader(self._reports, self._read)
        self._loop.add_reader(self._pidfd, self._reap)

    async def end(self) -> None:
        """Kill it, and wait until it is gone: it has nothing to lose."""
        self._on_end = lambda _: None
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await self._ended.wait()

    def _read(self) -> None:
        try:
            data = os.read(self._reports, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._reports)
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(msgspec.MsgspecError):
                self._on_report(msgspec.json.decode(line, type=Report))

    def _reap(self) -> None:
        self._read()  # its last words come before its death
        self._loop.remove_reader(self._pidfd)
        self._loop.remove_reader(self._reports)
        _, status = os.waitpid(self._pid, os.WNOHANG)
        reaping.done(self._pid)
        for fd in (self._pidfd, self._reports, self._life):
            os.close(fd)
        self._ended.set()
        self._on_end(os.waitstatus_to_exitcode(status))

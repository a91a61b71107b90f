"""Where a worker's output goes: into a memory file while it boots, and to the inherited stdout once it is ready.

The master reads the memory file to tell why a start failed. It is kept small by giving the memory of its old part
back (a hole), which, unlike cutting the file, loses nothing that is being written at the same moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import sys
import threading
import time

_MAX_BYTES = 1024 * 1024
_KEPT_BYTES = 256 * 1024
_LOOK_EVERY_S = 0.1
_REPLAY_TIMEOUT_S = 1.0
_STUCK_S = 0.2
"""How long after that it counts as stuck in a write."""
_PIPE_BUF = 4096
"""A pipe that polls as writable takes this much without blocking."""
_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, fallocate(2)
_BLOCK_BYTES = 4096


class BootOutput:
    """Keeps descriptors 1 and 2 bounded until `finish` connects them to where they belong."""

    def __init__(self, stdout: int, stderr: int) -> None:
        self._stdout, self._stderr = stdout, stderr
        self._start = 0
        """Where what is kept begins."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="segue-boot-output", daemon=True)
        for stream in (sys.stdout, sys.stderr):
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(line_buffering=True)
        self._thread.start()

    @property
    def on_terminal(self) -> bool:
        """Whether the output will go to a terminal."""
        return os.isatty(self._stdout)

    async def finish(self) -> None:
        """Pass on what was printed so far, and print straight to the inherited stdout and stderr from now on.

        Takes a second at most if nobody reads there: then what was printed so far is dropped.
        """
        self._done.set()
        self._thread.join()
        _flush()
        # in a thread, since a pipe shared with other writers may fill up after it has polled as writable, and
        # O_NONBLOCK would change it for everyone who has it
        loop, replayed = asyncio.get_running_loop(), asyncio.Event()

        def replay() -> None:
            self._replay()
            with contextlib.suppress(RuntimeError):  # too late: the loop has ended
                loop.call_soon_threadsafe(replayed.set)

        threading.Thread(target=replay, name="segue-replay", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REPLAY_TIMEOUT_S + _STUCK_S):
                await replayed.wait()
        os.dup2(self._stdout, 1)
        os.dup2(self._stderr, 2)

    def _replay(self) -> None:
        deadline = time.monotonic() + _REPLAY_TIMEOUT_S
        memory = os.dup(1)
        poll = select.poll()
        poll.register(self._stdout, select.POLLOUT)
        try:
            while data := os.pread(memory, _PIPE_BUF, self._start):
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    return
                self._start += os.write(self._stdout, data)
        except OSError:  # nobody is there to read it: that is no reason not to serve
            return
        finally:
            os.close(memory)

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_EVERY_S):
            with contextlib.suppress(OSError):
                size = os.fstat(1).st_size
                if size - self._start > _MAX_BYTES:
                    self._start = (size - _KEPT_BYTES) // _BLOCK_BYTES * _BLOCK_BYTES
                    _forget(1, self._start)


def _forget(fd: int, length: int) -> None:
    """Give back the memory of a memory file's first `length` bytes; its size stays."""
    import ctypes

    offset, size = ctypes.c_int64(0), ctypes.c_int64(length)
    ctypes.CDLL(None, use_errno=True).fallocate64(fd, _PUNCH_HOLE, offset, size)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()

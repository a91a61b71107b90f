#!/usr/bin/env python
"""Feels from outside whether event loops stall: ``python bench/probe.py PORT``, until SIGTERM.

One stream with an event every 5 ms, opened at once, stays with the process that answers first: a gap in it is a stall
of that process. And a new connection every 5 ms goes to whoever accepts: its answer's time is a stall there. Prints
JSON: both as ``[monotonic time of the end, milliseconds over what was due]``, those over 2 ms. A newline on standard
error says that the stream runs.

The probe itself waits for a processor, too. It notes the gaps between its own turns (``own``), so that the reader can
tell them from the servers'.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time

PAUSE_MS = 5
NOTED_MS = 2.0
PING = b"GET /ping HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n"
STREAM = b"GET /sse?n=1000000&ms=5 HTTP/1.1\r\nHost: probe\r\n\r\n"


class _Ended(BaseException):
    """SIGTERM."""


def main() -> int:
    address = ("127.0.0.1", int(sys.argv[1]))
    signal.signal(signal.SIGTERM, _end)
    gc.disable()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)  # where it may, it runs when it has to
    noted: dict[str, list[tuple[float, float]]] = {"stream": [], "new": [], "own": []}
    with contextlib.suppress(_Ended):
        _run(address, noted)
    print(json.dumps(noted))
    return 0


def _run(address: tuple[str, int], noted: dict[str, list[tuple[float, float]]]) -> None:
    stream = socket.create_connection(address)
    stream.sendall(STREAM)
    stream.recv(65536)
    os.write(2, b"\n")
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    last_event = last_turn = time.monotonic()
    due = last_event
    asking: dict[int, tuple[socket.socket, float]] = {}
    while True:
        ready = poll.poll(max(0.0, (due - time.monotonic()) * 1000))
        now = time.monotonic()
        _note(noted["own"], now, (now - last_turn) * 1000 - PAUSE_MS)
        last_turn = now
        for fd, _ in ready:
            if fd == stream.fileno():
                stream.recv(65536)
                _note(noted["stream"], now, (now - last_event) * 1000 - PAUSE_MS)
                last_event = now
            else:
                connection, begun = asking[fd]
                if not connection.recv(4096):
                    poll.unregister(fd)
                    connection.close()
                    del asking[fd]
                    _note(noted["new"], now, (now - begun) * 1000)
        if now >= due:
            due = now + PAUSE_MS / 1000
            if len(asking) < 50:
                connection = socket.create_connection(address)
                connection.sendall(PING)
                asking[connection.fileno()] = connection, now
                poll.register(connection, select.POLLIN)


def _note(noted: list[tuple[float, float]], now: float, late_ms: float) -> None:
    if late_ms > NOTED_MS:
        noted.append((round(now, 4), round(late_ms, 2)))


def _end(*_: object) -> None:
    raise _Ended


if __name__ == "__main__":
    sys.exit(main())

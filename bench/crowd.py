#!/usr/bin/env python
"""A crowd of idle keep-alive clients in one process, driven by lines on standard input.

``open N`` opens so many more and asks once on each, ``ask`` asks once on all of them, ``drop N`` closes the newest N;
each answers with one line of JSON: how many answered, by which process, what was closed, what failed.
"""

from __future__ import annotations

import collections
import json
import resource
import select
import socket
import sys
import time
from collections.abc import Sequence

_AT_ONCE = 100
_TIMEOUT_S = 20.0
REQUEST = b"GET /ping HTTP/1.1\r\nHost: crowd\r\n\r\n"


class Crowd:
    """All its connections."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._open: list[socket.socket] = []

    def open(self, count: int) -> dict[str, object]:
        """Open `count` more."""
        new: list[socket.socket] = []
        problems: collections.Counter[str] = collections.Counter()
        answers: collections.Counter[str] = collections.Counter()
        while len(new) < count:
            some = []
            for _ in range(min(_AT_ONCE, count - len(new))):
                some.append(socket.create_connection(self._address, _TIMEOUT_S))
            _ask(some, answers, problems)
            new += some
        self._open += new
        return {"answers": answers, "problems": problems, "connections": len(self._open)}

    def ask(self) -> dict[str, object]:
        """Ask on each connection once."""
        problems: collections.Counter[str] = collections.Counter()
        answers: collections.Counter[str] = collections.Counter()
        problems["closed while idle"] = _readable(self._open)
        begun = time.monotonic()
        for start in range(0, len(self._open), _AT_ONCE):
            _ask(self._open[start : start + _AT_ONCE], answers, problems)
        return {
            "answers": answers,
            "problems": +problems,
            "connections": len(self._open),
            "seconds": round(time.monotonic() - begun, 3),
        }

    def drop(self, count: int) -> dict[str, object]:
        """Close the newest `count`."""
        for _ in range(count):
            self._open.pop().close()
        return {"connections": len(self._open)}


def _ask(
    connections: Sequence[socket.socket],
    answers: collections.Counter[str],
    problems: collections.Counter[str],
) -> None:
    for connection in connections:
        try:
            connection.sendall(REQUEST)
        except OSError:
            continue  # reading says what happened
    for connection in connections:
        answer = b""
        try:
            while not answer.endswith(b"pong"):
                data = connection.recv(4096)
                if not data:
                    problems["closed instead of an answer"] += 1
                    break
                answer += data
            else:
                if b"\r\nconnection: close" in answer.lower():
                    problems["told to close"] += 1
                answers[answer.partition(b"x-pid: ")[2].partition(b"\r\n")[0].decode()] += 1
        except OSError as error:
            problems[type(error).__name__] += 1


def _readable(connections: Sequence[socket.socket]) -> int:
    """How many have something to say though nothing was asked: their end."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    return len(poll.poll(0))


def main() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    crowd = Crowd(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        verb, *count = line.split()
        print(json.dumps(getattr(crowd, verb)(*map(int, count))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

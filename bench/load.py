#!/usr/bin/env python
"""A load generator for HTTP/1.1 that notices what a client would: ``python bench/load.py --port PORT``.

Clients on raw sockets (asyncio protocols on uvloop) that keep connections, post, open a new connection for each
request, or read streams. **Nothing is tried twice**: a request that fails is counted once, by its kind, and the client
goes on with its next one (on a fresh connection, after its think time and 5 ms). The result is one JSON document on
standard output or in ``--out``.

Each client has at most one request in flight, so a stalled server also stalls the load (coordinated omission): read
the gaps and the timeline beside the percentiles.

Two optional channels for whoever drives it: ``--ready-fd N`` gets a newline once every client has had an answer, and
``--events FILE`` takes JSON lines ``{"t": seconds of CLOCK_MONOTONIC, "window": "reload"}``. From ``t`` on, requests
count for that window, and the result has percentiles by window. A request that crosses a border counts for the windows
that it touches, except the one named by ``--baseline``: that has only what lies wholly inside it.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import collections
import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any, cast

import uvloop

now = time.monotonic

KINDS = {
    "refused": "connection refused",
    "connect_other": "connect failed otherwise",
    "new_no_response": "new connection ended before its first response",
    "reused_no_response": "kept connection ended instead of a response",
    "truncated": "connection ended inside a response",
    "truncated_clean": "a stream ended properly but without its last event",
    "non_2xx": "a status other than 2xx",
    "timeout": "nothing came in time",
    "bad_body": "another body than the one that was posted",
    "parse_error": "not HTTP",
}
"""How a request can fail."""

SHORT = ("keepalive", "newconn")
"""The classes of clients whose requests are short; the third is ``sse``."""

MAX_LOST = 200_000
"""Lost connections that are told one by one."""

_TURN_S = 0.005
_LATE_S = 0.01

_HEAD, _LENGTH, _CHUNK_HEAD, _CHUNK, _UNTIL_EOF, _TRAILER = range(6)

Headers = dict[bytes, bytes]
Result = tuple[int, Headers, bytes]


class RequestError(Exception):
    """A request failed, in one of the `KINDS`."""

    def __init__(self, kind: str, detail: str = "") -> None:
        self.kind, self.detail = kind, detail


class Conn(asyncio.Protocol):
    """One connection of a client. Reads bodies by length, in chunks, or until the end of the connection."""

    def __init__(self, stats: Stats, on_chunk: Callable[[], None] | None = None) -> None:
        self.stats = stats
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.kept = False
        """The last response left the connection open."""
        self.dialed = now()
        self.port = 0
        """Its own; with `dialed` it tells this connection from every other."""
        self._by_us = False
        self._on_chunk = on_chunk
        self._answer: asyncio.Future[Result] | None = None
        self._requests = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's isn't a subclass
        self.port = transport.get_extra_info("sockname")[1]

    def start(self, data: bytes, timeout: float) -> asyncio.Future[Result]:
        """Send one request; the future has its answer, or `RequestError`."""
        assert self.transport is not None
        loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._state = _HEAD
        self._got = False
        self._need = 0
        self._body = bytearray()
        self._headers: Headers = {}
        self._status = 0
        self._requests += 1
        self._answer = answer = loop.create_future()
        self._timer = loop.call_later(timeout, self._timed_out)
        self.transport.write(data)
        return answer

    def close(self) -> None:
        self._by_us = True
        self.closed = True
        if self.transport:
            self.transport.close()

    def _timed_out(self) -> None:
        self._finish(RequestError("timeout", "got_bytes" if self._got else "no_bytes"))
        self.close()

    def _finish(self, failure: RequestError | None = None) -> None:
        answer, self._answer = self._answer, None
        if answer is None:
            return
        self._timer.cancel()
        if answer.done():
            return
        if failure is None:
            answer.set_result((self._status, self._headers, bytes(self._body)))
        else:
            answer.set_exception(failure)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            return
        self._got = True
        if self._on_chunk:
            self._on_chunk()
        self._buffer += data
        try:
            self._parse()
        except Exception as error:
            self._finish(RequestError("parse_error", repr(error)))
            self.close()

    def _parse(self) -> None:
        buffer = self._buffer
        while True:
            if self._state == _HEAD:
                end = buffer.find(b"\r\n\r\n")
                if end < 0:
                    return
                self._read_head(bytes(buffer[:end]))
                del buffer[: end + 4]
            elif self._state == _LENGTH:
                self._take(self._need)
                if self._need == 0:
                    self._finish()
                return
            elif self._state == _CHUNK_HEAD:
                end = buffer.find(b"\r\n")
                if end < 0:
                    return
                size = int(bytes(buffer[:end]).split(b";")[0], 16)
                del buffer[: end + 2]
                self._need, self._state = (size + 2, _CHUNK) if size else (0, _TRAILER)
            elif self._state == _CHUNK:
                if len(buffer) < self._need:
                    return
                self._body += buffer[: self._need - 2]
                del buffer[: self._need]
                self._state = _CHUNK_HEAD
            elif self._state == _TRAILER:
                end = buffer.find(b"\r\n")
                if end < 0:
                    return
                del buffer[: end + 2]
                if end == 0:
                    self._finish()
                    return
            else:
                self._body += buffer
                buffer.clear()
                return

    def _read_head(self, head: bytes) -> None:
        lines = head.split(b"\r\n")
        self._status = int(lines[0].split(b" ", 2)[1])
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            self._headers[name.strip().lower()] = value.strip()
        if b"chunked" in self._headers.get(b"transfer-encoding", b"").lower():
            self._state = _CHUNK_HEAD
        elif b"content-length" in self._headers:
            self._need, self._state = int(self._headers[b"content-length"]), _LENGTH
        else:
            self._state = _UNTIL_EOF

    def _take(self, size: int) -> None:
        part = self._buffer[:size]
        del self._buffer[:size]
        self._body += part
        self._need -= len(part)

    def connection_lost(self, exc: Exception | None) -> None:
        was_closed, self.closed = self.closed, True
        if self._answer is not None:
            how = "reset" if isinstance(exc, ConnectionError) else ("eof" if exc is None else repr(exc))
            if self._state == _UNTIL_EOF and exc is None:
                self._finish()
            elif self._got:
                self._finish(RequestError("truncated", how))
            else:
                self._finish(
                    RequestError("new_no_response" if self._requests == 1 else "reused_no_response", how)
                )
        elif not self._by_us and not was_closed and self.kept:
            self.stats.idle_closes += 1
            self.stats.note_lost("idle", now(), self)


class Stats:
    """What has happened so far."""

    def __init__(self, t0: float) -> None:
        self.t0 = t0
        self.ok: collections.Counter[str] = collections.Counter()
        self.fails: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.codes: collections.Counter[int] = collections.Counter()
        self.ends: dict[str, array[float]] = {c: array("d") for c in (*SHORT, "sse")}
        self.latencies: dict[str, array[float]] = {c: array("d") for c in (*SHORT, "sse")}
        self.idle_closes = 0
        self.close_headers = 0
        self.connects = 0
        self.versions: dict[str, list[float]] = {}
        self.pids: dict[str, list[float]] = {}
        self.fail_log: list[tuple[float, str, str, str, float]] = []
        self.sse_gap = 0.0
        self.own_stalls: list[tuple[float, float]] = []
        self.fail_times: list[float] = []
        self.lost: list[tuple[float, int, float, str]] = []
        """Of every failed request and idle connection that was closed: when, its port, when it was dialed, and what."""
        self._last_ok: dict[str, float] = {}
        self._gaps: dict[str, tuple[float, float]] = {}
        self._buckets: dict[int, list[float]] = {}

    def good(self, kind: str, start: float, end: float, headers: Headers) -> None:
        """A request of this class of clients was answered as it should be."""
        self.ok[kind] += 1
        self.ends[kind].append(end)
        self.latencies[kind].append(end - start)
        for seen, name in ((self.versions, b"x-version"), (self.pids, b"x-pid")):
            value = headers.get(name, b"?").decode()
            entry = seen.get(value)
            if entry is None:
                seen[value] = [1, end, end]
            else:
                entry[0] += 1
                entry[2] = end
        if kind != "sse":
            self._gap(kind, end)
            self._gap("any", end)
            bucket = self._bucket(end)
            bucket[0] = max(bucket[0], end - start)
            bucket[1] += 1

    def note_lost(self, what: str, at: float, conn: Conn | None) -> None:
        """Whoever drives this may know why the connection was lost."""
        if len(self.lost) < MAX_LOST:
            port, dialed = (0, at) if conn is None else (conn.port, conn.dialed)
            self.lost.append((at, port, dialed, what))

    def bad(
        self, kind: str, failure: RequestError, end: float, start: float, conn: Conn | None = None
    ) -> None:
        """A request failed, on this connection, if it had one."""
        self.note_lost(f"{kind}: {failure.kind} {failure.detail}".strip(), end, conn)
        self.fails[kind, failure.kind, failure.detail] += 1
        self.fail_times.append(end)
        self._bucket(end)[2] += 1
        if len(self.fail_log) < 400:
            self.fail_log.append(
                (round(end, 3), kind, failure.kind, failure.detail, round((end - start) * 1000, 1))
            )

    def close_gaps(self, end: float) -> None:
        """The time since the last answer is a gap, too."""
        for kind in list(self._last_ok):
            self._gap(kind, end)

    @property
    def gaps(self) -> dict[str, dict[str, float]]:
        """The longest time without an answer, by class."""
        return {
            kind: {"ms": round(gap * 1000, 1), "at": round(since - self.t0, 3)}
            for kind, (gap, since) in self._gaps.items()
        }

    @property
    def timeline(self) -> list[list[float]]:
        """``[seconds, longest latency in ms, answers, failures]`` for each tenth of a second."""
        return [[k / 10, round(b[0] * 1000, 1), b[1], b[2]] for k, b in sorted(self._buckets.items())]

    def _bucket(self, at: float) -> list[float]:
        return self._buckets.setdefault(int((at - self.t0) * 10), [0.0, 0, 0])

    def _gap(self, kind: str, at: float) -> None:
        since = self._last_ok.get(kind, self.t0)
        if at - since > self._gaps.get(kind, (0.0, 0.0))[0]:
            self._gaps[kind] = (at - since, since)
        self._last_ok[kind] = at


class Load:
    """All the clients."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.stats = Stats(now())
        self.stop = False
        self.body = os.urandom(args.post_size).hex().encode()[: args.post_size]
        self.sha = hashlib.sha256(self.body).hexdigest().encode()
        self._waiting = args.keepalive + args.newconn

    def get(self, path: str) -> bytes:
        return (
            f"GET {path} HTTP/1.1\r\nHost: {self.args.host}:{self.args.port}\r\n"
            "User-Agent: load\r\nAccept: */*\r\n\r\n"
        ).encode()

    def post(self) -> bytes:
        head = (
            f"POST /echo HTTP/1.1\r\nHost: {self.args.host}:{self.args.port}\r\n"
            f"Content-Length: {len(self.body)}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        return head.encode() + self.body

    async def connect(self, on_chunk: Callable[[], None] | None = None) -> Conn:
        loop = asyncio.get_running_loop()
        self.stats.connects += 1
        try:
            async with asyncio.timeout(self.args.timeout):
                _, conn = await loop.create_connection(
                    lambda: Conn(self.stats, on_chunk), self.args.host, self.args.port
                )
        except ConnectionRefusedError:
            raise RequestError("refused") from None
        except TimeoutError:
            raise RequestError("timeout", "connect") from None
        except OSError as error:
            raise RequestError("connect_other", errno.errorcode.get(error.errno or 0, str(error))) from None
        return conn

    async def think(self) -> None:
        await asyncio.sleep(random.uniform(self.args.think_min, self.args.think_max) / 1000)

    def check(self, kind: str, conn: Conn, result: Result, start: float) -> None:
        """Count an answer, or raise `RequestError`. `kind` is the class of the client, or ``post``."""
        end = now()
        status, headers, body = result
        self.stats.codes[status] += 1
        if b"close" in headers.get(b"connection", b"").lower():
            self.stats.close_headers += 1
            conn.kept = False
            conn.close()
        else:
            conn.kept = True
        if not 200 <= status < 300:
            raise RequestError("non_2xx", str(status))
        if kind == "post" and (body != self.body or headers.get(b"x-sha") != self.sha):
            raise RequestError("bad_body")
        if kind == "sse" and b"data: done" not in body[-64:]:
            raise RequestError("truncated_clean", "chunked terminator without last event")
        self.stats.good("keepalive" if kind == "post" else kind, start, end, headers)

    def answered(self) -> None:
        """One more client has had its first outcome."""
        self._waiting -= 1
        if self._waiting == 0 and self.args.ready_fd is not None:
            os.write(self.args.ready_fd, b"\n")
            os.close(self.args.ready_fd)

    async def keep(self, posting: bool) -> None:
        """A client that keeps its connection."""
        request = self.post() if posting else self.get(self.args.path)
        conn: Conn | None = None
        first = True
        await asyncio.sleep(random.random() * 0.1)
        while not self.stop:
            start = now()
            try:
                if conn is None or conn.closed:
                    conn = await self.connect()
                    start = now()  # the time to connect is none of a kept connection's latency
                    if self.stop:
                        break
                answer = await conn.start(request, self.args.timeout)
                self.check("post" if posting else "keepalive", conn, answer, start)
            except RequestError as failure:
                self.stats.bad("keepalive", failure, now(), start, conn)
                if conn is not None and failure.kind != "non_2xx":
                    conn.close()
                    conn = None
                await asyncio.sleep(0.005)
            if first:
                self.answered()
                first = False
            await self.think()
        if conn:
            conn.close()

    async def renew(self) -> None:
        """A client with a new connection for each request."""
        request = self.get(self.args.new_path)
        first = True
        await asyncio.sleep(random.random() * 0.1)
        while not self.stop:
            start = now()
            conn: Conn | None = None
            try:
                conn = await self.connect()
                self.check("newconn", conn, await conn.start(request, self.args.timeout), start)
            except RequestError as failure:
                self.stats.bad("newconn", failure, now(), start, conn)
                await asyncio.sleep(0.005)
            if conn:
                conn.kept = False
                conn.close()
            if first:
                self.answered()
                first = False
            await self.think()

    async def listen(self) -> None:
        """A client that reads streams, one after the other."""
        length_s = self.args.sse_n * self.args.sse_ms / 1000
        request = self.get(f"/sse?n={self.args.sse_n}&ms={self.args.sse_ms}")
        last = 0.0

        def on_chunk() -> None:
            nonlocal last
            at = now()
            self.stats.sse_gap = max(self.stats.sse_gap, at - last)
            last = at

        await asyncio.sleep(random.random() * length_s)
        while not self.stop:
            start = last = now()
            conn: Conn | None = None
            try:
                conn = await self.connect(on_chunk)
                answer = await conn.start(request, self.args.timeout + length_s)
                self.check("sse", conn, answer, start)
            except RequestError as failure:
                self.stats.bad("sse", failure, now(), start, conn)
                await asyncio.sleep(0.02)
            if conn:
                conn.kept = False
                conn.close()

    async def watch_itself(self) -> None:
        """Note when this process itself was late: what its clients felt then was not the server."""
        while not self.stop:
            due = now() + _TURN_S
            await asyncio.sleep(_TURN_S)
            late = now() - due
            if late > _LATE_S:
                self.stats.own_stalls.append((round(due - self.stats.t0, 3), round(late * 1000, 1)))

    async def run(self) -> dict[str, Any]:
        """Load for the duration, or until SIGTERM or SIGINT; the result."""
        args = self.args
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        clients = [asyncio.ensure_future(self.keep(i < args.post)) for i in range(args.keepalive)]
        clients += [asyncio.ensure_future(self.renew()) for _ in range(args.newconn)]
        clients += [asyncio.ensure_future(self.listen()) for _ in range(args.sse)]
        clients.append(asyncio.ensure_future(self.watch_itself()))
        cpu_before = cpu_s()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(args.duration):
                await ended.wait()
        # What is still in flight now is neither success nor failure.
        self.stop = True
        end = now()
        self.stats.close_gaps(end)
        result = report(args, self.stats, end, cpu_s() - cpu_before)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        return result


def report(args: argparse.Namespace, stats: Stats, end: float, cpu: float) -> dict[str, Any]:
    """Everything as JSON."""
    fails: collections.Counter[str] = collections.Counter()
    for (_, kind, _), n in stats.fails.items():
        fails[kind] += n
    duration = end - stats.t0
    short = array("d")
    for kind in SHORT:
        short.extend(stats.latencies[kind])
    seen = [
        {value: {"n": int(n), "first": first, "last": last} for value, (n, first, last) in entries.items()}
        for entries in (stats.versions, stats.pids)
    ]
    events = read_events(args.events)
    for event in events:
        event["t_rel"] = round(event["t"] - stats.t0, 3)
    return {
        "args": vars(args),
        "t0": stats.t0,
        "duration": round(duration, 2),
        "ok": dict(stats.ok),
        "ok_total": stats.ok.total(),
        "rate_short": round(sum(stats.ok[kind] for kind in SHORT) / duration, 1),
        "failed_total": stats.fails.total(),
        "failures": {kind: fails[kind] for kind in KINDS if fails[kind]},
        "failures_detail": [
            {"client": client, "kind": kind, "how": detail, "n": n}
            for (client, kind, detail), n in sorted(stats.fails.items())
        ],
        "status_codes": dict(stats.codes),
        "server_closes": {
            "idle_keepalive_closed": stats.idle_closes,
            "connection_close_header": stats.close_headers,
        },
        "connects": stats.connects,
        "latency_ms": {
            **{k: percentiles(v) for k, v in stats.latencies.items()},
            "short": percentiles(short),
        },
        "windows": windows(events, args.baseline, stats, end),
        "sse_max_chunk_gap_ms": round(stats.sse_gap * 1000, 1),
        "longest_gap_ms": stats.gaps,
        "versions": seen[0],
        "pids": seen[1],
        "events": events,
        "timeline_100ms": stats.timeline,
        "fail_log": stats.fail_log,
        "lost": stats.lost,
        "own_stalls": stats.own_stalls,
        "client_cpu_frac": round(cpu / duration, 3),
    }


def windows(events: list[dict[str, Any]], baseline: str, stats: Stats, end: float) -> dict[str, Any]:
    """Latencies and failures by window."""
    borders = sorted((event["t"], event["window"]) for event in events if "window" in event)
    if not borders:
        return {}
    times = [t for t, _ in borders]
    # Before the first border lies a window without a name.
    names = ["", *(name for _, name in borders)]
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(names[1:]):
        lengths = [
            stop - start
            for start, stop, window in zip(times, [*times[1:], end], names[1:], strict=True)
            if window == name
        ]
        found[name] = {"seconds": round(sum(lengths), 3), "times": len(lengths), "failed": 0}
    for at in stats.fail_times:
        name = names[bisect.bisect_right(times, at)]
        if name:
            found[name]["failed"] += 1
    samples = {name: {kind: array("d") for kind in SHORT} for name in found}
    for kind in SHORT:
        for t, latency in zip(stats.ends[kind], stats.latencies[kind], strict=True):
            first, last = bisect.bisect_right(times, t - latency), bisect.bisect_right(times, t)
            touched = set(names[first : last + 1])
            if len(touched) > 1:
                touched.discard(baseline)
            for name in touched - {""}:
                samples[name][kind].append(latency)
    for name, window in found.items():
        window["latency_ms"] = {
            **{kind: percentiles(samples[name][kind]) for kind in SHORT},
            "short": percentiles(samples[name]["keepalive"] + samples[name]["newconn"]),
        }
    return found


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """In milliseconds; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000, 2)

    return {
        "n": len(ordered),
        **{f"p{str(share)[2:].ljust(2, '0')}": at(share) for share in (0.5, 0.9, 0.99, 0.999)},
        "max": round(ordered[-1] * 1000, 2),
    }


def read_events(path: str | None) -> list[dict[str, Any]]:
    """The events that were written while the load ran."""
    if not path or not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def cpu_s() -> float:
    """CPU time of this process."""
    times = os.times()
    return times.user + times.system


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A load generator that tries nothing twice.")
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, required=True)
    add("--keepalive", type=int, default=50, help="clients that keep their connection")
    add("--newconn", type=int, default=10, help="clients with a new connection for each request")
    add("--sse", type=int, default=5, help="clients that read streams")
    add("--sse-n", type=int, default=20, help="events of a stream")
    add("--sse-ms", type=float, default=100, help="between two events")
    add(
        "--post", type=int, default=0, help="how many of the keep-alive clients POST /echo and check the hash"
    )
    add("--post-size", type=int, default=1024)
    add("--path", default="/ping", help="what keep-alive clients ask for")
    add("--new-path", default="/work?ms=5", help="what clients with new connections ask for")
    add("--think-min", type=float, default=0, help="ms between answer and next request")
    add("--think-max", type=float, default=20)
    add("--timeout", type=float, default=10, help="seconds for one request")
    add("--duration", type=float, default=10, help="seconds; SIGTERM and SIGINT end it early")
    add("--events", help="JSON lines, see above; read at the end")
    add("--baseline", default="quiet", help="the window that has only requests wholly inside it")
    add("--ready-fd", type=int, help="gets a newline once every client has had an answer")
    add("--out", help="write the result here instead of to standard output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    text = json.dumps(uvloop.run(Load(args).run()))
    if args.out:
        with open(args.out, "w") as file:
            file.write(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

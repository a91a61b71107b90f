"""Whoever follows, waits or only stays connected is in nobody's way: not of a stop, an upgrade, an idle master, a log."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scenario import DEADLINE_S, HOT, ROOT, TOKEN, Segue, supervised, tcp_call

from segue.supervisor import room
from segue.supervisor.client import follow
from segue.supervisor.instance import Instance, InstanceError
from segue.supervisor.room import bytes_left, own_bytes, too_many
from segue.supervisor.watching import Watching

BROKEN = """
from segue.supervisor.control_reads import Reads

async def livez(self, _):
    raise KeyError("lost")

Reads._livez = livez
"""


@contextlib.contextmanager
def connected(path: str, target: str, **headers: str) -> Iterator[http.client.HTTPResponse]:
    """A connection that has had the head of an answer, and stays open."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(DEADLINE_S)
    connection.sock.connect(path)
    try:
        connection.request("GET", target, headers=headers)
        yield connection.getresponse()
    finally:
        connection.close()


def worker_socket(master: Segue) -> str:
    return str(master.current()["workers"][0]["control"])


def admin_port(master: Segue) -> int:
    """The one that the kernel has chosen: nobody else can have taken it meanwhile."""
    return int(master.status()["admin"][0].rpartition(":")[2])


def test_a_stop_ends_connections_without_a_word_about_them(application) -> None:
    with (
        supervised("shop:app", cwd=application("1")) as master,
        connected(master.control, "/livez") as idle,
        connected(master.control, f"{HOT}/watch") as watching,
        connected(master.control, f"{HOT}/events", Accept="text/event-stream"),
        connected(worker_socket(master), "/livez") as asked,
    ):
        assert idle.read()
        assert asked.read()
        assert watching.readline() == b"event: status\n"
        master.stop()
        assert "Traceback" not in master.output.text, master.output.text


LEAVING = [
    *(("GET", f"{HOT}/{name}") for name in ("status", "watch", "events", "logs", "config", "openapi.json")),
    *(("GET", path) for path in ("/livez", "/metrics", "/", "/session", "/dashboard.js")),
    ("GET", f"{HOT}/operations/1?wait=5&until=probation"),
    *(
        ("POST", f"{HOT}/{name}")
        for name in ("reload", "stage", "promote", "discard", "rollback", "reload/x")
    ),
    *(
        ("POST", f"{HOT}/{name}")
        for name in ("scale?workers=2", "drain/start", "drain/stop", "scale?workers=1")
    ),
    ("DELETE", "/session"),
]


@pytest.mark.parametrize("piece", ["head", "body", "whole"])
def test_callers_that_leave_at_any_moment_leave_no_trace(application, tmp_path: Path, piece: str) -> None:
    """Over TCP with a reset, and over the Unix socket; before, amid and after what they ask for."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    flags = ("--admin", "127.0.0.1:0", "--token-file", str(token), "--probation", "1")
    with supervised("shop:app", *flags, cwd=application("1")) as master:
        port = admin_port(master)
        for method, target in LEAVING:
            head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
            head += f"Authorization: Bearer {TOKEN}\r\nContent-Length: 4\r\n"
            sent = {"head": head, "body": f"{head}\r\nab", "whole": f"{head}\r\nabcd"}[piece].encode()
            for family, address in ((socket.AF_UNIX, master.control), (socket.AF_INET, ("127.0.0.1", port))):
                sock = socket.socket(family)
                sock.connect(address)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.sendall(sent)
                sock.close()
        master.wait_status(lambda document: all(each["outcome"] for each in document["reloads"]))
        assert master.call("GET", "/livez")[0] == 200
        master.stop()
        assert "Traceback" not in master.output.text, master.output.text


def test_a_page_that_is_open_does_not_hold_a_stop_up(application) -> None:
    """Its stream has no end that could be waited for."""
    with (
        supervised("shop:app", cwd=application("1")) as master,
        connected(master.control, f"{HOT}/watch") as watching,
    ):
        assert watching.readline() == b"event: status\n"
        master.signal(15)
        master.output.wait_for(" exit status=0")
        while watching.readline():
            pass
        # what follows on the end of the stream takes no more than the interpreter's own end
        assert master.wait_exit() == 0


def test_the_admin_listener_refuses_nobody_while_the_master_renews_itself(application) -> None:
    """A scrape in that moment waits for the next master."""
    refused: list[OSError] = []
    ended = threading.Event()

    def keep_connecting(port: int) -> None:
        while not ended.is_set():
            try:
                socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S).close()
            except OSError as error:
                refused.append(error)
            ended.wait(0.002)

    with supervised("shop:app", "--admin", "127.0.0.1:0", cwd=application("1")) as master:
        port = admin_port(master)
        thread = threading.Thread(target=keep_connecting, args=(port,))
        thread.start()
        try:
            for epoch in (2, 3):
                assert master.command("upgrade").returncode == 0
                status, _, document = tcp_call(port, "GET", f"{HOT}/status")
                assert (status, document["master"]["epoch"]) == (200, epoch)
        finally:
            ended.set()
            thread.join()
        assert not refused
        master.stop()


def test_what_goes_wrong_unexpectedly_is_an_event_of_the_log(application) -> None:
    """With its traceback, in the form of all others: nothing is printed beside the log."""
    directory = application("1")
    (directory / "sitecustomize.py").write_text(BROKEN)
    env = {"PYTHONPATH": f"{directory}:{ROOT}", "SEGUE_LOG_FORMAT": "json"}
    with supervised("shop:app", cwd=directory, env=env) as master:
        status, document = master.call("GET", "/livez")
        assert (status, document["detail"]) == (500, "a mistake in segue: KeyError; its log says more")
        [event] = [
            each
            for each in master.call("GET", f"{HOT}/events")[1]["events"]
            if each["event"] == "mistake-in-segue"
        ]
        assert event["fields"]["reason"] == "GET /livez failed: KeyError: 'lost'"
        assert "Traceback" in event["output"]
        assert all(
            line.startswith("{")
            for line in master.output.text.splitlines()
            if "mistake" in line or "Traceback" in line
        )
        master.stop()


class Looks:
    """What is watched: each look is counted."""

    def __init__(self, fail_at: int = 0) -> None:
        self.count, self.fail_at = 0, fail_at
        self.event = asyncio.Event()

    async def look(self) -> dict[str, Any]:
        self.count += 1
        if self.count == self.fail_at:
            raise KeyError("lost")
        return {"look": self.count}

    def happened(self) -> asyncio.Event:
        return self.event


def test_nobody_looks_once_the_last_has_left_whenever_that_is() -> None:
    async def run() -> None:
        looks = Looks()
        watching = Watching(looks.look, lambda _: {"for": "all"}, looks.happened)
        first, second, third = (watching.stream(trusted) for trusted in (True, True, False))
        assert b'{"look":1}' in await anext(first)
        assert b'{"look":1}' in await anext(second)  # what was shown already
        assert b'{"for":"all"}' in await anext(third)  # who isn't trusted has a part of the same look
        assert looks.count == 1
        await third.aclose()
        await second.aclose()  # leaves before it asks for more
        await first.aclose()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(tasks, timeout=DEADLINE_S) if tasks else None
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_a_look_that_fails_ends_the_streams_so_that_pages_come_back() -> None:
    async def run() -> None:
        said: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        looks = Looks(fail_at=2)
        looks.event.set()  # something happens all the time
        watching = Watching(looks.look, dict, looks.happened)
        assert [piece async for piece in watching.stream(trusted=True)] == [
            b'event: status\ndata: {"look":1}\n\n'
        ]
        assert [type(each["exception"]) for each in said] == [KeyError]
        again = watching.stream(trusted=True)
        assert b'{"look":3}' in await anext(again)
        await again.aclose()

    asyncio.run(run())


def test_more_workers_than_there_is_memory_for_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pid = os.getpid()
    assert own_bytes(pid) > 2**20
    assert bytes_left() > 2**20
    assert too_many(2, [pid]) == too_many(1, [pid] * 3) == too_many(64, []) == ""
    monkeypatch.setattr(room, "bytes_left", lambda: 2**20)
    assert too_many(3, [pid]).startswith("2 more workers of about ")
    assert too_many(3, [pid]).endswith(" 0.0 GiB of memory are left")


def test_a_slip_of_the_finger_starts_nothing(application) -> None:
    most = max(room.AT_LEAST, room.PER_PROCESSOR * len(os.sched_getaffinity(0)))
    with supervised("shop:app", cwd=application("1")) as master:
        status, document = master.call("POST", f"{HOT}/scale?workers=1025")
        assert (status, "1024" in document["detail"]) == (400, True)
        if most < 1024:
            done = master.command("scale", str(most + 1))
            assert done.returncode == 1
            assert f"refused: {most + 1} workers on " in done.stderr
            assert "with a reload" in done.stderr
        assert len(master.worker_pids()) == 1
        master.stop()


def test_an_operation_that_no_master_knows_any_more_is_told_so(application) -> None:
    """The one that was asked has died, and its journal with it."""
    with supervised("shop:app", cwd=application("1")) as master:
        asked = {"id": 4711, "outcome": None, "phase": "boot", "drained": False, "probation": None}
        with pytest.raises(InstanceError, match="what became of operation 4711 is not known"):
            follow(Instance(master.directory), asked, lambda _: None)
        master.stop()

"""The control API: who may, what it answers, and what bad requests get."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from scenario import (
    DEADLINE_S,
    HOT,
    ROOT,
    TOKEN,
    Client,
    environment,
    made_directory,
    segue,
    supervised,
    tcp_call,
    unix_call,
)

from segue.handoff import http_server
from segue.handoff.http import Router


def test_sockets_are_private(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        assert stat.S_IMODE(os.stat(master.directory).st_mode) == 0o700
        for name in os.listdir(master.directory):
            assert stat.S_IMODE(os.stat(os.path.join(master.directory, name)).st_mode) == 0o600, name
        master.stop()


def test_curl_works_on_the_unix_socket(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        done = subprocess.run(
            ["curl", "-sS", "--unix-socket", master.control, f"http://localhost{HOT}/status"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout)["current"] == 1
        master.stop()


def test_readyz_follows_the_operators_drain(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        assert master.call("GET", "/livez")[0] == 200
        assert master.call("GET", "/readyz")[0] == 200
        assert master.command("drain", "start", "--mode", "queue").returncode == 0
        code, document = master.call("GET", "/readyz")
        assert code == 503
        assert "drain" in document["detail"]
        assert master.status()["draining"] is True
        master.reload()  # it holds for workers to come, too
        worker = master.current()["workers"][0]["control"]
        assert unix_call(worker, "GET", f"{HOT}/status")[1]["draining"] is True
        assert unix_call(worker, "GET", "/readyz")[0] == 503
        assert master.call("GET", "/readyz")[0] == 503
        assert master.command("drain", "stop").returncode == 0
        assert master.call("GET", "/readyz")[0] == 200
        assert master.status()["draining"] is False
        master.stop()


@pytest.mark.parametrize(
    ("method", "target", "code"),
    [
        ("GET", "/nothing", 404),
        ("GET", f"{HOT}/reload", 405),
        ("POST", f"{HOT}/status", 405),
        ("GET", f"{HOT}/operations/4711", 404),
        ("GET", f"{HOT}/operations/x", 404),
        ("POST", f"{HOT}/drain/start?mode=sideways", 400),
        ("POST", f"{HOT}/scale", 400),
        ("POST", f"{HOT}/scale?workers=0", 400),
        ("POST", f"{HOT}/scale?workers=many", 400),
        ("POST", f"{HOT}/reload?wait=soon", 400),
        ("POST", f"{HOT}/reload?until=never", 400),
        ("POST", f"{HOT}/reload?wait=-1", 400),
        ("POST", f"{HOT}/reload?wait=1_0", 400),
        ("POST", f"{HOT}/reload/no%0Aname", 404),
        ("POST", f"{HOT}/reload/prices?wait=soon", 400),
        ("POST", f"{HOT}/upgrade?wait=soon", 400),
        ("POST", f"{HOT}/reload?stratgy=rolling", 400),
        ("POST", f"{HOT}/rollback?generation=1&generation=2", 400),
        ("POST", f"{HOT}/stop?now=no", 400),
        ("POST", f"{HOT}/discard?generation=1000000001", 400),
        ("GET", f"{HOT}/events?last=1000000001", 400),
        ("GET", f"{HOT}/events?after=", 400),
        ("GET", f"{HOT}/logs?worker=%D9%A1", 400),
    ],
)
def test_bad_requests_get_problem_documents(application, method, target, code) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        status, document = master.call(method, target)
        assert status == code
        assert document["status"] == code
        assert document["detail"]
        assert len(master.status()["reloads"]) == 1
        assert master.call("GET", f"{HOT}/operations/2")[0] == 404, "nothing was begun"
        master.stop()


def test_garbage_on_the_control_socket_harms_nothing(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        for garbage in (
            b"\0\xff\n\n",
            b"GET " + b"x" * 100_000,
            b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
        ):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(60)
                sock.connect(master.control)
                try:
                    sock.sendall(garbage)
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(65536):
                        pass
                except (BrokenPipeError, ConnectionResetError):
                    pass
        assert master.call("GET", "/livez")[0] == 200
        master.stop()


def test_scale_during_a_reload_is_a_conflict(application, tmp_path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with supervised("shop:app", cwd=application("1")) as master:
        application("2", prelude=f"open({str(gate)!r}).read()\n")
        reload = threading.Thread(target=master.call, args=("POST", f"{HOT}/reload"))
        reload.start()
        master.output.wait_for("worker-spawned generation=2")
        code, document = master.call("POST", f"{HOT}/scale?workers=2")
        assert code == 423
        assert "reload" in document["detail"]
        code, document = master.call("POST", f"{HOT}/scale?workers=2&wait=soon")
        assert (code, document["detail"][:6]) == (400, "?wait="), "what is wrong with it comes first"
        gate.write_text("go")
        reload.join()
        master.stop()


def test_a_caller_that_leaves_cancels_nothing(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        application("2", prelude="import time; time.sleep(1)\n")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(master.control)
            sock.sendall(f"POST {HOT}/reload HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
            master.output.wait_for("worker-spawned generation=2")
        master.output.wait_for("promoted generation=2")
        master.stop()


def test_the_admin_listener_shows_to_all_and_changes_for_the_token(application, token_file) -> None:
    flags = ("--admin", "127.0.0.1:0", "--token-file", str(token_file))
    with supervised("shop:app", *flags, cwd=application("1")) as master:
        port = int(master.status()["admin"][0].rpartition(":")[2])
        for target in ("/livez", "/readyz", f"{HOT}/status"):
            assert tcp_call(port, "GET", target)[0] == 200
        for token in (None, "wrong", TOKEN[:-1]):
            code, kind, document = tcp_call(port, "POST", f"{HOT}/reload", token)
            assert (code, kind) == (401, "application/problem+json")
            assert document["status"] == 401
        assert tcp_call(port, "GET", f"{HOT}/config")[0] == 401
        code, _, document = tcp_call(port, "POST", f"{HOT}/reload", TOKEN)
        assert (code, document["outcome"], document["generation"]) == (200, "ok", 2)
        assert TOKEN not in master.output.text
        assert TOKEN not in json.dumps(master.status())
        master.stop()


def test_where_the_admin_listener_is_can_be_seen_also_of_a_port_that_was_left_to_the_kernel(
    application, token_file
) -> None:
    flags = ("--admin", "127.0.0.1:0", "--token-file", str(token_file))
    with supervised("shop:app", *flags, cwd=application("1")) as master:
        [address] = master.status()["admin"]
        assert f"admin    http://{address}/" in master.command("status").stdout.splitlines()
        master.output.wait_for(f"admin-listening address={re.escape(address)}")
        assert tcp_call(int(address.rpartition(":")[2]), "GET", "/livez")[0] == 200
        assert master.command("upgrade").returncode == 0
        assert master.status()["admin"] == [address]
        master.stop()


def test_the_public_listener_has_hot_endpoints_only_with_a_token_file(application, token_file) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        with Client(master.port) as client:
            assert client.get(f"{HOT}/status")[2] == b"1"  # the path is the application's
        master.stop()
    with supervised("shop:app", "--token-file", str(token_file), cwd=application("1")) as master:
        port = master.port
        assert tcp_call(port, "GET", f"{HOT}/status")[0] == 401
        code, _, document = tcp_call(port, "GET", f"{HOT}/status", TOKEN)
        assert (code, document["current"]) == (200, 1)
        code, _, document = tcp_call(port, "POST", f"{HOT}/reload", TOKEN)
        assert (code, document["generation"]) == (200, 2)
        token_file.write_text("another-token-of-many-letters\n")
        master.reload("--wait", "drained")
        assert tcp_call(port, "GET", f"{HOT}/status", TOKEN)[0] == 401
        assert tcp_call(port, "GET", f"{HOT}/status", "another-token-of-many-letters")[0] == 200
        master.stop()


def test_the_health_path_is_readiness_on_the_public_listener(application) -> None:
    with (
        supervised("shop:app", "--health-path", "/healthz", cwd=application("1")) as master,
        Client(master.port) as client,
    ):
        assert client.get("/healthz")[0] == 200
        assert client.get("/")[2] == b"1"
        assert master.command("drain", "start").returncode == 0
        assert client.get("/healthz")[0] == 503
        assert client.get("/")[0] == 200
        master.stop()


def test_the_same_endpoints_stand_on_a_workers_private_socket(application) -> None:
    with (
        supervised("shop:app", "--workers", "2", cwd=application("1")) as master,
        Client(master.port) as client,
    ):
        assert client.get("/")[0] == 200
        one, two = (w["control"] for w in master.current()["workers"])
        assert unix_call(one, "GET", "/livez")[0] == 200
        assert unix_call(one, "GET", "/readyz")[0] == 200
        code, document = unix_call(one, "POST", f"{HOT}/drain/start?mode=handover")
        assert code == 200, document
        assert unix_call(one, "GET", "/readyz")[0] == 503
        assert client.get("/")[0] == 200  # by its sibling
        code, document = unix_call(one, "POST", f"{HOT}/drain/stop")
        assert code == 200, document
        assert unix_call(one, "GET", f"{HOT}/status")[1]["mode"] == "active"
        code, document = unix_call(two, "POST", f"{HOT}/reload")
        assert code in {404, 409}
        assert master.control in document["detail"]
        assert client.get("/")[0] == 200
        master.stop()


def test_check_gives_the_verdict_of_a_reload(application) -> None:
    directory = application("1")
    done = segue("check", "shop:app", cwd=directory)
    assert done.returncode == 0, done.stderr
    application("1", prelude="import nosuchmodule\n")
    done = segue("check", "shop:app", cwd=directory)
    assert done.returncode == 3
    assert "nosuchmodule" in done.stderr
    application("1", prelude="import time; time.sleep(3600)\n")
    done = segue("check", "shop:app", "--ready-timeout", "2", cwd=directory)
    assert done.returncode == 3
    assert "ready-timeout" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_check_that_is_ended_leaves_nothing_behind(application, tmp_path, number) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    prelude = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(3600)\n"
    temporary = made_directory("segue-c-")
    checking = subprocess.Popen(
        # whoever runs the tests may ignore it
        [
            "env",
            f"--default-signal={number.name}",
            sys.executable,
            "-m",
            "segue.supervisor.cli",
            "check",
            "shop:app",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=application("1", prelude=prelude),
        env=environment(PYTHONPATH=str(ROOT), TMPDIR=temporary),
    )
    worker = os.pidfd_open(int(told.read_text()))
    try:
        checking.send_signal(number)
        assert checking.wait(DEADLINE_S) == 128 + number
        assert select.select([worker], [], [], DEADLINE_S)[0], "the worker hangs in its import for ever"
    finally:
        os.close(worker)
    assert os.listdir(temporary) == []


def test_config_says_where_each_value_comes_from(application) -> None:
    directory = application("1")
    (directory / "segue.toml").write_text("drain-timeout = 5\n")
    done = segue("config", "shop:app", "--workers", "3", cwd=directory, SEGUE_READY_TIMEOUT="7")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "flag" in lines["workers"]
    assert "SEGUE_READY_TIMEOUT" in lines["ready-timeout"]
    assert "segue.toml" in lines["drain-timeout"]
    assert "default" in lines["idle-grace"]


def test_config_running_compares_with_what_runs(application) -> None:
    directory = application("1")
    with supervised("shop:app", "--workers", "2", cwd=directory) as master:
        done = master.command("config", "--running")
        assert done.returncode == 0, done.stderr
        assert "workers" in done.stdout
        master.stop()


def test_wrong_flags_exit_with_2_and_name_the_key(application) -> None:
    directory = application("1")
    for arguments, word in (
        (("--workers", "0"), "workers"),
        (("--ready-timeout", "soon"), "ready-timeout"),
        (("--bind", "nowhere"), "bind"),
        (("--reload", "--reload-dir", "nowhere"), "reload-dir"),
        (("--health-path", "x"), "health-path"),
    ):
        done = segue("serve", "shop:app", *arguments, cwd=directory)
        assert done.returncode == 2, (arguments, done.stderr)
        assert word in done.stderr, (arguments, done.stderr)


@pytest.mark.parametrize(
    "command",
    [
        ("reload", "--timeout", "nan"),
        ("reload", "--canary", "1", "--canary-for", "nan"),
        ("reload", "--canary", "1", "--canary-for", "1e9"),
        ("promote", "--canary", "99999"),
        ("stop", "--timeout", "nan"),
    ],
)
def test_numbers_that_are_none_are_wrong_flags(command: tuple[str, ...], tmp_path: Path) -> None:
    done = segue(*command, "--runtime-dir", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "Invalid value for" in done.stderr


def test_every_command_documents_its_exit_statuses() -> None:
    for command in (
        ["serve"],
        ["reload"],
        ["status"],
        ["drain", "start"],
        ["drain", "stop"],
        ["scale"],
        ["stop"],
        ["check"],
        ["config"],
        ["top"],
        ["events"],
        ["logs"],
    ):
        done = segue(*command, "--help")
        assert done.returncode == 0
        assert "Exit status" in done.stdout, command


def test_a_connection_that_is_open_when_a_process_ends_is_no_mistake(tmp_path: Path) -> None:
    """A worker that ends while somebody is connected to it says nothing of that in its log."""
    mistakes: list[dict[str, Any]] = []

    async def serve_and_end(client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: mistakes.append(context))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        server = http_server.Server(listener, Router({}))
        client.connect(str(tmp_path / "s"))
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await loop.sock_recv(client, 1000)).startswith(b"HTTP/1.1 404")
        server.close()

    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        asyncio.run(serve_and_end(client))
    assert mistakes == []

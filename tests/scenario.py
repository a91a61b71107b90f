"""What tests are written in: a real master under test, real clients, and ways to wait without sleeping."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import ports
from bench.users import Interpreter, own

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 60.0
MARK = "TEST_MARK_OF_SEGUE"
HOT = "/api/v1/hot"
TOKEN = "a-token-of-many-letters-0123456789"
"""What is in the `token_file` of a test."""
RESERVED = ports.held
"""What holds the ports of this test; they are given back at its end."""
free_port = ports.free_port
PIPE_BYTES = 1 << 20
"""The most that the kernel lets anybody have."""


class Output:
    """What a process prints, collected by a thread, and a way to wait for a line."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._text = ""
        self._closed = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end inside a character
        while data := os.read(self._pipe, 65536):
            with self._condition:
                self._text += decoder.decode(data)
                self._condition.notify_all()
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        os.close(self._pipe)

    @property
    def text(self) -> str:
        with self._condition:
            return self._text

    def wait_for(self, pattern: str, count: int = 1, timeout: float = DEADLINE_S) -> list[str]:
        """Wait until `pattern` was printed `count` times; returns the matches."""
        deadline = time.monotonic() + timeout
        with self._condition:
            while len(found := [m.group(0) for m in re.finditer(pattern, self._text)]) < count:
                left = deadline - time.monotonic()
                if left <= 0 or self._closed:
                    raise AssertionError(
                        f"{pattern!r} was printed {len(found)} times, not {count}:\n{self._text}"
                    )
                self._condition.wait(left)
            return found

    def join(self) -> None:
        self._thread.join(DEADLINE_S)


class NotStarted(Exception):
    """`segue serve` ended before it was ready."""

    def __init__(self, status: int, output: str) -> None:
        super().__init__(f"exit status {status}:\n{output}")
        self.status, self.output = status, output


def environment(**extra: str) -> dict[str, str]:
    """A clean one, marked so that every process of the test can be found."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SEGUE_", "UVICORN_", "LISTEN_"))
    }
    kept[MARK] = os.environ[MARK]
    for key in ("NOTIFY_SOCKET", "COLUMNS", "LINES"):  # the size is the terminal's
        kept.pop(key, None)
    kept["SEGUE_LOG_FORMAT"] = "text"  # as on a terminal
    return kept | extra


def segue(
    *arguments: str, timeout: float = DEADLINE_S, cwd: str | Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of segue to its end."""
    return subprocess.run(
        [sys.executable, "-m", "segue.supervisor.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment(PYTHONPATH=str(ROOT), **env),
        check=False,
    )


MADE: list[str] = []
"""Directories that tests have made outside pytest's own, whose paths are too long for a socket."""


def made_directory(prefix: str) -> str:
    """A new one; removed when all tests have ended."""
    MADE.append(tempfile.mkdtemp(prefix=prefix))
    return MADE[-1]


class Segue:
    """`segue serve` as a subprocess. It is ready when it says so, by sd_notify."""

    def __init__(
        self,
        *arguments: str,
        cwd: str | Path,
        env: dict[str, str] | None = None,
        interpreter: Interpreter | None = None,
        runtime_dir: str | None = None,
        name: str = "default",
        bind: bool = True,
        nofile: int | None = None,
        stdout: int | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        """`prefix` is a command that runs the command given to it (`prlimit --nproc=1`)."""
        self.runtime_dir = runtime_dir or made_directory("segue-t-")
        self.name = name
        interpreter = interpreter or own()
        options = interpreter.popen_options()
        if options:
            os.chown(self.runtime_dir, options["user"], -1)
        self._states: list[dict[str, str]] = []
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        path = os.path.join(made_directory("segue-n-"), "n")
        self._notify.bind(path)
        os.chmod(path, 0o777)
        os.chmod(os.path.dirname(path), 0o755)
        read, write = os.pipe()
        # a master drops what it has to say where there is no room: of 64 KiB with the access log of a load, in half a second
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        command = [interpreter.executable, "-m", "segue.supervisor.cli", "serve", *arguments]
        command += ["--runtime-dir", self.runtime_dir, "--name", name]
        if bind:
            command += ["--bind", "127.0.0.1:0"]

        if nofile is not None:
            command = ["prlimit", f"--nofile={nofile}", *command]
        command = [*prefix, *command]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", NOTIFY_SOCKET=path)
            | interpreter.environ
            | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=write if stdout is None else stdout,
            stderr=write,
            **options,
        )
        os.close(write)
        self.output = Output(read)

    # ------------------------------------------------------------------------------------------------ waiting

    def wait_ready(self, timeout: float = DEADLINE_S) -> Segue:
        self.wait_notified("READY", "1", timeout)
        return self

    def wait_notified(self, key: str, value: str, timeout: float = DEADLINE_S) -> dict[str, str]:
        """Wait for a datagram in which `key` is `value` (a regular expression)."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            deadline = time.monotonic() + timeout
            while True:
                waited = [self._notify.fileno(), pidfd]
                ready, _, _ = select.select(waited, [], [], max(0.0, deadline - time.monotonic()))
                if self._notify.fileno() in ready:
                    fields = dict(
                        line.split("=", 1) for line in self._notify.recv(8192).decode().splitlines()
                    )
                    self._states.append(fields)
                    if re.fullmatch(value, fields.get(key, "")):
                        return fields
                elif pidfd in ready:
                    status = self.process.wait()
                    self.output.join()
                    raise NotStarted(status, self.output.text)
                else:
                    raise AssertionError(f"no {key}={value} within {timeout} s:\n{self.output.text}")
        finally:
            os.close(pidfd)

    def wait_exit(self, timeout: float = DEADLINE_S) -> int:
        status = self.process.wait(timeout)
        self.output.join()
        return status

    def wait_status(self, condition: Any, timeout: float = DEADLINE_S) -> dict[str, Any]:
        """Ask for the status until `condition` holds of it; for what no message tells."""
        deadline = time.monotonic() + timeout
        while True:
            document = self.status()
            if condition(document):
                return document
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"the status did not come to it:\n{json.dumps(document, indent=1)}\n{self.output.text}"
                )
            select.select([], [], [], 0.05)

    def wait_answered(self, requests: int = 100) -> None:
        """Wait until what serves has answered so many: more than a load has clients, so that one of them has its answer."""

        def have(status: dict[str, Any]) -> bool:
            current = next(each for each in status["generations"] if each["current"])
            return sum(worker["requests_total"] or 0 for worker in current["workers"]) >= requests

        self.wait_status(have)

    # ------------------------------------------------------------------------------------------------- asking

    @property
    def directory(self) -> str:
        return os.path.join(self.runtime_dir, self.name)

    @property
    def control(self) -> str:
        return os.path.join(self.directory, "control.sock")

    def call(self, method: str, target: str, timeout: float = DEADLINE_S) -> tuple[int, dict[str, Any]]:
        """One request on the control socket; status and JSON document."""
        return unix_call(self.control, method, target, timeout)

    def status(self) -> dict[str, Any]:
        code, document = self.call("GET", f"{HOT}/status")
        assert code == 200, document
        return document

    def told(self, condition: Any = lambda _: True) -> dict[str, Any]:
        """The status with what every worker says: one that takes more than a second for it is left out of it else."""

        def all_told(status: dict[str, Any]) -> bool:
            workers = [worker for generation in status["generations"] for worker in generation["workers"]]
            return not any("unknown_because" in worker for worker in workers) and condition(status)

        return self.wait_status(all_told)

    def current(self) -> dict[str, Any]:
        """The status of the current generation."""
        document = self.status()
        return next(g for g in document["generations"] if g["current"])

    def worker_pids(self) -> list[int]:
        return [w["pid"] for w in self.current()["workers"]]

    @property
    def port(self) -> int:
        return int(self.status()["listeners"][0]["address"].rpartition(":")[2])

    def command(self, *arguments: str, timeout: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        return segue(*arguments, "--runtime-dir", self.runtime_dir, "--name", self.name, timeout=timeout)

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        """A command that runs beside the test."""
        place = ("--runtime-dir", self.runtime_dir, "--name", self.name)
        return subprocess.Popen(
            [sys.executable, "-m", "segue.supervisor.cli", *arguments, *place],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
        )

    def reload(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`segue reload`, which must succeed."""
        done = self.command("reload", *arguments)
        assert done.returncode == 0, f"{done.stderr}\n{self.output.text}"
        return done

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    # --------------------------------------------------------------------------------------------------- end

    def stop(self, expected: int | None = 0) -> None:
        """Stop it gracefully and check its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.wait_exit()
        assert expected is None or status == expected, f"exit status {status}:\n{self.output.text}"

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGQUIT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DEADLINE_S)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._notify.close()


def unix_call(
    path: str, method: str, target: str, timeout: float = DEADLINE_S, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("localhost", timeout=timeout)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(timeout)
    try:
        connection.sock.connect(path)
        connection.request(method, target, headers=headers or {})
        response = connection.getresponse()
        body = response.read()
        return response.status, json.loads(body) if body else None
    finally:
        connection.close()


def tcp_call(port: int, method: str, target: str, token: str | None = None) -> tuple[int, str | None, Any]:
    """Status, type and document of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request(method, target, headers={"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        return response.status, response.getheader("content-type"), json.loads(response.read())
    finally:
        connection.close()


@contextlib.contextmanager
def supervised(*arguments: str, **options: Any) -> Iterator[Segue]:
    """A ready master; killed in the end if the test has not stopped it."""
    master = Segue(*arguments, **options)
    try:
        yield master.wait_ready()
    finally:
        master.close()


class Client:
    """One keep-alive connection that fails when the server closes it."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        self.connection.connect()
        self._socket = self.connection.sock

    def get(
        self, path: str, body: bytes | None = None, method: str = "GET"
    ) -> tuple[int, dict[str, str], bytes]:
        self.connection.request(method, path, body=body)
        response = self.connection.getresponse()
        data = response.read()
        assert self.connection.sock is self._socket, "the server closed the connection"
        return response.status, {key.lower(): value for key, value in response.getheaders()}, data

    def json(self, path: str) -> Any:
        return json.loads(self.get(path)[2])

    def come_to(self, version: str) -> None:
        """Ask until this connection has come to where `version` is served; what served it before accepts no other by then.

        A promote is done as soon as its generation serves. Only then the one before is told to stop, and hands over.
        """
        deadline = time.monotonic() + DEADLINE_S
        while (served := self.get("/")[2]) != version.encode():
            assert time.monotonic() < deadline, f"{served!r} is served still, not {version}"

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Load:
    """The load generator beside the test. `nothing_lost` is the measure that counts."""

    def __init__(self, port: int, *arguments: str, prefix: tuple[str, ...] = ()) -> None:
        """`prefix` is a command that runs the command given to it (`nsenter --net=…`)."""
        self._ready, tell = os.pipe()
        self._process = subprocess.Popen(
            [
                *prefix,
                sys.executable,
                str(ROOT / "bench" / "load.py"),
                "--port",
                str(port),
                "--duration",
                "290",
                "--ready-fd",
                str(tell),
                *arguments,
            ],
            stdout=subprocess.PIPE,
            pass_fds=[tell],
            env=environment(),
        )
        os.close(tell)

    def __enter__(self) -> Load:
        """Every client has had its first answer."""
        if not select.select([self._ready], [], [], DEADLINE_S)[0] or os.read(self._ready, 1) != b"\n":
            self.__exit__()
            raise AssertionError("the load generator got no answers")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._ready)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def finish(self) -> dict[str, Any]:
        """End it and return its tally."""
        self._process.send_signal(signal.SIGTERM)
        output, _ = self._process.communicate(timeout=DEADLINE_S)
        tally: dict[str, Any] = json.loads(output)
        return tally

    def nothing_lost(self) -> dict[str, Any]:
        """End it; not a request failed, and no connection was closed by the server."""
        tally = self.finish()
        assert tally["failed_total"] == 0, tally["failures_detail"]
        assert not any(tally["server_closes"].values()), tally["server_closes"]
        assert tally["ok_total"] > 0
        return tally

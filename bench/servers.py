"""Starting what is measured, segue and uvicorn, and asking it. Every server is ended by pid, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bench.ports import free_port
from bench.processes import MARK, kill_marked
from bench.users import ROOT, Interpreter, NoInterpreterError, own, unprivileged
from segue.handoff.http_client import CallError, call
from segue.handoff.messages import HOT

START_TIMEOUT_S = 60.0
RELOAD_TIMEOUT_S = 120.0
UNPRIVILEGED_USER = "nobody"
SAME_SETTINGS = ("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--timeout-keep-alive", "75")
"""Given to both where they are compared."""


class ServerError(Exception):
    """A server did not do what it was asked; the message ends with its last output."""


@dataclass
class Bench:
    """What all measurements share."""

    directory: Path
    quick: bool
    say: Callable[[str], None]
    details: list[dict[str, Any]] = field(default_factory=list)
    """What explains a figure, for the result's file."""
    _interpreters: dict[str, Interpreter | NoInterpreterError] = field(default_factory=dict)

    def interpreter(self, user: str | None) -> Interpreter:
        """A Python for `user`. Raises `NoInterpreterError`, each time with the same reason."""
        if user is None:
            return own()
        if user not in self._interpreters:
            try:
                self._interpreters[user] = unprivileged(self.directory, user)
            except NoInterpreterError as error:
                self._interpreters[user] = error
        found = self._interpreters[user]
        if isinstance(found, NoInterpreterError):
            raise found
        return found


@contextlib.contextmanager
def workshop(quick: bool, say: Callable[[str], None]) -> Iterator[Bench]:
    """A temporary directory that every user can enter, with the application in it."""
    directory = Path(tempfile.mkdtemp(prefix="segue-bench-"))
    try:
        directory.chmod(0o755)
        (directory / "app").mkdir()
        shutil.copy(ROOT / "bench" / "app.py", directory / "app" / "app.py")
        yield Bench(directory, quick, say)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass
class Server:
    """A running server of either kind."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    mark: str
    launched: float
    """Monotonic time just before exec."""
    launch: Callable[[], subprocess.Popen[bytes]]
    """Runs its command once more."""
    left_behind: list[int] = field(default_factory=list, init=False)
    """Once it has ended: processes that it did not take with it."""

    @property
    def pid(self) -> int:
        """Of the process that was started: the master, or uvicorn itself."""
        return self.process.pid

    def relaunch(self) -> None:
        """The same command again, once it has ended."""
        self.process = self.launch()

    def tail(self) -> str:
        """The end of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def first_answer(self, timeout_s: float = START_TIMEOUT_S) -> float:
        """Wait until it answers; the monotonic time of its first answer."""
        return wait_for(
            lambda: answered(self.port) is not None,
            timeout_s,
            0.002,
            lambda: f"no answer on port {self.port}:\n{self.tail()}",
            self._died,
        )

    def _died(self) -> None:
        if self.process.poll() is not None:
            raise ServerError(f"the server ended with {self.process.returncode}:\n{self.tail()}")


@dataclass
class Segue(Server):
    """An instance of segue."""

    control: str = field(kw_only=True)
    started_dir: Path = field(kw_only=True)

    def ask(self, method: str, target: str, timeout_s: float = 30.0, control: str | None = None) -> Any:
        """One request to its control socket, or to a worker's."""
        try:
            answer = asyncio.run(call(control or self.control, method, f"{HOT}{target}", timeout_s=timeout_s))
        except CallError as error:
            raise ServerError(f"{error}\n{self.tail()}") from error
        if answer.status >= 400:
            raise ServerError(f"{method} {target}: {answer.status} {answer.body.decode()}\n{self.tail()}")
        return answer.json()

    def status(self) -> dict[str, Any]:
        """Of the master."""
        status: dict[str, Any] = self.ask("GET", "/status")
        return status

    def reload(self) -> int:
        """Reload; returns the operation's number when the new generation serves."""
        document = self.ask("POST", f"/reload?wait={RELOAD_TIMEOUT_S:g}", RELOAD_TIMEOUT_S + 10)
        if document["outcome"] != "ok":
            raise ServerError(
                f"the reload ended as {document['outcome']}: {document['reason']}\n{self.tail()}"
            )
        return int(document["id"])

    def wait_drained(self, operation: int, timeout_s: float = 30.0) -> None:
        """Wait until what a reload replaced has ended."""
        target = f"/operations/{operation}?wait={timeout_s:g}&until=drained"
        document = self.ask("GET", target, timeout_s + 10)
        if not document["drained"]:
            raise ServerError(f"the old generation did not end within {timeout_s:g} s\n{self.tail()}")

    def workers(self, current: bool = True) -> list[dict[str, Any]]:
        """Of the current generation, or of all the others."""
        return [
            worker
            for generation in self.status()["generations"]
            if generation["current"] == current
            for worker in generation["workers"]
        ]

    def started(self, pid: int) -> float:
        """When that worker had completed its start-up."""
        return float((self.started_dir / str(pid)).read_text())


def segue(
    bench: Bench,
    *,
    workers: int = 1,
    start_s: float = 0.0,
    user: str | None = None,
    options: Sequence[str] = (),
    app: str | None = "app:app",
    environ: Mapping[str, str] | None = None,
) -> contextlib.AbstractContextManager[Segue]:
    """Run an instance for the length of a block; `app` None: with the built-in backend."""
    interpreter = bench.interpreter(user)
    place = Path(tempfile.mkdtemp(prefix="segue-", dir=bench.directory))
    place.chmod(0o755)
    owner = interpreter.popen_options()
    for name in ("run", "started"):
        (place / name).mkdir(mode=0o700)
        if owner:
            os.chown(place / name, owner["user"], owner["group"])
    port = free_port()
    command = [interpreter.executable, "-m", "segue.supervisor.cli", "serve", *filter(None, [app])]
    command += SAME_SETTINGS
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", str(workers)]
    command += ["--runtime-dir", str(place / "run"), "--name", "bench", *options]
    environ = {
        "BENCH_START_S": str(start_s),
        "BENCH_STARTED_DIR": str(place / "started"),
        "XDG_STATE_HOME": str(place / "state"),
        **(environ or {}),
    }

    def server(*launched: Any) -> Segue:
        control = str(place / "run" / "bench" / "control.sock")
        return Segue(port, *launched, control=control, started_dir=place / "started")

    return running(bench, interpreter, command, environ, signal.SIGQUIT, server)


def uvicorn(
    bench: Bench, *, workers: int = 1, start_s: float = 0.0, options: Sequence[str] = ()
) -> contextlib.AbstractContextManager[Server]:
    """Run plain uvicorn with the same settings for the length of a block."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app:app", *SAME_SETTINGS]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += [*(("--workers", str(workers)) if workers > 1 else ()), *options]
    environ = {"BENCH_START_S": str(start_s)}
    return running(bench, own(), command, environ, signal.SIGTERM, lambda *launched: Server(port, *launched))


ServerT = TypeVar("ServerT", bound=Server)


@contextlib.contextmanager
def running(
    bench: Bench,
    interpreter: Interpreter,
    command: Sequence[str],
    environ: dict[str, str],
    ending: signal.Signals,
    server: Callable[..., ServerT],
    directory: Path | None = None,
) -> Iterator[ServerT]:
    """Run `command` in `directory` for the length of a block, and end it and whatever it leaves behind."""
    mark = uuid.uuid4().hex
    path = bench.directory / f"{mark}.log"
    environ = {"PATH": os.environ.get("PATH", os.defpath), MARK: mark, **interpreter.environ, **environ}

    def launch() -> subprocess.Popen[bytes]:
        with path.open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory or bench.directory / "app",
                env=environ,
                start_new_session=True,
                **interpreter.popen_options(),
            )

    launched = time.monotonic()
    running = server(launch(), path, mark, launched, launch)
    try:
        yield running
    finally:
        # uvicorn would wait for open connections as long as they like; its workers are then killed below.
        process = running.process
        process.send_signal(ending)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        running.left_behind = kill_marked(mark)


def ping(port: int, timeout_s: float) -> bytes | None:
    """The answer to one request on a new connection, whatever it is; None if nobody takes it."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout_s) as connection:
            connection.sendall(b"GET /ping HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
            answer = b""
            while data := connection.recv(4096):
                answer += data
            return answer
    except OSError:
        return None


def answered(port: int, timeout_s: float = 10.0) -> int | None:
    """Ask once on a new connection: the pid of the process that answered, None if there was no answer."""
    answer = ping(port, timeout_s) or b""
    return pid_in(answer) if answer.endswith(b"pong") else None


def pid_in(answer: bytes) -> int | None:
    """Which process has given this answer to `ping`; None if it doesn't say."""
    pid = answer.partition(b"x-pid: ")[2].partition(b"\r\n")[0]
    return int(pid) if pid else None


def wait_for(
    condition: Callable[[], bool],
    timeout_s: float,
    pause_s: float,
    otherwise: Callable[[], str],
    check: Callable[[], None] = lambda: None,
) -> float:
    """Wait until `condition` holds; the monotonic time at which it did. Raises `ServerError` with `otherwise`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        check()
        if time.monotonic() > deadline:
            raise ServerError(f"after {timeout_s:g} s: {otherwise()}")
        time.sleep(pause_s)
    return time.monotonic()


@dataclass
class Load:
    """The load generator while it runs."""

    process: subprocess.Popen[bytes]
    events: Path
    out: Path

    def window(self, name: str) -> None:
        """From now on requests count for this window."""
        with self.events.open("a") as file:
            file.write(json.dumps({"t": time.monotonic(), "window": name}) + "\n")

    def end(self) -> dict[str, Any]:
        """Stop it; its result."""
        self.process.terminate()
        if self.process.wait(30) != 0:
            raise ServerError(f"the load generator ended with {self.process.returncode}")
        result: dict[str, Any] = json.loads(self.out.read_text())
        return result


@contextlib.contextmanager
def load(bench: Bench, server: Server, options: Sequence[str] = ()) -> Iterator[Load]:
    """Put load on a server for the length of a block; every client has had an answer when the block begins."""
    place = Path(tempfile.mkdtemp(prefix="load-", dir=bench.directory))
    ready, tell = os.pipe()
    command = [
        sys.executable,
        str(ROOT / "bench" / "load.py"),
        "--port",
        str(server.port),
        "--duration",
        "3600",
    ]
    command += [
        "--ready-fd",
        str(tell),
        "--events",
        str(place / "events"),
        "--out",
        str(place / "out"),
        *options,
    ]
    process = subprocess.Popen(command, pass_fds=[tell])
    os.close(tell)
    try:
        if select.select([ready], [], [], 30)[0] == [] or os.read(ready, 1) != b"\n":
            raise ServerError(f"the load generator got no answers\n{server.tail()}")
        yield Load(process, place / "events", place / "out")
    finally:
        os.close(ready)
        if process.poll() is None:
            process.kill()
            process.wait()

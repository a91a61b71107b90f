"""A throw-away machine with a real systemd (tests/run-systemd.sh), in which units are installed and driven."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import APP
from scenario import DEADLINE_S, ROOT

from bench.users import NoInterpreterError, unprivileged

USER = "segue"
SCRIPT = ROOT / "tests" / "run-systemd.sh"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OLD, NEW = "systemd 252", "systemd 254"
"""Debian 12's own, without notify-reload, and one that has it; a newer machine has only the second."""


def why_not() -> str:
    """Why this machine can have none; empty if it can."""
    if os.geteuid() != 0:
        return "a systemd of its own needs root"
    for program in ("systemctl", "systemd-analyze", "nsenter", "unshare", "setpriv", "dbus-daemon"):
        if shutil.which(program) is None:
            return f"there is no {program} (Debian: systemd, dbus, util-linux)"
    if any(ROOT.is_relative_to(place) for place in ("/tmp", "/var/tmp")):
        return (
            f"{ROOT} is where the units have a directory of their own (PrivateTmp=): check it out elsewhere"
        )
    return ""


def host_version() -> int:
    said = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"systemd (\d+)", said)
    return int(found[1]) if found else 0


class NoMachineError(Exception):
    """It could not be had; the message says why."""


class Machine:
    """One that runs. Everything of a test is under `place`, which is the same path inside and outside."""

    def __init__(self, host_systemd: bool) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="segue-test-", dir="/opt"))
        self.place.chmod(0o755)
        try:
            interpreter = unprivileged(self.place / "python", "nobody")
            self._interpreter = interpreter
            self.segue = self.place / "bin" / "segue"
            self._install_segue()
            pid_file = self.place / "pid"
            options = ["--boot-timeout", f"{DEADLINE_S:.0f}", *(["--host-systemd"] if host_systemd else [])]
            self._process = subprocess.Popen(
                [SCRIPT, *options, "--bind", self.place, "--pid-file", pid_file, "--", "cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=ROOT,
                env={key: value for key, value in os.environ.items() if key != "TMPDIR"},
            )
            self.pid = self._wait_up(pid_file)
            self.run("useradd", "--system", "--no-create-home", USER)
        except BaseException:
            self.close()
            raise

    def _install_segue(self) -> None:
        """As pip would: a script beside the interpreter."""
        self.segue.parent.mkdir()
        python = self.segue.parent / "python"
        variables = " ".join(f"{key}={value}" for key, value in self._interpreter.environ.items())
        python.write_text(f'#!/bin/sh\nexec env {variables} {self._interpreter.executable} "$@"\n')
        if variables:
            python.chmod(0o755)
        else:
            python.unlink()
            python = Path(self._interpreter.executable)
        self.python = python
        self.segue.write_text(f"#!{self.python}\nfrom segue.supervisor.cli import main\nmain()\n")
        self.segue.chmod(0o755)

    def _wait_up(self, pid_file: Path) -> int:
        deadline = (
            time.monotonic() + 3 * DEADLINE_S
        )  # the first has to download what it boots, and others wait for that
        while not pid_file.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.terminate()
                assert self._process.stderr is not None
                raise NoMachineError(f"no machine with that systemd: {self._process.stderr.read().decode()}")
            select.select([], [], [], 0.05)
        return int(pid_file.read_text())

    def close(self) -> None:
        if hasattr(self, "_process"):
            self._process.terminate()
            self._process.communicate(timeout=DEADLINE_S)
        shutil.rmtree(self.place, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------ commands

    @property
    def enter(self) -> tuple[str, ...]:
        """What runs a command inside."""
        return ("nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-C", "--")

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        cwd: str | Path = "/",
        timeout: float = DEADLINE_S,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.enter, "env", "-C", str(cwd), *map(str, command)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={"PATH": _PATH, "LANG": "C.UTF-8"} | env,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}\n{self.journal()}"
            )
        return done

    def systemctl(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("systemctl", *arguments, **options)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        done = self.systemctl("show", *(f"--property={each}" for each in properties), unit)
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    def wait(self, unit: str, **wanted: str) -> dict[str, str]:
        """Until the properties of the unit are so."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            shown = self.show(unit, *wanted)
            if shown == wanted:
                return shown
            if time.monotonic() > deadline:
                raise AssertionError(f"{unit} is {shown}, not {wanted}:\n{self.journal()}")
            select.select([], [], [], 0.05)

    def journal(self) -> str:
        return self.run("journalctl", "--no-pager", "-o", "cat", "-n", "200", check=False).stdout

    def wait_journal(self, pattern: str, count: int = 1) -> None:
        """Until systemd or a unit has written it so often."""
        deadline = time.monotonic() + DEADLINE_S
        while len(re.findall(pattern, text := self.journal())) < count:
            if time.monotonic() > deadline:
                raise AssertionError(f"{pattern!r} is not in the journal:\n{text}")
            select.select([], [], [], 0.1)

    # --------------------------------------------------------------------------------------------------- units

    def install(self, name: str, text: str) -> None:
        """A unit file."""
        path = f"/run/systemd/system/{name}"
        self.run("sh", "-c", f"mkdir -p {os.path.dirname(path)} && cat > '{path}' <<'END'\n{text}END")
        self.systemctl("daemon-reload")

    def drop_in(self, name: str, **settings: str) -> None:
        """Other settings for its `[Service]`."""
        lines = "".join(f"{key}={value}\n" for key, value in settings.items())
        self.install(f"{name}.d/test.conf", f"[Service]\n{lines}")

    def unit(self, *arguments: str, cwd: Path) -> str:
        """What ``segue unit`` prints there."""
        return self.run(self.segue, "unit", "--user", USER, *arguments, cwd=cwd, PWD=str(cwd)).stdout

    def processes(self) -> list[int]:
        """Of the user whom the units run as; pids as they are inside."""
        found = self.run("pgrep", "-u", USER, check=False).stdout
        return list(map(int, found.split()))

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread makes here are of the machine's own network."""
        with open("/proc/thread-self/ns/net") as own, open(f"/proc/{self.pid}/ns/net") as there:
            _setns(there.fileno())
            try:
                yield
            finally:
                _setns(own.fileno())

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        self.run("kill", f"-{number}", str(pid))


def _setns(fd: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")


class Service:
    """A unit made by ``segue unit`` that serves the application in `directory`."""

    def __init__(
        self, machine: Machine, directory: Path, unit: str = "segue.service", port: int = 8000
    ) -> None:
        self.machine, self.directory, self.unit, self.port = machine, directory, unit, port

    def write(
        self, version: str = "1", prelude: str = "", startup: str = "pass", body: str = "VERSION"
    ) -> None:
        """The application's code; `startup` is a statement of its lifespan, `body` an expression for its answers."""
        self.directory.mkdir(exist_ok=True, parents=True)
        text = APP.format(version=version).replace(
            "        await receive()\n", f"        {startup}\n        await receive()\n", 1
        )
        (self.directory / "shop.py").write_text(prelude + text.replace("body = VERSION.", f"body = {body}."))

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`segue …` as the unit's user."""
        return self.machine.run("setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", self.machine.segue,
                                *arguments, check=check)  # fmt: skip

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.command("status", "--json").stdout)
        return document

    def wait_status(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Ask for the status until `condition` holds of it."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, status
            select.select([], [], [], 0.05)

    def master(self) -> int:
        return int(self.machine.show(self.unit, "MainPID")["MainPID"])

    def workers(self) -> list[int]:
        """Pids of those of the current generation, as they are inside."""
        document = self.status()
        return [w["pid"] for g in document["generations"] if g["current"] for w in g["workers"]]

    def workers_by_socket(self) -> list[int]:
        """The same without asking the master."""
        found = self.machine.run("pgrep", "-u", USER, "-f", "segue.worker").stdout
        return list(map(int, found.split()))

    def wait_processes(self, count: int) -> None:
        """Until the user has so many."""
        deadline = time.monotonic() + DEADLINE_S
        while len(self.machine.processes()) != count:
            assert time.monotonic() < deadline, self.machine.journal()
            select.select([], [], [], 0.05)

    def connect(self) -> socket.socket:
        with self.machine.inside():
            return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)

    def get(self, path: str = "/", sock: socket.socket | None = None) -> str:
        """The body of one answer; on a connection of its own, or on `sock`, which is kept."""
        connection = sock or self.connect()
        try:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: shop\r\n\r\n".encode())
            data = b""
            while b"\r\n\r\n" not in data:
                data += (more := connection.recv(65536))
                if not more:
                    raise ConnectionResetError(f"closed by the server: {data!r}")
            head, _, body = data.partition(b"\r\n\r\n")
            length = int(re.findall(rb"(?i)content-length: (\d+)", head)[0])
            while len(body) < length:
                body += connection.recv(65536)
            assert b" 200 " in head.split(b"\r\n")[0], head
            return body.decode()
        finally:
            if sock is None:
                connection.close()

    def wait_answer(self, answer: str, sock: socket.socket | None = None) -> None:
        """Until a kept connection is answered so: it moves on its own, a moment after new ones are accepted there.

        Without one, until who connects is: `segue reload` returns when the new workers accept, a moment before the old
        ones cease to. (READY comes after that.)
        """
        deadline = time.monotonic() + DEADLINE_S
        while self.get("/", sock) != answer:
            assert time.monotonic() < deadline


def start_machine(version: str) -> Machine:
    """With that systemd; skips, by name, where it can't be had."""
    if reason := why_not():
        pytest.skip(reason)
    host = host_version()
    if version == OLD and host >= 253:
        pytest.skip(f"the systemd of this machine is {host}: there is no 252 here")
    try:
        return Machine(host_systemd=version == OLD or host >= 253)
    except (NoInterpreterError, NoMachineError) as error:
        pytest.skip(str(error))

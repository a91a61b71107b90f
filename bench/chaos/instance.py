"""The instance that is tormented: its master, which is started again whenever it ends, as systemd would, and its code."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any

from bench.chaos.blame import Blame
from bench.chaos.code import Code
from bench.chaos.messages import Messages
from bench.processes import MARK, descriptors
from bench.users import ROOT
from segue.supervisor.operations import reached

HOT = "/api/v1/hot"
WORKERS = 2
DEADLINE_S = 90.0
HEARTBEAT_TIMEOUT_S = 4
PARK_FOR_S = 20
_POLL_S = 0.05
_START_S = 0.2


class ChaosError(Exception):
    """A promise was not kept; the message says which."""


class Instance:
    """Started with `start`; every method that waits raises `ChaosError` when it is too late."""

    def __init__(self, directory: Path, mark: str, rng: random.Random) -> None:
        self.directory = directory
        self.runtime_dir = directory / "run"
        self.output = directory / "output"
        self.blame = Blame(directory / "spoiled")
        self.blame.spoiled.touch()
        self.messages = Messages(directory)
        self.code = Code(directory / "code", self.messages.settings(), rng)
        self.starts = 0
        self._mark = mark
        self._master: subprocess.Popen[bytes] | None = None
        self._stopped: set[int] = set()
        """Pids of workers that must not be woken: what they hold has been written down."""
        self._signalling = threading.Lock()

    # ------------------------------------------------------------------------------------------------ the master

    def start(self) -> None:
        """As the service manager does it: again, until it stays."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            self._launch()
            while time.monotonic() < deadline:
                assert self._master is not None
                if self._master.poll() is not None:
                    break
                with contextlib.suppress(ChaosError):
                    self.status()
                    return
                time.sleep(_POLL_S)
            else:
                raise ChaosError(f"no master answers after {DEADLINE_S:g} s")
            time.sleep(0.1)

    def _launch(self) -> None:
        self.starts += 1
        with self.output.open("ab") as output:
            self._master = self._serve(output)

    def start_another(self) -> tuple[int, str]:
        """The same command a second time; its exit status, and what it says."""
        process = self._serve(subprocess.PIPE)
        try:
            said, _ = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise ChaosError(f"a second master still runs after {DEADLINE_S:g} s") from None
        return process.returncode, said.decode()

    def _serve(self, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
        environ = {
            key: value for key, value in os.environ.items() if not key.startswith(("SEGUE_", "LISTEN_"))
        }
        environ |= {
            MARK: self._mark,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "BENCH_START_S": str(_START_S),
            "CHAOS_RECEIVED": str(self.messages.received),
            "CHAOS_SPOILED": str(self.blame.spoiled),
            "PWD": str(self.code.current),
            "STATE_DIRECTORY": str(self.directory / "state"),
        }
        environ.pop("NOTIFY_SOCKET", None)
        command = [sys.executable, "-m", "segue.supervisor.cli", "serve", "shop:app"]
        command += ["--runtime-dir", str(self.runtime_dir), "--workers", str(WORKERS), "--no-access-log"]
        command += ["--bind", f"127.0.0.1:{self.blame.port}", "--warm-up", "/warm"]
        command += ["--heartbeat-timeout", str(HEARTBEAT_TIMEOUT_S)]
        command += ["--park-for", str(PARK_FOR_S)]
        return subprocess.Popen(
            command,
            cwd=self.code.current,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    @property
    def pid(self) -> int:
        """The master's."""
        assert self._master is not None
        return self._master.pid

    def kill_master(self) -> None:
        """As the kernel's out-of-memory killer does."""
        assert self._master is not None
        self._master.kill()
        self._master.wait()

    def stop(self) -> None:
        """The end, which is part of the test."""
        assert self._master is not None
        self._master.terminate()
        try:
            status = self._master.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._master.kill()
            raise ChaosError(f"the master did not stop within {DEADLINE_S:g} s") from None
        if status != 0:
            raise ChaosError(f"the master ended with {status}")

    # ---------------------------------------------------------------------------------------------------- asking

    def call(self, method: str, target: str, timeout_s: float = 30.0) -> tuple[int, Any]:
        """A request to the master. Raises `ChaosError` if there is no answer."""
        response, body = self._request(
            self.runtime_dir / "default" / "control.sock", method, target, timeout_s
        )
        try:
            return response.status, json.loads(body)
        except ValueError as error:
            raise ChaosError(f"{method} {target}: {error!r}") from error

    def probe(self, path: str) -> int:
        """Ask the application on a worker's private socket; the pid of the process that has answered."""
        response, _ = self._request(Path(path), "GET", "/ping", 30.0)
        if response.status != 200:
            raise ChaosError(f"{path}: {response.status}")
        return int(response.headers["x-pid"])

    def _request(self, path: Path, method: str, target: str, timeout_s: float) -> tuple[HTTPResponse, bytes]:
        connection = HTTPConnection("localhost", timeout=timeout_s)
        try:
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(timeout_s)
            connection.sock.connect(str(path))
            connection.request(method, target)
            response = connection.getresponse()
            return response, response.read()
        except (OSError, HTTPException) as error:
            raise ChaosError(f"{method} {target}: {error!r}") from error
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        """Of the whole instance."""
        code, document = self.call("GET", f"{HOT}/status")
        if code != 200:
            raise ChaosError(f"status: {code} {document}")
        found: dict[str, Any] = document
        return found

    def current(self) -> dict[str, Any]:
        """The generation that serves."""
        document = self.status()
        found: dict[str, Any] = next(each for each in document["generations"] if each["current"])
        return found

    def ask(self, what: str) -> int:
        """Ask for a change; returns the operation's number at once."""
        joiner = "&" if "?" in what else "?"
        code, document = self.call("POST", f"{HOT}/{what}{joiner}wait=0")
        if code != 202:
            raise ChaosError(f"{what}: {code} {document}")
        return int(document["id"])

    def outcome(self, operation: int, until: str = "serving") -> dict[str, Any]:
        """What became of it, whichever master knows; with `until`, what became of it by then."""
        return self._follow(operation, f"?wait=5&until={until}", lambda found: reached(found, until))

    def in_phase(self, operation: int, phase: str) -> bool:
        """Wait until it is in this phase, or has its outcome; whether it is in the phase."""
        found = self._follow(
            operation, "", lambda found: found["phase"] == phase or found["outcome"] is not None
        )
        return bool(found["outcome"] is None)

    def _follow(
        self, operation: int, query: str, far_enough: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any]:
        deadline = time.monotonic() + DEADLINE_S
        said = ""
        while time.monotonic() < deadline:
            try:
                code, document = self.call("GET", f"{HOT}/operations/{operation}{query}")
            except ChaosError as error:
                said = str(error)
            else:
                if code != 200:
                    raise ChaosError(f"operation {operation} is forgotten: {document}")
                found: dict[str, Any] = document
                if far_enough(found):
                    return found
                said = f"it is in phase {found['phase']}"
            time.sleep(_POLL_S)
        raise ChaosError(f"operation {operation} has no outcome after {DEADLINE_S:g} s: {said}")

    def demand(self, what: str) -> dict[str, Any]:
        """A change that must succeed."""
        document = self.outcome(self.ask(what))
        if document["outcome"] != "ok":
            raise ChaosError(f"{what} was refused: {document['reason']}\n{document.get('output', '')}")
        return document

    def wait(self, what: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Until the status is so."""
        deadline = time.monotonic() + DEADLINE_S
        document: dict[str, Any] | None = None
        while time.monotonic() < deadline:
            with contextlib.suppress(ChaosError):
                document = self.status()
                if condition(document):
                    return document
            time.sleep(_POLL_S)
        raise ChaosError(f"not within {DEADLINE_S:g} s: {what}\n{_shown(document)}")

    def settle(self) -> dict[str, Any]:
        """Wait until all workers of one generation serve and nothing is being changed; a short generation is renewed."""
        current = self.settle_workers()
        if current["workers_missing"]:
            self.code.mend()
            self.demand("reload")
            current = self.settle_workers()
        return current

    def settle_workers(self) -> dict[str, Any]:
        """The same for what serves, as it is; returns its generation."""
        document = self.wait("all workers serve and nothing is being changed", _settled)
        found: dict[str, Any] = next(each for each in document["generations"] if each["current"])
        return found

    def renew(self) -> int:
        """Have a generation serve whose release nobody has edited, so that its workers can be started again; its number."""
        self.code.write(in_place=False)
        return int(self.demand("reload")["generation"])

    def workers(self) -> list[dict[str, Any]]:
        """All that have a process, whatever their generation."""
        return [
            worker | {"generation": generation["id"]}
            for generation in self.status()["generations"]
            for worker in generation["workers"]
            if worker["pid"]
        ]

    # ------------------------------------------------------------------------------------------------ tormenting

    def stop_worker(self, pid: int) -> int:
        """SIGSTOP, for good, and what it holds is written down; returns how many connections. 0 if it has ended already."""
        with self._signalling:
            self._stopped.add(pid)
            try:
                os.kill(pid, signal.SIGSTOP)
                wait_stopped(pid)
                return self.blame.take_down(pid)
            except (ProcessLookupError, FileNotFoundError):
                return 0

    def kill_worker(self, pid: int) -> int:
        """SIGKILL; returns how many connections it held."""
        count = self.stop_worker(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return count

    def pause(self, pid: int, seconds: float) -> None:
        """It stands still for so long, unless somebody else stops it for good meanwhile."""
        self._send(pid, signal.SIGSTOP)
        time.sleep(seconds)
        self._send(pid, signal.SIGCONT)

    def _send(self, pid: int, number: int) -> None:
        with self._signalling, contextlib.suppress(ProcessLookupError):
            if pid not in self._stopped:
                os.kill(pid, number)

    @contextlib.contextmanager
    def exhausted(self, pids: list[int]) -> Any:
        """These processes can open nothing more meanwhile."""
        before = {}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                before[pid] = resource.prlimit(pid, resource.RLIMIT_NOFILE)
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors(pid), before[pid][1]))
        try:
            yield
        finally:
            for pid, limits in before.items():
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)

    @contextlib.contextmanager
    def full_disk(self) -> Any:
        """Nothing more fits into the runtime directory meanwhile."""
        ballast = self.runtime_dir / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        try:
            yield
        finally:
            ballast.unlink()


def wait_stopped(pid: int) -> None:
    """Until the kernel says that it is."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TtZX":
            return
        time.sleep(0.001)
    raise ChaosError(f"process {pid} does not stop")


def _shown(document: dict[str, Any] | None) -> str:
    """What of a status matters when something has not come."""
    if document is None:
        return "there was no answer"
    lines = [f"ready: {document['ready']}, probation: {document['probation']}"]
    for each in document["generations"]:
        workers = ", ".join(f"{worker['id']} {worker['state']}" for worker in each["workers"])
        lines.append(
            f"generation {each['id']}, {each['state']}, {each['workers_missing']} missing: {workers}"
        )
    for each in document["reloads"][-3:]:
        lines.append(
            f"{each['kind']} of generation {each['generation']}: {each['phase']} {each['reason']}"[:200]
        )
    return "\n".join(lines)


def _settled(document: dict[str, Any]) -> bool:
    if not document["ready"] or any(
        each["state"] in {"booting", "staged"} for each in document["generations"]
    ):
        return False
    current = next(each for each in document["generations"] if each["current"])
    serving = [worker for worker in current["workers"] if worker["state"] == "active"]
    others = [worker for worker in current["workers"] if worker["state"] != "active"]
    answering = all(worker.get("connections") is not None for worker in serving)
    running = any(each["outcome"] is None for each in document["reloads"])
    return len(serving) + current["workers_missing"] >= WORKERS and answering and not others and not running

"""The instance that is tormented: its master, which is started again whenever it ends, as systemd would, and its code."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from bench.chaos.blame import Blame
from bench.chaos.messages import Messages
from bench.processes import MARK, descriptors
from bench.users import ROOT

HOT = "/api/v1/hot"
WORKERS = 2
DEADLINE_S = 90.0
READY_TIMEOUT_S = 30
HEARTBEAT_TIMEOUT_S = 4
PROBATION_S = 2
_POLL_S = 0.05
_START_S = 0.2
CODE = """
{prelude}
import os
import segue
from bench.app import app as _app
from segue.worker.backend.hsp.connector import HSPConnector
from segue.worker.backend.hsp.envelope import FACT
from segue.worker.backend.hsp.settings import HSPSettings

VERSION = {version}
_received = os.open(os.environ["CHAOS_RECEIVED"], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
_services = segue.Services()

def _write_down(message):
    if "number" in message.payload:
        os.write(_received, b"%d %d\\n" % (message.payload["topic"], message.payload["number"]))

def _make(settings: HSPSettings, previous: HSPConnector | None = None) -> HSPConnector:
    connector = HSPConnector(settings, previous)
    if previous is None:
        connector.on(FACT, _write_down)
    return connector

_services.declare("hsp", _make, settings=HSPSettings, per="generation")

async def serve(scope, receive, send):
    {lifespan}
    if scope["type"] == "http" and scope["path"] == "/warm":
        {warm}
    await _app(scope, receive, send)

app = _services.wrap(serve)
"""


class ChaosError(Exception):
    """A promise was not kept; the message says which."""


class Instance:
    """Started with `start`; every method that waits raises `ChaosError` when it is too late."""

    def __init__(self, directory: Path, mark: str) -> None:
        self.directory = directory
        self.runtime_dir = directory / "run"
        self.code = directory / "code"
        self.output = directory / "output"
        self.blame = Blame()
        self.messages = Messages(directory)
        self.starts = 0
        self.version = 0
        self._mark = mark
        self._good = ""
        self._master: subprocess.Popen[bytes] | None = None
        self.code.mkdir()
        (self.code / "segue.toml").write_text(self.messages.settings())
        self.write()

    # -------------------------------------------------------------------------------------------------- the code

    def write(self, prelude: str = "", lifespan: str = "pass", warm: str = "pass") -> None:
        """Another version of the application, broken if it is told how."""
        self.version += 1
        text = CODE.format(prelude=prelude, version=self.version, lifespan=lifespan, warm=warm)
        if (prelude, lifespan, warm) == ("", "pass", "pass"):
            self._good = text
        self._put(text)

    def mend(self) -> None:
        """The last version that was not broken."""
        self._put(self._good)

    @property
    def text(self) -> str:
        """What lies on the disk."""
        return (self.code / "shop.py").read_text()

    def put_back(self, text: str) -> None:
        """What lay there before."""
        self._good = text
        self._put(text)

    def _put(self, text: str) -> None:
        path = self.code / "shop.py"
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)

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
        environ = {
            key: value for key, value in os.environ.items() if not key.startswith(("SEGUE_", "LISTEN_"))
        }
        environ |= {
            MARK: self._mark,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "BENCH_START_S": str(_START_S),
            "CHAOS_RECEIVED": str(self.messages.received),
            "STATE_DIRECTORY": str(self.directory / "state"),
        }
        environ.pop("NOTIFY_SOCKET", None)
        command = [sys.executable, "-m", "segue.supervisor.cli", "serve", "shop:app"]
        command += ["--runtime-dir", str(self.runtime_dir), "--workers", str(WORKERS), "--no-access-log"]
        command += ["--bind", f"127.0.0.1:{self.blame.port}", "--warm-up", "/warm"]
        command += ["--ready-timeout", str(READY_TIMEOUT_S), "--heartbeat-timeout", str(HEARTBEAT_TIMEOUT_S)]
        command += ["--probation", str(PROBATION_S), "--park-for", "20"]
        with self.output.open("ab") as output:
            self._master = subprocess.Popen(
                command,
                cwd=self.code,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
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
        connection = HTTPConnection("localhost", timeout=timeout_s)
        try:
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(timeout_s)
            connection.sock.connect(str(self.runtime_dir / "default" / "control.sock"))
            connection.request(method, target)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, HTTPException, ValueError) as error:
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

    def outcome(self, operation: int) -> dict[str, Any]:
        """What became of it, whichever master knows."""
        deadline = time.monotonic() + DEADLINE_S
        said = ""
        while time.monotonic() < deadline:
            try:
                code, document = self.call("GET", f"{HOT}/operations/{operation}?wait=5")
            except ChaosError as error:
                said = str(error)
            else:
                if code != 200:
                    raise ChaosError(f"operation {operation} is forgotten: {document}")
                found: dict[str, Any] = document
                if found["outcome"] is not None:
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
        raise ChaosError(f"not within {DEADLINE_S:g} s: {what}\n{json.dumps(document, indent=1)}")

    def settle(self) -> dict[str, Any]:
        """Wait until all workers of one generation serve and nothing is being changed; a short generation is renewed."""
        document = self.wait("all workers serve and nothing is being changed", _settled)
        current = next(each for each in document["generations"] if each["current"])
        if current["workers_missing"]:
            self.mend()
            self.demand("reload")
            document = self.wait("all workers serve after a reload", _settled)
        return document

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
        """SIGSTOP, and what it holds is written down; returns how many connections. 0 if it has ended already."""
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

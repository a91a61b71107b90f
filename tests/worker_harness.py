"""Plays the master for single workers: their sockets, their spec, their messages."""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import msgspec

from segue.handoff.messages import HOT, FdName, ListenerInfo, WorkerSpec, WorkerStatus
from segue.handoff.notify import NotifySocket

WAIT_S = 60.0
"""Only ends what hangs."""


class Worker:
    """A real worker process."""

    def __init__(self, process: subprocess.Popen[bytes], control: str, output: int, bench: Bench) -> None:
        self.process, self.control, self._output, self._bench = process, control, output, bench
        self.messages: list[dict[str, str]] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        """What it printed before it was ready."""
        return os.pread(self._output, 1 << 20, 0).decode(errors="replace")

    def wait_for(self, key: str, value: str | None = None) -> str:
        """Wait for a message with that field; returns its value."""
        seen = 0
        deadline = time.monotonic() + WAIT_S
        while True:
            for message in self.messages[seen:]:
                if key in message and value in {None, message[key]}:
                    return message[key]
            seen = len(self.messages)
            if self.process.poll() is not None and not self._bench.read_messages(0):
                raise AssertionError(f"it ended with {self.process.returncode}: {self.output}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no {key}={value} but {self.messages}: {self.output}")
            self._bench.read_messages(0.2)

    def wait_ready(self) -> Self:
        self.wait_for("X_SEGUE_STATE", "ready")
        return self

    def call(self, method: str, target: str) -> tuple[int, Any]:
        """Ask on its private socket."""
        connection = UnixConnection(self.control)
        try:
            connection.request(method, target)
            answer = connection.getresponse()
            return answer.status, msgspec.json.decode(answer.read())
        finally:
            connection.close()

    def command(self, target: str) -> WorkerStatus:
        status, body = self.call("POST", f"{HOT}/{target}")
        assert status in {200, 202}, body
        return msgspec.convert(body, WorkerStatus)

    def activate(self) -> Self:
        assert self.command("activate").mode == "active"
        return self

    def status(self) -> WorkerStatus:
        status, body = self.call("GET", f"{HOT}/status")
        assert status == 200
        return msgspec.convert(body, WorkerStatus)

    def hand_over(self, timeout: float = 30, wait: bool = True, **query: str) -> Self:
        assert self.command("drain/start?mode=handover&send=0").mode == "quiet"
        self.messages.clear()
        more = "".join(f"&{key}={value}" for key, value in query.items())
        assert self.command(f"drain/start?mode=handover&timeout={timeout:g}{more}").mode in {
            "draining",
            "drained",
        }
        if wait:
            self.wait_for("X_SEGUE_STATE", "drained")
        return self

    def stop(self, timeout: float = 30) -> int:
        if self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.command(f"stop?timeout={timeout:g}")
        return self.wait()

    def wait(self) -> int:
        """Its exit status."""
        try:
            return self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it doesn't end: {self.output}") from None

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._output)


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("segue", timeout=WAIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WAIT_S)
        self.sock.connect(self._path)


class Bench:
    """The master's descriptors, and the workers that were started with them."""

    def __init__(self, directory: Path, app: str = "", family: str = "inet") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="segue-", dir="/tmp"))
        self.app_dir = directory
        if app:
            (directory / "shop.py").write_text(app)
        if family == "unix":
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(str(self.directory / "public"))
            address: Any = f"unix:{self.directory}/public"
        else:
            self.listener = socket.socket(socket.AF_INET6 if family == "inet6" else socket.AF_INET)
            self.listener.bind(("::1" if family == "inet6" else "127.0.0.1", 0))
            host, port = self.listener.getsockname()[:2]
            address = f"[{host}]:{port}" if family == "inet6" else f"{host}:{port}"
        self.listener.listen(4096)
        self.listener.setblocking(False)
        self.info = ListenerInfo("web", address, family)
        self.relay_read, self.relay_write = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.lifeline_read, self.lifeline_write = os.pipe()
        self.notify = NotifySocket(str(self.directory / "notify"))
        self.stdout = os.memfd_create("stdout")
        self.workers: list[Worker] = []
        self._clients: list[Client] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        for worker in self.workers:
            worker.close()
        for sock in (self.listener, self.relay_read, self.relay_write):
            sock.close()
        self.lose_master()
        os.close(self.lifeline_read)
        os.close(self.stdout)
        self.notify.close()
        for path in self.directory.iterdir():
            path.unlink()
        self.directory.rmdir()

    def lose_master(self) -> None:
        """The lifeline ends."""
        if self.lifeline_write >= 0:
            os.close(self.lifeline_write)
            self.lifeline_write = -1

    def spawn(
        self,
        *,
        app: str | None = "shop:app",
        environ: dict[str, str] | None = None,
        prlimit: str = "",
        dev: bool = True,
        spec: dict[str, Any] | None = None,
        **uvicorn: Any,
    ) -> Worker:
        generation = len(self.workers) + 1
        control = str(self.directory / f"{generation}-1.sock")
        values: dict[str, Any] = {
            "instance": "test",
            "generation": generation,
            "worker": 1,
            "app": app,
            "working_dir": str(self.app_dir),
            "app_dir": str(self.app_dir),
            "uvicorn": {"timeout_keep_alive": 75} | uvicorn,
            "listeners": (self.info,),
            "notify_socket": self.notify.path,
            "master_socket": str(self.directory / "master"),
            "control_path": control,
            "heartbeat_s": 0.5,
            "idle_grace_s": 0.3,
            "stop_timeout_s": 5.0,
        }
        memory = os.memfd_create("spec")
        os.write(memory, msgspec.json.encode(WorkerSpec(**values | (spec or {}))))
        output = os.memfd_create("output")
        out = os.open(f"/proc/self/fd/{output}", os.O_RDWR | os.O_APPEND)
        with socket.socket(socket.AF_UNIX) as private:
            private.bind(control)
            private.listen(16)
            fds = {
                FdName.SPEC: memory,
                "web": self.listener.fileno(),
                FdName.CONTROL: private.fileno(),
                FdName.RELAY_READ: self.relay_read.fileno(),
                FdName.RELAY_WRITE: self.relay_write.fileno(),
                FdName.LIFELINE: self.lifeline_read,
                FdName.STDOUT: os.dup(self.stdout),
                FdName.STDERR: os.dup(self.stdout),
            }
            command = [sys.executable, "-P", *(["-X", "dev"] if dev else []), "-m", "segue.worker"]
            if prlimit:
                command = ["prlimit", f"--nofile={prlimit}", *command]
            process = subprocess.Popen(
                command,
                cwd=self.app_dir,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                pass_fds=tuple(fds.values()),
                env=os.environ
                | {
                    "LISTEN_FDS": str(len(fds)),
                    "LISTEN_FDNAMES": ":".join(fds),
                    "SEGUE_FDS": ",".join(map(str, fds.values())),
                }
                | (environ or {}),
            )
        for fd in (memory, out, fds[FdName.STDOUT], fds[FdName.STDERR]):
            os.close(fd)
        worker = Worker(process, control, output, self)
        self.workers.append(worker)
        return worker

    def read_messages(self, timeout_s: float) -> bool:
        """Hand messages to the workers that have sent them."""
        if not select.select([self.notify.fileno()], [], [], timeout_s)[0]:
            return False
        for message in self.notify.receive():
            for worker in self.workers:
                if worker.pid == message.pid:
                    worker.messages.append(message.fields)
        return True

    def client(self, address: str = "") -> Client:
        client = Client(address or self.info.address)
        self._clients.append(client)
        return client


class Client:
    """One connection, and whether it is still the same."""

    def __init__(self, address: str) -> None:
        if address.startswith("unix:"):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(WAIT_S)
            self.sock.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            self.sock = socket.create_connection((host.strip("[]"), int(port)), timeout=WAIT_S)
        self.file = self.sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, path: str = "/", body: bytes | None = None) -> Answer:
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: test\r\n"
        if body is not None:
            head += f"Content-Length: {len(body)}\r\n"
        self.send(head.encode() + b"\r\n" + (body or b""))
        return self.read()

    def read(self) -> Answer:
        """The next answer."""
        status = self.file.readline()
        if not status:
            raise AssertionError("the connection was closed")
        headers: dict[str, str] = {}
        while (line := self.file.readline().strip()) != b"":
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.file.readline(), 16):
                body += self.file.read(size)
                self.file.readline()
            self.file.readline()
        else:
            body = self.file.read(int(headers.get("content-length", 0)))
        return Answer(int(status.split()[1]), headers, body)

    def is_closed(self, within_s: float = WAIT_S) -> bool:
        """Whether the server closes it in that time; nothing else may come."""
        if not select.select([self.sock], [], [], within_s)[0]:
            return False
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.file.close()
        self.sock.close()


class Answer(msgspec.Struct, frozen=True):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

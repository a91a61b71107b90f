"""A real mosquitto, started and ended by whoever measures or tests."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

from bench.ports import free_port
from bench.servers import ServerError

START_TIMEOUT_S = 60.0
_COMMON = ("set_tcp_nodelay true", "max_queued_messages 0")
"""No message is dropped by the broker itself, which by default keeps 1000 for a subscriber that is away or slow."""
_UNLESS_SAID = ("allow_anonymous true", "user root")


class Broker:
    """One broker on a port of its own, in a directory of its own. Settings are lines of mosquitto.conf."""

    def __init__(self, directory: Path, *settings: str, port: int | None = None) -> None:
        self.directory = directory
        self.port = port or free_port()
        self.settings = list(settings)
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.directory / "mosquitto.log"

    def start(self) -> Broker:
        """Start it, and wait until it listens."""
        executable = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        if not Path(executable).exists():
            raise ServerError("mosquitto isn't installed (Debian: apt-get install mosquitto)")
        given = {line.partition(" ")[0] for line in self.settings}
        lines = [f"listener {self.port} 127.0.0.1", *_COMMON]
        lines += [line for line in _UNLESS_SAID if line.partition(" ")[0] not in given]
        (self.directory / "mosquitto.conf").write_text("\n".join([*lines, *self.settings, ""]))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [executable, "-v", "-c", str(self.directory / "mosquitto.conf")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise ServerError(f"mosquitto did not start:\n{self.log.read_text()}") from None
                time.sleep(0.01)
            else:
                return self

    def kill(self) -> None:
        """End it without warning."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def reload(self) -> None:
        """Have it read its passwords and access rights again."""
        assert self.process is not None
        self.process.send_signal(1)

    def __enter__(self) -> Broker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

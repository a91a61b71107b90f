"""MQTT beside the requests: facts at a steady rate, and the broker that is restarted under them.

QoS 1 means at least once: none may be lost, and one that came twice must be known by its message_id. The broker is
ended as its service manager does it, so that what it has taken it keeps.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.broker import Broker
from bench.users import ROOT

RATE = 40
_SETTLE_S = 60.0
_PERSISTENT = ("persistence true", "autosave_on_changes true", "autosave_interval 1")


class Messages:
    """A broker, a publisher, and what the instance has written down."""

    def __init__(self, directory: Path) -> None:
        place = directory / "broker"
        self.received = directory / "received"
        self.received.touch()
        self.broker = Broker(place, *_PERSISTENT, f"persistence_location {place}/").start()
        self._publisher: subprocess.Popen[str] | None = None

    def settings(self) -> str:
        """For the instance."""
        return f'[services.hsp]\nhost = "127.0.0.1"\nport = {self.broker.port}\nai_id = "chaos"\nqos = 1\n'

    def publish(self) -> None:
        """From now on."""
        self._publisher = subprocess.Popen(
            [sys.executable, "-m", "bench.hsp_publisher", str(self.broker.port), str(RATE), "1"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._publisher.stdout is not None
        self._publisher.stdout.readline()

    def restart_broker(self, away_s: float) -> None:
        """End it, and start it again after a while."""
        process = self.broker.process
        assert process is not None
        process.terminate()
        process.wait(20)
        time.sleep(away_s)
        self.broker.start()

    def finish(self) -> tuple[int, int, int]:
        """End the publisher; how many were sent, how many of them were lost, and how many came more than once."""
        process = self._publisher
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        sent = json.loads(process.stdout.readline())["sent"]
        process.wait(30)
        wanted = {(topic, number) for topic, count in enumerate(sent) for number in range(count)}
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline and wanted - self._got().keys():
            time.sleep(0.1)
        got = self._got()
        return len(wanted), len(wanted - got.keys()), sum(count > 1 for count in got.values())

    def _got(self) -> collections.Counter[tuple[int, int]]:
        """By topic and number, which are what the message_id is made of."""
        lines = self.received.read_text().splitlines()
        return collections.Counter((int(topic), int(number)) for topic, number in map(str.split, lines))

    def close(self) -> None:
        """End both."""
        if self._publisher is not None and self._publisher.poll() is None:
            self._publisher.kill()
            self._publisher.wait()
        self.broker.kill()

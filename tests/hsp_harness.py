"""What tests of HSP are written in: a real mosquitto, connectors as services, a steady publisher and its tally."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from scenario import ROOT, Segue, supervised

import segue
from bench.broker import Broker
from segue.worker.backend.hsp.connector import HSPConnector
from segue.worker.backend.hsp.continuity import Handler
from segue.worker.backend.hsp.envelope import FACT, Envelope
from segue.worker.backend.hsp.settings import HSPSettings

DEADLINE_S = 60
FACTS = "hsp/knowledge/facts/bench"
MARKS = [pytest.mark.anyio, pytest.mark.usefixtures("own_state")]
"""Of tests that have connectors in their own process."""


def settings(broker: Broker | None, **more: Any) -> HSPSettings:
    """Of a test: known names, and impatient."""
    where: dict[str, Any] = {"host": "127.0.0.1", "port": broker.port} if broker is not None else {}
    quick = {"reconnect_first_s": 0.05, "reconnect_cap_s": 0.2}
    # the machine that runs the tests may be busy with others
    patient = {"connect_timeout_s": 20.0, "barrier_timeout_s": 50.0, "drain_timeout_s": 20.0}
    return HSPSettings(**({"ai_id": "alpha"} | where | quick | patient | more))


class Agent:
    """A service `hsp` under its registry, as in a worker that is the only one."""

    def __init__(self, wanted: HSPSettings, facts: Handler | None) -> None:
        self._facts = facts
        self.wanted = wanted
        """Settings of the next instance."""
        self.services = segue.Services()
        self.service = self.services.declare(
            "hsp",
            self._make,
            per="generation",
            activate_timeout=60,
            deactivate_timeout=60,
            close_timeout=60,
        )

    def _make(self, previous: HSPConnector | None) -> HSPConnector:
        connector = HSPConnector(self.wanted, previous)
        if previous is None and self._facts is not None:
            connector.on(FACT, self._facts)  # before the first one comes
        return connector

    @property
    def current(self) -> HSPConnector:
        return self.service.current

    async def swap(self, wanted: HSPSettings | None = None) -> dict[str, Any]:
        """Raises `segue.SwapRefusedError`; the next swap then is with the settings before."""
        before, self.wanted = self.wanted, wanted or self.wanted
        try:
            return await self.services.reload("hsp")
        except BaseException:
            self.wanted = before
            raise

    async def swap_whole(self, wanted: HSPSettings | None = None) -> dict[str, Any]:
        """`swap`, and wait for what its answer waits for a second only: the new one has taken over, the old one is closed."""
        report = await self.swap(wanted)
        assert self.services.running is not None
        unit = self.services.running[0].units["hsp"]
        await until(lambda: not unit.retiring)
        return report


@contextlib.asynccontextmanager
async def agent(wanted: HSPSettings, facts: Handler | None = None) -> AsyncIterator[Agent]:
    """Its handler of `facts` is there before the first one comes."""
    found = Agent(wanted, facts)
    async with found.services:
        yield found


async def until(condition: Callable[[], Any]) -> None:
    """For what no event tells."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


@dataclass
class Tally:
    """What a handler was given of numbered facts."""

    seen: dict[int, list[int]] = field(default_factory=dict)
    pause_every: int = 0
    """Be slow for a moment each so many messages, so that there is a backlog."""
    count: int = 0

    async def __call__(self, message: Envelope) -> None:
        if "number" in message.payload:
            self.seen.setdefault(message.payload["topic"], []).append(message.payload["number"])
            self.count += 1
            if self.pause_every and self.count % self.pause_every == 0:
                await asyncio.sleep(0.02)

    async def reach(self, count: int) -> None:
        await until(lambda: self.count >= count)

    async def more(self) -> None:
        """Wait for one."""
        await self.reach(self.count + 1)

    async def has(self, number: int, topic: int = 0) -> None:
        """Wait until `number` came."""
        await until(lambda: number in self.seen.get(topic, ()))

    def verdict(self, sent: list[int]) -> dict[str, int]:
        """Against what was sent: all zero if all is well."""
        lost = doubled = reordered = 0
        for topic, count in enumerate(sent):
            got = self.seen.get(topic, [])
            lost += len(set(range(count)) - set(got))
            doubled += len(got) - len(set(got))
            first = list(dict.fromkeys(got))
            reordered += sum(later < earlier for earlier, later in itertools.pairwise(first))
        return {"lost": lost, "doubled": doubled, "reordered": reordered}


NOTHING = {"lost": 0, "doubled": 0, "reordered": 0}


@dataclass
class Published:
    """By the publisher, once it has ended."""

    sent: list[int] = field(default_factory=list)


@contextlib.contextmanager
def publisher(
    broker: Broker, rate: int, qos: int = 1, user: str = "", password: str = "", ca: str = ""
) -> Iterator[Published]:
    """Facts at a steady rate from a process of its own, for the length of a block."""
    command = [sys.executable, "-m", "bench.hsp_publisher", str(broker.port), str(rate), str(qos)]
    command += [user, password, ca]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdin is not None
    assert process.stdout is not None
    published = Published()
    try:
        assert process.stdout.readline() == "ready\n"
        yield published
        process.stdin.close()
        published.sent = json.loads(process.stdout.readline())["sent"]
        process.wait(DEADLINE_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stdin.close()


@contextlib.contextmanager
def broker(directory: Path, *lines: str) -> Iterator[Broker]:
    with Broker(directory / "broker", *lines) as running:
        yield running


PERSISTENT = ("persistence true", "autosave_on_changes true", "autosave_interval 1")
"""mosquitto writes all of it down after each change, before it reads on."""


def persistent(directory: Path) -> Broker:
    """A broker that still has its sessions after it was killed; it isn't started."""
    return Broker(directory, *PERSISTENT, f"persistence_location {directory}/")


class Proxy:
    """Between connectors and a broker: slow, silent or broken when a test wants it to be."""

    def __init__(self, server: Broker, latency: Callable[[], float] = lambda: 0.0, port: int = 0) -> None:
        self.port = port
        self.accepted = 0
        """How many connections there were."""
        self._server = server
        self._latency = latency
        self._answering = asyncio.Event()
        self._answering.set()
        self._open: set[asyncio.StreamWriter] = set()
        self._relaying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self._listening = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._listening.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listening.close()
        self.reset()
        for each in set(self._relaying):
            each.cancel()
            await asyncio.wait({each})

    async def another(self) -> None:
        """Wait for one more."""
        accepted = self.accepted
        await until(lambda: self.accepted > accepted)

    def silence(self) -> None:
        """On connections from here on nothing comes back from the broker."""
        self._answering = asyncio.Event()

    def speak(self) -> None:
        """What was held back comes, and what follows."""
        self._answering.set()

    def reset(self) -> None:
        """Break all connections, without a good-bye, on both sides."""
        for each in list(self._open):
            sock = each.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        answering = self._answering
        there, back = await asyncio.open_connection("127.0.0.1", self._server.port)
        for relay in (self._relay(reader, back, None), self._relay(there, writer, answering)):
            task = asyncio.create_task(relay)
            self._relaying.add(task)
            task.add_done_callback(self._relaying.discard)

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event | None
    ) -> None:
        self._open.add(writer)
        # uvloop has a RuntimeError for what was closed meanwhile
        with contextlib.suppress(OSError, RuntimeError):
            while data := await reader.read(2**16):
                await asyncio.sleep(self._latency())
                if gate is not None:
                    await gate.wait()
                writer.write(data)
                await writer.drain()
        self._open.discard(writer)
        with contextlib.suppress(OSError, RuntimeError):
            writer.close()


def fact(number: int, sender: str = "beta", **more: Any) -> bytes:
    """A valid message of another agent."""
    document = {
        "hsp_envelope_version": "0.1",
        "message_id": f"{sender}-{number}",
        "sender_ai_id": sender,
        "recipient_ai_id": "all",
        "timestamp_sent": "2026-01-01T00:00:00Z",
        "message_type": FACT,
        "protocol_version": "0.1",
        "communication_pattern": "publish",
        "payload": {"topic": 0, "number": number},
    }
    return json.dumps(document | more).encode()


async def publish(broker: Broker, *messages: tuple[str, bytes], retain: bool = False, qos: int = 1) -> None:
    async with aiomqtt.Client("127.0.0.1", broker.port) as client:
        for topic, payload in messages:
            await client.publish(topic, payload, qos, retain)


async def heard(broker: Broker, topic: str, do: Callable[[], Awaitable[Any]]) -> Any:
    """The next message on a topic, after `do`."""
    async with aiomqtt.Client("127.0.0.1", broker.port) as client, asyncio.timeout(DEADLINE_S):
        await client.subscribe(topic, 1)
        await do()
        return json.loads(bytes((await anext(aiter(client.messages))).payload))


def dynamic_security(path: Path) -> list[str]:
    """Settings of a broker that refuses to subscribe `ann` to anything below ``secret``."""
    salt = b"twelve bytes"
    hashed = hashlib.pbkdf2_hmac("sha512", b"right", salt, 101)
    rights = [("publishClientSend", "#", True), ("publishClientReceive", "#", True)]
    rights += [("subscribePattern", "#", True), ("unsubscribePattern", "#", True)]
    acls = [{"acltype": kind, "topic": topic, "allow": allow} for kind, topic, allow in rights]
    denied = {"acltype": "subscribePattern", "topic": "secret/#", "allow": False, "priority": 10}
    document = {
        "clients": [
            {
                "username": "ann",
                "password": base64.b64encode(hashed).decode(),
                "salt": base64.b64encode(salt).decode(),
                "iterations": 101,
                "roles": [{"rolename": "agent"}],
            }
        ],
        "roles": [{"rolename": "agent", "acls": [denied, *acls]}],
        "defaultACLAccess": {
            "publishClientSend": False,
            "publishClientReceive": False,
            "subscribe": False,
            "unsubscribe": True,
        },
    }
    path.write_text(json.dumps(document))
    plugin = next(Path("/usr/lib").rglob("mosquitto_dynamic_security.so"))
    return [f"plugin {plugin}", f"plugin_opt_config_file {path}", "allow_anonymous false"]


SOME = ("tasks", "capabilities", "acknowledgements", "_swap")
"""What an agent needs beside facts."""


def rights(path: Path) -> str:
    """An access control list: `ann` may do anything but read secrets, `mute` knows no facts, `deaf` may only tell some."""
    some = "\n".join(f"topic readwrite hsp/{each}/#" for each in SOME)
    path.write_text(
        f"user ann\n{some}\ntopic readwrite hsp/knowledge/#\ntopic write hsp/secret/#\n\n"
        f"user mute\n{some}\n\nuser deaf\n{some}\ntopic write hsp/knowledge/#\n"
    )
    path.chmod(0o600)
    return f"acl_file {path}"


# -------------------------------------------------------------------------------------------- behind a real master

SLOW_APP = """
import asyncio

import hsp_app

write_down = hsp_app._write_down


async def slowly(message):
    await asyncio.sleep(0.01)
    write_down(message)


hsp_app._write_down = slowly
app = hsp_app.app
"""
TASKS_APP = """
import asyncio
import os
from pathlib import Path

import hsp_app
import segue
from segue.worker.backend.hsp.connector import HSPConnector
from segue.worker.backend.hsp.envelope import FACT
from segue.worker.backend.hsp.settings import HSPSettings

HERE = Path(__file__).parent
services = segue.Services()


async def square(parameters):
    number = parameters["number"]
    with (HERE / "begun").open("a") as file:
        file.write(f"{os.getpid()} {number}\\n")
    while not (HERE / f"go-{number}").exists():
        await asyncio.sleep(0.02)
    return {"square": number**2}


def make(settings: HSPSettings, previous: HSPConnector | None = None) -> HSPConnector:
    connector = HSPConnector(settings, previous)
    if previous is None:
        connector.on(FACT, hsp_app._write_down)
        connector.serve("square", square)
    return connector


services.declare("hsp", make, settings=HSPSettings, per="generation")
app = services.wrap(hsp_app.serve)
"""
"""Tasks that last until a file says that they may end."""
PATIENT_APP = """
import hsp_app
import segue
from segue.worker.backend.hsp import recruiting
from segue.worker.backend.hsp.settings import HSPSettings

recruiting._ANSWER_S, recruiting._LIMIT_S = 20.0, 30.0
services = segue.Services()
services.declare(
    "hsp",
    hsp_app._make,
    settings=HSPSettings,
    per="generation",
    deactivate_timeout=60,
    handover_timeout=60,
)
app = services.wrap(hsp_app.serve)
"""
"""One in which whoever leaves lines up who stands by, however slow the machine is: nobody dies in it."""


def configure(directory: Path, server: Broker, **more: Any) -> None:
    patient = {"connect_timeout_s": 20.0, "barrier_timeout_s": 20.0, "drain_timeout_s": 8.0}
    wanted = {"host": "127.0.0.1", "port": server.port, "ai_id": "alpha"} | patient | more
    lines = [f"{key} = {json.dumps(value)}" for key, value in wanted.items()]
    (directory / "segue.toml").write_text("\n".join(["[services.hsp]", *lines, ""]))


@contextlib.contextmanager
def serving(
    directory: Path,
    server: Broker,
    workers: int = 1,
    app: str = "hsp_app:app",
    prefix: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    **more: Any,
) -> Iterator[Segue]:
    directory.mkdir()
    shutil.copy(ROOT / "bench" / "hsp_app.py", directory / "hsp_app.py")
    (directory / "slow_app.py").write_text(SLOW_APP)
    (directory / "tasks_app.py").write_text(TASKS_APP)
    (directory / "patient_app.py").write_text(PATIENT_APP)
    configure(directory, server, **more)
    env = {"XDG_STATE_HOME": str(directory / "state"), "HOME": str(directory)}
    command = (app, "--workers", str(workers), *options)
    with supervised(*command, cwd=directory, env=env, prefix=prefix) as master:
        master.wait_status(connected)
        yield master
        master.stop(None)


def connected(document: dict[str, Any]) -> bool:
    return document["hsp"]["is_connected"] is True


def received(directory: Path) -> Tally:
    tally = Tally()
    path = directory / "received"
    for line in path.read_text().splitlines() if path.exists() else []:
        topic, number = map(int, line.split()[:2])
        tally.seen.setdefault(topic, []).append(number)
        tally.count += 1
    return tally


def wait_received(directory: Path, count: int) -> Tally:
    """A file tells nobody that it has grown."""
    deadline = time.monotonic() + DEADLINE_S
    while (tally := received(directory)).count < count and time.monotonic() < deadline:
        select.select([], [], [], 0.05)
    return tally

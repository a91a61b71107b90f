"""No test leaves a process behind, and every test has ports and directories of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from scenario import MADE, MARK, RESERVED, TOKEN

# however slow the machine is: what hangs is ended by pytest's timeout
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")

APP = """
import asyncio, hashlib, itertools, os
VERSION = "{version}"

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({{"type": "lifespan.startup.complete"}})
        await receive()
        await send({{"type": "lifespan.shutdown.complete"}})
        return
    if scope["type"] != "http":
        return
    headers = [(b"x-version", VERSION.encode()), (b"x-pid", str(os.getpid()).encode())]
    query = dict(pair.split("=") for pair in scope["query_string"].decode().split("&") if pair)
    if scope["path"] == "/sse":
        await send({{"type": "http.response.start", "status": 200, "headers": headers}})
        for number in itertools.count() if "until" in query else range(int(query.get("n", 20))):
            if os.path.exists(query.get("until", "")):
                break
            await send({{"type": "http.response.body", "body": b"data: %d\\n\\n" % number, "more_body": True}})
            await asyncio.sleep(float(query.get("ms", 100)) / 1000)
        await send({{"type": "http.response.body", "body": b"data: done\\n\\n"}})
        return
    body = VERSION.encode()
    if scope["path"] == "/echo":
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers.append((b"x-sha", hashlib.sha256(body).hexdigest().encode()))
    elif scope["path"] == "/work":
        await asyncio.sleep(float(query.get("ms", 5)) / 1000)
        while "until" in query and not os.path.exists(query["until"]):
            await asyncio.sleep(0.01)
    elif scope["path"] == "/exit":
        os._exit(7)
    elif scope["path"] == "/block":
        import time
        open(query["begun"], "w").close() if "begun" in query else None
        time.sleep(float(query["s"]))
    headers.append((b"content-length", str(len(body)).encode()))
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": body}})
"""


@pytest.fixture(scope="session", autouse=True)
def no_left_directories() -> Iterator[None]:
    """Remove the directories that tests made under short paths."""
    yield
    for directory in MADE:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_reserved_ports() -> Iterator[None]:
    """Give back the ports that the test had for itself."""
    yield
    while RESERVED:
        RESERVED.pop().close()


@pytest.fixture(autouse=True)
def no_leaked_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that leaves a process behind, and end that process."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    # tests change code twice in a second without changing its size, which a cached .pyc does not notice
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    yield
    leaked = []
    for pid, command in marked(mark):
        leaked.append(f"{pid}: {command}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not leaked, f"left behind: {leaked}"


def marked(mark: str) -> list[tuple[int, str]]:
    """Living processes, other than this one, whose environment carries `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(
                    (int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
                )
    return found


@pytest.fixture
def application(tmp_path: Path) -> Callable[..., Path]:
    """Write an application into a directory of its own, again with other code if asked to; returns the directory.

    With ``until=FILE``, ``/work`` and ``/sse`` end once there is such a file: what has to outlast something else.
    """
    directory = tmp_path / "code"

    def write(version: str = "1", prelude: str = "", code: str | None = None, module: str = "shop") -> Path:
        directory.mkdir(exist_ok=True)
        directory.chmod(0o755)
        text = textwrap.dedent(prelude) + (
            APP.format(version=version) if code is None else textwrap.dedent(code)
        )
        (directory / f"{module}.py").write_text(text)
        return directory

    tmp_path.chmod(0o755)
    return write


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file with `TOKEN`, as ``--token-file`` wants it."""
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """The loop on which workers run."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What services of this process keep is the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

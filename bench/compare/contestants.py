"""The servers that are compared: how each is started and told to reload, to its advantage where its docs say so."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.ports import free_port
from bench.servers import Bench, Server, running
from bench.users import ROOT, own

THEIRS = ROOT / ".compare" / "bin" / "python"
"""The interpreter of the environment in which the others are installed."""
KEEP_ALIVE_S = "75"
_VERSIONS = """
import importlib.metadata, json, platform, sys
names = sys.argv[1:]
found = {}
for name in names:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found | {"python": platform.python_version()}))
"""


@dataclass(frozen=True)
class Contestant:
    """One server in one configuration."""

    key: str
    name: str
    distribution: str
    """Whose version is told."""
    arguments: Callable[[int, int, Path], list[str]]
    """Of port, number of workers and a directory of its own: the command behind the interpreter."""
    note: str
    """What was set beside the defaults, and why."""
    ours: bool = False
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def interpreter(self) -> str:
        """That of its environment."""
        return sys.executable if self.ours else str(THEIRS)

    def command(self, workers: int) -> str:
        """For the page: as one would type it."""
        words = self.arguments(8000, workers, Path("DIR"))
        return " ".join(["python", *words]).replace("python -m segue.supervisor.cli", "segue")


def _segue(port: int, workers: int, place: Path) -> list[str]:
    return [
        *("-m", "segue.supervisor.cli", "serve", "app:app", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", str(workers), "--loop", "uvloop", "--http", "httptools", "--no-access-log"),
        *("--runtime-dir", str(place), "--name", "compare"),
    ]


def _uvicorn(port: int, workers: int, _: Path) -> list[str]:
    return [
        *("-m", "uvicorn", "app:app", "--host", "127.0.0.1", "--port", str(port), "--workers", str(workers)),
        *("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--timeout-keep-alive", KEEP_ALIVE_S),
    ]


def _gunicorn(port: int, workers: int, _: Path) -> list[str]:
    return [
        *("-m", "gunicorn", "app:app", "-b", f"127.0.0.1:{port}", "-w", str(workers), "-k", "asgi"),
        *("--keep-alive", KEEP_ALIVE_S),
    ]


def _gunicorn_uvicorn(port: int, workers: int, _: Path) -> list[str]:
    return [
        *("-m", "gunicorn", "app:app", "-b", f"127.0.0.1:{port}", "-w", str(workers)),
        *("-k", "uvicorn_worker.UvicornWorker", "--keep-alive", KEEP_ALIVE_S),
    ]


def _granian(port: int, workers: int, _: Path) -> list[str]:
    return [
        *("-m", "granian", "app:app", "--interface", "asgi", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", str(workers), "--loop", "uvloop", "--respawn-failed-workers"),
    ]


def _hypercorn(port: int, workers: int, _: Path) -> list[str]:
    return [
        *("-m", "hypercorn", "app:app", "-b", f"127.0.0.1:{port}", "-w", str(workers), "-k", "uvloop"),
        *("--keep-alive", KEEP_ALIVE_S),
    ]


CONTESTANTS = (
    Contestant("segue", "segue", "segue", _segue, "uvloop and httptools named, as for uvicorn", ours=True),
    Contestant(
        "uvicorn",
        "uvicorn",
        "uvicorn",
        _uvicorn,
        "keep-alive of 75 s; its signal to reload, HUP, is for more than one worker",
    ),
    Contestant(
        "gunicorn", "gunicorn -k asgi", "gunicorn", _gunicorn, "its own ASGI worker; keep-alive of 75 s"
    ),
    Contestant(
        "gunicorn-uvicorn",
        "gunicorn, uvicorn-worker",
        "gunicorn",
        _gunicorn_uvicorn,
        "uvicorn's worker class, from the package uvicorn-worker; keep-alive of 75 s",
    ),
    Contestant(
        "granian",
        "granian",
        "granian",
        _granian,
        "--respawn-failed-workers, without which it ends when one of its workers does",
    ),
    Contestant("hypercorn", "hypercorn", "hypercorn", _hypercorn, "uvloop; keep-alive of 75 s"),
)


class Code:
    """The code that is deployed to one server."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.version = 0

    def deploy(self, *, start_s: float = 0.0, how: str = "", broken_import: bool = False) -> int:
        """Write the next version in one step; `how` is ``fails=True`` or ``hangs=True``. Returns its number."""
        self.version += 1
        more = f", {how}" if how else ""
        text = "import nosuchmodule\n" if broken_import else ""
        text += (
            f"from bench.compare.app import make\n\napp = make({self.version}, start_s={start_s!r}{more})\n"
        )
        new = self.directory / "app.py.new"
        new.write_text(text)
        new.replace(self.directory / "app.py")
        return self.version

    def broker(self, down: bool) -> None:
        """What every start needs, and no code can help."""
        path = self.directory / "broker-down"
        path.touch() if down else path.unlink(missing_ok=True)


@dataclass
class Running(Server):
    """A contestant while it runs."""

    contestant: Contestant = field(kw_only=True)
    code: Code = field(kw_only=True)

    def reload(self) -> None:
        """All of them take HUP."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGHUP)

    @property
    def ended(self) -> int | None:
        """The master's exit status."""
        return self.process.poll()


@contextlib.contextmanager
def serving(bench: Bench, contestant: Contestant, workers: int, start_s: float = 0.0) -> Iterator[Running]:
    """Run a contestant with its first version for the length of a block."""
    place = Path(tempfile.mkdtemp(prefix="c-", dir=bench.directory))
    code = Code(place / "code")
    code.deploy(start_s=start_s)
    port = free_port()
    command = [contestant.interpreter, *contestant.arguments(port, workers, place / "run")]
    (place / "run").mkdir(mode=0o700)
    # other code in the same second, of the same size, must not be taken for what was compiled before
    environ = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": f"{code.directory}:{ROOT}", **contestant.environ}

    def server(*launched: Any) -> Running:
        return Running(port, *launched, contestant=contestant, code=code)

    ending = signal.SIGQUIT if contestant.ours else signal.SIGTERM
    with running(bench, own(), command, environ, ending, server, code.directory) as found:
        found.first_answer()
        yield found


def versions() -> dict[str, Any]:
    """Of everything that takes part."""
    names = [
        "gunicorn",
        "uvicorn",
        "uvicorn-worker",
        "granian",
        "hypercorn",
        "uvloop",
        "httptools",
        "matplotlib",
    ]
    told: dict[str, Any] = {}
    for interpreter, wanted in ((str(THEIRS), names), (sys.executable, ["segue"])):
        if not Path(interpreter).exists():
            continue
        said = subprocess.run(
            [interpreter, "-c", _VERSIONS, *wanted], check=True, capture_output=True, text=True
        ).stdout
        told |= json.loads(said)
    return told


def choose(keys: Sequence[str]) -> list[Contestant]:
    """Those that are meant; all, if none is named."""
    return [contestant for contestant in CONTESTANTS if not keys or contestant.key in keys]


def rotated(contestants: Sequence[Contestant], by: int) -> list[Contestant]:
    """In another order each time, so that no one is always the first."""
    by %= len(contestants)
    return [*contestants[by:], *contestants[:by]]

"""The application that is tormented, in releases as an operator has them: a directory each, and `current` leads to one.

At times a release is edited in place instead, as people do who know no better: a generation that loses a worker then runs short.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

PROBATION_S = 2
LONG_PROBATION_S = 60
"""Of what is bad on purpose: it ends when that is found out, however slow the machine is."""
_IN_PLACE = 0.25
"""How often code is edited in place."""
_APPLICATION = """
{prelude}
import os
import random
import time
import segue
from bench.app import answer, app as _app, read
from segue.worker.backend.hsp.connector import HSPConnector
from segue.worker.backend.hsp.envelope import FACT
from segue.worker.backend.hsp.settings import HSPSettings

VERSION = {version}
_received = os.open(os.environ["CHAOS_RECEIVED"], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
_spoiled = os.open(os.environ["CHAOS_SPOILED"], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
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

async def _spoil(scope, receive, send):
    await read(receive)
    os.write(_spoiled, b"%d %f\\n" % (scope["client"][1], time.monotonic()))
    await answer(send, b"spoiled", status=500)

async def serve(scope, receive, send):
    {lifespan}
    if scope["type"] == "http" and scope["path"] == "/warm":
        {warm}
    elif scope["type"] == "http" and scope["client"]:
        {answers}
    await _app(scope, receive, send)

app = _services.wrap(serve)
"""


def spoiled(share: float) -> str:
    """Answers of code that starts and is bad: so many are 500. Each is written down, so that only these are forgiven."""
    return f"if random.random() < {share}: await _spoil(scope, receive, send); return"


class Place(NamedTuple):
    """What lies on the disk."""

    release: Path
    text: str
    settings: str


class Code:
    """On the disk: the last version that was written, and the last good one."""

    def __init__(self, directory: Path, settings: str, rng: random.Random) -> None:
        self.current = directory / "current"
        """A link. Also the instance's working directory."""
        self._releases = directory / "releases"
        self._settings = settings
        self._rng = rng
        self._version = 0
        self._releases.mkdir(parents=True)
        self.write(in_place=False)

    def write(
        self,
        prelude: str = "",
        lifespan: str = "pass",
        warm: str = "pass",
        answers: str = "pass",
        settings: str = "",
        *,
        probation_s: float = PROBATION_S,
        in_place: bool | None = None,
    ) -> None:
        """Another version of the application, broken if it is told how; `settings` are lines for the settings file."""
        self._version += 1
        text = _APPLICATION.format(
            prelude=prelude, version=self._version, lifespan=lifespan, warm=warm, answers=answers
        )
        if in_place is None:
            in_place = self._rng.random() < _IN_PLACE
        release = self.current.resolve() if in_place else self._releases / str(self._version)
        self.put(Place(release, text, f"{settings}\nprobation = {probation_s}\n{self._settings}"))
        as_usual = (prelude, lifespan, warm, answers, settings, probation_s)
        if as_usual == ("", "pass", "pass", "pass", "", PROBATION_S):
            self._good = self.place

    def mend(self) -> None:
        """The last version that was not broken."""
        self.put(self._good)

    def break_link(self) -> None:
        """Let `current` lead to nothing."""
        self._lead_to(self._releases / "none")

    def put_back(self, place: Place) -> None:
        """What lay there before, which is good."""
        self._good = place
        self.put(place)

    @property
    def place(self) -> Place:
        """What lies there now."""
        release = self.current.resolve()
        return Place(release, (release / "shop.py").read_text(), (release / "segue.toml").read_text())

    def put(self, place: Place) -> None:
        """Each file, and the link, in one step."""
        place.release.mkdir(exist_ok=True)
        for name, text in (("shop.py", place.text), ("segue.toml", place.settings)):
            path = place.release / name
            path.with_suffix(".new").write_text(text)
            path.with_suffix(".new").replace(path)
        self._lead_to(place.release)

    def _lead_to(self, release: Path) -> None:
        link = self.current.with_name("next")
        link.symlink_to(release)
        link.replace(self.current)

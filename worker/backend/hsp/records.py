"""What is written down about an agent for the next process: which messages were handled, what was not finished, what was
not sent, where it was.

The agent of a service may become another one from one generation to the next: another broker, prefix or name. Then there is
no session to resume, and what the one that leaves has handled the other one may be given as well. So each says when it
began to listen and when it left off, and who comes after another one knows what that one knew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from pathlib import Path

import msgspec

from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.spool import Spool
from segue.worker.backend.places import state_directory

_log = logging.getLogger("segue.hsp")

_NOWHERE = Path("/dev/null/hsp")
_KEPT = 8
"""Of how many agents it is remembered when they listened."""
_here: Counter[str] = Counter()
"""The agents of this process: of those none comes after another."""


class _Term(msgspec.Struct):
    """For how long an agent has listened, in seconds since the epoch."""

    began: float
    ended: float | None = None
    """None: it listens, or it was killed."""


class Records:
    """Of one agent at one broker, in the hands of one connector, `instance`."""

    def __init__(self, settings: HSPSettings, instance: str) -> None:
        self._instance = instance
        name = "\0".join((settings.broker, settings.topic_prefix, settings.identity))
        self._digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        _here[self._digest] += 1

    def close(self) -> None:
        """The connector doesn't speak for the agent any more."""
        _here[self._digest] -= 1

    @property
    def window(self) -> Path:
        """Which messages were handled: `seen.Seen`."""
        return _directory() / f"{self._digest}.seen"

    @property
    def spool(self) -> Spool:
        """What was not sent."""
        return Spool(self.window.with_suffix(""), self._instance)

    @property
    def begun(self) -> Path:
        """What was begun and not finished: `begun.Begun`."""
        return self.window.with_suffix("")

    def begin(self) -> Path | None:
        """It listens from here on. If it comes after another agent of this service: that one's window."""
        terms = self._terms()
        own = terms.get(self._digest)
        since = (own.ended or own.began) if own is not None else 0.0
        before = [
            (term.ended or time.time(), digest)
            for digest, term in terms.items()
            if digest != self._digest and not _here[digest] and term.began >= since
        ]
        terms[self._digest] = _Term(time.time())
        self._write(terms)
        return _directory() / f"{max(before)[1]}.seen" if before else None

    def end(self) -> None:
        """It has left off."""
        terms = self._terms()
        if (own := terms.get(self._digest)) is not None:
            own.ended = time.time()
            self._write(terms)

    def _terms(self) -> dict[str, _Term]:
        try:
            return msgspec.json.decode((_directory() / "terms").read_bytes(), type=dict[str, _Term])
        except (OSError, msgspec.MsgspecError):
            return {}

    def _write(self, terms: dict[str, _Term]) -> None:
        latest = dict(sorted(terms.items(), key=lambda each: each[1].began)[-_KEPT:])
        path = _directory() / f"terms.{self._instance}"
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb"
            ) as file:
                file.write(msgspec.json.encode(latest))
            path.rename(path.with_name("terms"))
        except OSError as error:
            _log.warning("event=hsp-term-not-kept reason=%s", error)


def _directory() -> Path:
    try:
        return state_directory() / "hsp"
    except OSError as error:
        _log.warning("event=hsp-records-not-kept reason=%s", error)
        return _NOWHERE

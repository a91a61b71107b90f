"""LIS, the immune system: notices what goes wrong repeatedly, and learns a rule from it that keeps it from recurring.

An **incident** is an empty answer, an answer that says the same 40 characters five times over, or a tool or provider
failing 3 times in 60 s. An **antibody** is the rule learnt from one: for failures a breaker, which keeps callers away
from that source and lets one try again after a while; for answers other sampling. It counts once it has kept an incident
from recurring: a caller was kept away, or an answer with its sampling was good. Recent is what was within an hour.

Everything is in this process's memory, and goes on over a swap of the service.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from segue.worker.backend.conversation import Sampling

_log = logging.getLogger("segue.backend")

Kind = Literal["empty_answer", "repetition", "failures"]

RECENT_S = 3600.0
REPEATED_CHARACTERS = 40
REPEATED_TIMES = 5

_MAX_SOURCES = 1000
_MAX_INCIDENTS = 10_000
_COOL_DOWN_CAP = 16
"""A breaker whose tries fail stays open longer each time, up to so many times the first."""
_TOOL = "tool:"
_LOOKED_AT = 20_000
_SAMPLING: dict[str, tuple[Sampling, ...]] = {
    "empty_answer": (Sampling(temperature=0.9), Sampling(temperature=1.0, top_p=1.0)),
    "repetition": (
        Sampling(temperature=0.9, frequency_penalty=0.5),
        Sampling(temperature=1.0, frequency_penalty=1.2),
    ),
}
"""What to try, the second where the first did not help."""

_Seconds = Annotated[float, msgspec.Meta(gt=0)]


class LISSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[services.lis]``."""

    failures: Annotated[int, msgspec.Meta(ge=1)] = 3
    """So many failures of one source are an incident…"""
    failures_within_s: _Seconds = 60.0
    """…if they come within this time."""
    cool_down_s: _Seconds = 30.0
    """How long a breaker keeps callers away before one may try."""


class Incident(msgspec.Struct, frozen=True):
    """Something that went wrong."""

    kind: str
    source: str
    detail: str
    at: float
    """Of the monotonic clock, in seconds."""


class Antibody(msgspec.Struct):
    """A rule that was learnt."""

    kind: str
    source: str
    learnt: float
    kept: float | None = None
    """When it last kept an incident from recurring."""
    strength: int = 0
    """Which of the samplings is tried."""


class _Breaker:
    """Open, then half open: one caller tries, and what it reports decides."""

    __slots__ = ("cool_down_s", "trying", "until")

    def __init__(self, until: float, cool_down_s: float) -> None:
        self.until = until
        self.cool_down_s = cool_down_s
        self.trying = False


class _Source:
    __slots__ = ("antibodies", "breaker", "failures")

    def __init__(self) -> None:
        self.failures: deque[float] = deque(maxlen=1000)
        self.breaker: _Breaker | None = None
        self.antibodies: dict[str, Antibody] = {}


class LIS:
    """Incidents and antibodies of this process. Sources are named ``llm:NAME`` and ``tool:NAME``."""

    def __init__(
        self,
        settings: LISSettings,
        previous: LIS | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._now = now
        self._incidents: deque[Incident] = previous._incidents if previous else deque(maxlen=_MAX_INCIDENTS)
        self._sources: OrderedDict[str, _Source] = previous._sources if previous else OrderedDict()

    # ------------------------------------------------------------------------------------------- what is told it

    def incident(self, kind: str, source: str, detail: str) -> None:
        """Something went wrong; a rule is learnt from what there are rules for."""
        now = self._now()
        self._incidents.append(Incident(kind, source, detail, now))
        _log.warning("event=incident kind=%s source=%s detail=%s", kind, source, " ".join(detail.split()))
        found = self._source(source)
        known = found.antibodies.get(kind)
        if kind in _SAMPLING:
            if known is not None and self._recent(known.learnt):
                known.strength = min(known.strength + 1, len(_SAMPLING[kind]) - 1)
                known.learnt = now
                return
            found.antibodies[kind] = Antibody(kind, source, now)
        elif kind == "failures":
            found.antibodies[kind] = Antibody(kind, source, now, known.kept if known else None)
            found.breaker = _Breaker(now + self.settings.cool_down_s, self.settings.cool_down_s)
            _log.warning("event=breaker-open source=%s seconds=%g", source, self.settings.cool_down_s)

    def failed(self, source: str, reason: str) -> None:
        """A tool or provider has failed; often enough, it is an incident and opens its breaker."""
        now, found = self._now(), self._source(source)
        found.failures.append(now)
        if found.breaker is not None:
            if found.breaker.trying:  # what began before it opened says nothing new
                found.breaker.trying = False
                found.breaker.cool_down_s = min(
                    found.breaker.cool_down_s * 2, self.settings.cool_down_s * _COOL_DOWN_CAP
                )
                found.breaker.until = now + found.breaker.cool_down_s
            return
        while found.failures and found.failures[0] <= now - self.settings.failures_within_s:
            found.failures.popleft()
        if len(found.failures) >= self.settings.failures:
            count = len(found.failures)
            found.failures.clear()
            self.incident(
                "failures",
                source,
                f"{count} failures within {self.settings.failures_within_s:g} s, last: {reason}",
            )

    def succeeded(self, source: str) -> None:
        """A tool or provider has done what it should: its breaker closes."""
        found = self._sources.get(source)
        if found is not None and found.breaker is not None:
            found.breaker = None
            found.failures.clear()
            _log.info("event=breaker-closed source=%s", source)

    def answered(self, source: str, text: str, *, advised: bool = False) -> bool:
        """A provider has answered to the end; whether the answer was good.

        `advised`: with the sampling of `advice`. Tools may answer as they like.
        """
        self.succeeded(source)
        if source.startswith(_TOOL):
            return True
        kind: Kind | None = None
        if not text.strip():
            kind = "empty_answer"
            self.incident(kind, source, "the answer was empty")
        elif again := repeated(text):
            kind = "repetition"
            self.incident(kind, source, f"it says {REPEATED_TIMES} times {again!r}")
        elif advised:
            for antibody in self._source(source).antibodies.values():
                if antibody.kind in _SAMPLING:
                    antibody.kept = self._now()
        return kind is None

    # ------------------------------------------------------------------------------------------- what it is asked

    def breaker_open(self, source: str) -> bool:
        """Whether to keep away from a source now. Ask before each call: after a while one caller is told False, to try."""
        found = self._sources.get(source)
        if found is None or found.breaker is None:
            return False
        now = self._now()
        if now < found.breaker.until:
            if antibody := found.antibodies.get("failures"):
                antibody.kept = now
            return True
        # one may try; should nothing be heard of it, another one may later
        found.breaker.trying = True
        found.breaker.until = now + found.breaker.cool_down_s
        return False

    def advice(self, source: str) -> Sampling | None:
        """Which sampling to use for a provider that has lately answered badly."""
        found = self._sources.get(source)
        if found is None:
            return None
        advice: Sampling | None = None
        for kind, antibody in found.antibodies.items():
            if kind in _SAMPLING and self._recent(antibody.learnt):
                advice = merged(_SAMPLING[kind][antibody.strength], advice)
        return advice

    def incidents(self) -> list[Incident]:
        """The recent ones, oldest first."""
        return [each for each in self._incidents if self._recent(each.at)]

    def antibodies(self) -> list[Antibody]:
        """Those that have recently kept an incident from recurring."""
        return [
            each
            for source in self._sources.values()
            for each in source.antibodies.values()
            if each.kept is not None and self._recent(each.kept)
        ]

    def metrics(self) -> dict[str, int]:
        """Of this process."""
        open_now = sum(source.breaker is not None for source in self._sources.values())
        return {
            "incidents_recent": len(self.incidents()),
            "antibodies_recent": len(self.antibodies()),
            "breakers_open": open_now,
        }

    def _recent(self, at: float) -> bool:
        return self._now() - at < RECENT_S

    def _source(self, name: str) -> _Source:
        found = self._sources.get(name)
        if found is None:
            found = self._sources[name] = _Source()
            if len(self._sources) > _MAX_SOURCES:
                self._sources.popitem(last=False)
        self._sources.move_to_end(name)
        return found


def merged(first: Sampling, second: Sampling | None) -> Sampling:
    """What `first` says, and where it says nothing, `second`."""
    if second is None:
        return first
    said = {key: getattr(first, key) for key in first.__struct_fields__}
    return msgspec.structs.replace(
        second, **{key: value for key, value in said.items() if value not in (None, (), {})}
    )


def repeated(text: str) -> str | None:
    """The first 40 characters that stand in `text` five times, without overlapping; None if there are none.

    Of a long text the end is looked at: a model that has begun to repeat itself doesn't find out of it.
    """
    text = text[-_LOOKED_AT:]
    last_ends: dict[str, tuple[int, int]] = {}
    for start in range(len(text) - REPEATED_CHARACTERS + 1):
        piece = text[start : start + REPEATED_CHARACTERS]
        count, end = last_ends.get(piece, (0, 0))
        if start >= end:
            if count + 1 == REPEATED_TIMES:
                return piece
            last_ends[piece] = (count + 1, start + REPEATED_CHARACTERS)
    return None

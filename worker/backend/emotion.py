"""`EmotionSystem`: what the service feels in each conversation, moved by what is said, fading to the profile's baseline."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated

import msgspec

from segue.worker.backend.personality import PersonalityManager, Profile


class EmotionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[services.emotion]``."""

    sensitivity: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.3
    """How far one utterance moves towards what it expresses: 0 not at all, 1 all the way."""
    max_sessions: Annotated[int, msgspec.Meta(ge=1)] = 10_000
    """The conversation that has been silent longest is forgotten first, and is at the baseline then."""


class Emotion(msgspec.Struct, frozen=True):
    """A feeling; both numbers in -1…1."""

    valence: float
    arousal: float


class _State(msgspec.Struct, frozen=True):
    valence: float
    arousal: float
    at: float


class EmotionSystem:
    """The feelings of this process. They go on over a swap, and with `recall` in another process."""

    def __init__(
        self,
        settings: EmotionSettings,
        personality: PersonalityManager,
        previous: EmotionSystem | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.personality = personality
        self._now = now
        self._states: OrderedDict[str, _State] = previous._states if previous else OrderedDict()

    def state(self, session: str) -> Emotion:
        """What is felt in a conversation at this moment."""
        profile = self.personality.profile
        found = self._states.get(session)
        if found is None:
            return Emotion(profile.valence, profile.arousal)
        return _faded(found, self._now(), profile)

    def felt(self, session: str, valence: float, arousal: float) -> Emotion:
        """Something was said that expresses this, each in -1…1; (0, 0) moves nothing. What is felt now."""
        before = self.state(session)
        if valence == 0 and arousal == 0:
            return before
        share = self.settings.sensitivity
        after = Emotion(
            before.valence + share * (_limited(valence) - before.valence),
            before.arousal + share * (_limited(arousal) - before.arousal),
        )
        self._keep(session, _State(after.valence, after.arousal, self._now()))
        return after

    def recall(self, session: str, emotion: Emotion, at: float) -> None:
        """What was felt at a time (seconds since the epoch), unless something newer is known here.

        The conversation may have gone on in another process.
        """
        found = self._states.get(session)
        at = min(at, self._now())
        if found is None or found.at < at:
            self._keep(session, _State(_limited(emotion.valence), _limited(emotion.arousal), at))

    def metrics(self) -> dict[str, int]:
        """Of this process."""
        return {"sessions": len(self._states)}

    def _keep(self, session: str, state: _State) -> None:
        self._states[session] = state
        self._states.move_to_end(session)
        while len(self._states) > self.settings.max_sessions:
            self._states.popitem(last=False)


def _faded(state: _State, now: float, profile: Profile) -> Emotion:
    left = 0.5 ** (max(0.0, now - state.at) / profile.half_life_s)
    return Emotion(
        _limited(profile.valence + (state.valence - profile.valence) * left),
        _limited(profile.arousal + (state.arousal - profile.arousal) * left),
    )


def _limited(value: float) -> float:
    return max(-1.0, min(1.0, value))

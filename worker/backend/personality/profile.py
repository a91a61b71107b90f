"""One profile, and the file that it is read from."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from segue.worker.backend.conversation import Sampling

MAX_BYTES = 256 * 1024

_Signed = Annotated[float, msgspec.Meta(ge=-1, le=1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class ProfileError(ValueError):
    """A profile can't be used; the message names file and key."""


class Profile(msgspec.Struct, frozen=True):
    """A personality."""

    name: str
    prompt: str
    """What the model is told of itself."""
    traits: dict[str, float]
    """Each in 0…1, as ``warmth = 0.8``."""
    sampling: Sampling
    valence: float
    """Baseline of the feelings, in -1…1."""
    arousal: float
    """The same."""
    half_life_s: float
    """After this time half of what was felt is left."""


class _Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    stop: Annotated[tuple[str, ...], msgspec.Meta(max_length=4)] = ()


class _Emotion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    valence: _Signed = 0.0
    arousal: _Signed = 0.0
    half_life_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    prompt: Annotated[str, msgspec.Meta(min_length=1, max_length=20_000)]
    traits: dict[str, _Share] = {}
    sampling: _Sampling = _Sampling()
    emotion: _Emotion = _Emotion()


def load(name: str, path: Path) -> Profile:
    """Read a profile. Raises `ProfileError`."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ProfileError(f"{path}: a profile has at most {MAX_BYTES} bytes")
        document = msgspec.convert(tomllib.loads(content.decode()), _Document)
    except OSError as error:
        raise ProfileError(f"{path} can't be read: {error.strerror}") from error
    except msgspec.ValidationError as error:
        raise ProfileError(f"{path}: {_where(str(error))}") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path} isn't UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{path}: {error}") from error
    chosen = document.sampling
    sampling = Sampling(
        chosen.temperature, chosen.top_p, chosen.max_tokens, chosen.frequency_penalty, chosen.stop
    )
    feeling = document.emotion
    return Profile(
        name,
        document.prompt.strip(),
        document.traits,
        sampling,
        feeling.valence,
        feeling.arousal,
        feeling.half_life_s,
    )


def _where(text: str) -> str:
    """``Expected `float`, got `str` - at `$.sampling.temperature``` as ``sampling.temperature: Expected …``."""
    reason, at, path = text.rpartition(" - at `$")
    key = path.rstrip("`").lstrip(".")
    return f"{key}: {reason}" if at and key else text

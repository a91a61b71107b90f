"""`PersonalityManager`: the profile in use, and those that there are.

Profiles are the files ``NAME.toml`` that come with segue, and those of a directory of the user's, which count more.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

import segue
from segue.worker.backend.personality.profile import Profile, ProfileError, load

_BUNDLED = Path(__file__).parent / "profiles"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SUFFIX = ".toml"


class PersonalitySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[services.personality]``."""

    profile: str = "plain"
    profiles_dir: str = ""
    """A directory of ``NAME.toml`` files, beside the bundled ones."""


class PersonalityManager:
    """Raises `segue.Unknown` for a profile that there isn't, `ProfileError` for one that can't be used."""

    def __init__(self, settings: PersonalitySettings) -> None:
        self.settings = settings
        found = _profiles(_BUNDLED)
        if settings.profiles_dir:
            found |= _profiles(Path(settings.profiles_dir))
        self.known = sorted(found)
        """The names of all profiles."""
        if settings.profile not in found:
            raise segue.Unknown("profile", settings.profile, self.known)
        self.profile: Profile = load(settings.profile, found[settings.profile])
        """The one in use."""

    def metrics(self) -> dict[str, Any]:
        """How many there are to choose from."""
        return {"profiles": segue.Shared(len(self.known))}


def _profiles(directory: Path) -> dict[str, Path]:
    """By name. A link that leads out of the directory is none."""
    try:
        real = directory.resolve(strict=True)
        entries = list(real.iterdir())
    except OSError as error:
        raise ProfileError(f"profiles_dir {directory} can't be read: {error.strerror}") from error
    found = {}
    for entry in entries:
        name = entry.name.removesuffix(_SUFFIX)
        if entry.suffix != _SUFFIX or _NAME.fullmatch(name) is None:
            continue
        target = entry.resolve()
        if target.is_relative_to(real) and target.is_file():
            found[name] = target
    return found

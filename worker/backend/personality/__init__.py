"""Who the service is: profiles in TOML files, of which one is chosen."""

from segue.worker.backend.personality.manager import PersonalityManager, PersonalitySettings
from segue.worker.backend.personality.profile import Profile, ProfileError

__all__ = ["PersonalityManager", "PersonalitySettings", "Profile", "ProfileError"]

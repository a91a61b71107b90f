"""What time it is, and how long until then."""

from __future__ import annotations

import datetime
import zoneinfo


def current_time(timezone: str = "UTC") -> str:
    """Tell the current date and time.

    Args:
        timezone: Name of a time zone, such as UTC or Europe/Berlin.
    """
    return datetime.datetime.now(_zone(timezone)).isoformat(sep=" ", timespec="seconds")


def days_between(first: datetime.date, second: datetime.date) -> int:
    """Count the days from one date to another; negative if the second is earlier.

    Args:
        first: A date, such as 2026-12-24.
        second: Another date.
    """
    return (second - first).days


def _zone(name: str) -> datetime.tzinfo:
    if name.upper() in {"UTC", "GMT", "Z"}:
        return datetime.UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"there is no time zone {name!r}; Europe/Berlin is one") from None

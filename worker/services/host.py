"""What surrounds the services of a process: a worker of segue, or, under plain uvicorn, nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from segue.handoff.messages import ServiceRecord
from segue.worker.services.options import Place

if TYPE_CHECKING:
    from segue.worker.services.running import Running
    from segue.worker.services.swap import Swaps


@dataclass
class Host:
    """Who decides when services are active, and what was decided before this process started."""

    place: Place
    records: Mapping[str, ServiceRecord] = field(default_factory=dict)
    on_start: Callable[[Running, Swaps], None] | None = None
    """Called when a registry begins to start; None: nobody activates it later, so it does so itself."""
    master_socket: str | None = None
    generation: int | None = None
    worker: int | None = None


_hosts: list[Host] = []


def enter(host: Host) -> None:
    """From here on this process is a worker."""
    _hosts[:] = [host]


def current() -> Host:
    """The worker around this process, or what stands for it without one."""
    return _hosts[0] if _hosts else Host(Place(_settings_file(), os.environ.get("UVICORN_ENV_FILE")))


def _settings_file() -> str | None:
    """The same file as under segue, as far as one can know: without flags."""
    named = os.environ.get("SEGUE_CONFIG")
    if named:
        return os.path.abspath(named)
    return next(
        (os.path.abspath(name) for name in ("segue.toml", "pyproject.toml") if os.path.isfile(name)), None
    )

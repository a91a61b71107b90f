"""segue: a process supervisor with socket handoff for Python (ASGI) services.

What an application may use is here; everything below ``segue.supervisor``, ``segue.worker`` and
``segue.handoff`` is private to the program.

- `draining`: a flag (``if segue.draining:``, ``await segue.draining.wait()``), set while this worker finishes its
  work because another generation has taken over or the service stops; cleared if it is activated again.
- `activated`: the same kind of flag, set while this worker's generation is the one that serves. What must not run
  in two generations at once waits for it.

- `Services`: the registry in which an application declares its singletons, to be swapped while they work.
- `reject_if_draining`: marks what an operator's drain rejects or holds (FastAPI dependency, Starlette decorator, ASGI
  wrapper).

Flags may be used at import time, in threads, and outside segue, where nothing sets them. A request finds the same, with
the numbers of its generation and worker, in ``scope["state"]["segue"]`` (Starlette: ``request.state.segue``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segue.worker.events import Flag as Flag
    from segue.worker.events import WorkerInfo as WorkerInfo
    from segue.worker.events import activated as activated
    from segue.worker.events import draining as draining
    from segue.worker.gate import reject_if_draining as reject_if_draining
    from segue.worker.services.errors import BusyError as BusyError
    from segue.worker.services.errors import DeclarationError as DeclarationError
    from segue.worker.services.errors import NotRunningError as NotRunningError
    from segue.worker.services.errors import OptionsError as OptionsError
    from segue.worker.services.errors import SwapRefusedError as SwapRefusedError
    from segue.worker.services.errors import Unknown as Unknown
    from segue.worker.services.errors import UnknownServiceError as UnknownServiceError
    from segue.worker.services.instance import Lease as Lease
    from segue.worker.services.options import Secret as Secret
    from segue.worker.services.registry import Service as Service
    from segue.worker.services.registry import Services as Services
    from segue.worker.services.report import Rate as Rate
    from segue.worker.services.report import Shared as Shared

__version__ = "0.1.0"

_HOMES = {
    "events": ("Flag", "WorkerInfo", "activated", "draining"),
    "gate": ("reject_if_draining",),
    "services.errors": (
        "BusyError",
        "DeclarationError",
        "NotRunningError",
        "OptionsError",
        "SwapRefusedError",
        "Unknown",
        "UnknownServiceError",
    ),
    "services.instance": ("Lease",),
    "services.options": ("Secret",),
    "services.registry": ("Service", "Services"),
    "services.report": ("Rate", "Shared"),
}
__all__ = [
    "BusyError",
    "DeclarationError",
    "Flag",
    "Lease",
    "NotRunningError",
    "OptionsError",
    "Rate",
    "Secret",
    "Service",
    "Services",
    "Shared",
    "SwapRefusedError",
    "Unknown",
    "UnknownServiceError",
    "WorkerInfo",
    "__version__",
    "activated",
    "draining",
    "reject_if_draining",
]


def __getattr__(name: str) -> object:
    # asked for late, so that the command line doesn't pay for what only applications use
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"segue.worker.{home}"), name)
    raise AttributeError(f"module 'segue' has no attribute {name!r}")

"""segue: a process supervisor with socket handoff for Python (ASGI) services.

What an application may use is here; everything below ``segue.supervisor``, ``segue.worker`` and
``segue.handoff`` is private to the program.

- `draining`: a flag (``if segue.draining:``, ``await segue.draining.wait()``), set while this worker finishes its
  work because another generation has taken over or the service stops; cleared if it is activated again.
- `activated`: the same kind of flag, set while this worker's generation is the one that serves. What must not run
  in two generations at once waits for it.

Both may be used at import time, in threads, and outside segue, where nothing sets them. A request finds the same, with
the numbers of its generation and worker, in ``scope["state"]["segue"]`` (Starlette: ``request.state.segue``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segue.worker.events import Flag as Flag
    from segue.worker.events import WorkerInfo as WorkerInfo
    from segue.worker.events import activated as activated
    from segue.worker.events import draining as draining

__version__ = "0.1.0"
__all__ = ["Flag", "WorkerInfo", "__version__", "activated", "draining"]


def __getattr__(name: str) -> object:
    # asked for late, so that the command line doesn't pay for what only applications use
    if name in {"Flag", "WorkerInfo", "activated", "draining"}:
        from segue.worker import events

        return getattr(events, name)
    raise AttributeError(f"module 'segue' has no attribute {name!r}")

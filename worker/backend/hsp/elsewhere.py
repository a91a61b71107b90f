"""What a new generation has to do as well as: the one that serves now."""

from __future__ import annotations

import msgspec

from segue.handoff.http_client import CallError, call
from segue.handoff.messages import HOT
from segue.worker.services import host

_TIMEOUT_S = 3.0


async def connected_elsewhere() -> bool:
    """Whether another generation serves now, and its connector has a broker. False if nobody can say."""
    here = host.current()
    if here.master_socket is None:
        return False
    try:
        answer = await call(here.master_socket, "GET", f"{HOT}/status", timeout_s=_TIMEOUT_S)
        status = answer.json()
    except (CallError, msgspec.DecodeError):
        return False
    return status["current"] not in {None, here.generation} and status["hsp"]["is_connected"] is True

"""The agents that have said something of themselves."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from segue.worker.backend.hsp.payloads import Advertisement, Capability

_MAX_PEERS = 1000


class Peer(msgspec.Struct):
    """Another agent."""

    ai_id: str
    capabilities: tuple[Capability, ...]
    online: bool
    seen: float
    """When it last said something of itself; seconds since the epoch."""
    succeeded: int = 0
    """Tasks that it did for this agent …"""
    failed: int = 0
    """… and those that it didn't."""
    mean_s: float = 0.0
    """How long those that it did took, on average."""


class Peers:
    """Those that are known. The one that has been silent longest is forgotten first."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._known: OrderedDict[str, Peer] = OrderedDict()

    def heard(self, advertisement: Advertisement) -> Peer:
        """One has said something of itself; what counts is the last."""
        peer = self._known.get(advertisement.ai_id)
        online = advertisement.availability_status == "online"
        if peer is None:
            peer = Peer(advertisement.ai_id, advertisement.capabilities, online, self._now())
            self._known[peer.ai_id] = peer
            if len(self._known) > _MAX_PEERS:
                self._known.popitem(last=False)
        else:
            if online or advertisement.capabilities:
                peer.capabilities = advertisement.capabilities
            peer.online, peer.seen = online, self._now()
        self._known.move_to_end(peer.ai_id)
        return peer

    def answered(self, ai_id: str, ok: bool, seconds: float) -> None:
        """One has done a task, or hasn't."""
        peer = self._known.get(ai_id)
        if peer is None:
            return
        if ok:
            peer.succeeded += 1
            peer.mean_s += (seconds - peer.mean_s) / peer.succeeded
        else:
            peer.failed += 1

    def able(self, capability: str) -> str | None:
        """Who to ask for something: who is there and has failed least, then who is fastest. None: nobody is known."""
        able = [
            peer
            for peer in self._known.values()
            if peer.online and any(each.name == capability for each in peer.capabilities)
        ]
        best = min(able, key=lambda peer: (peer.failed / (1 + peer.succeeded), peer.mean_s), default=None)
        return best.ai_id if best else None

    def all(self) -> list[Peer]:
        """By name."""
        return sorted(self._known.values(), key=lambda peer: peer.ai_id)

    def __len__(self) -> int:
        return len(self._known)

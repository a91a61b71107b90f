"""What an agent in this process knows and is, and goes on over a swap of its connector, aborted or not."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from segue.worker.backend.hsp.begun import Begun, Work
from segue.worker.backend.hsp.envelope import Envelope
from segue.worker.backend.hsp.leaving import Leaving
from segue.worker.backend.hsp.payloads import Capability
from segue.worker.backend.hsp.seen import Seen

_log = logging.getLogger("segue.hsp")

Handler = Callable[[Envelope], Awaitable[None] | None]
"""Is called with each message of a type, in the order in which they were published."""
TaskHandler = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]
"""Does a task: takes its parameters, returns the payload of its result, raises if it can't."""


class Offer(Protocol):
    """What an agent does for others, if that changes while it works: `segue.worker.backend.agent.Agent`."""

    def capabilities(self) -> list[Capability]:
        """At this moment."""

    def handler(self, capability: str) -> TaskHandler | None:
        """What does it; None: nothing."""


_PROBLEMS = 20
_RETAINED = 10_000
_LOG_EVERY_S = 1.0


@dataclass
class Counts:
    """Since the process began."""

    received: int = 0
    invalid: int = 0
    duplicates: int = 0
    handled: int = 0
    handler_errors: int = 0
    tasks: int = 0
    swaps: int = 0
    gaps: int = 0
    """How often the broker did not have the session any more that it should have kept."""


@dataclass
class Continuity:
    """Shared by an old and a new connector."""

    seen: Seen
    counts: Counts = field(default_factory=Counts)
    handlers: dict[str, list[Handler]] = field(default_factory=dict)
    served: dict[str, TaskHandler] = field(default_factory=dict)
    capabilities: dict[str, Capability] = field(default_factory=dict)
    offer: Offer | None = None
    problems: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_PROBLEMS))
    retained: OrderedDict[str, str] = field(default_factory=OrderedDict)
    """The id of the last retained message of each topic: it comes again with every connection."""
    running: dict[int, Work] = field(default_factory=dict)
    """What is being worked on, by the key of its message (`seen`)."""
    begun: Begun = field(init=False)
    leaving: Leaving = field(default_factory=Leaving)
    _logged: float = 0.0

    def __post_init__(self) -> None:
        self.begun = Begun(self.problem)

    def offered(self) -> dict[str, Capability]:
        """All that it does for others, by name."""
        found = {each.name: each for each in self.offer.capabilities()} if self.offer is not None else {}
        return found | self.capabilities

    def handler(self, capability: str) -> TaskHandler | None:
        """What does it; None: nothing."""
        found = self.served.get(capability)
        return found or (self.offer.handler(capability) if self.offer is not None else None)

    def problem(self, where: str, reason: str) -> None:
        """Remember, and now and then log, what could not be handled."""
        reason = " ".join(reason.split())[:500]
        self.problems.append({"time": time.time(), "where": where, "reason": reason})
        if time.monotonic() - self._logged >= _LOG_EVERY_S:  # whoever sends rubbish doesn't fill the log
            self._logged = time.monotonic()
            _log.warning("event=hsp-problem where=%s reason=%s", where, reason)

    def is_repeated(self, topic: str, message_id: str) -> bool:
        """Whether a retained message is the one that was retained there before; from here on it is."""
        if self.retained.get(topic) == message_id:
            return True
        self.retained[topic] = message_id
        self.retained.move_to_end(topic)
        if len(self.retained) > _RETAINED:
            self.retained.popitem(last=False)
        return False

"""What a query of the control API may say: how each parameter is described, and how it is read.

What can't be read raises a ValueError that says what it takes.
"""

from __future__ import annotations

import re

from segue.handoff.http import Request
from segue.handoff.messages import DRAIN_MODES, MAX_COUNT, MAX_WAIT_S, MAX_WORKERS
from segue.supervisor import model
from segue.supervisor.openapi import Parameter
from segue.supervisor.operations import UNTIL
from segue.supervisor.requests import Manner
from segue.supervisor.ring import NUMBER

STRATEGIES = tuple(model.Strategy)
SERVICE_NAME = "^[a-z][a-z0-9_]{0,62}$"
_COUNT = {"type": "integer", "minimum": 0, "maximum": MAX_COUNT}
_SECONDS = {"type": "number", "minimum": 0, "maximum": MAX_WAIT_S}
_PLAIN = re.compile("[0-9.eE+-]+")
"""How a number is written: float() takes more."""

WAIT = Parameter("wait", "Seconds to wait for the outcome at most", _SECONDS)
UNTIL_WHEN = Parameter("until", "How far to wait", {"type": "string", "enum": list(UNTIL)})
PHASE = Parameter("phase", "Wait only for the end of this phase", {"type": "string"})
AFTER = Parameter(
    "after", "The number of the last event that is known", {"type": "string", "pattern": f"^{NUMBER}$"}
)
LAST = Parameter("last", "So many of the last events at most", _COUNT)
GENERATION = Parameter("generation", "Which one", _COUNT)
WORKER = Parameter("worker", "Which one", _COUNT)
OPERATION = Parameter("id", "Its number", {"type": "integer", "minimum": 1, "maximum": MAX_COUNT})
SERVICE = Parameter("service", "Its name", {"type": "string", "pattern": SERVICE_NAME})
MODE = Parameter("mode", "What becomes of new work", {"type": "string", "enum": list(DRAIN_MODES)})
WORKERS = Parameter(
    "workers", "How many", {"type": "integer", "minimum": 1, "maximum": MAX_WORKERS}, required=True
)
NOW = Parameter(
    "now",
    "1: at once, cutting off what is in flight",
    {"type": "string", "enum": ["0", "1", "false", "true"]},
)
MANNER = (
    Parameter("strategy", "How it takes over", {"type": "string", "enum": list(STRATEGIES)}),
    Parameter(
        "canary",
        "So many workers first, which no strategy but surge does; 0: none",
        {"type": "integer", "minimum": 0, "maximum": MAX_WORKERS},
    ),
    Parameter("canary-for", "For so many seconds", _SECONDS),
)


def seconds(request: Request, key: str, default: float) -> float:
    """A length of time."""
    text = request.query.get(key)
    if text is None:
        return default
    try:
        value = float(text) if _PLAIN.fullmatch(text) else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_WAIT_S:
        raise ValueError(f"?{key}= takes seconds from 0 to {MAX_WAIT_S:g}, not {text!r}")
    return value


def number(request: Request, key: str, lowest: int = 0, highest: int = MAX_COUNT) -> int | None:
    """A number, if it is there."""
    text = request.query.get(key)
    if text is None:
        return None
    value = digits(text)
    if value is None or not lowest <= value <= highest:
        raise ValueError(f"?{key}= takes a number from {lowest} to {highest}, not {text!r}")
    return value


def switch(request: Request, key: str) -> bool:
    """Whether something is wanted; it isn't if it is not there."""
    text = request.query.get(key, "0")
    if text not in {"0", "1", "false", "true"}:
        raise ValueError(f"?{key}= takes 1 or 0, not {text!r}")
    return text in {"1", "true"}


def nothing_else(request: Request, parameters: tuple[Parameter, ...]) -> None:
    """Refuse what is none of these: a mistake in writing must not do something else."""
    known = [parameter.name for parameter in parameters]
    for key in request.query:
        if key not in known:
            raise ValueError(f"there is no ?{key}= here; known: {', '.join(known)}")


def digits(text: str) -> int | None:
    """The number that `text` writes, in as many digits as any here has."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def manner(request: Request) -> Manner:
    """How one generation shall take over from another, where it isn't to be as the settings say."""
    strategy, canary = request.query.get("strategy"), number(request, "canary", 0, MAX_WORKERS)
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"?strategy= takes {', '.join(STRATEGIES)}, not {strategy!r}")
    if canary and strategy not in {None, model.Strategy.SURGE}:
        raise ValueError(f"a canary and the strategy {strategy} contradict each other: leave one of them out")
    return Manner(
        None if strategy is None else model.Strategy(strategy),
        canary,
        seconds(request, "canary-for", 0.0) if "canary-for" in request.query else None,
    )


def until(request: Request) -> str:
    """How far to wait for an operation."""
    wanted = request.query.get("until", UNTIL[0])
    if wanted not in UNTIL:
        raise ValueError(f"?until= takes {', '.join(UNTIL)}, not {wanted!r}")
    return wanted

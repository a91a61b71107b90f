"""Hooks of schemathesis: what it asks a running master for stays within what the machine of a test can bear.

A valid number of workers starts so many processes, and a valid wait waits so long. What is invalid is sent as it is:
schemathesis judges each request as it is after this.
"""

from __future__ import annotations

from typing import Any

import schemathesis

DAY_S = 24 * 3600.0
BOUNDS = {"workers": (2, 1024), "canary": (1, 1024), "canary-for": (0.5, DAY_S), "wait": (0.5, DAY_S)}
"""Query parameter → what is asked for at most, and the highest value that is valid."""


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: Any) -> None:
    """Lower what is valid and large; and wait a moment only where nothing is said of it."""
    asked = dict(case.query or {})
    if any(parameter.name == "wait" for parameter in case.operation.query):
        asked.setdefault("wait", BOUNDS["wait"][0])
    for name, (bound, highest) in BOUNDS.items():
        if name in asked:
            asked[name] = _lowered(asked[name], bound, highest)
    if asked.get("strategy") in ("rolling", "replace") and "canary" in asked:
        # that they contradict each other is more than a description of parameters one by one can say
        asked["canary"] = _lowered(asked["canary"], 0, BOUNDS["canary"][1])
    if asked != (case.query or {}):
        case.query = asked


def _lowered(value: Any, bound: float, highest: float) -> Any:
    """`value`, or each of a list, but at most `bound` if it is a number and valid."""
    if isinstance(value, list):
        return [_lowered(each, bound, highest) for each in value]
    try:
        valid = not isinstance(value, bool) and float(value) <= highest
    except (TypeError, ValueError):
        valid = False
    return bound if valid and float(value) > bound else value

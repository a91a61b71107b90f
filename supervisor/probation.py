"""Probation: the watch over a generation that has just taken over. What is found wrong with it is its *breach*.

A worker that dies or hangs is one, and so is a share of 5xx that is higher, by more than was allowed for, than what the
generation before it had: if that failed just as often, going back to it would help nobody. What is done about a
breach is up to `segue.supervisor.promotion`.
"""

from __future__ import annotations

import math

from segue.supervisor import model as m
from segue.supervisor.model import Outcome
from segue.supervisor.turn import ACTIVATE_TIMEOUT_S, Turn

LEAST_RESPONSES = 20
"""Fewer say nothing about a share."""
WINDOW_S = 30.0
"""The old generation is compared by its last responses: of so many seconds at least, and twice as many at most."""


def begin(turn: Turn, generation: m.Generation, previous: m.Generation, seconds: float) -> None:
    """Watch `generation` for so long; `previous` is what it is compared with, and gone back to."""
    turn.state.probation = record(generation, previous, turn.now + seconds)
    turn.say("info", "probation", generation, None, previous=previous.id, seconds=seconds)


def record(generation: m.Generation, previous: m.Generation, until: float = math.inf) -> m.Probation:
    """A watch that begins now."""
    now = generation.traffic
    before = previous.traffic.marks[0] if previous.traffic.marks else (0.0, 0, 0)
    return m.Probation(generation.id, previous.id, until, (now.responses, now.errors), before[1:])


def watch_s(turn: Turn, generation: m.Generation) -> float:
    """For how many seconds a worker that begins to serve now shall tell at once what it has answered."""
    promote, probation = turn.state.promote, turn.state.probation
    if promote is not None and promote.generation == generation.id and promote.is_watched:
        return generation.limits.probation + generation.limits.canary_for + ACTIVATE_TIMEOUT_S
    if probation is not None and probation.generation == generation.id:
        return max(0.0, probation.until - turn.now)
    return 0.0


def found(turn: Turn, generation: m.Generation, what: str) -> None:
    """Something is wrong with one of its workers."""
    for watch in _watches(turn.state):
        if watch.generation == generation.id and not watch.breach:
            watch.breach = what
            turn.say("error", "probation-breached", generation, None, reason=what)


def _watches(state: m.State) -> list[m.Probation]:
    beside = state.promote.watch if state.promote is not None else None
    return [watch for watch in (state.probation, beside) if watch is not None]


def counted(turn: Turn, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
    """It says how much it has answered so far; an older message than the last one says nothing new."""
    assert isinstance(event, m.ResponsesCounted)
    if event.total <= worker.responses:
        return
    traffic = generation.traffic
    if not traffic.marks or turn.now - traffic.marks[-1][0] >= WINDOW_S:
        traffic.marks = (*traffic.marks[-1:], (turn.now, traffic.responses, traffic.errors))
    traffic.responses += event.total - worker.responses
    traffic.errors += max(0, event.errors - worker.errors)
    worker.responses, worker.errors = event.total, event.errors
    for watch in _watches(turn.state):
        _compare(turn, watch)


def _compare(turn: Turn, probation: m.Probation) -> None:
    generation = turn.state.generations[probation.generation]
    previous = turn.state.generations.get(probation.previous)
    if previous is not None:
        share = _share(previous.traffic, probation.before)
        probation.share_before = probation.share_before if share is None else share
    share = _share(generation.traffic, probation.since)
    allowed = generation.limits.probation_5xx
    if share is not None and share > probation.share_before + allowed:
        found(
            turn,
            generation,
            f"{share:.0%} of its responses are 5xx; generation {probation.previous} had "
            f"{probation.share_before:.0%}, and {allowed:.0%} more are allowed (probation-5xx)",
        )


def _share(traffic: m.Traffic, since: tuple[int, int]) -> float | None:
    """Of 5xx since then; None if that says nothing."""
    responses = traffic.responses - since[0]
    return None if responses < LEAST_RESPONSES else (traffic.errors - since[1]) / responses


def next_deadline(state: m.State) -> float | None:
    """When it is over; what has been found is seen to at once."""
    probation = state.probation
    return None if probation is None or probation.breach else probation.until


def check(turn: Turn) -> None:
    """It is over when its time is, if nothing was found."""
    probation = turn.state.probation
    if probation is not None and not probation.breach and probation.until <= turn.now:
        end(turn, Outcome.PASSED)


def end(turn: Turn, outcome: Outcome, reason: str = "") -> None:
    """Say how it ended, if there is one."""
    probation, turn.state.probation = turn.state.probation, None
    if probation is not None:
        level = "error" if outcome is Outcome.KEPT else "info"
        generation = turn.state.generations.get(probation.generation)
        turn.say(level, "probation-ended", generation, None, outcome=outcome, reason=reason)
        turn.effects.append(m.ProbationEnded(probation.generation, outcome, reason))

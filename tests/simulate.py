"""Millions of events for the lifecycle, in orders that nobody has thought of: ``make simulate``.

A run is a world and a sequence of `actions`, both drawn from one seed: the seed and the number of a run say all about
it. When a run fails it is cut down to the steps that matter, and printed as what it is: what happened, what the
lifecycle did about it, and which rule that breaks.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from random import Random
from typing import NamedTuple

import msgspec
from actions import Step, draw, finish
from reached import Reached, table
from simulated_worker import CODES
from simulator import LIMITS, World

from segue.supervisor import model as m

STEPS = 60
"""Of a run, before everything is healed and ended."""
BATCH = 50
"""Runs that a process makes before it reports."""
TELL_S = 10.0
"""So often it is said how far it is."""
LAST_EVENTS = 25
"""How many are told of a run that has failed."""


class Run(NamedTuple):
    """One run, before it begins."""

    name: str
    workers: int
    behaviour: str
    services: bool
    mortal: bool
    ready: bool
    limits: m.Limits
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        services = "with services" if self.services else "without services"
        master = "a master that may die" if self.mortal else "a master that lives"
        lines = [
            f"{master}, {self.workers} workers {services}, whose code is {self.behaviour!r}; the first start is asked for",
            str(self.limits),
        ]
        lines += ["5 s pass"] if self.ready else []
        return "\n".join(lines + [str(step) for step in self.steps])


class Failure(NamedTuple):
    """A run that broke a rule."""

    run: Run
    why: str
    trace: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What is the same for the same mistake: the first line, without its numbers."""
        return "".join(" " if each.isdigit() else each for each in self.why.splitlines()[0])[:60]


def plan(seed: str, number: int) -> Run:
    """The run of this number."""
    random = Random(f"{seed}/{number}")
    return Run(
        name=f"{seed}/{number}",
        workers=random.randint(1, 3),
        behaviour="good" if random.random() < 0.85 else random.choice(CODES),
        services=random.random() < 0.75,
        mortal=random.random() < 0.5,
        limits=msgspec.structs.replace(
            LIMITS,
            park_for=random.choice((0.0, 10.0, 100.0)),
            probation=random.choice((0.0, 10.0, 100.0)),
            strategy=random.choice((m.Strategy.SURGE, m.Strategy.SURGE, *m.Strategy)),
            replace_timeout=5.0,
            canary=random.choice((0, 0, 1, 2)),
            canary_for=random.choice((5.0, 100.0)),
        ),
        ready=random.random() < 0.85,
        steps=tuple(draw(random, STEPS)),
    )


def execute(run: Run, traced: bool = False, reached: Reached | None = None) -> tuple[int, Failure | None]:
    """Let it happen, and count in `reached` what. Returns how many events there were, and the rule that was broken, if any."""
    handover = {} if run.services else {"handover": None}
    world = World(run.workers, run.limits, **handover)
    world.journals, world.reached = run.mortal, reached
    if traced:
        world.trace = deque(maxlen=LAST_EVENTS)
    try:
        world.behaviour = run.behaviour
        world.reload()
        if run.ready:
            world.run(5.0)
        for step in run.steps:
            step(world)
        finish(world)
    except (AssertionError, LookupError, ValueError, TypeError, AttributeError) as error:
        return world.events, Failure(run, _why(error), tuple(world.trace or ()))
    return world.events, None


def _why(error: Exception) -> str:
    """The rule; where it has no words, the line that says it."""
    if isinstance(error, AssertionError) and str(error):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} {error} at {last.name}: {last.line}"


def shrink(failure: Failure, budget_s: float = 60.0) -> Failure:
    """The same failure with as few steps as can be found in `budget_s` seconds."""
    deadline = time.monotonic() + budget_s
    best = failure
    size = len(best.run.steps) // 2
    while size >= 1 and time.monotonic() < deadline:
        at, shorter = 0, False
        while at < len(best.run.steps) and time.monotonic() < deadline:
            steps = best.run.steps[:at] + best.run.steps[at + size :]
            _, found = execute(best.run._replace(steps=steps))
            if found is not None and found.kind == failure.kind:
                best, shorter = found, True
            else:
                at += size
        if not shorter or size > 1:
            size //= 2
    _, traced = execute(best.run, traced=True)
    return traced if traced is not None and traced.kind == best.kind else best


def report(failure: Failure) -> str:
    """A failing run, for a person."""
    steps = len(failure.run.steps)
    head = f"run {failure.run.name} breaks a rule, with {steps} steps left of {STEPS}:"
    trace = ("", "what the lifecycle saw and did last:", *failure.trace) if failure.trace else ()
    return "\n".join([head, "", str(failure.run), "", failure.why, *trace])


class Found(NamedTuple):
    """What came of several runs."""

    events: int
    runs: int
    failure: Failure | None
    reached: Reached | None


def batch(seed: str, first: int, count: int, counts: bool) -> Found:
    """Several runs, up to the first that fails; `counts` what there has been."""
    events, reached = 0, Reached() if counts else None
    for number in range(first, first + count):
        seen, failure = execute(plan(seed, number), reached=reached)
        events += seen
        if failure is not None:
            return Found(events, number - first + 1, shrink(failure), reached)
    return Found(events, count, None, reached)


def simulate(
    seed: str,
    events: int,
    jobs: int,
    say: Callable[[str], None] = lambda _: None,
    reached: Reached | None = None,
) -> Found:
    """Runs until the lifecycle has seen so many events, or a rule was broken."""
    counts = reached is not None
    if jobs == 1:
        return _together(_in_turn(seed, counts), events, say, reached)
    with ProcessPoolExecutor(jobs) as pool:
        try:
            return _together(_beside(pool, seed, jobs, counts), events, say, reached)
        finally:
            pool.shutdown(cancel_futures=True)


def _together(
    batches: Iterator[Found], events: int, say: Callable[[str], None], reached: Reached | None
) -> Found:
    seen = runs = 0
    told = time.monotonic()
    for found in batches:
        seen, runs = seen + found.events, runs + found.runs
        if reached is not None and found.reached is not None:
            reached.update(found.reached)
        if found.failure is not None or seen >= events:
            return Found(seen, runs, found.failure, reached)
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            say(f"{seen:,} events")
    raise AssertionError("there is always another run")


def _in_turn(seed: str, counts: bool) -> Iterator[Found]:
    for number in itertools.count():
        yield batch(seed, number, 1, counts)


def _beside(pool: ProcessPoolExecutor, seed: str, jobs: int, counts: bool) -> Iterator[Found]:
    pending: set[Future[Found]] = set()
    number = 0
    while True:
        while len(pending) < jobs * 2:
            pending.add(pool.submit(batch, seed, number, BATCH, counts))
            number += BATCH
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """0: no rule was broken; 1: one was, and how."""
    parser = argparse.ArgumentParser(
        description="Simulate the lifecycle in random orders, and check the rules."
    )
    parser.add_argument("--events", type=int, default=1_000_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", default=None, help="of all that is drawn (default: another one each time)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)"
    )
    parser.add_argument("--run", metavar="SEED/NUMBER", help="one run again, with what happened in it")
    parser.add_argument("--reached", action="store_true", help="print what there has been, and how often")
    given = parser.parse_args(arguments)
    if given.run:
        seed, _, number = given.run.rpartition("/")
        _, failure = execute(plan(seed, int(number)))
        print(report(shrink(failure)) if failure else f"run {given.run} breaks no rule")
        return int(failure is not None)
    seed = given.seed or f"{time.time_ns():x}"
    print(f"seed {seed}", flush=True)
    began = time.monotonic()
    reached = Reached() if given.reached else None
    found = simulate(seed, given.events, given.jobs, lambda text: print(text, flush=True), reached)
    print(f"{found.events:,} events in {found.runs:,} runs, {time.monotonic() - began:.0f} s")
    if reached is not None:
        print(table(reached))
    if found.failure is not None:
        print(report(found.failure))
        print(f"\nagain: make simulate ARGS='--run {found.failure.run.name}'")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

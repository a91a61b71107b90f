"""One turn of the lifecycle: a state that is ours to change, the effects so far, and what can be told to a worker.

Every way in which a worker is started, told something or ended is here, with its state and its deadline set in the
same place. Who is to be told what, and when, is decided in the modules that are built on this one.
"""

from __future__ import annotations

from typing import Any

from segue.supervisor import model as m
from segue.supervisor.model import GenerationState, ServicesState, State, Verb, WorkerState

ACTIVATE_TIMEOUT_S = 10.0
QUIET_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 5.0
SLACK_S = 5.0
"""What force is given beyond a budget that the worker keeps by itself."""
TERM_GRACE_S = 5.0
"""From SIGTERM to SIGKILL, for a worker that never served."""
KILL_REPEAT_S = 2.0
"""A respawn may not have had a process yet when it was killed: while its code is compared."""
STOPPING_CAUSE = "segue is stopping"
BUSY = 423
"""HTTP status of what is refused because something else is under way."""
STARTING_IDLE = frozenset({WorkerState.BOOTING, WorkerState.READY})


class Turn:
    """What an event does, while it is being done."""

    def __init__(self, state: State, now: float) -> None:
        self.state = state
        self.now = now
        self.effects: list[m.Effect] = []
        self.first_failed = False
        """The first generation did not start: there is nothing to go on with."""

    def command(
        self,
        generation: m.Generation,
        worker: m.Worker,
        verb: Verb,
        timeout: float,
        *,
        budget: float = 0.0,
        mode: str | None = None,
        lead: bool = False,
        watch: float = 0.0,
    ) -> None:
        """Call a worker."""
        self.effects.append(m.Command(generation.id, worker.id, verb, timeout, budget, mode, lead, watch))

    def settle(
        self,
        operation: int,
        *,
        ok: bool,
        reason: str = "",
        output: str = "",
        generation: int | None = None,
        code: int = 409,
        details: dict[str, Any] | None = None,
        result: dict[str, Any] | None = None,
    ) -> None:
        """Give an operation its one answer."""
        self.effects.append(m.Settle(operation, ok, reason, output, generation, code, details or {}, result))

    def refused(self, operation: int, beside_stage: bool = False) -> bool:
        """Refuse what can't be begun, since segue stops or something else is under way; whether that was so.

        `beside_stage`: that a generation is being staged stands not in its way.
        """
        running = _running(self.state, beside_stage)
        if self.state.stopping is not None:
            self.settle(operation, ok=False, reason=STOPPING_CAUSE)
        elif running is not None:
            kind, generation, phase = running
            reason = f"a {kind} is running (generation {generation}: {phase}); try again when it has ended"
            if _can_be_given_up(self.state):
                reason += f", or give it up: segue discard {generation}"
            details = {"running": {"kind": kind, "generation": generation, "phase": phase}}
            self.settle(operation, ok=False, reason=reason, code=BUSY, details=details)
        else:
            return False
        return True

    def say(
        self,
        level: str,
        event: str,
        generation: m.Generation | None,
        worker: m.Worker | None,
        **fields: str | int | float,
    ) -> None:
        """Write a line of the log."""
        where: dict[str, str | int | float] = {}
        if generation is not None:
            where["generation"] = generation.id
        if worker is not None:
            where["worker"] = worker.id
        self.effects.append(
            m.Say(level, event, where | {key: value for key, value in fields.items() if value != ""})
        )

    def serves(self, generation: m.Generation) -> bool:
        """Whether it is the current one and does serve: not while it makes room for the next (`Strategy.REPLACE`)."""
        return generation.id == self.state.current and generation.state is GenerationState.ACTIVE

    def move(self, generation: m.Generation, state: GenerationState) -> None:
        """Take a generation to its next state."""
        if state not in m.TRANSITIONS[generation.state]:
            raise AssertionError(f"generation {generation.id} can't go from {generation.state} to {state}")
        generation.state, generation.since = state, self.now

    def spawn(self, generation: m.Generation, gated: bool = False, replaces: int | None = None) -> None:
        """Start a worker of `generation`."""
        number = generation.next_worker
        generation.next_worker += 1
        worker = m.Worker(number, WorkerState.BOOTING, deadline=None, heard=self.now, replaces=replaces)
        if self.serves(generation):
            worker.deadline = self.now + generation.limits.ready_timeout
        worker.drain_mode = self.state.told_mode
        worker.swaps_seen = self.state.swap_count
        generation.workers[number] = worker
        services = dict(self.state.services)
        self.effects.append(m.Spawn(generation.id, number, gated, self.state.told_mode, services))

    def activate(self, generation: m.Generation, worker: m.Worker, watch: float = 0.0) -> None:
        """Let it accept connections, again if it has before; for `watch` seconds what it answers is watched."""
        worker.state, worker.cause, worker.handover_refused = WorkerState.ACTIVATING, "", False
        worker.unasked = False
        worker.deadline = self.now + self._busy_s(worker) + ACTIVATE_TIMEOUT_S + SLACK_S
        if worker.drain_mode != self.state.told_mode:
            self.tell_drain(generation, worker)
        self.command(generation, worker, Verb.ACTIVATE, ACTIVATE_TIMEOUT_S, watch=watch)

    def tell_drain(self, generation: m.Generation, worker: m.Worker) -> None:
        """Tell it of the operator's drain; whoever asked for that waits for the answer."""
        if self.state.drain_change is not None:
            self.state.drain_change.pending.add((generation.id, worker.id))
        worker.drain_mode = self.state.told_mode
        worker.drains_unanswered += 1
        self.command(generation, worker, Verb.DRAIN, COMMAND_TIMEOUT_S, mode=self.state.told_mode)

    def quiet(self, generation: m.Generation, workers: list[m.Worker]) -> None:
        """First phase: all that leave stop accepting and reading the relay, before any of them sends."""
        for worker in workers:
            worker.state, worker.quiets_unanswered = WorkerState.QUIETING, worker.quiets_unanswered + 1
            worker.deadline = self.now + self._busy_s(worker) + QUIET_TIMEOUT_S + SLACK_S
            self.command(generation, worker, Verb.QUIET, QUIET_TIMEOUT_S)

    def hand_over_if_quiet(self, generation: m.Generation) -> None:
        """Second phase, once nobody of the generation is left in the first."""
        if any(worker.state is WorkerState.QUIETING for worker in generation.workers.values()):
            return
        for worker in generation.having(frozenset({WorkerState.QUIET})):
            worker.state = WorkerState.DRAINING
            budget = generation.limits.drain_timeout
            if generation.drain_budget is not None:
                budget = generation.drain_budget
            worker.deadline = self.now + self._busy_s(worker) + budget + SLACK_S
            self.command(generation, worker, Verb.HAND_OVER, COMMAND_TIMEOUT_S, budget=budget)

    def leave(self, generation: m.Generation, worker: m.Worker, cause: str) -> None:
        """One worker of a generation that goes on leaves it; its siblings take its connections."""
        worker.cause = cause
        if worker.state is WorkerState.HUNG:
            self.kill(generation, worker, cause)
        elif worker.state in {WorkerState.ACTIVE, WorkerState.ACTIVATING}:
            self.quiet(generation, [worker])
        elif worker.state in STARTING_IDLE:
            self.terminate(generation, worker, cause)

    def park(self, generation: m.Generation, worker: m.Worker, seconds: float) -> None:
        """Let it stay, though nothing is left in it; for so long also if nobody says anything else."""
        worker.state, worker.deadline = WorkerState.PARKED, None
        self.command(generation, worker, Verb.PARK, COMMAND_TIMEOUT_S, budget=seconds)

    def stop_worker(self, generation: m.Generation, worker: m.Worker, budget: float) -> None:
        """Let it finish within `budget` seconds, and end."""
        worker.state = WorkerState.STOPPING
        worker.deadline = self.now + self._busy_s(worker) + budget + 2 * SLACK_S
        self.command(generation, worker, Verb.STOP, COMMAND_TIMEOUT_S, budget=budget)

    def activate_services(self, generation: m.Generation, worker: m.Worker, lead: bool) -> None:
        """Let its services take work of their own; with `lead` also those that it alone may have active."""
        worker.services, worker.lead = ServicesState.ACTIVATING, worker.lead or lead
        self._call_services(generation, worker, Verb.SERVICES_ACTIVATE, worker.lead)

    def deactivate_services(self, generation: m.Generation, worker: m.Worker) -> None:
        """Let its services take no more work of their own."""
        self._call_services(generation, worker, Verb.SERVICES_DEACTIVATE, False)

    def _call_services(self, generation: m.Generation, worker: m.Worker, verb: Verb, lead: bool) -> None:
        budget = worker.handover or 0.0
        worker.services_retry = None
        worker.services_unanswered += 1
        self.command(generation, worker, verb, budget + COMMAND_TIMEOUT_S, budget=budget, lead=lead)

    def swap(
        self,
        swap: m.Swap,
        worker: m.Worker,
        verb: Verb,
        timeout: float,
        *,
        query: dict[str, str] | None = None,
        choices: dict[str, str] | None = None,
    ) -> None:
        """Tell a worker its part in a swap; what is secret goes with `swap prepare` only."""
        swap.shares[worker.id].awaits = verb
        if verb is not Verb.SWAP_PREPARE:  # which is called beside the others
            worker.swap_due = self.now + self._busy_s(worker) + timeout
        where = (swap.generation, worker.id, verb, swap.operation, swap.service)
        self.effects.append(m.SwapCommand(*where, query or {}, swap.version, choices or {}, timeout))

    def _busy_s(self, worker: m.Worker) -> float:
        """How long what a worker is told now may have to wait for the answer about a swap.

        What it is told of its services holds nobody up: that is a row of its own.
        """
        return max(0.0, (worker.swap_due or 0.0) - self.now)

    def terminate(self, generation: m.Generation, worker: m.Worker, cause: str) -> None:
        """End a worker that serves nobody: SIGTERM, and SIGKILL if that isn't enough.

        One whose start was decided on in this turn is not started: there is nothing to end.
        """
        if worker.state in {WorkerState.STOPPING, WorkerState.KILLED}:
            return
        where = (generation.id, worker.id)
        for start in [each for each in self.effects if isinstance(each, m.Spawn)]:
            if (start.generation, start.worker) == where:
                self.effects.remove(start)
                del generation.workers[worker.id]
                return
        worker.state, worker.cause = WorkerState.STOPPING, cause
        worker.deadline = self.now + TERM_GRACE_S
        self.effects.append(m.Kill(generation.id, worker.id, now=False))

    def dismiss(self, generation: m.Generation, worker: m.Worker, cause: str) -> None:
        """End a worker that serves nobody, or nobody any more; one that still finishes something goes on with that."""
        if worker.state in STARTING_IDLE:
            self.terminate(generation, worker, cause)
        elif worker.state is WorkerState.PARKED:
            worker.cause = cause
            self.stop_worker(generation, worker, generation.limits.stop_timeout)

    def kill(self, generation: m.Generation, worker: m.Worker, cause: str) -> None:
        """End it, whatever it does."""
        if worker.state is not WorkerState.KILLED:
            self.say("warning", "worker-killed", generation, worker, reason=cause)
        worker.state, worker.cause = WorkerState.KILLED, cause
        worker.deadline = self.now + KILL_REPEAT_S
        self.effects.append(m.Kill(generation.id, worker.id, now=True))


def _can_be_given_up(state: State) -> bool:
    """Whether `_running` is what somebody can discard."""
    if state.promote is not None:
        return state.promote.is_mixed
    return state.change is not None and not state.change.first


def _running(state: State, beside_stage: bool) -> tuple[str, int, str] | None:
    """What is under way, of which generation, and how far it is."""
    if state.promote is not None:
        return state.promote.kind, state.promote.generation, state.promote.phase
    if state.change is not None and not (beside_stage and state.change.stage):
        return ("stage" if state.change.stage else "reload"), state.change.generation, state.change.phase
    if state.swap is not None:
        return "swap", state.swap.generation, state.swap.phase
    return None

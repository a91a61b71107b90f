"""The lifecycle of generations and workers: ``step(state, event, now) -> (state, effects)``, and nothing else.

No clock, no process, no socket, no logging: everything that happens comes in as an event, everything that shall
happen goes out as an effect, so the same code runs under the master and in a simulator with faults. What a
message of a worker means in which state is the table `WORKER`; which state may follow on which is
`segue.supervisor.model.TRANSITIONS`. Messages repeat, come late and get lost: the table is total, and what comes too
late is named as such.

Rejected: objects that carry out their own transitions (orders can't be tested without processes), and coroutines
per generation (their state hides in stack frames, which nobody can list, copy or compare).
"""

from __future__ import annotations

from collections.abc import Callable

from segue.supervisor import model as m
from segue.supervisor.model import GenerationState, State, Verb, WorkerState

ACTIVATE_TIMEOUT_S = 10.0
QUIET_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 5.0
PREPARE_TIMEOUT_S = 60.0
SCALE_SLACK_S = 5.0
"""What force is given beyond a budget that the worker keeps by itself."""
TERM_GRACE_S = 5.0
"""From SIGTERM to SIGKILL, for a worker that never served."""
BACKOFF_FIRST_S = 0.5
BACKOFF_CAP_S = 30.0
STOPPING_CAUSE = "segue is stopping"


def step(state: State, event: m.Event, now: float) -> tuple[State, list[m.Effect]]:
    """What `event` at time `now` makes of `state`, and what the shell has to do about it. `state` stays as it was."""
    machine = _Machine(state.clone(), now)
    machine.handle(event)
    return machine.state, machine.effects


def next_deadline(state: State) -> float | None:
    """When `TimePassed` is due next; None while nothing has a deadline."""
    times = [state.recover_at, state.stopping.deadline if state.stopping else None]
    for generation in state.generations.values():
        times.append(generation.deadline)
        times.extend(generation.respawn_at)
        for worker in generation.workers.values():
            times.append(worker.deadline)
            if worker.state in _WATCHED:
                times.append(worker.heard + generation.limits.heartbeat_timeout)
    return min((time for time in times if time is not None), default=None)


def backoff(streak: int) -> float:
    """Seconds to wait before the next start after `streak` failed ones: at once, then doubling up to a cap."""
    return 0.0 if streak <= 0 else min(BACKOFF_CAP_S, BACKOFF_FIRST_S * 2.0 ** (streak - 1))


_WATCHED = frozenset({WorkerState.READY, WorkerState.ACTIVE, WorkerState.DRAINING, WorkerState.QUIET})
"""Where silence longer than the heartbeat timeout means a hung event loop. Elsewhere a deadline is running."""


class _Machine:
    """One step: a state that is ours to change, and the effects so far."""

    def __init__(self, state: State, now: float) -> None:
        self.state = state
        self.now = now
        self.effects: list[m.Effect] = []

    # ------------------------------------------------------------------------------------------------ dispatch

    def handle(self, event: m.Event) -> None:
        if isinstance(event, m.WorkerEvent):
            self._worker_event(event)
        else:
            _EVENTS[type(event)](self, event)
        self.conclude()

    def conclude(self) -> None:
        """What may have come to its end by what happened, whatever that was."""
        self.check_drain_change()
        self.check_scaling()
        state = self.state
        free = state.change is None and state.stopping is None and state.scaling is None
        if state.scale_delta and free and state.current is not None:
            delta, state.scale_delta = state.scale_delta, 0
            self.scale_asked(m.ScaleAsked(None, delta=delta))

    def _worker_event(self, event: m.WorkerEvent) -> None:
        generation = self.state.generations.get(event.generation)
        worker = generation.workers.get(event.worker) if generation else None
        if generation is None or worker is None:
            return  # of a process that has already ended
        if not isinstance(event, m.WorkerExited | m.CodeChanged) and not getattr(event, "error", ""):
            worker.heard, worker.started = self.now, True
        WORKER[type(event), worker.state](self, generation, worker, event)

    # ------------------------------------------------------------------------------------------------- reload

    def reload_asked(self, event: m.ReloadAsked) -> None:
        if self.state.stopping is not None:
            self.settle(event.operation, ok=False, reason=STOPPING_CAUSE)
        elif self.state.change is not None:
            self.state.queued += (event.operation,)
            self.effects.append(m.Progress((event.operation,), "queued"))
        else:
            self.start_change((event.operation,))

    def start_change(self, operations: tuple[int, ...]) -> None:
        number = self.state.next_generation
        self.state.next_generation += 1
        generation = m.Generation(number, GenerationState.BOOTING, since=self.now)
        generation.deadline = self.now + PREPARE_TIMEOUT_S
        self.state.generations[number] = generation
        self.state.change = m.Change(number, operations, first=self.state.current is None)
        self.state.recover_at = None
        self.effects += [m.Progress(operations, "prepare"), m.Prepare(number)]

    def prepared(self, event: m.Prepared) -> None:
        generation = self.state.generations.get(event.generation)
        change = self.state.change
        if (
            generation is None
            or change is None
            or change.generation != event.generation
            or generation.workers
        ):
            return
        generation.target, generation.limits = event.workers, event.limits
        generation.deadline = self.now + event.limits.ready_timeout
        self.effects.append(m.Progress(change.operations, "boot"))
        for _ in range(generation.target):
            self.spawn(generation)

    def prepare_failed(self, event: m.PrepareFailed) -> None:
        generation = self.state.generations.get(event.generation)
        if generation is not None and generation.state is GenerationState.BOOTING:
            self.fail(generation, event.reason)

    def stage(self, generation: m.Generation) -> None:
        """All are ready: activate them. The old generation goes on accepting until all have confirmed."""
        self.move(generation, GenerationState.STAGED)
        generation.deadline = None
        if self.state.change is not None:
            self.effects.append(m.Progress(self.state.change.operations, "activate"))
        for worker in generation.workers.values():
            self.activate(generation, worker)

    def promote(self, generation: m.Generation) -> None:
        """All have confirmed: from here on this generation is the current one."""
        previous = self.state.current
        change, self.state.change = self.state.change, None
        self.move(generation, GenerationState.ACTIVE)
        self.state.current = generation.id
        self.state.recover_streak = 0
        generation.streak = 0
        self.effects.append(m.Promoted(generation.id, previous))
        old = frozenset(key for key in self.state.generations if key != generation.id)
        self.state.drained_watch[generation.id] = old
        if change is not None:
            for operation in change.operations:
                self.settle(operation, ok=True, generation=generation.id)
        if self.state.scaling is not None:
            self.end_scaling(
                ok=False, reason="a reload came between; the new generation has its own number of workers"
            )
        if previous is not None:
            self.drain(self.state.generations[previous])
        self.check_drained()
        self.after_change()

    def fail(self, generation: m.Generation, reason: str, output: str = "") -> None:
        """A new generation did not make it: whoever asked is told at once, what was started is ended."""
        self.move(generation, GenerationState.FAILED)
        generation.reason, generation.deadline = reason, None
        generation.respawn_at.clear()
        change, self.state.change = self.state.change, None
        if change is not None:
            for operation in change.operations:
                self.settle(operation, ok=False, reason=reason, output=output, generation=generation.id)
        leaving = []
        for worker in list(generation.workers.values()):
            if worker.state in {WorkerState.ACTIVE, WorkerState.ACTIVATING}:
                leaving.append(worker)  # may have accepted: what it has, it hands back
            else:
                self.terminate(generation, worker, "its generation failed")
        self.quiet(generation, leaving)
        self.release_if_empty(generation)
        if change is not None and change.first and self.state.stopping is None:
            self.begin_stop(status=3)
        self.after_change()
        self.recover_if_lost()

    def after_change(self) -> None:
        """A change has ended: the requests that came meanwhile start the next one."""
        if self.state.stopping is not None or self.state.change is not None:
            return
        if self.state.queued:
            operations, self.state.queued = self.state.queued, ()
            self.start_change(operations)

    def recover_if_lost(self) -> None:
        """Nothing serves and the old code is gone from the disk: the code that is there is tried, again and again."""
        if self.is_lost() and self.state.recover_at is None:
            self.state.recover_at = self.now + backoff(self.state.recover_streak)
            self.state.recover_streak += 1

    def is_lost(self) -> bool:
        """Whether no worker serves (a hung one doesn't), and none is about to."""
        state = self.state
        if state.current is None or state.stopping is not None or state.change is not None:
            return False
        current = state.generations[state.current]
        return not current.respawn_at and not current.having(m.STARTING | {WorkerState.ACTIVE})

    # ------------------------------------------------------------------------------------------ leaving workers

    def drain(self, generation: m.Generation) -> None:
        """Retire a generation: its workers stop accepting, hand their connections over, finish, and end."""
        self.move(generation, GenerationState.DRAINING)
        generation.respawn_at.clear()
        generation.deadline = None
        leaving = []
        for worker in list(generation.workers.values()):
            if worker.state in {WorkerState.BOOTING, WorkerState.READY}:
                self.terminate(generation, worker, "its generation was replaced before it was ready")
            elif worker.state in {WorkerState.ACTIVATING, WorkerState.ACTIVE, WorkerState.HUNG}:
                leaving.append(worker)
        self.quiet(generation, leaving)
        self.release_if_empty(generation)

    def quiet(self, generation: m.Generation, workers: list[m.Worker]) -> None:
        """First phase: all that leave stop accepting and reading the relay, before any of them sends."""
        for worker in workers:
            worker.state = WorkerState.QUIETING
            worker.deadline = self.now + QUIET_TIMEOUT_S + SCALE_SLACK_S
            self.command(generation, worker, Verb.QUIET, QUIET_TIMEOUT_S)

    def hand_over_if_quiet(self, generation: m.Generation) -> None:
        """Second phase, once nobody of the generation is left in the first."""
        if any(worker.state is WorkerState.QUIETING for worker in generation.workers.values()):
            return
        for worker in generation.having(frozenset({WorkerState.QUIET})):
            worker.state = WorkerState.DRAINING
            budget = generation.limits.drain_timeout
            worker.deadline = self.now + budget + SCALE_SLACK_S
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

    def stop_worker(self, generation: m.Generation, worker: m.Worker, budget: float) -> None:
        worker.state = WorkerState.STOPPING
        worker.deadline = self.now + budget + 2 * SCALE_SLACK_S
        self.command(generation, worker, Verb.STOP, COMMAND_TIMEOUT_S, budget=budget)

    def terminate(self, generation: m.Generation, worker: m.Worker, cause: str) -> None:
        """End a worker that serves nobody: SIGTERM, and SIGKILL if that isn't enough."""
        if worker.state in {WorkerState.STOPPING, WorkerState.KILLED}:
            return
        worker.state, worker.cause = WorkerState.STOPPING, cause
        worker.deadline = self.now + TERM_GRACE_S
        self.effects.append(m.Kill(generation.id, worker.id, now=False))

    def kill(self, generation: m.Generation, worker: m.Worker, cause: str) -> None:
        if worker.state is not WorkerState.KILLED:
            self.say("warning", "worker-killed", generation, worker, reason=cause)
        worker.state, worker.cause, worker.deadline = WorkerState.KILLED, cause, None
        self.effects.append(m.Kill(generation.id, worker.id, now=True))

    # ------------------------------------------------------------------------------------- starting workers

    def spawn(self, generation: m.Generation, gated: bool = False, replaces: int | None = None) -> None:
        number = generation.next_worker
        generation.next_worker += 1
        worker = m.Worker(number, WorkerState.BOOTING, deadline=None, heard=self.now, replaces=replaces)
        if generation.id == self.state.current:
            worker.deadline = self.now + generation.limits.ready_timeout
        worker.drain_mode = self.state.drain_mode
        generation.workers[number] = worker
        self.effects.append(m.Spawn(generation.id, number, gated, self.state.drain_mode))

    def activate(self, generation: m.Generation, worker: m.Worker) -> None:
        worker.state = WorkerState.ACTIVATING
        worker.deadline = self.now + ACTIVATE_TIMEOUT_S + SCALE_SLACK_S
        if worker.drain_mode != self.state.drain_mode:
            self.tell_drain(generation, worker)
        self.command(generation, worker, Verb.ACTIVATE, ACTIVATE_TIMEOUT_S)

    def respawn_later(self, generation: m.Generation) -> None:
        generation.respawn_at.append(self.now + backoff(generation.streak))

    def fill(self, generation: m.Generation) -> None:
        """Bring the current generation to the number of workers that it shall have."""
        if generation.id != self.state.current or self.state.ending:
            return
        replacements = {worker.replaces: worker for worker in generation.workers.values()}
        staying = generation.having(SERVING_OR_STARTING)
        count = sum(1 for worker in staying if worker.id not in replacements) + len(generation.respawn_at)
        while count < generation.wanted:
            self.respawn_later(generation)
            count += 1
        while count > generation.wanted and generation.respawn_at:
            generation.respawn_at.remove(max(generation.respawn_at))
            count -= 1
        # the least useful go first, and with one that would be replaced its replacement
        surplus = [worker for worker in staying if worker.replaces is None]
        surplus.sort(key=lambda worker: (_usefulness(worker), -worker.id))
        for worker in surplus[: max(0, count - generation.wanted)]:
            for leaving in (replacements.get(worker.id), worker):
                if leaving is not None:
                    leaving.replaces = None
                    self.leave(generation, leaving, "fewer workers were asked for")
        self.replace_next(generation)

    def replace(self, generation: m.Generation, worker: m.Worker, why: str) -> None:
        """Start-first: another worker of the same generation, and this one leaves when that one serves."""
        if not worker.replace_why:
            worker.replace_why = why
            self.replace_next(generation)

    def replace_next(self, generation: m.Generation) -> None:
        """One at a time: the first that is to be replaced, and does not wait after a try that failed."""
        if generation.id != self.state.current or self.state.ending:
            return
        if any(other.replaces is not None for other in generation.workers.values()):
            return
        for worker in generation.having(m.SERVING):
            if worker.replace_why and worker.deadline is None:
                self.say("warning", "worker-replaced", generation, worker, reason=worker.replace_why)
                self.spawn(generation, gated=True, replaces=worker.id)
                return

    def start_failed(self, generation: m.Generation, worker: m.Worker, reason: str, output: str = "") -> None:
        """One that the current generation wanted does not come: what it was for is given up, or tried again later."""
        generation.streak += 1
        if worker.replaces is not None:
            self.replace_later(generation, worker, backoff(generation.streak))
        elif self.state.scaling is not None:
            self.undo_scaling(generation, reason, output)
        else:
            self.respawn_later(generation)

    def replace_later(self, generation: m.Generation, replacement: m.Worker, delay: float) -> None:
        """The replacement does not come. Whom it was for stays until another try, and others have their turn."""
        replaced = generation.workers.get(replacement.replaces) if replacement.replaces is not None else None
        replacement.replaces = None
        if replaced is not None and replaced.state in m.SERVING:
            replaced.deadline = self.now + delay
        self.replace_next(generation)

    # ------------------------------------------------------------------------------------------- worker events

    def boot_phase(self, _: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        assert isinstance(event, m.WorkerPhased)
        worker.phase = event.phase

    def became_ready(self, generation: m.Generation, worker: m.Worker, _: m.WorkerEvent) -> None:
        worker.state, worker.deadline = WorkerState.READY, None
        self.say("info", "worker-ready", generation, worker)
        if generation.state is GenerationState.BOOTING:
            if all(other.state is WorkerState.READY for other in generation.workers.values()):
                self.stage(generation)
        elif generation.id == self.state.current:
            self.activate(generation, worker)
        else:
            self.terminate(generation, worker, "it is no longer needed")

    def activated(self, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        assert isinstance(event, m.Activated)
        if event.error:
            reason = f"worker {worker.id} could not be activated: {event.error}"
            if generation.state is GenerationState.STAGED:
                self.fail(generation, reason)
            else:
                self.kill(generation, worker, reason)
                self.start_failed(generation, worker, reason)
            return
        worker.state, worker.deadline = WorkerState.ACTIVE, None
        if generation.state is GenerationState.STAGED:
            if all(other.state is WorkerState.ACTIVE for other in generation.workers.values()):
                self.promote(generation)
            return
        self.say("info", "worker-active", generation, worker)
        generation.streak = 0
        replaced = generation.workers.get(worker.replaces) if worker.replaces else None
        worker.replaces = None
        if replaced is not None:
            self.leave(generation, replaced, "it was replaced")
        self.fill(generation)

    def woke_up(self, _: m.Generation, worker: m.Worker, __: m.WorkerEvent) -> None:
        worker.state = WorkerState.ACTIVE  # its replacement goes on, and then it leaves in peace

    def hand_over_again(self, generation: m.Generation, worker: m.Worker, _: m.WorkerEvent) -> None:
        if worker.handover_refused and not generation.having(frozenset({WorkerState.QUIETING})):
            worker.handover_refused = False
            assert worker.deadline is not None
            budget = max(0.0, worker.deadline - SCALE_SLACK_S - self.now)
            self.command(generation, worker, Verb.HAND_OVER, COMMAND_TIMEOUT_S, budget=budget)

    def asks(self, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        assert isinstance(event, m.WorkerAsks)
        self.replace(generation, worker, event.why)

    def quieted(self, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        assert isinstance(event, m.Quieted)
        if event.error:
            self.say("warning", "worker-silent", generation, worker, reason=event.error)
        worker.state, worker.deadline = WorkerState.QUIET, None
        self.hand_over_if_quiet(generation)

    def handing_over(self, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        assert isinstance(event, m.HandingOver)
        if event.error:
            self.say("warning", "worker-silent", generation, worker, reason=event.error)
            worker.handover_refused = True

    def drained(self, generation: m.Generation, worker: m.Worker, _: m.WorkerEvent) -> None:
        self.stop_worker(generation, worker, generation.limits.stop_timeout)

    def stop_taken(self, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        assert isinstance(event, m.StopTaken)
        if event.error:
            self.effects.append(m.Kill(generation.id, worker.id, now=False))

    def drain_told(self, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        assert isinstance(event, m.DrainTold)
        worker.drains_unanswered = max(0, worker.drains_unanswered - 1)
        if worker.drains_unanswered:
            return  # to an older one
        change = self.state.drain_change
        if not event.error:
            if change is not None:
                change.pending.discard((generation.id, worker.id))
            return
        reason = (
            f"worker {worker.id} of generation {generation.id} did not take the drain mode: {event.error}"
        )
        if change is not None and (generation.id, worker.id) in change.pending:
            self.end_drain_change(ok=False, reason=reason)
        if generation.state is GenerationState.STAGED:
            self.fail(generation, reason)
        elif worker.state is WorkerState.ACTIVATING:
            self.kill(generation, worker, reason)
            self.start_failed(generation, worker, reason)
        elif worker.state in m.SERVING:
            self.replace(generation, worker, reason)

    def boot_failed(self, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        """Death before it was active."""
        assert isinstance(event, m.WorkerExited)
        del generation.workers[worker.id]
        if generation.state in {GenerationState.BOOTING, GenerationState.STAGED}:
            self.fail(generation, f"worker {worker.id} {event.reason}", event.output)
        elif generation.id == self.state.current:
            self.say(
                "error", "worker-start-failed", generation, worker, reason=event.reason, output=event.output
            )
            self.start_failed(generation, worker, f"worker {worker.id} {event.reason}", event.output)
        self.release_if_empty(generation)

    def crashed(self, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        """Death of one that served."""
        assert isinstance(event, m.WorkerExited)
        del generation.workers[worker.id]
        self.say("error", "worker-died", generation, worker, reason=event.reason, output=event.output)
        if generation.state is GenerationState.STAGED:
            self.fail(generation, f"worker {worker.id} {event.reason}", event.output)
        elif generation.id == self.state.current:
            replacement = next((o for o in generation.workers.values() if o.replaces == worker.id), None)
            if replacement is not None:
                replacement.replaces = None  # it is the respawn now
                self.replace_next(generation)
            else:
                self.respawn_later(generation)
        self.release_if_empty(generation)

    def ended(self, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        """Death of one that was leaving."""
        assert isinstance(event, m.WorkerExited)
        expected = worker.state in {WorkerState.STOPPING, WorkerState.KILLED}
        if event.status != 0 and worker.cause == STOPPING_CAUSE and self.state.stopping is not None:
            self.state.stopping.status = self.state.stopping.status or 1  # something was cut off
        del generation.workers[worker.id]
        level = "info" if expected else "error"
        self.say(level, "worker-ended", generation, worker, reason=event.reason, cause=worker.cause)
        self.hand_over_if_quiet(generation)
        self.fill(generation)
        self.release_if_empty(generation)

    def code_changed(self, generation: m.Generation, worker: m.Worker, event: m.WorkerEvent) -> None:
        """The respawn does not take part: two codes would serve side by side under one generation's name."""
        assert isinstance(event, m.CodeChanged)
        if worker.started:
            self.terminate(generation, worker, "its code is not its generation's")
        else:
            del generation.workers[worker.id]
        reason = f"{event.what}; run a reload to move to the new code"
        if worker.replaces is not None:
            self.replace_later(generation, worker, BACKOFF_CAP_S)
        elif self.state.scaling is not None:
            self.undo_scaling(generation, reason)
        else:
            generation.missing += 1
        self.say("warning", "generation-short", generation, worker, reason=reason, missing=generation.missing)
        self.recover_if_lost()

    def never_started(self, generation: m.Generation, worker: m.Worker, _: m.WorkerEvent) -> None:
        """It was given up while its code was being compared, and now it isn't started at all."""
        if not worker.started:
            del generation.workers[worker.id]
            self.fill(generation)
            self.release_if_empty(generation)

    def ignored(self, _: m.Generation, __: m.Worker, ___: m.WorkerEvent) -> None:
        """Repeated, or overtaken by something that has happened since."""

    # ------------------------------------------------------------------------------------ scale, drain, stop

    def scale_asked(self, event: m.ScaleAsked) -> None:
        state = self.state
        current = state.generations.get(state.current) if state.current is not None else None
        refusal = ""
        if state.stopping is not None:
            refusal = STOPPING_CAUSE
        elif state.change is not None or current is None:
            refusal = "a reload is running; try again when it has ended"
        elif state.scaling is not None and state.scaling.operation is not None:
            refusal = "the number of workers is being changed already"
        if refusal or current is None:
            if event.operation is not None:
                self.settle(event.operation, ok=False, reason=refusal)
            elif state.stopping is None:
                state.scale_delta += event.delta  # its turn comes
            return
        count = event.count if event.count is not None else current.target + event.delta
        if count < 1:
            if event.operation is not None:
                self.settle(event.operation, ok=False, reason=f"{count} workers can't serve; 1 is the least")
            return
        self.say("info", "scale", current, None, workers=count, before=current.target)
        if state.scaling is None:
            state.scaling = m.Scaling(event.operation, current.id, current.target, current.missing)
        state.scaling.operation = event.operation  # a nudge under way is overtaken; what it began at stays
        current.target, current.missing = count, 0
        self.fill(current)

    def check_scaling(self) -> None:
        if self.state.scaling is not None:
            generation = self.state.generations[self.state.scaling.generation]
            if len(generation.having(m.SERVING)) == generation.target and not generation.having(m.STARTING):
                self.end_scaling(ok=True)

    def undo_scaling(self, generation: m.Generation, reason: str, output: str = "") -> None:
        """It can't be done: back to the number that there was."""
        assert self.state.scaling is not None
        generation.target, generation.missing = self.state.scaling.before, self.state.scaling.missing
        self.end_scaling(ok=False, reason=reason, output=output)
        self.fill(generation)

    def end_scaling(self, ok: bool, reason: str = "", output: str = "") -> None:
        scaling, self.state.scaling = self.state.scaling, None
        if scaling is not None and scaling.operation is not None:
            self.settle(scaling.operation, ok=ok, reason=reason, output=output, generation=scaling.generation)

    def drain_asked(self, event: m.DrainAsked) -> None:
        if self.state.stopping is not None:
            self.settle(event.operation, ok=False, reason=STOPPING_CAUSE)
            return
        self.end_drain_change(ok=False, reason="another drain request came after it")
        self.state.drain_mode = event.mode
        self.state.drain_change = m.DrainChange(event.operation, set())
        self.say("info", "drain", None, None, mode=event.mode or "off")
        for generation in self.state.generations.values():
            for worker in generation.having(m.SERVING | m.LEAVING | {WorkerState.ACTIVATING}):
                self.tell_drain(generation, worker)
                self.state.drain_change.pending.add((generation.id, worker.id))

    def tell_drain(self, generation: m.Generation, worker: m.Worker) -> None:
        worker.drain_mode = self.state.drain_mode
        worker.drains_unanswered += 1
        self.command(generation, worker, Verb.DRAIN, COMMAND_TIMEOUT_S, mode=self.state.drain_mode)

    def check_drain_change(self) -> None:
        change = self.state.drain_change
        if change is None:
            return
        change.pending = {
            (generation, worker)
            for generation, worker in change.pending
            if generation in self.state.generations and worker in self.state.generations[generation].workers
        }
        if not change.pending:
            self.end_drain_change(ok=True)

    def end_drain_change(self, ok: bool, reason: str = "") -> None:
        change, self.state.drain_change = self.state.drain_change, None
        if change is not None:
            self.settle(change.operation, ok=ok, reason=reason, generation=self.state.current)

    def stop_asked(self, event: m.StopAsked) -> None:
        operations = (event.operation,) if event.operation is not None else ()
        stopping = self.state.stopping
        if stopping is None:
            # Exit 0 only from a stop of something that served, or that had not yet begun to.
            status = 0 if self.state.serving or self.state.current is None else 1
            stopping = m.Stopping((), begun=False, deadline=self.now + event.delay, status=status)
            self.state.stopping = stopping
            self.say("info", "stopping", None, None, delay_s=event.delay, budget_s=event.budget)
            for generation in self.state.generations.values():
                generation.limits = m.Limits(
                    generation.limits.ready_timeout,
                    generation.limits.drain_timeout,
                    event.budget,
                    generation.limits.heartbeat_timeout,
                )
            self.refuse_waiting(STOPPING_CAUSE)
        elif event.operation is None:
            event = m.StopAsked(None, at_once=True)  # the second signal
        stopping.operations += operations
        if event.at_once:
            stopping.begun, stopping.deadline = True, None
            for generation in self.state.generations.values():
                generation.respawn_at.clear()
                for worker in generation.workers.values():
                    if worker.cause == STOPPING_CAUSE:
                        stopping.status = stopping.status or 1  # it was to finish, and had not
                    self.kill(generation, worker, "stop at once")
            self.exit_if_empty()
        elif not stopping.begun and event.delay <= 0:
            self.begin_stop(stopping.status)

    def refuse_waiting(self, reason: str) -> None:
        """A stop has come: everybody who waits for something else gets the answer now."""
        queued, self.state.queued = self.state.queued, ()
        for operation in queued:
            self.settle(operation, ok=False, reason=reason)
        self.end_scaling(ok=False, reason=reason)
        self.state.recover_at = None
        self.end_drain_change(ok=False, reason=reason)
        if self.state.change is not None:
            self.fail(self.state.generations[self.state.change.generation], reason)

    def begin_stop(self, status: int) -> None:
        """Tell every worker to finish and end."""
        self.refuse_waiting(_STOP_REASONS.get(status, STOPPING_CAUSE))
        if self.state.current is not None and not self.state.serving:
            status = status or 1
        operations = self.state.stopping.operations if self.state.stopping else ()
        self.state.stopping = m.Stopping(operations, begun=True, deadline=None, status=status)
        for generation in list(self.state.generations.values()):
            generation.respawn_at.clear()
            generation.deadline = None
            for worker in list(generation.workers.values()):
                if worker.state in STARTING_IDLE:
                    self.terminate(generation, worker, "it was still starting")
                elif worker.state is WorkerState.STOPPING:
                    latest = self.now + generation.limits.stop_timeout + 2 * SCALE_SLACK_S
                    worker.deadline = min(latest, worker.deadline or latest)
                elif worker.state is not WorkerState.KILLED:
                    worker.cause = STOPPING_CAUSE
                    self.stop_worker(generation, worker, generation.limits.stop_timeout)
        self.exit_if_empty()

    def exit_if_empty(self) -> None:
        stopping = self.state.stopping
        if stopping is None or not stopping.begun:
            return
        if any(generation.workers for generation in self.state.generations.values()):
            return
        for operation in stopping.operations:
            self.settle(operation, ok=stopping.status == 0, reason=_STOP_REASONS.get(stopping.status, ""))
        stopping.operations = ()
        self.effects.append(m.Exit(stopping.status))

    # ------------------------------------------------------------------------------------------------- time

    def paused(self, event: m.Paused) -> None:
        """Nobody is to blame for silence while the master itself stood still: every deadline starts anew."""
        shift = event.seconds
        self.say("warning", "paused", None, None, seconds=round(shift, 1))
        if self.state.recover_at is not None:
            self.state.recover_at += shift
        if self.state.stopping is not None and self.state.stopping.deadline is not None:
            self.state.stopping.deadline += shift
        for generation in self.state.generations.values():
            if generation.deadline is not None:
                generation.deadline += shift
            generation.respawn_at = [time + shift for time in generation.respawn_at]
            for worker in generation.workers.values():
                worker.heard += shift
                if worker.deadline is not None:
                    worker.deadline += shift

    def time_passed(self, _event: m.TimePassed) -> None:
        stopping = self.state.stopping
        if stopping is not None and stopping.deadline is not None and stopping.deadline <= self.now:
            self.begin_stop(stopping.status)
        for generation in list(self.state.generations.values()):
            if generation.deadline is not None and generation.deadline <= self.now:
                self.generation_late(generation)
            due = sum(1 for time in generation.respawn_at if time <= self.now)
            generation.respawn_at = [time for time in generation.respawn_at if time > self.now]
            for _unused in range(due):
                self.spawn(generation, gated=True)
            for worker in list(generation.workers.values()):
                if worker.deadline is not None and worker.deadline <= self.now:
                    self.worker_late(generation, worker)
                if worker.state in _WATCHED:
                    self.check_heartbeat(generation, worker)
        if self.state.recover_at is not None and self.state.recover_at <= self.now:
            self.state.recover_at = None
            if self.is_lost():
                self.start_change(())

    def generation_late(self, generation: m.Generation) -> None:
        timeout = generation.limits.ready_timeout
        if not generation.workers:
            self.fail(generation, f"its settings could not be read within {PREPARE_TIMEOUT_S:g} s")
            return
        late = [worker for worker in generation.workers.values() if worker.state is WorkerState.BOOTING]
        places = ", ".join(f"worker {worker.id} is in {worker.phase}" for worker in late)
        self.fail(generation, f"not ready within {timeout:g} s (ready-timeout): {places}")

    def worker_late(self, generation: m.Generation, worker: m.Worker) -> None:
        if worker.state in {WorkerState.STOPPING, WorkerState.DRAINING}:
            if worker.cause == STOPPING_CAUSE and self.state.stopping is not None:
                self.state.stopping.status = self.state.stopping.status or 1
            self.kill(generation, worker, f"it did not end in time ({worker.state})")
        elif worker.state is WorkerState.BOOTING:
            reason = f"was not ready within {generation.limits.ready_timeout:g} s (it is in {worker.phase})"
            self.kill(generation, worker, reason)
            self.start_failed(generation, worker, f"worker {worker.id} {reason}")
        elif worker.state in m.SERVING:
            worker.deadline = None
            self.replace_next(generation)
        else:
            # ACTIVATING and QUIETING have an answer coming, if only that there was none
            WORKER[_LATE[worker.state], worker.state](
                self, generation, worker, _LATE[worker.state](generation.id, worker.id, "no answer")
            )

    def check_heartbeat(self, generation: m.Generation, worker: m.Worker) -> None:
        if worker.heard + generation.limits.heartbeat_timeout > self.now:
            return
        reason = f"its event loop has been silent for {self.now - worker.heard:.1f} s"
        if worker.state is WorkerState.ACTIVE and generation.state is GenerationState.ACTIVE:
            worker.state = WorkerState.HUNG
            self.replace(generation, worker, reason)
        elif generation.state is GenerationState.STAGED or generation.state is GenerationState.BOOTING:
            self.fail(generation, f"worker {worker.id}: {reason}")
        else:
            self.kill(generation, worker, reason)

    # ------------------------------------------------------------------------------------------------ small

    def command(
        self,
        generation: m.Generation,
        worker: m.Worker,
        verb: Verb,
        timeout: float,
        *,
        budget: float = 0.0,
        mode: str | None = None,
    ) -> None:
        self.effects.append(m.Command(generation.id, worker.id, verb, timeout, budget, mode))

    def settle(
        self, operation: int, *, ok: bool, reason: str = "", output: str = "", generation: int | None = None
    ) -> None:
        self.effects.append(m.Settle(operation, ok, reason, output, generation))

    def say(
        self,
        level: str,
        event: str,
        generation: m.Generation | None,
        worker: m.Worker | None,
        **fields: str | int | float,
    ) -> None:
        where: dict[str, str | int | float] = {}
        if generation is not None:
            where["generation"] = generation.id
        if worker is not None:
            where["worker"] = worker.id
        self.effects.append(
            m.Say(level, event, where | {key: value for key, value in fields.items() if value != ""})
        )

    def move(self, generation: m.Generation, state: GenerationState) -> None:
        if state not in m.TRANSITIONS[generation.state]:
            raise AssertionError(f"generation {generation.id} can't go from {generation.state} to {state}")
        generation.state, generation.since = state, self.now

    def release_if_empty(self, generation: m.Generation) -> None:
        """A generation that was replaced, or failed, ends with its last process."""
        if generation.workers or generation.id not in self.state.generations:
            return
        if generation.state in {GenerationState.DRAINING, GenerationState.FAILED}:
            failed = generation.state is GenerationState.FAILED
            self.move(generation, GenerationState.RETIRED)
            del self.state.generations[generation.id]
            self.effects.append(m.Released(generation.id, failed))
            self.check_drained()
        self.exit_if_empty()

    def check_drained(self) -> None:
        for promoted, old in list(self.state.drained_watch.items()):
            if not any(generation in self.state.generations for generation in old):
                del self.state.drained_watch[promoted]
                self.effects.append(m.AllDrained(promoted))


def _usefulness(worker: m.Worker) -> int:
    if worker.state is not WorkerState.ACTIVE:
        return 1 if worker.state is WorkerState.HUNG else 0
    return 2 if worker.replace_why else 3


STARTING_IDLE = frozenset({WorkerState.BOOTING, WorkerState.READY})
SERVING_OR_STARTING = m.SERVING | m.STARTING
_STOP_REASONS = {1: "it was not a clean stop", 3: "the first generation did not start"}
_LATE: dict[WorkerState, type[m.Activated] | type[m.Quieted]] = {
    WorkerState.ACTIVATING: m.Activated,
    WorkerState.QUIETING: m.Quieted,
}

_Handler = Callable[[_Machine, m.Generation, m.Worker, m.WorkerEvent], None]
_S = WorkerState
_ignored = _Machine.ignored


def _row(
    event: type[m.WorkerEvent], **columns: _Handler
) -> dict[tuple[type[m.WorkerEvent], WorkerState], _Handler]:
    """One event's row of the table; what isn't named comes too late, or again, and is ignored."""
    return {(event, state): columns.get(state.name.lower(), _ignored) for state in WorkerState}


WORKER: dict[tuple[type[m.WorkerEvent], WorkerState], _Handler] = {
    **_row(m.WorkerPhased, booting=_Machine.boot_phase),
    **_row(m.WorkerReady, booting=_Machine.became_ready, hung=_Machine.woke_up),
    **_row(m.WorkerBeat, hung=_Machine.woke_up, draining=_Machine.hand_over_again),
    **_row(m.WorkerAsks, active=_Machine.asks),
    **_row(m.Activated, activating=_Machine.activated),
    **_row(m.Quieted, quieting=_Machine.quieted),
    **_row(m.HandingOver, draining=_Machine.handing_over),
    **_row(m.WorkerDrained, draining=_Machine.drained),
    **_row(m.StopTaken, stopping=_Machine.stop_taken),
    **_row(
        m.DrainTold,
        activating=_Machine.drain_told,
        active=_Machine.drain_told,
        hung=_Machine.drain_told,
        quieting=_Machine.drain_told,
        quiet=_Machine.drain_told,
        draining=_Machine.drain_told,
    ),
    **_row(
        m.WorkerExited,
        booting=_Machine.boot_failed,
        ready=_Machine.boot_failed,
        activating=_Machine.boot_failed,
        active=_Machine.crashed,
        hung=_Machine.crashed,
        quieting=_Machine.ended,
        quiet=_Machine.ended,
        draining=_Machine.ended,
        stopping=_Machine.ended,
        killed=_Machine.ended,
    ),
    **_row(
        m.CodeChanged,
        booting=_Machine.code_changed,
        stopping=_Machine.never_started,
        killed=_Machine.never_started,
    ),
}
"""What each message of or about a worker means in each of its states. Total: states × events."""

_EVENTS: dict[type[m.Event], Callable[[_Machine, m.Event], None]] = {
    m.ReloadAsked: _Machine.reload_asked,  # type: ignore[dict-item]
    m.ScaleAsked: _Machine.scale_asked,  # type: ignore[dict-item]
    m.DrainAsked: _Machine.drain_asked,  # type: ignore[dict-item]
    m.StopAsked: _Machine.stop_asked,  # type: ignore[dict-item]
    m.Prepared: _Machine.prepared,  # type: ignore[dict-item]
    m.PrepareFailed: _Machine.prepare_failed,  # type: ignore[dict-item]
    m.Paused: _Machine.paused,  # type: ignore[dict-item]
    m.TimePassed: _Machine.time_passed,  # type: ignore[dict-item]
}

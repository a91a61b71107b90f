"""What must hold after every step of the lifecycle, whatever has happened: the "Never" list, and that nothing gets stuck."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from simulated_worker import HANDOVER_S

from segue.supervisor import model as m
from segue.supervisor.model import (
    ChangePhase,
    GenerationState,
    PromotePhase,
    ServicesState,
    SwapPhase,
    Verb,
    WorkerState,
)
from segue.supervisor.retirement import offered

if TYPE_CHECKING:
    from simulator import World

LATE_S = 1.0
"""How much later than promised counts as in time."""


def _reachable(state: GenerationState) -> frozenset[GenerationState]:
    """Where one step may take it: several transitions can be one."""
    reached, todo = {state}, [state]
    while todo:
        for following in m.TRANSITIONS[todo.pop()] - reached:
            reached.add(following)
            todo.append(following)
    return frozenset(reached)


_REACHABLE = {state: _reachable(state) for state in GenerationState}
_TAKES_WORK = frozenset({WorkerState.ACTIVATING, WorkerState.ACTIVE})
_HEARS = _TAKES_WORK | {WorkerState.QUIETING, WorkerState.QUIET, WorkerState.DRAINING}


def adopted(world: World, before: m.State, effects: list[m.Effect]) -> None:
    """A new master has all that there is, and nobody's connections are left alone for it."""
    state = world.state
    known = {(g.id, w.id) for g in state.generations.values() for w in g.workers.values()}
    known -= {(each.generation, each.worker) for each in effects if isinstance(each, m.Spawn)}
    living = {process.key for process in world.living.values()}
    assert known == living, f"adopted {known}, and there are {living}; {world.describe()}"
    accepting = {process.key[0] for process in world.living.values() if process.accepts and not process.hung}
    assert not accepting or state.current is not None, f"{accepting} accept, and none is the current one"
    numbers = {before.next_generation, *(number + 1 for number in before.generations)}
    assert state.next_generation >= max(numbers) or world.shell.is_behind, (
        "a generation's number is given again"
    )


class Checks:
    """What must hold after every step."""

    def __init__(self, world: World, before: m.State, event: m.Event, effects: list[m.Effect]) -> None:
        self.world = world
        self.before = before
        self.event = event
        self.effects = effects
        self.after = world.state

    def all(self) -> None:
        """One after the other."""
        for check in self.each:
            check()

    @property
    def each(self) -> tuple[Callable[[], None], ...]:
        return (
            self.transitions,
            self.one_generation_is_active,
            self.current_one_stays,
            self.generations_end,
            self.processes_are_known,
            self.askers_are_remembered,
            self.spawns,
            self.commands,
            self.kills,
            self.never_zero_serving,
            self.no_two_generations_accept,
            self.serving_is_known,
            self.numbers,
            self.probation,
            self.kept,
            self.one_is_kept,
            self.ways_on,
            self.one_lead,
            self.services_are_known,
            self.services_cease,
            self.versions,
            self.swaps_go_on,
        )

    def fail(self, what: str) -> None:
        raise AssertionError(
            f"{what}\n  after {self.event}\n  effects {self.effects}\n{self.world.describe()}"
        )

    def transitions(self) -> None:
        for number, generation in self.before.generations.items():
            later = self.after.generations.get(number)
            state = GenerationState.RETIRED if later is None else later.state
            if state not in _REACHABLE[generation.state]:
                self.fail(f"generation {number} went from {generation.state} to {state}")

    def one_generation_is_active(self) -> None:
        active = [g.id for g in self.after.generations.values() if g.state is GenerationState.ACTIVE]
        cleared = not active and (self.world.cleared or self.world.epoch > 1)
        if active != ([] if self.after.current is None else [self.after.current]) and not cleared:
            self.fail(f"{active} are active")
        ending = {GenerationState.DRAINING, GenerationState.FAILED, GenerationState.RETIRED}
        serves_again = {self.after.current, self.after.promote.generation if self.after.promote else None}
        for generation in self.after.generations.values():
            if generation.state is GenerationState.DRAINING and generation.id in serves_again:
                continue
            if generation.state in ending and not generation.workers and generation.id != self.after.current:
                self.fail(f"generation {generation.id} has ended and is not retired")

    def current_one_stays(self) -> None:
        """What serves, or served last, is let go only when another one has taken over from it."""
        current = self.after.current
        if current is None:
            if self.before.current is not None:
                self.fail("there is no current generation any more")
            return
        generation = self.after.generations.get(current)
        if generation is None or generation.state in {GenerationState.RETIRED, GenerationState.FAILED}:
            self.fail("the last good generation is given up")
        promoted = [effect.generation for effect in self.effects if isinstance(effect, m.Promoted)]
        if promoted != ([current] if current != self.before.current else promoted[:1]):
            self.fail(f"generation {current} is the current one, and {promoted} were promoted")

    def generations_end(self) -> None:
        """Each that was begun is there until it is released, once."""
        if self.after.generations.keys() != self.world.begun:
            self.fail(f"of the generations {self.world.begun} there are {self.after.generations.keys()}")

    def processes_are_known(self) -> None:
        """The lifecycle has every process that there is; and whatever it has is one, or is about to be, or has just ended."""
        known = {(g.id, w.id) for g in self.after.generations.values() for w in g.workers.values()}
        for process in self.world.living.values():
            if process.key not in known:
                self.fail(f"nobody knows of {process.key}")
            known.discard(process.key)
        ends = m.WorkerExited, m.CodeChanged
        told = {(e.generation, e.worker) for e in self.world.queue if isinstance(e, ends)}
        for key in known - told:
            ended = self.world.processes.get(key)
            if not self.world.shell.is_starting(key) and (ended is None or ended.reaped):
                self.fail(f"there is no worker {key}, and nobody will say so")

    def askers_are_remembered(self) -> None:
        """Whoever has no answer yet waits for something."""
        if len(self.world.asked) == len(self.world.answers):
            return
        state = self.after
        waiting: set[int | None] = {event.operation for event in state.queued}
        waiting |= {event.operation for event in state.swaps_queued}
        for several in (state.change, state.promote, state.stopping):
            waiting |= set(several.operations) if several is not None else set()
        for one in (*self.world.queue, state.scaling, state.scale_queued, state.drain_change, state.swap):
            waiting.add(getattr(one, "operation", None))
        if forgotten := self.world.asked.keys() - self.world.answers.keys() - waiting:
            self.fail(f"nobody will answer {forgotten}")

    def spawns(self) -> None:
        """Only for the current generation, and for the one that is to follow."""
        wanted = {self.after.current, *self.coming()}
        for effect in self.effects:
            if isinstance(effect, m.Spawn) and effect.generation not in wanted:
                self.fail("a worker is started for a generation that ends")

    def coming(self) -> set[int]:
        """Generations that are being brought up, or promoted."""
        return {each.generation for each in (self.after.change, self.after.promote) if each is not None}

    def kills(self) -> None:
        """SIGTERM is for those that never served, or that did not take a stop."""
        for effect in self.effects:
            if isinstance(effect, m.Kill) and not effect.now:
                worker = self.before.generations[effect.generation].workers.get(effect.worker)
                if worker is not None and worker.state not in {
                    WorkerState.BOOTING,
                    WorkerState.READY,
                    WorkerState.STOPPING,
                }:
                    self.fail("a worker that may have accepted connections is ended without handing over")

    def commands(self) -> None:
        current, promote = self.after.current, self.after.promote
        beside = {GenerationState.ACTIVATING, GenerationState.MIXED}
        over = {GenerationState.DRAINING, GenerationState.RETIRED}
        for effect in self.effects:
            if not isinstance(effect, m.Command):
                continue
            generation = self.after.generations[effect.generation]
            match effect.verb:
                case Verb.ACTIVATE:
                    if self.world.processes[generation.id, effect.worker].mode == "booting":
                        self.fail("a worker is activated before it is ready")
                    promoted = promote is not None and promote.generation == generation.id
                    if generation.id != current and not (promoted and generation.state in beside):
                        self.fail(
                            "a worker is activated that is neither of the current generation nor of one that is promoted"
                        )
                case Verb.QUIET:
                    replaced = generation.state in over and generation.id in self.world.promoted
                    if generation.id == current:
                        active = frozenset({WorkerState.ACTIVE})
                        if generation.id in self.world.harmed or generation.state is GenerationState.DRAINING:
                            continue
                        if not generation.having(active):
                            self.fail("the last worker is told to be quiet")
                        before = self.before.promote
                        if before is not None and before.phase is PromotePhase.CANARY and promote is not None:
                            self.fail("a worker hands over while a canary serves")
                    elif not replaced and generation.state is not GenerationState.FAILED:
                        self.fail("an old worker is told to be quiet before the promote")
                case Verb.HAND_OVER:
                    if generation.having(frozenset({WorkerState.QUIETING})):
                        self.fail("hand over, while a worker of the generation is still in the first phase")
                case _:
                    pass

    @property
    def is_serving(self) -> bool:
        """Whether the current generation is to serve: not while it makes room for what can't run beside it."""
        current = self.after.generations.get(self.after.current or 0)
        return current is not None and current.state is GenerationState.ACTIVE

    def never_zero_serving(self) -> None:
        if self.after.stopping is not None or self.before.current is None or not self.is_serving:
            return
        if self.after.current not in self.world.harmed and not self.world.serving():
            self.fail("nobody accepts, though nobody crashed, hung or was asked to stop")
        active = frozenset({WorkerState.ACTIVE})
        had = self.before.generations[self.before.current].having(active)
        assert self.after.current is not None
        has = self.after.generations[self.after.current].having(active)
        hung = self.after.generations[self.after.current].having(frozenset({WorkerState.HUNG}))
        if had and not has and not hung and not isinstance(self.event, m.WorkerExited):
            self.fail("the last worker that serves was taken away")

    def no_two_generations_accept(self) -> None:
        """Outside of a promote only the current one does; whoever else can be spoken with has ceased in a moment."""
        may = {self.after.current, self.after.promote.generation if self.after.promote is not None else None}
        for generation in self.after.generations.values():
            if generation.id not in may and generation.having(_TAKES_WORK):
                self.fail(f"generation {generation.id} may accept, and it isn't the current one")
        if self.after.stopping is not None or self.world.faults:
            return
        for process in self.world.living.values():
            number = process.key[0]
            if process.accepts and number not in may and not process.deaf:
                late = self.world.now - self.world.superseded[number]
                if late > LATE_S and number not in self.world.harmed:
                    self.fail(f"{process.key} still accepts after {late:.1f} s")

    def serving_is_known(self) -> None:
        """Who is believed to accept does, or is being told to; except for those that leave calls unanswered."""
        if self.after.current is None or self.after.stopping is not None:
            return
        for worker in self.after.generations[self.after.current].having(frozenset({WorkerState.ACTIVE})):
            process = self.world.processes[self.after.current, worker.id]
            excused = process.hung or process.deaf or not process.alive or process.calls
            if not process.accepts and not excused:
                self.fail(f"{process.key} does not accept, and nobody knows")

    def numbers(self) -> None:
        if self.after.current is None or (self.after.stopping and self.after.stopping.begun):
            return
        generation = self.after.generations[self.after.current]
        if not self.is_serving:
            if not self.after.changing and self.after.recover_at is None and self.after.stopping is None:
                self.fail("nothing serves, and nothing will be tried")
            return
        promote = self.after.promote
        if promote is not None and promote.phase is PromotePhase.ROLLING:
            new = self.after.generations[promote.generation]
            most = max(generation.wanted + generation.ceded, new.wanted)
            spawned = [
                each for each in self.effects if isinstance(each, m.Spawn) and each.generation == new.id
            ]
            if spawned and len(generation.workers) + len(new.workers) > most + 1:
                self.fail("more workers than one beyond the number that is wanted")
        replacing = [w for w in generation.workers.values() if w.replaces is not None]
        if len(replacing) > 1:
            self.fail("more than one worker is being replaced")
        staying = generation.having(m.SERVING | m.STARTING)
        replaced = {worker.replaces for worker in replacing}
        count = sum(1 for worker in staying if worker.id not in replaced) + len(generation.respawn_at)
        if count > generation.wanted:
            self.fail(f"{count} workers, though {generation.wanted} are wanted")
        going = [
            w for w in generation.workers.values() if w.state in {WorkerState.STOPPING, WorkerState.KILLED}
        ]
        if count < generation.wanted and not going:
            self.fail(f"{count} workers, though {generation.wanted} are wanted, and nothing will change it")
        trying = self.after.recover_at is not None or self.after.changing
        if generation.wanted <= 0 and not staying and not trying and self.after.stopping is None:
            self.fail("nothing is left, and nothing will be tried")

    def ways_on(self) -> None:
        """Whoever isn't where it may stay has a deadline, or something to wait for that has one."""
        state = self.after
        serving = {GenerationState.ACTIVE, GenerationState.ACTIVATING, GenerationState.MIXED}
        waiting = {GenerationState.STAGED, GenerationState.MIXED}
        kept = {GenerationState.DRAINING, GenerationState.PARKED, GenerationState.MIXED}
        for generation in state.generations.values():
            self.way_of(generation)
            replacing = any(worker.replaces is not None for worker in generation.workers.values())
            for worker in generation.workers.values():
                match worker.state:
                    case WorkerState.READY if state.swap is not None and not state.swap.decided:
                        on = True
                    case WorkerState.READY if generation.state in waiting:
                        on = True
                    case WorkerState.BOOTING | WorkerState.READY:
                        on = worker.deadline is not None or generation.deadline is not None
                    case WorkerState.ACTIVE:
                        on = generation.state in serving
                    case WorkerState.PARKED:
                        on = generation.warm_until is not None or generation.id in self.coming()
                        on = on and generation.state in kept
                    case WorkerState.HUNG:
                        on = worker.deadline is not None or replacing or state.stopping is not None
                    case WorkerState.QUIET:
                        on = bool(generation.having(frozenset({WorkerState.QUIETING})))
                    case _:
                        on = worker.deadline is not None
                if not on:
                    self.fail(
                        f"worker {worker.id} of generation {generation.id} has no way on from {worker.state}"
                    )
        if state.change is not None and state.generations[state.change.generation].state not in {
            GenerationState.BOOTING,
            GenerationState.STAGED,
        }:
            self.fail("the reload has ended, and doesn't know")
        if state.queued and not state.changing and state.swap is None:
            self.fail("reloads are queued behind nothing")
        if state.scaling is not None and state.scaling.operation is not None:
            current = state.generations[state.scaling.generation]
            if not current.having(m.STARTING) and not current.respawn_at:
                going = frozenset({WorkerState.STOPPING, WorkerState.KILLED})
                if not current.having(going):
                    self.fail("the scaling waits for nothing")

    def probation(self) -> None:
        """Each ends once, and what it finds wrong is seen to at once; nobody is watched who was gone back to."""
        before, after = self.before.probation, self.after.probation
        ended = [each.generation for each in self.effects if isinstance(each, m.ProbationEnded)]
        same = before is not None and after is not None and before.generation == after.generation
        if ended != ([before.generation] if before is not None and not same else []):
            self.fail(f"the probations of {ended} have ended")
        if after is None:
            return
        if self.after.stopping is not None:
            self.fail("a probation during a stop")
        watched = {self.after.current, *self.coming()}
        if after.generation not in watched or after.generation == after.previous:
            self.fail("the wrong one is on probation")
        if after.breach and self.after.promote is None:
            self.fail("something was found wrong, and nothing is done about it")
        if self.world.went_back and after.generation == self.after.current:
            self.fail("what was gone back to is on probation")

    def kept(self) -> None:
        """What a probation would go back to is there for as long as that lasts, unless somebody gives it up."""
        before, after = self.before.probation, self.after.probation
        if before is None or after is None or before.generation != after.generation:
            return
        number = after.previous
        was, stays = ({g.id for g in offered(state)} for state in (self.before, self.after))
        given_up = isinstance(self.event, m.DiscardAsked) or number in {self.after.current, *self.coming()}
        if number in was - stays and not given_up:
            self.fail(f"generation {number} is let go, though it may be gone back to")

    def one_is_kept(self) -> None:
        """However often there is a reload, one set of workers waits beside what serves, and one is staged."""
        coming = self.coming()
        others = [g for g in self.after.generations.values() if g.id not in coming]
        now = self.world.now
        kept = [g.id for g in others if max(g.kept_until or 0.0, g.warm_until or 0.0) > now]
        if len(kept) > 1:
            self.fail(f"generations {kept} are kept")
        staged = [g.id for g in others if g.state is GenerationState.STAGED]
        if len(staged) > 1:
            self.fail(f"generations {staged} are staged")

    def way_of(self, generation: m.Generation) -> None:
        """What a generation waits for."""
        state, change = generation.state, self.after.change
        activating = generation.having(frozenset({WorkerState.ACTIVATING}))
        on = True
        match state:
            case GenerationState.BOOTING if generation.deadline is None:
                promote = self.after.promote
                waits = change is not None and change.phase is ChangePhase.WAIT
                on = promote is not None and (waits or promote.phase is PromotePhase.CLEAR)
            case GenerationState.BOOTING:
                on = generation.id in self.coming()
            case GenerationState.MIXED:
                on = self.is_rolling_on(generation)
            case GenerationState.STAGED if change is not None and change.generation == generation.id:
                on = self.after.promote is not None
            case GenerationState.ACTIVATING:
                on = bool(activating) and generation.id in self.coming()
            case GenerationState.PARKED:
                on = generation.kept_until is not None or generation.id in self.coming()
        if not on:
            self.fail(f"generation {generation.id} stays {state}")

    def is_rolling_on(self, generation: m.Generation) -> bool:
        """Whether a generation that serves beside another waits for something that comes."""
        promote, current = self.after.promote, self.after.generations.get(self.after.current or 0)
        if promote is None or promote.generation != generation.id or current is None:
            return False
        coming = generation.having(frozenset({WorkerState.BOOTING, WorkerState.ACTIVATING}))
        leaving = [w for w in current.workers.values() if w.state not in m.SERVING]
        most = max(current.wanted + current.ceded, generation.wanted)
        if (
            len(current.workers) + len(generation.workers) > most
        ):  # there is room once one of its own has ended
            leaving += generation.having(m.LEAVING | {WorkerState.STOPPING, WorkerState.KILLED})
        return bool(coming or leaving) or promote.until is not None

    # Services

    def one_lead(self) -> None:
        """What only one process may have active never is in two; and the lifecycle knows of every one that has."""
        if len([process for process in self.world.living.values() if process.leads]) > 1:
            self.fail("two processes have active what only one may have")
        workers = {(g.id, w.id): w for g in self.after.generations.values() for w in g.workers.values()}
        if len([key for key, worker in workers.items() if worker.lead and key not in self.world.guessed]) > 1:
            self.fail("two workers may lead")
        for process in self.world.living.values():
            worker = workers.get(process.key)
            if worker is not None and process.leads and not worker.lead:
                self.fail(f"{process.key} leads, and that isn't known")
            if worker is not None and process.services_active and worker.services is ServicesState.IDLE:
                self.fail(f"{process.key} has active services, and that isn't known")

    def services_are_known(self) -> None:
        """What the lifecycle believes of services for certain is so, once nobody owes an answer about them."""
        for generation in self.after.generations.values():
            for worker in generation.having(_HEARS):
                process = self.world.processes[generation.id, worker.id]
                certain = worker.services is ServicesState.ACTIVE and not worker.replace_why
                owed = process.about_services.call is not None or process.hung or not process.alive
                if certain and not owed and not process.services_active:
                    self.fail(f"{process.key} has no active services, and nobody knows")

    def services_cease(self) -> None:
        """In a generation that no longer serves, and that can be spoken with, services cease in time."""
        for process in self.world.living.values():
            number = process.key[0]
            if not process.services_active or number == self.after.current:
                continue
            if number not in self.world.promoted:
                self.fail(f"{process.key} has active services, and its generation has never served")
            excused = process.deaf or number in self.world.harmed or "never deactivates" in self.world.faults
            late = self.world.now - self.world.idle_since[number] - HANDOVER_S
            if late > LATE_S and not excused:
                self.fail(f"{process.key} still has active services {late:.1f} s too late")

    def versions(self) -> None:
        """Whoever serves has what was decided, or follows, or is to be replaced."""
        swap = self.after.swap
        if self.after.current is None:
            return
        for worker in self.after.generations[self.after.current].having(m.TAKING_PART):
            process = self.world.processes[self.after.current, worker.id]
            share = swap.shares.get(worker.id) if swap is not None else None
            commits = share is not None and share.awaits is Verb.SWAP_COMMIT
            if not process.alive or worker.replace_why or commits:
                continue
            for service, record in self.after.services.items():
                if process.versions.get(service, 1) != record.version:
                    self.fail(f"{process.key} has another version of {service} than {record.version}")
            if process.versions.keys() - self.after.services.keys():
                self.fail(f"{process.key} has what was never decided")

    def swaps_go_on(self) -> None:
        """A swap that runs waits for something, and so do those that are queued."""
        state, swap = self.after, self.after.swap
        if swap is not None and not swap.decided and (state.changing or state.scaling is not None):
            self.fail("a swap runs beside a reload or a change of the number of workers")
        if swap is not None:
            waits = any(share.awaits for share in swap.shares.values())
            activating = state.generations[swap.generation].having(frozenset({WorkerState.ACTIVATING}))
            if not swap.decided and not waits and not (swap.phase is SwapPhase.PREPARE and activating):
                self.fail("the swap waits for nothing")
            if swap.decided and swap.deadline is None:
                self.fail("the swap may wait for ever")
        if state.scale_queued is not None and not (swap or state.changing or state.scaling):
            self.fail("a change of the number of workers is queued behind nothing")
        if state.swaps_queued and not (
            swap or state.changing or state.scaling or state.swaps_told or state.queued
        ):
            assert state.current is not None
            current = state.generations[state.current]
            if not current.respawn_at and not current.having(m.STARTING):
                self.fail("swaps are queued behind nothing")

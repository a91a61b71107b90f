"""The master: one loop that reads one queue of events, steps the lifecycle, and carries out its effects.

Signal handlers, sockets, timers and the control API only put events into the queue. What takes time (reading
settings, calling a worker) runs in a task whose end is one more event; nothing that blocks runs here. The master is
off the data path: no byte of a request, a response or a running worker's log passes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Coroutine, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from segue.handoff.http_server import Server
from segue.supervisor import (
    adoption,
    inherited,
    jobs,
    leftovers,
    lifecycle,
    memory,
    model,
    signals,
    upgrade,
)
from segue.supervisor import settings as config
from segue.supervisor.check import Verdict, try_out
from segue.supervisor.codes import Codes
from segue.supervisor.exits import Status
from segue.supervisor.history import RESTART, START, History
from segue.supervisor.journal import Journal
from segue.supervisor.log import Log
from segue.supervisor.mastership import Mastership
from segue.supervisor.operations import Operation, Operations
from segue.supervisor.readiness import Readiness
from segue.supervisor.requests import Requests
from segue.supervisor.ring import Ring
from segue.supervisor.snapshot import Snapshot
from segue.supervisor.snapshots import Snapshots
from segue.supervisor.systemd import PROGRESS_S, ServiceManager
from segue.supervisor.timeline import Timeline
from segue.supervisor.totals import Totals
from segue.supervisor.workers import Workers

if TYPE_CHECKING:
    from segue.supervisor.development import Development

LATE_S = 1.0
"""A timer that fires later than this says that the master itself did not run."""
EXECUTE = "execute"
"""The last phase of an upgrade: the old master ends in it, the new one begins."""
FLUSH_S = 1.0
"""How long a master that ends, or begins anew, waits for its last answers to be sent."""
_THREADS = 2
"""For reading files and looking up names: one may hang on a dead file system."""


class Master:
    """One instance: its sockets, its workers and the state of their lifecycle. Made inside a running event loop."""

    def __init__(
        self,
        mastership: Mastership,
        flags: Mapping[str, Any],
        environ: MutableMapping[str, str],
        base_dir: str,
        settings: config.Effective,
        log: Log,
    ) -> None:
        self.instance = mastership.instance
        self.epoch = mastership.epoch
        self.started = time.time()
        self._exit_status: int | None = None
        self.log = log
        self.events = Ring(mastership.epoch, mastership.inherited.take(inherited.EVENTS))
        log.tap = self.events.add
        self.sockets: dict[str, int] = {}
        """What others have opened for this master, and an upgrade passes on, by name."""
        self.servers: list[Server] = []
        """They answer requests on some of those."""
        self.admin: list[str] = []
        """Where ``--admin`` is served."""
        self._environ, self._base_dir = environ, base_dir
        self._settings = settings.settings
        self._inherited = mastership.inherited
        self._queue: deque[model.Event] = deque()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._trying = False
        """Whether the new code of an upgrade is being tried."""
        self._upgrading: Operation | None = None
        self._deposed = False
        self._left = False
        """It ends so that another one takes over: what there is stays."""

        self.operations = Operations()
        self._service = ServiceManager(environ)
        self._history = History(self.operations, log, self._service)
        self._readiness = Readiness(self.instance, self.operations, self._service)
        self.snapshots = Snapshots(
            mastership, partial(config.load, flags, environ, base_dir), settings, log, lambda: self.state
        )
        self.requests = Requests(
            self.operations,
            self.snapshots,
            self._readiness,
            self._service,
            self.put,
            lambda operation: self._start_task(self._try_upgrade(operation)),
        )
        self._signals = signals.Signals(self.requests, log, self._terminate)
        self.workers = Workers(mastership, environ, log, self.put, self._start_task, self._depose)
        self._adopted = adoption.adopt(
            mastership.known,
            mastership.found,
            {number: taken.limits for number, taken in self.snapshots.by_generation.items()},
            time.monotonic(),
        )
        self.state = self._adopted.state
        self.operations.restore(mastership.known.operations, mastership.known.numbers.operation)
        for worker in mastership.found.workers:
            self.workers.adopt(worker, self.snapshots.by_generation.get(worker.key[0]))
        living = [worker.key for worker in mastership.found.workers]
        self.codes = Codes(self.snapshots, self.operations, mastership.known.codes, log)
        self.totals = Totals(self.instance, mastership.known.totals, living)
        self.timeline = Timeline()
        self.timeline.restore(mastership.known.timeline, self.state, self.snapshots.by_generation)
        self._journal = Journal(self.instance.journal)
        self._journal_error = ""
        self._writer = memory.Writer(memory.Instance(mastership.identity, mastership.epoch))
        self._development: Development | None = None
        if settings.settings.reload:
            from segue.supervisor.development import Development

            self.state.developing = True
            self._development = Development(
                settings.settings, environ, log, saved=self._on_save, watching=self._on_watching
            )

    @property
    def token(self) -> str | None:
        """Who shows it may do everything: that of the generation that serves."""
        return None if self.snapshots.current is None else self.snapshots.current.token

    # ------------------------------------------------------------------------------------------------ the loop

    async def run(self) -> int:
        """Serve until asked to stop; returns the exit status."""
        loop = asyncio.get_running_loop()
        # signals are for the thread with the loop, which blocks them before an upgrade: one that another took would be lost
        loop.set_default_executor(ThreadPoolExecutor(_THREADS, "segue", initializer=signals.block))
        self._signals.listen()
        self._service.knows(self._inherited.kept, self._inherited.useless)
        if self._development is not None:
            self._development.start()
        self._begin()
        if self._service.watchdog_s is not None:
            self._wake(self._service.watchdog_s)
        while self._exit_status is None:
            self._service.alive()  # here, not in a task: it is this loop that has to turn
            while self._queue and self._exit_status is None:
                self._step(self._queue.popleft())
            self._changed.clear()
            self._arm()
            if self._upgrading is not None and not self._queue and self._exit_status is None:
                await self._upgrade(self._upgrading)
            elif not self._queue and self._exit_status is None:
                await self._changed.wait()
        if self._development is not None:
            await self._development.stop()
        self.events.close()
        if not self._deposed:  # else all of it is somebody else's by now
            await self._flush(FLUSH_S)
            # the outcome is settled: a signal that comes while the interpreter ends must not change the exit status
            signals.block()
        if not self._deposed and not self._left:
            self._close()
        return self._exit_status

    def _wake(self, interval_s: float) -> None:
        self._changed.set()
        asyncio.get_running_loop().call_later(interval_s / 2, self._wake, interval_s)

    def put(self, event: model.Event) -> None:
        """Queue an event: the only way to make anything happen."""
        self._queue.append(event)
        self._changed.set()

    def _step(self, event: model.Event) -> None:
        if self.instance.usurped:
            self._depose("the lock of this instance is somebody else's")
            return
        change = self.state.change
        if (
            change is not None
            and isinstance(event, model.WorkerEvent)
            and event.generation == change.generation
        ):
            self._service.progress()  # whatever a worker that is being started says
        self.state, effects = lifecycle.step(self.state, event, time.monotonic())
        if isinstance(event, model.WorkerExited):
            self.totals.worker_ended((event.generation, event.worker))
        self.timeline.note(self.state, self.snapshots.by_generation)
        self._record()  # before anybody is told: what an effect begins must be known if it is cut short
        if isinstance(event, model.HandingOver) and not event.error:
            self.snapshots.retreat(event.generation)
        self.snapshots.refuse_unused()
        for effect in effects:
            self._execute(effect)
        if effects:
            self._record()
        if not self.state.overlaps:
            self._history.quiet()
        if self._readiness.is_due(self.state):
            current = self.state.current
            self._ready(f"generation {current} serves" if current else "nothing serves")

    def _record(self) -> None:
        """Write down what the next master has to know."""
        values = self._writer.values(
            self.state,
            self.snapshots.by_generation,
            self.workers.processes,
            self.operations.remembered(),
            self.operations.next_number,
            self.totals.written,
            self.codes.by_generation,
        )
        error = self._journal.write(values | {"timeline": self.timeline.rows()})
        if error and error != self._journal_error:
            self.log("error", "journal-not-written", reason=error)
        self._journal_error = error

    @property
    def develops(self) -> bool:
        """Whether it is in development mode."""
        return self._development is not None

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = lifecycle.next_deadline(self.state)
        if due is not None and self._exit_status is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, due - time.monotonic()), self._on_time, due)

    def _on_time(self, due: float) -> None:
        self.workers.read_notifications()  # what a worker said in time counts, however late it is read
        late = time.monotonic() - due
        if late > LATE_S:
            self.put(model.Paused(late))
        self.put(model.TimePassed())

    def _start_task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ------------------------------------------------------------------------------------------- begin and end

    def _begin(self) -> None:
        """Carry on with what was found, or start the first generation."""
        adopted = self._adopted
        for operation in self.operations.running():
            generation = operation.generation
            if operation.kind == "upgrade":
                ok, generation = operation.phase == EXECUTE, self.state.current
            else:
                ok = operation.number in adopted.promoted
            reason = "" if ok else adoption.INTERRUPTED
            self._settle(model.Settle(operation.number, ok, reason, generation=generation))
        self._record()
        for effect in adopted.effects:
            self._execute(effect)
        self._history.resume(self.state)
        current = self.state.current
        if current is None:
            self.instance.take_restart_mark()  # what is started is the code on the disk
        if self.workers.children:
            fields = {"workers": len(self.workers.children), "generation": current, "epoch": self.epoch}
            self.log("warning", "adopted", **fields, promote=adopted.promote or None)
        if current is None:
            self.requests.reload(START)
            return
        self.log.set_level(self.snapshots.by_generation[current].settings.uvicorn.get("log_level"))
        self.snapshots.close_unused()
        self._store()
        if self.instance.restart_is_marked:
            self._readiness.restarting = True
            self.requests.reload(RESTART)
        else:
            self._ready(f"generation {current} serves; its workers were adopted")
        self._start_task(
            self.codes.compare_with_disk(current, self.snapshots.by_generation[current], self._settings)
        )
        self.put(model.TimePassed())

    def _ready(self, status: str) -> None:
        """The service manager is told, and what of the unit isn't ours is ended, now that it isn't needed."""
        if not self._readiness.told and self._service.has_started_us:
            self._start_task(self._end_strays())
        self._readiness.tell(status)

    async def _end_strays(self) -> None:
        """Workers of this unit that no master knows: the unit had another name or directory before its restart."""
        known = {child.process.pid for child in self.workers.children.values()}
        for pid in await asyncio.to_thread(leftovers.end_strays, known):
            self.log(
                "warning", "stray-worker-ended", pid=pid, reason="it belongs to no instance of this unit"
            )

    def _store(self) -> None:
        """Let the service manager keep what must outlive this process."""
        self._service.keep(dict(self.snapshots.listening.own) | self.workers.relay.names)

    def _depose(self, why: str) -> None:
        """Another master has taken over: this one ends, and touches nothing more."""
        if not self._deposed:
            self._deposed = True
            self.log("error", "deposed", reason=why)
            self._exit_status = Status.INSTANCE
            self._changed.set()

    def _terminate(self) -> None:
        """A SIGTERM. In a reload systemd sends it without a word before, be it for a stop or for a restart."""
        if self._service.has_started_us and self.state.serving and self.state.stopping is None:
            self._start_task(self._terminate_as_meant())
        else:
            self.requests.end(at_once=False)

    async def _terminate_as_meant(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # no answer, no file, no thread: then it is a stop
            async with asyncio.timeout(jobs.ASK_TIMEOUT_S):
                if not self.instance.restart_is_marked and await asyncio.to_thread(jobs.is_restart):
                    self.instance.mark_restart()
        if not self._leave_for_restart():
            self.requests.end(at_once=False)

    def _leave_for_restart(self) -> bool:
        """Leave, if this end is the first half of a restart, and there is something that serves on until the second."""
        marked = self.instance.restart_is_marked and not self._readiness.restarting
        if not marked or self.state.stopping is not None or not self.state.serving:
            return False
        self._service.stopping("the unit is being restarted; the workers serve on")
        self._leave(Status.OK)
        return True

    def _leave(self, status: Status) -> None:
        """End as if by a crash: what serves goes on serving, and the next master takes it over."""
        self.log("warning", "left", workers=len(self.workers.children), action="serve-on")
        self._record()
        self._left, self._exit_status = True, status
        self._changed.set()

    async def _flush(self, timeout_s: float) -> None:
        """Let the last answers out: whoever asked for the end is told of it."""
        await asyncio.gather(*(server.hold(timeout_s) for server in self.servers))

    def _close(self) -> None:
        self._journal.close()
        self.snapshots.listening.close()
        self.workers.close()
        self.instance.release()

    # -------------------------------------------------------------------------------------------------- upgrade

    async def _try_upgrade(self, operation: Operation) -> None:
        operation.progress("try")
        reason = upgrade.obstacle(self.state)
        if self._trying or self._upgrading is not None:
            reason = "another upgrade is under way; try again when it has ended"
        if not reason:
            self._trying = True
            try:
                reason = await upgrade.try_out(self._environ, self._base_dir)
                reason = reason or upgrade.obstacle(self.state)  # by now
                if not reason:
                    operation.progress(EXECUTE)  # whoever follows it asks again, and the new master answers
                    await self._flush(FLUSH_S)
                    self._upgrading = operation
                    self._changed.set()
            finally:
                self._trying = False
        if reason:
            self._settle(model.Settle(operation.number, ok=False, reason=reason))

    async def _upgrade(self, operation: Operation) -> None:
        """Become the new code, unless something has come between."""
        if self._development is not None:
            await self._development.stop()
        await signals.hold()
        reason = upgrade.obstacle(self.state)
        if not self._queue and not reason:
            self._record()
            if self._journal_error:  # the new master would know nothing of what was decided, or who waits
                reason = f"the journal can't be written: {self._journal_error}; make room, or its directory anew, then try again"
            else:
                self.log("info", "upgrade", epoch=self.epoch)
                reason = self._become_new()
        signals.unblock()
        if reason:
            self._upgrading = None
            for server in self.servers:
                server.accept()
            self._settle(model.Settle(operation.number, ok=False, reason=reason))
            if self._development is not None:
                self._development.start()

    def _become_new(self) -> str:
        """Returns only if that fails, with the reason."""
        events = self.events.pass_on()
        fds = [*self.snapshots.listening.names, *self.workers.names, *self.sockets.items()]
        fds.append((inherited.EVENTS, events))
        if self.instance.lock_fd is not None:
            fds.append((inherited.LOCK, self.instance.lock_fd))
        try:
            upgrade.execute({**self._environ, **self._service.environ}, self._base_dir, fds)
        except OSError as error:
            os.close(events)
            return f"it can't be executed: {error.strerror or error}"

    # ---------------------------------------------------------------------------------------------- development

    def _on_save(self, what: str) -> None:
        self.requests.reload(what, overtakes=True)

    def _on_watching(self) -> None:
        """From now on no save is missed; one may have been, since the newest generation was begun."""
        self._start_task(self._reload_if_outdated())

    async def _reload_if_outdated(self) -> None:
        if await self.codes.newest_is_outdated():
            self._on_save("a save before anybody watched")

    # -------------------------------------------------------------------------------------------------- effects

    def _execute(self, effect: model.Effect) -> None:
        match effect:
            case model.Prepare(generation):
                self._start_task(self._prepare(generation))
            case model.Spawn(generation):
                self.workers.spawn(effect, self.snapshots.by_generation[generation])
            case model.SwapCommand():
                self.workers.swap(effect)
            case model.Command(generation):
                names = [listener.info.name for listener in self.snapshots.listeners]
                self.workers.command(effect, names, self._siblings(generation))
            case model.Kill(generation, worker, now):
                self.workers.kill((generation, worker), now)
            case model.Progress(operations, phase, generation):
                for number in operations:
                    if (operation := self.operations.get(number)) is not None:
                        operation.progress(phase, generation)
                self._service.progress()
                promote = self.state.promote
                if promote is not None and promote.until is not None:  # a canary takes its time
                    self._service.extend(promote.until - time.monotonic() + PROGRESS_S)
            case model.Settle(number):
                self._settle(effect)
                operation = self.operations.get(number)
                if operation is not None and not self._readiness.ended(operation):
                    self._leave(Status.NOT_STARTED)
            case model.Check(generation):
                self._start_task(self._check(generation, self.snapshots.by_generation[generation]))
            case model.Promoted(generation, previous):
                self._promoted(generation, previous)
            case model.RolledBack():
                self._history.rolled_back(effect)
            case model.ProbationEnded():
                self.totals.probation_ended(effect.outcome)
                self._history.probation_ended(effect)
            case model.AllDrained(generation):
                self._history.drained(generation)
            case model.Released(generation, failed):
                self._release(generation, failed)
            case model.Say(level, event, fields):
                self.totals.happened(event, fields)
                self.log(level, event, **fields)
            case model.Exit(status):
                self._exit_status = status
                self.log("info", "exit", status=status)

    def _siblings(self, number: int) -> int:
        """How many workers share the load with one of this generation, itself included."""
        generation = self.state.generations[number]
        return generation.target + (generation.state is model.GenerationState.MIXED)

    async def _check(self, generation: int, taken: Snapshot) -> None:
        """Before the old generation is ended for it: can the new one's code be imported at all?"""
        try:
            verdict = await try_out(taken, self._environ, import_only=True)
        except OSError as error:
            verdict = Verdict(ok=False, reason=f"it can't be checked: {error}")
        self.put(model.Checked(generation, verdict.reason, verdict.output))

    async def _prepare(self, generation: int) -> None:
        outcome = await self.snapshots.prepare(generation)
        if isinstance(outcome, model.Prepared):
            self._start_task(self._read_code(generation))
            self._note_restart_only(generation)
        if outcome is not None:
            self.put(outcome)

    async def _read_code(self, generation: int) -> None:
        if await self.codes.read(generation, before=self.state.current or 0):
            self._record()

    def _note_restart_only(self, generation: int) -> None:
        keys = self.snapshots.restart_only(generation)
        if keys and self.state.change is not None:
            note = f"only a restart of segue applies the changed {', '.join(keys)}"
            self.log("warning", "restart-needed", keys=",".join(keys))
            for number in self.state.change.operations:
                if (operation := self.operations.get(number)) is not None:
                    operation.notes.append(note)

    def _settle(self, effect: model.Settle) -> None:
        operation = self.operations.get(effect.operation)
        if (
            operation is not None
            and operation.kind == "stage"
            and effect.ok
            and effect.generation is not None
        ):
            effect = msgspec.structs.replace(effect, result={"probes": self._probes(effect.generation)})
        self._history.settled(effect, self.state)
        if operation is not None:
            self.codes.tell(operation)
            self.totals.operation_ended(operation)

    def _probes(self, generation: int) -> list[dict[str, Any]]:
        """The private sockets on which a generation's application can be asked."""
        workers = [worker for number, worker in self.workers.children if number == generation]
        return [
            {"worker": worker, "socket": self.instance.probe_socket(generation, worker)} for worker in workers
        ]

    def _promoted(self, generation: int, previous: int | None) -> None:
        taken = self.snapshots.by_generation[generation]
        self.log.set_level(taken.settings.uvicorn.get("log_level"))
        self.log.set_format(taken.settings.log_format)
        self.codes.differs_on_disk.clear()
        if previous is None:
            self.snapshots.close_unused()  # what was kept for a start that asks for something else
        self._store()
        for listener in taken.listeners if previous is None else ():
            self.log("info", "listening", address=listener.info.address)
        self.log("info", "promoted", generation=generation, previous=previous, fingerprint=taken.fingerprint)

    def _release(self, generation: int, failed: bool) -> None:
        self.timeline.ended(generation, failed)
        self.codes.release(generation)
        self.snapshots.release(generation)
        self.log("info", "retired", generation=generation, failed=failed or None)

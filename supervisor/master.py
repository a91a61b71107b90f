"""The master: one loop that reads one queue of events, steps the lifecycle, and carries out its effects.

Signal handlers, sockets, timers and the control API only put events into the queue. What takes time (reading
settings, calling a worker) runs in a task whose end is one more event; nothing that blocks runs here. The master is
off the data path: no byte of a request, a response or a running worker's log passes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from segue.handoff.listeners import BindError, Listener
from segue.supervisor import (
    adoption,
    inherited,
    leftovers,
    lifecycle,
    memory,
    model,
    reaping,
    snapshot,
    upgrade,
)
from segue.supervisor import settings as config
from segue.supervisor.check import Verdict, try_out
from segue.supervisor.code import Changes, compare
from segue.supervisor.code import read as read_code
from segue.supervisor.exits import Status
from segue.supervisor.history import RESTART, START, History, name_of
from segue.supervisor.journal import Journal
from segue.supervisor.listening import Listening
from segue.supervisor.log import Log
from segue.supervisor.mastership import Mastership
from segue.supervisor.mastership import snapshots as recalled
from segue.supervisor.operations import Operation, Operations
from segue.supervisor.ring import Ring
from segue.supervisor.snapshot import Snapshot
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
"""How long an exiting master waits for its last answers to be sent."""
_UPGRADE_FLUSH_S = 0.05
"""So long an upgrade waits for them; whoever follows an operation comes back."""
_TURNS_OF_A_SIGNAL = 4
"""Of the loop, from a signal to the call of its handler."""
_STOP_SLACK_S = 30.0
"""What the end of a stop may take beyond the budget of its workers."""
_SIGNALS = {
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
_QUIETING = frozenset({model.WorkerState.QUIETING})
_THREADS = 2
"""For reading files and looking up names: one may hang on a dead file system."""


def _leave_signals() -> None:
    """In a thread: signals are for the thread with the loop, which blocks them before an upgrade."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


class Manner(NamedTuple):
    """How a generation shall take over from another; None: as its settings say."""

    strategy: model.Strategy | None = None
    canary: int | None = None
    canary_for: float | None = None


AS_SET = Manner()


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
        self.operations = Operations()
        self.started = time.time()
        self.token: str | None = None
        self.log = log
        self.events = Ring(mastership.epoch, mastership.inherited.take(inherited.EVENTS))
        log.tap = self.events.add
        self.exit_status: int | None = None
        self.changed = asyncio.Event()
        self._flags, self._environ, self._base_dir = dict(flags), environ, base_dir
        self._service = ServiceManager(environ)
        self._inherited = mastership.inherited
        self._listening = Listening(mastership.inherited)
        self._events: deque[model.Event] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._history = History(self.operations, log, self._service)
        self._said_ready = False
        self._retreated: set[int] = set()
        """Generations that have stopped accepting, and whose own listeners may still be needed."""
        self._upgrading: Operation | None = None
        self._deposed = False
        self.sockets: dict[str, int] = {}
        """What others have opened for this master, and an upgrade passes on, by name."""
        self.disk: list[str] = []
        """In what the settings and the code on disk differ from those of a generation that was adopted."""
        self._ready_due = False
        """A reload has ended, and the service manager waits to be told."""
        self._restarting = False
        """What was adopted is to be followed by the code on the disk before this start is done."""
        self._left = False
        """It ends so that another one takes over: what there is stays."""
        self._journal = Journal(self.instance.journal)
        self._journal_error = ""
        self.timeline = Timeline()
        self._writer = memory.Writer(memory.Instance(mastership.identity, mastership.epoch))
        self.workers = Workers(mastership, environ, self.log, self.put, self._start_task, self._depose)
        listeners = self._listening.restore(mastership.found.listeners)
        self.snapshots = recalled(mastership, listeners, settings, self.log)
        adopted = adoption.adopt(
            mastership.known,
            mastership.found,
            {number: taken.limits for number, taken in self.snapshots.items()},
            time.monotonic(),
        )
        self.state, self._adopted = adopted.state, adopted
        self.timeline.restore(mastership.known.timeline, self.state)
        self.operations.restore(mastership.known.operations, mastership.known.numbers.operation)
        for worker in mastership.found.workers:
            self.workers.adopt(worker, self.snapshots.get(worker.key[0]))
        living = [worker.key for worker in mastership.found.workers]
        self.totals = Totals(self.instance, mastership.known.totals, living)
        self.codes = {
            number: code for number, code in mastership.known.codes.items() if number in self.snapshots
        }
        """What each generation runs, as soon as that has been read."""
        self.changes: dict[int, Changes] = {}
        """How that differs from what served before it."""
        self._known = mastership.known
        self._settings_now = settings.settings
        self._development: Development | None = None
        if settings.settings.reload:
            from segue.supervisor.development import Development

            self.state.developing = True
            self._development = Development(
                settings.settings, environ, log, saved=self._on_save, watching=self._compare_with_current
            )

    # ------------------------------------------------------------------------------------------------ the loop

    async def run(self) -> int:
        """Serve until asked to stop; returns the exit status."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(_THREADS, "segue", initializer=_leave_signals))
        for number, handler in {
            signal.SIGHUP: self._on_hup,
            signal.SIGTERM: lambda: self._on_stop("SIGTERM"),
            signal.SIGINT: lambda: self._on_stop("SIGINT"),
            signal.SIGQUIT: lambda: self._on_stop("SIGQUIT", at_once=True),
            signal.SIGTTIN: lambda: self.put(model.ScaleAsked(None, delta=1)),
            signal.SIGTTOU: lambda: self.put(model.ScaleAsked(None, delta=-1)),
            signal.SIGUSR2: self._on_usr2,
            signal.SIGUSR1: self._on_usr1,
        }.items():
            loop.add_signal_handler(number, handler)
        if reaping.is_first():
            loop.add_signal_handler(signal.SIGCHLD, reaping.reap)
            reaping.reap()  # those that ended before
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # blocked by an upgrade
        self._service.knows(self._inherited.kept, self._inherited.useless)
        if self._development is not None:
            self._development.start()
        self._begin()
        if self._service.watchdog_s is not None:
            self._wake(self._service.watchdog_s)
        while self.exit_status is None:
            self._service.alive()  # here, not in a task: it is this loop that has to turn
            while self._events and self.exit_status is None:
                self._step(self._events.popleft())
            self.changed.clear()
            self._arm()
            if self._upgrading is not None and not self._events and self.exit_status is None:
                await self._upgrade(self._upgrading)
            elif not self._events and self.exit_status is None:
                await self.changed.wait()
        if self._development is not None:
            await self._development.stop()
        self.events.close()
        if not self._deposed:  # else all of it is somebody else's by now
            await self._flush(FLUSH_S)
            # the outcome is settled: a signal that comes while the interpreter ends must not change the exit status
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        if not self._deposed and not self._left:
            self._close()
        return self.exit_status

    def _wake(self, interval_s: float) -> None:
        self.changed.set()
        asyncio.get_running_loop().call_later(interval_s / 2, self._wake, interval_s)

    def _begin(self) -> None:
        """Carry on with what was found, or start the first generation."""
        adopted = self._adopted
        for operation in self.operations.running():
            if operation.kind == "upgrade":
                ok, generation = operation.phase == EXECUTE, self.state.current
            else:
                ok, generation = adopted.promote == "finished", adopted.generation
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
            self.ask_reload(START)
            return
        self.token = self.snapshots[current].token
        self.log.set_level(self.snapshots[current].settings.uvicorn.get("log_level"))
        self._close_unused()
        self._store()
        if self.instance.restart_is_marked:
            self._restarting = True
            self.ask_reload(RESTART)
        else:
            self._ready(f"generation {current} serves; its workers were adopted")
        self._start_task(self._compare_with_disk(current, self.snapshots[current]))
        self.put(model.TimePassed())

    def _ready(self, status: str) -> None:
        """The service manager is told, and what of the unit isn't ours is ended, now that it isn't needed."""
        if not self._said_ready and self._service.has_started_us:
            self._start_task(self._end_strays())
        self._said_ready = True
        last = [each for each in self.operations.deploys() if each.kind == "reload"]
        if last and last[-1].ok is False:
            status += f"; the last {name_of(last[-1])} was refused: {last[-1].reason}"
        self._service.ready(status)

    async def _end_strays(self) -> None:
        """Workers of this unit that no master knows: the unit had another name or directory before its restart."""
        known = {child.process.pid for child in self.workers.children.values()}
        for pid in await asyncio.to_thread(leftovers.end_strays, known):
            self.log(
                "warning", "stray-worker-ended", pid=pid, reason="it belongs to no instance of this unit"
            )

    def _leave(self, status: Status) -> None:
        """End as if by a crash: what serves goes on serving, and the next master takes it over."""
        self.log("warning", "left", workers=len(self.workers.children), action="serve-on")
        self._record()
        self._left, self.exit_status = True, status
        self.changed.set()

    async def _compare_with_disk(self, generation: int, taken: Snapshot) -> None:
        """An adopted generation goes on as it is; only it is told that something else lies on the disk."""
        keys = config.differing(taken.settings, self._settings_now)
        if keys:
            self.disk.append(f"the settings differ from those of generation {generation}: {', '.join(keys)}")
        try:
            same = await asyncio.to_thread(taken.fingerprint_now) == taken.fingerprint
        except (OSError, RuntimeError, MemoryError):
            same = False
        if not same:
            self.disk.append(f"the code in {taken.app_dir} is no longer that of generation {generation}")
        for difference in self.disk:
            self.log("warning", "disk-differs", generation=generation, reason=difference)

    def put(self, event: model.Event) -> None:
        """Queue an event: the only way to make anything happen."""
        self._events.append(event)
        self.changed.set()

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
        self.timeline.note(self.state)
        self._record()  # before anybody is told: what an effect begins must be known if it is cut short
        if isinstance(event, model.HandingOver) and not event.error:
            self._retreated.add(event.generation)
        if self._retreated:
            self._refuse_unused()
        for effect in effects:
            self._execute(effect)
        if effects:
            self._record()
        self._ready_if_due()

    def _record(self) -> None:
        """Write down what the next master has to know."""
        values = self._writer.values(
            self.state,
            self.snapshots,
            self.workers.processes,
            self.operations.remembered(),
            self.operations.next_number,
            self.totals.written,
            self.codes,
        )
        error = self._journal.write(values | {"timeline": self.timeline.spans()})
        if error and error != self._journal_error:
            self.log("error", "journal-not-written", reason=error)
        self._journal_error = error

    def _depose(self, why: str) -> None:
        """Another master has taken over: this one ends, and touches nothing more."""
        if not self._deposed:
            self._deposed = True
            self.log("error", "deposed", reason=why)
            self.exit_status = Status.INSTANCE
            self.changed.set()

    def _store(self) -> None:
        """Let the service manager keep what must outlive this process."""
        self._service.keep(dict(self._listening.own) | self.workers.relay.names)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = lifecycle.next_deadline(self.state)
        if due is not None and self.exit_status is None:
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

    async def _flush(self, timeout_s: float) -> None:
        """Let the last answers out: whoever asked for the end is told of it."""
        await asyncio.sleep(0)
        answering = [task for task in asyncio.all_tasks() if task.get_name() == "control-answer"]
        if answering:
            await asyncio.wait(answering, timeout=timeout_s)

    def _close(self) -> None:
        self._journal.close()
        self._listening.close()
        self.workers.close()
        self.instance.release()

    # --------------------------------------------------------------------------------------------- what is asked

    def ask_reload(self, asked_by: str, manner: Manner = AS_SET, overtakes: bool = False) -> Operation:
        """Ask for a new generation; with `overtakes` instead of one that is still being started."""
        if self._said_ready:
            self._service.reloading(f"a new generation is being started, asked for by {asked_by}")
        return self.ask(
            "reload", asked_by, lambda number: model.ReloadAsked(number, *manner, overtakes=overtakes)
        )

    def ask(self, kind: str, asked_by: str, event: Callable[[int], model.Event]) -> Operation:
        """Ask for what `event` says, made with the operation's number."""
        operation = self.operations.create(kind, asked_by)
        self.put(event(operation.number))
        return operation

    def _on_save(self, what: str) -> None:
        self.ask_reload(what, overtakes=True)

    def _compare_with_current(self) -> None:
        """From now on no save is missed; one may have been, since the newest generation was begun."""
        if self.snapshots:
            newest = max(self.snapshots)
            self._start_task(self._reload_if_differs(newest, self.snapshots[newest]))

    async def _reload_if_differs(self, generation: int, taken: Snapshot) -> None:
        with contextlib.suppress(OSError, RuntimeError, MemoryError):
            now = await asyncio.to_thread(taken.fingerprint_now)
            if now != taken.fingerprint and generation == max(self.snapshots, default=0):
                self._on_save("a save before anybody watched")

    def ask_scale(self, asked_by: str, count: int) -> Operation:
        """Ask for `count` workers."""
        return self.ask("scale", asked_by, lambda number: model.ScaleAsked(number, count=count))

    def ask_drain(self, asked_by: str, mode: str | None) -> Operation:
        """Begin the operator's drain in `mode`, or end it."""
        return self.ask("drain", asked_by, lambda number: model.DrainAsked(number, mode))

    def ask_swap(self, asked_by: str, service: str, query: dict[str, str]) -> Operation:
        """Ask for another instance of a service in every worker of the current generation."""
        operation = self.operations.create("swap", asked_by, service=service)
        self.put(model.SwapAsked(operation.number, service, query))
        return operation

    def ask_stop(self, asked_by: str, at_once: bool = False) -> Operation:
        """Ask for the end of the instance."""
        return self.ask("stop", asked_by, lambda number: self._stop_event(number, at_once))

    def _on_hup(self) -> None:
        self.log("info", "signal", signal="SIGHUP")
        self.ask_reload("SIGHUP")

    def _on_stop(self, name: str, at_once: bool = False) -> None:
        self.log("info", "signal", signal=name)
        if name == "SIGTERM" and self._is_restarted:
            self._service.stopping("the unit is being restarted; the workers serve on")
            self._leave(Status.OK)
            return
        self.put(self._stop_event(None, at_once))

    @property
    def _is_restarted(self) -> bool:
        """Whether this end is the first half of a restart, and there is something that can serve on until the second."""
        marked = self.instance.restart_is_marked and not self._restarting
        return marked and self.state.stopping is None and self.state.serving

    def _stop_event(self, operation: int | None, at_once: bool) -> model.StopAsked:
        self._service.stopping("stopping")
        current = self.snapshots.get(self.state.current or 0)
        settings = current.settings if current else None
        delay = settings.stop_delay if settings else 0.0
        budget = settings.timeout_graceful_shutdown if settings else 10.0
        self._service.extend(delay + budget + _STOP_SLACK_S)
        return model.StopAsked(operation, at_once, delay, budget)

    def ask_upgrade(self, asked_by: str) -> Operation:
        """Ask for new code and settings of this master itself."""
        operation = self.operations.create("upgrade", asked_by)
        self._start_task(self._try_upgrade(operation))
        return operation

    def _on_usr2(self) -> None:
        self.log("info", "signal", signal="SIGUSR2")
        self.ask_upgrade("SIGUSR2")

    def _on_usr1(self) -> None:
        """Elsewhere it means that log files are to be opened anew; by itself it would end this process."""
        self.log("info", "signal", signal="SIGUSR1", action="none: there is no log file to be opened anew")

    async def _try_upgrade(self, operation: Operation) -> None:
        operation.progress("try")
        reason = self._busy()
        if not reason:
            reason = await upgrade.try_out(self._environ, self._base_dir)
            reason = reason or self._busy()  # by now
        if self._upgrading is not None:
            reason = "another upgrade is under way"
        if reason:
            self._settle(model.Settle(operation.number, ok=False, reason=reason))
            return
        operation.progress(EXECUTE)
        self._upgrading = operation
        self.changed.set()

    def _busy(self) -> str:
        """Why this is not the moment for an upgrade."""
        state = self.state
        if state.stopping is not None:
            return "segue is stopping"
        if state.changing or state.queued or state.current is None:
            return "a reload is running; try again when it has ended"
        if state.swap is not None or state.swaps_queued:
            return "a service is being swapped; try again when that has ended"
        if state.scaling is not None or state.scale_queued is not None or state.drain_change is not None:
            return "the number of workers or the drain is being changed; try again when that has ended"
        return ""

    async def _upgrade(self, operation: Operation) -> None:
        """Become the new code, unless something has come between."""
        await self._flush(_UPGRADE_FLUSH_S)
        if self._development is not None:
            await self._development.stop()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        for _ in range(_TURNS_OF_A_SIGNAL):  # what came before has its handler run
            await asyncio.sleep(0)
        reason = self._busy()
        if not self._events and not reason:
            self._record()
            self.log("info", "upgrade", epoch=self.epoch)
            fds = [*self._listening.names, *self.workers.names, *self.sockets.items()]
            events = self.events.pass_on()
            fds.append((inherited.EVENTS, events))
            if self.instance.lock_fd is not None:
                fds.append((inherited.LOCK, self.instance.lock_fd))
            environ = {**self._environ, **self._service.environ}
            try:
                upgrade.execute(environ, self._base_dir, fds)
            except OSError as error:
                reason = f"it can't be executed: {error.strerror or error}"
                os.close(events)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        if reason:
            self._upgrading = None
            self._settle(model.Settle(operation.number, ok=False, reason=reason))
            if self._development is not None:
                self._development.start()

    # -------------------------------------------------------------------------------------------------- effects

    def _execute(self, effect: model.Effect) -> None:
        match effect:
            case model.Prepare(generation):
                self._start_task(self._prepare(generation))
            case model.Spawn(generation):
                self.workers.spawn(effect, self.snapshots[generation])
            case model.SwapCommand():
                self.workers.swap(effect)
            case model.Command(generation):
                names = [listener.info.name for listener in self._listeners()]
                self.workers.command(effect, names, self._siblings(generation))
            case model.Kill(generation, worker, now):
                self.workers.kill((generation, worker), now)
            case model.Progress(operations, phase):
                for number in operations:
                    if (operation := self.operations.get(number)) is not None:
                        operation.progress(phase)
                self._service.progress()
                promote = self.state.promote
                if promote is not None and promote.until is not None:  # a canary takes its time
                    self._service.extend(promote.until - time.monotonic() + PROGRESS_S)
            case model.Settle(number):
                self._settle(effect)
                if (operation := self.operations.get(number)) is not None:
                    self._announce(operation)
            case model.Check(generation):
                self._start_task(self._check(generation, self.snapshots[generation]))
            case model.Promoted(generation, previous):
                self._promoted(generation, previous)
            case model.RolledBack():
                self._history.rolled_back(effect)
            case model.ProbationEnded():
                self._history.probation_ended(effect)
            case model.AllDrained(generation):
                self._history.drained(generation)
            case model.Released(generation, failed):
                self._release(generation, failed)
            case model.Say(level, event, fields):
                self.totals.happened(event, fields)
                self.log(level, event, **fields)
            case model.Exit(status):
                self.exit_status = status
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
        try:
            async with asyncio.timeout(lifecycle.PREPARE_TIMEOUT_S):
                effective = await asyncio.to_thread(config.load, self._flags, self._environ, self._base_dir)
                taken = await asyncio.to_thread(snapshot.take, effective)
        except TimeoutError:
            return  # the lifecycle's own deadline has said so
        except (config.SettingsError, OSError, ValueError) as error:
            self.put(model.PrepareFailed(generation, str(error)))
            return
        except (RuntimeError, MemoryError) as error:  # the system refuses a thread, or memory
            what = "a thread" if isinstance(error, RuntimeError) else "memory"
            hint = "see the limits of processes and memory (ulimit -u, TasksMax=, MemoryMax=)"
            self.put(model.PrepareFailed(generation, f"the system refuses {what}: {error}; {hint}"))
            return
        if generation not in self.state.generations:
            return
        try:
            listeners = await self._listening.open(taken.effective)
        except BindError as error:
            self._close_unused()
            self.put(model.PrepareFailed(generation, str(error)))
            return
        if generation not in self.state.generations:  # given up while an address was looked up
            self._listening.opened()
            self._close_unused()
            return
        workers = self._workers_for(taken)
        self.snapshots[generation] = msgspec.structs.replace(taken, listeners=listeners, workers=workers)
        self._listening.opened()
        self._start_task(self._read_code(generation, taken))
        self._note_restart_only(taken)
        self.put(model.Prepared(generation, workers, taken.limits))

    async def _read_code(self, generation: int, taken: Snapshot) -> None:
        """Which code that is: read while its workers start, so that nobody waits for it."""
        before = self.state.current
        try:
            code = await asyncio.to_thread(read_code, taken.app_dir, taken.python)
        except (RuntimeError, MemoryError):  # the system refuses a thread
            return
        if generation not in self.snapshots:
            return
        self.codes[generation] = code
        last, old = self.codes.get(before or 0), self.snapshots.get(before or 0)
        if last is not None and old is not None:
            keys = config.differing(old.settings, taken.settings)
            self.changes[generation] = compare(last, code, keys)
        for operation in self.operations.deploys():
            self._tell_code(operation)
        self._record()

    def _tell_code(self, operation: Operation) -> None:
        number = operation.generation
        if number in self.codes and operation.generation_code is None:
            operation.generation_code = self.codes[number].document()
            changes = self.changes.get(number)
            operation.changes = None if changes is None else msgspec.to_builtins(changes)

    def _workers_for(self, taken: Snapshot) -> int:
        """As the settings say; but a scale by hand lasts until the setting itself is changed."""
        current = self.state.current
        if current is None:  # as in the life of the last master, though none of its workers lives
            return memory.scaled(self._known, taken.settings.workers) or taken.settings.workers
        if self.snapshots[current].settings.workers == taken.settings.workers:
            return self.state.generations[current].target
        return taken.settings.workers

    def _note_restart_only(self, taken: Snapshot) -> None:
        first = self.snapshots.get(self.state.current or 0)
        change = self.state.change
        if first is None or change is None:
            return
        keys = config.restart_only(first.settings, taken.settings)
        if keys:
            note = f"only a restart of segue applies the changed {', '.join(keys)}"
            self.log("warning", "restart-needed", keys=",".join(keys))
            for number in change.operations:
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
            self._tell_code(operation)
            self.totals.operation_ended(operation)

    def _announce(self, operation: Operation) -> None:
        """Tell the service manager of a reload's outcome: once, after the last of those that wait.

        Else a reload that is still queued would count as done.
        """
        if operation.kind != "reload" or any(each.kind == "reload" for each in self.operations.running()):
            return
        if self._restarting:
            self._restarting = False
            self.instance.take_restart_mark()
            if not operation.ok:
                self._leave(Status.NOT_STARTED)
                return
        if operation.ok or self._said_ready:
            self._ready_due = True

    def _ready_if_due(self) -> None:
        """Whoever connects after READY meets the new code: it waits until the old one has stopped accepting."""
        quieting = (each.having(_QUIETING) for each in self.state.generations.values())
        if self._ready_due and not any(quieting):
            self._ready_due = False
            self._ready(f"generation {self.state.current} serves" if self.state.current else "nothing serves")

    def _probes(self, generation: int) -> list[dict[str, Any]]:
        """The private sockets on which a generation's application can be asked."""
        workers = [worker for number, worker in self.workers.children if number == generation]
        return [
            {"worker": worker, "socket": self.instance.probe_socket(generation, worker)} for worker in workers
        ]

    def _promoted(self, generation: int, previous: int | None) -> None:
        taken = self.snapshots[generation]
        self.token = taken.token
        self.log.set_level(taken.settings.uvicorn.get("log_level"))
        self.log.set_format(taken.settings.log_format)
        self.disk.clear()
        if previous is None:
            self._close_unused()  # what was kept for a start that asks for something else
        self._store()
        for listener in taken.listeners if previous is None else ():
            self.log("info", "listening", address=listener.info.address)
        self.log("info", "promoted", generation=generation, previous=previous, fingerprint=taken.fingerprint)

    def _refuse_unused(self) -> None:
        """A generation has stopped accepting and can't be had again: what only it listened on is refused from now on."""
        wanted = self.state.may_serve
        for number in self._retreated - wanted:
            self._retreated.discard(number)
            old = self.snapshots.get(number)
            if old is None:
                continue
            kept = {
                each.bind
                for other in wanted & self.snapshots.keys()
                for each in self.snapshots[other].listeners
            }
            for address in self._listening.refuse(each for each in old.listeners if each.bind not in kept):
                self.log("info", "closed", address=address)
            self._close_unused()

    def _release(self, generation: int, failed: bool) -> None:
        self.timeline.ended(generation, failed)
        for by_generation in (self.snapshots, self.codes, self.changes):
            by_generation.pop(generation, None)
        self._close_unused()
        self.log("info", "retired", generation=generation, failed=failed or None)

    def _close_unused(self) -> None:
        """Close the listeners that no generation asks for that serves, or may yet."""
        if self.state.developing and self.state.current is None:
            return  # clients wait in them for a save that mends the first start
        wanted = self.state.may_serve
        self._listening.close_all_but(
            listener
            for number, taken in self.snapshots.items()
            if number in wanted
            for listener in taken.listeners
        )

    def _listeners(self) -> tuple[Listener, ...]:
        """Those of the current generation."""
        taken = self.snapshots.get(self.state.current or 0)
        return taken.listeners if taken else ()

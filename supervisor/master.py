"""The master: one loop that reads one queue of events, steps the lifecycle, and carries out its effects.

Signal handlers, sockets, timers and the control API only put events into the queue. What takes time (reading
settings, calling a worker) runs in a task whose end is one more event; nothing that blocks runs here. The master is
off the data path: no byte of a request, a response or a running worker's log passes through it.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import Coroutine, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from segue.handoff.listeners import BindError, Listener
from segue.supervisor import lifecycle, model, snapshot
from segue.supervisor import settings as config
from segue.supervisor.instance import Instance
from segue.supervisor.listening import Listening
from segue.supervisor.log import Log
from segue.supervisor.operations import Operation, Operations
from segue.supervisor.snapshot import Snapshot
from segue.supervisor.systemd import ServiceManager
from segue.supervisor.workers import Workers

LATE_S = 1.0
"""A timer that fires later than this says that the master itself did not run."""
START = "start"
"""Who asked for the first generation."""
FLUSH_S = 1.0
"""How long an exiting master waits for its last answers to be sent."""
_EXTEND_S = 30.0
_ENDING = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGTTIN, signal.SIGTTOU}
_THREADS = 2
"""For reading files and looking up names: one may hang on a dead file system."""


class Master:
    """One instance: its sockets, its workers and the state of their lifecycle. Made inside a running event loop."""

    def __init__(
        self, instance: Instance, flags: Mapping[str, Any], environ: MutableMapping[str, str], base_dir: str
    ) -> None:
        self.instance = instance
        self.state = model.State()
        self.operations = Operations()
        self.snapshots: dict[int, Snapshot] = {}
        self.started = time.time()
        self.token: str | None = None
        self.log = Log()
        self.exit_status: int | None = None
        self.changed = asyncio.Event()
        self._flags, self._environ, self._base_dir = dict(flags), environ, base_dir
        self._service = ServiceManager(environ)
        self._listening = Listening(environ)
        self._events: deque[model.Event] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._said_ready = False
        self.workers = Workers(instance, environ, self.log, self.put, self._start_task)

    # ------------------------------------------------------------------------------------------------ the loop

    async def run(self) -> int:
        """Serve until asked to stop; returns the exit status."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(_THREADS, "segue"))
        for number, handler in {
            signal.SIGHUP: self._on_hup,
            signal.SIGTERM: lambda: self._on_stop("SIGTERM"),
            signal.SIGINT: lambda: self._on_stop("SIGINT"),
            signal.SIGQUIT: lambda: self._on_stop("SIGQUIT", at_once=True),
            signal.SIGTTIN: lambda: self.put(model.ScaleAsked(None, delta=1)),
            signal.SIGTTOU: lambda: self.put(model.ScaleAsked(None, delta=-1)),
        }.items():
            loop.add_signal_handler(number, handler)
        self._start_task(self._service.watchdog())
        self.ask_reload(START)
        while self.exit_status is None:
            while self._events and self.exit_status is None:
                self._step(self._events.popleft())
            self.changed.clear()
            self._arm()
            if not self._events and self.exit_status is None:
                await self.changed.wait()
        await self._flush()
        self._close()
        return self.exit_status

    def put(self, event: model.Event) -> None:
        """Queue an event: the only way to make anything happen."""
        self._events.append(event)
        self.changed.set()

    def _step(self, event: model.Event) -> None:
        self.state, effects = lifecycle.step(self.state, event, time.monotonic())
        if isinstance(event, model.HandingOver) and not event.error:
            self._handed_over(event.generation)
        for effect in effects:
            self._execute(effect)

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

    async def _flush(self) -> None:
        """Let the last answers out: whoever asked for the stop is told of its end."""
        await asyncio.sleep(0)
        answering = [task for task in asyncio.all_tasks() if task.get_name() == "control-answer"]
        if answering:
            await asyncio.wait(answering, timeout=FLUSH_S)

    def _close(self) -> None:
        # the outcome is settled: a signal that comes while the interpreter ends must not give another exit status
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        self._listening.close()
        self.workers.close()
        self.instance.release()

    # --------------------------------------------------------------------------------------------- what is asked

    def ask_reload(self, asked_by: str) -> Operation:
        """Ask for a new generation."""
        operation = self.operations.create("reload", asked_by)
        self._service.reloading() if self._said_ready else None
        self.put(model.ReloadAsked(operation.number))
        return operation

    def ask_scale(self, asked_by: str, count: int) -> Operation:
        """Ask for `count` workers."""
        operation = self.operations.create("scale", asked_by)
        self.put(model.ScaleAsked(operation.number, count=count))
        return operation

    def ask_drain(self, asked_by: str, mode: str | None) -> Operation:
        """Begin the operator's drain in `mode`, or end it."""
        operation = self.operations.create("drain", asked_by)
        self.put(model.DrainAsked(operation.number, mode))
        return operation

    def ask_swap(self, asked_by: str, service: str, query: dict[str, str]) -> Operation:
        """Ask for another instance of a service in every worker of the current generation."""
        operation = self.operations.create("swap", asked_by, service=service)
        self.put(model.SwapAsked(operation.number, service, query))
        return operation

    def ask_stop(self, asked_by: str, at_once: bool = False) -> Operation:
        """Ask for the end of the instance."""
        operation = self.operations.create("stop", asked_by)
        self.put(self._stop_event(operation.number, at_once))
        return operation

    def _on_hup(self) -> None:
        self.log("info", "signal", signal="SIGHUP")
        self.ask_reload("SIGHUP")

    def _on_stop(self, name: str, at_once: bool = False) -> None:
        self.log("info", "signal", signal=name)
        self.put(self._stop_event(None, at_once))

    def _stop_event(self, operation: int | None, at_once: bool) -> model.StopAsked:
        self._service.stopping()
        current = self.snapshots.get(self.state.current or 0)
        settings = current.settings if current else None
        delay = settings.stop_delay if settings else 0.0
        budget = settings.timeout_graceful_shutdown if settings else 10.0
        self._service.extend(delay + budget + _EXTEND_S)
        return model.StopAsked(operation, at_once, delay, budget)

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
                self.workers.command(effect, names, self.state.generations[generation].target)
            case model.Kill(generation, worker, now):
                self.workers.kill((generation, worker), now)
            case model.Progress(operations, phase):
                for number in operations:
                    if (operation := self.operations.get(number)) is not None:
                        operation.progress(phase)
                if operations and phase != "queued":
                    self._service.extend(self._patience() + _EXTEND_S)
            case model.Settle():
                self._settle(effect)
            case model.Promoted(generation, previous):
                self._promoted(generation, previous)
            case model.AllDrained(generation):
                for operation in self.operations.last("reload", 50):
                    if operation.ok and operation.generation == generation:
                        operation.mark_drained()
                        if operation.asked_by != START:
                            self.log("info", "drained", replaced_by=generation, operation=operation.number)
            case model.Released(generation, failed):
                self._release(generation, failed)
            case model.Say(level, event, fields):
                self.log(level, event, **fields)
            case model.Exit(status):
                self.exit_status = status
                self.log("info", "exit", status=status)

    def _patience(self) -> float:
        change = self.state.change
        taken = self.snapshots.get(change.generation) if change else None
        return taken.settings.ready_timeout if taken else lifecycle.PREPARE_TIMEOUT_S

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
            self.put(model.PrepareFailed(generation, f"{type(error).__name__}: {error}"))
            return
        if generation not in self.state.generations:
            return
        try:
            listeners = await self._listening.open(taken.effective)
        except BindError as error:
            self._close_unused()
            self.put(model.PrepareFailed(generation, str(error)))
            return
        workers = self._workers_for(taken)
        self.snapshots[generation] = msgspec.structs.replace(taken, listeners=listeners, workers=workers)
        self._listening.opened()
        self._note_restart_only(taken)
        self.put(model.Prepared(generation, workers, taken.limits))

    def _workers_for(self, taken: Snapshot) -> int:
        """As the settings say; but a scale by hand lasts until the setting itself is changed."""
        current = self.state.current
        if current is not None and self.snapshots[current].settings.workers == taken.settings.workers:
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
        if operation is None:
            return
        operation.settle(effect)
        level = "info" if effect.ok else "error"
        fields = {
            "operation": operation.number,
            "asked_by": operation.asked_by,
            "reason": effect.reason or None,
        }
        outcome = "ok" if effect.ok else "refused"
        self.log(
            level,
            "start" if operation.asked_by == START else operation.kind,
            outcome=outcome,
            generation=effect.generation,
            seconds=sum(operation.phases.values()),
            **fields,
            service=operation.service or None,
            output=effect.output,
        )
        if operation.kind == "reload":
            if effect.ok:
                self._said_ready = True
            if self._said_ready:
                self._service.ready(self._summary(operation))

    def _summary(self, operation: Operation) -> str:
        serving = f"generation {self.state.current} serves" if self.state.current else "nothing serves"
        if operation.ok is False:
            return f"{serving}; the last reload was refused: {operation.reason}"
        return serving

    def _promoted(self, generation: int, previous: int | None) -> None:
        taken = self.snapshots[generation]
        self.token = taken.token
        self.log.set_level(taken.settings.uvicorn.get("log_level"))
        for listener in taken.listeners if previous is None else ():
            self.log("info", "listening", address=listener.info.address)
        self.log("info", "promoted", generation=generation, previous=previous, fingerprint=taken.fingerprint)

    def _handed_over(self, generation: int) -> None:
        """The old generation has stopped accepting: what only it listened on is refused from now on."""
        old = self.snapshots.get(generation)
        if old is None or generation == self.state.current:
            return
        current = self._listeners()
        for address in self._listening.refuse(each for each in old.listeners if each not in current):
            self.log("info", "closed", address=address)
        self._close_unused()

    def _release(self, generation: int, failed: bool) -> None:
        self.snapshots.pop(generation, None)
        self._close_unused()
        self.log("info", "retired", generation=generation, failed=failed or None)

    def _close_unused(self) -> None:
        """Close the listeners that neither the current generation nor one that boots asks for."""
        change = self.state.change
        wanted = {self.state.current, change.generation if change else None}
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

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
from collections.abc import Coroutine, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from segue.handoff.http import CallError, Response, call
from segue.handoff.listeners import BindError, Listener, adopt_listener, open_listeners
from segue.handoff.messages import HOT, NotifyKey, WorkerMode
from segue.handoff.notify import Notification, NotifySocket
from segue.supervisor import lifecycle, model, snapshot, spawning
from segue.supervisor import settings as config
from segue.supervisor.instance import Instance
from segue.supervisor.log import Log
from segue.supervisor.operations import Operation, Operations
from segue.supervisor.snapshot import Snapshot
from segue.supervisor.systemd import ServiceManager, inherited_fds

LATE_S = 1.0
"""A timer that fires later than this says that the master itself did not run."""
FLUSH_S = 1.0
"""How long an exiting master waits for its last answers to be sent."""
_EXTEND_S = 30.0
_THREADS = 2
"""For reading files and looking up names: one may hang on a dead file system."""

_EVENTS: dict[model.Verb, type[model.WorkerEvent]] = {
    model.Verb.ACTIVATE: model.Activated,
    model.Verb.QUIET: model.Quieted,
    model.Verb.HAND_OVER: model.HandingOver,
    model.Verb.STOP: model.StopTaken,
    model.Verb.DRAIN: model.DrainTold,
}


class Child:
    """A worker process, and the calls to it, which are made one after the other."""

    def __init__(self, process: spawning.Process, gated: bool) -> None:
        self.process = process
        self.gated = gated
        self.failure = ""
        self.ready_at: float | None = None
        self.started = time.monotonic()
        self.last_call: asyncio.Task[None] | None = None


class Master:
    """One instance: its sockets, its workers and the state of their lifecycle."""

    def __init__(
        self, instance: Instance, flags: Mapping[str, Any], environ: MutableMapping[str, str], base_dir: str
    ) -> None:
        self.instance = instance
        self.state = model.State()
        self.operations = Operations()
        self.snapshots: dict[int, Snapshot] = {}
        self.children: dict[tuple[int, int], Child] = {}
        self.started = time.time()
        self.token: str | None = None
        self.log = Log()
        self.exit_status: int | None = None
        self.changed = asyncio.Event()
        self._flags, self._environ, self._base_dir = dict(flags), environ, base_dir
        self._service = ServiceManager(environ)
        self._inherited = [adopt_listener(fd) for fd in inherited_fds(environ)]
        self._listeners: dict[str, list[Listener]] = {}
        self._relay = spawning.Relay.create()
        self._lifeline_read, self._lifeline_write = os.pipe2(os.O_CLOEXEC)
        self._notify = NotifySocket(instance.notify)
        self._pids: dict[int, tuple[int, int]] = {}
        self._events: deque[model.Event] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._opening: tuple[str, ...] = ()
        self._said_ready = False

    # ------------------------------------------------------------------------------------------------ the loop

    async def run(self) -> int:
        """Serve until asked to stop; returns the exit status."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(_THREADS, "segue"))
        loop.add_reader(self._notify.fileno(), self._read_notifications)
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
        self.ask_reload("start")
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
        self._read_notifications()  # what a worker said in time counts, however late it is read
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
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.close()
        self._relay.close()
        self._notify.close()
        os.close(self._lifeline_read)
        os.close(self._lifeline_write)
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
            case model.Spawn():
                self._start_task(self._spawn(effect)) if effect.gated else self._spawn_now(effect)
            case model.Command():
                self._command(effect)
            case model.Kill(generation, worker, now):
                child = self.children.get((generation, worker))
                if child is not None:
                    child.process.kill() if now else child.process.terminate()
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
                self.log("info", "drained", before=generation)
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
        if generation not in self.state.generations:
            return
        try:
            listeners = await self._open(taken.settings)
        except BindError as error:
            self.put(model.PrepareFailed(generation, str(error)))
            return
        workers = self._workers_for(taken)
        self.snapshots[generation] = msgspec.structs.replace(taken, listeners=listeners, workers=workers)
        self._opening = ()
        self._note_restart_only(taken)
        self.put(model.Prepared(generation, workers, taken.limits))

    async def _open(self, settings: config.Settings) -> tuple[Listener, ...]:
        """The listeners that these settings ask for: those that are open stay as they are."""
        opened: list[Listener] = []
        self._opening = settings.binds  # nobody else may close them before the snapshot names them
        try:
            for bind in settings.binds:
                if bind not in self._listeners:
                    found = [listener for listener in self._inherited if listener.info.address == bind]
                    self._listeners[bind] = found or await asyncio.to_thread(
                        open_listeners, bind, settings.backlog
                    )
                opened += self._listeners[bind]
        except BindError:
            self._opening = ()
            self._close_unused()
            raise
        return tuple(opened) + tuple(listener for listener in self._inherited if listener not in opened)

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

    async def _spawn(self, effect: model.Spawn) -> None:
        """A respawn: only if the code on disk is still the one that its generation was started from."""
        if await self._same_code(effect.generation, effect.worker):
            self._spawn_now(effect)

    async def _ready_if_same(self, key: tuple[int, int]) -> None:
        """The code may have changed while the respawn was importing it."""
        if await self._same_code(*key):
            self.put(model.WorkerReady(*key))

    async def _same_code(self, generation: int, worker: int) -> bool:
        taken = self.snapshots.get(generation)
        if taken is None:
            return False
        now = await asyncio.to_thread(taken.fingerprint_now)
        if now != taken.fingerprint:
            what = f"the code in {taken.app_dir} is no longer that of generation {generation}"
            self.put(model.CodeChanged(generation, worker, what))
        return now == taken.fingerprint

    def _spawn_now(self, effect: model.Spawn) -> None:
        key = (effect.generation, effect.worker)
        generation = self.state.generations.get(effect.generation)
        if generation is None or effect.worker not in generation.workers:
            return
        taken = self.snapshots[effect.generation]
        spec = taken.spec(self.instance, *key, effect.drain_mode)
        listeners = {listener.info.name: listener.sock for listener in taken.listeners}
        try:
            process = spawning.spawn(
                taken.python, spec, listeners, self._relay, self._lifeline_read, self._environ
            )
        except spawning.SpawnError as error:
            self.put(model.WorkerExited(*key, reason=str(error)))
            return
        self.children[key] = Child(process, effect.gated)
        self._pids[process.pid] = key
        self.log("info", "worker-spawned", generation=key[0], worker=key[1], pid=process.pid)
        asyncio.get_running_loop().add_reader(process.pidfd, self._on_exit, key)

    def _on_exit(self, key: tuple[int, int]) -> None:
        self._read_notifications()  # its last words come before its death
        child = self.children.pop(key)
        asyncio.get_running_loop().remove_reader(child.process.pidfd)
        status = child.process.reap()
        self._pids.pop(child.process.pid, None)
        output = child.process.tail() if child.ready_at is None else ""
        child.process.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(child.process.control_path)
        self.put(model.WorkerExited(*key, spawning.describe_exit(status, child.failure), output, status))

    def _command(self, effect: model.Command) -> None:
        child = self.children.get((effect.generation, effect.worker))
        if child is None:
            return
        child.last_call = self._start_task(self._call(effect, child, child.last_call))

    async def _call(self, effect: model.Command, child: Child, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        error = ""
        try:
            answer = await call(
                child.process.control_path, "POST", self._target(effect), timeout_s=effect.timeout
            )
            if answer.status >= 400:
                error = _detail(answer)
        except CallError as failure:
            error = str(failure)
        if not error and effect.verb is model.Verb.HAND_OVER:
            self._refuse_removed(effect.generation)
        self.put(_EVENTS[effect.verb](effect.generation, effect.worker, error))  # type: ignore[call-arg]

    def _target(self, effect: model.Command) -> str:
        match effect.verb:
            case model.Verb.ACTIVATE:
                return f"{HOT}/activate"
            case model.Verb.QUIET:
                return f"{HOT}/drain/start?mode=handover&send=0"
            case model.Verb.HAND_OVER:
                current = self.snapshots[self.state.current or effect.generation]
                names = ",".join(listener.info.name for listener in current.listeners)
                return f"{HOT}/drain/start?mode=handover&timeout={effect.budget:g}&listeners={names}"
            case model.Verb.STOP:
                return f"{HOT}/stop?timeout={effect.budget:g}"
            case model.Verb.DRAIN:
                return (
                    f"{HOT}/drain/start?mode={effect.mode}"
                    if effect.mode
                    else f"{HOT}/drain/stop?mode=operator"
                )

    def _settle(self, effect: model.Settle) -> None:
        operation = self.operations.get(effect.operation)
        if operation is None:
            return
        operation.settle(effect.ok, effect.reason, effect.output, effect.generation)
        level = "info" if effect.ok else "error"
        fields = {
            "operation": operation.number,
            "asked_by": operation.asked_by,
            "reason": effect.reason or None,
        }
        outcome = "ok" if effect.ok else "refused"
        self.log(
            level,
            operation.kind,
            outcome=outcome,
            generation=effect.generation,
            seconds=sum(operation.phases.values()),
            **fields,
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
        for listener in taken.listeners if previous is None else ():
            self.log("info", "listening", address=listener.info.address)
        self.log("info", "promoted", generation=generation, previous=previous, fingerprint=taken.fingerprint)

    def _refuse_removed(self, generation: int) -> None:
        """A bind that the new settings don't have: nobody accepts there any more, so nobody may be left waiting."""
        current = self.snapshots.get(self.state.current or 0)
        old = self.snapshots.get(generation)
        if current is None or old is None or self.state.current == generation:
            return
        for listener in old.listeners:
            if listener not in current.listeners and listener.bind in self._listeners:
                self.log("info", "closed", address=listener.info.address)
                listener.refuse()
        self._close_unused()

    def _release(self, generation: int, failed: bool) -> None:
        self.snapshots.pop(generation, None)
        self._close_unused()
        self.log("info", "retired", generation=generation, failed=failed or None)

    def _close_unused(self) -> None:
        """Close the listeners that neither the current generation nor one that boots asks for."""
        change = self.state.change
        wanted = {self.state.current, change.generation if change else None}
        used = {
            listener.bind
            for number, s in self.snapshots.items()
            if number in wanted
            for listener in s.listeners
        }
        used.update(self._opening)
        for bind in [bind for bind in self._listeners if bind not in used]:
            for listener in self._listeners.pop(bind):
                if listener not in self._inherited:
                    listener.close()

    # ----------------------------------------------------------------------------------------------- from workers

    def _read_notifications(self) -> None:
        for notification in self._notify.receive():
            key = self._pids.get(notification.pid)
            if key is not None:
                self._on_notification(key, notification)

    def _on_notification(self, key: tuple[int, int], notification: Notification) -> None:
        fields, child = notification.fields, self.children[key]
        if (failure := fields.get(NotifyKey.FAILED)) is not None:
            child.failure = failure
            return
        if (phase := fields.get(NotifyKey.PHASE)) is not None:
            self.put(model.WorkerPhased(*key, phase))
        if NotifyKey.READY in fields and child.ready_at is None:
            child.ready_at = time.monotonic()
            if child.gated:
                self._start_task(self._ready_if_same(key))
            else:
                self.put(model.WorkerReady(*key))
        if (why := fields.get(NotifyKey.RECYCLE)) is not None:
            self.put(model.WorkerAsks(*key, why))
        self.put(
            model.WorkerDrained(*key)
            if fields.get(NotifyKey.STATE) == WorkerMode.DRAINED
            else model.WorkerBeat(*key)
        )


def _detail(answer: Response) -> str:
    try:
        return str(answer.json().get("detail"))
    except (ValueError, AttributeError):
        return f"status {answer.status}"

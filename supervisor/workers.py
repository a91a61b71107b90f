"""The worker processes of an instance: started, called, listened to, and reaped.

What happens to them goes out as events of the lifecycle; nothing is decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec

from segue.handoff.http import Response
from segue.handoff.http_client import CallError, call
from segue.handoff.messages import EPOCH_HEADER, EPOCH_MEMBER, HOT, NotifyKey, SwapOrder, WorkerMode
from segue.handoff.notify import Notification, NotifySocket
from segue.supervisor import model, reaping, spawning
from segue.supervisor.finding import FoundWorker
from segue.supervisor.inherited import LIFELINE_READ, LIFELINE_WRITE, NOTIFY
from segue.supervisor.log import Log
from segue.supervisor.mastership import Mastership
from segue.supervisor.model import Verb
from segue.supervisor.notices import malformed
from segue.supervisor.snapshot import Snapshot

Key = tuple[int, int]
"""Generation and worker."""

_ANSWERS: dict[Verb, type[model.WorkerEvent]] = {
    Verb.ACTIVATE: model.Activated,
    Verb.QUIET: model.Quieted,
    Verb.HAND_OVER: model.HandingOver,
    Verb.PARK: model.Parked,
    Verb.STOP: model.StopTaken,
    Verb.DRAIN: model.DrainTold,
    Verb.SERVICES_DEACTIVATE: model.ServicesDeactivated,
}
_SWAP_PATHS = {
    Verb.SWAP_PREPARE: f"{HOT}/swap/prepare",
    Verb.SWAP_COMMIT: f"{HOT}/swap/commit",
    Verb.SWAP_ABORT: f"{HOT}/swap/abort",
}


_FAILED_KEPT = 16
"""Of so many workers that did not start it is kept what they printed."""
_COUNTS = re.compile(r"(\d{1,18}) (\d{1,18})")
_MOST_S = 366 * 86400.0
_DEATH_FOLLOWS_S = 0.5
"""How long after a broken call its process is given to be seen to have ended."""


class Printed(msgspec.Struct, frozen=True):
    """What a worker printed before it was ready."""

    generation: int
    worker: int
    pid: int
    state: str
    """Of a living worker, as in the status; else ``failed``."""
    reason: str
    """Why it failed."""
    output: str


class Child:
    """A worker process, and the calls to it, which are made one after the other."""

    def __init__(self, process: spawning.Process, taken: Snapshot | None, gated: bool) -> None:
        self.process = process
        self.taken = taken
        self.gated = gated
        """A respawn: it takes part only if its code is still its generation's."""
        self.failure = ""
        self.is_ready = False
        self.complaints: set[str] = set()
        """Which of what it says was wrong, so that each is logged once."""
        self.ended = asyncio.Event()
        self.last_call: asyncio.Task[None] | None = None
        self.last_about_services: asyncio.Task[None] | None = None


class Workers:
    """All of them, with what they share: the relay, the lifeline and the socket to which they report."""

    def __init__(
        self,
        mastership: Mastership,
        environ: Mapping[str, str],
        log: Log,
        put: Callable[[model.Event], None],
        start_task: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        deposed: Callable[[str], None],
    ) -> None:
        """`deposed` is called with the reason when a worker obeys another master."""
        self.children: dict[Key, Child] = {}
        self._starting: dict[Key, asyncio.Task[None]] = {}
        """Respawns whose code is being compared; they have no process yet."""
        self._mastership = mastership
        self._instance = mastership.instance
        self._environ = environ
        self._log = log
        self._put = put
        self._start_task = start_task
        self._deposed = deposed
        self._headers = {EPOCH_HEADER: str(mastership.epoch)}
        self.relay, self._lifeline = mastership.relay, mastership.lifeline
        self._notify = NotifySocket(self._instance.notify, mastership.notify)
        self._pids: dict[int, Key] = {}
        self._failed: deque[Printed] = deque(maxlen=_FAILED_KEPT)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._notify.fileno(), self.read_notifications)

    def close(self) -> None:
        """Give everything back; workers that are left see their lifeline end."""
        self._loop.remove_reader(self._notify.fileno())
        self._notify.close()
        self.relay.close()
        self._lifeline.close()

    @property
    def names(self) -> list[tuple[str, int]]:
        """What all workers share, by the names under which the next master of this process will know it."""
        return [
            *self.relay.names.items(),
            (LIFELINE_READ, self._lifeline.read),
            (LIFELINE_WRITE, self._lifeline.write),
            (NOTIFY, self._notify.fileno()),
        ]

    # Starting

    def spawn(self, effect: model.Spawn, taken: Snapshot) -> None:
        """Start a worker of the generation that `taken` is; gated, only if the code is still the same."""
        if effect.gated:
            key = (effect.generation, effect.worker)
            self._starting[key] = self._start_task(self._spawn_if_same(key, effect, taken))
        else:
            self._spawn(effect, taken)

    async def _spawn_if_same(self, key: Key, effect: model.Spawn, taken: Snapshot) -> None:
        same = await self._same_code(key, taken)
        del self._starting[key]
        if same:
            self._spawn(effect, taken)

    async def _same_code(self, key: Key, taken: Snapshot) -> bool:
        try:
            same = await asyncio.to_thread(taken.fingerprint_now) == taken.fingerprint
            what = f"the code in {taken.app_dir} is no longer that of generation {key[0]}"
        except (OSError, RuntimeError, MemoryError) as error:  # or the system refuses a thread, or memory
            same, what = False, f"the code in {taken.app_dir} can't be read: {error}"
        if not same:
            self._put(model.CodeChanged(*key, what))
        return same

    def _spawn(self, effect: model.Spawn, taken: Snapshot) -> None:
        key = (effect.generation, effect.worker)
        spec = msgspec.structs.replace(
            taken.spec(self._instance, *key, effect.drain_mode, effect.services),
            adoption_path=self._instance.adoption_socket(*key),
            identity=self._mastership.identity,
            epoch=self._mastership.epoch,
            fingerprint=taken.fingerprint,
        )
        listeners = {listener.info.name: listener.sock for listener in taken.listeners}
        try:
            process = spawning.spawn(taken.python, spec, listeners, self.relay, self._lifeline, self._environ)
        except spawning.SpawnError as error:
            self._put(model.WorkerExited(*key, reason=str(error)))
            return
        self._watch(key, Child(process, taken, effect.gated))
        self._log("info", "worker-spawned", generation=key[0], worker=key[1], pid=process.pid)

    def adopt(self, found: FoundWorker, taken: Snapshot | None) -> None:
        """Take over a worker that an earlier master has started; `taken` is its generation's snapshot, if it is known."""
        child = Child(found.process, taken, gated=found.booting and taken is not None)
        child.is_ready = not found.booting
        self._watch(found.key, child)

    def _watch(self, key: Key, child: Child) -> None:
        self.children[key] = child
        self._pids[child.process.pid] = key
        reaping.leave(child.process.pid)
        self._loop.add_reader(child.process.pidfd, self._on_exit, key)

    @property
    def processes(self) -> dict[Key, tuple[int, int]]:
        """Pid and start time of those that live."""
        return {key: (child.process.pid, child.process.start_time) for key, child in self.children.items()}

    async def _ready_if_same(self, key: Key, taken: Snapshot, ready: model.WorkerReady) -> None:
        """The code may have changed while the respawn was importing it."""
        if await self._same_code(key, taken):
            self._put(ready)

    # Ending

    def kill(self, key: Key, now: bool) -> None:
        """Ask a worker to end, or end it with its children."""
        child = self.children.get(key)
        if key in self._starting:
            self._starting.pop(key).cancel()
            self._put(model.WorkerExited(*key, reason="was no longer wanted before it was started"))
        elif child is not None and now:
            child.process.kill()
        elif child is not None:
            child.process.terminate()

    def _on_exit(self, key: Key) -> None:
        self.read_notifications()  # its last words come before its death
        child = self.children.pop(key)
        child.ended.set()
        process = child.process
        self._loop.remove_reader(process.pidfd)
        status = process.reap()
        reaping.done(process.pid)
        self._pids.pop(process.pid, None)
        output = "" if child.is_ready else process.tail()
        reason = spawning.describe_exit(status, child.failure)
        if not child.is_ready:
            self._failed.append(Printed(*key, process.pid, "failed", reason, process.printed()))
        process.close()
        self._instance.forget_worker(*key)
        self._put(model.WorkerExited(*key, reason, output, status))

    def printed(self, states: Mapping[Key, str]) -> list[Printed]:
        """What the living, and the last that failed, printed while they started, in their order."""
        living = [
            Printed(*key, child.process.pid, states.get(key, "ended"), "", child.process.printed())
            for key, child in self.children.items()
        ]
        return sorted([*self._failed, *living], key=lambda each: (each.generation, each.worker))

    # Calling

    def command(self, effect: model.Command, listeners: Iterable[str], siblings: int) -> None:
        """Call a worker, one of `siblings`; `listeners` are the names of those that the current generation has."""
        child = self.children.get((effect.generation, effect.worker))
        if child is not None:
            target = _target(effect, listeners, siblings)
            if effect.verb in {Verb.SERVICES_ACTIVATE, Verb.SERVICES_DEACTIVATE}:
                # in a row of their own: in a promote connections move first, and don't wait for services
                before = child.last_about_services
                child.last_about_services = self._start_task(self._call(effect, child, target, before))
            else:
                child.last_call = self._start_task(self._call(effect, child, target, child.last_call))

    async def _call(
        self, effect: model.Command, child: Child, target: str, before: asyncio.Task[None] | None
    ) -> None:
        if before is not None:
            await asyncio.wait([before])
        answer = await self._answer(child, target, effect.timeout)
        error = answer if isinstance(answer, str) else _error(answer)
        if effect.verb is Verb.SERVICES_ACTIVATE:
            self._put(model.ServicesActivated(effect.generation, effect.worker, effect.lead, error))
        else:
            self._put(_ANSWERS[effect.verb](effect.generation, effect.worker, error))  # type: ignore[call-arg]

    async def _answer(self, child: Child, target: str, timeout_s: float, body: bytes = b"") -> Response | str:
        """What a worker answers, or why it doesn't."""
        try:
            path, headers = child.process.control_path, self._headers
            answer = await call(path, "POST", target, timeout_s=timeout_s, headers=headers, body=body)
        except CallError as failure:
            # a process that dies closes its sockets first: its death, which says more, goes before the broken call
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DEATH_FOLLOWS_S):
                    await child.ended.wait()
            return str(failure)
        try:
            document = answer.json()
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            return f"it answered {answer.status} with what isn't a JSON object"
        if answer.status == HTTPStatus.CONFLICT and EPOCH_MEMBER in document:
            self._deposed(_error(answer))
        return answer

    def swap(self, effect: model.SwapCommand) -> None:
        """Call a worker about a swap. A prepare, which may take minutes, is made beside the other calls."""
        child = self.children.get((effect.generation, effect.worker))
        if child is None:
            return
        if effect.verb is Verb.SWAP_PREPARE:
            self._start_task(self._call_swap(effect, child, None))
        else:
            child.last_call = self._start_task(self._call_swap(effect, child, child.last_call))

    async def _call_swap(
        self, effect: model.SwapCommand, child: Child, before: asyncio.Task[None] | None
    ) -> None:
        if before is not None:
            await asyncio.wait([before])
        order = SwapOrder(effect.swap, effect.service, effect.query, effect.version, effect.choices)
        answer = await self._answer(
            child, _SWAP_PATHS[effect.verb], effect.timeout, msgspec.json.encode(order)
        )
        key = (effect.generation, effect.worker)
        error = answer if isinstance(answer, str) else _error(answer)
        document = {} if isinstance(answer, str) else answer.json()
        if effect.verb is Verb.SWAP_ABORT:
            self._put(model.SwapAborted(*key, effect.swap, error))
        elif effect.verb is Verb.SWAP_COMMIT:
            rolled_back = isinstance(answer, Response) and answer.status == HTTPStatus.CONFLICT
            report = {} if error else document
            self._put(model.SwapCommitted(*key, effect.swap, error, report, rolled_back))
        elif error:
            code = HTTPStatus.CONFLICT if isinstance(answer, str) else answer.status
            details = {"known": document["known"]} if "known" in document else {}
            self._put(model.SwapPrepared(*key, effect.swap, error, code, details))
        else:
            self._put(model.SwapPrepared(*key, effect.swap, report=document))

    # Listening

    def read_notifications(self) -> None:
        """Take what workers have said."""
        for notification in self._notify.receive():
            key = self._pids.get(notification.pid)
            if key is None:
                continue
            reason = malformed(notification.fields)
            if not reason:
                self._on_notification(key, self.children[key], notification)
            elif (about := reason.partition(" ")[0]) not in self.children[key].complaints:
                self.children[key].complaints.add(about)
                fields = {"generation": key[0], "worker": key[1], "pid": notification.pid}
                self._log("error", "notification-malformed", **fields, reason=reason)

    def _on_notification(self, key: Key, child: Child, notification: Notification) -> None:
        fields = notification.fields
        if (failure := fields.get(NotifyKey.FAILED)) is not None:
            child.failure = failure
            return
        if (phase := fields.get(NotifyKey.PHASE)) is not None:
            self._put(model.WorkerPhased(*key, phase))
        if NotifyKey.READY in fields and not child.is_ready:
            child.is_ready = True
            ready = model.WorkerReady(*key, _seconds(fields.get(NotifyKey.HANDOVER)))
            if child.gated and child.taken is not None:
                self._start_task(self._ready_if_same(key, child.taken, ready))
            else:
                self._put(ready)
        if (why := fields.get(NotifyKey.RECYCLE)) is not None:
            self._put(model.WorkerAsks(*key, why))
        if (counts := _COUNTS.fullmatch(fields.get(NotifyKey.RESPONSES, ""))) is not None:
            self._put(model.ResponsesCounted(*key, int(counts[1]), int(counts[2])))
        drained = fields.get(NotifyKey.STATE) == WorkerMode.DRAINED
        self._put(model.WorkerDrained(*key) if drained else model.WorkerBeat(*key))


def _seconds(text: str | None) -> float | None:
    """What a worker has said; nonsense is as good as nothing."""
    try:
        value = -1.0 if text is None else float(text)
    except ValueError:
        return None
    return value if 0 <= value < _MOST_S else None


def _target(effect: model.Command, listeners: Iterable[str], siblings: int) -> str:
    match effect.verb:
        case Verb.ACTIVATE:
            return f"{HOT}/activate?workers={siblings}&watch={effect.watch:g}"
        case Verb.QUIET:
            return f"{HOT}/drain/start?mode=handover&send=0"
        case Verb.HAND_OVER:
            names = ",".join(listeners)
            return f"{HOT}/drain/start?mode=handover&timeout={effect.budget:g}&listeners={names}"
        case Verb.PARK:
            return f"{HOT}/park?for={effect.budget:g}"
        case Verb.STOP:
            return f"{HOT}/stop?timeout={effect.budget:g}"
        case Verb.SERVICES_ACTIVATE:
            return f"{HOT}/services/activate?lead={int(effect.lead)}&timeout={effect.budget:g}"
        case Verb.SERVICES_DEACTIVATE:
            return f"{HOT}/services/deactivate?timeout={effect.budget:g}"
        case Verb.DRAIN if effect.mode:
            return f"{HOT}/drain/start?mode={effect.mode}"
        case Verb.DRAIN:
            return f"{HOT}/drain/stop?mode=operator"
        case _:
            raise ValueError(f"{effect.verb} is not a simple command")


def _error(answer: Response) -> str:
    """Why a worker refuses; empty if it doesn't."""
    if answer.status < HTTPStatus.BAD_REQUEST:
        return ""
    try:
        return str(answer.json().get("detail"))
    except (ValueError, AttributeError):
        return f"status {answer.status}"

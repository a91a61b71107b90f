"""What a master writes down for the next one (`segue.supervisor.journal`), and how that one reads it.

No token is written: it is read from its file again. Settings and the choices of services may hold secrets; the file
is for its owner only, and nothing of them is ever logged. What can't be read, since it is torn or of another version,
is as if it had never been written: living workers are asked, and the settings on disk fill what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from segue.handoff.adoption import start_time
from segue.handoff.listeners import Listener
from segue.handoff.messages import ListenerInfo, ServiceRecord
from segue.supervisor import settings as config
from segue.supervisor.code import Code
from segue.supervisor.model import GenerationState, PromoteKind, State, WorkerState
from segue.supervisor.snapshot import Snapshot
from segue.supervisor.timeline import Row
from segue.supervisor.totals import Written

_T = TypeVar("_T")
_TAKES_WORK = frozenset({WorkerState.ACTIVATING, WorkerState.ACTIVE})


class Instance(msgspec.Struct, frozen=True):
    """What never changes while a master lives."""

    identity: str
    epoch: int


class Clock(msgspec.Struct, frozen=True):
    """By which the times were written: the wall clock may be set before they are read."""

    boot: str
    wall: float
    """What a Unix time is ahead of the monotonic clock of that boot."""


class Numbers(msgspec.Struct, frozen=True):
    """What the next ones are called."""

    generation: int = 1
    operation: int = 1
    swaps: int = 0


class Promote(msgspec.Struct, frozen=True):
    """The last promote: its intent, and with `committed` that it is done."""

    epoch: int
    previous: int | None
    generation: int
    committed: bool = False
    kind: PromoteKind = PromoteKind.RELOAD
    because: str = ""
    mixed: bool = False
    """Not all of its workers were to serve yet."""
    operations: tuple[int, ...] = ()
    """Who waits for it."""


class Probation(msgspec.Struct, frozen=True):
    """The watch over the current generation."""

    generation: int
    previous: int
    until: float
    """Unix time."""
    share_before: float = 0.0
    breach: str = ""


class Swap(msgspec.Struct, frozen=True):
    """A swap that hasn't been decided: its workers may have to be told to give it up."""

    operation: int
    service: str
    version: int


class Process(msgspec.Struct, frozen=True, array_like=True):
    """A worker's process."""

    pid: int
    start_time: int
    handover: float | None = None
    lead: bool = False


class Sources(msgspec.Struct, frozen=True):
    """A `Snapshot`, without its token and with its settings as plain values."""

    settings: dict[str, Any]
    sources: dict[str, str]
    file: str | None
    working_dir: str
    app_dir: str
    python: str
    fingerprint: str
    listeners: tuple[ListenerInfo, ...]
    workers: int


class Generation(msgspec.Struct, frozen=True):
    """One generation."""

    state: str
    since: float
    """Unix time."""
    target: int
    missing: int
    next_worker: int
    processes: dict[int, Process] = {}
    sources: Sources | None = None
    warm_until: float | None = None
    """Unix time, as the next two."""
    kept_until: float | None = None
    served_until: float | None = None


class Memory(msgspec.Struct):
    """Everything that was written down."""

    wall: float = 0.0
    """What a Unix time in it is ahead of this machine's monotonic clock."""
    instance: Instance | None = None
    numbers: Numbers = Numbers()
    current: int | None = None
    drain_mode: str | None = None
    timeline: dict[int, Row] = {}
    promote: Promote | None = None
    probation: Probation | None = None
    swap: Swap | None = None
    services: dict[str, ServiceRecord] = {}
    generations: dict[int, Generation] = {}
    operations: dict[int, dict[str, Any]] = {}
    totals: Written | None = None
    codes: dict[int, Code] = {}
    """By generation."""


_CODE = "code/"
_GENERATION = "generation/"
_OPERATION = "operation/"


def recall(values: dict[str, bytes]) -> Memory:
    """Read it back. Never raises."""
    memory = Memory(
        wall=_wall_then(_decode(values.get("clock"), Clock)),
        instance=_decode(values.get("instance"), Instance),
        numbers=_decode(values.get("numbers"), Numbers) or Numbers(),
        promote=_decode(values.get("promote"), Promote),
        probation=_decode(values.get("probation"), Probation),
        swap=_decode(values.get("swap"), Swap),
        services=_decode(values.get("services"), dict[str, ServiceRecord]) or {},
        current=_decode(values.get("current"), int),
        drain_mode=_decode(values.get("drain_mode"), str),
        timeline=_decode(values.get("timeline"), dict[int, Row]) or {},
        totals=_decode(values.get("totals"), Written),
    )
    for key, data in values.items():
        kind, _, number = key.rpartition("/")
        if not number.isdecimal():
            continue
        if f"{kind}/" == _GENERATION and (generation := _decode(data, Generation)) is not None:
            memory.generations[int(number)] = generation
        elif f"{kind}/" == _OPERATION and (operation := _decode(data, dict[str, Any])) is not None:
            memory.operations[int(number)] = operation
        elif f"{kind}/" == _CODE and (code := _decode(data, Code)) is not None:
            memory.codes[int(number)] = code
    return memory


def _decode(data: bytes | None, kind: type[_T]) -> _T | None:
    try:
        return None if data is None else msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError):
        return None


def wall() -> float:
    """What a Unix time is ahead of the monotonic clock."""
    return time.time() - time.monotonic()


def _wall_then(written: Clock | None) -> float:
    return written.wall if written is not None and written.boot == _boot() != "" else wall()


def _boot() -> str:
    """What tells this boot of the machine from every other (random(4)); empty if that is hidden here."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class Writer:
    """Puts the state of a master into the form of the journal."""

    def __init__(self, instance: Instance, clock: Callable[[], float] = wall) -> None:
        """`clock` tells what a Unix time is ahead of the clock of the state."""
        self._instance, self._clock, self._boot = instance, clock, _boot()
        self._promote: Promote | None = None
        self._sources: dict[int, tuple[Snapshot, Sources]] = {}

    def values(
        self,
        state: State,
        snapshots: dict[int, Snapshot],
        processes: dict[tuple[int, int], tuple[int, int]],
        operations: dict[int, dict[str, Any]],
        next_operation: int,
        totals: Written,
        codes: Mapping[int, Code],
    ) -> dict[str, Any]:
        """What is to be in the journal. `processes` are pid and start time, by generation and worker."""
        self._sources = {number: known for number, known in self._sources.items() if number in snapshots}
        wall = self._clock()
        watch, change = state.probation, state.change
        undecided = state.swap if state.swap is not None and not state.swap.decided else None
        values: dict[str, Any] = {
            "instance": self._instance,
            "clock": Clock(self._boot, round(wall, 1)),
            "numbers": Numbers(state.next_generation, next_operation, state.swap_count),
            "current": state.current,
            "drain_mode": state.drain_mode,
            "promote": self._promote_of(state),
            "probation": watch
            and Probation(
                watch.generation,
                watch.previous,
                round(watch.until + wall, 1),
                round(watch.share_before, 3),
                watch.breach,
            ),
            "swap": undecided and Swap(undecided.operation, undecided.service, undecided.version),
            "services": state.services,
            "totals": totals,
        }
        for number, generation in state.generations.items():
            comes = change is not None and change.generation == number
            values[f"{_GENERATION}{number}"] = Generation(
                state=GenerationState.BOOTING if comes else generation.state,
                since=round(generation.since + wall, 1),
                target=generation.target,
                missing=generation.missing,
                next_worker=generation.next_worker,
                processes={
                    worker.id: Process(*processes[number, worker.id], worker.handover, worker.lead)
                    for worker in generation.workers.values()
                    if (number, worker.id) in processes
                },
                sources=self._sources_of(number, snapshots.get(number)),
                warm_until=_unix(generation.warm_until, wall),
                kept_until=_unix(generation.kept_until, wall),
                served_until=_unix(generation.served_until or None, wall),
            )
        for number, code in codes.items():
            values[f"{_CODE}{number}"] = msgspec.structs.replace(code, files={})
        return values | {f"{_OPERATION}{number}": document for number, document in operations.items()}

    def _promote_of(self, state: State) -> Promote | None:
        """Written with the step that tells the first worker to activate, before it is told."""
        promote = state.promote
        if promote is not None and state.generations[promote.generation].having(_TAKES_WORK):
            self._promote = Promote(
                self._instance.epoch,
                promote.previous,
                promote.generation,
                kind=promote.kind,
                because=promote.because,
                mixed=promote.is_mixed,
                operations=promote.operations,
            )
            return self._promote
        last = self._promote
        if last is not None and not last.committed:
            done = state.current == last.generation
            self._promote = msgspec.structs.replace(last, committed=True) if done else None
        return self._promote

    def _sources_of(self, number: int, taken: Snapshot | None) -> Sources | None:
        if taken is None:
            return None
        known = self._sources.get(number)
        if known is None or known[0] is not taken:
            known = self._sources[number] = (taken, _sources(taken))
        return known[1]


def _unix(time_s: float | None, wall: float) -> float | None:
    return None if time_s is None else round(time_s + wall, 1)


def _sources(taken: Snapshot) -> Sources:
    return Sources(
        settings=msgspec.to_builtins(taken.settings),
        sources=taken.effective.sources,
        file=taken.effective.file,
        working_dir=taken.working_dir,
        app_dir=taken.app_dir,
        python=taken.python,
        fingerprint=taken.fingerprint,
        listeners=tuple(listener.info for listener in taken.listeners),
        workers=taken.workers,
    )


def scaled(known: Memory, workers: int) -> int | None:
    """How many workers were asked for by hand, if the setting has been `workers` then and is still."""
    last = known.generations.get(known.current or 0)
    if last is None or last.sources is None or last.sources.settings.get("workers") != workers:
        return None
    return last.target or None


def kept(known: Memory) -> list[int]:
    """The generations whose time is not over yet."""
    now = time.monotonic() + known.wall
    return [
        n for n, each in known.generations.items() if each.kept_until is not None and each.kept_until > now
    ]


def living_settings(known: Memory) -> config.Effective | None:
    """What the current generation was started with, if one of its workers lives."""
    current = known.generations.get(known.current or 0)
    if current is None or current.sources is None:
        return None
    if not any(start_time(each.pid) == each.start_time for each in current.processes.values()):
        return None
    sources = current.sources
    try:
        return config.Effective(
            msgspec.convert(sources.settings, config.Settings), sources.sources, sources.file
        )
    except msgspec.ValidationError:
        return None


def snapshot_of(
    sources: Sources, listeners: Mapping[str, Listener], now: config.Effective
) -> Snapshot | None:
    """A generation's snapshot again, without its token; settings that its version of segue did not have are as `now`.

    None if it can't be had: the settings have another form.
    """
    known = msgspec.to_builtins(now.settings)
    settings = known | {key: value for key, value in sources.settings.items() if key in known}
    try:
        effective = config.Effective(
            msgspec.convert(settings, config.Settings), now.sources | sources.sources, sources.file
        )
    except msgspec.ValidationError:
        return None
    return Snapshot(
        effective=effective,
        working_dir=sources.working_dir,
        app_dir=sources.app_dir,
        python=sources.python,
        token=None,
        fingerprint=sources.fingerprint,
        listeners=tuple(listeners[info.name] for info in sources.listeners if info.name in listeners),
        workers=sources.workers,
    )

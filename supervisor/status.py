"""``GET /api/v1/hot/status`` of the master: what it knows itself, and what its workers say within a short deadline."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import msgspec
import psutil

from segue import __version__
from segue.handoff.http_client import CallError, call
from segue.handoff.messages import HOT, LATENCY_BOUNDS_S, WorkerMode, WorkerStatus
from segue.supervisor.master import Master
from segue.supervisor.merging import merge

WORKER_TIMEOUT_S = 1.0
"""How long a worker may take to tell; a silent one is shown without figures."""
_RELOADS_SHOWN = 20
_COUNTED = frozenset({WorkerMode.READY, WorkerMode.ACTIVE})
"""The modes of workers whose services count as those of the current generation."""

_NOT_SHOWN = frozenset({"pid", "generation", "worker", "counts"})
_UNKNOWN: dict[str, Any] = {
    "rss_bytes": None,
    "cpu_percent": None,
    "connections": None,
    "requests_total": None,
    "in_flight": None,
}


async def status(master: Master) -> dict[str, Any]:
    """The whole document."""
    keys = list(master.workers.children)
    answers = await asyncio.gather(*(_ask(master.workers.children[key].process.control_path) for key in keys))
    told = dict(zip(keys, answers, strict=True))
    state = master.state
    process = psutil.Process()
    return {
        "instance": master.instance.name,
        "ready": state.ready,
        "draining": state.drain_mode is not None,
        "drain_mode": state.drain_mode,
        "stopping": state.stopping is not None,
        **merge(
            answer.services
            for (generation, _), answer in told.items()
            if generation == state.current and isinstance(answer, WorkerStatus) and answer.mode in _COUNTED
        ),
        "current": state.current,
        "latency_bounds_s": LATENCY_BOUNDS_S,
        "probation": _probation(master),
        "generations": [_generation(master, number, told) for number in sorted(state.generations)],
        "master": {
            "pid": os.getpid(),
            "epoch": master.epoch,
            "differs_on_disk": master.codes.differs_on_disk,
            "started": master.started,
            "version": __version__,
            "rss_bytes": process.memory_info().rss,
            "descriptors": process.num_fds(),
        },
        "reloads": [_reload(o.document()) for o in master.operations.deploys(_RELOADS_SHOWN)],
        "timeline": master.timeline.document(),
        "listeners": listeners(master),
        "admin": master.admin,
    }


def without_output(document: dict[str, Any]) -> dict[str, Any]:
    """What of it everybody may see: what failed workers printed is for those who may steer."""
    return document | {"reloads": [reload | {"output": ""} for reload in document["reloads"]]}


async def services_of_current(master: Master) -> dict[str, Any]:
    """What the workers of the current generation say of their services, as one, by name."""
    children = master.workers.children
    paths = [child.process.control_path for key, child in children.items() if key[0] == master.state.current]
    answers = await asyncio.gather(*map(_ask, paths))
    told = [each for each in answers if isinstance(each, WorkerStatus) and each.mode in _COUNTED]
    services: dict[str, Any] = merge(each.services for each in told)["services"]
    return services


def _probation(master: Master) -> dict[str, Any] | None:
    """The watch over the current generation, or over a canary, while there is one."""
    watch, promote = master.state.probation, master.state.promote
    until = None if watch is None else watch.until
    if watch is None and promote is not None:
        watch, until = promote.watch, promote.until
    if watch is None or until is None:
        return None
    traffic = master.state.generations[watch.generation].traffic
    return {
        "generation": watch.generation,
        "previous": watch.previous,
        "until": _wall(until),
        "responses": traffic.responses - watch.since[0],
        "errors": traffic.errors - watch.since[1],
        "breach": watch.breach,
    }


def listeners(master: Master) -> list[dict[str, Any]]:
    """The public addresses of the current generation."""
    return [
        msgspec.to_builtins(listener.info) | {"bind": listener.bind}
        for listener in master.snapshots.listeners
    ]


async def _ask(path: str) -> WorkerStatus | str:
    try:
        answer = await call(path, "GET", f"{HOT}/status", timeout_s=WORKER_TIMEOUT_S)
        return msgspec.json.decode(answer.body, type=WorkerStatus)
    except (CallError, msgspec.MsgspecError, RecursionError) as error:
        return str(error)


def _generation(
    master: Master, number: int, told: dict[tuple[int, int], WorkerStatus | str]
) -> dict[str, Any]:
    generation = master.state.generations[number]
    taken = master.snapshots.by_generation.get(number)
    return {
        "id": number,
        "state": generation.state,
        "current": number == master.state.current,
        "since": _wall(generation.since),
        "fingerprint": taken.fingerprint if taken else None,
        "code": code.document() if (code := master.codes.by_generation.get(number)) else None,
        "changes": master.codes.changes.get(number),
        "app_dir": taken.app_dir if taken else None,
        "workers_wanted": generation.target,
        "workers_missing": generation.missing,
        "reason": generation.reason,
        "warm_until": _wall_or_none(generation.warm_until),
        "kept_until": _wall_or_none(generation.kept_until),
        "workers": [
            _worker(master, number, worker.id, str(worker.state), told.get((number, worker.id), "not asked"))
            for worker in generation.workers.values()
        ],
    }


def _worker(
    master: Master, generation: int, worker: int, state: str, told: WorkerStatus | str
) -> dict[str, Any]:
    child = master.workers.children.get((generation, worker))
    document: dict[str, Any] = {
        "id": worker,
        "pid": child.process.pid if child else None,
        "state": state,
        "control": child.process.control_path if child else None,
    }
    if isinstance(told, str):
        return document | _UNKNOWN | {"unknown_because": told}
    figures = msgspec.to_builtins(told)
    document["latency"] = figures["counts"]["latency"]
    return document | {key: value for key, value in figures.items() if key not in _NOT_SHOWN}


def _reload(document: dict[str, Any]) -> dict[str, Any]:
    return {
        "number": document["id"],
        **{key: value for key, value in document.items() if key != "id"},
    }


def _wall_or_none(monotonic: float | None) -> float | None:
    return None if monotonic is None else _wall(monotonic)


def _wall(monotonic: float) -> float:
    return time.time() - (time.monotonic() - monotonic)

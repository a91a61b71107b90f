"""A worker's own endpoints, on its private Unix socket: the master's commands, and anyone's questions."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Protocol

from segue.handoff.browser import foreign
from segue.handoff.http import Handler, Request, Response, Router, json_response, problem
from segue.handoff.messages import BEFORE_STOP, DRAIN_MODES, EPOCH_HEADER, HOT, WorkerMode, WorkerStatus
from segue.worker.adoption import Adoption
from segue.worker.services.endpoints import PHASES, phase, reload
from segue.worker.services.hosted import Hosted

_OF_THE_MASTER = ("reload", "stage", "promote", "discard", "rollback", "scale", "upgrade")
HANDOVER = "handover"
_MAX_TIMEOUT_S = 366 * 86400.0
_LEAVING = frozenset({WorkerMode.QUIET, WorkerMode.DRAINING, WorkerMode.DRAINED, WorkerMode.PARKED})
_SERVICES_TIMEOUT_S = 10.0


class Refused(Exception):  # noqa: N818 - it is what happened, and reads so
    """The worker is in a mode in which it can't do that; nothing has changed."""


class Commands(Protocol):
    """What a worker can be told to do. Each either does it or raises `Refused`."""

    master_socket: str
    mode: WorkerMode
    services: Hosted
    adoption: Adoption

    @property
    def operator_drain(self) -> str | None:
        """The operator's drain."""

    @operator_drain.setter
    def operator_drain(self, mode: str | None) -> None: ...

    def activate(self, alone: bool = False, watch_s: float = 0.0) -> None:
        """Accept and adopt connections; `alone`: no other worker does. Watched for `watch_s` seconds."""

    def quiet(self) -> None:
        """Accept and adopt nothing."""

    def drain(self, listeners: frozenset[str] | None, timeout_s: float | None) -> None:
        """Give away or finish what there is."""

    def park(self, seconds: float) -> None:
        """Stay, drained, for the case that its generation is taken back."""

    def stop(self, timeout_s: float | None) -> None:
        """End."""

    def commanded(self) -> None:
        """A command has arrived: the master knows of this worker."""

    def status(self) -> WorkerStatus:
        """How it is."""


def handler(worker: Commands) -> Handler:
    """What answers on the private socket of `worker`."""

    async def livez(_: Request) -> Response:
        return json_response({"status": "ok"})

    async def readyz(_: Request) -> Response:
        ready = worker.mode is WorkerMode.ACTIVE and worker.operator_drain is None
        answer = {
            "status": "ready" if ready else "not ready",
            "mode": worker.mode,
            "draining": worker.operator_drain,
        }
        return json_response(answer, 200 if ready else 503)

    async def status(_: Request) -> Response:
        document = worker.status()
        document.services = await worker.services.report()
        return json_response(document)

    async def activate(request: Request) -> Response:
        # optional: how many workers share the load, of which this is one
        worker.activate(alone=request.query.get("workers") == "1", watch_s=_seconds(request, "watch") or 0.0)
        return json_response(worker.status())

    async def drain_start(request: Request) -> Response:
        mode = request.query.get("mode", "")
        if mode in {*DRAIN_MODES, BEFORE_STOP}:
            worker.operator_drain = mode
        elif mode != HANDOVER:
            known = (HANDOVER, *DRAIN_MODES)
            return problem(400, f"drain takes ?mode={' or '.join(known)}, not {mode!r}", known=known)
        elif request.query.get("send", "1") == "0":
            worker.quiet()
        else:
            names = request.query.get("listeners")
            listeners = None if names is None else frozenset(name for name in names.split(",") if name)
            worker.drain(listeners, _timeout(request))
        return json_response(worker.status())

    async def drain_stop(request: Request) -> Response:
        mode = request.query.get("mode")
        if mode not in {None, HANDOVER, "operator"}:
            return problem(400, f"drain/stop takes ?mode=handover or operator, not {mode!r}")
        if mode in {None, "operator"}:
            worker.operator_drain = None
        if mode in {None, HANDOVER} and worker.mode in _LEAVING:
            worker.activate()
        return json_response(worker.status())

    async def park(request: Request) -> Response:
        worker.park(_seconds(request, "for") or 0.0)
        return json_response(worker.status())

    async def services_activate(request: Request) -> Response:
        lead = request.query.get("lead", "0") == "1"
        await worker.services.activate(lead, _timeout(request) or _SERVICES_TIMEOUT_S)
        return json_response(worker.status())

    async def services_deactivate(request: Request) -> Response:
        timeout_s = _timeout(request) or _SERVICES_TIMEOUT_S
        if not await worker.services.deactivate(timeout_s):
            return problem(409, f"a service of the generation did not let go within {timeout_s:g} s")
        return json_response(worker.status())

    async def reload_one(request: Request) -> Response:
        query = {key: value for key, value in request.query.items() if key != "*"}
        return await reload(worker.services.swaps, request.query["*"], query)

    async def swap(request: Request) -> Response:
        return await phase(worker.services.swaps, request.path.rpartition("/")[2], request.body)

    async def stop(request: Request) -> Response:
        worker.stop(_timeout(request))
        return json_response(worker.status(), 202)

    async def elsewhere(request: Request) -> Response:
        return problem(
            409,
            f"one worker can't do that: ask the master for {request.path} on its socket, {worker.master_socket}",
            master=worker.master_socket,
        )

    routes: dict[tuple[str, str], Handler] = {
        ("GET", "/livez"): livez,
        ("GET", "/readyz"): readyz,
        ("GET", f"{HOT}/status"): status,
        ("POST", f"{HOT}/activate"): _command(worker, activate),
        ("POST", f"{HOT}/drain/start"): _command(worker, drain_start),
        ("POST", f"{HOT}/drain/stop"): _command(worker, drain_stop),
        ("POST", f"{HOT}/park"): _command(worker, park),
        ("POST", f"{HOT}/stop"): _command(worker, stop),
        ("POST", f"{HOT}/services/activate"): _command(worker, services_activate),
        ("POST", f"{HOT}/services/deactivate"): _command(worker, services_deactivate),
        ("POST", f"{HOT}/reload/*"): _command(worker, reload_one),
        **{("POST", f"{HOT}/swap/{which}"): _command(worker, swap) for which in PHASES},
        **{("POST", f"{HOT}/{which}"): elsewhere for which in _OF_THE_MASTER},
        ("GET", f"{HOT}/operations/*"): elsewhere,
    }
    router = Router(routes)
    allowed = {os.geteuid(), 0}

    async def answer(request: Request) -> Response:
        if request.peer_uid not in allowed:
            return problem(403, f"user {request.peer_uid} may not command a worker of user {os.geteuid()}")
        return foreign(request) or await router(request)

    return answer


def _command(worker: Commands, do: Callable[[Request], Awaitable[Response]]) -> Handler:
    async def command(request: Request) -> Response:
        refusal = worker.adoption.obey(request.headers.get(EPOCH_HEADER.lower()))
        if refusal is not None:
            return problem(409, refusal, epoch=worker.adoption.epoch)
        worker.commanded()
        try:
            return await do(request)
        except Refused as refused:
            return problem(409, str(refused), mode=worker.mode)
        except ValueError as error:
            return problem(400, str(error))

    return command


def _timeout(request: Request) -> float | None:
    return _seconds(request, "timeout")


def _seconds(request: Request, key: str) -> float | None:
    text = request.query.get(key)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MAX_TIMEOUT_S:
        raise ValueError(f"{key} takes seconds from 0 to {_MAX_TIMEOUT_S:g}, not {text!r}")
    return seconds

"""What an instance can be asked to change through its control API: each is an operation, whose outcome is the answer."""

from __future__ import annotations

import re
from collections.abc import Callable

from segue.handoff.http import Handler, Request, Response, json_response, problem
from segue.handoff.messages import DRAIN_MODES, HOT, MAX_WAIT_S, MAX_WORKERS
from segue.supervisor import control_query as query
from segue.supervisor import model
from segue.supervisor.master import Master
from segue.supervisor.openapi import Parameter, Route
from segue.supervisor.operations import Operation, reached
from segue.supervisor.room import too_many
from segue.supervisor.status import status

MAX_SWAPS_WAITING = 100
_MAX_ASKED_BY = 100
"""Characters: it stands in the log, in the status and in the journal."""
_NOT_FOR_SERVICES = frozenset({"*", "wait", "until"})
"""Query parameters of a swap that are ours; the others are the service's."""


class Changes:
    """To one master."""

    def __init__(self, master: Master) -> None:
        self._master = master

    def routes(self) -> list[Route]:
        """As they are served and described."""
        change = (400, 409, 504)
        of_one = (*change, 404, 423)
        wait, of = (query.WAIT,), (query.GENERATION,)
        manner = (*query.MANNER, query.WAIT, query.UNTIL_WHEN)
        return [
            _route("reload", self._reload, "A new generation", manner, change),
            Route(
                "POST",
                f"{HOT}/reload/*",
                self._swap,
                "Swap a service in every worker",
                "operation",
                wait,
                query.SERVICE,
                of_one,
                more=True,
            ),
            _route(
                "stage", self._stage, "Start a generation that takes no requests yet", wait, (*change, 423)
            ),
            _route("promote", self._promote, "Let a generation serve", (*of, *manner), of_one),
            _route("discard", self._discard, "End a staged or parked generation", (*of, *wait), of_one),
            _route(
                "rollback",
                self._rollback,
                "Go back to the generation before",
                (*of, query.WAIT, query.UNTIL_WHEN),
                of_one,
            ),
            _route(
                "drain/start", self._drain_start, "Begin the operator's drain", (query.MODE, *wait), change
            ),
            _route("drain/stop", self._drain_stop, "End it", wait, change),
            _route("scale", self._scale, "Run so many workers", (query.WORKERS, *wait), (*change, 423)),
            _route("stop", self._stop, "Stop", (query.NOW, *wait), change),
            _route("upgrade", self._upgrade, "Renew the master in place", wait, change),
        ]

    async def _reload(self, request: Request) -> Response:
        manner = query.manner(request)
        return await self._ask(request, lambda by: self._master.requests.reload(by, manner))

    async def _stage(self, request: Request) -> Response:
        return await self._ask(request, lambda by: self._master.requests.ask("stage", by, model.StageAsked))

    async def _promote(self, request: Request) -> Response:
        manner = query.manner(request)
        return await self._ask_of(
            request, "promote", lambda operation, number: model.PromoteAsked(operation, number, *manner)
        )

    async def _discard(self, request: Request) -> Response:
        return await self._ask_of(request, "discard", model.DiscardAsked)

    async def _rollback(self, request: Request) -> Response:
        return await self._ask_of(request, "rollback", model.RollbackAsked)

    async def _ask_of(
        self, request: Request, kind: str, event: Callable[[int, int | None], model.Event]
    ) -> Response:
        """Ask for something that is about one generation."""
        number = query.number(request, "generation")
        return await self._ask(
            request,
            lambda by: self._master.requests.ask(kind, by, lambda operation: event(operation, number)),
        )

    async def _swap(self, request: Request) -> Response:
        name = request.query["*"]
        if re.fullmatch(query.SERVICE_NAME, name) is None:  # which also keeps it out of the log
            known = list((await status(self._master))["services"])
            shown = ", ".join(known) or "none"
            return problem(404, f"there is no service {name!r}; known: {shown}", known=known)
        settings = {key: value for key, value in request.query.items() if key not in _NOT_FOR_SERVICES}

        def ask(by: str) -> Operation | Response:
            if len(self._master.state.swaps_queued) >= MAX_SWAPS_WAITING:
                why = f"{MAX_SWAPS_WAITING} swaps are waiting already; try again when they have ended"
                return problem(423, why)
            return self._master.requests.swap(by, name, settings)

        return await self._ask(request, ask)

    async def _scale(self, request: Request) -> Response:
        workers = query.number(request, "workers", 1, MAX_WORKERS)
        if workers is None:
            return problem(400, f"scale takes ?workers=N with N from 1 to {MAX_WORKERS}")

        def ask(by: str) -> Operation | Response:
            if self._master.state.changing:
                return problem(423, "a reload is running; try again when it has ended")
            running = [child.process.pid for child in self._master.workers.children.values()]
            reason = too_many(workers, running)
            return problem(409, reason) if reason else self._master.requests.scale(by, workers)

        return await self._ask(request, ask)

    async def _drain_start(self, request: Request) -> Response:
        mode = request.query.get("mode", DRAIN_MODES[0])
        if mode not in DRAIN_MODES:
            return problem(
                400, f"drain takes ?mode={' or '.join(DRAIN_MODES)}, not {mode!r}", known=DRAIN_MODES
            )
        return await self._ask(request, lambda by: self._master.requests.drain(by, mode))

    async def _drain_stop(self, request: Request) -> Response:
        return await self._ask(request, lambda by: self._master.requests.drain(by, None))

    async def _stop(self, request: Request) -> Response:
        at_once = query.switch(request, "now")
        return await self._ask(request, lambda by: self._master.requests.stop(by, at_once))

    async def _upgrade(self, request: Request) -> Response:
        """Answers once it is known whether the new code starts: its end is told by the new master alone."""
        wait = query.seconds(request, "wait", MAX_WAIT_S)
        operation = self._master.requests.upgrade(_who(request))
        await operation.wait(wait, phase="queued")
        await operation.wait(wait, phase="try")
        location = _location(operation)
        if operation.ok is False:
            return problem(409, operation.reason, location, operation=operation.document())
        return json_response(operation.document(), 202, location)

    async def _ask(self, request: Request, ask: Callable[[str], Operation | Response]) -> Response:
        """What `ask` has begun, or its refusal; it is called with who asks, once all parameters are known to be right."""
        wait = query.seconds(request, "wait", MAX_WAIT_S)
        until = query.until(request)
        operation = ask(_who(request))
        if isinstance(operation, Response):
            return operation
        location = _location(operation)
        if wait == 0:
            return json_response(operation.document(), 202, location)
        await operation.wait(wait, until=until)
        document = operation.document()
        if not reached(document, until):
            return problem(
                504,
                f"the {operation.kind} goes on (phase {operation.phase}); {location['Location']} tells its outcome",
                location,
                operation=document,
            )
        if operation.outcome != "ok":
            return problem(
                operation.code, operation.reason, location, **operation.details, operation=document
            )
        return json_response(document, 200, location)


def _route(
    verb: str, handler: Handler, summary: str, parameters: tuple[Parameter, ...], refusals: tuple[int, ...]
) -> Route:
    async def handle(request: Request) -> Response:
        query.nothing_else(request, parameters)  # what was meant by it must not be done otherwise
        return await handler(request)

    return Route("POST", f"{HOT}/{verb}", handle, summary, "operation", parameters, refusals=refusals)


def _location(operation: Operation) -> dict[str, str]:
    return {"Location": f"{HOT}/operations/{operation.number}"}


def _who(request: Request) -> str:
    if request.peer_pid is None:
        return "admin listener"
    said = request.headers.get("x-segue-asked-by", "")[:_MAX_ASKED_BY]
    return said if said and said.isprintable() else f"pid {request.peer_pid}"

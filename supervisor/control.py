"""The master's control API: HTTP on the instance's Unix socket, and on ``--admin`` with a bearer token."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import re
import socket
from collections.abc import AsyncIterator, Callable

from segue.handoff.browser import foreign, from_the_page, misdirected
from segue.handoff.http import Request, Response, Router, json_response, problem, serve
from segue.handoff.messages import HOT
from segue.supervisor import dashboard, model
from segue.supervisor.master import Manner, Master
from segue.supervisor.metrics import scrape
from segue.supervisor.openapi import Parameter, Route, document
from segue.supervisor.operations import UNTIL, Operation, reached
from segue.supervisor.ring import KEPT, NUMBER, read_number
from segue.supervisor.room import too_many
from segue.supervisor.status import status
from segue.supervisor.watching import Watching

MAX_WAIT_S = 24 * 3600.0
MAX_WORKERS = 1024
MAX_COUNT = 10**9
"""The highest number of a generation, a worker, an operation or events that is looked for."""
MAX_SWAPS_WAITING = 100
MAX_FOLLOWERS = 64
EVENT_STREAM = "text/event-stream"
_NOT_FOR_SERVICES = frozenset({"*", "wait", "until"})
"""Query parameters of a swap that are ours; the others are the service's."""
DRAIN_MODES = ("reject", "queue")
STRATEGIES = tuple(model.Strategy)
_SESSION = "/session"
_OPEN_TO_ALL = frozenset(
    {
        "/livez",
        "/readyz",
        "/metrics",
        f"{HOT}/status",
        f"{HOT}/watch",
        f"{HOT}/openapi.json",
        _SESSION,
        *dashboard.FILES,
    }
)
_COUNT = {"type": "integer", "minimum": 0, "maximum": MAX_COUNT}
_PLAIN = re.compile("[0-9.eE+-]+")
"""How a number is written: float() takes more."""
_SERVICE_NAME = "^[a-z][a-z0-9_]{0,62}$"
_WAIT = Parameter(
    "wait", "Seconds to wait for the outcome at most", {"type": "number", "minimum": 0, "maximum": MAX_WAIT_S}
)
_UNTIL = Parameter("until", "How far to wait", {"type": "string", "enum": list(UNTIL)})
_PHASE = Parameter("phase", "Wait only for the end of this phase", {"type": "string"})
_AFTER = Parameter(
    "after", "The number of the last event that is known", {"type": "string", "pattern": f"^{NUMBER}$"}
)
_LAST = Parameter("last", "So many of the last events at most", _COUNT)
_GENERATION = Parameter("generation", "Which one", _COUNT)
_WORKER = Parameter("worker", "Which one", _COUNT)
_OPERATION = Parameter("id", "Its number", {"type": "integer", "minimum": 1, "maximum": MAX_COUNT})
_SERVICE = Parameter("service", "Its name", {"type": "string", "pattern": _SERVICE_NAME})
_MODE = Parameter("mode", "What becomes of new work", {"type": "string", "enum": list(DRAIN_MODES)})
_WORKERS = Parameter(
    "workers", "How many", {"type": "integer", "minimum": 1, "maximum": MAX_WORKERS}, required=True
)
_NOW = Parameter("now", "1: at once, cutting off what is in flight", {"type": "string"})
_MANNER = (
    Parameter("strategy", "How it takes over", {"type": "string", "enum": list(STRATEGIES)}),
    Parameter(
        "canary",
        "So many workers first, which no strategy but surge does; 0: none",
        {"type": "integer", "minimum": 0, "maximum": MAX_WORKERS},
    ),
    Parameter("canary-for", "For so many seconds", {"type": "number", "minimum": 0, "maximum": MAX_WAIT_S}),
)
_WAITING_FOR_START = "the first generation has not started yet"


class Control:
    """Answers requests about one master."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self._servers: list[asyncio.Server] = []
        self._followers = 0
        self._admin_names: frozenset[str] = frozenset()
        """Names beside its addresses under which ``--admin`` is asked."""
        self._watching = Watching(self._look, master.events.changed)
        self._routes = self._documented()
        self._description = document(self._routes)
        self._router = Router(
            {
                **{(route.method, route.path): route.handler for route in self._routes},
                ("GET", _SESSION): self._session,
                ("POST", _SESSION): self._sign_in,
                ("DELETE", _SESSION): self._sign_out,
                **{("GET", path): dashboard.page for path in dashboard.FILES},
            }
        )

    def _documented(self) -> list[Route]:
        """What others steer an instance with: served and described from here."""
        change = (400, 409, 504)
        of_one = (*change, 404, 423)
        of, manner = (_GENERATION,), (*_MANNER, _WAIT, _UNTIL)
        return [
            Route("GET", "/livez", self._livez, "Whether the master's loop runs", open=True),
            Route("GET", "/readyz", self._readyz, "Whether requests are served", refusals=(503,), open=True),
            Route("GET", "/metrics", self._metrics, "For Prometheus", "text", open=True),
            Route("GET", f"{HOT}/openapi.json", self._openapi, "This description", open=True),
            Route("GET", f"{HOT}/status", self._status, "All that is known", open=True),
            Route("GET", f"{HOT}/config", self._config, "Settings and their sources", refusals=(503,)),
            Route(
                "GET",
                f"{HOT}/operations/*",
                self._operation,
                "One operation; waits for its outcome if asked to",
                "operation",
                (_WAIT, _UNTIL, _PHASE),
                _OPERATION,
                (400, 404),
            ),
            Route(
                "GET",
                f"{HOT}/events",
                self._events,
                "The last events, or all that come, as a stream",
                "json or events",
                (_AFTER, _LAST),
                refusals=(400, 503),
            ),
            Route(
                "GET",
                f"{HOT}/watch",
                self._watch,
                "The status, and again with each change",
                "events",
                refusals=(503,),
                open=True,
            ),
            Route(
                "GET",
                f"{HOT}/logs",
                self._logs,
                "What workers printed while they started",
                parameters=(_GENERATION, _WORKER),
                refusals=(400,),
            ),
            Route(
                "POST", f"{HOT}/reload", self._reload, "A new generation", "operation", manner, None, change
            ),
            Route(
                "POST",
                f"{HOT}/reload/*",
                self._swap,
                "Swap a service in every worker",
                "operation",
                (_WAIT,),
                _SERVICE,
                of_one,
                more=True,
            ),
            Route(
                "POST",
                f"{HOT}/stage",
                self._stage,
                "Start a generation that takes no requests yet",
                "operation",
                (_WAIT,),
                None,
                (*change, 423),
            ),
            Route(
                "POST",
                f"{HOT}/promote",
                self._promote,
                "Let a generation serve",
                "operation",
                (*of, *manner),
                None,
                of_one,
            ),
            Route(
                "POST",
                f"{HOT}/discard",
                self._discard,
                "End a staged or parked generation",
                "operation",
                (*of, _WAIT),
                None,
                of_one,
            ),
            Route(
                "POST",
                f"{HOT}/rollback",
                self._rollback,
                "Go back to the generation before",
                "operation",
                (*of, _WAIT, _UNTIL),
                None,
                of_one,
            ),
            Route(
                "POST",
                f"{HOT}/drain/start",
                self._drain_start,
                "Begin the operator's drain",
                "operation",
                (_MODE, _WAIT),
                None,
                change,
            ),
            Route(
                "POST", f"{HOT}/drain/stop", self._drain_stop, "End it", "operation", (_WAIT,), None, change
            ),
            Route(
                "POST",
                f"{HOT}/scale",
                self._scale,
                "Run so many workers",
                "operation",
                (_WORKERS, _WAIT),
                None,
                (*change, 423),
            ),
            Route("POST", f"{HOT}/stop", self._stop, "Stop", "operation", (_NOW, _WAIT), None, change),
            Route(
                "POST",
                f"{HOT}/upgrade",
                self._upgrade,
                "Renew the master in place",
                "operation",
                (_WAIT,),
                None,
                change,
            ),
        ]

    async def listen(self, inherited: int | None = None) -> int:
        """Serve the control socket: mode 0600 (0660 with a group), and the peer is checked besides. Returns its descriptor.

        `inherited` is that descriptor, if this process has opened it before it began anew.
        """
        path = self._master.instance.control
        if inherited is not None and os.path.exists(path):
            sock = socket.socket(fileno=inherited)
        else:
            if inherited is not None:
                os.close(inherited)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.bind(path)
            self._master.instance.share(path, 0o600, 0o660)
        sock.setblocking(False)
        self._servers.append(await serve(sock, self._answer, self._admit_to_socket))
        return sock.fileno()

    async def listen_admin(self, sock: socket.socket, host: str) -> None:
        """Serve ``--admin`` on a bound TCP socket; `host` is what its address was given as."""
        self._admin_names = frozenset({host.lower()})
        sock.setblocking(False)
        self._servers.append(await serve(sock, self._answer, self._admit_to_admin))

    def close(self) -> None:
        """Stop listening."""
        for server in self._servers:
            server.close()

    def _admit_to_socket(self, request: Request) -> Response | None:
        group = self._master.instance.group
        if request.peer_uid not in {os.geteuid(), 0} and (group is None or group not in request.peer_groups):
            allowed = f"user {os.geteuid()}" + ("" if group is None else f", a member of group {group},")
            return problem(
                403, f"user {request.peer_uid} may not control this instance; be {allowed} or root"
            )
        # with an Origin it may come from a browser, through a forwarded port: then its name is checked, too
        return foreign(request) or (misdirected(request, ()) if "origin" in request.headers else None)

    def _admit_to_admin(self, request: Request) -> Response | None:
        refusal = foreign(request)
        if refusal is None and request.peer_uid is None:
            refusal = misdirected(request, self._admin_names)
        if refusal is not None:
            return refusal
        signing = request.path == _SESSION  # asks for the token by itself
        reading = request.method in {"GET", "HEAD"}
        if not signing and not (reading and request.path in _OPEN_TO_ALL):
            return None if self._in_session(request) else _check_token(request, self._master.token)
        return None

    async def _answer(self, request: Request) -> Response:
        task = asyncio.current_task()
        if task is not None:
            task.set_name("control-answer")  # an exiting master waits for it
        try:
            return await self._router(request)
        except ValueError as error:
            return problem(400, str(error))

    # ------------------------------------------------------------------------------------------------- reading

    async def _livez(self, _: Request) -> Response:
        return json_response({"alive": True})

    async def _readyz(self, _: Request) -> Response:
        state = self._master.state
        if state.ready:
            return json_response({"ready": True, "generation": state.current})
        if state.stopping is not None:
            why = "segue is stopping"
        elif state.drain_mode is not None:
            why = f"the operator's drain is on (mode {state.drain_mode})"
        else:
            why = "no worker of an active generation accepts"
        return problem(503, why, ready=False)

    async def _metrics(self, request: Request) -> Response:
        return await scrape(self._master, request.headers.get("accept", ""))

    async def _openapi(self, _: Request) -> Response:
        return json_response(self._description)

    async def _status(self, _: Request) -> Response:
        return json_response(await status(self._master))

    async def _look(self) -> dict[str, object]:
        return await status(self._master)

    async def _watch(self, _: Request) -> Response:
        """The status, and again with everything that happens."""
        if self._followers >= MAX_FOLLOWERS:
            return _too_many_followers()
        headers = (("Cache-Control", "no-store"),)
        if (task := asyncio.current_task()) is not None:
            task.set_name("control-watch")  # which has no end that an exiting master could wait for
        return Response(200, b"", EVENT_STREAM, headers, self._follow(self._watching.stream()))

    # ------------------------------------------------------------------------------------------------- sessions

    def _in_session(self, request: Request) -> bool:
        """A browser that has signed in; what it asks to be changed must come from the page itself."""
        if not dashboard.in_session(request, self._master.token):
            return False
        return request.method in {"GET", "HEAD"} or from_the_page(request)

    async def _session(self, request: Request) -> Response:
        """What whoever looks at the page may do."""
        session = request.peer_uid is None and dashboard.in_session(request, self._master.token)
        document = {
            "act": request.peer_uid is not None or session,
            "token": self._master.token is not None,
            "session": session,
        }
        return json_response(document, headers={"Cache-Control": "no-store"})

    async def _sign_in(self, request: Request) -> Response:
        refusal = _check_token(request, self._master.token)
        if refusal is not None:
            return refusal
        assert self._master.token is not None
        return json_response(
            {"act": True}, headers={"Set-Cookie": dashboard.begin_session(self._master.token)}
        )

    async def _sign_out(self, _: Request) -> Response:
        return json_response({"act": False}, headers={"Set-Cookie": dashboard.end_session()})

    async def _config(self, _: Request) -> Response:
        taken = self._master.snapshots.get(self._master.state.current or 0)
        if taken is None:
            return problem(503, _WAITING_FOR_START)
        from segue.supervisor.settings import show

        return Response(200, show(taken.effective, as_json=True).encode() + b"\n")

    async def _operation(self, request: Request) -> Response:
        text = request.query["*"]
        number = _digits(text)
        operation = None if number is None else self._master.operations.get(number)
        if operation is None:
            return problem(404, f"there is no operation {text}; the last 100 are kept")
        wait = _seconds(request, "wait", 0.0)
        await operation.wait(wait, until=_until(request), phase=request.query.get("phase"))
        return json_response(operation.document())

    async def _events(self, request: Request) -> Response:
        """The last events; as a stream, if that is what is accepted, also all that come."""
        events = self._master.events
        after = request.headers.get("last-event-id") or request.query.get("after")
        number = None if after is None else read_number(after)
        asked = _number(request, "last")
        count = KEPT if asked is None else asked
        if EVENT_STREAM not in request.headers.get("accept", ""):
            kept = events.after(number)[-count:] if count else []
            return Response(200, b'{"events":[' + b",".join(line for _, line in kept) + b"]}\n")
        if self._followers >= MAX_FOLLOWERS:
            return _too_many_followers()
        headers = (("Cache-Control", "no-store"),)
        return Response(200, b"", EVENT_STREAM, headers, self._follow(events.stream(number, count)))

    async def _follow(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self._followers += 1
        try:
            async for piece in pieces:
                yield piece
        finally:
            self._followers -= 1

    async def _logs(self, request: Request) -> Response:
        """What workers printed while they started: those that live, and the last that failed."""
        generation, worker_id = _number(request, "generation"), _number(request, "worker")
        generations = self._master.state.generations
        states = {
            (g.id, worker.id): str(worker.state)
            for g in generations.values()
            for worker in g.workers.values()
        }
        found = [
            printed
            for printed in self._master.workers.printed(states)
            if generation in {None, printed.generation} and worker_id in {None, printed.worker}
        ]
        return json_response({"logs": found})

    # ------------------------------------------------------------------------------------------------ changing

    async def _reload(self, request: Request) -> Response:
        manner = _manner(request)
        return await self._ask(request, lambda by: self._master.ask_reload(by, manner))

    async def _stage(self, request: Request) -> Response:
        return await self._ask(request, lambda by: self._master.ask("stage", by, model.StageAsked))

    async def _promote(self, request: Request) -> Response:
        manner = _manner(request)
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
        number = _number(request, "generation")
        return await self._ask(
            request, lambda by: self._master.ask(kind, by, lambda operation: event(operation, number))
        )

    async def _swap(self, request: Request) -> Response:
        name = request.query["*"]
        if re.fullmatch(_SERVICE_NAME, name) is None:  # which also keeps it out of the log
            known = list((await status(self._master))["services"])
            shown = ", ".join(known) or "none"
            return problem(404, f"there is no service {name!r}; known: {shown}", known=known)
        query = {key: value for key, value in request.query.items() if key not in _NOT_FOR_SERVICES}

        def ask(by: str) -> Operation | Response:
            if len(self._master.state.swaps_queued) >= MAX_SWAPS_WAITING:
                why = f"{MAX_SWAPS_WAITING} swaps are waiting already; try again when they have ended"
                return problem(423, why)
            return self._master.ask_swap(by, name, query)

        return await self._ask(request, ask)

    async def _scale(self, request: Request) -> Response:
        workers = _number(request, "workers", 1, MAX_WORKERS)
        if workers is None:
            return problem(400, f"scale takes ?workers=N with N from 1 to {MAX_WORKERS}")

        def ask(by: str) -> Operation | Response:
            if self._master.state.changing:
                return problem(423, "a reload is running; try again when it has ended")
            running = [child.process.pid for child in self._master.workers.children.values()]
            reason = too_many(workers, running)
            return problem(409, reason) if reason else self._master.ask_scale(by, workers)

        return await self._ask(request, ask)

    async def _drain_start(self, request: Request) -> Response:
        mode = request.query.get("mode", DRAIN_MODES[0])
        if mode not in DRAIN_MODES:
            return problem(
                400, f"drain takes ?mode={' or '.join(DRAIN_MODES)}, not {mode!r}", known=DRAIN_MODES
            )
        return await self._ask(request, lambda by: self._master.ask_drain(by, mode))

    async def _drain_stop(self, request: Request) -> Response:
        return await self._ask(request, lambda by: self._master.ask_drain(by, None))

    async def _stop(self, request: Request) -> Response:
        at_once = request.query.get("now", "0") not in {"0", "false", ""}
        return await self._ask(request, lambda by: self._master.ask_stop(by, at_once))

    async def _upgrade(self, request: Request) -> Response:
        """Answers once it is known whether the new code starts: its end is told by the new master alone."""
        wait = _seconds(request, "wait", MAX_WAIT_S)
        operation = self._master.ask_upgrade(_who(request))
        await operation.wait(wait, phase="queued")
        await operation.wait(wait, phase="try")
        location = {"Location": f"{HOT}/operations/{operation.number}"}
        if operation.ok is False:
            return problem(409, operation.reason, location, operation=operation.document())
        return json_response(operation.document(), 202, location)

    async def _ask(self, request: Request, ask: Callable[[str], Operation | Response]) -> Response:
        """What `ask` has begun, or its refusal; it is called with who asks, once all parameters are known to be right."""
        wait = _seconds(request, "wait", MAX_WAIT_S)
        until = _until(request)
        operation = ask(_who(request))
        if isinstance(operation, Response):
            return operation
        location = {"Location": f"{HOT}/operations/{operation.number}"}
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


def _too_many_followers() -> Response:
    return problem(503, f"{MAX_FOLLOWERS} callers follow already", {"Retry-After": "10"})


def _who(request: Request) -> str:
    if request.peer_pid is None:
        return "admin listener"
    return request.headers.get("x-segue-asked-by") or f"pid {request.peer_pid}"


def _seconds(request: Request, key: str, default: float) -> float:
    text = request.query.get(key)
    if text is None:
        return default
    try:
        value = float(text) if _PLAIN.fullmatch(text) else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_WAIT_S:
        raise ValueError(f"?{key}= takes seconds from 0 to {MAX_WAIT_S:g}, not {text!r}")
    return value


def _number(request: Request, key: str, lowest: int = 0, highest: int = MAX_COUNT) -> int | None:
    text = request.query.get(key)
    if text is None:
        return None
    value = _digits(text)
    if value is None or not lowest <= value <= highest:
        raise ValueError(f"?{key}= takes a number from {lowest} to {highest}, not {text!r}")
    return value


def _digits(text: str) -> int | None:
    """The number that `text` writes, in as many digits as any here has."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _manner(request: Request) -> Manner:
    """How one generation shall take over from another, where it isn't to be as the settings say."""
    strategy, canary = request.query.get("strategy"), _number(request, "canary", 0, MAX_WORKERS)
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"?strategy= takes {', '.join(STRATEGIES)}, not {strategy!r}")
    if canary and strategy not in {None, model.Strategy.SURGE}:
        raise ValueError(f"a canary and the strategy {strategy} contradict each other: leave one of them out")
    return Manner(
        None if strategy is None else model.Strategy(strategy),
        canary,
        _seconds(request, "canary-for", 0.0) if "canary-for" in request.query else None,
    )


def _until(request: Request) -> str:
    until = request.query.get("until", UNTIL[0])
    if until not in UNTIL:
        raise ValueError(f"?until= takes {', '.join(UNTIL)}, not {until!r}")
    return until


def _check_token(request: Request, token: str | None) -> Response | None:
    if token is None:
        return problem(403, "this needs a token, and segue serves without --token-file")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    digests = [hashlib.sha256(text.strip().encode()).digest() for text in (given, token)]
    if scheme.lower() != "bearer" or not hmac.compare_digest(*digests):
        return problem(401, "a bearer token is needed", {"WWW-Authenticate": 'Bearer realm="segue"'})
    return None

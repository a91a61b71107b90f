"""What can be read of an instance through its control API: its status, its operations, its events and its output."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from segue.handoff.http import Request, Response, json_response, problem
from segue.handoff.messages import HOT
from segue.supervisor import control_query as query
from segue.supervisor.master import Master
from segue.supervisor.metrics import scrape
from segue.supervisor.openapi import Route
from segue.supervisor.ring import KEPT, read_number
from segue.supervisor.status import status, without_output
from segue.supervisor.watching import Watching

MAX_FOLLOWERS = 64
EVENT_STREAM = "text/event-stream"
_NO_STORE = (("Cache-Control", "no-store"),)


class Reads:
    """Of one master."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self._followers = {True: 0, False: 0}
        """By whether they are trusted: who isn't keeps nobody out who is."""
        self._watching = Watching(lambda: status(master), without_output, master.events.changed)

    def routes(self) -> list[Route]:
        """As they are served and described."""
        return [
            Route("GET", "/livez", self._livez, "Whether the master's loop runs", open=True),
            Route("GET", "/readyz", self._readyz, "Whether requests are served", refusals=(503,), open=True),
            Route("GET", "/metrics", self._metrics, "For Prometheus", "text", open=True),
            Route("GET", f"{HOT}/status", self._status, "All that is known", open=True),
            Route("GET", f"{HOT}/config", self._config, "Settings and their sources", refusals=(503,)),
            Route(
                "GET",
                f"{HOT}/operations/*",
                self._operation,
                "One operation; waits for its outcome if asked to",
                "operation",
                (query.WAIT, query.UNTIL_WHEN, query.PHASE),
                query.OPERATION,
                (400, 404),
            ),
            Route(
                "GET",
                f"{HOT}/events",
                self._events,
                "The last events, or all that come, as a stream",
                "json or events",
                (query.AFTER, query.LAST),
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
                parameters=(query.GENERATION, query.WORKER),
                refusals=(400,),
            ),
        ]

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

    async def _status(self, request: Request) -> Response:
        document = await status(self._master)
        return json_response(document if self._may_see_output(request) else without_output(document))

    async def _config(self, _: Request) -> Response:
        taken = self._master.snapshots.current
        if taken is None:
            return problem(503, "the first generation has not started yet")
        from segue.supervisor.settings import show

        return Response(200, show(taken.effective, as_json=True).encode() + b"\n")

    async def _operation(self, request: Request) -> Response:
        text = request.query["*"]
        number = query.digits(text)
        operation = None if number is None else self._master.operations.get(number)
        if operation is None:
            return problem(404, f"there is no operation {text}; the last 100 are kept")
        wait = query.seconds(request, "wait", 0.0)
        await operation.wait(wait, until=query.until(request), phase=request.query.get("phase"))
        return json_response(operation.document())

    async def _events(self, request: Request) -> Response:
        """The last events; as a stream, if that is what is accepted, also all that come."""
        events = self._master.events
        after = request.headers.get("last-event-id") or request.query.get("after")
        number = None if after is None else read_number(after)
        asked = query.number(request, "last")
        count = KEPT if asked is None else asked
        if EVENT_STREAM not in request.headers.get("accept", ""):
            kept = events.after(number)[-count:] if count else []
            return Response(200, b'{"events":[' + b",".join(line for _, line in kept) + b"]}\n")
        return await self._stream(request, events.stream(number, count))

    def _may_see_output(self, request: Request) -> bool:
        """Whoever may steer; in development mode everybody: a token would be too much on a laptop."""
        return request.trusted or self._master.develops

    async def _watch(self, request: Request) -> Response:
        """The status, and again with everything that happens."""
        answer = await self._stream(request, self._watching.stream(self._may_see_output(request)))
        if answer.stream is not None and (task := asyncio.current_task()) is not None:
            task.set_name("control-watch")  # which has no end that an exiting master could wait for
        return answer

    async def _stream(self, request: Request, pieces: AsyncIterator[bytes]) -> Response:
        if self._followers[request.trusted] >= MAX_FOLLOWERS:
            return problem(503, f"{MAX_FOLLOWERS} callers follow already", {"Retry-After": "10"})
        following = self._follow(pieces, request.trusted)
        await anext(following)  # it counts from here on: of many who ask at once, no more than may are let in
        return Response(200, b"", EVENT_STREAM, _NO_STORE, following)

    async def _follow(self, pieces: AsyncIterator[bytes], trusted: bool) -> AsyncIterator[bytes]:
        """What comes first is empty."""
        self._followers[trusted] += 1
        try:
            yield b""
            async for piece in pieces:
                yield piece
        finally:
            self._followers[trusted] -= 1

    async def _logs(self, request: Request) -> Response:
        """What workers printed while they started: those that live, and the last that failed."""
        generation, worker_id = query.number(request, "generation"), query.number(request, "worker")
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

"""`Services.router`: the hot endpoints as an ASGI application, for an application to mount where it likes.

Under segue every request is passed on to the master, which swaps in all workers. Under plain uvicorn this process is
all that there is, and answers itself.
"""

from __future__ import annotations

import os
import urllib.parse
from typing import TYPE_CHECKING, Any

from segue.handoff.http import Request, Response, Router, json_response, problem
from segue.handoff.messages import DRAIN_MODES, HOT
from segue.worker import public
from segue.worker.gate import gate
from segue.worker.services import endpoints
from segue.worker.services import host as hosts
from segue.worker.services.report import Reporter

if TYPE_CHECKING:
    from segue.worker.services.registry import Services


class HotRouter:
    """``GET /status``, ``POST /reload/NAME``, ``POST /drain/start?mode=`` and ``POST /drain/stop``."""

    def __init__(self, services: Services, token: str | None, allow_unauthenticated: bool) -> None:
        if token is not None and not token.strip():
            raise ValueError("the token is empty: router(token=...) asks for a bearer token")
        if token is None and not allow_unauthenticated:
            raise ValueError(
                "whoever can reach these endpoints can change the service: router(token=...) asks for a bearer token, "
                "router(allow_unauthenticated=True) says that nothing else can reach them"
            )
        self._services = services
        self._reporter: Reporter | None = None
        self._digest = None if token is None else public.token_digest(token)
        self._router = Router(
            {
                ("GET", "/status"): self._status,
                ("POST", "/reload/*"): self._reload,
                ("POST", "/drain/start"): self._drain_start,
                ("POST", "/drain/stop"): self._drain_stop,
            }
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            raise RuntimeError(f"the hot endpoints speak HTTP only, not {scope['type']}")
        refusal = await public.drained_body(receive) or public.from_a_page(scope)
        if refusal is None and self._digest is not None:
            refusal = public.unauthorized(scope, self._digest)
        response = refusal or await self._answer(scope)
        scope["query_string"] = b""  # which may have secrets in it, and which uvicorn's access log shows
        await public.answer(send, response)

    async def _answer(self, scope: Any) -> Response:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        master_socket = hosts.current().master_socket
        if master_socket is not None:
            return await public.pass_on(scope, HOT + path, master_socket)
        query = dict(urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        return await self._router(Request(scope["method"], path, query, {}, b"", None, None))

    async def _status(self, _: Request) -> Response:
        running = self._services.running
        report: dict[str, dict[str, Any]] = {}
        if running is not None:
            if self._reporter is None or self._reporter.running is not running[0]:
                self._reporter = Reporter(running[0])
            report = await self._reporter.report()
        return json_response(
            {
                "pid": os.getpid(),
                "draining": gate.mode is not None,
                "drain_mode": gate.mode,
                "services_initialized": {name: each["initialized"] for name, each in report.items()},
                "services": report,
            }
        )

    async def _reload(self, request: Request) -> Response:
        running = self._services.running
        query = {key: value for key, value in request.query.items() if key not in {"*", "wait"}}
        return await endpoints.reload(None if running is None else running[1], request.query["*"], query)

    async def _drain_start(self, request: Request) -> Response:
        mode = request.query.get("mode", DRAIN_MODES[0])
        if mode not in DRAIN_MODES:
            why = f"drain takes ?mode={' or '.join(DRAIN_MODES)}, not {mode!r}"
            return problem(400, why, known=DRAIN_MODES)
        gate.set_mode(mode)
        return json_response({"draining": True, "drain_mode": mode})

    async def _drain_stop(self, _: Request) -> Response:
        gate.set_mode(None)
        return json_response({"draining": False, "drain_mode": None})

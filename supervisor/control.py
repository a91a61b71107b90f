"""The master's control API: HTTP on the instance's Unix socket, and on ``--admin`` with a bearer token.

What it answers is in three modules beside this one: what can be read (`segue.supervisor.control_reads`), what can be
changed (`segue.supervisor.control_changes`), and who may (`segue.supervisor.admission`).
"""

from __future__ import annotations

import contextlib
import os
import socket

import msgspec

from segue.handoff.http import Request, Response, Router, json_response, problem
from segue.handoff.http_server import Server
from segue.handoff.messages import HOT
from segue.supervisor import dashboard
from segue.supervisor.admission import SESSION, Admission
from segue.supervisor.control_changes import Changes
from segue.supervisor.control_reads import Reads
from segue.supervisor.master import Master
from segue.supervisor.openapi import Route, document


class Control:
    """Answers requests about one master."""

    def __init__(self, master: Master) -> None:
        self._instance = master.instance
        self._servers = master.servers
        self._admission = Admission(master)
        routes = [
            *Reads(master).routes(),
            Route("GET", f"{HOT}/openapi.json", self._openapi, "This description", open=True),
            *Changes(master).routes(),
        ]
        self._description = document(routes)
        self._router = Router(
            {
                **{(route.method, route.path): route.handler for route in routes},
                ("GET", SESSION): self._admission.session,
                ("POST", SESSION): self._admission.sign_in,
                ("DELETE", SESSION): self._admission.sign_out,
                **{("GET", path): dashboard.page for path in dashboard.FILES},
            }
        )

    def listen(self, inherited: int | None = None) -> int:
        """Serve the control socket: mode 0600 (0660 with a group), and the peer is checked besides. Returns its descriptor.

        `inherited` is that descriptor, if this process has opened it before it began anew.
        """
        path = self._instance.control
        if inherited is not None and os.path.exists(path):
            sock = socket.socket(fileno=inherited)
        else:
            if inherited is not None:
                os.close(inherited)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.bind(path)
            self._instance.share(path, 0o600, 0o660)
        self._servers.append(Server(sock, self._answer, self._admission.to_socket))
        return sock.fileno()

    def listen_admin(self, sock: socket.socket, host: str) -> None:
        """Serve ``--admin`` on a bound TCP socket; `host` is what its address was given as."""
        self._admission.admin_names = frozenset({host.lower()})
        self._servers.append(Server(sock, self._answer_admin, self._admission.to_admin))

    def close(self) -> None:
        """Stop listening."""
        for server in self._servers:
            server.close()

    async def _answer_admin(self, request: Request) -> Response:
        trusted = self._admission.has_shown_token(request)
        return await self._answer(msgspec.structs.replace(request, trusted=trusted))

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._router(request)
        except ValueError as error:
            return problem(400, str(error))

    async def _openapi(self, _: Request) -> Response:
        return json_response(self._description)

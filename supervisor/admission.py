"""Who may ask what of the control API: the peer of a Unix socket, the bearer of the token, a browser that has shown it."""

from __future__ import annotations

import hashlib
import hmac
import os

from segue.handoff.browser import foreign, from_the_page, misdirected
from segue.handoff.http import Request, Response, json_response, problem
from segue.handoff.messages import HOT
from segue.supervisor import dashboard
from segue.supervisor.master import Master

SESSION = "/session"
_OPEN_TO_ALL = frozenset(
    {
        "/livez",
        "/readyz",
        "/metrics",
        f"{HOT}/status",
        f"{HOT}/watch",
        f"{HOT}/openapi.json",
        SESSION,
        *dashboard.FILES,
    }
)
"""May be read on ``--admin`` without a token."""
_READING = frozenset({"GET", "HEAD"})


class Admission:
    """To one master."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self.admin_names: frozenset[str] = frozenset()
        """Names beside its addresses under which ``--admin`` is asked."""

    def to_socket(self, request: Request) -> Response | None:
        """A refusal of what came through the control socket, or None."""
        group = self._master.instance.group
        if request.peer_uid not in {os.geteuid(), 0} and (group is None or group not in request.peer_groups):
            allowed = f"user {os.geteuid()}" + ("" if group is None else f", a member of group {group},")
            return problem(
                403, f"user {request.peer_uid} may not control this instance; be {allowed} or root"
            )
        # with an Origin it may come from a browser, through a forwarded port: then its name is checked, too
        return foreign(request) or (misdirected(request, ()) if "origin" in request.headers else None)

    def to_admin(self, request: Request) -> Response | None:
        """A refusal of what came through ``--admin``, or None."""
        refusal = foreign(request)
        if refusal is None and request.peer_uid is None:
            refusal = misdirected(request, self.admin_names)
        if refusal is not None:
            return refusal
        signing = request.path == SESSION  # asks for the token by itself
        if not signing and not (request.method in _READING and request.path in _OPEN_TO_ALL):
            return None if self._in_session(request) else _check_token(request, self._master.token)
        return None

    def has_shown_token(self, request: Request) -> bool:
        """Whether who asks through ``--admin`` bears the token, or has signed in with it."""
        return self._in_session(request) or _check_token(request, self._master.token) is None

    def _in_session(self, request: Request) -> bool:
        """A browser that has signed in; what it asks to be changed must come from the page itself."""
        if not dashboard.in_session(request, self._master.token):
            return False
        return request.method in _READING or from_the_page(request)

    async def session(self, request: Request) -> Response:
        """What whoever looks at the page may do."""
        document = {
            "act": request.trusted,
            "token": self._master.token is not None,
            "session": dashboard.in_session(request, self._master.token),
        }
        return json_response(document, headers={"Cache-Control": "no-store"})

    async def sign_in(self, request: Request) -> Response:
        """Begin a session of whoever shows the token."""
        refusal = _check_token(request, self._master.token)
        if refusal is not None:
            return refusal
        assert self._master.token is not None
        return json_response(
            {"act": True}, headers={"Set-Cookie": dashboard.begin_session(self._master.token)}
        )

    async def sign_out(self, _: Request) -> Response:
        """End it."""
        return json_response(
            {"act": False}, headers={"Set-Cookie": dashboard.end_session(self._master.token)}
        )


def _check_token(request: Request, token: str | None) -> Response | None:
    if token is None:
        return problem(403, "this needs a token, and segue serves without --token-file")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    digests = [hashlib.sha256(text.strip().encode()).digest() for text in (given, token)]
    if scheme.lower() != "bearer":
        reason = "this needs the token of --token-file, as 'Authorization: Bearer TOKEN'"
    elif not hmac.compare_digest(*digests):
        reason = "that is not the token of --token-file"
    else:
        return None
    return problem(401, reason, {"WWW-Authenticate": 'Bearer realm="segue"'})

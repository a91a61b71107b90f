"""The dashboard: its page, and the session of a browser that has shown the token.

A browser can't put a bearer token on its requests without a script that holds it. So the token is shown once, in a
header, and what is kept is a cookie: when it ends, signed with the token. Nothing of it is stored here, so it outlives
an upgrade and a crash of the master, and a changed token ends it.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import time
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from segue.handoff.http import Request, Response

_COOKIE = "segue-session"
SESSION_S = 12 * 3600
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
FILES = {
    "/": "index.html",
    "/dashboard.css": "dashboard.css",
    "/dashboard.js": "dashboard.js",
    "/dashboard.svg": "dashboard.svg",
}
"""Path → file of the page."""
_HEADERS = (
    (
        "Content-Security-Policy",
        "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-cache"),
)


async def page(request: Request) -> Response:
    """One file of the page."""
    name = FILES[request.path]
    body, etag = _read(name)
    headers = (*_HEADERS, ("ETag", etag))
    if request.headers.get("if-none-match") == etag:
        return Response(304, headers=headers)
    return Response(200, body, _TYPES[name.rpartition(".")[2]], headers)


@functools.cache
def _read(name: str) -> tuple[bytes, str]:
    body = (Path(__file__).with_name("page") / name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:16]}"'


def begin_session(token: str) -> str:
    """The ``Set-Cookie`` for a browser that has shown the token."""
    until = str(int(time.time()) + SESSION_S)
    return _cookie(token, f"{until}.{_sign(token, until)}", SESSION_S)


def end_session(token: str | None) -> str:
    """The ``Set-Cookie`` that takes it back."""
    return _cookie(token or "", "", 0)


def in_session(request: Request, token: str | None) -> bool:
    """Whether the request comes from a browser that has shown the token, and not too long ago."""
    if token is None:
        return False
    try:
        cookie = SimpleCookie(request.headers.get("cookie", "")).get(_name(token))
    except CookieError:
        return False
    until, _, signature = (cookie.value if cookie else "").partition(".")
    return (
        until.isascii()
        and until.isdigit()
        and hmac.compare_digest(signature.encode(), _sign(token, until).encode())
        and int(until) > time.time()
    )


def _sign(token: str, until: str) -> str:
    return _mac(token, f"segue session until {until}")


def _name(token: str) -> str:
    """A browser sends the cookies of a host to all of its ports: instances with tokens of their own don't end each other's."""
    return f"{_COOKIE}-{_mac(token, 'segue session name')[:8]}"


def _mac(token: str, text: str) -> str:
    return hmac.new(token.strip().encode(), text.encode(), "sha256").hexdigest()


def _cookie(token: str, value: str, seconds: int) -> str:
    return f"{_name(token)}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict"

"""Requests that a browser may have been made to send: by a page of somebody else, or under somebody else's name.

A browser says with ``Origin`` which page a request comes from, and sends no request with a header of a page's own choice to
another origin without asking there first (Fetch Standard, CORS protocol). So what has an ``Origin`` is refused unless it comes
from the dashboard itself. Against a name that is pointed at this machine (DNS rebinding), under which the page of somebody
else would be of the same origin, the name itself is checked.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from segue.handoff.http import Request, Response, problem
from segue.handoff.messages import HOT, PAGE_HEADER


def foreign(request: Request) -> Response | None:
    """A refusal of what another page has made a browser ask of the hot endpoints; None for all else."""
    origin = request.headers.get("origin")
    if origin is None or not request.path.startswith(HOT) or from_the_page(request):
        return None
    return problem(403, f"requests of web pages are refused here (Origin: {origin[:200]})")


def from_the_page(request: Request) -> bool:
    """Whether the dashboard has sent it, as it was loaded from here."""
    host = request.headers.get("host", "")
    return (
        PAGE_HEADER in request.headers and request.headers.get("origin", "").partition("://")[2] == host != ""
    )


def misdirected(request: Request, names: Collection[str]) -> Response | None:
    """A refusal of a request under a name that isn't ours: an address, ``localhost``, or one of `names`."""
    host = request.headers.get("host")
    if host is None:  # HTTP/1.0: no browser
        return None
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.removeprefix("[").removesuffix("]").rstrip(".").lower()
    if name in names or name == "localhost" or name.endswith(".localhost") or _is_address(name):
        return None
    return problem(
        421, f"this is not {host[:200]}: use the address, localhost, or the name that --admin says"
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

"""The chat page: three files, and nothing from anywhere else."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

_DIRECTORY = Path(__file__).parent.parent / "page"
_FILES = {"/": "index.html", "/chat.js": "chat.js", "/style.css": "style.css"}
_HEADERS = {
    # asked for again each time, and not sent again unless it has changed: a new version is there with the next look
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
}


def routes() -> list[Route]:
    """One for each file."""
    files = StaticFiles(directory=_DIRECTORY)
    return [_route(files, path, name) for path, name in _FILES.items()]


def _route(files: StaticFiles, path: str, name: str) -> Route:
    async def page(request: Request) -> Response:
        response = await files.get_response(name, request.scope)
        response.headers.update(_HEADERS)
        return response

    return Route(path, page, name=name)

"""The control API as data: its routes, and what OpenAPI 3.1 says of them, made from the same table that is served."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from segue import __version__
from segue.handoff.http import JSON, PROBLEM, Handler

Answer = Literal["json", "operation", "text", "events", "json or events"]
_Schema = dict[str, Any]
_EVENTS = "text/event-stream"
_NULLABLE_TEXT: _Schema = {"type": ["string", "null"]}
_PROBLEM: _Schema = {
    "type": "object",
    "description": "A problem document (RFC 9457).",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "known": {"type": "array", "items": {"type": ["string", "integer"]}},
        "running": {"type": "object", "description": "What else changes: its kind, generation and phase."},
        "operation": {"$ref": "#/components/schemas/Operation"},
    },
}
_OPERATION: _Schema = {
    "type": "object",
    "description": "What somebody asked for, how far it is, and its one outcome.",
    "required": ["id", "kind", "state", "phase", "outcome", "reason", "notes"],
    "properties": {
        "id": {"type": "integer"},
        "kind": {"type": "string"},
        "state": {"type": "string"},
        "phase": {"type": "string"},
        "phases": {"type": "object", "additionalProperties": {"type": "number"}},
        "outcome": _NULLABLE_TEXT,
        "reason": {"type": "string"},
        "notes": {"type": "array", "items": {"type": "string"}},
        "generation": {"type": ["integer", "null"]},
    },
}
_EVENT: _Schema = {
    "type": "object",
    "description": "One event of the stream.",
    "required": ["data"],
    "properties": {
        "id": {"type": "string"},
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": JSON},
    },
}


@dataclass(frozen=True)
class Parameter:
    """One of a route's query, or the last segment of its path."""

    name: str
    what: str
    schema: _Schema
    required: bool = False


@dataclass(frozen=True)
class Route:
    """One method of one path."""

    method: str
    path: str
    """One that ends in ``/*`` takes one more segment, which is `last`."""
    handler: Handler
    summary: str
    answers: Answer = "json"
    parameters: tuple[Parameter, ...] = ()
    last: Parameter | None = None
    refusals: tuple[int, ...] = ()
    """Statuses other than 200 with which it may answer, beside those that any route has."""
    open: bool = False
    """Answered on ``--admin`` without a token."""
    more: bool = False
    """Takes other query parameters, too: those of the service."""


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The whole description."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = route.path if route.last is None else re.sub(r"\*$", f"{{{route.last.name}}}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "segue: control",
            "version": __version__,
            "summary": "What steers a running instance: its Unix socket and --admin",
        },
        "paths": paths,
        "components": {
            "schemas": {"Problem": _PROBLEM, "Operation": _OPERATION, "Event": _EVENT},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": re.sub(r"[^a-z]+", "_", f"{route.method} {route.path}".lower()).strip("_"),
        "summary": route.summary,
        "responses": {"200": {"description": "Done", "content": _content(route.answers)}},
        "security": [] if route.open else [{"token": []}],
    }
    if route.answers == "operation" and route.method == "POST":
        operation["responses"]["202"] = {
            "description": "It has begun; Location tells its outcome",
            "content": _content("operation"),
        }
    refusals = sorted({*route.refusals, *(() if route.open else (401, 403))})
    for status in refusals:
        operation["responses"][str(status)] = _refusal(_MEANINGS[status])
    operation["responses"]["default"] = _refusal("It can't be done; the detail says why")
    parameters = [_parameter(each, "query") for each in route.parameters]
    if route.last is not None:
        parameters.insert(0, _parameter(route.last, "path"))
    if route.more:
        parameters.append(
            {
                "name": "settings",
                "in": "query",
                "description": "Each of the service's own settings and options",
                "style": "form",
                "explode": True,
                "schema": {"type": "object", "additionalProperties": {"type": "string"}},
            }
        )
    if parameters:
        operation["parameters"] = parameters
    return operation


_MEANINGS = {
    400: "A parameter is wrong",
    401: "A token is needed",
    403: "Not allowed",
    404: "There is no such thing; known says what there is",
    409: "Refused; nothing has changed",
    423: "Something else changes",
    503: "Not now",
    504: "The time has passed; it goes on",
}


def _parameter(each: Parameter, where: str) -> dict[str, Any]:
    return {
        "name": each.name,
        "in": where,
        "description": each.what,
        "required": each.required or where == "path",
        "schema": each.schema,
    }


def _content(answers: Answer) -> dict[str, Any]:
    match answers:
        case "operation":
            return {JSON: {"schema": {"$ref": "#/components/schemas/Operation"}}}
        case "text":
            return {kind: {"schema": {"type": "string"}} for kind in _METRICS}
        case "events":
            return {_EVENTS: {"schema": {"$ref": "#/components/schemas/Event"}}}
        case "json or events":
            return _content("json") | _content("events")
    return {JSON: {"schema": {"type": "object"}}}


_METRICS = ("text/plain", "application/openmetrics-text")


def _refusal(meaning: str) -> dict[str, Any]:
    return {
        "description": meaning,
        "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }

"""``/api/v1/peers`` and ``/api/v1/hsp``: other agents, what is said to them and asked of them."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from segue.worker.backend.http.endpoint import Endpoint, answer, body
from segue.worker.backend.http.parts import Parts


class FactRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Something that all agents are to know."""

    topic: str
    """Below ``PREFIX/knowledge/facts/``."""
    payload: dict[str, Any]
    requires_ack: bool = False
    """Have it sent again until somebody acknowledges it."""


class FactAnswer(msgspec.Struct):
    """It is published."""

    message_id: str
    waits_for_broker: bool
    """The broker isn't there: so far only this service has it."""


class TaskOrder(msgspec.Struct, forbid_unknown_fields=True):
    """Something that another agent is to do."""

    capability: str
    parameters: dict[str, Any] = {}
    recipient: str | None = None
    """The name of an agent; none: one that is known to be able to, else whoever is."""
    timeout_s: float = 30.0


class TaskAnswer(msgspec.Struct):
    """What it has done."""

    result: dict[str, Any]


class AgentsApi:
    """All of them."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def endpoints(self) -> list[Endpoint]:
        """For the router."""
        return [
            Endpoint(
                "GET",
                "/api/v1/peers",
                self._peers,
                "The other agents, what they can do, and how they have done it",
                answers=list[dict[str, Any]],
            ),
            Endpoint(
                "GET",
                "/api/v1/hsp",
                self._about,
                "Who this agent is, and how it is connected",
                answers=dict[str, Any],
            ),
            Endpoint(
                "POST",
                "/api/v1/hsp/facts",
                self._publish,
                "Tell all agents something",
                takes=FactRequest,
                answers=FactAnswer,
                makes_work=True,
            ),
            Endpoint(
                "POST",
                "/api/v1/hsp/tasks",
                self._request,
                "Have another agent do something",
                takes=TaskOrder,
                answers=TaskAnswer,
                makes_work=True,
            ),
        ]

    async def _peers(self, _: Request) -> Response:
        return answer(self._parts.learning.current.peers.all())

    async def _about(self, _: Request) -> Response:
        hsp = self._parts.hsp.current
        return answer(hsp.health() | {"connected": hsp.connected, "capabilities": hsp.capabilities})

    async def _publish(self, request: Request) -> Response:
        asked = await body(request, FactRequest)
        with self._parts.hsp.lease() as hsp:
            number = await hsp.publish_fact(asked.topic, asked.payload, requires_ack=asked.requires_ack)
            return answer(FactAnswer(number, not hsp.connected), 202)

    async def _request(self, request: Request) -> Response:
        asked = await body(request, TaskOrder)
        with self._parts.hsp.lease() as hsp:
            result = await hsp.request_task(
                asked.capability, asked.parameters, asked.recipient, asked.timeout_s
            )
            return answer(TaskAnswer(result))

"""``/api/v1``: chat, sessions, tools and memory."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import segue
from segue.worker.backend.dialogue import Reply
from segue.worker.backend.errors import ToldError
from segue.worker.backend.http.endpoint import Endpoint, answer, body, query, while_connected
from segue.worker.backend.http.events import Events, event
from segue.worker.backend.http.parts import Parts

_MAX_MESSAGE = 100_000
_SESSION = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ChatRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Something said to the service."""

    message: str
    session: str | None = None
    """The conversation that it belongs to: letters, digits, dots, dashes and underscores, at most 64. None: a new one,
    whose name is in the answer."""
    stream: bool = False
    """Answer with server-sent events: ``start``, ``token``, ``tool``, ``done`` or ``error``. The same as
    ``Accept: text/event-stream``."""


class ChatAnswer(msgspec.Struct):
    """What it says."""

    session: str
    text: str
    provider: str
    model: str
    personality: str
    emotion: dict[str, float]
    tools: list[dict[str, Any]]
    problems: list[str]
    """What went wrong beside: the memory could not be read, for instance."""
    generation: int
    worker: int


class Remembered(msgspec.Struct, forbid_unknown_fields=True):
    """Something to remember."""

    text: str
    kind: str = "note"
    session: str | None = None


class Search(msgspec.Struct):
    """What to look for."""

    q: str
    limit: int = 10
    session: str | None = None


class Limit(msgspec.Struct):
    """How many."""

    limit: int = 100


class Arguments(msgspec.Struct, forbid_unknown_fields=True):
    """Of a tool."""

    arguments: dict[str, Any] = {}


class Api:
    """All of them."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def endpoints(self) -> list[Endpoint]:
        """For the router."""
        many, one = list[dict[str, Any]], dict[str, Any]
        return [
            Endpoint(
                "POST",
                "/api/v1/chat",
                self._chat,
                "Say something; the answer comes whole or as a stream of events",
                takes=ChatRequest,
                answers=ChatAnswer,
                makes_work=True,
                streams=True,
            ),
            Endpoint(
                "GET",
                "/api/v1/about",
                self._about,
                "Who answers: generation, model, personality",
                answers=one,
            ),
            Endpoint(
                "GET", "/api/v1/sessions", self._sessions, "The conversations", answers=many, query=Limit
            ),
            Endpoint(
                "GET",
                "/api/v1/sessions/{session}",
                self._turns,
                "The turns of one conversation",
                answers=many,
                query=Limit,
            ),
            Endpoint("GET", "/api/v1/tools", self._tools, "The tools, and how they do", answers=one),
            Endpoint(
                "POST",
                "/api/v1/tools/{name}",
                self._call_tool,
                "Call a tool",
                takes=Arguments,
                answers=one,
                makes_work=True,
            ),
            Endpoint(
                "POST",
                "/api/v1/memory",
                self._remember,
                "Remember something",
                takes=Remembered,
                answers=one,
                status=201,
                makes_work=True,
            ),
            Endpoint("GET", "/api/v1/memory", self._search, "Search the memory", answers=many, query=Search),
        ]

    # ------------------------------------------------------------------------------------------------- dialogue

    async def _chat(self, request: Request) -> Response:
        asked = await body(request, ChatRequest)
        if not asked.message.strip():
            raise ToldError(400, "message is empty")
        if len(asked.message) > _MAX_MESSAGE:
            raise ToldError(413, f"message is longer than {_MAX_MESSAGE} characters")
        session = f"chat-{uuid.uuid4().hex}" if asked.session is None else _check_session(asked.session)
        who = _served_by(request)
        dialogue, lease = self._parts.lease_dialogue()
        served_by = {"generation": who["generation"], "worker": who["worker"]}
        replies = dialogue.reply(session, asked.message, served_by=served_by)
        if asked.stream or Events.media_type in request.headers.get("accept", ""):
            return Events(_told(session, who, replies), lease.close)
        with lease:
            return answer(await while_connected(request, _whole(session, who, replies)))

    async def _about(self, request: Request) -> Response:
        llm, personality = self._parts.llm, self._parts.personality
        return answer(
            _served_by(request)
            | {
                "models": llm.current.models,
                "personality": personality.current.profile.name,
                "personalities": personality.current.known,
                "versions": {"llm": llm.version, "personality": personality.version},
                "draining": bool(segue.draining),
            }
        )

    async def _sessions(self, request: Request) -> Response:
        limit = query(request, Limit).limit
        return answer(await self._parts.memory.current.sessions(_bounded(limit)))

    async def _turns(self, request: Request) -> Response:
        session = _check_session(request.path_params["session"])
        limit = query(request, Limit).limit
        return answer(await self._parts.memory.current.turns(session, _bounded(limit)))

    # --------------------------------------------------------------------------------------------------- tools

    async def _tools(self, _: Request) -> Response:
        tools = self._parts.tools.current
        return answer({"tools": tools.tools(), "statistics": tools.statistics(), "problems": tools.problems})

    async def _call_tool(self, request: Request) -> Response:
        name = request.path_params["name"]
        arguments = (await body(request, Arguments)).arguments
        with self._parts.mcp.lease(), self._parts.tools.lease() as tools:
            if not tools.knows(name):
                known = sorted(tool.name for tool in tools.tools())
                raise ToldError(404, f"there is no tool {name!r}; known: {', '.join(known)}", known=known)
            return answer(await tools.call(name, arguments))

    # -------------------------------------------------------------------------------------------------- memory

    async def _remember(self, request: Request) -> Response:
        asked = await body(request, Remembered)
        if not asked.text.strip():
            raise ToldError(400, "text is empty")
        with self._parts.memory.lease() as memory:
            number = await memory.add(asked.text, kind=asked.kind, session=asked.session)
        return answer({"id": number}, 201)

    async def _search(self, request: Request) -> Response:
        asked = query(request, Search)
        with self._parts.memory.lease() as memory:
            return answer(await memory.search(asked.q, _bounded(asked.limit), asked.session))


async def _whole(session: str, who: dict[str, Any], replies: AsyncGenerator[Reply, None]) -> dict[str, Any]:
    text: list[str] = []
    tools: list[dict[str, Any]] = []
    final: dict[str, Any] = {}
    async with contextlib.aclosing(replies):
        async for reply in replies:
            text.append(reply.text)
            tools += [msgspec.to_builtins(reply.tool)] if reply.tool else []
            final = msgspec.to_builtins(reply.final) if reply.final else final
    return {"session": session, "text": "".join(text), "tools": tools} | final | who


async def _told(
    session: str, who: dict[str, Any], replies: AsyncGenerator[Reply, None]
) -> AsyncGenerator[bytes, None]:
    yield event("start", {"session": session} | who)
    text: list[str] = []
    async with contextlib.aclosing(replies):
        try:
            async for reply in replies:
                if reply.text:
                    text.append(reply.text)
                    yield event("token", {"text": reply.text})
                if reply.tool:
                    yield event("tool", reply.tool)
                if reply.final:
                    said = {"session": session, "text": "".join(text)}
                    yield event("done", said | msgspec.to_builtins(reply.final) | who)
        except ToldError as error:
            yield event("error", {"status": error.status, "detail": str(error)})


def _served_by(request: Request) -> dict[str, Any]:
    info: segue.WorkerInfo | None = getattr(request.state, "segue", None)
    return {
        "generation": info.generation if info else 0,
        "worker": info.worker if info else 0,
        "pid": os.getpid(),
        "version": segue.__version__,
    }


def _check_session(session: str) -> str:
    if _SESSION.fullmatch(session) is None:
        raise ToldError(400, "session takes letters, digits, dots, dashes and underscores, at most 64")
    return session


def _bounded(limit: int) -> int:
    if not 1 <= limit <= 1000:
        raise ToldError(400, f"limit takes 1 to 1000, not {limit}")
    return limit

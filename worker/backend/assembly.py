"""The AI backend as an application: its services, declared, and its endpoints. ``segue serve`` without APP serves it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import segue
from segue.worker.backend.agent import Agent
from segue.worker.backend.dialogue import DialogueManager, DialogueSettings
from segue.worker.backend.emotion import EmotionSettings, EmotionSystem
from segue.worker.backend.errors import ToldError
from segue.worker.backend.hsp.connector import HSPConnector
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.http import page
from segue.worker.backend.http.agents import AgentsApi
from segue.worker.backend.http.api import Api
from segue.worker.backend.http.endpoint import Endpoint, answer, problem_response
from segue.worker.backend.http.openai_api import OpenAIApi
from segue.worker.backend.http.openapi import document
from segue.worker.backend.http.parts import Parts
from segue.worker.backend.learning import LearningManager
from segue.worker.backend.lis import LIS, LISSettings
from segue.worker.backend.llm import LLMSettings, MultiLLMService
from segue.worker.backend.mcp_connector import MCPConnector, MCPSettings
from segue.worker.backend.memory import HAMMemoryManager, MemorySettings
from segue.worker.backend.personality import PersonalityManager, PersonalitySettings
from segue.worker.backend.tools import ToolDispatcher, ToolOptions, ToolSettings


def declare(services: segue.Services) -> Parts:
    """Declare all parts; what a swap of each reports as rewired follows from who requires it."""
    memory = services.declare("memory", HAMMemoryManager, settings=MemorySettings, title="HAMMemoryManager")
    lis = services.declare("lis", LIS, settings=LISSettings, title="LIS")
    learning = services.declare("learning", LearningManager, title="LearningManager")
    llm = services.declare(
        "llm", MultiLLMService, requires=[lis], settings=LLMSettings, title="MultiLLMService"
    )
    mcp = services.declare("mcp", MCPConnector, settings=MCPSettings, title="MCPConnector")
    tools = services.declare(
        "tools",
        ToolDispatcher,
        requires=[llm, mcp, lis, learning],
        settings=ToolSettings,
        options=ToolOptions,
        title="ToolDispatcher",
    )
    personality = services.declare(
        "personality", PersonalityManager, settings=PersonalitySettings, title="PersonalityManager"
    )
    emotion = services.declare(
        "emotion", EmotionSystem, requires=[personality], settings=EmotionSettings, title="EmotionSystem"
    )
    dialogue = services.declare(
        "dialogue",
        DialogueManager,
        requires=[llm, tools, personality, emotion, memory, lis],
        settings=DialogueSettings,
        title="DialogueManager",
    )
    hsp = services.declare(
        "hsp",
        HSPConnector,
        requires=[learning],
        # all workers speak for the agent; one listens, since each message is to be taken once
        per="generation",
        settings=HSPSettings,
        title="HSPConnector",
    )
    return Parts(memory, lis, learning, hsp, llm, mcp, tools, personality, emotion, dialogue)


def create() -> Starlette:
    """The application."""
    services = segue.Services()
    parts = declare(services)
    endpoints: list[Endpoint] = [
        *Api(parts).endpoints(),
        *AgentsApi(parts).endpoints(),
        *OpenAIApi(parts).endpoints(),
    ]
    described: dict[str, Any] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with services.lifespan(app) as state:
            parts.hsp.current.offer(Agent(parts))
            yield state

    async def openapi(_: Request) -> Response:
        if not described:
            described.update(document(endpoints))
        return answer(described)

    async def ping(_: Request) -> Response:
        return PlainTextResponse("pong")

    return Starlette(
        routes=[
            *(endpoint.route() for endpoint in endpoints),
            Route("/openapi.json", openapi),
            Route("/ping", ping),
            *page.routes(),
        ],
        exception_handlers={HTTPException: _refused, Exception: _broken},
        lifespan=lifespan,
    )


async def _refused(request: Request, error: Exception) -> Response:
    """What isn't there, or doesn't take this method."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow")
    detail = f"{request.url.path} takes {allowed}" if allowed else f"there is no {request.url.path} here"
    response = problem_response(
        ToldError(error.status_code, f"{detail}; /openapi.json describes all that there is")
    )
    response.headers.update(error.headers or {})
    return response


async def _broken(_: Request, error: Exception) -> Response:
    """The traceback is in the log."""
    return problem_response(ToldError(500, f"{type(error).__name__}; the log of this worker says more"))


app = create()

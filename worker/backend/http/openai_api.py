"""``/v1/chat/completions`` and ``/v1/models``: what clients of OpenAI's API expect, streaming included.

Stateless: the whole conversation comes with each request, and goes to the model as it is. What the model is given of
tools is what the client declares, and the client calls them.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from segue.worker.backend.conversation import Chunk, Message, Role, Sampling, Tool, ToolCall
from segue.worker.backend.errors import ToldError
from segue.worker.backend.http.endpoint import Endpoint, answer, body, while_connected
from segue.worker.backend.http.events import Events, event
from segue.worker.backend.http.parts import Parts
from segue.worker.backend.llm import MultiLLMService

_DONE = b"data: [DONE]\n\n"


class _Part(msgspec.Struct):
    """A piece of a message's content."""

    type: str
    text: str = ""


class _Function(msgspec.Struct):
    name: str
    arguments: str = ""


class _Call(msgspec.Struct):
    id: str
    function: _Function
    type: Literal["function"] = "function"


class _Turn(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None


class _FunctionTool(msgspec.Struct):
    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


class _DeclaredTool(msgspec.Struct):
    function: _FunctionTool
    type: Literal["function"] = "function"


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class ChatCompletionRequest(msgspec.Struct):
    """What is sent to ``/v1/chat/completions``; keys that aren't here are passed on to the provider."""

    messages: list[_Turn]
    model: str = ""
    stream: bool = False
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    tools: list[_DeclaredTool] | None = None


class OpenAIApi:
    """The endpoints."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._since = int(time.time())

    def endpoints(self) -> list[Endpoint]:
        """For the router."""
        return [
            Endpoint(
                "POST",
                "/v1/chat/completions",
                self._complete,
                "One answer of the model (compatible with OpenAI's API)",
                takes=ChatCompletionRequest,
                answers=dict[str, Any],
                makes_work=True,
                streams=True,
                errors=_error,
            ),
            Endpoint(
                "GET",
                "/v1/models",
                self._models,
                "The models that can be asked (compatible with OpenAI's API)",
                answers=dict[str, Any],
                errors=_error,
            ),
            Endpoint(
                "GET",
                "/v1/models/{model:path}",
                self._model,
                "One of them (compatible with OpenAI's API)",
                answers=dict[str, Any],
                errors=_error,
            ),
        ]

    async def _models(self, _: Request) -> Response:
        models = self._parts.llm.current.models
        return answer({"object": "list", "data": [self._described(model) for model in models]})

    async def _model(self, request: Request) -> Response:
        model = request.path_params["model"]
        _check_model(model, self._parts.llm.current)
        return answer(self._described(model))

    def _described(self, model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": self._since, "owned_by": "segue"}

    async def _complete(self, request: Request) -> Response:
        given = await body(request, dict[str, Any])
        try:
            asked = msgspec.convert(given, ChatCompletionRequest)
        except msgspec.ValidationError as error:
            raise ToldError(400, f"the body isn't what this takes: {error}") from error
        further = {key: given[key] for key in given.keys() - set(ChatCompletionRequest.__struct_fields__)}
        if not asked.messages:
            raise ToldError(400, "messages is empty")
        if (asked.n or 1) != 1:
            raise ToldError(400, "n: one answer at a time")
        messages = [_message(turn) for turn in asked.messages]
        tools = [
            Tool(each.function.name, each.function.description, each.function.parameters)
            for each in asked.tools or ()
        ]
        lease = contextlib.ExitStack()
        llm = lease.enter_context(self._parts.llm.lease())
        try:
            if asked.model:
                _check_model(asked.model, llm)
            chunks = self._chunks(llm, asked, messages, tools, further)
            if asked.stream:
                # the first chunk decides between an error with its status and a stream
                first = await while_connected(request, _first(chunks))
                return Events(_streamed(asked, first, chunks), lease.pop_all().close)
            return await while_connected(request, _whole(asked, chunks))
        finally:
            lease.close()

    def _chunks(
        self,
        llm: MultiLLMService,
        asked: ChatCompletionRequest,
        messages: list[Message],
        tools: list[Tool],
        further: dict[str, Any],
    ) -> AsyncGenerator[Chunk, None]:
        stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        sampling = Sampling(
            asked.temperature,
            asked.top_p,
            asked.max_completion_tokens or asked.max_tokens,
            asked.frequency_penalty,
            stop,
            further,
        )
        return llm.stream(messages, tools=tools, sampling=sampling, model=asked.model or None)


def _check_model(model: str, llm: MultiLLMService) -> None:
    if model not in llm.models:
        raise ToldError(404, f"there is no model {model!r}; known: {', '.join(llm.models)}", param="model")


def _message(turn: _Turn) -> Message:
    content = turn.content or ""
    if isinstance(content, list):
        strange = {part.type for part in content} - {"text"}
        if strange:
            raise ToldError(400, f"content of type {', '.join(sorted(strange))}: only text is taken")
        content = "".join(part.text for part in content)
    role: Role = "system" if turn.role == "developer" else turn.role
    calls = tuple(
        ToolCall(call.id, call.function.name, call.function.arguments) for call in turn.tool_calls or ()
    )
    return Message(role, content, calls, turn.tool_call_id)


async def _streamed(
    asked: ChatCompletionRequest, first: Chunk | None, chunks: AsyncGenerator[Chunk, None]
) -> AsyncGenerator[bytes, None]:
    base: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
    }
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    usage: dict[str, int] = {}
    role: dict[str, Any] = {"role": "assistant"}
    async with contextlib.aclosing(chunks):
        try:
            async for chunk in _from(first, chunks):
                usage = chunk.usage or usage
                delta = role | ({"content": chunk.text} if chunk.text or role else {})
                if chunk.tool_calls:
                    delta["tool_calls"] = [
                        {"index": index, **_call(call)} for index, call in enumerate(chunk.tool_calls)
                    ]
                role = {}
                choice = {"index": 0, "delta": delta, "finish_reason": chunk.finish}
                yield event(None, base | {"model": chunk.model or asked.model, "choices": [choice]})
        except ToldError as error:
            yield event(None, _document(error.status, str(error)))
            return
    if with_usage:
        yield event(None, base | {"model": asked.model, "choices": [], "usage": _usage(usage)})
    yield _DONE


async def _whole(asked: ChatCompletionRequest, chunks: AsyncGenerator[Chunk, None]) -> Response:
    text: list[str] = []
    calls: list[ToolCall] = []
    finish, model = "stop", asked.model
    usage: dict[str, int] = {}
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            text.append(chunk.text)
            calls += chunk.tool_calls
            finish, model = chunk.finish or finish, chunk.model or model
            usage = chunk.usage or usage
    message: dict[str, Any] = {"role": "assistant", "content": "".join(text) or (None if calls else "")}
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return answer(
        {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": _usage(usage),
        }
    )


async def _first(chunks: AsyncGenerator[Chunk, None]) -> Chunk | None:
    return await anext(chunks, None)


async def _from(first: Chunk | None, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    if first is not None:
        yield first
        async for chunk in chunks:
            yield chunk


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _usage(usage: dict[str, int]) -> dict[str, int]:
    prompt, completion = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _error(error: ToldError) -> Response:
    return answer(_document(error.status, str(error), error.members.get("param")), error.status)


def _document(status: int, reason: str, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": reason, "type": kind, "param": param, "code": status}}

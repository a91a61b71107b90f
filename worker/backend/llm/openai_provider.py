"""A server that is compatible with OpenAI's API, through the official client.

The client's own retries are off: whether, where and when to try again is decided by the service, and only before the
first token. Time-outs are ours as well: until the first token, between two pieces, and for the whole answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from segue.worker.backend.conversation import Chunk, Message, Sampling, Tool, ToolCall
from segue.worker.backend.llm.errors import LLMError, ProviderError
from segue.worker.backend.llm.settings import OFFICIAL, Provider
from segue.worker.services.secret import hide

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_CONNECT_TIMEOUT_S = 10.0
_MAX_ANSWER = 4_000_000
"""Characters; whoever sends more has lost the thread."""
_NO_KEY = "none"
"""The client insists on a key; servers that need none ignore it."""
_OWN_FAULT = frozenset({400, 413, 422})
_NOT_OURS = frozenset({401, 403, 404})
_TOO_MANY = 429
_SHOWN = 300
"""Characters of what a server says of an error."""
_THOUGHTS = ("reasoning_content", "reasoning")
"""Where servers put what a model thinks before it answers: a sign of life, and no part of the answer."""
_FINISHES = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls"}


class _Client:
    """A client, its key, and how many providers use it: one that is swapped for its like goes on with its connections."""

    def __init__(self, client: AsyncOpenAI, key: str | None) -> None:
        self.client = client
        self.key = key
        self.users = 1


class OpenAIProvider:
    """One provider, and its client."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self._shared: _Client | None = None

    async def start(self, before: OpenAIProvider | None = None) -> None:
        """Make the client, unless the one of `before`, which has the same settings, will do.

        Raises `LLMError` without the extra, or without the key that it is told to have.
        """
        key = await asyncio.to_thread(self._key)
        if before is not None and before._shared is not None and before._shared.key == key:
            self._shared = before._shared
            self._shared.users += 1
        else:
            # importing it takes half a second, and making a client reads all certificates
            self._shared = _Client(await asyncio.to_thread(self._make, key), key)

    def _key(self) -> str | None:
        try:
            key = self.provider.key()
        except ValueError as error:
            raise LLMError(str(error), 503) from error
        if key is None and self.provider.official:
            raise LLMError(
                f"provider {self.provider.name}: api_key is missing (or api_key_file, or $OPENAI_API_KEY)",
                503,
            )
        return key

    def _make(self, key: str | None) -> AsyncOpenAI:
        try:
            import openai
        except ImportError as error:
            raise LLMError(
                f"provider {self.provider.name} needs the package {error.name or 'openai'}: pip install 'segue[ai]'",
                503,
            ) from error
        client = openai.AsyncOpenAI(
            api_key=key or _NO_KEY,
            base_url=self.provider.base_url or OFFICIAL,
            max_retries=0,
            timeout=openai.Timeout(self.provider.timeout_s, connect=_CONNECT_TIMEOUT_S),
        )
        _ = client.chat.completions, client.models  # which it imports late
        return client

    async def probe(self, timeout_s: float) -> None:
        """Ask for the list of models. Raises `LLMError` if the server isn't there, or won't have us."""
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._ready().models.with_raw_response.list()
                content = found.http_response.content
        except TimeoutError:
            raise self._told(f"did not answer within {timeout_s:g} s") from None
        except Exception as error:
            failure = self._understood(error)
            if failure.status == 404:  # it serves, but keeps no list
                return
            raise self._told(str(failure)) from error
        try:
            json.loads(content)
        except ValueError:
            raise self._told("answers something that isn't JSON") from None

    async def close(self) -> None:
        """Close its connections, unless a successor uses them."""
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.users -= 1
            if not shared.users:
                await shared.client.close()

    async def stream(
        self, messages: Sequence[Message], tools: Sequence[Tool], sampling: Sampling, model: str
    ) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes. Closing the generator ends the request.

        Raises `ProviderError`: before the first chunk it may be asked again, after that it may not.
        """
        limit_s, first_s = self.provider.timeout_s, self.provider.first_token_timeout_s
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        begin_by = min(end, loop.time() + first_s)
        try:
            async with asyncio.timeout_at(begin_by):
                stream = await self._ready().chat.completions.create(
                    **_request(self.provider, messages, tools, sampling, model)
                )
        except TimeoutError:
            raise ProviderError(f"did not answer within {first_s:g} s", status=504) from None
        except Exception as error:
            raise self._understood(error) from error
        answer = _Answer(self.provider.name, model)
        async with stream, contextlib.aclosing(_pieces(stream)) as pieces:
            deadline = begin_by
            while True:
                try:
                    async with asyncio.timeout_at(min(deadline, end)):
                        piece = await anext(pieces, None)
                except TimeoutError:
                    raise _silent(self.provider, answer.begun, loop.time() >= end) from None
                except Exception as error:
                    failure = self._understood(error)
                    raise ProviderError(
                        _cut(failure) if answer.begun else str(failure),
                        status=failure.status,
                        retry=failure.retry,
                    ) from error
                if piece is None:
                    break
                chunk = answer.add(piece)
                if chunk is not None:
                    yield chunk
                if answer.alive:  # not before whoever reads is back: that is not the provider's time
                    deadline = loop.time() + self.provider.silence_timeout_s
        yield answer.end()

    def _ready(self) -> AsyncOpenAI:
        if self._shared is None:
            raise LLMError(f"provider {self.provider.name} is closed", 503)
        return self._shared.client

    def _understood(self, error: Exception) -> ProviderError:
        """What an error of the client means."""
        import openai

        if isinstance(error, ProviderError):
            return error
        if isinstance(error, LLMError):
            return ProviderError(str(error), status=error.status)
        if isinstance(error, openai.APITimeoutError):
            return ProviderError("did not answer in time", status=504)
        if isinstance(error, openai.APIConnectionError):
            why = error.__cause__ or error
            return ProviderError(f"can't be reached: {self._shown(why)}", retry=True)
        if isinstance(error, openai.APIStatusError):
            return _refused(error.status_code, self._shown(error), error.response.headers.get("retry-after"))
        if isinstance(error, openai.APIError):  # told in the middle of a stream
            return ProviderError(f"says: {self._shown(error)}", retry=True)
        return ProviderError(f"answers garbage: {type(error).__name__}: {self._shown(error)}", retry=True)

    def _shown(self, error: BaseException) -> str:
        """Its message, in which a server may repeat the key."""
        text = str(getattr(error, "message", error)) or type(error).__name__
        key = self._shared.key if self._shared else None
        return hide(text, [key] if key else [])[:_SHOWN]

    def _told(self, reason: str) -> LLMError:
        parts = urlsplit(self.provider.base_url or OFFICIAL)
        where = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
        return LLMError(f"provider {self.provider.name} ({where}) {reason}", 502)


class _Answer:
    """What has come of an answer so far. Nothing of it is believed to be of the type that it should be."""

    def __init__(self, provider: str, model: str) -> None:
        self._provider = provider
        self._model = model
        self._calls: dict[int, list[str]] = {}
        self._finish: str | None = None
        self._usage: dict[str, int] | None = None
        self._length = 0
        self.begun = False
        """A first token has come."""
        self.alive = False
        """Something has come that shows that the model works."""

    def add(self, piece: Any) -> Chunk | None:
        """What there is to say now. Raises `ProviderError` for what is no part of an answer."""
        choices = getattr(piece, "choices", None)
        if not isinstance(choices, list):
            raise ProviderError("answers something that is no completion", retry=True)
        self._model = _text(getattr(piece, "model", None)) or self._model
        self._usage = _usage(getattr(piece, "usage", None)) or self._usage
        if not choices:
            return None
        delta = getattr(choices[0], "delta", None)
        said = getattr(delta, "content", None)
        if said is not None and not isinstance(said, str):
            raise ProviderError("answers something that is no completion", retry=True)
        said = said or _text(getattr(delta, "refusal", None))
        self._collect(getattr(delta, "tool_calls", None))
        finish = getattr(choices[0], "finish_reason", None)
        if isinstance(finish, str) and finish:
            self._finish = _FINISHES.get(finish, "stop")
        self.begun = self.begun or bool(said or self._calls)
        self.alive = self.begun or any(getattr(delta, name, None) for name in _THOUGHTS)
        self._length += len(said)
        if self._length > _MAX_ANSWER:
            raise ProviderError(f"the answer is longer than {_MAX_ANSWER} characters")
        return Chunk(said, provider=self._provider, model=self._model) if said else None

    def _collect(self, deltas: Any) -> None:
        for delta in deltas if isinstance(deltas, list) else ():
            index = getattr(delta, "index", None)
            function = getattr(delta, "function", None)
            # some servers give whole calls without an index
            call = self._calls.setdefault(index if isinstance(index, int) else len(self._calls), ["", "", ""])
            call[0] = call[0] or _text(getattr(delta, "id", None))
            call[1] = call[1] or _text(getattr(function, "name", None))
            arguments = _text(getattr(function, "arguments", None))
            call[2] += arguments
            self._length += len(arguments)

    def end(self) -> Chunk:
        """The last chunk. Raises `ProviderError` if it isn't complete."""
        if self._finish is None:
            reason = "the stream was cut off" if self.alive else "the answer is empty, and no completion"
            raise ProviderError(reason, retry=not self.begun)
        calls = tuple(
            ToolCall(identity or f"call-{index}", name, arguments or "{}")
            for index, (identity, name, arguments) in sorted(self._calls.items())
            if name
        )
        finish = "tool_calls" if calls else self._finish
        return Chunk("", calls, finish, self._provider, self._model, self._usage)


def _request(
    provider: Provider, messages: Sequence[Message], tools: Sequence[Tool], sampling: Sampling, model: str
) -> dict[str, Any]:
    request: dict[str, Any] = {
        "model": model,
        "messages": [_message(message) for message in messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # OpenAI's newer models don't know the older name, and other servers often not the newer one
        "max_completion_tokens" if provider.official else "max_tokens": sampling.max_tokens,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": list(sampling.stop) or None,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                },
            }
            for tool in tools
        ]
        or None,
        "extra_body": sampling.further or None,
    }
    return {key: value for key, value in request.items() if value is not None}


def _message(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
        found["content"] = message.content or None
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


async def _pieces(stream: Any) -> AsyncGenerator[Any, None]:
    iterator: AsyncIterator[Any] = aiter(stream)
    async for piece in iterator:
        yield piece


def _silent(provider: Provider, begun: bool, over: bool) -> ProviderError:
    if over:
        return ProviderError(f"the answer took longer than {provider.timeout_s:g} s", status=504)
    if begun:
        return ProviderError(f"nothing came for {provider.silence_timeout_s:g} s", status=504)
    return ProviderError(f"no token within {provider.first_token_timeout_s:g} s", status=504)


def _cut(failure: ProviderError) -> str:
    return f"the stream was cut off: {failure}"


def _refused(status: int, said: str, after: str | None) -> ProviderError:
    reason = f"answers {status}: {said}"
    if status in _OWN_FAULT:
        return ProviderError(reason, status=status, final=True)
    if status in _NOT_OURS:
        # our key or our model is wrong, which isn't the caller's fault
        return ProviderError(reason, status=404 if status == 404 else 502)
    if status == _TOO_MANY:
        return ProviderError(reason, status=503, retry=True, after_s=_seconds(after))
    return ProviderError(reason, retry=status >= 500 or status in {408, 409}, after_s=_seconds(after))


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None  # a date: our own back-off will do


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _usage(value: Any) -> dict[str, int] | None:
    counts = {name: getattr(value, name, None) for name in ("prompt_tokens", "completion_tokens")}
    found = {name: count for name, count in counts.items() if isinstance(count, int)}
    return found or None

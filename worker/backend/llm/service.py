"""`MultiLLMService`: several providers, asked in order until one begins to answer.

Until the first token everything may be tried again, first there and then elsewhere, and the caller sees none of it. From
the first token on nothing is: a stream that breaks off is an error to the caller, who has shown half of it already.
Closing the stream cancels the provider's request.

A provider that has failed three times in a minute is left out for a while (LIS's breaker). An answer without a word is
asked for once more, with other sampling.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec

import segue
from segue.worker.backend.conversation import Chunk, Message, Sampling, Tool, ToolCall
from segue.worker.backend.lis import LIS, merged
from segue.worker.backend.llm.errors import LLMError, ProviderError
from segue.worker.backend.llm.offline import OfflineResponder
from segue.worker.backend.llm.openai_provider import OpenAIProvider
from segue.worker.backend.llm.settings import OFFLINE, LLMSettings, Provider

_log = logging.getLogger("segue.backend")

_BACKOFF_S = 0.2
_BACKOFF_CAP_S = 4.0
_PATIENCE_S = 5.0
"""A provider that wants to be left alone for longer isn't waited for: the next one is asked."""


class Completion(msgspec.Struct, frozen=True):
    """A whole answer."""

    text: str
    tool_calls: tuple[ToolCall, ...]
    finish: str
    provider: str
    model: str
    usage: dict[str, int] | None = None


class _Counts:
    """Goes on over swaps, and is written to by streams that end on an instance which was replaced."""

    def __init__(self) -> None:
        self.requests = 0
        self.active = 0
        self.failed = 0
        """No provider has begun to answer."""
        self.broken = 0
        """One has begun, and not come to the end."""
        self.cancelled = 0
        """The caller has left."""
        self.retries = 0
        self.failovers = 0
        self.begun = 0
        self.first_token_s = 0.0


class _GivenUpError(Exception):
    """A provider has not begun to answer, and won't be asked again."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


class MultiLLMService:
    """The model that everything asks."""

    def __init__(self, settings: LLMSettings, lis: LIS, previous: MultiLLMService | None = None) -> None:
        self.settings = settings
        self.lis = lis
        self._asked: list[OfflineResponder | OpenAIProvider] = [
            OfflineResponder(each, settings.offline_pause_s) if each.kind == OFFLINE else OpenAIProvider(each)
            for each in settings.asked()
        ]
        self._before = None if previous is None else {each.provider: each for each in previous._asked}
        """By settings, those that answer until now; None: this instance replaces none."""
        self._new: list[Provider] = []
        """Those that nobody has asked before."""
        self._counts: _Counts = _Counts() if previous is None else previous._counts
        self._errors: dict[str, str] = {}

    @property
    def models(self) -> list[str]:
        """All that a caller may name; the first is asked if none is named."""
        first = [self.settings.model] if self.settings.model else []
        return list(
            dict.fromkeys([*first, *(model for each in self._asked for model in each.provider.offers)])
        )

    async def start(self) -> None:
        """Make the clients; in a swap, see that the providers that are new or changed are there.

        Raises `LLMError`. When nothing is replaced, a provider that is down now may be up later, and keeps no worker
        from starting.
        """
        known, self._before = self._before, None
        for each in self._asked:
            before = (known or {}).get(each.provider)
            if isinstance(each, OpenAIProvider):
                await each.start(before if isinstance(before, OpenAIProvider) else None)
        if known is None:
            return
        new = [each for each in self._asked if each.provider not in known]
        self._new = [each.provider for each in new]
        if not self.settings.probe:
            return
        limit_s = self.settings.probe_timeout_s
        for found in await asyncio.gather(*(each.probe(limit_s) for each in new), return_exceptions=True):
            if found is not None:
                raise found

    def activate(self) -> None:
        """What another server did under the same name isn't held against a new one: it may be asked at once."""
        while self._new:
            self.lis.succeeded(_source(self._new.pop()))

    def health(self) -> dict[str, Any]:
        """What is known without asking anybody: not ok when each provider has failed the last request made to it."""
        names = [each.provider.name for each in self._asked]
        known: dict[str, Any] = {"providers": {name: self._errors.get(name, "ok") for name in names}}
        if all(name in self._errors for name in names):
            return known | {"ok": False, "reason": "; ".join(self._errors[name] for name in names)}
        return known | {"ok": True}

    def metrics(self) -> dict[str, Any]:
        """Of this process."""
        counts = self._counts
        mean = counts.first_token_s / counts.begun if counts.begun else 0.0
        return {
            "requests": counts.requests,
            "active": counts.active,
            "failed": counts.failed,
            "broken": counts.broken,
            "cancelled": counts.cancelled,
            "retries": counts.retries,
            "failovers": counts.failovers,
            "first_token_s": segue.Rate(mean, counts.begun),
        }

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(each.close() for each in self._asked))

    # -------------------------------------------------------------------------------------------------- asking

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        sampling: Sampling | None = None,
        model: str | None = None,
    ) -> Completion:
        """The whole answer. Raises `LLMError`."""
        text: list[str] = []
        calls: list[ToolCall] = []
        last = Chunk()
        async with contextlib.aclosing(
            self.stream(messages, tools=tools, sampling=sampling, model=model)
        ) as chunks:
            async for chunk in chunks:
                text.append(chunk.text)
                calls += chunk.tool_calls
                last = chunk
        return Completion(
            "".join(text), tuple(calls), last.finish or "stop", last.provider, last.model, last.usage
        )

    async def stream(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        sampling: Sampling | None = None,
        usual: Sampling | None = None,
        model: str | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes; closing the generator cancels the provider's request.

        `sampling` is what the caller insists on; `usual` counts where nothing else was learnt to be better. With `model`,
        only providers that offer it are asked. Raises `LLMError`: 404 for a model that nobody offers.
        """
        counts = self._counts
        candidates = self._candidates(model)
        request = _Request(messages, tools, sampling or Sampling(), usual or Sampling(), time.perf_counter())
        counts.requests += 1
        counts.active += 1
        try:
            reasons: list[tuple[str, int]] = []
            for asked, name in candidates:
                counts.failovers += bool(reasons)
                async with contextlib.aclosing(self._tried(asked, name, request)) as chunks:
                    try:
                        async for chunk in chunks:
                            yield chunk
                    except _GivenUpError as error:
                        reasons.append((str(error), error.status))
                    else:
                        return
            counts.failed += 1
            raise _nobody(reasons)
        except LLMError:
            request.over = True
            raise
        finally:
            counts.active -= 1
            counts.cancelled += not request.over

    def _candidates(self, model: str | None) -> list[tuple[OfflineResponder | OpenAIProvider, str]]:
        """Whom to ask for what, in order."""
        wanted = model or self.settings.model
        offering = [(each, wanted) for each in self._asked if wanted in each.provider.offers]
        if model and not offering:
            raise LLMError(f"there is no model {model!r}; known: {', '.join(self.models)}", 404)
        if model:
            return offering
        others = [each for each in self._asked if not wanted or wanted not in each.provider.offers]
        return [*offering, *((each, each.provider.offers[0]) for each in others)]

    async def _tried(
        self, asked: OfflineResponder | OpenAIProvider, model: str, request: _Request
    ) -> AsyncGenerator[Chunk, None]:
        """The answer of one provider, asked as often as it makes sense.

        Raises `_GivenUpError` before the first token, `LLMError` after it or where the request is at fault.
        """
        provider, lis = asked.provider, self.lis
        source = _source(provider)
        learns = provider.kind != OFFLINE
        if learns and lis.breaker_open(source):
            last = self._errors.get(provider.name, "it has failed repeatedly")
            raise _GivenUpError(f"{provider.name} is left out for a while: {last}", 503)
        plain = merged(request.sampling, request.usual)
        sampling = merged(request.sampling, merged(lis.advice(source) or Sampling(), request.usual))
        sampling = sampling if learns else plain
        advised = sampling != plain
        tries, asked_again = 0, False
        while True:
            begun, text = False, ""
            try:
                async with contextlib.aclosing(
                    asked.stream(request.messages, request.tools, sampling, model)
                ) as chunks:
                    async for chunk in chunks:
                        if not begun and not chunk.text and not chunk.tool_calls:
                            if chunk.finish == "stop" and learns and not asked_again:
                                break
                            if chunk.finish is None:
                                continue
                        if not begun:
                            self._begin(request)
                        begun = True
                        text += chunk.text
                        if chunk.finish is not None:
                            request.over = True
                            self._done(source, provider, chunk, text, advised)
                        yield chunk
                if begun:
                    return
                # an answer without a word; nobody has seen anything yet
                lis.answered(source, "")
                sampling, advised = merged(lis.advice(source) or Sampling(), plain), True
                asked_again = True
                self._counts.retries += 1
            except ProviderError as error:
                reason = f"{provider.name} {error}"
                if error.final:
                    raise LLMError(reason, error.status) from error
                if begun:
                    self._counts.broken += 1
                    self._failed(source, provider, str(error))
                    raise LLMError(reason, error.status) from error
                tries += 1
                pause_s = _pause_s(tries) if error.after_s is None else error.after_s
                if not error.retry or tries > provider.retries or pause_s > _PATIENCE_S:
                    self._failed(source, provider, str(error))
                    raise _GivenUpError(reason, error.status) from error
                self._counts.retries += 1
                await asyncio.sleep(pause_s)

    def _begin(self, request: _Request) -> None:
        self._counts.begun += 1
        self._counts.first_token_s += time.perf_counter() - request.began

    def _done(self, source: str, provider: Provider, last: Chunk, text: str, advised: bool) -> None:
        self._errors.pop(provider.name, None)
        if provider.kind == OFFLINE:
            return
        if last.tool_calls or (last.finish == "length" and not text):
            self.lis.succeeded(source)
        else:
            self.lis.answered(source, text, advised=advised)

    def _failed(self, source: str, provider: Provider, reason: str) -> None:
        self._errors[provider.name] = reason
        self.lis.failed(source, reason)
        _log.warning("event=provider-failed provider=%s reason=%s", provider.name, reason)


class _Request:
    """What a caller asks."""

    def __init__(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        sampling: Sampling,
        usual: Sampling,
        began: float,
    ) -> None:
        self.messages = messages
        self.tools = tools
        self.sampling = sampling
        self.usual = usual
        self.began = began
        self.over = False
        """It has come to an end by itself."""


def _source(provider: Provider) -> str:
    return f"llm:{provider.name}"


def _pause_s(tries: int) -> float:
    """Half of it is chance, so that those who failed together don't come again together."""
    whole = min(_BACKOFF_CAP_S, _BACKOFF_S * 2.0 ** (tries - 1))
    return whole * (0.5 + random.random() / 2)  # noqa: S311


def _nobody(reasons: Sequence[tuple[str, int]]) -> LLMError:
    statuses = {status for _, status in reasons}
    status = statuses.pop() if len(statuses) == 1 else 502
    return LLMError("no provider has answered: " + "; ".join(reason for reason, _ in reasons), status)

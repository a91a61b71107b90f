"""What answers when no language model is configured: fixed rules, so that everything else can be tried and tested.

It says what it is. It calls a tool that it is given when the user's words ask for one that it recognises, or for one by
name: ``use NAME {"argument": 1}``.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Sequence

from segue.worker.backend.conversation import Chunk, Message, Sampling, Tool, ToolCall
from segue.worker.backend.llm.settings import Provider

_NAMED = re.compile(r"\s*(?:please\s+)?(?:use|call)\s+(?P<name>[\w.-]+)\s*(?P<arguments>\{.*\})?\s*", re.S)
_TIME = re.compile(r"\b(?:what(?:'s| is)? (?:the )?(?:time|date)|what day|which day|what time is it)\b", re.I)
_SUM = re.compile(
    r"\b(?:calculate|compute|evaluate|how much is|what is|what's)\s+(?P<sum>[-(\d.][-+*/%^().\d\s]*)", re.I
)
_UNITS = re.compile(
    r"\bconvert\s+(?P<value>-?\d+(?:\.\d+)?)\s*(?P<source>[^\W\d][\w/]*)\s+(?:to|into|in)\s+(?P<target>[^\W\d][\w/]*)",
    re.I,
)
_QUOTED = 300


class OfflineResponder:
    """A provider like the others, without a network."""

    def __init__(self, provider: Provider, pause_s: float) -> None:
        self.provider = provider
        self._pause_s = pause_s

    async def probe(self, timeout_s: float) -> None:
        """It is always there."""

    async def close(self) -> None:
        """Nothing to close."""

    async def stream(
        self, messages: Sequence[Message], tools: Sequence[Tool], sampling: Sampling, model: str
    ) -> AsyncGenerator[Chunk, None]:
        """The answer, word by word; the same for the same conversation."""
        name = self.provider.name
        prompt_tokens = sum(len(message.content.split()) for message in messages)
        call = wanted(messages, tools)
        if call is not None:
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 1}
            yield Chunk(tool_calls=(call,), finish="tool_calls", provider=name, model=model, usage=usage)
            return
        words = re.findall(r"\S+\s*", answer(messages))
        finish = "stop"
        if sampling.max_tokens is not None and len(words) > sampling.max_tokens:
            words, finish = words[: sampling.max_tokens], "length"
        for word in words:
            await asyncio.sleep(self._pause_s)
            yield Chunk(word, provider=name, model=model)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(words)}
        yield Chunk(finish=finish, provider=name, model=model, usage=usage)


def answer(messages: Sequence[Message]) -> str:
    """What there is to say."""
    last = messages[-1] if messages else Message("user")
    if last.role == "tool":
        called = {call.id: call.name for message in messages for call in message.tool_calls}
        results = []
        for message in reversed(messages):
            if message.role != "tool":
                break
            results.append(f"{called.get(message.tool_call_id or '', 'The tool')} says: {message.content}")
        return "\n".join(reversed(results))
    asked = [message.content for message in messages if message.role == "user"]
    said = asked[-1].strip() if asked else ""
    shown = said if len(said) <= _QUOTED else said[:_QUOTED] + "…"
    return (
        f"I am segue's offline responder, no language model. You said: “{shown}” "
        f"(message {len(asked)} of this conversation). I can show the time or calculate with the tools that I am given. "
        "For real answers, configure a model: base_url, model and api_key of the service llm."
    )


def wanted(messages: Sequence[Message], tools: Sequence[Tool]) -> ToolCall | None:
    """The tool that the last message asks for, if it is the user's."""
    if not messages or messages[-1].role != "user" or not tools:
        return None
    said = messages[-1].content
    identity = f"call-{len(messages)}"
    named = _NAMED.fullmatch(said)
    if named and (tool := next((each for each in tools if each.name == named["name"]), None)):
        return ToolCall(identity, tool.name, named["arguments"] or "{}")
    for recognise in (_units, _sum, _time):
        found = recognise(said, tools)
        if found is not None:
            tool, arguments = found
            return ToolCall(identity, tool.name, json.dumps(arguments, ensure_ascii=False))
    return None


_Found = tuple[Tool, dict[str, object]]


def _time(said: str, tools: Sequence[Tool]) -> _Found | None:
    tool = _called(tools, "clock", "time", "date") if _TIME.search(said) else None
    return (tool, {}) if tool is not None and not tool.parameters.get("required") else None


def _sum(said: str, tools: Sequence[Tool]) -> _Found | None:
    found = _SUM.search(said)
    tool = _called(tools, "calc") if found else None
    if found is None or tool is None or not re.search(r"\d", found["sum"]):
        return None
    texts = [name for name, kind in _properties(tool).items() if kind.get("type") == "string"]
    return (tool, {texts[0]: found["sum"].strip(" .")}) if texts else None


def _units(said: str, tools: Sequence[Tool]) -> _Found | None:
    found = _UNITS.search(said)
    tool = _called(tools, "convert", "unit") if found else None
    if found is None or tool is None:
        return None
    arguments: dict[str, object] = {}
    texts = [found["source"], found["target"]]
    for name, kind in _properties(tool).items():
        if kind.get("type") in {"number", "integer"}:
            arguments[name] = float(found["value"])
        elif kind.get("type") == "string" and texts:
            arguments[name] = texts.pop(0)
    return tool, arguments


def _called(tools: Sequence[Tool], *parts: str) -> Tool | None:
    return next((tool for part in parts for tool in tools if part in tool.name.lower()), None)


def _properties(tool: Tool) -> dict[str, dict[str, object]]:
    found = tool.parameters.get("properties")
    if not isinstance(found, dict):
        return {}
    return {name: kind for name, kind in found.items() if isinstance(kind, dict)}

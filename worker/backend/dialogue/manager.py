"""`DialogueManager`: one answer from beginning to end.

An answer uses the parts that are current when it is asked for, all of it, whatever is swapped meanwhile; the next one in
the same conversation uses the new ones, and goes on where this one ended, since the turns are in the memory.

What the user said is kept before the model is asked, the answer after it has ended. Whoever leaves in the middle leaves a
turn that says so: it is written by a task of its own, which also keeps the next message of the conversation waiting
until it is there, since the task that was answering may be cancelled again at any moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from segue.worker.backend.conversation import Message, ToolCall
from segue.worker.backend.dialogue import prompt
from segue.worker.backend.dialogue.reply import DialogueError, Final, Reply, ToolUse
from segue.worker.backend.dialogue.sessions import Hold, Sessions
from segue.worker.backend.emotion import Emotion, EmotionSystem
from segue.worker.backend.lexicon import feel
from segue.worker.backend.lis import LIS
from segue.worker.backend.llm import LLMError, MultiLLMService
from segue.worker.backend.memory import HAMMemoryManager, Memory, MemoryFailedError, Turn, TurnRole
from segue.worker.backend.personality import PersonalityManager, Profile
from segue.worker.backend.tools import ToolDispatcher

_log = logging.getLogger("segue.backend")
_T = TypeVar("_T")

_MEMORY = "memory"
_MAX_CALLS_AT_ONCE = 16
_OWN_SHARE = 0.5
"""How much what it says itself moves it, as against what it is told."""
_LEFT = "the client left"


class DialogueSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[services.dialogue]``."""

    max_tool_rounds: Annotated[int, msgspec.Meta(ge=0, le=100)] = 8
    """How often the model may call tools before it has to answer."""
    max_tool_characters: Annotated[int, msgspec.Meta(ge=100)] = 20_000
    """Of a tool's result, for the model."""
    turns: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 40
    """So many of the last turns are given to the model…"""
    characters: Annotated[int, msgspec.Meta(ge=0)] = 24_000
    """…as long as they have no more than so many characters."""
    memories: Annotated[int, msgspec.Meta(ge=0, le=100)] = 5
    """How many things that are remembered may be given to the model; 0: none are looked for."""
    memory_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    """An answer waits no longer for what is remembered."""


class _Parts(NamedTuple):
    """What one answer uses."""

    llm: MultiLLMService
    tools: ToolDispatcher
    personality: PersonalityManager
    emotion: EmotionSystem
    memory: HAMMemoryManager
    lis: LIS


class _Answer:
    """One answer as far as it has come."""

    def __init__(self, session: str, profile: Profile, served_by: Mapping[str, Any]) -> None:
        self.session = session
        self.profile = profile
        self.served_by = served_by
        self.text: list[str] = []
        self.tools: list[ToolUse] = []
        self.provider = ""
        self.model = ""
        self.problems: list[str] = []
        self.cut: str | None = _LEFT
        """Why it isn't whole; None once it is."""
        self.asked: asyncio.Task[None] | None = None
        """Keeps what the user said."""

    def meta(self, emotion: Emotion) -> dict[str, Any]:
        """What is kept beside the text."""
        found: dict[str, Any] = {
            "provider": self.provider,
            "model": self.model,
            "personality": self.profile.name,
            "emotion": {"valence": round(emotion.valence, 4), "arousal": round(emotion.arousal, 4)},
            **self.served_by,
        }
        if self.tools:
            found["tools"] = [{"name": use.name, "ok": use.ok} for use in self.tools]
        if self.cut is not None:
            found["cut"] = self.cut
        return found


class DialogueManager:
    """Answers what is said, in any number of conversations at once."""

    def __init__(
        self,
        settings: DialogueSettings,
        llm: MultiLLMService,
        tools: ToolDispatcher,
        personality: PersonalityManager,
        emotion: EmotionSystem,
        memory: HAMMemoryManager,
        lis: LIS,
        previous: DialogueManager | None = None,
    ) -> None:
        self.settings = settings
        self.llm = llm
        self.tools = tools
        self.personality = personality
        self.emotion = emotion
        self.memory = memory
        self.lis = lis
        self._sessions: Sessions = Sessions() if previous is None else previous._sessions
        self._tasks: set[asyncio.Task[Any]] = set()
        self._replies = self._cut = self._failed = self._active = 0

    def reply(
        self, session: str, text: str, *, served_by: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[Reply, None]:
        """Answer `text` in a conversation, piece by piece; `served_by` is kept with the answer.

        The parts that it uses are those of the moment of this call. Raises `DialogueError` while it is iterated.
        """
        parts = _Parts(self.llm, self.tools, self.personality, self.emotion, self.memory, self.lis)
        answer = _Answer(session, parts.personality.profile, dict(served_by or {}))
        return self._reply(parts, answer, text)

    def metrics(self) -> dict[str, int]:
        """Of this process."""
        return {
            "replies": self._replies,
            "active": self._active,
            "cut": self._cut,
            "failed": self._failed,
            "sessions_active": len(self._sessions),
        }

    async def close(self) -> None:
        """Wait until everything said is kept."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    # ------------------------------------------------------------------------------------------------ one answer

    async def _reply(self, parts: _Parts, answer: _Answer, text: str) -> AsyncGenerator[Reply, None]:
        hold = await self._sessions.take(answer.session)
        self._replies += 1
        self._active += 1
        ended = False
        try:
            messages = await self._begin(parts, answer, text)
            async with contextlib.aclosing(self._speak(parts, answer, messages)) as replies:
                async for reply in replies:
                    yield reply
            answer.cut = None
            self._move(parts, answer.session, "".join(answer.text), _OWN_SHARE)
            ended = True
            await asyncio.shield(self._spawn(self._end(parts, answer, hold)))
            felt = parts.emotion.state(answer.session)
            yield Reply(
                final=Final(answer.provider, answer.model, answer.profile.name, felt, tuple(answer.problems))
            )
        except LLMError as error:
            answer.cut = str(error)
            self._failed += 1
            raise DialogueError(str(error), error.status) from error
        except Exception as error:
            answer.cut = f"{type(error).__name__}: {error}"
            self._failed += 1
            raise
        finally:
            self._active -= 1
            if not ended:
                self._cut += answer.cut == _LEFT
                self._spawn(self._end(parts, answer, hold))

    async def _begin(self, parts: _Parts, answer: _Answer, text: str) -> list[Message]:
        """Remember, feel, keep what was said; the messages for the model."""
        turns: Sequence[Turn] = await self._recalled(
            parts, answer, lambda memory: memory.turns(answer.session, self.settings.turns), []
        )
        memories: Sequence[Memory] = []
        if self.settings.memories:
            first = turns[0].id if turns else None  # what comes from there on is given as it was said
            memories = await self._recalled(
                parts,
                answer,
                lambda memory: memory.search(
                    text, self.settings.memories, answer.session, turns_before=first
                ),
                [],
            )
        answer.asked = self._spawn(self._keep(parts, answer, "user", text, {}))
        await asyncio.shield(answer.asked)
        _recall_emotion(parts.emotion, answer.session, turns)
        self._move(parts, answer.session, text, 1.0)
        felt = parts.emotion.state(answer.session)
        return prompt.build(answer.profile, felt, memories, turns, text, self.settings.characters)

    async def _speak(
        self, parts: _Parts, answer: _Answer, messages: list[Message]
    ) -> AsyncGenerator[Reply, None]:
        """Ask the model, call the tools that it asks for, and again."""
        for round_ in range(self.settings.max_tool_rounds + 1):
            last = round_ == self.settings.max_tool_rounds
            tools = [] if last else parts.tools.tools()
            said: list[str] = []
            calls: list[ToolCall] = []
            async with contextlib.aclosing(
                parts.llm.stream(messages, tools=tools, usual=answer.profile.sampling)
            ) as chunks:
                async for chunk in chunks:
                    answer.provider = chunk.provider or answer.provider
                    answer.model = chunk.model or answer.model
                    calls += chunk.tool_calls
                    if chunk.text:
                        # a tool's round may have spoken already
                        piece = chunk.text if said or not answer.text else f"\n\n{chunk.text}"
                        said.append(chunk.text)
                        answer.text.append(piece)
                        yield Reply(piece)
            if not calls or last:
                return
            messages.append(Message("assistant", "".join(said), tuple(calls)))
            for call, use in zip(calls, await self._called(parts, calls), strict=True):
                answer.tools.append(use)
                told = (
                    use.text
                    if len(use.text) <= (most := self.settings.max_tool_characters)
                    else _shortened(use.text, most)
                )
                messages.append(Message("tool", told, tool_call_id=call.id))
                yield Reply(tool=use)

    async def _called(self, parts: _Parts, calls: Sequence[ToolCall]) -> list[ToolUse]:
        """All calls of one round, together; those that are too many are told so."""

        async def one(call: ToolCall) -> ToolUse:
            result = await parts.tools.call(call.name, call.arguments)
            return ToolUse(call.name, call.arguments, result.ok, result.text, result.error, result.seconds)

        tasks = [asyncio.ensure_future(one(call)) for call in calls[:_MAX_CALLS_AT_ONCE]]
        try:
            done = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        reason = f"at most {_MAX_CALLS_AT_ONCE} tools are called at once"
        return done + [
            ToolUse(call.name, call.arguments, False, reason, reason, 0.0)
            for call in calls[_MAX_CALLS_AT_ONCE:]
        ]

    # -------------------------------------------------------------------------------------- memory and feelings

    async def _recalled(
        self,
        parts: _Parts,
        answer: _Answer,
        look: Callable[[HAMMemoryManager], Awaitable[_T]],
        otherwise: _T,
    ) -> _T:
        """What the memory says; if it doesn't, the answer goes on without, and says so."""
        if parts.lis.breaker_open(_MEMORY):
            answer.problems.append("the memory has failed repeatedly and is left out for a while")
            return otherwise
        try:
            async with asyncio.timeout(self.settings.memory_timeout_s):
                found = await look(parts.memory)
        except (MemoryFailedError, TimeoutError) as error:
            reason = str(error) or f"the memory took longer than {self.settings.memory_timeout_s:g} s"
            parts.lis.failed(_MEMORY, reason)
            answer.problems.append(reason)
            return otherwise
        parts.lis.succeeded(_MEMORY)
        return found

    async def _keep(
        self, parts: _Parts, answer: _Answer, role: TurnRole, text: str, meta: Mapping[str, Any]
    ) -> None:
        """Write a turn down; if that can't be, the answer says so."""
        for memory in dict.fromkeys((parts.memory, self.memory)):  # the first may be closed already
            try:
                await memory.add_turn(answer.session, role, text, meta)
            except MemoryFailedError as error:
                problem = f"not kept: {error}"
            else:
                return
        answer.problems.append(problem)
        _log.error("event=turn-not-kept session=%s reason=%s", answer.session, problem)

    async def _end(self, parts: _Parts, answer: _Answer, hold: Hold) -> None:
        """Keep the answer, then let the next one speak."""
        try:
            if answer.asked is not None:
                await asyncio.wait({answer.asked})
                meta = answer.meta(parts.emotion.state(answer.session))
                await self._keep(parts, answer, "assistant", "".join(answer.text), meta)
        finally:
            hold.release()

    @staticmethod
    def _move(parts: _Parts, session: str, text: str, share: float) -> None:
        valence, arousal = feel(text)
        parts.emotion.felt(session, valence * share, arousal * share)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _recall_emotion(emotion: EmotionSystem, session: str, turns: Sequence[Turn]) -> None:
    """The conversation may have gone on in another process, or generation."""
    for turn in reversed(turns):
        felt = turn.meta.get("emotion")
        if isinstance(felt, dict):
            with contextlib.suppress(msgspec.ValidationError):
                emotion.recall(session, msgspec.convert(felt, Emotion), min(turn.created, time.time()))
            return


def _shortened(text: str, most: int) -> str:
    return f"{text[:most]}\n[{len(text) - most} more characters]"

"""What the generations were made from, and the listeners that this takes: read, kept, and given back with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from segue.handoff.listeners import BindError, Listener
from segue.supervisor import lifecycle, memory, model, snapshot
from segue.supervisor import settings as config
from segue.supervisor.listening import Listening
from segue.supervisor.log import Log
from segue.supervisor.mastership import Mastership
from segue.supervisor.mastership import snapshots as recalled
from segue.supervisor.snapshot import Snapshot


class Snapshots:
    """One of each generation that there is."""

    def __init__(
        self,
        mastership: Mastership,
        load: Callable[[], config.Effective],
        settings: config.Effective,
        log: Log,
        state: Callable[[], model.State],
    ) -> None:
        """`load` reads the settings anew, and raises `SettingsError`; `settings` are those that the master began with."""
        self._known = mastership.known
        self._load = load
        self._log = log
        self._state = state
        self.listening = Listening(mastership.inherited)
        listeners = self.listening.restore(mastership.found.listeners)
        self.by_generation = recalled(mastership, listeners, settings, log)
        self._retreated: set[int] = set()
        """Generations that have stopped accepting, and whose own listeners may still be needed."""

    @property
    def current(self) -> Snapshot | None:
        """That of the generation that serves."""
        return self.by_generation.get(self._state().current or 0)

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """Those of the current generation."""
        return () if self.current is None else self.current.listeners

    async def prepare(self, generation: int) -> model.Prepared | model.PrepareFailed | None:
        """Read the settings anew and open what they ask for. None: the lifecycle waits for it no longer."""
        try:
            async with asyncio.timeout(lifecycle.PREPARE_TIMEOUT_S):
                effective = await asyncio.to_thread(self._load)
                taken = await asyncio.to_thread(snapshot.take, effective)
        except TimeoutError:
            return None  # the lifecycle's own deadline has said so
        except (config.SettingsError, OSError, ValueError) as error:
            return model.PrepareFailed(generation, str(error))
        except (RuntimeError, MemoryError) as error:  # the system refuses a thread, or memory
            what = "a thread" if isinstance(error, RuntimeError) else "memory"
            hint = "see the limits of processes and memory (ulimit -u, TasksMax=, MemoryMax=)"
            return model.PrepareFailed(generation, f"the system refuses {what}: {error}; {hint}")
        if generation not in self._state().generations:
            return None
        try:
            listeners = await self.listening.open(taken.effective)
        except BindError as error:
            self.close_unused()
            return model.PrepareFailed(generation, str(error))
        if generation not in self._state().generations:  # given up while an address was looked up
            self.listening.opened()
            self.close_unused()
            return None
        workers = self._workers_for(taken)
        self.by_generation[generation] = msgspec.structs.replace(taken, listeners=listeners, workers=workers)
        self.listening.opened()
        return model.Prepared(generation, workers, taken.limits)

    def _workers_for(self, taken: Snapshot) -> int:
        """As the settings say; but a scale by hand lasts until the setting itself is changed."""
        current = self._state().current
        if current is None:  # as in the life of the last master, though none of its workers lives
            return memory.scaled(self._known, taken.settings.workers) or taken.settings.workers
        if self.by_generation[current].settings.workers == taken.settings.workers:
            return self._state().generations[current].target
        return taken.settings.workers

    def restart_only(self, generation: int) -> list[str]:
        """The keys in which it differs from what serves, and that only a restart of segue applies."""
        if self.current is None:
            return []
        return config.restart_only(self.current.settings, self.by_generation[generation].settings)

    def release(self, generation: int) -> None:
        """Nothing of it is left."""
        self.by_generation.pop(generation, None)
        self.close_unused()

    def close_unused(self) -> None:
        """Close the listeners that no generation asks for that serves, or may yet."""
        state = self._state()
        if state.developing and state.current is None:
            return  # clients wait in them for a save that mends the first start
        self.listening.close_all_but(self._of(state.may_serve))

    def retreat(self, generation: int) -> None:
        """It has stopped accepting."""
        self._retreated.add(generation)

    def refuse_unused(self) -> None:
        """Refuse from now on who connects to what only such a generation listened on that can't be had again."""
        if not self._retreated:
            return
        wanted = self._state().may_serve
        for number in self._retreated - wanted:
            self._retreated.discard(number)
            old = self.by_generation.get(number)
            if old is None:
                continue
            kept = {each.bind for each in self._of(wanted)}
            for address in self.listening.refuse(each for each in old.listeners if each.bind not in kept):
                self._log("info", "closed", address=address)
            self.close_unused()

    def _of(self, generations: frozenset[int]) -> list[Listener]:
        wanted = generations & self.by_generation.keys()
        return [listener for number in wanted for listener in self.by_generation[number].listeners]

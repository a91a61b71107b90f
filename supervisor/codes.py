"""Which code each generation runs: how it differs from what served before, and whether it is still that on the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from segue.supervisor import settings as config
from segue.supervisor.code import Changes, Code, compare, read
from segue.supervisor.log import Log
from segue.supervisor.operations import Operation, Operations
from segue.supervisor.snapshot import Snapshot
from segue.supervisor.snapshots import Snapshots

_REFUSED = (RuntimeError, MemoryError)
"""What a system raises that refuses a thread, or memory."""


class Codes:
    """Those of all generations, as soon as they have been read."""

    def __init__(
        self, snapshots: Snapshots, operations: Operations, known: Mapping[int, Code], log: Log
    ) -> None:
        """`known` is what an earlier master has read."""
        self._snapshots, self._operations, self._log = snapshots, operations, log
        self.by_generation = {
            number: code for number, code in known.items() if number in snapshots.by_generation
        }
        self.changes: dict[int, Changes] = {}
        """How a generation differs from what served before it."""
        self.differs_on_disk: list[str] = []
        """In what the settings and the code on disk differ from those of a generation that was adopted."""

    async def read(self, generation: int, before: int) -> bool:
        """Read that of a generation while its workers start, so that nobody waits for it; `before` is the one that serves.

        Returns whether it is known now.
        """
        snapshots = self._snapshots.by_generation
        if (taken := snapshots.get(generation)) is None:
            return False
        try:
            code = await asyncio.to_thread(read, taken.app_dir, taken.python)
        except _REFUSED:
            return False
        if generation not in snapshots:
            return False
        self.by_generation[generation] = code
        last, old = self.by_generation.get(before), snapshots.get(before)
        if last is not None and old is not None:
            keys = config.differing(old.settings, taken.settings)
            self.changes[generation] = compare(last, code, keys)
        for operation in self._operations.deploys():
            self.tell(operation)
        return True

    def tell(self, operation: Operation) -> None:
        """Let an operation say which code its generation runs, if that is known and it doesn't yet."""
        number = operation.generation
        if number in self.by_generation and operation.generation_code is None:
            operation.generation_code = self.by_generation[number].document()
            changes = self.changes.get(number)
            operation.changes = None if changes is None else msgspec.to_builtins(changes)

    async def compare_with_disk(self, generation: int, taken: Snapshot, now: config.Settings) -> None:
        """An adopted generation goes on as it is; only it is told that something else lies on the disk."""
        keys = config.differing(taken.settings, now)
        if keys:
            self.differs_on_disk.append(
                f"the settings differ from those of generation {generation}: {', '.join(keys)}"
            )
        try:
            same = await asyncio.to_thread(taken.fingerprint_now) == taken.fingerprint
        except (OSError, *_REFUSED):
            same = False
        if not same:
            self.differs_on_disk.append(
                f"the code in {taken.app_dir} is no longer that of generation {generation}"
            )
        for difference in self.differs_on_disk:
            self._log("warning", "disk-differs", generation=generation, reason=difference)

    async def newest_is_outdated(self) -> bool:
        """Whether the disk has another code than the newest generation; False, too, if that can't be found out."""
        snapshots = self._snapshots.by_generation
        generation = max(snapshots, default=0)
        if not generation:
            return False
        taken = snapshots[generation]
        try:
            now = await asyncio.to_thread(taken.fingerprint_now)
        except (OSError, *_REFUSED):
            return False
        return now != taken.fingerprint and generation == max(snapshots, default=0)

    def release(self, generation: int) -> None:
        """Nothing of it is left."""
        self.by_generation.pop(generation, None)
        self.changes.pop(generation, None)

"""What comes next: at random, and the more likely, the more often it has still to come."""

from __future__ import annotations

import collections
import random
from collections.abc import Collection

_COMPANY = 0.5
"""How often something else happens beside what may have company."""


class Schedule:
    """Of names. Whoever does them counts them in `counts`."""

    def __init__(
        self,
        names: Collection[str],
        wanted: int,
        rng: random.Random,
        beside: Collection[str] = (),
        with_company: Collection[str] = (),
    ) -> None:
        """Each of `names` is to come `wanted` times; those of `beside` may also come beside those of `with_company`."""
        self.counts: collections.Counter[str] = collections.Counter()
        self._names, self._wanted, self._rng = list(names), wanted, rng
        self._beside = [name for name in names if name in set(beside)]
        self._with_company = frozenset(with_company)

    @property
    def enough(self) -> bool:
        """Whether each has come as often as it is to."""
        return all(self._lacks(name) == 0 for name in self._names)

    def next(self) -> tuple[str, str | None]:
        """One, and another beside it if it has company."""
        name = self._pick(self._names)
        if self._beside and name in self._with_company and self._rng.random() < _COMPANY:
            return name, self._pick(self._beside)
        return name, None

    def _pick(self, names: list[str]) -> str:
        lacking = [self._lacks(name) for name in names]
        return self._rng.choices(names, lacking if any(lacking) else None)[0]

    def _lacks(self, name: str) -> int:
        return max(0, self._wanted - self.counts[name])

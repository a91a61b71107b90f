"""What a figure is, and how the runs of one are judged: by the worst."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Measured = dict[str, float | str]
"""One run: values by the key of their figure. A text says why a figure could not be measured."""


class BrokenRun(str):
    """Why a run broke down."""

    __slots__ = ()


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    key: str
    text: str
    unit: str = ""
    limit: float | None = None
    """None: for comparison only."""
    sense: Literal["<=", "<", ">="] = "<="
    digits: int = 0

    def holds(self, value: float) -> bool:
        """Whether `value` keeps the promise."""
        if self.limit is None:
            return True
        if self.sense == ">=":
            return value >= self.limit
        return value < self.limit if self.sense == "<" else value <= self.limit

    def worst(self, values: Sequence[float]) -> float:
        """The one to be judged by."""
        return min(values) if self.sense == ">=" else max(values)

    def write(self, value: float) -> str:
        """As a reader wants it."""
        return f"{value:,.{self.digits}f}"


@dataclass
class Judged:
    """A figure with all its runs."""

    figure: Figure
    runs: list[float | str]

    @property
    def values(self) -> list[float]:
        """The runs that could be measured."""
        return [run for run in self.runs if not isinstance(run, str)]

    @property
    def reasons(self) -> list[str]:
        """Why the others could not."""
        return list(dict.fromkeys(run for run in self.runs if isinstance(run, str)))

    @property
    def broke_down(self) -> bool:
        """Whether a run ended before it came to this figure: then nothing is known to hold."""
        return any(isinstance(run, BrokenRun) for run in self.runs)

    @property
    def verdict(self) -> Literal["ok", "FAILS", "not measured", ""]:
        """Of what was promised; empty for what only stands beside it."""
        wrong = bool(self.values) and not self.figure.holds(self.figure.worst(self.values))
        if wrong or (self.broke_down and self.figure.limit is not None):
            return "FAILS"
        if self.reasons or not self.runs:
            return "not measured"
        return "" if self.figure.limit is None else "ok"

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "figure": self.figure.text,
            "unit": self.figure.unit,
            "limit": self.figure.limit,
            "sense": self.figure.sense,
            "worst": self.figure.worst(self.values) if self.values else None,
            "median": statistics.median(self.values) if self.values else None,
            "runs": self.runs,
            "verdict": self.verdict,
        }


def judge(figures: Sequence[Figure], runs: Sequence[Measured]) -> list[Judged]:
    """Put the runs beside their figures."""
    return [Judged(figure, [run[figure.key] for run in runs]) for figure in figures]


def write_table(judged: Sequence[Judged], out: Callable[[str], None]) -> None:
    """One line for each figure: what, limit, worst, verdict, every run."""
    rows = [("figure", "limit", "worst", "", "runs")]
    notes: dict[str, list[str]] = {}
    for line in judged:
        figure, values = line.figure, line.values
        limit = (
            ""
            if figure.limit is None
            else f"{figure.sense} {figure.write(figure.limit)} {figure.unit}".strip()
        )
        worst = f"{figure.write(figure.worst(values))} {figure.unit}".strip() if values else "-"
        runs = " ".join("-" if isinstance(run, str) else figure.write(run) for run in line.runs)
        rows.append((figure.text, limit, worst, line.verdict, runs))
        for reason in line.reasons:
            notes.setdefault(reason, []).append(figure.text.strip())
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for number, (text, limit, worst, verdict, runs) in enumerate(rows):
        out(
            f"{text:<{widths[0]}}  {limit:>{widths[1]}}  {worst:>{widths[2]}}  {verdict:<{widths[3]}}  {runs}".rstrip()
        )
        if number == 0:
            out("-" * (sum(widths) + 8 + 4))
    for reason, texts in notes.items():
        out(f"not measured: {texts[0]}{f' and {len(texts) - 1} more' if len(texts) > 1 else ''}: {reason}")

"""The figures of the comparison: ``python -m bench.compare.figures DIRECTORY < RESULTS``, where matplotlib is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

COLOURS = ("#0b6e4f", "#c1666b", "#d4a017", "#8e6c8a", "#4281a4", "#7a7a7a")
_SHOWN = ("reload-1", "reload-2", "import", "startup", "hang", "slow", "worker", "worker-broken", "master")
_AFTER_S = 4.0
_TENTH = 0.1


def main() -> int:
    """Draw both; prints where they are."""
    results, out = json.load(sys.stdin), Path(sys.argv[1])
    mpl.rcParams |= {"svg.hashsalt": "segue", "font.family": "sans-serif", "font.size": 9}
    for draw, name in ((failures, "comparison-failures.svg"), (latencies, "comparison-latency.svg")):
        figure = draw(results)
        figure.savefig(out / name, metadata={"Date": None}, facecolor="white")
        plt.close(figure)
        print(out / name)
    return 0


def failures(results: dict[str, Any]) -> Any:
    """Failed requests by scenario, on a scale that shows zero and thousands."""
    shown = [key for key in _SHOWN if key in results["scenarios"]]
    contestants = results["contestants"]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.75 * len(shown)), layout="constrained")
    width = 0.8 / len(contestants)
    for number, contestant in enumerate(contestants):
        places, values = [], []
        for place, key in enumerate(shown):
            found = _found(results, key, contestant["key"])
            if found:
                places.append(place - 0.4 + (number + 0.5) * width)
                values.append(max(run["failed"] for run in found))
        bars = axes.barh(
            places, values, height=width * 0.9, color=COLOURS[number % len(COLOURS)], label=contestant["name"]
        )
        axes.bar_label(bars, labels=[f"{value:,}" for value in values], padding=2, fontsize=7)
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    axes.set_yticks(range(len(shown)), [results["scenarios"][key] for key in shown])
    axes.invert_yaxis()
    axes.set_xlabel("failed requests (the worst run)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def latencies(results: dict[str, Any]) -> Any:
    """The longest latency of each tenth of a second around a reload with two workers, one field for each server."""
    contestants = [c for c in results["contestants"] if _found(results, "reload-2", c["key"])]
    rows = max(1, (len(contestants) + 1) // 2)
    figure, fields = plt.subplots(
        rows, 2, figsize=(9, 1 + 1.9 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for number, axes in enumerate(fields.flat):
        if number >= len(contestants):
            axes.set_visible(False)
            continue
        runs = _found(results, "reload-2", contestants[number]["key"])
        points = _laid_over([run["around"] for run in runs])
        times = [point[0] for point in points]
        axes.step(
            times,
            [max(point[1], 0.5) for point in points],
            where="post",
            color=COLOURS[number % len(COLOURS)],
        )
        failed = [(point[0] + _TENTH / 2, point[3]) for point in points if point[3]]
        axes.plot([t for t, _ in failed], [0.7] * len(failed), "x", color="#b00020", markersize=5)
        total = sum(count for _, count in failed)
        reloads = sum(run["reloads"] for run in runs)
        title = f"{contestants[number]['name']}: {total:,} failed in {reloads} reloads"
        axes.set_title(title, loc="left", fontsize=9)
        axes.axvline(0, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_xlim(-1, _AFTER_S)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
    figure.supxlabel("seconds after the signal (crosses: failed requests)")
    figure.supylabel("longest latency in 0.1 s, ms")
    return figure


def _laid_over(runs: list[list[Any]]) -> list[list[float]]:
    """The worst of each tenth of a second."""
    found: dict[float, list[float]] = {}
    for time_s, latency_ms, answers, failures in (point for run in runs for point in run):
        known = found.get(time_s, [0.0, 0, 0])
        found[time_s] = [max(known[0], latency_ms), known[1] + answers, known[2] + failures]
    return [[time_s, *values] for time_s, values in sorted(found.items())]


def _found(results: dict[str, Any], scenario: str, contestant: str) -> list[dict[str, Any]]:
    return [
        run["found"]
        for run in results["runs"]
        if run["scenario"] == scenario and run["contestant"] == contestant and "found" in run
    ]


if __name__ == "__main__":
    sys.exit(main())

"""The results as a page: what was done, what each server did, and where segue loses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]
Runs = list[dict[str, Any]]

_NOTHING = "–"


class Row:
    """One line of the table."""

    def __init__(
        self,
        scenario: str,
        text: str,
        cell: Callable[[Runs], str],
        number: Callable[[Runs], float | None] | None = None,
        better: Callable[[Sequence[float]], float] = min,
    ) -> None:
        """`number` is what is compared, if it can be; `better` picks the best."""
        self.scenario, self.text, self.cell, self.number, self.better = scenario, text, cell, number, better


def write_page(results: Results, path: Path) -> Path:
    """Write it; returns where."""
    path.write_text("\n".join(_lines(results)) + "\n")
    return path


def _lines(results: Results) -> list[str]:
    contestants = results["contestants"]
    lines = [
        "# The comparison",
        "",
        "What happens to clients, and to whoever deploys, with segue and with other servers for ASGI applications: the same",
        "application, the same load, the same signal. Written by `make compare`, which anyone can run again.",
        "",
    ]
    if results["quick"]:
        lines += ["**A quick run, to see that it works: nothing here is to be relied on.**", ""]
    lines += [
        *_table(results, contestants),
        "",
        "![Failed requests by scenario](comparison-failures.svg)",
        "",
        "![The longest latency around a reload](comparison-latency.svg)",
        "",
        "## What segue loses",
        "",
        *_losses(results, contestants),
        "",
        "## How to read it",
        "",
        *_READING,
        "",
        "## How it was measured",
        "",
        *_how(results, contestants),
    ]
    errors = [run for run in results["runs"] if "error" in run]
    if errors:
        lines += ["", "## What could not be measured", ""]
        lines += [f"- {results['scenarios'][r['scenario']]}, {r['contestant']}: {r['error']}" for r in errors]
    return lines


def _table(results: Results, contestants: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| | "
        + " | ".join(f"**{c['name']}**" if c["key"] == "segue" else c["name"] for c in contestants)
        + " |",
        "|---|" + "---|" * len(contestants),
    ]
    for row in ROWS:
        if row.scenario in results["scenarios"]:
            cells = [row.cell(runs) if (runs := _runs(results, row, c)) else _NOTHING for c in contestants]
            lines.append(f"| {row.text} | " + " | ".join(cells) + " |")
    return lines


def _runs(results: Results, row: Row, contestant: dict[str, Any]) -> Runs:
    return [
        run["found"]
        for run in results["runs"]
        if run["scenario"] == row.scenario and run["contestant"] == contestant["key"] and "found" in run
    ]


def _losses(results: Results, contestants: list[dict[str, Any]]) -> list[str]:
    """Every figure in which another one is better, by how much."""
    lines = []
    for row in ROWS:
        if row.number is None or row.scenario not in results["scenarios"]:
            continue
        numbers = {}
        for contestant in contestants:
            runs = _runs(results, row, contestant)
            value = row.number(runs) if runs else None
            if value is not None:
                numbers[contestant["key"]] = (value, row.cell(runs), contestant["name"])
        if "segue" not in numbers or len(numbers) < 2:
            continue
        ours, ours_cell, _ = numbers.pop("segue")
        best = row.better([value for value, _, _ in numbers.values()])
        if row.better([best, ours]) != ours:
            better = [
                f"{name} {cell}"
                for value, cell, name in numbers.values()
                if row.better([value, ours]) != ours
            ]
            lines.append(f"- {row.text}: {', '.join(better)}; segue {ours_cell}.")
    lines.append(
        "- The others run on more systems, and are older: segue is for Linux. granian serves HTTP/2 as well as HTTP/1.1 by "
        "itself, hypercorn also HTTP/3."
    )
    return lines


# ------------------------------------------------------------------------------------------------------------- cells


def _median(key: str) -> Callable[[Runs], float | None]:
    def median(runs: Runs) -> float | None:
        values = [run[key] for run in runs if run.get(key) is not None]
        return statistics.median(values) if len(values) == len(runs) else None

    return median


def _worst(key: str) -> Callable[[Runs], float | None]:
    return lambda runs: max(run[key] for run in runs)


def _written(key: str, unit: str, digits: int = 0) -> Callable[[Runs], str]:
    def write(runs: Runs) -> str:
        value = _median(key)(runs)
        return _NOTHING if value is None else f"{value:,.{digits}f} {unit}".strip()

    return write


def _outage(runs: Runs) -> str | None:
    ended = [run["ended"] for run in runs if run.get("ended") is not None]
    return f"**outage**: it ends with status {ended[0]}" if ended else None


def _reloaded(runs: Runs) -> str:
    felt = f"{max(run['failed'] for run in runs):,} failed, {max(run['closed'] for run in runs):,} closed"
    not_done = sum(run["not_done"] for run in runs)
    if not_done and _outage(runs) is None:
        felt += f"; {not_done} of {sum(run['reloads'] for run in runs)} not done"
    return _outage(runs) or felt


def _gap(runs: Runs) -> str:
    return (_outage(runs) and _NOTHING) or f"{max(run['gap_ms'] for run in runs):,.0f} ms"


def _broken(runs: Runs) -> str:
    if outage := _outage(runs):
        return outage
    if not all(run["serves"] for run in runs):
        return f"**outage**: nobody answers, {max(run['failed'] for run in runs):,} failed"
    text = f"old code serves, {max(run['failed'] for run in runs):,} failed"
    tried = [run["mended_s"] for run in runs if run["mend_tried"]]
    mended = [delay for delay in tried if delay is not None]
    if len(mended) < len(tried):
        gone = [run["ended_when_mended"] for run in runs if run["ended_when_mended"] is not None]
        after = f"**it then ends with status {gone[0]}**" if gone else "not served within 30 s"
        return f"{text}; the next, good deploy: {after}"
    return text + (f"; mended in {max(mended):.1f} s" if mended else "")


def _slow(runs: Runs) -> str:
    if outage := _outage(runs):
        return outage
    text = f"{max(run['failed'] for run in runs):,} failed, {max(run['closed'] for run in runs):,} closed"
    delays = [run["new_code_s"] for run in runs]
    if any(delay is None for delay in delays):
        return text + "; the reload was not done"
    return text + f"; new code after {statistics.median(delays):.1f} s"


def _killed(runs: Runs) -> str:
    if outage := _outage(runs):
        return outage
    if not all(run["serves"] for run in runs):
        return f"**outage**, {max(run['failed'] for run in runs):,} failed"
    text = f"{max(run['failed'] for run in runs):,} failed"
    again = [run["again_s"] for run in runs]
    if any(delay is None for delay in again):
        return text + ", not replaced"
    return text


def _killed_broken(runs: Runs) -> str:
    if outage := _outage(runs):
        return outage
    if not all(run["serves"] for run in runs):
        return f"**outage**, {max(run['failed'] for run in runs):,} failed"
    text = f"the other serves, {max(run['failed'] for run in runs):,} failed"
    again = [run["again_s"] for run in runs]
    if any(delay is None for delay in again):
        return text + "; not replaced once it could be"
    return text + f"; replaced {statistics.median(again):.1f} s after it could be"


def _master(runs: Runs) -> str:
    text = "workers serve on" if all(run["serves"] for run in runs) else "**outage**"
    text += f", {max(run['failed'] for run in runs):,} failed"
    if not all(run["started_again"] for run in runs):
        return text + "; can't be started again"
    if any(run["mixed"] for run in runs):
        return text + "; started again, **old and new code side by side**"
    if all(run["new_code"] for run in runs):
        return text + "; started again, new code"
    return text + "; started again, old code"


def _sockets(runs: Runs) -> str:
    parts = [
        f"{statistics.median(run[key] for run in runs):.0f} {key if key != 'told' else 'told to connect again'}"
        for key in ("open", "told", "cut")
        if any(run[key] for run in runs)
    ]
    return ", ".join(parts)


def _bad(runs: Runs) -> float | None:
    """Failed requests; none to compare where it is an outage."""
    ended = any(run.get("ended") is not None for run in runs)
    return None if ended else max(run["failed"] for run in runs)


ROWS = (
    Row("reload-1", "Reload under load, 1 worker: requests, connections", _reloaded, _bad),
    Row("reload-1", "… longest time without any answer", _gap, _worst("gap_ms")),
    Row("reload-2", "Reload under load, 2 workers: requests, connections", _reloaded, _bad),
    Row("reload-2", "… longest time without any answer", _gap, _worst("gap_ms")),
    Row("import", "New code fails at import", _broken, _bad),
    Row("startup", "New code fails at start-up", _broken, _bad),
    Row("hang", "New code hangs at start-up", _broken, _bad),
    Row("slow", "New code takes long to start", _slow, _bad),
    Row("worker", "A worker is killed", _killed, _bad),
    Row("worker", "… until there are two again", _written("again_s", "s", 2), _median("again_s")),
    Row("worker-broken", "A worker is killed while nothing can start", _killed_broken, _bad),
    Row("master", "The master is killed, then started again", _master, _bad),
    Row("sockets", "20 WebSockets some seconds after a reload", _sockets),
    Row("memory", "Memory of the master", _written("master_mib", "MiB"), _median("master_mib")),
    Row("memory", "… of all processes, 2 workers", _written("all_mib", "MiB"), _median("all_mib")),
    Row("throughput", "Requests/s, 1 worker", _written("one", ""), _median("one"), max),
    Row("throughput", "Requests/s, 2 workers", _written("two", ""), _median("two"), max),
    Row("signal", "From the signal to new code", _written("median_s", "s", 2), _median("median_s")),
)

_READING = (
    "- *failed* is a request that was refused, reset, cut off, timed out or not answered with 2xx; nothing is tried twice. The",
    "  worst run counts. A worker that is killed takes with it what it had in flight: that fails everywhere.",
    "- *closed* is a connection that a client wanted to keep, and that the server closed or told it to close.",
    "- *outage* is that nobody answers any more; the exit status is what a service manager sees.",
    "- *mended* is the time from the next, good deploy to its first answer.",
    "- The latencies of a server that stalls look better than they are, since each client waits for its answer before it asks",
    "  again: read the longest time without any answer beside them.",
    "- All reloads are by `HUP`. None but segue says how it went: `segue reload` does, with an exit status.",
)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _how(results: Results, contestants: list[dict[str, Any]]) -> list[str]:
    where, told = results["machine"], results["versions"]
    day = time.strftime("%Y-%m-%d", time.localtime(results["begun"]))
    lines = [
        f"On {day}, in {results['seconds'] / 60:.0f} minutes; each scenario {_times(results['runs_each'])}, the servers",
        "in turn, in another order each time.",
        f"{where['cpus']} cores ({where['cpu']}), Linux {where['kernel']}, Python {told.get('python')}.",
        "",
        "| | version | command, with 2 workers | set beside the defaults |",
        "|---|---|---|---|",
    ]
    for each in contestants:
        version = told.get(each["of"]) or _NOTHING
        if each["key"] == "gunicorn-uvicorn":
            version += f", uvicorn-worker {told.get('uvicorn-worker')}"
        lines.append(f"| {each['name']} | {version} | `{each['command']}` | {each['note']} |")
    lines += [
        "",
        f"With uvloop {told.get('uvloop')} and httptools {told.get('httptools')} in one environment of their own (segue in its own).",
        "The access log is off everywhere. The load: 50 clients that keep their connection and wait 0 to 20 ms between an answer",
        "and the next request, 10 of which post, 10 clients with a new connection for each request, 5 streams of 2 s; in the",
        "scenarios of what is broken a light one. The application takes 1 s to start in the reloads under load, 7 s where it takes",
        "long, else nothing. The requests/s are wrk's, 32 connections, one thread, the median of three turns in each run; on a machine",
        "that others share a rate can differ by a third from one turn to the next. What segue costs beside uvicorn is therefore",
        'measured in ten pairs, turn by turn: `make bench ARGS="throughput"`.',
        "",
        "    make compare                                          # all of it",
        '    make compare ARGS="--quick"                           # shorter, to see that it works',
        '    make compare ARGS="--servers segue,granian --scenarios reload-2,throughput"',
    ]
    return lines

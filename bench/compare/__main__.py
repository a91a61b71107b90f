"""``python -m bench.compare``: the same done to segue and to other servers, as a table and figures; see ``make compare``.

Exit status: 0 when everything was measured, 1 when something could not be (the page says what and why), 2 for wrong
arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bench.__main__ import RESULTS, machine
from bench.compare.contestants import CONTESTANTS, THEIRS, choose, rotated, versions
from bench.compare.page import write_page
from bench.compare.scenarios import SCENARIOS
from bench.processes import machine_busy
from bench.servers import workshop
from bench.users import ROOT

DOCS = ROOT / "docs"
RUNS = 2
OFTEN = {"throughput": 3}
"""What takes so many turns in a run: a rate differs by several per cent from one process to the next."""


def main() -> int:
    args = _arguments()
    if args.page is None:
        results = _measure(args)
        path = _keep(results)
        print(f"\nresults: {path}")
    else:
        results = _merged([json.loads(path.read_text()) for path in args.page])
    args.out.mkdir(parents=True, exist_ok=True)
    page = write_page(results, args.out / "comparison.md")
    figures = _draw(results, args.out)
    print(f"page: {page}" + "".join(f"\nfigure: {figure}" for figure in figures))
    return 1 if any("error" in run for run in results["runs"]) else 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    contestants = choose(args.servers)
    missing = [c.name for c in contestants if not c.ours and not THEIRS.exists()]
    if missing:
        sys.exit(f"{', '.join(missing)}: not installed; 'make compare' does that, or name --servers segue")
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # under nohup: the servers would inherit that, but not a handler
        signal.signal(signal.SIGHUP, lambda *_: None)
    begun, runs = time.time(), list[dict[str, Any]]()
    turns = [key for key in args.scenarios for _ in range(1 if args.quick else OFTEN.get(key, 1))]
    total = args.runs * len(turns) * len(contestants)
    with workshop(args.quick, print) as bench:
        for number in range(args.runs):
            for place, key in enumerate(turns):
                for contestant in rotated(contestants, number + place):
                    what = f"{len(runs) + 1}/{total} {SCENARIOS[key][0]}: {contestant.name}"
                    print(f"{what} …", flush=True)
                    run: dict[str, Any] = {"scenario": key, "contestant": contestant.key, "run": number + 1}
                    before = time.monotonic()
                    try:
                        run["found"] = SCENARIOS[key][1](bench, contestant)
                    except Exception as error:
                        traceback.print_exc()
                        run["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                    run["seconds"] = round(time.monotonic() - before, 1)
                    runs.append(run)
    return {
        "begun": begun,
        "seconds": round(time.time() - begun, 1),
        "quick": args.quick,
        "runs_each": args.runs,
        "machine": machine(),
        "busy": machine_busy(1.0),
        "versions": versions(),
        "contestants": [
            {"key": c.key, "name": c.name, "of": c.distribution, "command": c.command(2), "note": c.note}
            for c in contestants
        ],
        "scenarios": {key: SCENARIOS[key][0] for key in args.scenarios},
        "runs": runs,
    }


def _merged(several: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured in several goes: of each server in each scenario the last, since one takes less than all."""
    merged, *others = several
    for results in others:
        again = {(run["scenario"], run["contestant"]) for run in results["runs"]}
        kept = [run for run in merged["runs"] if (run["scenario"], run["contestant"]) not in again]
        merged["runs"] = kept + results["runs"]
        merged["scenarios"] |= results["scenarios"]
        merged["seconds"] += results["seconds"]
    return merged


def _keep(results: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(results["begun"]))
    path = RESULTS / f"compare-{stamp}.json"
    path.write_text(json.dumps(results, indent=1))
    return path


def _draw(results: dict[str, Any], out: Path) -> list[Path]:
    """The figures, by the environment that has what draws them."""
    if not THEIRS.exists():
        return []
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(THEIRS), "-m", "bench.compare.figures", str(out)],
        input=json.dumps(results).encode(),
        env=environ,
        stdout=subprocess.PIPE,
        check=True,
    )
    return [Path(line) for line in done.stdout.decode().splitlines()]


def _arguments() -> argparse.Namespace:
    keys = [contestant.key for contestant in CONTESTANTS]
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="shorter, once: to see that it works")
    parser.add_argument("--runs", type=int, help=f"how often each (default: {RUNS}, with --quick 1)")
    parser.add_argument("--servers", default="", help=f"some of {','.join(keys)} (default: all)")
    parser.add_argument("--scenarios", default="", help=f"some of {','.join(SCENARIOS)} (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        help="where the page and its figures go (default: docs, with --quick bench/results)",
    )
    parser.add_argument(
        "--page",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="only write page and figures of these results; what is in several counts as in the last",
    )
    args = parser.parse_args()
    args.servers = [key for key in args.servers.split(",") if key]
    args.scenarios = [key for key in args.scenarios.split(",") if key] or list(SCENARIOS)
    for wrong in (*(set(args.servers) - set(keys)), *(set(args.scenarios) - set(SCENARIOS))):
        parser.error(f"there is no {wrong!r}")
    args.runs = args.runs or (1 if args.quick else RUNS)
    if args.out is None:
        args.out = RESULTS if args.quick else DOCS
    return args


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench [NAME…] [--quick] [--runs 5]``: every promised figure of speed and size, and whether it holds.

Exit status: 0 when all hold, 1 when one doesn't, 2 for wrong arguments, 3 when none fails but some could not be
measured here (the table says why). The result also goes to bench/results/, as JSON; or to another directory, with --out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bench.figures import BrokenRun, Judged, Measured, judge, write_table
from bench.processes import machine_busy
from bench.servers import workshop

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {
    "master": "memory, idle CPU and 200 reloads in a row",
    "start": "how much later than uvicorn a worker starts",
    "dev": "development mode: from a save to the new code",
    "throughput": "requests/s beside uvicorn (needs wrk)",
    "scrape": "/metrics with 32 workers",
    "dashboard": "the page in a real browser, and what it costs while it is open (needs chromium and wrk)",
    "services": "leases, and swaps under streams",
    "hsp": "swaps of the agent protocol's connector under load (needs mosquitto)",
    "backend": "the built-in backend: its start, swaps of the model under token streams, reloads of tools under calls",
    "idle": "10,000 idle connections over a reload",
    "deploys": "how fast a deploy is taken back, by hand and by itself",
    "takeover": "the master is upgraded and killed under load",
    "reloads": "ten reloads under load, as root and unprivileged, with 1 and 2 workers, and uvicorn's",
}
BUSY_FOR_S = 1.0
FAILED, NOT_MEASURED = 1, 3


def main() -> int:
    args = _arguments()
    names = args.names or list(NAMES)
    tables: dict[str, list[Judged]] = {}
    busy: dict[str, list[str]] = {}
    begun = time.time()
    with workshop(args.quick, _say) as bench:
        for name in names:
            module = importlib.import_module(f"bench.{name}")
            runs: list[Measured] = []
            others: list[str] = []
            for number in range(args.runs):
                _say(f"{name}: run {number + 1} of {args.runs}")
                others.append(f"{machine_busy(BUSY_FOR_S):.0%}")
                try:
                    runs.append(module.measure(bench))
                except Exception as error:
                    traceback.print_exc()
                    reason = BrokenRun(f"the run broke down: {type(error).__name__}: {error}".splitlines()[0])
                    runs.append(dict.fromkeys((figure.key for figure in module.FIGURES), reason))
            _say("")
            tables[name] = judge(module.FIGURES, runs)
            print(f"\n{name}: {NAMES[name]}")
            write_table(tables[name], print)
            print(f"before each run the machine was busy with other things to {' '.join(others)}")
            busy[name] = others
    path = _write(tables, busy, bench.details, args, begun)
    verdicts = [line.verdict for lines in tables.values() for line in lines]
    failed, missing = verdicts.count("FAILS"), verdicts.count("not measured")
    print(f"\n{verdicts.count('ok')} hold, {failed} fail, {missing} not measured; {path}")
    if failed:
        return FAILED
    return NOT_MEASURED if missing else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure what segue promises about speed and size.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="names:\n" + "\n".join(f"  {name:<11} {what}" for name, what in NAMES.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which figures (default: all)")
    parser.add_argument("--quick", action="store_true", help="shorter and fewer: to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes, as JSON")
    parser.add_argument("--runs", type=int, help="how often; the worst counts (default: 5, with --quick 1)")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if args.runs is None:
        args.runs = 1 if args.quick else 5
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    return args


def _write(
    tables: dict[str, list[Judged]],
    busy: dict[str, list[str]],
    details: list[dict[str, Any]],
    args: argparse.Namespace,
    begun: float,
) -> Path:
    args.out.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(begun))
    path: Path = args.out / f"{stamp}.json"
    document: dict[str, Any] = {
        "begun": begun,
        "seconds": round(time.time() - begun, 1),
        "quick": args.quick,
        "machine": machine(),
        "busy_before_each_run": busy,
        "figures": {
            name: {line.figure.key: line.document() for line in lines} for name, lines in tables.items()
        },
        "details": details,
    }
    path.write_text(json.dumps(document, indent=1))
    latest = args.out / "latest.json"
    latest.unlink(missing_ok=True)
    latest.symlink_to(path.name)
    return path


def machine() -> dict[str, Any]:
    """Where it was measured."""
    versions = {
        name: importlib.metadata.version(name) for name in ("segue", "uvicorn", "uvloop", "httptools")
    }
    models = [
        line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    return {
        "cpus": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "load": os.getloadavg(),
        **versions,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _say(text: str) -> None:
    """What is going on, on a terminal, in one line."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.chaos [--events 10] [--minutes 0] [--seed N] [--only NAME]``: everything that can go wrong, under load.

Events in random order, under the load generator, until each has happened so often and so many minutes have passed; at times
one beside another. Only requests and connections that a killed worker held may be lost, and what code that is bad on
purpose has answered with 500; anything else, and any event after which the instance is not whole again, is a failure. A
seed repeats the order and the choices, not the timing.

Exit status: 0 when nothing else was lost, 1 otherwise, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

from bench.chaos.blame import Cause, Loss
from bench.chaos.events import BESIDE, EVENTS, WITH_COMPANY
from bench.chaos.instance import ChaosError, Instance
from bench.chaos.schedule import Schedule
from bench.ports import free_port
from bench.processes import kill_marked, marked
from bench.users import ROOT

_NAMESPACE = "BENCH_CHAOS_NAMESPACE"
_RUNTIME_BYTES = 2 * 1024 * 1024
_LOAD = (
    *("--keepalive", "20", "--post", "5", "--newconn", "5", "--sse", "3"),
    *("--timeout", "30", "--think-max", "40"),
)
_MOST_PAUSE_S = 0.5
_SHOWN = 20


def main() -> int:
    args = _arguments()
    if _NAMESPACE not in os.environ:
        _into_namespace()
    directory = Path(tempfile.mkdtemp(prefix="segue-chaos-"))
    mark = uuid.uuid4().hex
    print(f"chaos: seed {args.seed}; the master's output is in {directory}/output", flush=True)
    rng = random.Random(args.seed)
    names = [name for name in EVENTS if not args.only or name in args.only]
    schedule = Schedule(names, args.events, rng, BESIDE, WITH_COMPANY)
    instance = Instance(directory, mark, random.Random(rng.random()))
    _mount(instance.runtime_dir)
    failures: list[str] = []
    tally: dict[str, Any] = {}
    messages: tuple[int, int, int] | None = None
    try:
        instance.blame.port = free_port()
        instance.start()
        instance.settle()
        load = _load(instance.blame.port, directory)
        try:
            instance.messages.publish()
            failures += _torment(instance, args, schedule, rng)
            messages = instance.messages.finish()
        finally:
            tally = _finish(load, directory)
        instance.stop()
    except ChaosError as error:
        failures.append(str(error))
    except KeyboardInterrupt:
        failures.append("it was interrupted")
    except Exception:
        failures.append(traceback.format_exc())
    instance.messages.close()
    left = marked(mark)
    if left:
        failures.append(f"processes left behind: {left}")
        kill_marked(mark)
    good = _tell(instance, args.seed, schedule, tally, messages, failures)
    subprocess.run(["umount", "-l", str(instance.runtime_dir)], check=False)
    if good:
        shutil.rmtree(directory, ignore_errors=True)
    return 0 if good else 1


def _torment(
    instance: Instance, args: argparse.Namespace, schedule: Schedule, rng: random.Random
) -> list[str]:
    """One event after the other; returns what went wrong. After that one goes on: the instance must recover."""
    begun = time.monotonic()
    failures: list[str] = []

    def happen(name: str, rng: random.Random) -> None:
        at = time.monotonic()
        time.sleep(rng.uniform(0, _MOST_PAUSE_S))
        try:
            told = EVENTS[name](instance, rng)
        except ChaosError as error:
            failures.append(f"{at - begun:.1f} s, {name}: {error}")
            told = f"FAILED: {error}"
        except Exception:
            failures.append(f"{at - begun:.1f} s, {name}: {traceback.format_exc()}")
            told = "FAILED"
        took_s = time.monotonic() - at
        schedule.counts[name] += 1
        print(f"{at - begun:7.1f} s {took_s:5.1f} s  {name:28} {told.splitlines()[0]}", flush=True)

    while not schedule.enough or time.monotonic() - begun < args.minutes * 60:
        name, beside = schedule.next()
        company = None
        if beside is not None:
            company = threading.Thread(target=happen, args=(beside, random.Random(rng.random())))
            company.start()
        happen(name, rng)
        if company is not None:
            company.join()
        try:
            instance.settle()
        except ChaosError as error:
            failures.append(f"{time.monotonic() - begun:.1f} s, after {name} and {beside}: {error}")
        if len(failures) >= args.most_failures:
            break
    return failures


def _tell(
    instance: Instance,
    seed: int,
    schedule: Schedule,
    tally: dict[str, Any],
    messages: tuple[int, int, int] | None,
    failures: list[str],
) -> bool:
    """The end of it, for a person; returns whether all is well."""
    counts = schedule.counts
    print(f"\nseed {seed}: {counts.total()} events")
    for name, count in sorted(counts.items()):
        print(f"  {count:5}  {name}")
    lost: list[Loss] = [(at, port, dialed, what) for at, port, dialed, what in tally.get("lost", [])]
    causes = collections.Counter((instance.blame.cause(each), each[3] == "idle") for each in lost)
    closes = tally.get("server_closes", {})
    untold = tally.get("failed_total", 0) + closes.get("idle_keepalive_closed", 0) - len(lost)
    told_to_close = closes.get("connection_close_header", 0)
    print(f"  {tally.get('ok_total', 0)} requests answered, in {tally.get('duration', 0)} s")
    print(f"  {causes[Cause.SPOILED, False]} answered {Cause.SPOILED}")
    print(f"  {causes[Cause.KILLED, False]} failed {Cause.KILLED}")
    print(f"  {causes[Cause.KILLED, True]} idle connections ended with one")
    print(f"  {causes[Cause.UNKNOWN, False] + untold} failed {Cause.UNKNOWN}")
    print(f"  {causes[Cause.UNKNOWN, True]} idle connections were closed {Cause.UNKNOWN}")
    print(f"  {told_to_close} answers with Connection: close")
    if messages is not None:
        sent, missed, doubled = messages
        print(f"  {sent} MQTT messages sent: {missed} lost, {doubled} came more than once, known by their id")
        if missed:
            failures = [*failures, f"{missed} MQTT messages were lost"]
    unexplained = [each for each in lost if instance.blame.cause(each) is Cause.UNKNOWN]
    for at, port, dialed, what in unexplained[:_SHOWN]:
        t0 = tally["t0"]
        print(
            f"    LOST at {at - t0:.3f} s, from port {port}, connected at {dialed - t0:.3f} s: {what} "
            f"(monotonic {at:.3f})"
        )
    for failure in failures:
        print(f"  FAILED {failure}")
    lacking = unexplained or untold or told_to_close or not schedule.enough or not tally.get("ok_total")
    good = not failures and not lacking
    print("  nothing else was lost" if good else "  A PROMISE WAS NOT KEPT", flush=True)
    return good


def _load(port: int, directory: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "bench" / "load.py"), "--port", str(port), *_LOAD]
    ready, told = os.pipe()
    with os.fdopen(ready, "rb") as waiting:
        process = subprocess.Popen(
            [*command, "--duration", "86400", "--out", str(directory / "load.json"), "--ready-fd", str(told)],
            pass_fds=(told,),
        )
        os.close(told)
        waiting.readline()
    return process


def _finish(load: subprocess.Popen[bytes], directory: Path) -> dict[str, Any]:
    load.send_signal(signal.SIGTERM)
    load.wait(60)
    result: dict[str, Any] = json.loads((directory / "load.json").read_text())
    return result


def _mount(path: Path) -> None:
    """A runtime directory that can be filled."""
    path.mkdir(mode=0o700)
    options = f"size={_RUNTIME_BYTES},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "segue-chaos", str(path)], check=True)


def _into_namespace() -> None:
    """Go on in a mount namespace of our own, so that nobody else sees what is mounted."""
    command = ["unshare", "--mount", "--propagation", "private"]
    if os.geteuid() != 0:
        command.insert(1, "--map-root-user")
    os.environ[_NAMESPACE] = "1"
    os.execvp(command[0], [*command, sys.executable, "-m", "bench.chaos", *sys.argv[1:]])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos",
        description="Everything that can go wrong, at random, under load.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="events:\n" + "\n".join(f"  {name:<28} {event.__doc__}" for name, event in EVENTS.items()),
    )
    parser.add_argument("--events", type=int, default=10, help="each kind so often at least (default: 10)")
    parser.add_argument("--minutes", type=float, default=0, help="and go on for so long")
    parser.add_argument("--seed", type=int, help="repeats the order and the choices (default: a new one)")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this kind; may be repeated")
    parser.add_argument("--most-failures", type=int, default=5, help="stop after so many (default: 5)")
    args = parser.parse_args()
    unknown = set(args.only or ()) - set(EVENTS)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; see --help")
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2**32)
    if _NAMESPACE not in os.environ:
        sys.argv += ["--seed", str(args.seed)]
    return args


if __name__ == "__main__":
    sys.exit(main())

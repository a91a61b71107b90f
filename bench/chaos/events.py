"""What is done to an instance. Each event ends when the instance is whole again, or raises `ChaosError`."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable

from bench.chaos.instance import HEARTBEAT_TIMEOUT_S, HOT, ChaosError, Instance

Event = Callable[[Instance, random.Random], str]
"""Does it; returns what is worth telling."""
_HOLD_S = 1.5
_STORM = 20


def reload(instance: Instance, _: random.Random) -> str:
    """New code serves."""
    instance.write()
    document = instance.demand("reload")
    return f"generation {document['generation']}"


def rollback(instance: Instance, _: random.Random) -> str:
    """New code serves, and the code before it is taken back."""
    before, text = instance.current()["id"], instance.text
    instance.write()
    instance.demand("reload")
    begun = time.monotonic()
    instance.demand("rollback")
    took_s = time.monotonic() - begun
    instance.put_back(text)
    current = instance.current()["id"]
    if current != before:
        raise ChaosError(f"generation {before} was to be taken back, and {current} serves")
    return f"generation {before} again, after {took_s * 1000:.0f} ms"


def _broken(instance: Instance, reason: str, **how: str) -> str:
    before = instance.current()["id"]
    instance.write(**how)
    document = instance.outcome(instance.ask("reload"))
    instance.mend()
    if document["outcome"] == "ok":
        raise ChaosError("code that is broken was taken")
    if reason not in document["reason"]:
        raise ChaosError(f"refused, but the reason doesn't say {reason!r}: {document['reason']}")
    current = instance.current()["id"]
    if current != before:
        raise ChaosError(f"generation {before} served before a reload that was refused, {current} after it")
    reason = document["reason"]
    return str(reason).splitlines()[0][:100]


def broken_import(instance: Instance, _: random.Random) -> str:
    """It can't be imported."""
    return _broken(instance, "no_such_module", prelude="import no_such_module")


def broken_lifespan(instance: Instance, rng: random.Random) -> str:
    """Its start-up raises, or says that it has failed."""
    fails = rng.choice(
        [
            'raise RuntimeError("no database")',
            'await send({"type": "lifespan.startup.failed", "message": "no database"}); return',
        ]
    )
    return _broken(
        instance, "no database", lifespan=f'if scope["type"] == "lifespan": await receive(); {fails}'
    )


def broken_hang(instance: Instance, rng: random.Random) -> str:
    """Its start-up does not end: it is given up."""
    where = rng.choice(["import", "lifespan"])
    if where == "import":
        return _broken(instance, "ready", prelude="import time; time.sleep(600)")
    return _broken(
        instance,
        "ready",
        lifespan='if scope["type"] == "lifespan": import asyncio; await asyncio.sleep(600)',
    )


def broken_warm_up(instance: Instance, _: random.Random) -> str:
    """The first request fails."""
    return _broken(instance, "warm", warm='raise RuntimeError("cold")')


def broken_exit(instance: Instance, _: random.Random) -> str:
    """It calls exit."""
    return _broken(instance, "7", prelude="import os; os._exit(7)")


def broken_signal(instance: Instance, rng: random.Random) -> str:
    """A signal ends it, as a fault in a library does."""
    name = rng.choice(["SIGSEGV", "SIGKILL", "SIGABRT"])
    return _broken(
        instance, name, prelude=f"import os, signal, resource\n"
        f"resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), signal.{name})"
    )  # fmt: skip


def kill_worker(instance: Instance, rng: random.Random) -> str:
    """A worker ends at once; it is replaced."""
    worker = rng.choice(instance.current()["workers"])
    count = instance.kill_worker(worker["pid"])
    instance.wait(
        "the killed worker is gone",
        lambda document: all(
            each["pid"] != worker["pid"] for g in document["generations"] for each in g["workers"]
        ),
    )
    return f"pid {worker['pid']}, with {count} connections"


def kill_in_reload(instance: Instance, rng: random.Random) -> str:
    """A worker, new or old, ends in the middle of a reload."""
    before = instance.text
    instance.write()
    operation = instance.ask("reload")
    time.sleep(rng.uniform(0.0, 1.5))
    worker = rng.choice(instance.workers())
    count = instance.kill_worker(worker["pid"])
    document = instance.outcome(operation)
    if document["outcome"] != "ok":
        instance.put_back(before)
    return f"pid {worker['pid']} of generation {worker['generation']}, with {count} connections: {document['outcome']}"


def pause_worker(instance: Instance, rng: random.Random) -> str:
    """A worker stands still for a moment; its clients wait."""
    pid = rng.choice(instance.current()["workers"])["pid"]
    pause_s = rng.uniform(0.1, HEARTBEAT_TIMEOUT_S / 4)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(pause_s)
    os.kill(pid, signal.SIGCONT)
    return f"pid {pid} for {pause_s:.1f} s"


def hang_worker(instance: Instance, rng: random.Random) -> str:
    """A worker stands still for good: it is replaced, and then killed."""
    pid = rng.choice(instance.current()["workers"])["pid"]
    count = instance.stop_worker(pid)
    begun = time.monotonic()
    instance.wait(
        "the stopped worker was killed",
        lambda document: all(each["pid"] != pid for g in document["generations"] for each in g["workers"]),
    )
    return f"pid {pid}, with {count} connections, gone after {time.monotonic() - begun:.1f} s"


def kill_master(instance: Instance, rng: random.Random) -> str:
    """The master ends at once, and is started again."""
    before = {worker["pid"] for worker in instance.current()["workers"]}
    instance.kill_master()
    time.sleep(rng.uniform(0.0, 0.5))
    instance.start()
    after = {worker["pid"] for worker in instance.current()["workers"]}
    if after != before:
        raise ChaosError(f"the workers were {sorted(before)}, and are {sorted(after)} with the new master")
    return f"epoch {instance.status()['master']['epoch']}"


def kill_master_in_reload(instance: Instance, rng: random.Random) -> str:
    """The master ends at any moment of a reload."""
    before = instance.text
    instance.write()
    operation = instance.ask("reload")
    delay_s = rng.uniform(0.0, 2.0)
    time.sleep(delay_s)
    instance.kill_master()
    instance.start()
    document = instance.outcome(operation)
    if document["outcome"] != "ok":
        instance.put_back(before)
    return f"after {delay_s:.2f} s: {document['outcome']} {document['reason']}"


def pause_master(instance: Instance, rng: random.Random) -> str:
    """The master stands still; nobody needs it meanwhile."""
    pause_s = rng.uniform(0.5, HEARTBEAT_TIMEOUT_S + 2)
    os.kill(instance.pid, signal.SIGSTOP)
    time.sleep(pause_s)
    os.kill(instance.pid, signal.SIGCONT)
    return f"for {pause_s:.1f} s"


def upgrade(instance: Instance, _: random.Random) -> str:
    """The master becomes new code in place."""
    before = instance.status()["master"]
    code, document = instance.call("POST", f"{HOT}/upgrade", timeout_s=90)
    if code != 202:
        raise ChaosError(f"the upgrade was refused: {document}")
    document = instance.outcome(int(document["id"]))
    after = instance.status()["master"]
    if document["outcome"] != "ok" or after["pid"] != before["pid"] or after["epoch"] <= before["epoch"]:
        raise ChaosError(f"the upgrade: {document['outcome']} {document['reason']}, {before}, {after}")
    return f"epoch {after['epoch']}"


def exhaust_workers(instance: Instance, rng: random.Random) -> str:
    """No worker can open anything; a reload comes on top."""
    before = instance.text
    pids = [worker["pid"] for worker in instance.current()["workers"]]
    with instance.exhausted(pids):
        time.sleep(rng.uniform(0.0, _HOLD_S))
        instance.write()
        operation = instance.ask("reload")
        time.sleep(_HOLD_S)
    document = instance.outcome(operation)
    if document["outcome"] != "ok":
        instance.put_back(before)
    return f"reload meanwhile: {document['outcome']} {document['reason']}"


def exhaust_master(instance: Instance, _: random.Random) -> str:
    """The master can open nothing: what it is asked for then it may refuse, or not hear."""
    before = instance.text
    instance.write()
    with instance.exhausted([instance.pid]):
        os.kill(instance.pid, signal.SIGHUP)
        time.sleep(_HOLD_S)
    document = instance.wait(
        "the reload has come to an end",
        lambda document: (
            bool(document["reloads"]) and all(r["outcome"] is not None for r in document["reloads"])
        ),
    )
    last = max(document["reloads"], key=lambda each: each["number"])
    if last["outcome"] != "ok":
        instance.put_back(before)
    return f"reload meanwhile: {last['outcome']} {last['reason'][:80]}"


def full_disk(instance: Instance, rng: random.Random) -> str:
    """Nothing more fits into the runtime directory: a reload, and a new master at times."""
    before = instance.text
    told = []
    with instance.full_disk():
        if rng.random() < 0.5:
            instance.kill_master()
            starts = instance.starts
            instance.start()
            told.append(f"the master came back at start {instance.starts - starts}")
        instance.write()
        document = instance.outcome(instance.ask("reload"))
        if document["outcome"] != "ok":
            instance.put_back(before)
        told.append(f"reload: {document['outcome']} {document['reason']}")
    return ", ".join(told)


def hup_storm(instance: Instance, rng: random.Random) -> str:
    """Many signals in a row: each is answered, few generations are made."""
    first = instance.current()["id"]
    instance.write()
    for _ in range(_STORM):
        with contextlib.suppress(ProcessLookupError):
            os.kill(instance.pid, signal.SIGHUP)
        time.sleep(rng.uniform(0, 0.05))
    document = instance.wait(
        "all reloads have an outcome",
        lambda document: (
            document["current"] > first and all(r["outcome"] is not None for r in document["reloads"])
        ),
    )
    refused = [r["reason"] for r in document["reloads"] if r["asked_by"] == "SIGHUP" and r["outcome"] != "ok"]
    last = max(document["reloads"], key=lambda each: each["number"])
    if last["outcome"] != "ok":
        raise ChaosError(f"the storm's last reload was refused: {refused}")
    return f"{_STORM} signals, {document['current'] - first} generations"


def restart_broker(instance: Instance, rng: random.Random) -> str:
    """The broker is restarted; at times a reload is asked for meanwhile, or a worker killed after it."""
    away_s = rng.uniform(0.0, 2.0)
    instance.messages.restart_broker(away_s)
    told = f"away for {away_s:.1f} s"
    if rng.random() < 0.5:
        told += f", then {kill_worker(instance, rng)}"
    return told


EVENTS: dict[str, Event] = {
    "reload": reload,
    "rollback": rollback,
    "broken: import": broken_import,
    "broken: lifespan": broken_lifespan,
    "broken: hang": broken_hang,
    "broken: warm-up": broken_warm_up,
    "broken: exit": broken_exit,
    "broken: signal": broken_signal,
    "kill a worker": kill_worker,
    "kill a worker in a reload": kill_in_reload,
    "pause a worker": pause_worker,
    "hang a worker": hang_worker,
    "kill the master": kill_master,
    "kill the master in a reload": kill_master_in_reload,
    "pause the master": pause_master,
    "upgrade the master": upgrade,
    "no descriptors: workers": exhaust_workers,
    "no descriptors: master": exhaust_master,
    "full disk": full_disk,
    "HUP storm": hup_storm,
    "restart the broker": restart_broker,
}

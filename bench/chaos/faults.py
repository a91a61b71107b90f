"""Faults: workers and masters that end or stand still, and a machine that has no more of something."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

from bench.chaos.instance import HEARTBEAT_TIMEOUT_S, HOT, ChaosError, Instance

_HOLD_S = 1.5
_STORM = 20
_MANNERS = ("", "", "?strategy=rolling", "?canary=1&canary-for=0.5")
"""How generations take over that are interrupted."""
_IN_USE = 5
"""Exit status of a master whose instance has one."""


def kill_worker(instance: Instance, rng: random.Random) -> str:
    """A worker ends at once, at times all of them do; they are replaced."""
    pids = [worker["pid"] for worker in instance.current()["workers"]]
    if rng.random() < 0.75:
        pids = [rng.choice(pids)]
    count = sum(map(instance.kill_worker, pids))
    instance.wait(
        "the killed workers are gone",
        lambda document: all(
            worker["pid"] not in pids for each in document["generations"] for worker in each["workers"]
        ),
    )
    return f"{len(pids)}, with {count} connections"


def kill_in_reload(instance: Instance, rng: random.Random) -> str:
    """A worker, new or old, ends in the middle of a reload."""
    before = instance.code.place
    instance.code.write()
    operation = instance.ask("reload" + rng.choice(_MANNERS))
    time.sleep(rng.uniform(0.0, 1.5))
    worker = rng.choice(instance.workers())
    count = instance.kill_worker(worker["pid"])
    document = instance.outcome(operation)
    if document["outcome"] != "ok":
        instance.code.put_back(before)
    return f"pid {worker['pid']} of generation {worker['generation']}, with {count} connections: {document['outcome']}"


def pause_worker(instance: Instance, rng: random.Random) -> str:
    """A worker stands still for a moment; its clients wait."""
    pid = rng.choice(instance.current()["workers"])["pid"]
    pause_s = rng.uniform(0.1, HEARTBEAT_TIMEOUT_S / 4)
    instance.pause(pid, pause_s)
    return f"pid {pid} for {pause_s:.1f} s"


def hang_worker(instance: Instance, rng: random.Random) -> str:
    """A worker stands still for good: it is replaced, and then killed. Without its code it would not be."""
    instance.renew()
    pid = rng.choice(instance.current()["workers"])["pid"]
    count = instance.stop_worker(pid)
    begun = time.monotonic()
    instance.wait(
        "the stopped worker was killed",
        lambda document: all(each["pid"] != pid for g in document["generations"] for each in g["workers"]),
    )
    return f"pid {pid}, with {count} connections, gone after {time.monotonic() - begun:.1f} s"


def kill_master(instance: Instance, rng: random.Random) -> str:
    """The master ends at once, at times a worker with it, and is started again."""
    before = {worker["pid"] for worker in instance.current()["workers"]}
    instance.kill_master()
    killed = rng.choice(sorted(before)) if rng.random() < 0.25 else None
    count = 0 if killed is None else instance.kill_worker(killed)
    time.sleep(rng.uniform(0.0, 0.5))
    instance.start()
    after = {worker["pid"] for worker in instance.current()["workers"]}
    if not before - {killed} <= after:
        raise ChaosError(f"the workers were {sorted(before)}, and are {sorted(after)} with the new master")
    told = "" if killed is None else f", and a worker with {count} connections"
    return f"epoch {instance.status()['master']['epoch']}{told}"


def kill_master_in_reload(instance: Instance, rng: random.Random) -> str:
    """The master ends at any moment of a reload."""
    before = instance.code.place
    instance.code.write()
    manner = rng.choice(_MANNERS)
    operation = instance.ask(f"reload{manner}")
    delay_s = rng.uniform(0.0, 2.0)
    time.sleep(delay_s)
    instance.kill_master()
    instance.start()
    document = instance.outcome(operation)
    if document["outcome"] != "ok":
        instance.code.put_back(before)
    return f"{manner} after {delay_s:.2f} s: {document['outcome']} {document['reason']}".strip()


def kill_master_with_staged(instance: Instance, rng: random.Random) -> str:
    """The master ends while a generation is staged, or on its way there: that one ends, what serves goes on."""
    current, before = instance.current(), instance.code.place
    instance.code.write()
    operation = instance.ask("stage")
    if rng.random() < 0.5:
        instance.outcome(operation)
    else:
        time.sleep(rng.uniform(0.0, 1.0))
    instance.kill_master()
    instance.start()
    document = instance.outcome(operation)
    instance.code.put_back(before)
    instance.wait(
        "nothing is staged any more",
        lambda status: not any(each["state"] in {"booting", "staged"} for each in status["generations"]),
    )
    after = instance.current()
    if after["id"] != current["id"]:
        raise ChaosError(f"generation {current['id']} was to serve on, and {after['id']} does")
    return f"{document['outcome']} {document['reason']}".strip()


def second_master(instance: Instance, _: random.Random) -> str:
    """The same command is started again beside the master: it says who has the instance, and ends."""
    pid = instance.pid
    status, said = instance.start_another()
    if status != _IN_USE or str(pid) not in said:
        raise ChaosError(f"a second master beside {pid} ended with {status}: {said}")
    return f"refused: {said.splitlines()[-1]}"[:100]


def pause_master(instance: Instance, rng: random.Random) -> str:
    """The master stands still; nobody needs it meanwhile."""
    pause_s = rng.uniform(0.5, HEARTBEAT_TIMEOUT_S + 2)
    instance.pause(instance.pid, pause_s)
    return f"for {pause_s:.1f} s"


def upgrade(instance: Instance, rng: random.Random) -> str:
    """The master becomes new code in place; at times it is first asked to with settings that it can't have."""
    before = instance.status()["master"]
    told = ""
    if rng.random() < 0.3:
        instance.code.write(settings='backlog = "long"')
        code, document = instance.call("POST", f"{HOT}/upgrade", timeout_s=90)
        instance.code.mend()
        if code != 409 or "backlog" not in document["detail"]:
            raise ChaosError(f"an upgrade to broken settings: {code} {document}")
        told = ", after one that was refused"
    code, document = instance.call("POST", f"{HOT}/upgrade", timeout_s=90)
    if code != 202:
        raise ChaosError(f"the upgrade was refused: {document}")
    document = instance.outcome(int(document["id"]))
    after = instance.status()["master"]
    if document["outcome"] != "ok" or after["pid"] != before["pid"] or after["epoch"] <= before["epoch"]:
        raise ChaosError(f"the upgrade: {document['outcome']} {document['reason']}, {before}, {after}")
    return f"epoch {after['epoch']}{told}"


def exhaust_workers(instance: Instance, rng: random.Random) -> str:
    """No worker can open anything; a reload comes on top."""
    before = instance.code.place
    pids = [worker["pid"] for worker in instance.current()["workers"]]
    with instance.exhausted(pids):
        time.sleep(rng.uniform(0.0, _HOLD_S))
        instance.code.write()
        operation = instance.ask("reload")
        time.sleep(_HOLD_S)
    document = instance.outcome(operation)
    if document["outcome"] != "ok":
        instance.code.put_back(before)
    return f"reload meanwhile: {document['outcome']} {document['reason']}"


def exhaust_master(instance: Instance, _: random.Random) -> str:
    """The master can open nothing: what it is asked for then it may refuse, or not hear."""
    before = instance.code.place
    instance.code.write()
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
        instance.code.put_back(before)
    return f"reload meanwhile: {last['outcome']} {last['reason'][:80]}"


def full_disk(instance: Instance, rng: random.Random) -> str:
    """Nothing more fits into the runtime directory: a reload, and a new master at times."""
    before = instance.code.place
    told = []
    with instance.full_disk():
        if rng.random() < 0.5:
            instance.kill_master()
            starts = instance.starts
            instance.start()
            told.append(f"the master came back at start {instance.starts - starts}")
        instance.code.write()
        document = instance.outcome(instance.ask("reload"))
        if document["outcome"] != "ok":
            instance.code.put_back(before)
        told.append(f"reload: {document['outcome']} {document['reason']}")
    return ", ".join(told)


def hup_storm(instance: Instance, rng: random.Random) -> str:
    """Many signals in a row: each is answered, few generations are made."""
    first = instance.current()["id"]
    instance.code.write()
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
    """The broker is restarted; at times in the middle of a reload, or a worker is killed after it."""
    away_s = rng.uniform(0.0, 2.0)
    what = rng.choice(["", "reload", "kill"])
    before = instance.code.place
    operation = None
    if what == "reload":
        instance.code.write()
        operation = instance.ask("reload")
        time.sleep(rng.uniform(0.0, 1.5))
    instance.messages.restart_broker(away_s)
    told = f"away for {away_s:.1f} s"
    if operation is not None:
        document = instance.outcome(operation)
        if document["outcome"] != "ok":
            instance.code.put_back(before)
        told += f" in a reload: {document['outcome']} {document['reason']}".rstrip()
    if what == "kill":
        told += f", then a worker was killed: {kill_worker(instance, rng)}"
    return told

"""Deploys of code that is good, in every way, and of code that starts and is bad: it is found out and taken back."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from typing import Any

from bench.chaos.code import LONG_PROBATION_S, spoiled
from bench.chaos.instance import WORKERS, ChaosError, Instance

_CANARY_S = 1.5
_LONG_S = 30.0
_RECYCLING = (
    "limit-max-requests = 300\nlimit-max-requests-jitter = 300",
    "max-worker-age = 1\nmax-worker-age-jitter = 1",
)
_FAILS_TO_START = 'if scope["type"] == "lifespan": await receive(); raise RuntimeError("no GPU")'


def reload(instance: Instance, _: random.Random) -> str:
    """New code serves."""
    instance.code.write()
    document = instance.demand("reload")
    return f"generation {document['generation']}"


def rollback(instance: Instance, _: random.Random) -> str:
    """New code serves, and the code before it is taken back."""
    before, place = instance.current()["id"], instance.code.place
    instance.code.write()
    instance.demand("reload")
    begun = time.monotonic()
    instance.demand("rollback")
    took_s = time.monotonic() - begun
    instance.code.put_back(place)
    _still(instance, before)
    return f"generation {before} again, after {took_s * 1000:.0f} ms"


def stage_and_promote(instance: Instance, _: random.Random) -> str:
    """New code is asked in private, and serves once it is promoted."""
    number = _stage(instance)
    instance.demand(f"promote?generation={number}")
    _still(instance, number)
    return f"generation {number}"


def stage_and_discard(instance: Instance, _: random.Random) -> str:
    """New code is asked in private, and is not taken."""
    before, place = instance.current()["id"], instance.code.place
    number = _stage(instance)
    instance.demand("discard")
    instance.code.put_back(place)
    _still(instance, before)
    return f"generation {number}"


def _stage(instance: Instance) -> int:
    before = instance.current()["id"]
    instance.code.write()
    document = instance.demand("stage")
    answered = {instance.probe(each["socket"]) for each in document["probes"]}
    staged = {
        worker["pid"] for worker in instance.workers() if worker["generation"] == document["generation"]
    }
    if answered != staged or len(staged) < WORKERS:
        raise ChaosError(f"of the staged workers {sorted(staged)}, {sorted(answered)} have answered")
    _still(instance, before)
    return int(document["generation"])


def canary(instance: Instance, rng: random.Random) -> str:
    """One worker of new code serves beside the old ones; then all do, at once if that is asked for, or it is given up."""
    end = rng.choice(["", "", "promote", "discard"])
    before, place = instance.current()["id"], instance.code.place
    instance.code.write()
    seconds = _LONG_S if end else _CANARY_S
    operation = instance.ask(f"reload?canary=1&canary-for={seconds}")
    if end and instance.in_phase(operation, "canary"):
        instance.demand(end)
    document = instance.outcome(operation)
    if (document["outcome"] == "ok") == (end == "discard"):
        raise ChaosError(f"a canary{end and ', then ' + end}: {document['outcome']} {document['reason']}")
    if not end and document["phases"]["canary"] < _CANARY_S:
        raise ChaosError(f"a canary of {_CANARY_S:g} s: {document['phases']}")
    if end == "discard":
        instance.code.put_back(place)
        _still(instance, before)
    # one that is killed beside may end it before it serves
    return f"{end or 'waited for'}, after {document['phases'].get('canary', 0.0):.1f} s"


def bad_canary(instance: Instance, rng: random.Random) -> str:
    """One worker of bad code serves beside the old ones: it answers with 500, or ends. The old ones have never left."""
    before = instance.current()["id"]
    crashes = rng.random() < 0.5
    instance.code.write(answers="pass" if crashes else spoiled(1.0))
    operation = instance.ask(f"reload?canary=1&canary-for={_LONG_S}")
    if crashes:
        if not instance.in_phase(operation, "canary"):
            raise ChaosError(f"there is no canary: {instance.outcome(operation)['reason']}")
        _kill_one(instance, "mixed")
    document = instance.outcome(operation)
    instance.code.mend()
    if document["outcome"] != "refused" or ("SIGKILL" if crashes else "5xx") not in document["reason"]:
        raise ChaosError(f"a bad canary: {document['outcome']} {document['reason']}")
    _still(instance, before)
    return str(document["reason"])[:100]


def bad_answers(instance: Instance, rng: random.Random) -> str:
    """New code answers with 500: the code before it is back by itself."""
    before = instance.current()["id"]
    share = rng.uniform(0.5, 1.0)
    instance.code.write(answers=spoiled(share), probation_s=LONG_PROBATION_S)
    _taken_back(instance, instance.ask("reload"), "5xx")
    _still(instance, before)
    return f"{share:.0%} of the answers"


def bad_crash(instance: Instance, rng: random.Random) -> str:
    """A worker of new code ends soon: the code before it is back by itself."""
    before = instance.current()["id"]
    instance.code.write(probation_s=LONG_PROBATION_S)
    document = instance.demand("reload")
    time.sleep(rng.uniform(0, 0.5))
    count = _kill_one(instance, "active")
    _taken_back(instance, document["id"], "SIGKILL")
    _still(instance, before)
    return f"with {count} connections"


def _kill_one(instance: Instance, state: str) -> int:
    """A worker that serves, of the generation that is in this state."""

    def serving(document: dict[str, Any]) -> list[int]:
        return [
            worker["pid"]
            for each in document["generations"]
            for worker in each["workers"]
            if each["state"] == state and worker["state"] == "active"
        ]

    document = instance.wait(f"a generation is {state}, and serves", lambda status: bool(serving(status)))
    return instance.kill_worker(serving(document)[0])


def _taken_back(instance: Instance, operation: int, why: str) -> None:
    document = instance.outcome(operation, "probation")
    instance.code.mend()
    if document["outcome"] != "rolled back" or why not in document["reason"]:
        raise ChaosError(f"not taken back because of {why}: {document['outcome']} {document['reason']}")


def rolling(instance: Instance, _: random.Random) -> str:
    """New code takes over one worker at a time."""
    instance.code.write()
    document = instance.demand("reload?strategy=rolling")
    return f"generation {document['generation']}"


def broken_rolling(instance: Instance, rng: random.Random) -> str:
    """The second worker of a rolling reload does not start, or the first one answers with 500: it is gone back."""
    before = instance.renew()
    if rng.random() < 0.5:
        flag = instance.directory / f"rolling-{time.monotonic_ns()}"
        code = f"import os\ntry: os.close(os.open({str(flag)!r}, os.O_CREAT | os.O_EXCL))\n"
        code += 'except FileExistsError: raise RuntimeError("only one starts")'
        instance.code.write(prelude=code, in_place=False)
        return _gone_back(instance, "reload?strategy=rolling", before, "only one starts")
    instance.code.write(answers=spoiled(1.0), in_place=False)
    return _gone_back(instance, "reload?strategy=rolling", before, "5xx")


def replace(instance: Instance, _: random.Random) -> str:
    """The old workers end before those of new code are started."""
    instance.code.write()
    document = instance.demand("reload?strategy=replace")
    return f"generation {document['generation']}"


def broken_replace(instance: Instance, _: random.Random) -> str:
    """The old workers have ended, and new code does not start: the old code is started again."""
    before = instance.renew()
    instance.code.write(lifespan=_FAILS_TO_START, in_place=False)
    return _gone_back(instance, "reload?strategy=replace", before, "no GPU")


def _gone_back(instance: Instance, what: str, before: int, why: str) -> str:
    document = instance.outcome(instance.ask(what))
    instance.code.mend()
    if document["outcome"] != "refused" or why not in document["reason"]:
        raise ChaosError(f"{what}: {document['outcome']} {document['reason']}")
    current = instance.settle_workers()
    if current["id"] != before or current["workers_missing"]:
        raise ChaosError(f"generation {before} was to be complete again: {current}")
    return str(document["reason"]).splitlines()[0][:100]


def scale(instance: Instance, rng: random.Random) -> str:
    """One worker more, and one less, by request or by signal."""
    instance.renew()
    by_signal = rng.random() < 0.5
    for wanted, number in ((WORKERS + 1, signal.SIGTTIN), (WORKERS, signal.SIGTTOU)):
        if by_signal:
            os.kill(instance.pid, number)
        else:
            instance.demand(f"scale?workers={wanted}")
        instance.wait(f"{wanted} workers serve", partial(_serve, count=wanted))
    return "by signal" if by_signal else "by request"


def _serve(document: dict[str, Any], count: int) -> bool:
    current = next(each for each in document["generations"] if each["current"])
    return [worker["state"] for worker in current["workers"]].count("active") == count


def recycle(instance: Instance, rng: random.Random) -> str:
    """Workers are replaced because of their age, or of the requests that they have answered."""
    settings = rng.choice(_RECYCLING)
    instance.code.write(settings=settings)
    number = instance.demand("reload")["generation"]
    first = {worker["pid"] for worker in instance.current()["workers"]}
    instance.wait(
        "one of its first workers is replaced",
        lambda document: any(
            each["id"] == number and not first <= {worker["pid"] for worker in each["workers"]}
            for each in document["generations"]
        ),
    )
    for _ in range(2):  # by the second nobody goes back to what replaces its workers for ever
        instance.renew()
    return settings.partition(" ")[0]


def swap(instance: Instance, rng: random.Random) -> str:
    """The connector to the broker is swapped inside the running workers; or not, since the new one can't connect."""
    if rng.random() < 0.5:
        document = instance.outcome(instance.ask("reload/hsp?port=1"))
        if document["outcome"] != "refused":
            raise ChaosError("a connector that can't connect was taken")
        return f"refused: {document['reason']}"[:100]
    instance.demand(f"reload/hsp?max_tasks={rng.randrange(50, 150)}")
    return "swapped"


def _still(instance: Instance, wanted: int) -> None:
    current = instance.current()["id"]
    if current != wanted:
        raise ChaosError(f"generation {wanted} was to serve, and {current} does")

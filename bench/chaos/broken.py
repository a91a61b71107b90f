"""Deploys that are refused: the reason is told, and what served goes on as if nothing had happened."""

from __future__ import annotations

import random

from bench.chaos.instance import ChaosError, Instance

_READY_TIMEOUT = "ready-timeout = 4"


def _refused(instance: Instance, reason: str, **how: str) -> str:
    instance.code.write(**how)  # type: ignore[arg-type]
    return _ask(instance, reason)


def _ask(instance: Instance, reason: str) -> str:
    before = instance.current()["id"]
    document = instance.outcome(instance.ask("reload"))
    instance.code.mend()
    if document["outcome"] == "ok":
        raise ChaosError("code that is broken was taken")
    if reason not in document["reason"]:
        raise ChaosError(f"refused, but the reason doesn't say {reason!r}: {document['reason']}")
    current = instance.current()["id"]
    if current != before:
        raise ChaosError(f"generation {before} served before a reload that was refused, {current} after it")
    return str(document["reason"]).splitlines()[0][:100]


def at_import(instance: Instance, _: random.Random) -> str:
    """It can't be imported."""
    return _refused(instance, "no_such_module", prelude="import no_such_module")


def in_lifespan(instance: Instance, rng: random.Random) -> str:
    """Its start-up raises, or says that it has failed."""
    fails = rng.choice(
        [
            'raise RuntimeError("no database")',
            'await send({"type": "lifespan.startup.failed", "message": "no database"}); return',
        ]
    )
    return _refused(
        instance, "no database", lifespan=f'if scope["type"] == "lifespan": await receive(); {fails}'
    )


def by_hanging(instance: Instance, rng: random.Random) -> str:
    """Its start-up does not end: it is given up."""
    if rng.random() < 0.5:
        return _refused(instance, "ready", prelude="import time; time.sleep(600)", settings=_READY_TIMEOUT)
    return _refused(
        instance,
        "ready",
        lifespan='if scope["type"] == "lifespan": import asyncio; await asyncio.sleep(600)',
        settings=_READY_TIMEOUT,
    )


def in_warm_up(instance: Instance, _: random.Random) -> str:
    """The first request fails."""
    return _refused(instance, "warm", warm='raise RuntimeError("cold")')


def by_exit(instance: Instance, _: random.Random) -> str:
    """It calls exit."""
    return _refused(instance, "7", prelude="import os; os._exit(7)")


def by_signal(instance: Instance, rng: random.Random) -> str:
    """A signal ends it, as a fault in a library does."""
    name = rng.choice(["SIGSEGV", "SIGKILL", "SIGABRT"])
    return _refused(
        instance, name, prelude=f"import os, signal, resource\n"
        f"resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), signal.{name})"
    )  # fmt: skip


def by_settings(instance: Instance, rng: random.Random) -> str:
    """The settings file has a mistake, or the release isn't there."""
    reason = rng.choice(["backlog", "segue.toml", "is not a directory"])
    if reason == "is not a directory":
        instance.code.break_link()
        return _ask(instance, reason)
    return _refused(instance, reason, settings='backlog = "long"' if reason == "backlog" else "backlog =")

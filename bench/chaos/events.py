"""All that is done to an instance, by name. Each event ends when the instance is whole again, or raises `ChaosError`."""

from __future__ import annotations

import random
from collections.abc import Callable

from bench.chaos import broken, deploys, faults
from bench.chaos.instance import Instance

Event = Callable[[Instance, random.Random], str]
"""Does it; returns what is worth telling."""

_DEPLOYS: dict[str, Event] = {
    "reload": deploys.reload,
    "rollback": deploys.rollback,
    "stage, promote": deploys.stage_and_promote,
    "stage, discard": deploys.stage_and_discard,
    "canary": deploys.canary,
    "rolling": deploys.rolling,
    "replace": deploys.replace,
    "bad: canary": deploys.bad_canary,
    "bad: 5xx": deploys.bad_answers,
    "bad: crash": deploys.bad_crash,
    "broken: import": broken.at_import,
    "broken: lifespan": broken.in_lifespan,
    "broken: hang": broken.by_hanging,
    "broken: warm-up": broken.in_warm_up,
    "broken: exit": broken.by_exit,
    "broken: signal": broken.by_signal,
    "broken: settings": broken.by_settings,
    "broken: rolling": deploys.broken_rolling,
    "broken: replace": deploys.broken_replace,
    "scale": deploys.scale,
    "recycle": deploys.recycle,
    "swap": deploys.swap,
}
_PAUSES: dict[str, Event] = {
    "pause a worker": faults.pause_worker,
    "pause the master": faults.pause_master,
    "a second master": faults.second_master,
}
_FAULTS: dict[str, Event] = {
    "kill a worker": faults.kill_worker,
    "kill a worker in a reload": faults.kill_in_reload,
    "hang a worker": faults.hang_worker,
    "kill the master": faults.kill_master,
    "kill the master in a reload": faults.kill_master_in_reload,
    "kill the master with staged": faults.kill_master_with_staged,
    "upgrade the master": faults.upgrade,
    "no descriptors: workers": faults.exhaust_workers,
    "no descriptors: master": faults.exhaust_master,
    "full disk": faults.full_disk,
    "HUP storm": faults.hup_storm,
    "restart the broker": faults.restart_broker,
}

EVENTS: dict[str, Event] = {**_DEPLOYS, **_PAUSES, **_FAULTS}
BESIDE = frozenset(_PAUSES)
"""What may happen beside something else …"""
WITH_COMPANY = frozenset(_DEPLOYS) - {"scale"}
"""… and beside what: there it changes how long that takes, and nothing else. (Not beside signals for job control: the kernel drops
those that wait for a process when SIGCONT comes.)"""

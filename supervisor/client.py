"""What commands say to a running instance, and to workers that have lost their master."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from segue.handoff.http import Response
from segue.handoff.http_client import CallError, call
from segue.handoff.messages import HOT
from segue.supervisor.instance import Instance, InstanceError
from segue.supervisor.operations import reached

READ_TIMEOUT_S = 10.0
_POLL_S = 20.0
_KILL_GRACE_S = 10.0
_RELEASE_S = 5.0
_UPGRADE_S = 10.0
"""How long a master may hang up on who follows an operation."""
_RETRY_S = 0.05
_LONGEST_STOP_S = 86400.0


def get(instance: Instance, target: str) -> Response:
    """One request that changes nothing. Raises `InstanceError` when nobody answers."""
    return _call(instance, "GET", target, READ_TIMEOUT_S)


def post(instance: Instance, target: str) -> dict[str, Any]:
    """Ask for a change and return the operation's document at once. Raises `InstanceError`."""
    joiner = "&" if "?" in target else "?"
    answer = _call(instance, "POST", f"{target}{joiner}wait=0", READ_TIMEOUT_S)
    document: dict[str, Any] = answer.json()
    if answer.status >= 400:
        return {"outcome": "refused", "reason": document.get("detail", ""), "output": "", "id": None}
    return document


def follow(
    instance: Instance,
    operation: dict[str, Any],
    on_phase: Callable[[str], None],
    *,
    until: str = "serving",
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Wait for an operation to come so far, telling each phase. Returns its last document; see `operations.reached`."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        done = reached(operation, until)
        left = _POLL_S if deadline is None else min(_POLL_S, deadline - time.monotonic())
        if done or left <= 0:
            return operation
        on_phase(operation["phase"])
        phase = quote(operation["phase"])
        target = f"{HOT}/operations/{operation['id']}?wait={left:.3f}&phase={phase}&until={until}"
        answer = _ask_again(instance, target, left + READ_TIMEOUT_S)
        if answer.status >= 400:
            raise InstanceError(
                f"what became of operation {operation['id']} is not known ({answer.json()['detail']}): its master "
                "may have died meanwhile; 'segue status' shows what serves"
            )
        operation = answer.json()


def _ask_again(instance: Instance, target: str, timeout_s: float) -> Response:
    """A master that upgrades itself in place hangs up, and is there again in a moment.

    Nothing says when: who had the socket is gone, and who will have it is not there yet. So it is tried again.
    """
    deadline = time.monotonic() + _UPGRADE_S
    while True:
        try:
            return _call(instance, "GET", target, timeout_s)
        except InstanceError:
            if instance.locked_by() is None or time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)


def orphans(instance: Instance) -> list[dict[str, Any]]:
    """The status of each worker that answers on its own socket, for when there is no master to ask."""
    found = []
    for path in instance.worker_sockets():
        try:
            answer = asyncio.run(call(path, "GET", f"{HOT}/status", timeout_s=READ_TIMEOUT_S))
        except CallError:
            continue
        found.append(answer.json() | {"control": path})
    return found


def stop_orphans(instance: Instance, budget_s: float) -> list[int]:
    """End the workers that have lost their master, gracefully within `budget_s`, then by force; returns their pids."""
    pidfds: dict[int, int] = {}
    owner = os.stat(instance.directory).st_uid
    for worker in orphans(instance):
        with contextlib.suppress(ProcessLookupError):
            pidfds[worker["pid"]] = _pidfd(worker["pid"], owner)
        with contextlib.suppress(CallError):
            asyncio.run(
                call(worker["control"], "POST", f"{HOT}/stop?timeout={budget_s:g}", timeout_s=READ_TIMEOUT_S)
            )
    deadline = time.monotonic() + budget_s + _KILL_GRACE_S
    for pidfd in pidfds.values():
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poll.poll(1000)
        os.close(pidfd)
    for key in instance.worker_keys():
        instance.forget_worker(*key)
    with contextlib.suppress(OSError):
        os.unlink(instance.journal)
    return list(pidfds)


def _pidfd(pid: int, user: int) -> int:
    """Of a process of `user`, that of the instance: what is told on its sockets must not end anybody else's.

    Raises `ProcessLookupError`.
    """
    import psutil

    pidfd = os.pidfd_open(pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        if psutil.Process(pid).uids().effective == user:
            return pidfd
    os.close(pidfd)
    raise ProcessLookupError


def stop(instance: Instance, at_once: bool, timeout_s: float | None) -> dict[str, Any]:
    """Stop it and return the operation's last document, once a master that has ended has given name and addresses back.

    One request that waits for the outcome, however long that takes: a second one might find nobody to answer it. Raises
    `InstanceError`, also when the master hangs.
    """
    get(instance, "/livez")
    owner = instance.locked_by()
    try:
        pidfd = os.pidfd_open(owner.pid) if owner else None
    except ProcessLookupError:
        pidfd = None
    wait_s = _LONGEST_STOP_S if timeout_s is None else timeout_s
    target = f"{HOT}/stop?now={int(at_once)}&wait={wait_s:g}"
    answer = _call(instance, "POST", target, wait_s + READ_TIMEOUT_S)
    document: dict[str, Any] = answer.json()
    if pidfd is not None:
        if answer.status in {HTTPStatus.OK, HTTPStatus.CONFLICT}:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(_RELEASE_S * 1000)
        os.close(pidfd)
    operation: dict[str, Any] = document.get("operation", document)
    return operation


def _call(instance: Instance, method: str, target: str, timeout_s: float) -> Response:
    try:
        return asyncio.run(
            call(instance.control, method, target, timeout_s=timeout_s, headers={"X-Segue-Asked-By": _who()})
        )
    except CallError as error:
        owner = instance.locked_by()
        if owner is None:
            raise InstanceError(instance.without_master) from error
        raise InstanceError(
            f"the master of instance {instance.name!r} (pid {owner.pid}) does not answer: {error}; its workers serve on. "
            f"If it hangs, 'kill -9 {owner.pid}': 'segue serve' then takes them over, 'segue stop' ends them"
        ) from error


def _who() -> str:
    user = os.environ.get("SUDO_USER") or _login(os.getuid())
    return f"{user} (pid {os.getpid()})"


def _login(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # a container often has users without a name
        return str(uid)

"""Looking for the workers of an earlier master: who lives, what each of them is, and the sockets that they hand over.

Every one is identified before it is believed: its pidfd is opened first, then pid, start time, user and instance are
compared, so that no process that has been given the same number since is taken for it. Its socket tells the pid, not
its message.

This runs before there is a loop, under one deadline for all. One that doesn't answer may hang, or be at its import;
it is taken over all the same, since its process is known, and finds its new lifeline when it looks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Mapping

import msgspec

from segue.handoff import adoption
from segue.handoff.adoption import Acceptance, Offer
from segue.handoff.listeners import Listener, known_listener
from segue.handoff.messages import WorkerMode
from segue.supervisor import memory, spawning
from segue.supervisor.instance import Instance
from segue.supervisor.log import Log
from segue.supervisor.spawning import Lifeline, Process, Relay

ANSWER_TIMEOUT_S = 2.0
"""How long all of them together have to say what they are."""
LAST_CHANCE_S = 10.0
"""And if nobody has given a socket by then, though somebody lives."""

Key = tuple[int, int]


class FoundWorker(msgspec.Struct):
    """A living worker of an earlier master."""

    key: Key
    process: Process
    told: Acceptance | None = None
    """None: it has not answered."""

    @property
    def booting(self) -> bool:
        """Whether it isn't ready yet."""
        return self.process.output is not None if self.told is None else self.told.mode is WorkerMode.BOOTING


class Found(msgspec.Struct):
    """What there is."""

    workers: list[FoundWorker] = []
    relay: Relay | None = None
    refused: list[Key] = []
    """Those that live and can't be taken over: their names stay theirs."""
    listeners: dict[str, Listener] = {}
    """By their names. Those of the newest generation, if several have one of a name."""


class _Link(msgspec.Struct):
    worker: FoundWorker
    sock: socket.socket


def find(
    instance: Instance,
    known: memory.Memory,
    lifeline: Lifeline,
    epoch: int,
    log: Log,
    *,
    has_sockets: bool,
) -> Found:
    """Look for them and tell them who their master is now; what dead ones have left behind is removed.

    `has_sockets`: listeners and relay are there already; nobody has to be waited for to get them.
    """
    identity = known.instance.identity if known.instance else ""
    found = Found()
    links: dict[int, _Link] = {}
    for key in sorted({*instance.worker_keys(), *_remembered(known)}):
        process, sock = _identify(instance, key, _remembered(known).get(key), log)
        if process is None:
            instance.forget_worker(*key)
            continue
        worker = FoundWorker(key, process)
        found.workers.append(worker)
        if sock is not None and _offer(sock, Offer(adoption.VERSION, identity, epoch), lifeline):
            links[sock.fileno()] = _Link(worker, sock)
        elif sock is not None:
            sock.close()
    _collect(found, links, ANSWER_TIMEOUT_S, log)
    if not has_sockets and found.relay is None and any(not link.worker.booting for link in links.values()):
        _collect(found, links, LAST_CHANCE_S, log)
        if found.relay is None:
            _give_up(found, instance, log)
    for link in links.values():
        link.sock.close()  # what it was sent stays readable: it finds its lifeline when it wakes
    return found


def _remembered(known: memory.Memory) -> dict[Key, memory.Process]:
    return {
        (number, worker): process
        for number, generation in known.generations.items()
        for worker, process in generation.processes.items()
    }


def _identify(
    instance: Instance, key: Key, remembered: memory.Process | None, log: Log
) -> tuple[Process | None, socket.socket | None]:
    """The living process of this worker, and a connection to it if it can be had."""
    try:
        sock: socket.socket | None = adoption.connect(instance.adoption_socket(*key))
    except OSError as error:
        if error.errno not in {errno.ECONNREFUSED, errno.ENOENT, errno.EAGAIN}:
            log("error", "not-adopted", generation=key[0], worker=key[1], reason=str(error))
        sock = None  # it has ended; or it isn't listening yet, or hears nobody: then the journal knows its process
    if sock is not None:
        pid, uid = adoption.peer(sock)
        if uid != os.geteuid():
            log("error", "not-adopted", generation=key[0], worker=key[1], reason=f"it is of user {uid}")
            sock.close()
            return None, None
    elif remembered is not None:
        pid = remembered.pid
    else:
        return None, None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        pidfd = -1
    start_time = adoption.start_time(pid) if pidfd >= 0 else None
    expected = remembered.start_time if remembered is not None and sock is None else start_time
    if start_time is None or start_time != expected:
        if pidfd >= 0:
            os.close(pidfd)
        if sock is not None:
            sock.close()
        return None, None
    if select.select([pidfd], [], [], 0)[0]:  # it has ended, and its parent hasn't asked how yet
        _reap(pid)
        os.close(pidfd)
        if sock is not None:
            sock.close()
        return None, None
    output = spawning.boot_output(pid)
    return Process(pid, pidfd, output, instance.worker_socket(*key), start_time), sock


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _offer(sock: socket.socket, offer: Offer, lifeline: Lifeline) -> bool:
    try:
        adoption.send(sock, offer, [lifeline.read])
    except OSError:
        return False
    return True


def _collect(found: Found, links: dict[int, _Link], timeout_s: float, log: Log) -> None:
    """Take the answers until all have come, or the time is up; what is there by then counts, however late it is looked at."""
    poll = select.poll()
    for fd in links:
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    while links:
        left = max(0.0, deadline - time.monotonic())
        # only for those at their import is not worth waiting: they can't answer
        if all(link.worker.booting for link in links.values()):
            left = min(left, 0.05)
        ready = poll.poll(left * 1000)
        if not ready and left <= 0.05:
            return
        for fd, _ in ready:
            poll.unregister(fd)
            link = links.pop(fd)
            _take(found, link, log)
            link.sock.close()


def _take(found: Found, link: _Link, log: Log) -> None:
    worker, reason = link.worker, ""
    fds: list[int] = []
    try:
        received = adoption.receive_acceptance(link.sock)
        if received is None:
            raise OSError("it sent nothing")
        told, fds = received
    except (OSError, adoption.MalformedError) as error:
        if isinstance(error, OSError):
            # it ended just now, or hung up on a connection of ours: its process tells which
            log("warning", "adoption-unanswered", pid=worker.process.pid, reason=str(error))
            return
        reason = str(error)
    else:
        process = worker.process
        same = (told.pid, told.start_time) == (process.pid, process.start_time)
        if told.error:
            reason = told.error
        elif not same or (told.generation, told.worker) != worker.key:
            reason = "it is not what it says it is"
        elif told.version != adoption.VERSION:
            reason = f"it speaks version {told.version}, and this is {adoption.VERSION}"
        elif len(fds) != 2 + len(told.listeners):
            reason = f"{len(fds)} descriptors for {len(told.listeners)} listeners and the relay"
        elif not all(adoption.is_socket(fd, socket.SOCK_SEQPACKET) for fd in fds[:2]):
            reason = "what it sent as the relay is none"
        elif not all(adoption.is_socket(fd, socket.SOCK_STREAM) for fd in fds[2:]):
            reason = "what it sent as its listeners are none"
    if reason:
        log("error", "not-adopted", generation=worker.key[0], worker=worker.key[1], reason=reason)
        adoption.close_all(fds)
        found.workers.remove(worker)
        found.refused.append(worker.key)
        worker.process.close()
        return
    worker.told = told
    if told.mode is not WorkerMode.BOOTING and worker.process.output is not None:
        os.close(worker.process.output)
        worker.process.output = None
    _keep_sockets(found, told, fds)


def _keep_sockets(found: Found, told: Acceptance, fds: list[int]) -> None:
    read, write, *listeners = fds
    if found.relay is None:
        found.relay = Relay(socket.socket(fileno=read), socket.socket(fileno=write))
    else:
        adoption.close_all([read, write])
    for info, fd in zip(told.listeners, listeners, strict=True):
        if info.name in found.listeners:
            os.close(fd)
            continue
        listener = known_listener(info.bind, 0, fd)
        if listener is not None:
            found.listeners[info.name] = Listener(info.bind, info, listener.sock)


def _give_up(found: Found, instance: Instance, log: Log) -> None:
    """Those that are left hold the addresses and answer nobody: without them the instance can serve again."""
    for worker in list(found.workers):
        if worker.told is not None or worker.booting:
            continue
        reason = "it hangs, and nobody else has the sockets of this instance"
        log("error", "worker-killed", generation=worker.key[0], worker=worker.key[1], reason=reason)
        worker.process.kill()
        select.select([worker.process.pidfd], [], [], 1.0)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(worker.process.pid, os.WNOHANG)
        worker.process.close()
        instance.forget_worker(*worker.key)
        found.workers.remove(worker)


def by_generation(workers: list[FoundWorker]) -> Mapping[int, list[FoundWorker]]:
    """In the order of their numbers."""
    grouped: dict[int, list[FoundWorker]] = {}
    for worker in sorted(workers, key=lambda each: each.key):
        grouped.setdefault(worker.key[0], []).append(worker)
    return grouped

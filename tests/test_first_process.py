"""As the first process of a container (`docker run image segue serve …`): what no other process has to do."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from scenario import DEADLINE_S, ROOT, Client, Segue, environment

UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def _can_unshare() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    return False


pytestmark = pytest.mark.skipif(
    not _can_unshare(), reason="unshare --pid isn't permitted here: it needs root"
)

ORPHANS = """
import subprocess

async def orphans(count):
    # a shell that ends before what it has started
    for _ in range(count):
        subprocess.run(["sh", "-c", "sleep 0.1 &"], check=True)
"""


@contextlib.contextmanager
def contained(*arguments: str, cwd: Path) -> Iterator[tuple[Segue, int]]:
    """A master that is process 1 of a pid namespace, and its pid as it is out here."""
    master = Segue(*arguments, cwd=cwd, prefix=UNSHARE)
    try:
        yield master, first(master.process)
    finally:
        master.process.kill()  # and with it all in the namespace
        master.process.wait()
        master.close()


def first(process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + DEADLINE_S
    while not (children := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)
    return children[0].pid


def wait_until(condition) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


def children(pid: int) -> list[str]:
    """Names of the children of a process, those that nobody has reaped included."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(child.name())
    return found


@pytest.fixture
def directory(application) -> Path:
    """An application that leaves orphans behind when it is asked to."""
    written: Path = application("1", prelude=ORPHANS)
    code = (written / "shop.py").read_text()
    code = code.replace(
        '    elif scope["path"] == "/exit":',
        '    elif scope["path"] == "/orphans":\n        await orphans(int(query["n"]))\n    elif scope["path"] == "/exit":',
    )
    (written / "shop.py").write_text(code)
    return written


def test_orphans_are_reaped(directory) -> None:
    with contained("shop:app", cwd=directory) as (master, pid):
        master.wait_ready()
        with Client(master.port) as client:
            assert client.get("/orphans?n=20")[0] == 200
        wait_until(lambda: "sleep" not in children(pid))
        os.kill(pid, signal.SIGUSR2)  # a new master in place goes on with it
        master.output.wait_for(r" adopted ")
        with Client(master.port) as client:
            assert client.get("/orphans?n=20")[0] == 200
        wait_until(lambda: "sleep" not in children(pid))
        os.kill(pid, signal.SIGTERM)
        assert master.wait_exit() == 0


def test_how_a_worker_ended_is_known_whoever_else_ends(directory) -> None:
    with contained("shop:app", "--workers", "2", cwd=directory) as (master, pid):
        master.wait_ready()
        for number in range(1, 6):
            with Client(master.port) as client:
                assert client.get("/orphans?n=10")[0] == 200
            with Client(master.port) as client, contextlib.suppress(OSError, Exception):
                client.get("/exit")
            master.output.wait_for(r"worker-died .*exited with 7", count=number)
            master.output.wait_for(r"worker-active", count=number)
        assert "nobody can tell how" not in master.output.text
        os.kill(pid, signal.SIGTERM)
        assert master.wait_exit() == 0
        assert len(re.findall("exited with 0", master.output.text)) >= 2


def watches(child: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # of a worker that was leaving
        return "segue.supervisor.watcher" in child.cmdline()
    return False


def test_what_the_master_starts_beside_workers_is_left_to_those_who_ask_how_it_ended(directory) -> None:
    """What tries new code out, and what watches in development mode."""
    with contained("shop:app", "--reload", "--strategy", "replace", cwd=directory) as (master, pid):
        master.wait_ready()
        for number in range(1, 4):
            master.output.wait_for(r" watching directories=", count=number)
            [watcher] = [child for child in psutil.Process(pid).children() if watches(child)]
            watcher.kill()
            master.output.wait_for(r"not-watching .*\(-9\)", count=number)
            os.kill(pid, signal.SIGHUP)
            master.output.wait_for(rf" promoted generation={number + 1} ")
        assert "Traceback" not in master.output.text
        assert "refused" not in master.output.text
        os.kill(pid, signal.SIGTERM)
        assert master.wait_exit() == 0


def test_a_signal_that_comes_before_the_master_listens_is_not_lost(application, tmp_path) -> None:
    """The kernel drops what the first process has no handler for: it is held back instead."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    directory = application("1", prelude=f"open({str(gate)!r}).read()\n")
    with contained("shop:app", cwd=directory) as (master, pid):
        # SIGQUIT tells that it is the master: unshare holds SIGTERM back itself, until just before it becomes it
        blocked = 1 << (signal.SIGTERM - 1) | 1 << (signal.SIGQUIT - 1)

        def is_held_back() -> bool:
            found = re.search(r"SigBlk:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
            return found is not None and int(found[1], 16) & blocked == blocked

        wait_until(is_held_back)
        os.kill(pid, signal.SIGTERM)
        assert master.wait_exit() == 1  # nothing has served
        assert "SIGTERM" in master.output.text


def test_signals_do_what_they_do_elsewhere(directory) -> None:
    with contained("shop:app", cwd=directory) as (master, pid):
        master.wait_ready()
        os.kill(pid, signal.SIGUSR1)
        master.output.wait_for("SIGUSR1")
        os.kill(pid, signal.SIGHUP)
        master.output.wait_for("reload outcome=ok generation=2")
        os.kill(pid, signal.SIGINT)
        assert master.wait_exit() == 0


def test_other_commands_end_by_a_signal_too(application, tmp_path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    directory = application("1", prelude=f"open({str(gate)!r}).read()\n")
    process = subprocess.Popen(
        [*UNSHARE, sys.executable, "-m", "segue.supervisor.cli", "check", "shop:app"],
        cwd=directory,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    try:
        pid = first(process)
        with gate.open("w"):  # it is at its import
            os.kill(pid, signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()


REAPING = """
import os
from segue.supervisor import reaping

def ended(status):
    pid = os.fork()
    if pid == 0:
        os._exit(status)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid

early, own, late = ended(0), ended(7), ended(0)
reaping.leave(own)
reaping.reap()
assert os.waitid(os.P_PID, own, os.WEXITED | os.WNOWAIT | os.WNOHANG).si_status == 7
assert os.waitstatus_to_exitcode(os.waitpid(own, 0)[1]) == 7
reaping.done(own)
reaping.reap()
for pid in (early, late):
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        continue
    raise AssertionError("a stranger is left")
"""


def test_a_worker_that_has_ended_is_left_to_whoever_asks_how() -> None:
    """Whatever has ended before it and after it; in each order of the two messages of the kernel."""
    done = subprocess.run(
        [sys.executable, "-c", REAPING],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

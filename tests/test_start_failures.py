"""Whatever keeps a generation from starting: the first start says why and ends with 3, a reload is refused with it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import APP
from scenario import DEADLINE_S, HOT, Client, Load, NotStarted, Segue, made_directory, supervised

from bench.users import unprivileged

STARTUP = """
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            {body}
"""
WARM_UP = """
    async def app(scope, receive, send):
        if scope["type"] == "http":
            {body}
"""
FACTORY = """
    import os
    def make({arguments}):
        {body}
"""


@dataclass(frozen=True)
class Fault:
    """An application that can't start, and what is said of it."""

    code: str
    reasons: tuple[str, ...]
    flags: tuple[str, ...] = ()


def prelude(text: str) -> str:
    return text + "\nasync def app(scope, receive, send): ...\n"


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_{limit}, ({most}, {most}))
"""

FAULTS: dict[str, Fault] = {
    "memory": Fault(
        prelude(LIMITED.format(limit="AS", most=2**30) + "data = bytearray(2**31)\n"),
        ("import of shop failed", "MemoryError"),
    ),
    "memory-to-the-last-byte": Fault(
        prelude(
            LIMITED.format(limit="AS", most="1024 * 1024 * 1024") + "held, size = [], 2**24\n"
            "try:\n"
            "    while True:\n"
            "        held.append(bytearray(size))\n"
            "except MemoryError:\n"
            "    while size > 64:\n"
            "        try:\n"
            "            held.append(bytearray(size))\n"
            "        except MemoryError:\n"
            "            size //= 2\n"
            "    raise\n"
        ),
        ("worker 1 ",),
    ),
    "out-of-memory-killer": Fault(
        prelude("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"),
        ("was ended by SIGKILL", "out of memory?"),
    ),
    "descriptors": Fault(
        prelude(LIMITED.format(limit="NOFILE", most=64) + "held = [open('/dev/null') for _ in range(100)]\n"),
        ("import of shop failed", "Too many open files"),
    ),
    "descriptors-left-for-no-connection": Fault(
        prelude(
            LIMITED.format(limit="NOFILE", most=128) + "held = []\n"
            "try:\n"
            "    while True:\n"
            "        held.append(open('/dev/null'))\n"
            "except OSError:\n"
            "    del held[-16:]\n"
        ),
        ("no descriptors are left for connections", "of 128"),
    ),
    "segfault-in-startup": Fault(
        STARTUP.format(body="import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        ("was ended by SIGSEGV",),
    ),
    "exit-in-startup": Fault(STARTUP.format(body="import os; os._exit(7)"), ("exited with 7",)),
    "sys-exit-in-startup": Fault(STARTUP.format(body="import sys; sys.exit('no licence')"), ("no licence",)),
    "exit-in-warm-up": Fault(
        WARM_UP.format(body="import os; os._exit(8)"), ("exited with 8",), ("--warm-up", "/warm")
    ),
    "sys-exit-in-warm-up": Fault(
        WARM_UP.format(body="import sys; sys.exit('no licence')"), ("no licence",), ("--warm-up", "/warm")
    ),
    "hang-in-warm-up": Fault(
        WARM_UP.format(body="import asyncio; await asyncio.sleep(3600)"),
        ("not ready within 15 s (ready-timeout)", "warm-up"),
        ("--warm-up", "/warm", "--ready-timeout", "15"),
    ),
    "exception-in-warm-up": Fault(
        WARM_UP.format(body="raise RuntimeError('the model is not there')"),
        ("warm-up of /warm failed", "RuntimeError: the model is not there"),
        ("--warm-up", "/warm"),
    ),
    "no-answer-in-warm-up": Fault(
        WARM_UP.format(body="return"), ("warm-up of /warm failed", "no answer"), ("--warm-up", "/warm")
    ),
    "factory-raises": Fault(
        FACTORY.format(arguments="", body="raise ValueError('no such model')"),
        ("ValueError: no such model",),
        ("--factory",),
    ),
    "factory-wants-arguments": Fault(
        FACTORY.format(arguments="settings", body="return None"), ("TypeError", "settings"), ("--factory",)
    ),
    "factory-exits": Fault(
        FACTORY.format(arguments="", body="os._exit(9)"), ("exited with 9",), ("--factory",)
    ),
}


def target(fault: Fault) -> str:
    return "shop:make" if "--factory" in fault.flags else "shop:app"


GOOD = "def make(): return app\n"


@contextlib.contextmanager
def not_started(*arguments: str, status: int = 3, **options: Any) -> Iterator[list[str]]:
    """A first start that fails; what it printed is in the list afterwards."""
    said: list[str] = []
    master = Segue(*arguments, **options)
    try:
        with pytest.raises(NotStarted) as caught:
            master.wait_ready()
        said.append(caught.value.output)
        assert caught.value.status == status, caught.value.output
        assert "Traceback" not in caught.value.output.replace("    | Traceback", "")
        yield said
    finally:
        master.close()


def refused(master: Segue, *reasons: str) -> str:
    """A reload that is refused for these reasons, with everything as it was."""
    pids, generations = master.worker_pids(), {each["id"] for each in master.status()["generations"]}
    done = master.command("reload")
    assert done.returncode == 1, done.stderr
    for reason in reasons:
        assert reason in done.stderr
    assert master.worker_pids() == pids
    master.wait_status(lambda s: {each["id"] for each in s["generations"]} <= generations)
    last = master.status()["reloads"][-1]
    assert last["outcome"] == "refused"
    assert last["reason"]
    return done.stderr


@pytest.mark.parametrize("kind", FAULTS)
def test_a_first_start_that_fails_says_why_and_ends_with_3(application, kind) -> None:
    fault = FAULTS[kind]
    with not_started(target(fault), *fault.flags, cwd=application(code=fault.code)) as said:
        for reason in fault.reasons:
            assert reason in said[0]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_reload_that_fails_says_why_and_the_old_generation_serves(application, kind) -> None:
    fault = FAULTS[kind]
    with (
        supervised(target(fault), *fault.flags, cwd=application("1", prelude=GOOD)) as master,
        Client(master.port) as client,
    ):
        application(code=fault.code)
        refused(master, *fault.reasons)
        assert client.get("/")[2] == b"1"
        application("2", prelude=GOOD)
        master.reload("--wait", "drained")
        assert client.get("/")[2] == b"2"
        master.stop()


# Descriptors


@pytest.mark.parametrize("most", [8, 10, 12, 14, 17, 20, 22])
def test_a_master_without_descriptors_says_so_and_ends_with_3(application, most) -> None:
    with not_started("shop:app", cwd=application("1"), nofile=most) as said:
        assert "Too many open files" in said[0] or "no descriptors are left" in said[0]


def limit(pid: int, what: str, most: int | str, **who: Any) -> None:
    subprocess.run(["prlimit", f"--pid={pid}", f"--{what}={most}"], check=True, **who)


def test_a_reload_without_descriptors_is_refused_and_the_next_one_succeeds(application) -> None:
    flags = ("--probation", "0")  # nothing is kept for a way back
    with supervised("shop:app", *flags, cwd=application("1")) as master, Client(master.port) as client:
        pid = master.process.pid
        used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        for most in range(used + 2, used + 6):
            limit(pid, "nofile", f"{most}:")
            done = master.call("POST", f"{HOT}/reload")
            assert done[0] == 409, done
            assert "Too many open files" in done[1]["detail"]
            assert client.get("/")[2] == b"1"
        limit(pid, "nofile", "1024:")
        before = len(os.listdir(f"/proc/{pid}/fd"))
        application("2")
        master.reload("--wait", "drained")
        assert client.get("/")[2] == b"2"
        wait_descriptors(pid, before)
        master.stop()


def wait_descriptors(pid: int, most: int) -> None:
    """Until a master has no more than so many: of who has just asked it something it learns a moment later that they left."""
    deadline = time.monotonic() + DEADLINE_S
    while len(os.listdir(f"/proc/{pid}/fd")) > most:
        assert time.monotonic() < deadline, os.listdir(f"/proc/{pid}/fd")
        select.select([], [], [], 0.05)


# Processes


@pytest.fixture(scope="module")
def nobody() -> Iterator[tuple[Any, Path]]:
    """An interpreter that somebody unprivileged can run, and a directory of theirs."""
    with tempfile.TemporaryDirectory(prefix="segue-u-") as temporary:
        directory = Path(temporary)
        directory.chmod(0o755)
        yield unprivileged(directory), directory


def test_a_refused_fork_is_the_reason_of_a_refused_reload(nobody) -> None:
    interpreter, directory = nobody
    (directory / "shop.py").write_text(APP.format(version="1"))
    most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    hard = "unlimited" if most == resource.RLIM_INFINITY else str(most)
    with (
        supervised("shop:app", cwd=directory, interpreter=interpreter) as master,
        Client(master.port) as client,
    ):
        limit(master.process.pid, "nproc", "1:", **interpreter.popen_options())
        said = refused(master)
        # the worker's process, or before it the thread that reads the settings, if none is idle
        assert "Resource temporarily unavailable" in said or "the system refuses a thread" in said
        assert client.get("/")[2] == b"1"
        limit(master.process.pid, "nproc", f"{hard}:", **interpreter.popen_options())
        (directory / "shop.py").write_text(APP.format(version="2"))
        master.reload("--wait", "drained")
        assert client.get("/")[2] == b"2"
        master.stop()


def test_a_refused_fork_or_thread_is_the_reason_of_a_failed_start(nobody) -> None:
    interpreter, directory = nobody
    (directory / "shop.py").write_text(APP.format(version="1"))
    with not_started(
        "shop:app", cwd=directory, interpreter=interpreter, prefix=("prlimit", "--nproc=1")
    ) as said:
        assert "can't start new thread" in said[0] or "Resource temporarily unavailable" in said[0]


# Files that are not there


def test_what_is_not_ours_in_the_runtime_directory_is_named_with_what_to_do(nobody) -> None:
    """A group of which its user is no member; a lock that another user has left."""
    interpreter, directory = nobody
    (directory / "shop.py").write_text(APP.format(version="1"))
    options: dict[str, Any] = {"status": 5, "cwd": directory, "interpreter": interpreter}
    with not_started("shop:app", "--control-group", "60001", **options) as said:
        assert "let it be a member of that group" in said[0]
    place = runtime_with("default")
    os.rmdir(os.path.join(place, "default", "default"))
    os.chown(os.path.join(place, "default"), interpreter.popen_options().get("user", -1), -1)
    Path(place, "default", "master.lock").touch(mode=0o000)
    with not_started("shop:app", runtime_dir=place, **options) as said:
        assert re.search(r"cannot open \S+/master.lock: Permission denied; remove it", said[0])


def test_a_missing_interpreter_is_named(application) -> None:
    with not_started(
        "shop:app", "--python", "/nonexistent/bin/python", cwd=application("1"), status=2
    ) as said:
        assert "/nonexistent/bin/python" in said[0]


def environment_of(directory: Path) -> Path:
    """A virtual environment with what the running one has; its interpreter."""
    (directory / "bin").mkdir(parents=True)
    python = directory / "bin" / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    (directory / "lib").symlink_to(Path(sys.prefix) / "lib")
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", directory / "pyvenv.cfg")
    return python


def test_an_interpreter_that_is_gone_refuses_the_reload(application, tmp_path) -> None:
    python = environment_of(tmp_path / "venv")
    with (
        supervised("shop:app", "--python", str(python), cwd=application("1")) as master,
        Client(master.port) as client,
    ):
        python.rename(tmp_path / "gone")
        refused(master, str(python))
        assert client.get("/")[2] == b"1"
        python.write_text("#!/nonexistent/interpreter\n")
        python.chmod(0o755)
        refused(master, str(python))
        (tmp_path / "gone").rename(python)
        application("2")
        master.reload("--wait", "drained")
        assert client.get("/")[2] == b"2"
        master.stop()


def test_signals_to_all_leave_a_worker_alone_that_has_only_been_started(application, tmp_path: Path) -> None:
    """What `systemctl kill -s HUP` sends to everybody may come before the worker's first line has run."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        "for signal in HUP INT USR1 USR2 TTIN TTOU; do kill -$signal $$; done\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    with supervised("shop:app", "--python", str(python), cwd=application("1")) as master:
        application("2")
        master.reload("--wait", "drained")  # before, who connects may still meet the old one
        with Client(master.port) as client:
            assert client.get("/")[2] == b"2"
        master.stop()


@pytest.mark.parametrize("which", ["working-directory", "app-dir"])
def test_a_directory_that_is_gone_refuses_the_reload(application, tmp_path, which) -> None:
    code = application("1")
    (tmp_path / "work").mkdir()
    cwd = code if which == "working-directory" else tmp_path / "work"
    flags = () if which == "working-directory" else ("--app-dir", str(code))
    with supervised("shop:app", *flags, cwd=cwd) as master, Client(master.port) as client:
        code.rename(tmp_path / "gone")
        refused(master, str(code))
        assert client.get("/")[2] == b"1"
        (tmp_path / "gone").rename(code)
        application("2")
        master.reload("--wait", "drained")
        assert client.get("/")[2] == b"2"
        master.stop()


# What is in the way in the runtime directory


def runtime_with(name: str) -> str:
    """A runtime directory in whose instance a directory has the name of something else."""
    directory = made_directory("segue-t-")
    os.makedirs(os.path.join(directory, "default", name), mode=0o700)
    os.chmod(os.path.join(directory, "default"), 0o700)
    return directory


@pytest.mark.parametrize("name", ["control.sock", "notify.sock", "g1w1.sock", "g1w1.adopt"])
def test_what_is_in_the_place_of_a_socket_is_named(application, name) -> None:
    with not_started("shop:app", cwd=application("1"), runtime_dir=runtime_with(name)) as output:
        assert re.search(rf"(Is a directory|Address already in use).*/{re.escape(name)}", output[0]), output[
            0
        ]


@pytest.mark.parametrize("name", ["g1w1.http", "journal"])
def test_what_cannot_be_removed_holds_no_end_up(application, name) -> None:
    with supervised("shop:app", cwd=application("1"), runtime_dir=runtime_with(name)) as master:
        os.kill(master.worker_pids()[0], signal.SIGKILL)
        master.output.wait_for("worker-active generation=1 worker=2")
        master.stop()
        assert "Traceback" not in master.output.text


def test_a_runtime_directory_that_was_removed_is_named_and_no_worker_is_left_to_itself(application) -> None:
    with supervised("shop:app", "--workers", "2", "--no-access-log", cwd=application("1")) as master:
        pids = master.worker_pids()
        with Load(master.port, "--keepalive", "5", "--newconn", "2", "--sse", "0") as load:
            shutil.rmtree(master.directory)
            master.signal(signal.SIGUSR2)  # the new master would find neither its workers nor who they are
            master.output.wait_for(
                "upgrade outcome=refused.*journal: No such file or directory.*directory anew"
            )
            master.signal(signal.SIGHUP)
            master.output.wait_for(
                f"reload outcome=refused.*mkdir -pm 0700 {master.directory}.*kill -USR2 {master.process.pid}"
            )
            load.nothing_lost()
        os.mkdir(master.directory, 0o700)
        master.signal(signal.SIGUSR2)
        master.output.wait_for("upgrade outcome=ok")
        # one that shows in time that it lives leaves in peace, though it can't be told to: it is in its generation for a while
        master.wait_status(
            lambda status: status["ready"] and len(now := serving(master)) == 2 and not set(pids) & now
        )
        master.reload()
        master.stop()


def serving(master: Segue) -> set[int]:
    """Pids of the workers that take connections."""
    return {worker["pid"] for worker in master.current()["workers"] if worker["state"] == "active"}


def test_a_socket_that_was_removed_refuses_the_reload_at_once_and_is_made_anew(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        os.unlink(os.path.join(master.directory, "notify.sock"))
        refused(master, "notify.sock", f"kill -USR2 {master.process.pid}")
        master.signal(signal.SIGUSR2)
        master.output.wait_for("upgrade outcome=ok")
        master.reload()
        master.stop()


# A full disk


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system with few blocks and few inodes."""
    directory = Path(tempfile.mkdtemp(prefix="segue-d-"))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=40,mode=0700", "none", str(directory)], check=True
    )
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
        directory.rmdir()


def fill_blocks(disk: Path) -> Callable[[], None]:
    path = disk / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    return path.unlink


def fill_inodes(disk: Path) -> Callable[[], None]:
    files = []
    with contextlib.suppress(OSError):
        for number in range(1000):
            path = disk / str(number)
            path.symlink_to("x")
            files.append(path)

    def free() -> None:
        for path in files:
            path.unlink()

    return free


def test_a_full_disk_keeps_no_reload_from_succeeding(application, small_disk) -> None:
    with (
        supervised("shop:app", cwd=application("1"), runtime_dir=str(small_disk)) as master,
        Client(master.port) as client,
    ):
        fill_blocks(small_disk)
        application("2")
        master.reload("--wait", "drained")
        assert client.get("/")[2] == b"2"
        master.stop()


def test_an_upgrade_that_cannot_write_down_what_it_must_know_is_refused(application, small_disk) -> None:
    with supervised("shop:app", cwd=application("1"), runtime_dir=str(small_disk)) as master:
        free = fill_blocks(small_disk)
        master.reload()  # more than the journal has room for
        done = master.command("upgrade")
        assert done.returncode == 1, done.stdout
        assert "the journal can't be written" in done.stderr
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        free()
        done = master.command("upgrade")
        assert done.returncode == 0, done.stderr
        master.stop()


def test_a_disk_without_inodes_refuses_the_reload_and_loses_nothing(application, small_disk) -> None:
    with (
        supervised("shop:app", cwd=application("1"), runtime_dir=str(small_disk)) as master,
        Client(master.port) as client,
    ):
        free = fill_inodes(small_disk)
        application("2")
        refused(master, "No space left on device")
        assert client.get("/")[2] == b"1"
        free()
        master.reload("--wait", "drained")
        assert client.get("/")[2] == b"2"
        master.stop()


def test_a_first_start_on_a_full_disk_says_so_or_serves(application, small_disk) -> None:
    free = fill_inodes(small_disk)
    with not_started("shop:app", cwd=application("1"), runtime_dir=str(small_disk), status=5) as said:
        assert "No space left on device" in said[0]
    free()
    fill_blocks(small_disk)
    with supervised("shop:app", cwd=application("1"), runtime_dir=str(small_disk)) as master:
        with Client(master.port) as client:
            assert client.get("/")[2] == b"1"
        again = master.command("status", "--json")
        assert json.loads(again.stdout)["current"] == 1
        master.stop()


# Output


def test_standard_streams_that_are_closed_harm_nothing(application) -> None:
    noisy = "print('hello from the import', flush=True)\n"
    with (
        supervised(
            "shop:app",
            cwd=application("1", prelude=noisy),
            prefix=("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"),
        ) as master,
        Client(master.port) as client,
    ):
        assert client.get("/")[2] == b"1"
        application("2", prelude=noisy)
        master.reload("--wait", "drained")
        assert client.get("/")[2] == b"2"
        application("3", prelude="raise RuntimeError('no broker')\n")
        refused(master, "no broker")
        master.stop()


def test_an_output_that_nobody_reads_stops_neither_service_nor_reloads(application) -> None:
    """Standard output and error are one pipe that is full from the beginning."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(write, b"x" * 4096):
            pass
    os.set_blocking(write, True)
    try:
        with (
            supervised(
                "shop:app",
                "--no-access-log",
                "--timeout-graceful-shutdown",
                "1",
                cwd=application("1"),
                stdout=write,
                prefix=("sh", "-c", 'exec "$@" 2>&1', "sh"),
            ) as master,
            Client(master.port) as client,
        ):
            for version in ("2", "3"):
                application(version)
                master.reload()
                master.wait_status(lambda _, v=version: client.get("/")[2] == v.encode())
            application("4", prelude="raise RuntimeError('no broker')\n")
            assert "no broker" in master.command("reload").stderr
            assert client.get("/")[2] == b"3"
            master.stop(expected=None)  # what a worker logs at its end is waited for: that is cut
    finally:
        os.close(read)
        os.close(write)

"""Coming from another server: what one has there, does and expects works here, too."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from scenario import ROOT, Client, environment, segue, supervised

from bench.users import Interpreter, unprivileged
from segue.supervisor.instance import Instance

FORKS = """
    import os, signal

    async def app(scope, receive, send):
        if scope["type"] != "http":
            raise NotImplementedError
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(write, b"x")
            signal.pause()
            os._exit(0)
        os.read(read, 1)
        os.close(read)
        os.close(write)
        os.kill(pid, signal.SIGTERM)
        body = b"%d %d" % (os.getpid(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})
"""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_ending_a_child_that_the_application_forked_ends_the_child_and_not_the_worker(
    application, loop
) -> None:
    directory = application(code=FORKS)
    with (
        supervised("shop:app", "--loop", loop, cwd=directory) as master,
        Client(master.port) as client,
    ):
        pid = str(master.worker_pids()[0])
        for _ in range(3):
            assert client.get("/")[2].decode().split() == [pid, "-15"]
        assert master.worker_pids() == [int(pid)]
        master.stop()


def test_files_named_like_our_dependencies_do_no_harm_in_the_application_directory(application) -> None:
    directory = application("1")
    for name in ("h11", "click", "msgspec", "psutil", "uvicorn", "starlette", "worker", "supervisor"):
        (directory / f"{name}.py").write_text("raise RuntimeError('shadowed')\n")
    (directory / "segue").mkdir()
    (directory / "segue" / "__init__.py").write_text("raise RuntimeError('shadowed')\n")
    with supervised("shop:app", cwd=directory, env={"PYTHONSAFEPATH": "1"}) as master:
        with Client(master.port) as client:
            assert client.get("/")[2] == b"1"
            master.reload()
            assert client.get("/")[2] == b"1"
        master.stop()


def test_after_segue_stop_the_name_and_the_address_are_free_and_a_late_signal_changes_nothing(
    application,
) -> None:
    directory = application("1")
    for _ in range(3):
        with supervised("shop:app", cwd=directory) as master:
            assert master.command("stop").returncode == 0
            assert Instance(master.directory).locked_by() is None
            for number in (signal.SIGQUIT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                master.signal(number)  # as an impatient second Ctrl-C does
            assert master.wait_exit() == 0, master.output.text
            assert "Traceback" not in master.output.text


def test_python_dash_m_segue_is_segue(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "segue", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "segue" in done.stdout


def test_config_running_marks_what_differs_here_but_not_the_flags_that_a_reload_keeps(application) -> None:
    directory = application("1")
    (directory / "segue.toml").write_text('app = "shop:app"\nidle-grace = 3\n')
    with supervised("--workers", "2", cwd=directory) as master:
        (directory / "segue.toml").write_text('app = "shop:app"\nidle-grace = 4\n')
        done = segue("config", "--running", "--runtime-dir", master.runtime_dir, cwd=directory)
        assert done.returncode == 0, done.stderr
        lines = {line.split()[0]: line for line in done.stdout.splitlines()}
        assert lines["idle-grace"].endswith("(here: 4)")
        assert lines["workers"].endswith("flag --workers")
        master.stop()


def test_scaling_beyond_the_limit_is_a_usage_error_as_zero_is(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        for count in ("0", "1025"):
            assert master.command("scale", count).returncode == 2
        assert master.command("scale", "1").stdout == "1 worker serves\n"
        master.stop()


def test_a_shared_directory_is_refused_without_the_advice_to_change_it(application) -> None:
    done = segue("serve", "shop:app", "--runtime-dir", "/tmp", cwd=application("1"))
    assert done.returncode == 5
    assert "--runtime-dir /tmp/NAME" in done.stderr
    assert "chmod" not in done.stderr


@contextlib.contextmanager
def _readable_directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="segue-m-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _command(user: Interpreter, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [user.executable, "-m", "segue.supervisor.cli", *arguments],
        capture_output=True,
        text=True,
        cwd="/",
        env=environment() | user.environ | env,
        timeout=60,
        check=False,
        **user.popen_options(),
    )


def test_the_instance_of_another_user_does_not_hide_ones_own_and_is_named_when_it_is_the_only_one(
    application,
) -> None:
    if os.geteuid() != 0:
        return  # becoming another user takes root
    directory = application("1")
    with _readable_directory() as place:
        user = unprivileged(place)
        theirs = place / "theirs"
        theirs.mkdir(mode=0o755)
        own = place / "own"
        (own / "segue").mkdir(parents=True)
        os.chown(own / "segue", user.popen_options()["user"], -1)
        env = {"RUNTIME_DIRECTORY": str(theirs), "XDG_RUNTIME_DIR": str(own)}
        with supervised("shop:app", cwd=directory, runtime_dir=str(theirs)) as other:
            done = _command(user, "status", **env)
            assert (done.returncode, "be root" in done.stderr) == (5, True), done.stderr
            done = _command(user, "serve", "--runtime-dir", str(theirs), "--port", "0")
            assert (done.returncode, "Traceback" in done.stderr) == (5, False), done.stderr
            os.chmod(other.directory, 0o755)  # the lock and the sockets are private besides
            done = _command(user, "stop", **env)
            assert (done.returncode, "be root" in done.stderr) == (5, True), done.stderr
            with supervised(cwd="/", runtime_dir=str(own / "segue"), interpreter=user) as mine:
                done = _command(user, "reload", **env)
                assert done.returncode == 0, done.stderr
                assert mine.current()["id"] == 2
                mine.stop()
            assert other.current()["id"] == 1
            other.stop()

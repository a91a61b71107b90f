"""The master takes on new code and settings in place: same pid, same sockets, and nobody notices."""

from __future__ import annotations

import os
import select
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from scenario import DEADLINE_S, HOT, Client, Load, supervised

from segue.supervisor import upgrade

SERVE = ("shop:app", "--workers", "2", "--no-access-log")


@pytest.mark.timeout(600)  # one takes a second, and on a busy machine fifteen
def test_twenty_upgrades_under_load_lose_nothing_and_leak_nothing(application) -> None:
    with supervised(*SERVE, cwd=application("1")) as master:
        pid, pids, port = master.process.pid, master.worker_pids(), master.port
        process = psutil.Process(pid)
        counts = []
        with Load(port, "--keepalive", "10", "--newconn", "2", "--sse", "1") as load:
            for number in range(20):
                if number % 2:
                    done = master.command("upgrade")
                    assert done.returncode == 0, done.stderr + master.output.text
                else:
                    master.signal(signal.SIGUSR2)
                master.output.wait_for(r" adopted ", count=number + 1)
                status = master.status()
                assert status["master"]["pid"] == pid
                assert status["master"]["epoch"] == number + 2
                assert status["ready"]
                counts.append(process.num_fds())
            assert master.worker_pids() == pids
            assert min(counts[-5:]) <= min(counts[:5]) + 1, counts
            assert sorted(child.pid for child in process.children()) == sorted(pids)
            load.nothing_lost()
        master.reload("--wait", "drained")
        assert not set(master.worker_pids()) & set(pids)
        master.stop()


def test_who_asks_the_master_meanwhile_is_answered(application) -> None:
    """By the old one or by the new one, on a connection of its own each time."""
    answers: list[set[int]] = [set(), set()]
    over = threading.Event()

    def ask(epochs: set[int]) -> None:
        while not over.is_set():
            epochs.add(master.status()["master"]["epoch"])

    with supervised(*SERVE, cwd=application("1")) as master, ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask, epochs) for epochs in answers]
        try:
            for _ in range(5):
                done = master.command("upgrade")
                assert done.returncode == 0, done.stderr
        finally:
            over.set()
        for each in asking:
            each.result()
        assert answers[0] | answers[1] == {1, 2, 3, 4, 5, 6}
        master.stop()


def test_settings_that_do_not_load_refuse_the_upgrade(application) -> None:
    directory = application("1")
    (directory / "segue.toml").write_text("workers = 2\n")
    with supervised("shop:app", cwd=directory) as master:
        (directory / "segue.toml").write_text("workers = 'many'\n")
        done = master.command("upgrade")
        assert done.returncode == 1
        assert "workers" in done.stderr
        code, document = master.call("POST", f"{HOT}/upgrade")
        assert code == 409
        assert "workers" in document["detail"]
        assert master.status()["master"]["epoch"] == 1
        (directory / "segue.toml").write_text("workers = 3\n")
        assert master.command("upgrade").returncode == 0
        assert master.status()["master"]["epoch"] == 2
        compared = master.wait_status(lambda s: s["master"]["differs_on_disk"])
        assert "workers" in compared["master"]["differs_on_disk"][0]
        assert len(master.worker_pids()) == 2
        master.reload()
        assert len(master.worker_pids()) == 3
        master.stop()


def test_code_that_does_not_import_refuses_the_upgrade(application, tmp_path: Path) -> None:
    """The old master goes on, and says why."""
    broken = tmp_path / "broken"
    broken.mkdir()
    link = tmp_path / "path"
    link.symlink_to(tmp_path)
    directory = application("1")
    with supervised("shop:app", cwd=directory, env={"PYTHONPATH": _path(link)}) as master:
        (tmp_path / "msgspec.py").write_text("raise RuntimeError('half a deploy')\n")
        done = master.command("upgrade")
        assert done.returncode == 1
        assert "half a deploy" in done.stderr
        (tmp_path / "msgspec.py").unlink()
        assert master.command("upgrade").returncode == 0
        master.stop()


def _path(first: Path) -> str:
    from scenario import ROOT

    return f"{first}:{ROOT}:{ROOT / 'tests'}"


def test_an_upgrade_during_a_reload_is_refused(application, tmp_path: Path) -> None:
    directory = application("1")
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with supervised("shop:app", cwd=directory) as master:
        application("2", prelude=f"open({str(gate)!r}).read()\n")
        master.signal(signal.SIGHUP)
        with gate.open("w"):
            done = master.command("upgrade")
            assert done.returncode == 1
            assert "a reload is running" in done.stderr
        master.output.wait_for("promoted generation=2")
        assert master.command("upgrade").returncode == 0
        master.stop()


def test_one_upgrade_is_tried_at_a_time_and_a_stop_ends_the_trial(application, tmp_path: Path) -> None:
    """What hangs while it is tried is gone with who tries it."""
    directory = application("1")
    settings = directory / "segue.toml"
    settings.write_text("workers = 1\n")
    with supervised("shop:app", cwd=directory) as master:
        settings.unlink()
        os.mkfifo(settings)
        _, first = master.call("POST", f"{HOT}/upgrade?wait=1")
        [trial] = set(psutil.Process(master.process.pid).children()) - set(
            map(psutil.Process, master.worker_pids())
        )
        second = master.command("upgrade")
        assert second.returncode == 1
        assert "another upgrade is under way" in second.stderr
        assert first["phase"] == "try"
        assert trial.is_running()
        pidfd = os.pidfd_open(trial.pid)
        master.stop()
        assert select.select([pidfd], [], [], DEADLINE_S)[0]  # who reaps it then, and when, is not ours
        os.close(pidfd)


def test_signals_to_all_leave_the_trial_of_an_upgrade_alone(application, tmp_path: Path) -> None:
    """`systemctl kill -s USR2` asks for the upgrade, and comes to the process that tries it too."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        f"if {upgrade.TRIAL!r} in os.environ:\n"
        "    os.kill(os.getpid(), signal.SIGUSR2)\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
    )
    with supervised("shop:app", cwd=application("1"), env={"PYTHONPATH": _path(tmp_path)}) as master:
        done = master.command("upgrade")
        assert done.returncode == 0, done.stderr
        assert master.status()["master"]["epoch"] == 2
        master.stop()


def test_an_exit_after_an_upgrade_is_known_by_its_status(application) -> None:
    """The workers are still its children."""
    with supervised(*SERVE, cwd=application("1")) as master:
        assert master.command("upgrade").returncode == 0
        os.kill(master.worker_pids()[0], signal.SIGKILL)
        master.output.wait_for(r"worker-died generation=1 worker=1 .*SIGKILL")
        master.output.wait_for(r"worker-active generation=1 worker=3")
        master.stop()


def test_a_worker_that_boots_during_an_upgrade_gets_ready(application, tmp_path: Path) -> None:
    flag, gate = tmp_path / "flag", tmp_path / "gate"
    os.mkfifo(gate)
    prelude = f"import os\nif os.path.exists({str(flag)!r}): open({str(gate)!r}).read()\n"
    with supervised(*SERVE, cwd=application("1", prelude=prelude)) as master:
        flag.touch()
        os.kill(master.worker_pids()[0], signal.SIGKILL)
        with gate.open("w"):
            assert master.command("upgrade").returncode == 0, master.output.text
        master.output.wait_for(r"worker-active generation=1 worker=3")
        with Client(master.port) as client:
            assert client.get("/")[0] == 200
        master.stop()


def test_a_signal_that_comes_during_an_upgrade_is_not_lost(application) -> None:
    with supervised(*SERVE, cwd=application("1")) as master:
        master.signal(signal.SIGUSR2)
        master.output.wait_for(r" upgrade epoch=1")
        master.signal(signal.SIGTERM)
        assert master.wait_exit() == 0

"""When things go wrong: a crash never spreads, and what can be kept is kept."""

from __future__ import annotations

import fcntl
import os
import signal
import time

import psutil
import pytest
from scenario import HOT, Client, Load, NotStarted, Segue, made_directory, segue, supervised, unix_call

from segue.supervisor.instance import LOCK, Instance, LockedError


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended may stay a zombie until the init of this machine looks after it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_worker_that_dies_is_replaced(application) -> None:
    with supervised("shop:app", "--workers", "2", cwd=application("1")) as master:
        victim, sibling = master.worker_pids()
        os.kill(victim, signal.SIGKILL)
        master.output.wait_for(r"worker-active generation=1 worker=3")
        pids = master.worker_pids()
        assert sibling in pids
        assert victim not in pids
        assert len(pids) == 2
        assert "SIGKILL" in master.output.text
        master.stop()


def test_a_crashed_worker_fails_only_what_it_was_serving(application) -> None:
    with supervised("shop:app", "--workers", "2", "--no-access-log", cwd=application("1")) as master:
        with Load(master.port, "--keepalive", "10", "--newconn", "2", "--sse", "0") as load:
            victim, _ = master.worker_pids()
            os.kill(victim, signal.SIGKILL)
            master.output.wait_for(r"worker-active generation=1 worker=3")
            tally = load.finish()
        assert not {"refused", "timeout", "non_2xx"} & set(tally["failures"])
        assert tally["failed_total"] <= 12
        master.stop()


def test_crashes_are_respawned_with_a_back_off(application, tmp_path) -> None:
    """A worker that can no longer start is tried again, ever later; the sibling serves on."""
    flag = tmp_path / "broken"
    prelude = f"import os\nif os.path.exists({str(flag)!r}): raise RuntimeError('broker down')\n"
    with supervised("shop:app", "--workers", "2", cwd=application("1", prelude=prelude)) as master:
        flag.touch()
        os.kill(master.worker_pids()[0], signal.SIGKILL)
        master.output.wait_for("worker-start-failed", count=3)
        with Client(master.port) as client:
            assert client.get("/")[0] == 200
        flag.unlink()
        master.wait_status(lambda s: sum(w["state"] == "active" for w in s["generations"][0]["workers"]) == 2)
        master.stop()


def test_a_respawn_does_not_take_part_when_the_code_has_changed(application) -> None:
    with supervised("shop:app", "--workers", "2", cwd=application("1")) as master:
        application("2")
        os.kill(master.worker_pids()[0], signal.SIGKILL)
        master.output.wait_for("generation-short")
        generation = master.current()
        assert generation["workers_missing"] == 1
        assert [w["state"] for w in generation["workers"]] == ["active"]
        with Client(master.port) as client:
            assert client.get("/")[2] == b"1"
        master.reload()
        assert len(master.worker_pids()) == 2
        master.stop()


def test_the_only_worker_dying_on_changed_code_leads_to_a_gated_reload(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        application("2")
        os.kill(master.worker_pids()[0], signal.SIGKILL)
        master.output.wait_for(r"promoted generation=2")
        with Client(master.port) as client:
            assert client.get("/")[2] == b"2"
        master.stop()


def test_a_connection_waits_in_the_kernel_while_the_only_worker_is_respawned(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        port = master.port
        os.kill(master.worker_pids()[0], signal.SIGKILL)
        with Client(port) as client:
            assert client.get("/")[0] == 200
        master.stop()


def test_a_hung_worker_is_replaced_first_and_killed_after(application) -> None:
    with supervised("shop:app", "--heartbeat-timeout", "6", cwd=application("1")) as master:
        hung = master.worker_pids()[0]
        os.kill(hung, signal.SIGSTOP)
        master.output.wait_for(r"worker-replaced generation=1 worker=1")
        master.output.wait_for(r"worker-active generation=1 worker=2")
        master.output.wait_for(r"worker-killed generation=1 worker=1")
        master.wait_status(lambda s: [w["id"] for w in s["generations"][0]["workers"]] == [2])
        assert not alive(hung)
        text = master.output.text
        assert text.index("worker-active generation=1 worker=2") < text.index("worker-killed")
        master.stop()


def test_a_master_that_was_stopped_blames_nobody(application) -> None:
    with supervised("shop:app", "--workers", "2", "--heartbeat-timeout", "6", cwd=application("1")) as master:
        pids = master.worker_pids()
        master.signal(signal.SIGSTOP)
        with Client(master_port := _port(pids[0])) as client:
            end = time.monotonic() + 9
            while time.monotonic() < end:
                assert client.get("/work?ms=50")[0] == 200
        assert master_port
        master.signal(signal.SIGCONT)
        with Client(master_port) as client:
            end = time.monotonic() + 8
            while time.monotonic() < end:
                assert client.get("/work?ms=50")[0] == 200
        assert master.worker_pids() == pids
        assert "worker-replaced" not in master.output.text
        master.stop()


def _port(pid: int) -> int:
    return next(c.laddr.port for c in psutil.Process(pid).net_connections("tcp") if c.status == "LISTEN")


def test_workers_that_lose_their_master_go_on_serving_until_segue_stop(application) -> None:
    with supervised("shop:app", "--workers", "2", "--no-access-log", cwd=application("1")) as master:
        port, pids = master.port, master.worker_pids()
        sockets = [w["control"] for w in master.current()["workers"]]
        with Load(port, "--keepalive", "10", "--newconn", "2", "--sse", "1") as load:
            master.process.kill()
            master.process.wait()
            for pid, path in zip(pids, sockets, strict=True):
                code, document = unix_call(path, "GET", f"{HOT}/status")
                assert (code, document["pid"], document["mode"]) == (200, pid, "active")
            with Client(port) as client:
                for _ in range(50):
                    assert client.get("/work?ms=20")[0] == 200
            load.nothing_lost()
        status = master.command("status")
        assert status.returncode == 0
        assert all(str(pid) in status.stdout for pid in pids)
        for command in ("reload", "rollback", "logs"):
            asked = master.command(command)
            assert asked.returncode == 5
            assert "the same 'segue serve' again takes them over, 'segue stop' ends them" in asked.stderr
        stopped = master.command("stop")
        assert stopped.returncode == 0, stopped.stderr
        assert not any(alive(pid) for pid in pids)


def test_a_master_that_hangs_is_named_and_what_to_do_about_it(application) -> None:
    """Nobody waits for it for ever; and what is said to be done ends everything."""
    with supervised("shop:app", cwd=application("1")) as master:
        pid, workers = master.process.pid, master.worker_pids()
        master.signal(signal.SIGSTOP)
        for command in ("status", "stop"):
            done = master.command(command)
            assert done.returncode == 5
            assert f"(pid {pid}) does not answer" in done.stderr
            assert f"kill -9 {pid}" in done.stderr
        os.kill(pid, signal.SIGKILL)
        master.process.wait()
        assert master.command("stop").returncode == 0
        assert not any(alive(worker) for worker in workers)


def test_logging_goes_on_while_the_master_is_stopped_or_gone(application) -> None:
    """Workers that print 1 MB/s depend on no byte that the master would have to read."""
    prelude = """
        import sys, threading, time
        def chatter():
            while True:
                sys.stdout.write(("x" * 1023 + "\\n") * 100)
                time.sleep(0.1)
        threading.Thread(target=chatter, daemon=True).start()
    """
    with supervised("shop:app", cwd=application("1", prelude=prelude)) as master:
        port = master.port
        for number in (signal.SIGSTOP, signal.SIGKILL):
            master.signal(number)
            with Client(port) as client:
                end = time.monotonic() + 3
                while time.monotonic() < end:
                    assert client.get("/work?ms=20")[0] == 200
        master.process.wait()
        assert master.command("stop").returncode == 0


def test_who_looks_whether_there_is_a_master_keeps_none_from_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instance = Instance(os.path.join(made_directory("segue-l-"), "default"))
    instance.create()
    looking = os.open(os.path.join(instance.directory, LOCK), os.O_RDONLY | os.O_CREAT, 0o600)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))  # it has seen enough
    instance.lock([])
    os.close(looking)
    owner = Instance(instance.directory).locked_by()
    assert owner is not None
    assert owner.pid == os.getpid()
    with pytest.raises(LockedError):
        Instance(instance.directory).lock([])
    instance.release()


def test_of_two_that_start_while_somebody_looks_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = Instance(os.path.join(made_directory("segue-l-"), "default"))
    instance.create()
    path = os.path.join(instance.directory, LOCK)
    looking, other = (os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for _ in range(2))
    fcntl.flock(looking, fcntl.LOCK_SH)
    begun = []

    def meanwhile(_: float) -> None:
        fcntl.flock(looking, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        begun.append("the other")

    monkeypatch.setattr(time, "sleep", meanwhile)
    with pytest.raises(LockedError):
        instance.lock([])
    assert begun
    os.close(looking)
    os.close(other)
    instance.lock([])
    instance.release()


def test_two_masters_on_one_name_are_refused_by_name_and_pid(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        again = segue("serve", "shop:app", "--runtime-dir", master.runtime_dir, cwd=str(application("1")))
        assert again.returncode == 5
        assert str(master.process.pid) in again.stderr
        with Client(master.port) as client:
            assert client.get("/")[0] == 200
        master.stop()


def test_an_address_in_use_is_a_clear_first_failure(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        other = Segue(
            "shop:app", "--bind", f"127.0.0.1:{master.port}", cwd=application("1"), name="other", bind=False
        )
        try:
            with pytest.raises(NotStarted) as caught:
                other.wait_ready()
            assert caught.value.status == 3
            assert str(master.port) in caught.value.output
        finally:
            other.close()
        master.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_graceful_stop_finishes_what_was_begun(application, tmp_path, number) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        client = Client(master.port)
        client.connection.request("GET", f"/work?until={tmp_path}/enough")
        master.wait_status(lambda s: s["generations"][0]["workers"][0]["in_flight"] == 1)
        master.signal(number)
        master.wait_notified("STOPPING", "1")
        (tmp_path / "enough").touch()
        assert client.connection.getresponse().read() == b"1"
        client.close()
        assert master.wait_exit() == 0


def test_a_stop_that_cuts_something_off_does_not_exit_with_0(application) -> None:
    with supervised("shop:app", "--timeout-graceful-shutdown", "1", cwd=application("1")) as master:
        client = Client(master.port)
        client.connection.request("GET", "/work?ms=60000")
        master.wait_status(lambda s: s["generations"][0]["workers"][0]["in_flight"] == 1)
        master.signal(signal.SIGTERM)
        assert master.wait_exit() == 1
        client.close()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGQUIT])
def test_a_second_signal_stops_at_once(application, tmp_path, second) -> None:
    with supervised("shop:app", "--timeout-graceful-shutdown", "600", cwd=application("1")) as master:
        client = Client(master.port)
        client.connection.request("GET", f"/work?until={tmp_path}/never")
        master.wait_status(lambda s: s["generations"][0]["workers"][0]["in_flight"] == 1)
        master.signal(signal.SIGTERM)
        master.output.wait_for("stopping")
        master.signal(second)
        master.wait_exit()
        client.close()


def test_segue_stop_waits_for_the_end(application) -> None:
    with supervised("shop:app", "--workers", "2", cwd=application("1")) as master:
        pids = master.worker_pids()
        done = master.command("stop")
        assert done.returncode == 0, done.stderr
        assert not any(alive(pid) for pid in pids)
        assert master.wait_exit() == 0
        assert master.command("status").returncode == 5


def test_stop_delay_goes_on_serving_with_readiness_off(application) -> None:
    with supervised("shop:app", "--stop-delay", "600", cwd=application("1")) as master:
        with Client(master.port) as client:
            master.signal(signal.SIGTERM)
            master.output.wait_for("stopping")
            assert master.call("GET", "/readyz")[0] == 503
            assert client.get("/")[0] == 200
        master.signal(signal.SIGTERM)  # enough of it
        assert master.wait_exit() == 0


def test_a_stop_begins_by_itself_when_its_delay_is_over(application) -> None:
    with supervised("shop:app", "--stop-delay", "1.5", cwd=application("1")) as master:
        began = time.monotonic()
        master.signal(signal.SIGTERM)
        assert master.wait_exit() == 0
        assert time.monotonic() - began >= 1.5


def test_a_balancer_that_asks_a_worker_is_told_of_a_stop_that_waits(application) -> None:
    flags = ("--workers", "2", "--stop-delay", "600", "--health-path", "/healthz")
    with supervised("shop:app", *flags, cwd=application("1")) as master:
        port = master.port
        with Client(port) as client:
            assert client.get("/healthz")[0] == 200
            master.signal(signal.SIGTERM)
            master.output.wait_for("stopping")
            master.wait_status(lambda _: client.get("/healthz")[0] == 503)
            assert b"stopping" in client.get("/healthz")[2]
            assert client.get("/")[0] == 200
        with Client(port) as another:  # and so are those that come
            assert another.get("/")[0] == 200
        master.signal(signal.SIGTERM)  # enough of it
        assert master.wait_exit() == 0


def test_ttin_and_ttou_add_and_remove_a_worker_without_cutting_a_connection(application) -> None:
    with supervised("shop:app", "--no-access-log", cwd=application("1")) as master:
        with Load(master.port, "--keepalive", "20", "--newconn", "4", "--sse", "2") as load:
            for count in (2, 3):
                master.signal(signal.SIGTTIN)
                master.wait_status(
                    lambda s, n=count: (
                        sum(w["state"] == "active" for w in s["generations"][0]["workers"]) == n
                    )
                )
            for count in (2, 1):
                master.signal(signal.SIGTTOU)
                master.wait_status(lambda s, n=count: len(s["generations"][0]["workers"]) == n)
            load.nothing_lost()
        master.stop()


def test_scale_is_a_command_and_lasts_over_a_reload(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        done = master.command("scale", "3")
        assert done.returncode == 0, done.stderr
        assert len(master.worker_pids()) == 3
        master.reload("--wait", "drained")
        assert len(master.worker_pids()) == 3
        assert master.command("scale", "1").returncode == 0
        assert master.command("scale", "0").returncode == 2
        master.stop()


def test_a_new_worker_that_does_not_read_the_relay_loses_nothing(application) -> None:
    """The new generation's loop is blocked for 5 s right after it was activated; the old one keeps what it can't give."""
    blocked = """
        import asyncio, threading, time, segue
        def block():
            while not segue.activated.is_set():
                time.sleep(0.001)
            loop.call_soon_threadsafe(time.sleep, 5)
        loop = None
        real = None
        async def wrapper(scope, receive, send):
            global loop
            if loop is None:
                loop = asyncio.get_running_loop()
                threading.Thread(target=block, daemon=True).start()
            await real(scope, receive, send)
    """
    with supervised("shop:app", "--no-access-log", cwd=application("1")) as master:
        with Load(
            master.port, "--keepalive", "30", "--newconn", "2", "--sse", "1", "--timeout", "30"
        ) as load:
            directory = application("2")
            text = (directory / "shop.py").read_text()
            import textwrap

            (directory / "shop.py").write_text(
                textwrap.dedent(blocked) + text + "\nreal = app\napp = wrapper\n"
            )
            master.reload()
            master.wait_status(lambda s: len(s["generations"]) == 1)
            load.nothing_lost()
        master.stop()


def test_a_runtime_directory_that_others_can_write_to_is_refused(application, tmp_path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    directory.chmod(0o777)
    done = segue("serve", "shop:app", "--runtime-dir", str(directory), cwd=str(application("1")))
    assert done.returncode == 5
    assert "0777" in done.stderr


def test_no_instance_is_an_error_that_says_where_was_looked(tmp_path) -> None:
    done = segue("reload", "--runtime-dir", str(tmp_path))
    assert done.returncode == 5
    assert str(tmp_path) in done.stderr


def test_several_instances_are_listed(application) -> None:
    with supervised("shop:app", cwd=application("1"), name="one") as one:
        with supervised("shop:app", cwd=application("1"), name="two", runtime_dir=one.runtime_dir) as two:
            done = segue("status", "--runtime-dir", one.runtime_dir)
            assert done.returncode == 5
            assert "--name one" in done.stderr
            assert "--name two" in done.stderr
            two.stop()
        one.stop()

"""A master that starts takes over what an earlier one has left behind, in whatever state that is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from scenario import (
    DEADLINE_S,
    HOT,
    ROOT,
    Client,
    Load,
    Segue,
    environment,
    free_port,
    segue,
    supervised,
    unix_call,
)

from segue.handoff import adoption
from segue.handoff.messages import WorkerMode
from segue.supervisor import finding, journal, memory, spawning
from segue.supervisor.log import Log


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended may stay a zombie until the init of this machine looks after it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def started_again(master: Segue, *arguments: str, cwd: Path, port: int) -> Segue:
    """The same command again, after the master has died."""
    return Segue(
        *arguments,
        "--bind",
        f"127.0.0.1:{port}",
        cwd=cwd,
        runtime_dir=master.runtime_dir,
        name=master.name,
        bind=False,
    )


@contextlib.contextmanager
def taken_over(master: Segue, *arguments: str, cwd: Path, port: int) -> Iterator[Segue]:
    """Kill the master, and start another one in its place."""
    master.process.kill()
    master.process.wait()
    again = started_again(master, *arguments, cwd=cwd, port=port)
    try:
        yield again.wait_ready()
    finally:
        again.close()


@contextlib.contextmanager
def on_a_port(*arguments: str, cwd: Path, **options: Any) -> Iterator[tuple[Segue, int]]:
    """A ready master on a port that can be named again."""
    port = free_port()
    with supervised(*arguments, "--bind", f"127.0.0.1:{port}", cwd=cwd, bind=False, **options) as master:
        yield master, port


SERVE = ("shop:app", "--workers", "2", "--no-access-log")


def test_a_master_that_is_killed_is_followed_by_one_that_adopts_its_workers(application) -> None:
    """kill -9 under load and a start of the same command: nothing fails, nothing is closed, the workers stay."""
    directory = application("1")
    with on_a_port(*SERVE, cwd=directory) as (master, port):
        pids = master.worker_pids()
        with (
            Load(port, "--keepalive", "20", "--newconn", "4", "--sse", "2") as load,
            taken_over(master, *SERVE, cwd=directory, port=port) as again,
        ):
            assert again.worker_pids() == pids
            status = again.status()
            assert status["ready"]
            assert status["master"]["epoch"] == 2
            assert status["master"]["differs_on_disk"] == []
            application("2")
            again.reload("--wait", "drained")
            assert not set(again.worker_pids()) & set(pids)
            with Client(port) as client:
                assert client.get("/")[2] == b"2"
            load.nothing_lost()
            again.stop()


@pytest.mark.timeout(600)
def test_ten_masters_in_a_row_leak_nothing(application) -> None:
    directory = application("1")
    with on_a_port(*SERVE, cwd=directory) as (master, port), contextlib.ExitStack() as stack:
        with Load(port, "--keepalive", "10", "--newconn", "2", "--sse", "1") as load:
            last, pids = master, master.worker_pids()
            counts = []
            for epoch in range(2, 12):
                last = stack.enter_context(taken_over(last, *SERVE, cwd=directory, port=port))
                status = last.status()
                assert status["master"]["epoch"] == epoch
                counts.append(status["master"]["descriptors"])
            assert last.worker_pids() == pids
            assert max(counts) - min(counts) <= 2, counts
            load.nothing_lost()
        assert len(os.listdir(f"/proc/{pids[0]}/fd")) < 40
        last.stop()


def test_an_adopted_worker_that_dies_is_noticed_and_replaced(application) -> None:
    directory = application("1")
    with (
        on_a_port(*SERVE, cwd=directory) as (master, port),
        taken_over(master, *SERVE, cwd=directory, port=port) as again,
    ):
        victim, sibling = again.worker_pids()
        os.kill(victim, signal.SIGKILL)
        again.output.wait_for(r"worker-active generation=1 worker=3")
        assert sibling in again.worker_pids()
        assert "nobody can tell how" in again.output.text
        again.stop()


def test_what_lies_on_the_disk_since_is_told_and_not_loaded(application) -> None:
    directory = application("1")
    with on_a_port(*SERVE, cwd=directory) as (master, port):
        pids = master.worker_pids()
        application("2")
        with taken_over(master, *SERVE[:-1], cwd=directory, port=port) as again:
            again.output.wait_for("disk-differs", count=2)
            assert again.worker_pids() == pids
            differs = again.status()["master"]["differs_on_disk"]
            assert "access-log" in differs[0]
            assert "no longer that of generation 1" in differs[1]
            assert "no longer that" in again.command("status").stdout
            with Client(port) as client:
                assert client.get("/")[2] == b"1"
                again.reload()
                client.come_to("2")
            assert again.status()["master"]["differs_on_disk"] == []
            again.stop()


@pytest.mark.parametrize("broken", ["gone", "empty", "noise", "torn"])
def test_a_broken_journal_prevents_no_start(application, broken) -> None:
    directory = application("1")
    with on_a_port(*SERVE, cwd=directory) as (master, port):
        pids = master.worker_pids()
        master.process.kill()
        master.process.wait()
        path = Path(master.directory) / "journal"
        data = path.read_bytes()
        if broken == "gone":
            path.unlink()
        else:
            path.write_bytes(
                {"empty": b"", "noise": os.urandom(4096), "torn": data[: len(data) // 2]}[broken]
            )
        with taken_over(master, *SERVE, cwd=directory, port=port) as again:
            assert again.worker_pids() == pids
            again.reload("--wait", "drained")
            with Client(port) as client:
                assert client.get("/")[0] == 200
            again.stop()


def test_what_an_operator_has_said_outlives_the_master(application) -> None:
    """The drain, the number of workers and the history of reloads are in the journal."""
    directory = application("1")
    serve = (*SERVE, "--probation", "0")  # a crash is to be replaced, not taken back
    with on_a_port(*serve, cwd=directory) as (master, port):
        master.reload()
        assert master.command("scale", "3").returncode == 0
        assert master.command("drain", "start").returncode == 0
        pids = master.worker_pids()
        before = master.status()
        with taken_over(master, *serve, cwd=directory, port=port) as again:
            after = again.status()
            assert again.worker_pids() == pids
            assert (after["current"], after["drain_mode"]) == (2, "reject")
            assert [r["number"] for r in after["reloads"]] == [r["number"] for r in before["reloads"]]
            os.kill(pids[0], signal.SIGKILL)
            again.output.wait_for(r"worker-active generation=2 worker=4")
            assert len(again.worker_pids()) == 3
            again.reload()
            status = again.status()
            assert status["current"] == 3
            assert status["drain_mode"] == "reject"
            assert again.command("drain", "stop").returncode == 0
            assert again.status()["ready"]
            again.stop()


def test_no_token_is_written_down(application, tmp_path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-that-is-long-enough")
    token.chmod(0o600)
    directory = application("1")
    arguments = (*SERVE, "--token-file", str(token))
    with on_a_port(*arguments, cwd=directory) as (master, port):
        path = Path(master.directory) / "journal"
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"long-enough" not in path.read_bytes()
        with taken_over(master, *arguments, cwd=directory, port=port) as again:
            os.kill(again.worker_pids()[0], signal.SIGKILL)
            again.output.wait_for(r"worker-active generation=1 worker=3")
            assert b"long-enough" not in path.read_bytes()
            again.stop()


def test_a_worker_that_hangs_is_replaced_by_the_next_master(application) -> None:
    directory = application("1")
    with on_a_port(*SERVE, cwd=directory) as (master, port):
        hung, sibling = master.worker_pids()
        os.kill(hung, signal.SIGSTOP)
        with taken_over(master, *SERVE, cwd=directory, port=port) as again:
            again.output.wait_for(r"worker-active generation=1 worker=3")
            again.output.wait_for(r"worker-(ended|killed) generation=1 worker=1")
            again.wait_status(lambda s: [w["id"] for w in s["generations"][0]["workers"]] == [2, 3])
            assert sibling in again.worker_pids()
            again.stop()


def test_if_all_workers_hang_the_instance_serves_again(application) -> None:
    directory = application("1")
    with on_a_port("shop:app", cwd=directory) as (master, port):
        os.kill(master.worker_pids()[0], signal.SIGSTOP)
        with taken_over(master, "shop:app", cwd=directory, port=port) as again:
            with Client(port) as client:
                assert client.get("/")[0] == 200
            again.stop()


def test_a_generation_that_drains_goes_on_draining(application, tmp_path) -> None:
    directory = application("1")
    with on_a_port("shop:app", cwd=directory) as (master, port), Client(port) as stream:
        stream.connection.request("GET", f"/sse?until={tmp_path}/enough")
        response = stream.connection.getresponse()
        old = master.worker_pids()[0]
        application("2")
        master.reload()
        with taken_over(master, "shop:app", cwd=directory, port=port) as again:
            states = {g["id"]: g["state"] for g in again.status()["generations"]}
            assert states == {1: "draining", 2: "active"}
            (tmp_path / "enough").touch()
            assert response.read().endswith(b"data: done\n\n")
            again.wait_status(lambda s: [g["id"] for g in s["generations"]] == [2])
            assert not alive(old)
            again.stop()


def test_what_accepts_serves_on_though_an_older_journal_names_one_that_hangs(application, tmp_path) -> None:
    """As after a reload with a full disk: what has been drained since is not waited for."""
    directory = application("1")
    with on_a_port("shop:app", cwd=directory) as (master, port), Client(port) as stream:
        stream.connection.request("GET", f"/sse?until={tmp_path}/enough")
        response = stream.connection.getresponse()
        [old] = master.worker_pids()
        path = Path(master.directory) / "journal"
        written = path.read_bytes()
        application("2")
        master.reload()
        [new] = master.worker_pids()
        os.kill(old, signal.SIGSTOP)
        master.process.kill()
        master.process.wait()
        path.write_bytes(written)
        with taken_over(master, "shop:app", cwd=directory, port=port) as again:
            assert again.worker_pids() == [new]
            with Client(port) as client:
                assert client.get("/")[2] == b"2"
            os.kill(old, signal.SIGCONT)
            (tmp_path / "enough").touch()
            assert response.read().endswith(b"data: done\n\n")
            again.wait_status(lambda s: [g["id"] for g in s["generations"]] == [2])
            assert again.worker_pids() == [new]
            again.stop()


def test_workers_that_boot_when_the_master_dies_are_no_trouble(application, tmp_path) -> None:
    """A reload is cut short at its import: the old generation serves on, and the next reload succeeds."""
    directory = application("1")
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with on_a_port("shop:app", cwd=directory) as (master, port):
        pids = master.worker_pids()
        application("2", prelude=f"open({str(gate)!r}).read()\n")
        master.signal(signal.SIGHUP)
        # opened by both: it is at its import
        with gate.open("w"), taken_over(master, "shop:app", cwd=directory, port=port) as again:
            assert again.worker_pids() == pids
            last = again.status()["reloads"][-1]
            assert last["outcome"] == "refused"
            assert "master" in last["reason"]
            again.wait_status(lambda s: [g["id"] for g in s["generations"]] == [1])
            application("3")
            again.reload()
            with Client(port) as client:
                client.come_to("3")
            again.stop()


def rewrite(directory: str, **changes: Any) -> None:
    """Change what the dead master has written down."""
    path = os.path.join(directory, "journal")
    values = {key: json.loads(data) for key, data in journal.read(path).items()}
    written = journal.Journal(path)
    assert written.write(values | {key.replace("__", "/"): value for key, value in changes.items()}) == ""
    written.close()


@pytest.mark.parametrize("ready", [True, False])
def test_an_interrupted_promote_is_finished_or_undone(application, ready) -> None:
    """Intent without commit: all of the new generation accept, and it is finished; else undone. Under load."""
    directory = application("1")
    with (
        on_a_port("shop:app", "--workers", "2", "--no-access-log", cwd=directory) as (master, port),
        # who is with the old ones waits for as long as these stand still
        Load(port, "--keepalive", "10", "--newconn", "2", "--sse", "1", "--timeout", "60") as load,
    ):
        # two generations that both accept, as in the moment before a commit: the old ones are woken again
        old = master.worker_pids()
        sockets = [w["control"] for w in master.current()["workers"]]
        for pid in old:
            os.kill(pid, signal.SIGSTOP)
        application("2")
        asked = reload_in_background(master)
        master.output.wait_for("promoted generation=2")
        asked.wait(DEADLINE_S)
        new = master.worker_pids()
        master.process.kill()
        master.process.wait()
        for pid in old:
            os.kill(pid, signal.SIGCONT)
        for path in sockets:
            unix_call(path, "POST", f"{HOT}/activate")
        known = memory.recall(journal.read(os.path.join(master.directory, "journal")))
        assert known.promote is not None
        assert known.promote.committed
        if not ready:
            os.kill(new[0], signal.SIGKILL)
        rewrite(
            master.directory,
            current=1,
            promote={"epoch": 1, "previous": 1, "generation": 2, "committed": False},
        )
        with taken_over(
            master, "shop:app", "--workers", "2", "--no-access-log", cwd=directory, port=port
        ) as again:
            serving = 2 if ready else 1
            again.output.wait_for(f"promote={'finished' if ready else 'undone'}")
            again.wait_status(lambda s: [g["id"] for g in s["generations"]] == [serving])
            assert again.worker_pids() == (new if ready else old)
            with Client(port) as client:
                assert client.get("/")[2] == str(serving).encode()
            tally = load.finish()
            assert not any(tally["server_closes"].values()) or not ready
            if ready:
                assert tally["failed_total"] == 0, tally
            again.reload()
            again.stop()


def reload_in_background(master: Segue) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "segue.supervisor.cli",
            "reload",
            "--runtime-dir",
            master.runtime_dir,
            "--name",
            master.name,
        ],
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.DEVNULL,
    )


def test_what_waited_for_its_turn_is_not_done_because_an_interrupted_promote_is(application) -> None:
    """A rollback is cut short and finished by the next master; the reload that waited for it has never begun."""
    serve = (*SERVE, "--park-for", "120", "--probation", "0")
    directory = application("1")
    with on_a_port(*serve, cwd=directory) as (master, port):
        old = master.worker_pids()
        application("2")
        master.reload("--wait", "drained")
        os.kill(old[0], signal.SIGSTOP)  # so that the rollback is not done yet
        _, rollback = master.call("POST", f"{HOT}/rollback?wait=0")
        _, reload = master.call("POST", f"{HOT}/reload?wait=0")
        master.wait_status(lambda s: [each["phase"] for each in s["reloads"][-2:]] == ["activate", "queued"])
        master.process.kill()
        master.process.wait()
        os.kill(old[0], signal.SIGCONT)
        with taken_over(master, *serve, cwd=directory, port=port) as again:
            status = again.wait_status(lambda s: s["current"] == 1)
            told = {each["number"]: each for each in status["reloads"]}
            assert told[rollback["id"]]["outcome"] == "ok"
            assert told[rollback["id"]]["generation"] == 1
            assert told[reload["id"]]["outcome"] == "refused"
            assert "the master ended before it was done" in told[reload["id"]]["reason"]
            assert set(again.worker_pids()) == set(old)
            again.stop()


def test_a_master_that_was_stopped_and_wakes_after_another_took_over_does_no_harm(application) -> None:
    directory = application("1")
    serve = (*SERVE, "--heartbeat-timeout", "10")  # by then the one that wakes looks after its workers
    with on_a_port(*serve, cwd=directory) as (master, port):
        pids = master.worker_pids()
        with Load(port, "--keepalive", "10", "--newconn", "2", "--sse", "1") as load:
            master.signal(signal.SIGSTOP)
            (Path(master.directory) / "master.lock").unlink()  # as a cleaned runtime directory
            again = started_again(master, *serve, cwd=directory, port=port)
            try:
                again.wait_ready()
                master.signal(signal.SIGCONT)
                assert master.wait_exit() == 5
                assert "deposed" in master.output.text
                assert again.worker_pids() == pids
                again.reload()
                load.nothing_lost()
                again.stop()
            finally:
                again.close()


def test_a_worker_refuses_what_an_older_master_commands(application) -> None:
    directory = application("1")
    with (
        on_a_port("shop:app", cwd=directory) as (master, port),
        taken_over(master, "shop:app", cwd=directory, port=port) as again,
    ):
        path = again.current()["workers"][0]["control"]
        code, document = unix_call(path, "POST", f"{HOT}/stop", headers={"X-Segue-Epoch": "1"})
        assert (code, document["epoch"]) == (409, 2)
        with Client(port) as client:
            assert client.get("/")[0] == 200
        again.stop()


def test_what_a_worker_has_said_in_time_counts_however_late_the_master_looks() -> None:
    """On a busy machine the master itself may stand still for longer than it gives them."""
    pid = os.getpid()
    process = spawning.Process(pid, os.pidfd_open(pid), None, "", adoption.start_time(pid) or 0)
    found = finding.Found([finding.FoundWorker((1, 1), process)])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    relay = spawning.Relay.create()
    said = adoption.Acceptance(adoption.VERSION, pid, process.start_time, "", 1, 1, WorkerMode.ACTIVE, "")
    adoption.send(theirs, said, list(relay.names.values()))
    link = finding._Link(found.workers[0], ours)
    finding._collect(found, {ours.fileno(): link}, 0.0, Log())
    assert found.workers[0].told == said
    assert found.relay is not None
    for each in (theirs, relay, found.relay):
        each.close()
    process.close()


def test_an_address_in_use_names_who_has_it(application) -> None:
    """By pid and command; and if it is a worker that has lost its master, by its instance."""
    directory = application("1")
    with on_a_port("shop:app", cwd=directory) as (master, port):
        pid = master.worker_pids()[0]
        master.process.kill()
        master.process.wait()
        other = segue(
            "serve",
            "shop:app",
            "--bind",
            f"127.0.0.1:{port}",
            "--runtime-dir",
            master.runtime_dir,
            "--name",
            "other",
            cwd=directory,
        )
        assert other.returncode == 3
        assert str(pid) in other.stderr
        assert "instance 'default'" in other.stderr
        assert master.command("stop").returncode == 0


def stored(master: Segue) -> dict[str, int]:
    """What a service manager would keep, by name, once the master is ready."""
    kept: dict[str, int] = {}
    while True:
        data, fds, _, _ = socket.recv_fds(master._notify, 8192, 4)
        fields = dict(line.split("=", 1) for line in data.decode().splitlines())
        if fields.get("FDSTORE") == "1":
            (kept[fields["FDNAME"]],) = fds
        if fields.get("READY") == "1":
            return kept


def test_what_the_service_manager_keeps_outlives_all_processes(application) -> None:
    """Listener and relay come back by name: who connected meanwhile waits in the queue, and is answered."""
    directory = application("1")
    master = Segue(*SERVE, cwd=directory)
    again: subprocess.Popen[bytes] | None = None
    try:
        kept = stored(master)
        assert sorted(kept) == ["segue-listener.0.127.0.0.1%3A0", "segue-relay-read", "segue-relay-write"]
        port, pids = master.port, master.worker_pids()
        master.process.kill()
        master.process.wait()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with Client(port) as client:
            names = sorted(kept, reverse=True)
            command = [sys.executable, "-m", "segue.supervisor.cli", "serve", *SERVE]
            command += ["--runtime-dir", master.runtime_dir, "--bind", "127.0.0.1:0"]
            again = subprocess.Popen(
                ["sh", "-c", 'export LISTEN_PID=$$; exec "$@"', "sh", *command],
                cwd=directory,
                env=environment(PYTHONPATH=str(ROOT))
                | {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
                | {"SEGUE_FDS": ",".join(str(kept[name]) for name in names)},
                pass_fds=tuple(kept.values()),
                stderr=subprocess.DEVNULL,
            )
            assert client.get("/")[2] == b"1"
        assert master.port == port
        assert master.command("reload").returncode == 0
        assert master.port == port
        for fd in kept.values():
            os.close(fd)
        again.send_signal(signal.SIGTERM)
        assert again.wait(DEADLINE_S) == 0
    finally:
        master.close()
        if again is not None and again.poll() is None:
            again.kill()


def test_a_mistake_in_the_settings_does_not_leave_workers_without_a_master(application) -> None:
    directory = application("1")
    file = directory / "segue.toml"
    file.write_text("workers = 2\n")
    with on_a_port("shop:app", cwd=directory) as (master, port):
        pids = master.worker_pids()
        file.write_text("workers = 'many'\n")
        with taken_over(master, "shop:app", cwd=directory, port=port) as again:
            assert again.worker_pids() == pids
            assert "workers" in again.status()["master"]["differs_on_disk"][0]
            assert again.command("reload").returncode == 1
            file.write_text("workers = 1\n")
            again.reload()
            assert len(again.worker_pids()) == 1
            again.stop()


def test_masters_that_are_killed_in_the_middle_of_a_promote_lose_nothing(application) -> None:
    """At whatever point of it: it is finished or undone, and whoever asks later is told which."""
    serve = (*SERVE, "--park-for", "0", "--probation", "0")
    directory = application("1")
    with on_a_port(*serve, cwd=directory) as (master, port), contextlib.ExitStack() as stack:
        last, outcomes = master, []
        with Load(port, "--keepalive", "10", "--newconn", "2", "--sse", "1") as load:
            for version in range(2, 8):
                application(str(version))
                last.signal(signal.SIGHUP)
                last.output.wait_for(f"worker-ready generation={version}", count=2)
                last = stack.enter_context(taken_over(last, *serve, cwd=directory, port=port))
                status = last.wait_status(lambda s: len(s["generations"]) == 1 and s["ready"])
                outcomes.append(status["reloads"][-1]["outcome"])
                assert (status["current"] == version) == (outcomes[-1] == "ok")
                assert len(last.worker_pids()) == 2
            load.nothing_lost()
        last.stop()

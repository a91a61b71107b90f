"""Stage, promote, discard, roll back: a deploy can be looked at before it serves, and taken back after."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scenario import HOT, Client, Load, Segue, supervised

LOAD = ("--keepalive", "20", "--post", "5", "--newconn", "4", "--sse", "2")
KEEP = ("--park-for", "120", "--probation", "0")


def probes(printed: str) -> list[str]:
    """The sockets that `segue stage` prints."""
    return re.findall(r"curl --unix-socket (\S+) http://x/", printed)


def stage(master: Segue) -> tuple[int, list[str]]:
    """`segue stage`, which must succeed: the generation and its private sockets."""
    done = master.command("stage")
    assert done.returncode == 0, f"{done.stderr}\n{master.output.text}"
    found = re.match(r"generation (\d+) is staged", done.stdout)
    assert found
    return int(found[1]), probes(done.stdout)


def states(document: dict[str, Any]) -> dict[int, str]:
    return {generation["id"]: generation["state"] for generation in document["generations"]}


def are_parked(generation: int) -> Callable[[dict[str, Any]], bool]:
    """Whether its workers have taken it that they are to stay: a generation counts as parked once they are told."""

    def are(document: dict[str, Any]) -> bool:
        workers = next(each["workers"] for each in document["generations"] if each["id"] == generation)
        return all(worker["mode"] == "parked" for worker in workers)

    return are


def test_a_staged_generation_can_be_asked_in_private_and_promoted(application) -> None:
    with (
        supervised("shop:app", "--workers", "2", cwd=application("1")) as master,
        Client(master.port) as client,
    ):
        assert client.get("/")[2] == b"1"
        application("2")
        number, sockets = stage(master)
        assert number == 2
        assert len(sockets) == 2
        for path in sockets:
            assert os.stat(path).st_mode & 0o777 == 0o600
            asked = subprocess.run(
                ["curl", "--silent", "--unix-socket", path, "http://x/any"],
                capture_output=True,
                text=True,
                check=True,
            )
            assert asked.stdout == "2"
        document = master.told()
        assert states(document) == {1: "active", 2: "staged"}
        assert [w["connections"] + w["requests_total"] for w in document["generations"][1]["workers"]] == [
            0,
            0,
        ]
        assert client.get("/")[2] == b"1"
        staged = {worker["pid"] for worker in document["generations"][1]["workers"]}
        done = master.command("promote")
        assert done.returncode == 0, done.stderr
        assert "generation 2 serves" in done.stdout
        client.come_to("2")
        assert set(master.worker_pids()) == staged
        history = [(each["kind"], each["outcome"]) for each in master.status()["reloads"]]
        assert history == [("reload", "ok"), ("stage", "ok"), ("promote", "ok")]
        master.stop()
    assert not any(Path(path).exists() for path in sockets)


def test_a_promote_under_load_loses_nothing(application) -> None:
    with supervised("shop:app", "--workers", "2", "--no-access-log", cwd=application("1")) as master:
        with Load(master.port, *LOAD) as load:
            for version in range(2, 5):
                application(str(version))
                number, _ = stage(master)
                done = master.command("promote", str(number))
                assert done.returncode == 0, done.stderr
                master.wait_answered()
            tally = load.nothing_lost()
        assert set(tally["versions"]) == {"1", "2", "3", "4"}
        master.stop()


def test_a_staged_generation_can_be_discarded(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master, Client(master.port) as client:
        application("2")
        _, sockets = stage(master)
        done = master.command("discard")
        assert (done.returncode, done.stdout) == (0, "generation 2 is discarded\n")
        document = master.wait_status(lambda s: len(s["generations"]) == 1)
        assert document["current"] == 1
        assert not Path(sockets[0]).exists()
        assert client.get("/")[2] == b"1"
        assert master.command("promote", "2").returncode == 1
        master.stop()


def test_what_becomes_of_a_staged_generation_that_loses_a_worker_is_told(application) -> None:
    with supervised("shop:app", "--no-access-log", cwd=application("1")) as master:
        stage(master)
        staged = next(g for g in master.status()["generations"] if g["state"] == "staged")
        os.kill(staged["workers"][0]["pid"], signal.SIGKILL)
        master.output.wait_for("staged-failed generation=2 .*worker 1 was ended by SIGKILL")
        promoted = master.command("promote")
        assert promoted.returncode == 1
        assert "generation 2 was, and has failed: worker 1 was ended by SIGKILL" in promoted.stderr
        master.stop()


def test_a_generation_that_does_not_get_ready_is_not_staged_and_says_why(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        application("2", prelude="import nosuchmodule\n")
        done = master.command("stage")
        assert done.returncode == 1
        assert "nosuchmodule" in done.stderr
        assert states(master.wait_status(lambda s: len(s["generations"]) == 1)) == {1: "active"}
        master.stop()


@pytest.mark.parametrize("what", ["promote", "discard", "rollback"])
def test_what_is_not_there_is_refused_with_what_is(application, what) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        application("2")
        stage(master)
        code, problem = master.call("POST", f"{HOT}/{what}?generation=77")
        assert (code, problem["status"]) == (404, 404)
        assert set(problem["known"]) <= {1, 2}
        assert "77" in problem["detail"]
        code, problem = master.call("POST", f"{HOT}/{what}?generation=seven")
        assert code == 400
        done = master.command(what, "77")
        assert done.returncode == 1
        assert "77" in done.stderr
        done = master.command(what, str(10**20))
        assert (done.returncode, "range" in done.stderr) == (2, True)
        assert states(master.status()) == {1: "active", 2: "staged"}
        master.stop()


@pytest.mark.parametrize("what", ["promote", "discard", "rollback"])
def test_with_nothing_to_do_it_on_it_is_refused(application, what) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        code, problem = master.call("POST", f"{HOT}/{what}")
        assert (code, problem["known"]) == (404, [])
        assert master.command(what).returncode == 1
        master.stop()


def test_a_rollback_takes_the_parked_generation_back_with_its_processes(application) -> None:
    with (
        supervised("shop:app", "--workers", "2", *KEEP, cwd=application("1")) as master,
        Client(master.port) as client,
    ):
        assert client.get("/")[2] == b"1"
        old = set(master.worker_pids())
        application("2")
        master.reload("--wait", "drained")
        document = master.told(are_parked(1))
        assert states(document) == {1: "parked", 2: "active"}
        parked = document["generations"][0]["workers"]
        assert {worker["pid"] for worker in parked} == old
        assert all(worker["rss_bytes"] > 0 for worker in parked)
        assert "parked" in master.command("status").stdout
        assert client.get("/")[2] == b"2"
        done = master.command("rollback")
        assert done.returncode == 0, done.stderr
        assert "generation 1 serves again" in done.stdout
        client.come_to("1")
        assert set(master.worker_pids()) == old
        history = master.status()["reloads"]
        assert [(each["kind"], each["outcome"]) for each in history[1:]] == [
            ("reload", "rolled back"),
            ("rollback", "ok"),
        ]
        assert history[1]["rolled_back"]["to"] == 1
        # and forward again, to what is parked now
        master.wait_status(lambda s: states(s) == {1: "active", 2: "parked"})
        assert master.command("rollback", "2").returncode == 0
        client.come_to("2")
        master.stop()


def test_rollbacks_under_load_lose_nothing(application) -> None:
    with supervised("shop:app", "--workers", "2", "--no-access-log", *KEEP, cwd=application("1")) as master:
        with Load(master.port, *LOAD) as load:
            application("2")
            master.reload()
            master.wait_answered()
            for _ in range(3):  # draining: the streams see to that
                for version in ("1", "2"):
                    done = master.command("rollback", version)
                    assert done.returncode == 0, done.stderr
            master.wait_status(lambda s: states(s) == {1: "parked", 2: "active"})
            assert master.command("rollback").returncode == 0
            tally = load.nothing_lost()
        assert set(tally["versions"]) == {"1", "2"}
        master.stop()


def test_a_rollback_does_not_wait_for_what_is_being_staged(application, tmp_path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with supervised("shop:app", *KEEP, cwd=application("1")) as master:
        application("2")
        master.reload("--wait", "drained")
        application("3", prelude=f"open({str(gate)!r}).read()\n")
        _, operation = master.call("POST", f"{HOT}/stage?wait=0")
        with gate.open("w"):  # its worker is in the import
            back = master.command("rollback")
            assert (back.returncode, back.stderr) == (0, "")
            with Client(master.port) as client:
                client.come_to("1")
            other = master.command("promote", "2")
            assert other.returncode == 1
            assert "give it up: segue discard 3" in other.stderr
        _, operation = master.call("GET", f"{HOT}/operations/{operation['id']}?wait=60")
        assert (operation["outcome"], operation["generation"]) == ("ok", 3), operation
        master.stop()


def test_a_generation_that_still_drains_can_be_taken_back(application, tmp_path) -> None:
    with supervised("shop:app", *KEEP, cwd=application("1")) as master, Client(master.port) as client:
        client.connection.request("GET", f"/sse?until={tmp_path}/enough")
        stream = client.connection.getresponse()
        stream.read(9)
        pids = master.worker_pids()
        application("2")
        master.reload()
        assert states(master.status())[1] == "draining"
        done = master.command("rollback")
        assert done.returncode == 0, done.stderr
        assert master.worker_pids() == pids
        with Client(master.port) as other:
            other.come_to("1")
        assert stream.read(9).startswith(b"data:")
        (tmp_path / "enough").touch()
        assert stream.read().endswith(b"data: done\n\n")
        master.stop()


def test_a_parked_generation_ends_when_its_time_is_over(application) -> None:
    with supervised("shop:app", "--park-for", "1", "--probation", "0", cwd=application("1")) as master:
        pids = master.worker_pids()
        application("2")
        master.reload()
        master.wait_status(lambda s: len(s["generations"]) == 1)
        assert not os.path.exists(f"/proc/{pids[0]}")
        refused = master.command("rollback")
        assert refused.returncode == 1
        master.stop()


def test_only_the_generation_that_served_last_is_kept(application) -> None:
    with supervised("shop:app", *KEEP, cwd=application("1")) as master, Client(master.port) as client:
        pids = []
        for version in ("2", "3", "4"):
            pids += master.worker_pids()
            application(version)
            master.reload("--wait", "drained")
        master.wait_status(lambda s: states(s) == {3: "parked", 4: "active"})
        assert [os.path.exists(f"/proc/{pid}") for pid in pids] == [False, False, True]
        refused = master.command("rollback", "1")
        assert refused.returncode == 1
        assert "there is no generation 1; known: 3" in refused.stderr
        assert master.command("rollback").returncode == 0
        client.come_to("3")
        master.stop()


def test_without_parking_the_old_generation_ends_as_soon_as_it_is_drained(application) -> None:
    with supervised("shop:app", "--park-for", "0", "--probation", "600", cwd=application("1")) as master:
        application("2")
        master.reload("--wait", "drained")
        master.wait_status(lambda s: not any(g["workers"] for g in s["generations"] if not g["current"]))
        master.stop()


def test_drained_does_not_mean_ended(application) -> None:
    with supervised("shop:app", *KEEP, cwd=application("1")) as master:
        application("2")
        master.reload("--wait", "drained")
        assert states(master.status()) == {1: "parked", 2: "active"}
        master.command("discard", "1")
        master.wait_status(lambda s: len(s["generations"]) == 1)
        master.stop()


def test_a_parked_generation_that_lost_a_worker_is_filled_up_before_it_serves(application) -> None:
    with (
        supervised("shop:app", "--workers", "2", *KEEP, cwd=application("1")) as master,
        Client(master.port) as client,
    ):
        old = master.worker_pids()
        master.reload("--wait", "drained")  # the same code: a refill is possible
        os.kill(old[0], signal.SIGKILL)
        master.output.wait_for(r"worker=1 .*SIGKILL")
        done = master.command("rollback")
        assert done.returncode == 0, done.stderr
        assert len(master.worker_pids()) == 2
        assert old[1] in master.worker_pids()
        assert client.get("/")[2] == b"1"
        master.stop()


def test_what_hangs_in_a_parked_generation_does_not_prevent_the_way_back(
    application,
) -> None:
    """Edited in place, one of two hangs: the other has the good code, and that is what counts."""
    with supervised("shop:app", "--workers", "2", *KEEP, cwd=application("1")) as master:
        old = master.worker_pids()
        application("2")
        master.reload("--wait", "drained")
        with Load(master.port, *LOAD) as load:
            os.kill(old[0], signal.SIGSTOP)
            rollback = master.popen("rollback")

            def begun(status: dict[str, Any]) -> bool:
                last = status["reloads"][-1]
                return (last["kind"], last["generation"]) == ("rollback", 1)

            assert master.wait_status(begun)["reloads"][-1]["outcome"] is None
            output, notes = rollback.communicate(timeout=60)
            assert rollback.returncode == 0, notes
            assert "generation 1 serves again" in output
            assert "note: 1 of its 2 workers serve, since worker 1 could not be activated" in notes
            load.nothing_lost()
        master.output.wait_for("generation-short .*run a reload to move to the new code")
        master.output.wait_for("worker-ended generation=1 worker=1 ")
        assert master.worker_pids() == [old[1]]
        assert master.current()["workers_missing"] == 1
        with Client(master.port) as client:
            client.come_to("1")
        master.stop()


@pytest.mark.parametrize("strategy", ["rolling", "replace"])
def test_a_strategy_that_comes_too_late_for_what_is_staged_is_told(application, strategy: str) -> None:
    with supervised("shop:app", "--workers", "2", cwd=application("1")) as master:
        application("2")
        stage(master)
        done = master.command("promote", "--strategy", strategy)
        assert done.returncode == 0, done.stderr
        assert (
            f"note: all its workers run already: it takes over at once, and not by strategy {strategy}"
            in done.stderr
        )
        assert "generation 2 serves" in done.stdout
        master.stop()


def test_the_private_sockets_speak_plain_http_also_where_the_public_speaks_tls(application, tmp_path) -> None:
    import trustme

    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "pem"))
    with supervised("shop:app", "--ssl-certfile", str(tmp_path / "pem"), cwd=application("1")) as master:
        application("2")
        _, sockets = stage(master)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(sockets[0])
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = b""
            while data := client.recv(4096):
                answer += data
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n\r\n2")
        master.stop()


def test_what_is_parked_and_what_was_rolled_back_is_known_after_an_upgrade_of_the_master(application) -> None:
    with supervised("shop:app", *KEEP, cwd=application("1")) as master, Client(master.port) as client:
        old = master.worker_pids()
        application("2")
        master.reload("--wait", "drained")
        master.command("rollback")
        master.told(are_parked(2))
        assert master.command("upgrade").returncode == 0
        document = master.status()
        assert states(document) == {1: "active", 2: "parked"}
        assert [each["outcome"] for each in document["reloads"]] == ["ok", "rolled back", "ok"]
        assert master.worker_pids() == old
        assert master.command("rollback", "2").returncode == 0
        client.come_to("2")
        master.stop()


def test_a_staged_generation_outlives_an_upgrade_of_the_master(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master, Client(master.port) as client:
        application("2")
        number, sockets = stage(master)
        assert master.command("upgrade").returncode == 0
        assert states(master.status()) == {1: "active", number: "staged"}
        assert Path(sockets[0]).exists()
        assert master.command("promote").returncode == 0
        client.come_to("2")
        master.stop()


def test_the_endpoints_do_the_same(application) -> None:
    with supervised("shop:app", *KEEP, cwd=application("1")) as master, Client(master.port) as client:
        application("2")
        code, staged = master.call("POST", f"{HOT}/stage")
        assert (code, staged["outcome"], staged["generation"]) == (200, "ok", 2)
        assert all(os.path.exists(probe["socket"]) for probe in staged["probes"])
        code, promoted = master.call("POST", f"{HOT}/promote?generation=2&until=drained")
        assert (code, promoted["generation"], promoted["drained"]) == (200, 2, True)
        assert client.get("/")[2] == b"2"
        code, document = master.call("POST", f"{HOT}/rollback?wait=0")
        assert code == 202
        code, document = master.call("GET", f"{HOT}/operations/{document['id']}?wait=60")
        assert (document["outcome"], document["generation"]) == ("ok", 1)
        code, discarded = master.call("POST", f"{HOT}/discard?generation=2")
        assert (code, discarded["outcome"]) == (200, "ok")
        printed = json.loads(master.command("stage", "--json").stdout)
        assert printed["probes"][0]["worker"] == 1
        master.stop()


def test_a_bind_that_was_dropped_is_there_again_after_a_rollback(application, tmp_path) -> None:
    directory = application("1")
    settings = directory / "segue.toml"
    old, new = tmp_path / "old.sock", tmp_path / "new.sock"
    settings.write_text(f'bind = ["unix:{old}"]\n')
    with supervised("shop:app", *KEEP, cwd=directory, bind=False) as master:
        settings.write_text(f'bind = ["unix:{new}"]\n')
        master.reload("--wait", "drained")
        assert master.command("rollback").returncode == 0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(old))
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        assert [listener["address"] for listener in master.status()["listeners"]] == [f"unix:{old}"]
        master.stop()


def test_a_killed_master_is_followed_by_one_that_watches_on_and_can_roll_back(application) -> None:
    from test_takeover import on_a_port, taken_over

    flags = ("shop:app", "--probation", "600", "--park-for", "600")
    directory = application("1")
    with on_a_port(*flags, cwd=directory) as (master, port), Client(port) as client:
        old = master.worker_pids()
        application("2")
        master.reload("--wait", "drained")
        with taken_over(master, *flags, cwd=directory, port=port) as again:
            document = again.wait_status(lambda s: states(s) == {1: "parked", 2: "active"})
            assert document["probation"]["generation"] == 2
            os.kill(again.worker_pids()[0], 9)  # the first after its promote: it is on probation still
            again.output.wait_for("promoted generation=1 previous=2")
            assert again.worker_pids() == old
            history = [(each["kind"], each["outcome"]) for each in again.status()["reloads"]]
            assert history == [("reload", "ok"), ("reload", "rolled back"), ("rollback", "ok")]
            again.stop()
        client.close()

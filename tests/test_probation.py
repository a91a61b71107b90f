"""A new generation is watched for a while: one that crashes, or answers with 5xx, is taken back by itself."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scenario import HOT, ROOT, Client, Load, Segue, environment, supervised

LOAD = ("--keepalive", "20", "--newconn", "4", "--sse", "2")

CODE = """
    import os
    import segue

    VERSION = "{version}"
    BAD = {bad!r}
    answered = 0

    @segue.reject_if_draining
    async def marked(scope, receive, send):
        await answer(send, 200)

    async def answer(send, status):
        headers = [(b"content-length", b"1"), (b"x-version", VERSION.encode())]
        await send({{"type": "http.response.start", "status": status, "headers": headers}})
        await send({{"type": "http.response.body", "body": VERSION.encode()}})

    async def app(scope, receive, send):
        global answered
        if scope["type"] != "http":
            raise NotImplementedError
        if scope["path"] == "/exit":
            os._exit(7)
        if scope["path"] == "/marked":
            await marked(scope, receive, send)
        elif scope["path"] == "/sse":
            await send({{"type": "http.response.start", "status": 200, "headers": [(b"x-version", VERSION.encode())]}})
            await send({{"type": "http.response.body", "body": b"data: done\\n\\n"}})
        else:
            answered += 1
            await answer(send, 500 if BAD and answered % BAD == 0 else 200)
"""
"""Every request number BAD is answered with 500; 0: none."""


@pytest.fixture
def shop(application) -> Any:
    """Write version `version`, of which every `bad`th answer is a 500."""
    return lambda version, bad=0: application(code=CODE.format(version=version, bad=bad))


@contextlib.contextmanager
def reloading(master: Segue, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`segue reload --wait probation` beside the test; ended with it."""
    command = [sys.executable, "-m", "segue.supervisor.cli", "reload", "--wait", "probation", *arguments]
    process = subprocess.Popen(
        [*command, "--runtime-dir", master.runtime_dir, "--name", master.name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(port: int, path: str = "/") -> int:
    """One request on a connection of its own; its status, 0 if there was no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def test_a_crash_on_probation_takes_the_previous_generation_back(shop) -> None:
    with (
        supervised("shop:app", "--probation", "600", cwd=shop("1")) as master,
        Client(master.port) as client,
    ):
        pids, port = master.worker_pids(), master.port
        shop("2")
        with reloading(master) as reload:
            master.output.wait_for("promoted generation=2")
            client.come_to("2")
            ask(port, "/exit")
            said = reload.communicate(timeout=60)
        assert reload.returncode == 4, said
        assert "rolled back: worker 1 exited with 7" in said[1]
        assert master.worker_pids() == pids
        with Client(port) as other:
            assert other.get("/")[2] == b"1"
        master.output.wait_for("rolled-back .*exited with 7")
        told = master.wait_notified("STATUS", "generation 1 serves; generation 2 was rolled back: .*")
        assert "exited with 7" in told["STATUS"]
        document = master.status()
        assert document["probation"] is None
        history = [(each["kind"], each["asked_by"], each["outcome"]) for each in document["reloads"]]
        assert history[-1] == ("rollback", "probation", "ok")
        assert history[-2][::2] == ("reload", "rolled back")
        taken_back = document["reloads"][-2]["rolled_back"]
        assert taken_back["to"] == 1
        assert "exited with 7" in taken_back["reason"]
        assert taken_back["at"] >= document["reloads"][-2]["ended"]
        assert "rolled back" in master.command("status").stdout
        master.stop()


def test_too_many_5xx_on_probation_take_it_back_under_load(shop) -> None:
    with supervised(
        "shop:app", "--workers", "2", "--no-access-log", "--probation", "600", cwd=shop("1")
    ) as master:
        with Load(master.port, *LOAD) as load:
            shop("2", bad=2)
            with reloading(master) as reload:
                said = reload.communicate(timeout=60)
            assert reload.returncode == 4, said
            assert "5xx" in said[1]
            tally = load.finish()
        assert set(tally["failures"]) <= {"non_2xx"}  # those of the bad code itself
        assert not any(tally["server_closes"].values())
        master.stop()


def test_a_good_generation_passes(shop) -> None:
    with supervised("shop:app", "--probation", "1", cwd=shop("1")) as master, Client(master.port) as client:
        shop("2")
        done = master.reload("--wait", "probation")
        assert "has passed its probation" in done.stdout
        client.come_to("2")
        reload = master.status()["reloads"][-1]
        assert (reload["outcome"], reload["probation"]) == ("ok", "passed")
        master.stop()


def test_a_probation_that_another_generation_came_before_was_not_passed(shop) -> None:
    with supervised("shop:app", "--probation", "600", cwd=shop("1")) as master:
        shop("2")
        with reloading(master) as reload:
            master.output.wait_for("promoted generation=2")
            shop("3")
            master.reload()
            said = reload.communicate(timeout=60)
        assert reload.returncode == 0, said
        assert "generation 2 served until another one took over, before its probation was over" in said[0]
        master.stop()


def test_without_probation_nothing_is_watched(shop) -> None:
    with supervised("shop:app", "--probation", "0", cwd=shop("1")) as master:
        shop("2")
        done = master.reload("--wait", "probation")
        assert "generation 2 serves, and is on no probation" in done.stdout
        with Client(master.port) as client:
            client.come_to("2")
        ask(master.port, "/exit")
        master.output.wait_for("worker-active generation=2 worker=2")
        assert master.status()["current"] == 2
        master.stop()


def test_a_generation_that_is_no_worse_than_the_one_before_passes(shop) -> None:
    with supervised("shop:app", "--probation", "3", cwd=shop("1", bad=2)) as master:
        with Client(master.port) as client:
            for _ in range(60):
                client.get("/")
            shop("2", bad=2)
            with reloading(master) as reload:
                master.output.wait_for("promoted generation=2")
                for _ in range(60):
                    client.get("/")
                said = reload.communicate(timeout=60)
            assert reload.returncode == 0, said
        master.stop()


def test_a_few_answers_say_nothing(shop) -> None:
    with supervised("shop:app", "--probation", "2", cwd=shop("1")) as master:
        shop("2", bad=1)
        with Client(master.port) as client, reloading(master) as reload:
            master.output.wait_for("promoted generation=2")
            client.come_to("2")
            for _ in range(18):
                assert client.get("/")[0] == 500
            said = reload.communicate(timeout=60)
        assert reload.returncode == 0, said
        master.stop()


def test_what_segue_itself_refuses_does_not_count(shop) -> None:
    with supervised("shop:app", "--probation", "8", cwd=shop("1")) as master:
        shop("2")
        with Client(master.port) as client, reloading(master) as reload:
            master.output.wait_for("promoted generation=2")
            client.come_to("2")
            told = master.command("drain", "start", "--mode", "reject")
            assert told.returncode == 0, told.stderr
            for _ in range(40):
                assert client.get("/marked", method="POST")[0] == 503
            master.command("drain", "stop")
            said = reload.communicate(timeout=60)
        assert reload.returncode == 0, said
        master.stop()


def test_the_watch_is_shown_while_it_lasts(shop) -> None:
    with supervised("shop:app", "--probation", "600", cwd=shop("1")) as master:
        shop("2")
        master.reload()
        with Client(master.port) as client:
            client.come_to("2")
            for _ in range(30):
                client.get("/")
        document = master.wait_status(lambda s: s["probation"]["responses"] >= 30)
        assert document["probation"]["generation"] == 2
        assert document["probation"]["previous"] == 1
        assert document["probation"]["errors"] == 0
        assert "(probation, " in master.command("status").stdout
        code, _ = master.call("POST", f"{HOT}/reload?until=probation&wait=0.1")
        assert code == 504
        master.stop()


def test_the_endpoint_answers_with_the_outcome_of_the_probation(shop) -> None:
    directory = shop("1")
    settings = directory / "segue.toml"
    settings.write_text("probation = 1\n")
    with supervised("shop:app", cwd=directory) as master:
        shop("2")
        code, document = master.call("POST", f"{HOT}/reload?until=probation")
        assert (code, document["probation"]) == (200, "passed")
        settings.write_text("probation = 600\n")
        shop("3", bad=1)
        code, document = master.call("POST", f"{HOT}/reload?wait=0")
        master.output.wait_for("promoted generation=3")
        with Client(master.port) as client:
            client.come_to("3")
            for _ in range(40):
                client.get("/")
        target = f"{HOT}/operations/{document['id']}?until=probation&wait=60"
        code, document = master.call("GET", target)
        assert (document["outcome"], document["state"]) == ("rolled back", "rolled back")
        master.stop()


def test_a_generation_that_is_staged_is_on_probation_once_it_is_promoted(shop) -> None:
    with supervised("shop:app", "--probation", "600", cwd=shop("1")) as master:
        shop("2")
        assert master.command("stage").returncode == 0
        assert master.status()["probation"] is None
        assert master.command("promote").returncode == 0
        with Client(master.port) as client:
            client.come_to("2")
        ask(master.port, "/exit")
        master.output.wait_for("promoted generation=1 previous=2")
        assert master.status()["current"] == 1
        assert [each["outcome"] for each in master.status()["reloads"]] == ["ok", "ok", "rolled back", "ok"]
        master.stop()


def test_a_worker_that_is_killed_from_outside_counts_as_a_crash(shop) -> None:
    import os

    with supervised("shop:app", "--workers", "2", "--probation", "600", cwd=shop("1")) as master:
        shop("2")
        master.reload()
        os.kill(master.worker_pids()[0], 9)
        master.output.wait_for("promoted generation=1 previous=2")
        document = master.wait_status(lambda s: s["current"] == 1)
        assert "SIGKILL" in document["reloads"][-1]["reason"]
        assert len(master.worker_pids()) == 2
        master.stop()


def test_a_rollback_by_hand_is_on_no_probation(shop) -> None:
    with supervised("shop:app", "--probation", "600", cwd=shop("1", bad=1)) as master:
        shop("2")
        master.reload()
        assert master.command("rollback").returncode == 0
        with Client(master.port) as client:
            for _ in range(40):
                client.get("/")
        assert master.status()["current"] == 1
        assert master.status()["probation"] is None
        master.stop()


def test_the_path_of_the_code_does_not_matter(shop, tmp_path: Path) -> None:
    """Changed in place: the old code is gone from the disk, and its processes serve again all the same."""
    with supervised("shop:app", "--probation", "600", cwd=shop("1")) as master:
        for path in tmp_path.glob("code/*.py"):
            path.write_text("")
        shop("2", bad=1)
        with Client(master.port) as client:
            master.reload()
            client.come_to("2")
            for _ in range(60):
                client.get("/")
            master.output.wait_for("promoted generation=1 previous=2")
            client.come_to("1")
        master.stop()

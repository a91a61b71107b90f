"""A reload is invisible to clients, and tells its outcome to everyone who asked."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
import time
from typing import Any

import pytest
from scenario import DEADLINE_S, HOT, Client, Load, Segue, supervised

LOAD = ("--keepalive", "20", "--post", "5", "--newconn", "4", "--sse", "2")


@pytest.mark.parametrize("workers", [1, 2])
def test_reloads_under_load_lose_nothing(application, workers) -> None:
    with supervised("shop:app", "--workers", str(workers), "--no-access-log", cwd=application("1")) as master:
        with Load(master.port, *LOAD) as load:
            for version in range(2, 7):
                application(str(version))
                master.reload()
                master.wait_answered(30)
            master.wait_status(lambda s: len(s["generations"]) == 1)
            tally = load.nothing_lost()
        assert set(tally["versions"]) == {"1", "2", "3", "4", "5", "6"}
        master.stop()


@pytest.mark.parametrize("http", ["httptools", "h11"])
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_every_parser_and_loop_moves_connections_under_load(application, http, loop) -> None:
    with supervised(
        "shop:app", "--http", http, "--loop", loop, "--no-access-log", cwd=application("1")
    ) as master:
        with Load(master.port, *LOAD) as load:
            for version in range(2, 5):
                application(str(version))
                master.reload()
            load.nothing_lost()
        master.stop()


def test_one_connection_lives_across_generations(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master, Client(master.port) as client:
        assert client.get("/")[2] == b"1"
        for version in ("2", "3", "4"):
            application(version)
            master.reload("--wait", "drained")
            assert client.get("/")[2] == version.encode()
        master.stop()


def test_sighup_reloads(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master, Client(master.port) as client:
        application("2")
        master.signal(signal.SIGHUP)
        master.output.wait_for(r"promoted generation=2")
        master.wait_status(lambda s: len(s["generations"]) == 1)
        assert client.get("/")[2] == b"2"
        master.stop()


BROKEN = {
    "import": ("import nosuchmodule\n", "nosuchmodule"),
    "syntax": ("def (:\n", "SyntaxError"),
    "exception": ("raise RuntimeError('the database is down')\n", "the database is down"),
    "exit": ("import os; os._exit(9)\n", "exited with 9"),
    "sys-exit": ("import sys; sys.exit('no licence')\n", "no licence"),
    "signal": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n", "SIGSEGV"),
    "attribute": ("raise SystemExit(0)\n", ""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_deploy_is_refused_with_its_reason_and_the_old_generation_serves(application, kind) -> None:
    prelude, reason = BROKEN[kind]
    with supervised("shop:app", cwd=application("1")) as master, Client(master.port) as client:
        pids = master.worker_pids()
        application("2", prelude=prelude)
        refused = master.command("reload")
        assert refused.returncode == 1
        assert reason in refused.stderr
        assert client.get("/")[2] == b"1"
        assert master.worker_pids() == pids
        reload = master.status()["reloads"][-1]
        assert reload["outcome"] == "refused"
        assert reason in reload["reason"] + reload["output"]
        master.stop()


LIFESPAN = """
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            {body}
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise RuntimeError('no broker')", "no broker"),
        ("await send({'type': 'lifespan.startup.failed', 'message': 'no broker'})", "no broker"),
        ("import asyncio; await asyncio.sleep(3600)", "ready-timeout"),
        ("import time; time.sleep(3600)", "ready-timeout"),
    ],
    ids=["exception", "failed", "hang", "blocked"],
)
def test_a_failed_start_up_is_refused(application, body, reason) -> None:
    directory = application("1")
    with supervised("shop:app", cwd=directory) as master, Client(master.port) as client:
        if reason == "ready-timeout":
            (directory / "segue.toml").write_text("ready-timeout = 3\n")
        application(code=LIFESPAN.format(body=body))
        refused = master.command("reload")
        assert refused.returncode == 1
        assert reason in refused.stderr
        assert client.get("/")[2] == b"1"
        master.wait_status(lambda s: len(s["generations"]) == 1)
        master.stop()


def test_a_failed_warm_up_is_refused(application) -> None:
    code = """
        async def app(scope, receive, send):
            if scope["type"] == "http":
                status = 500 if scope["path"] == "/warm" else 200
                await send({"type": "http.response.start", "status": status, "headers": []})
                await send({"type": "http.response.body", "body": b"x"})
    """
    with supervised("shop:app", "--warm-up", "/warm", cwd=application("1")) as master:
        application(code=code)
        refused = master.command("reload")
        assert refused.returncode == 1
        assert "/warm" in refused.stderr
        assert "500" in refused.stderr
        master.stop()


def test_every_asker_gets_the_outcome_of_the_reload_that_covers_it(application, tmp_path) -> None:
    """Requests that come while a reload runs are merged into one following reload."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    slow = f"import os\nif os.path.exists({str(gate)!r}): open({str(gate)!r}).read()\n"
    application("1")
    with supervised("shop:app", cwd=tmp_path / "code") as master:
        application("2", prelude=slow)
        answers: list[tuple[int, dict[str, Any]]] = []

        def ask() -> None:
            answers.append(master.call("POST", f"{HOT}/reload"))

        first = threading.Thread(target=ask)
        first.start()
        master.output.wait_for(r"worker-spawned generation=2")
        others = [threading.Thread(target=ask) for _ in range(5)]
        for thread in others:
            thread.start()
        master.wait_status(lambda s: sum(r["phase"] == "queued" for r in s["reloads"]) == 5)
        with gate.open("w") as opened:  # once it is read: generation 2 has its code
            application("3")
            opened.write("go")
        for thread in [first, *others]:
            thread.join()
        assert [code for code, _ in answers] == [200] * 6
        assert sorted(document["generation"] for _, document in answers) == [2, 3, 3, 3, 3, 3]
        assert len({document["id"] for _, document in answers}) == 6
        master.stop()


@pytest.mark.parametrize("verb", ["reload", "rollback"])
def test_whoever_connects_after_the_answer_meets_the_new_generation(application, verb) -> None:
    with supervised("shop:app", "--workers", "4", cwd=application("1")) as master:
        version = "1"
        for number in range(2, 8):
            if verb == "reload" or number == 2:
                application(str(number))
            code, document = master.call("POST", f"{HOT}/{'reload' if number == 2 else verb}")
            assert code == 200, document
            version = {"reload": str(number), "rollback": str(2 - number % 2)}[verb]
            for _ in range(4):
                with Client(master.port) as client:
                    assert client.get("/")[2] == version.encode()
        master.stop()


def test_an_old_worker_that_hangs_does_not_hold_up_the_answer_for_long(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        [old] = master.worker_pids()
        application("2")
        os.kill(old, signal.SIGSTOP)
        code, document = master.call("POST", f"{HOT}/reload")
        assert (code, document["phase"]) == (200, "serving")
        assert document["phases"]["quieting"] >= 1.9
        assert master.status()["generations"][0]["workers"][0]["state"] == "quieting"
        os.kill(old, signal.SIGCONT)
        master.stop()


def test_no_wait_returns_an_operation_to_poll(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        code, document = master.call("POST", f"{HOT}/reload?wait=0")
        assert code == 202
        code, document = master.call("GET", f"{HOT}/operations/{document['id']}?wait=60&until=drained")
        assert (code, document["outcome"], document["drained"]) == (200, "ok", True)
        assert {"prepare", "boot", "activate"} <= set(document["phases"])
        assert master.command("reload", "--no-wait").returncode == 0
        master.wait_status(lambda s: s["current"] == 3)
        master.stop()


def test_a_wait_that_ends_too_early_says_what_became_of_it(application, tmp_path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with supervised("shop:app", cwd=application("1")) as master:
        application("2", prelude=f"open({str(gate)!r}).read()\n")
        code, document = master.call("POST", f"{HOT}/reload?wait=0.1")
        assert code == 504
        assert document["operation"]["phase"] in {"prepare", "boot"}
        late = master.command("reload", "--timeout", "0.1")
        assert late.returncode == 6
        with gate.open("w"):  # generation 2 has its code
            application("3")
        master.wait_status(lambda s: s["current"] == 3)
        master.stop()


def test_the_application_directory_is_resolved_anew(tmp_path) -> None:
    """`current -> releases/2`: a release is deployed by moving a link."""
    for number in ("1", "2"):
        release = tmp_path / "releases" / number
        release.mkdir(parents=True)
        (release / "shop.py").write_text(
            "import os\nasync def app(scope, receive, send):\n"
            "    if scope['type'] == 'http':\n"
            "        await send({'type': 'http.response.start', 'status': 200, 'headers': []})\n"
            "        await send({'type': 'http.response.body', 'body': os.getcwd().encode()})\n"
        )
    current = tmp_path / "current"
    current.symlink_to("releases/1")
    with (
        supervised("shop:app", cwd=current, env={"PWD": str(current)}) as master,
        Client(master.port) as client,
    ):
        assert client.get("/")[2] == str(tmp_path / "releases" / "1").encode()
        (tmp_path / "next").symlink_to("releases/2")
        (tmp_path / "next").rename(current)
        master.reload()
        master.wait_status(lambda s: len(s["generations"]) == 1)
        assert client.get("/")[2] == str(tmp_path / "releases" / "2").encode()
        master.stop()


def test_settings_are_read_again(application) -> None:
    directory = application("1")
    settings = directory / "segue.toml"
    settings.write_text('workers = 1\nheader = ["X-Shop: one"]\n')
    with supervised("shop:app", cwd=directory) as master, Client(master.port) as client:
        assert client.get("/")[1]["x-shop"] == "one"
        settings.write_text('workers = 2\nheader = ["X-Shop: two"]\n')
        master.reload("--wait", "drained")
        assert client.get("/")[1]["x-shop"] == "two"
        assert len(master.worker_pids()) == 2
        settings.write_text("workers = 'many'\n")
        refused = master.command("reload")
        assert refused.returncode == 1
        assert "workers" in refused.stderr
        assert "segue.toml" in refused.stderr
        assert len(master.worker_pids()) == 2
        master.stop()


def test_what_only_a_restart_can_change_is_named(application) -> None:
    directory = application("1")
    settings = directory / "segue.toml"
    settings.write_text("workers = 1\n")
    with supervised("shop:app", cwd=directory) as master:
        settings.write_text('admin = "127.0.0.1:1"\n')
        done = master.reload()
        assert "admin" in done.stderr
        master.stop()


def test_a_changed_bind_opens_the_new_listener_and_closes_the_old(application, tmp_path) -> None:
    directory = application("1")
    settings = directory / "segue.toml"
    old, new = tmp_path / "old.sock", tmp_path / "new.sock"
    settings.write_text(f'bind = ["unix:{old}"]\n')
    with supervised("shop:app", "--park-for", "1", "--probation", "0", cwd=directory, bind=False) as master:
        settings.write_text(f'bind = ["unix:{new}"]\n')
        master.reload("--wait", "drained")
        assert [listener["address"] for listener in master.status()["listeners"]] == [f"unix:{new}"]
        master.wait_status(lambda s: len(s["generations"]) == 1)
        assert not old.exists()
        assert new.exists()
        master.stop()
        assert not new.exists()


def test_several_old_generations_drain_at_once(application, tmp_path) -> None:
    with supervised("shop:app", cwd=application("1")) as master, Client(master.port) as witness:
        clients = []
        for version in ("2", "3", "4"):
            witness.come_to(str(int(version) - 1))
            client = Client(master.port)
            client.connection.request("GET", f"/sse?until={tmp_path}/enough")
            response = client.connection.getresponse()
            response.read(9)
            clients.append((client, response))
            application(version)
            master.reload()
        states = [generation["state"] for generation in master.status()["generations"]]
        assert states.count("draining") == 3
        assert states.count("active") == 1
        (tmp_path / "enough").touch()
        for client, response in clients:
            assert response.read().endswith(b"data: done\n\n")
            client.close()
        master.wait_status(lambda s: len(s["generations"]) == 1)
        master.stop()


def test_a_reload_under_sigstop_of_nothing_leaks_no_descriptor(application) -> None:
    with supervised("shop:app", "--probation", "0", cwd=application("1")) as master:
        master.reload("--wait", "drained")

        def descriptors() -> int:
            return len(os.listdir(f"/proc/{master.process.pid}/fd"))

        before = descriptors()
        for _ in range(5):
            master.reload("--wait", "drained")
        deadline = time.monotonic() + DEADLINE_S
        while (now := descriptors()) > before:  # who asked has gone, which is noticed in a moment
            assert time.monotonic() < deadline, (before, now)
            select.select([], [], [], 0.02)
        master.stop()


def test_the_status_document_has_its_keys_from_the_start(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        document = master.told()
        for key in (
            "draining",
            "services_initialized",
            "hsp",
            "mcp",
            "metrics",
            "generations",
            "master",
            "reloads",
            "listeners",
        ):
            assert key in document
        generation = document["generations"][0]
        assert {"id", "state", "since", "fingerprint", "workers"} <= set(generation)
        worker = generation["workers"][0]
        for key in ("pid", "state", "rss_bytes", "cpu_percent", "connections", "requests_total", "in_flight"):
            assert worker[key] is not None
        assert {"pid", "started", "version", "rss_bytes"} <= set(document["master"])
        assert {"number", "asked_by", "outcome", "reason", "phases"} <= set(document["reloads"][0])
        assert json.loads(master.command("status", "--json").stdout)["current"] == 1
        table = master.command("status").stdout
        assert "active" in table
        assert str(worker["pid"]) in table
        master.stop()


def test_a_first_start_that_fails_exits_with_3_and_says_why(application) -> None:
    from scenario import NotStarted

    directory = application("1", prelude="import nosuchmodule\n")
    master = Segue("shop:app", cwd=directory)
    try:
        with pytest.raises(NotStarted) as caught:
            master.wait_ready()
        assert caught.value.status == 3
        assert "nosuchmodule" in caught.value.output
    finally:
        master.close()

"""How one generation takes over from another: all at once, one worker after the other, or the old one first."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from scenario import HOT, Client, Load, Segue, supervised

LOAD = ("--keepalive", "20", "--post", "5", "--newconn", "4", "--sse", "2")
REPLACE = ("--strategy", "replace", "--replace-timeout", "30")
PATIENT = ("--keepalive", "20", "--post", "5", "--newconn", "4", "--sse", "0", "--timeout", "60")
"""While one generation makes room for the next, clients wait for as long as a start takes."""


def workers_of(master: Segue) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(master.process.pid).children():
        try:
            if "segue.worker" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


class Census:
    """Counts the workers that live, as often as it can, until it is asked for the most that there were."""

    def __init__(self, master: Segue) -> None:
        self.most = 0
        self._master, self._ended = master, threading.Event()
        self._thread = threading.Thread(target=self._count)

    def _count(self) -> None:
        while not self._ended.wait(0.01):
            self.most = max(self.most, len(workers_of(self._master)))

    def __enter__(self) -> Census:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def test_rolling_replaces_one_worker_at_a_time_and_loses_nothing(application) -> None:
    with supervised(
        "shop:app", "--workers", "3", "--strategy", "rolling", "--no-access-log", "--park-for", "0",
        cwd=application("1"),
    ) as master:  # fmt: skip
        with Load(master.port, "--keepalive", "20", "--post", "5", "--newconn", "4", "--sse", "0") as load:
            with Census(master) as census:
                application("2")
                master.reload("--wait", "drained")
            master.wait_answered()
            tally = load.nothing_lost()
        assert set(tally["versions"]) == {"1", "2"}
        assert 4 <= census.most <= 5  # one more than serve, and one that has just left
        assert len(master.worker_pids()) == 3
        master.stop()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_replace_never_runs_two_generations_and_fails_no_request(application, workers) -> None:
    """What holds a lock for as long as it lives, as a model does with a GPU's memory."""
    prelude = (
        "import fcntl, os\n"
        "lock = open(os.path.join(os.path.dirname(__file__), 'gpu'), 'w')\n"
        "async def start():\n"
        "    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)\n"
    )
    with supervised(
        "shop:app", "--workers", workers, *REPLACE, "--no-access-log", cwd=application("1", prelude=prelude)
    ) as master:
        with Load(master.port, *PATIENT) as load:
            with Census(master) as census:
                application("2", prelude=prelude)
                master.reload()
            master.wait_answered()
            tally = load.nothing_lost()
        assert census.most <= int(workers) + 1  # and the throw-away process of the check
        assert set(tally["versions"]) == {"1", "2"}
        master.stop()


def test_replace_refuses_what_cannot_be_imported_and_touches_nothing(application) -> None:
    with supervised("shop:app", *REPLACE, cwd=application("1")) as master, Client(master.port) as client:
        pids = master.worker_pids()
        application("2", prelude="import nosuchmodule\n")
        done = master.command("reload")
        assert done.returncode == 1
        assert "nosuchmodule" in done.stderr
        assert master.worker_pids() == pids
        assert client.get("/")[2] == b"1"
        master.stop()


def releases(application: Any, tmp_path: Path, version: str, prelude: str = "") -> Path:
    """A release in a directory of its own, to which `current` leads: the old code stays where it is."""
    directory = tmp_path / "releases" / version
    directory.mkdir(parents=True)
    code = application(version, prelude=prelude) / "shop.py"
    (directory / "shop.py").write_text(code.read_text())
    link = tmp_path / "next"
    link.symlink_to(directory)
    link.rename(tmp_path / "current")
    return tmp_path / "current"


def test_a_rolling_reload_that_fails_half_way_rolls_back(application, tmp_path) -> None:
    flag = tmp_path / "started"
    prelude = (
        "import os\n"
        f"if os.path.exists({str(flag)!r}): raise RuntimeError('the second one fails')\n"
        f"open({str(flag)!r}, 'w').close()\n"
    )
    current = releases(application, tmp_path, "1")
    with supervised(
        "shop:app", "--workers", "2", "--strategy", "rolling", "--no-access-log",
        cwd=current, env={"PWD": str(current)},
    ) as master:  # fmt: skip
        with Load(master.port, *LOAD) as load:
            releases(application, tmp_path, "2", prelude=prelude)
            done = master.command("reload")
            assert done.returncode == 1
            assert "the second one fails" in done.stderr
            master.wait_status(
                lambda s: (
                    s["current"] == 1
                    and len(s["generations"]) == 1
                    and sum(w["state"] == "active" for w in s["generations"][0]["workers"]) == 2
                )
            )
            load.nothing_lost()
        master.stop()


def test_replace_starts_the_old_code_again_if_the_new_one_does_not_start(application, tmp_path) -> None:
    current = releases(application, tmp_path, "1")
    with supervised(
        "shop:app", *REPLACE, "--no-access-log", cwd=current, env={"PWD": str(current)}
    ) as master:
        with Load(master.port, *PATIENT) as load:
            code = "async def fail(scope, receive, send):\n    raise RuntimeError('no GPU')\n"
            releases(application, tmp_path, "2", prelude=code)
            path = tmp_path / "releases" / "2" / "shop.py"
            path.write_text(path.read_text() + "\n\nreal, app = app, None\n"
                "async def app(scope, receive, send):\n"
                "    if scope['type'] == 'lifespan':\n"
                "        await receive()\n"
                "        raise RuntimeError('no GPU')\n"
                "    await real(scope, receive, send)\n")  # fmt: skip
            done = master.command("reload")
            assert done.returncode == 1
            assert "no GPU" in done.stderr
            tally = load.nothing_lost()
        assert set(tally["versions"]) == {"1"}
        document = master.wait_status(lambda s: s["ready"])
        assert document["current"] == 1
        master.stop()


def test_the_strategy_can_be_chosen_for_one_reload(application) -> None:
    with supervised("shop:app", "--workers", "2", cwd=application("1")) as master:
        application("2")
        master.reload("--strategy", "rolling")
        assert master.status()["current"] == 2
        with Census(master) as census:
            application("3")
            master.reload("--strategy", "replace")
        assert census.most <= 5
        assert master.status()["current"] == 3
        for query in ("strategy=blue", "canary=-1", "canary=1&strategy=replace"):
            code, problem = master.call("POST", f"{HOT}/reload?{query}")
            assert (code, problem["status"]) == (400, 400)
        assert master.command("reload", "--strategy", "blue").returncode == 2
        master.stop()


def test_what_cannot_run_twice_cannot_be_staged(application) -> None:
    with supervised("shop:app", *REPLACE, cwd=application("1")) as master:
        done = master.command("stage")
        assert done.returncode == 1
        assert "replace" in done.stderr
        master.stop()


def canary(status: dict[str, Any]) -> bool:
    """Whether one serves: it has been told to, and has confirmed."""
    if not any(generation["state"] == "mixed" for generation in status["generations"]):
        return False
    return any(worker["state"] == "active" for worker in status["generations"][-1]["workers"])


def test_a_canary_serves_beside_the_old_generation_and_then_all_do(application) -> None:
    with supervised(
        "shop:app", "--workers", "2", "--canary", "1", "--canary-for", "10", "--no-access-log",
        cwd=application("1"),
    ) as master:  # fmt: skip
        with Load(master.port, *LOAD) as load:
            application("2")
            begun = time.time()
            code, document = master.call("POST", f"{HOT}/reload?wait=0")
            assert code == 202
            status = master.wait_status(canary)
            assert [g["state"] for g in status["generations"]] == ["active", "mixed"]
            assert status["current"] == 1
            watch = status["probation"]
            assert (watch["generation"], watch["previous"], watch["breach"]) == (2, 1, "")
            assert begun < watch["until"] - 10 <= time.time()
            new = status["generations"][1]["workers"]
            assert sum(worker["state"] == "active" for worker in new) == 1
            code, document = master.call("GET", f"{HOT}/operations/{document['id']}?wait=60")
            assert (document["outcome"], "canary" in document["phases"]) == ("ok", True)
            assert document["phases"]["canary"] >= 10
            tally = load.nothing_lost()
        versions = tally["versions"]
        assert versions["2"]["first"] < versions["1"]["last"]  # side by side
        assert master.status()["current"] == 2
        master.stop()


def test_a_bad_canary_is_found_out_before_all_serve(application) -> None:
    with supervised(
        "shop:app", "--workers", "2", "--canary", "1", "--canary-for", "600", cwd=application("1")
    ) as master:
        application("2")
        _, document = master.call("POST", f"{HOT}/reload?wait=0")
        workers = master.wait_status(canary)["generations"][1]["workers"]
        os.kill(next(worker["pid"] for worker in workers if worker["state"] == "active"), 9)
        _, document = master.call("GET", f"{HOT}/operations/{document['id']}?wait=60")
        assert document["outcome"] == "refused"
        assert "SIGKILL" in document["reason"]
        status = master.wait_status(lambda s: len(s["generations"]) == 1)
        assert status["current"] == 1
        with Client(master.port) as client:
            assert client.get("/")[2] == b"1"
        master.stop()


def test_a_promote_ends_a_canary_and_a_discard_gives_it_up(application) -> None:
    with supervised(
        "shop:app", "--workers", "2", "--canary", "1", "--canary-for", "600", cwd=application("1")
    ) as master:
        for version, verb in (("2", "discard"), ("3", "promote")):
            application(version)
            master.call("POST", f"{HOT}/reload?wait=0")
            master.wait_status(canary)
            begun = time.monotonic()
            done = master.command(verb)
            assert done.returncode == 0, done.stderr
            assert time.monotonic() - begun < 60
        assert master.status()["current"] == 3
        master.stop()

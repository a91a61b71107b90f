"""An operator's drain over a whole instance: every generation, every worker, those that live and those to come."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scenario import DEADLINE_S, HOT, Client, Segue, supervised

APP = """
import json, os
from fastapi import Depends, FastAPI, Request
import segue

app = FastAPI()


@app.get("/ping")
async def ping():
    return "pong"


@app.post("/orders/{number}", dependencies=[Depends(segue.reject_if_draining)])
async def order(number: int, request: Request):
    body = await request.body()
    with open("served", "a") as log:
        log.write(f"{number}\\n")
    return {"number": number, "size": len(body), "pid": os.getpid()}
"""


@contextlib.contextmanager
def running(directory: Path, *flags: str, workers: int = 2) -> Iterator[Segue]:
    (directory / "orders.py").write_text(APP)
    held = ("--queue-timeout", "600")  # for as long as a test takes
    with supervised("orders:app", "--workers", str(workers), *held, *flags, cwd=directory) as master:
        yield master
        master.stop()


class Orders:
    """Orders on connections of their own, each waiting for its answer in a thread."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.answers: dict[int, tuple[int, dict[str, str], Any]] = {}
        self._threads: list[threading.Thread] = []

    def place(self, number: int, size: int = 100_000) -> None:
        """Send it whole: a stop may close the connection on what is sent later."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2 * DEADLINE_S)
        connection.request("POST", f"/orders/{number}", body=b"x" * size)
        thread = threading.Thread(target=self._wait_for, args=(number, connection))
        thread.start()
        self._threads.append(thread)

    def _wait_for(self, number: int, connection: http.client.HTTPConnection) -> None:
        response = connection.getresponse()  # a stop closes the connection after it
        self.answers[number] = response.status, dict(response.getheaders()), json.loads(response.read())
        connection.close()

    def wait(self) -> dict[int, tuple[int, dict[str, str], Any]]:
        for thread in self._threads:
            thread.join(2 * DEADLINE_S)
        assert len(self.answers) == len(self._threads)
        return self.answers


def waiting(document: dict[str, Any]) -> int:
    """Requests that are held, over all generations."""
    return sum(
        worker["queue"]["waiting"]
        for generation in document["generations"]
        for worker in generation["workers"]
        if worker.get("queue")
    )


def test_held_requests_are_served_in_order_after_the_drain_also_by_a_generation_that_was_replaced(
    tmp_path: Path,
) -> None:
    with running(tmp_path, workers=1) as master:
        assert master.command("drain", "start", "--mode", "queue").returncode == 0
        orders = Orders(master.port)
        for number in range(10):
            orders.place(number)
            master.wait_status(lambda document, number=number: waiting(document) == number + 1)
        master.reload()
        # from now on whoever connects comes to the new generation
        document = master.told(lambda s: s["generations"][0]["workers"][0]["mode"] == "draining")
        assert document["draining"] is True
        assert waiting(document) == 10
        for number in range(10, 20):
            orders.place(number)
            master.wait_status(lambda document, number=number: waiting(document) == number + 1)
        with Client(master.port) as client:
            assert client.json("/ping") == "pong"
        assert not (tmp_path / "served").exists()
        assert master.command("drain", "stop").returncode == 0
        answers = orders.wait()
        assert {code for code, _, _ in answers.values()} == {200}
        assert {document["size"] for _, _, document in answers.values()} == {100_000}
        assert len({document["pid"] for _, _, document in answers.values()}) == 2
        served = [int(line) for line in (tmp_path / "served").read_text().split()]
        assert [number for number in served if number < 10] == list(range(10))
        assert [number for number in served if number >= 10] == list(range(10, 20))


def test_a_drain_survives_respawn_and_reload_and_rejects_what_is_marked(tmp_path: Path) -> None:
    with running(tmp_path) as master:
        assert master.command("drain", "start").returncode == 0
        os.kill(master.worker_pids()[0], signal.SIGKILL)
        master.output.wait_for("worker-active")
        master.reload()
        assert master.call("GET", "/readyz")[0] == 503
        for _ in range(8):
            with Client(master.port) as client:
                code, headers, body = client.get("/orders/1", method="POST")
                assert (code, headers["content-type"]) == (503, "application/problem+json")
                assert int(headers["retry-after"]) > 0
                assert "draining" in json.loads(body)["detail"]
                assert client.get("/ping")[0] == 200
        assert master.command("drain", "stop").returncode == 0
        with Client(master.port) as client:
            assert client.get("/orders/1", method="POST")[0] == 200


def test_the_limit_of_the_queue_is_a_setting(tmp_path: Path) -> None:
    with running(tmp_path, "--queue-limit", "2", workers=1) as master:
        assert master.command("drain", "start", "--mode", "queue").returncode == 0
        orders = Orders(master.port)
        for number in range(2):
            orders.place(number)
            master.wait_status(lambda document, number=number: waiting(document) == number + 1)
        with Client(master.port) as client:
            code, _, body = client.get("/orders/3", method="POST")
        assert code == 503
        assert "2 requests wait already" in json.loads(body)["detail"]
        assert master.command("drain", "stop").returncode == 0
        assert {code for code, _, _ in orders.wait().values()} == {200}


def test_the_timeout_of_the_queue_is_a_setting(tmp_path: Path) -> None:
    with running(tmp_path, "--queue-timeout", "1.5", workers=1) as master:
        assert master.command("drain", "start", "--mode", "queue").returncode == 0
        orders = Orders(master.port)
        for number in range(2):
            orders.place(number)
        answers = orders.wait()
        assert {code for code, _, _ in answers.values()} == {503}
        assert "has waited for 1.5 s" in answers[0][2]["detail"]
        queue = master.told()["generations"][0]["workers"][0]["queue"]
        assert (queue["waiting"], queue["timed_out_total"]) == (0, 2)


@pytest.mark.parametrize("end", ["stop", "reject"])
def test_what_is_held_gets_an_answer_when_the_instance_stops_or_the_mode_changes(
    tmp_path: Path, end: str
) -> None:
    with running(tmp_path) as master:
        assert master.call("POST", f"{HOT}/drain/start?mode=queue")[0] == 200
        orders = Orders(master.port)
        for number in range(5):
            orders.place(number)
        master.wait_status(lambda document: waiting(document) == 5)
        if end == "stop":
            master.stop()
        else:
            assert master.call("POST", f"{HOT}/drain/start?mode=reject")[0] == 200
        assert {code for code, _, _ in orders.wait().values()} == {503}

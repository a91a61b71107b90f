"""Generations change, crash and are refused while messages come: each is handled, once, in order."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from hsp_harness import (
    FACTS,
    NOTHING,
    broker,
    configure,
    connected,
    dynamic_security,
    fact,
    persistent,
    publish,
    publisher,
    received,
    rights,
    serving,
    wait_received,
)
from scenario import Client, supervised


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize(("qos", "rate"), [(1, 200), (2, 100)])
def test_generations_change_under_load_with_nothing_lost_doubled_or_out_of_order(
    tmp_path: Path, version: str, qos: int, rate: int
) -> None:
    code = tmp_path / "code"
    with (
        broker(tmp_path) as server,
        serving(code, server, workers=2, mqtt_version=version, qos=qos) as master,
    ):
        with publisher(server, rate, qos) as published:
            for _ in range(4):
                master.reload()
                wait_received(code, received(code).count + 1)
        tally = wait_received(code, sum(published.sent))
        assert tally.verdict(published.sent) == NOTHING


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize(("qos", "rate"), [(1, 200), (2, 100)])
def test_a_worker_that_is_killed_loses_nothing(tmp_path: Path, version: str, qos: int, rate: int) -> None:
    code, kills = tmp_path / "code", 3
    with broker(tmp_path) as server, serving(code, server, mqtt_version=version, qos=qos) as master:
        with publisher(server, rate, qos) as published:
            for _ in range(kills):
                wait_received(code, received(code).count + 20)
                (pid,) = master.worker_pids()
                os.kill(pid, signal.SIGKILL)
                master.wait_status(
                    lambda document, pid=pid: (
                        connected(document)
                        and pid not in [w["pid"] for g in document["generations"] for w in g["workers"]]
                    )
                )
        tally = wait_received(code, sum(published.sent))
        verdict = tally.verdict(published.sent)
        assert (verdict["lost"], verdict["reordered"]) == (0, 0)
        # one that was written down and not yet remembered when its process was killed
        assert verdict["doubled"] <= kills


def test_a_new_generation_that_can_not_connect_is_refused_and_the_old_one_goes_on(tmp_path: Path) -> None:
    code = tmp_path / "code"
    with broker(tmp_path) as server, serving(code, server) as master:
        with publisher(server, 100) as published:
            configure(code, server, port=1)
            refused = master.command("reload")
            assert refused.returncode != 0
            assert "127.0.0.1:1" in refused.stderr
            assert "refused" in refused.stderr
            count = received(code).count
            assert wait_received(code, count + 1).count > count
            configure(code, server)
            master.reload()
        tally = wait_received(code, sum(published.sent))
        assert tally.verdict(published.sent) == NOTHING


def test_a_new_generation_whose_subscription_is_refused_does_not_begin(tmp_path: Path) -> None:
    code = tmp_path / "code"
    who: dict[str, Any] = {"username": "ann", "password": "right"}
    with (
        broker(tmp_path, *dynamic_security(tmp_path / "rights")) as server,
        serving(code, server, **who) as master,
    ):
        configure(code, server, filters=["secret/#"], **who)
        refused = master.command("reload")
        assert refused.returncode != 0
        assert "refuses the subscription to secret/#" in refused.stderr
        assert connected(master.status())
        configure(code, server, **who | {"password": "wrong"})
        refused = master.command("reload")
        assert refused.returncode != 0
        assert "refuses the connection" in refused.stderr
        assert connected(master.status())
        configure(code, server, **who)
        master.reload()


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [1, 2])
def test_a_new_generation_whose_subscription_is_granted_and_never_served_does_not_begin(
    tmp_path: Path, version: str, qos: int
) -> None:
    code = tmp_path / "code"
    who: dict[str, Any] = {"username": "ann", "mqtt_version": version, "qos": qos}
    not_served: list[tuple[dict[str, Any], str]] = [
        ({"username": "mute"}, "hsp/knowledge/facts/#"),
        ({"username": "deaf"}, "hsp/knowledge/facts/#"),
        ({"filters": ["hsp/knowledge/facts/#", "hsp/secret/#"]}, "hsp/secret/#"),
    ]
    acl = rights(tmp_path / "rights")
    with (
        broker(tmp_path, acl) as server,
        broker(tmp_path / "other", acl) as other,
        serving(code, server, workers=2, **who) as master,
    ):
        with publisher(server, 100, qos, user="ann") as published:
            for changed, denied in not_served:
                configure(code, server, **who | changed)
                refused = master.command("reload")
                assert refused.returncode != 0
                assert f"grants the subscription to {denied}, but does not serve it" in refused.stderr
                assert connected(master.status())
                count = received(code).count
                assert wait_received(code, count + 1).count > count
            # where the one that serves isn't, nobody can be asked: what the new one may tell itself says it
            configure(code, other, **who | {"username": "deaf"})
            refused = master.command("reload")
            assert refused.returncode != 0
            assert "grants the subscription to hsp/knowledge/facts/#" in refused.stderr
            configure(code, server, **who | {"filters": ["hsp/knowledge/#"]})
            master.reload()  # that is new, and served
        tally = wait_received(code, sum(published.sent))
        assert tally.verdict(published.sent) == NOTHING


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize(
    "changed",
    [{"filters": ["hsp/knowledge/#"]}, {"client_id_prefix": "other"}, {"ai_id": "gamma"}],
    ids=["filters", "client-id", "agent"],
)
def test_a_new_generation_that_is_set_otherwise_loses_doubles_and_reorders_nothing(
    tmp_path: Path, version: str, changed: dict[str, Any]
) -> None:
    code = tmp_path / "code"
    with (
        broker(tmp_path) as server,
        # so that there is something to go back to, however long it takes
        serving(code, server, workers=2, options=("--probation", "600"), mqtt_version=version) as master,
    ):
        with publisher(server, 200) as published:
            for more in (changed, {}, changed):
                configure(code, server, mqtt_version=version, **more)
                master.reload()
                wait_received(code, received(code).count + 50)
            assert master.command("rollback").returncode == 0
            wait_received(code, received(code).count + 50)
        tally = wait_received(code, sum(published.sent))
        assert tally.verdict(published.sent) == NOTHING


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_a_new_generation_at_another_broker_leaves_nothing_undone_at_the_old_one(
    tmp_path: Path, version: str
) -> None:
    code = tmp_path / "code"
    more: dict[str, Any] = {"mqtt_version": version, "drain_timeout_s": 20.0}
    with (
        broker(tmp_path / "one") as one,
        broker(tmp_path / "two") as two,
        serving(code, one, app="slow_app:app", **more) as master,
    ):
        numbers = range(200)
        asyncio.run(publish(one, *((f"{FACTS}/0", fact(number)) for number in numbers)))
        configure(code, two, **more)
        master.reload()
        asyncio.run(publish(two, *((f"{FACTS}/0", fact(number)) for number in range(200, 210))))
        assert wait_received(code, 210).seen == {0: list(range(210))}


def test_what_waits_for_the_broker_goes_on_over_a_new_generation(tmp_path: Path) -> None:
    directory, other, server = tmp_path / "code", tmp_path / "other", persistent(tmp_path / "broker")
    directory.mkdir()
    with server, serving(other, server, ai_id="beta"):
        pass  # from here on the broker keeps for beta what comes
    configure(directory, server, reconnect_cap_s=0.2)
    env = {"XDG_STATE_HOME": str(directory / "state"), "HOME": str(directory)}
    with supervised(cwd=directory, env=env) as master:
        client = Client(master.port)
        for number in range(3):
            body = json.dumps({"topic": "bench/0", "payload": {"topic": 0, "number": number}}).encode()
            status, _, data = client.get("/api/v1/hsp/facts", body, "POST")
            assert (status, json.loads(data)["waits_for_broker"]) == (202, True)
        client.close()
        master.reload("--wait", "drained")
        with server:
            master.wait_status(connected)
            shutil.rmtree(other)
            with serving(other, server, ai_id="beta"):
                assert wait_received(other, 3).seen == {0: [0, 1, 2]}
        master.stop(None)


def test_without_any_broker_a_new_generation_starts_and_connects_later(tmp_path: Path) -> None:
    code = tmp_path / "code"
    with broker(tmp_path) as server, serving(code, server, reconnect_cap_s=0.2) as master:
        server.kill()
        master.wait_status(lambda document: not connected(document))
        master.reload()
        server.start()
        master.wait_status(connected)
        assert master.command("reload", "hsp").returncode == 0

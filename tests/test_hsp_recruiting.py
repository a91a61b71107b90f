"""The barrier between generations: used where it can be had, and harmless wherever it breaks."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import aiomqtt
import pytest
from hsp_harness import (
    DEADLINE_S,
    FACTS,
    NOTHING,
    broker,
    configure,
    connected,
    fact,
    publish,
    publisher,
    received,
    serving,
    wait_received,
)

from bench.broker import Broker

RECRUITED = "event=hsp-recruited "
KINDS = [("5", 1, 200), ("3.1.1", 2, 100)]


async def _says_online(server: Broker) -> None:
    topic = "hsp/capabilities/advertisements/alpha"
    async with aiomqtt.Client("127.0.0.1", server.port) as client, asyncio.timeout(DEADLINE_S):
        await client.subscribe(topic, 1)
        async for message in client.messages:
            if json.loads(bytes(message.payload))["payload"]["availability_status"] == "online":
                return


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize(("qos", "rate"), [(1, 200), (2, 100)])
def test_generations_and_the_way_back_line_up_at_a_token(
    tmp_path: Path, version: str, qos: int, rate: int
) -> None:
    code = tmp_path / "code"
    with (
        broker(tmp_path) as server,
        serving(
            code,
            server,
            workers=2,
            app="patient_app:app",
            options=("--probation", "600"),  # so that there is something to go back to, however long it takes
            mqtt_version=version,
            qos=qos,
        ) as master,
    ):
        with publisher(server, rate, qos) as published:
            for number in range(3):
                master.reload()
                master.output.wait_for(RECRUITED, number + 1)
                wait_received(code, received(code).count + 20)
            assert master.command("rollback").returncode == 0
            master.output.wait_for(RECRUITED, 4)
        tally = wait_received(code, sum(published.sent))
        assert tally.verdict(published.sent) == NOTHING
        assert "hsp-no-cut" not in master.output.text
        master.wait_status(lambda document: document["metrics"]["hsp"].get("duplicates") == 0)


@pytest.mark.parametrize(
    ("fault", "kind"),
    list(
        zip(
            [
                "recruit-is-deaf",
                "recruit-has-opened",
                "recruit-is-ready",
                "recruit-is-at-the-cut",
                "recruit-has-lined-up",
                "recruit-is-activated",
                "old-has-stopped",
                "old-has-given-the-seat",
                "wrong-one-is-recruited",
            ],
            itertools.cycle(KINDS),
            strict=False,
        )
    ),
)
def test_where_lining_up_breaks_nothing_is_lost_doubled_or_out_of_order(
    tmp_path: Path, fault: str, kind: tuple[str, int, int]
) -> None:
    code = tmp_path / "code"
    version, qos, rate = kind
    with (
        broker(tmp_path) as server,
        serving(code, server, workers=2, app="hsp_fault_app:app", mqtt_version=version, qos=qos) as master,
    ):
        with publisher(server, rate, qos) as published:
            wait_received(code, 20)
            (code / "fault").write_text(fault)
            master.command("reload")  # a crash may take it back
            master.wait_status(lambda document: connected(document) and (code / f"fault.{fault}").exists())
            wait_received(code, received(code).count + 50)
            master.reload()
            wait_received(code, received(code).count + 50)
        tally = wait_received(code, sum(published.sent))
        assert tally.verdict(published.sent) == NOTHING
        asyncio.run(_says_online(server))


def test_a_retained_message_is_taken_once_over_generations_and_a_new_filter_gets_its_own(
    tmp_path: Path,
) -> None:
    code = tmp_path / "code"
    with broker(tmp_path) as server:
        asyncio.run(publish(server, (f"{FACTS}/0", fact(0)), ("sensors/now", fact(1)), retain=True))
        with serving(code, server, app="patient_app:app") as master:
            wait_received(code, 1)
            for number in range(2):
                master.reload()
                master.output.wait_for(RECRUITED, number + 1)
            configure(code, server, filters=["hsp/knowledge/facts/#", "sensors/#"])
            master.reload()
            wait_received(code, 2)
            master.reload()
            asyncio.run(publish(server, (f"{FACTS}/0", fact(2))))
            assert wait_received(code, 3).seen == {0: [0, 1, 2]}
            master.wait_status(lambda document: document["metrics"]["hsp"].get("duplicates") == 0)


def test_who_has_no_successor_leaves_at_once(tmp_path: Path) -> None:
    code = tmp_path / "code"
    with broker(tmp_path) as server, serving(code, server, workers=1) as master:
        master.stop()
        assert "hsp-no-cut" not in master.output.text
        assert RECRUITED not in master.output.text

"""Swaps of the connector under load: nothing lost, nothing twice, nothing out of order, on a real mosquitto."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hsp_harness import (
    FACTS,
    MARKS,
    NOTHING,
    Tally,
    agent,
    broker,
    fact,
    heard,
    publish,
    publisher,
    settings,
    until,
)

from segue.worker.backend.hsp.barrier import cut
from segue.worker.backend.hsp.envelope import ACKNOWLEDGEMENT, FACT, envelope
from segue.worker.backend.hsp.errors import BarrierError

pytestmark = MARKS


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize(("qos", "rate"), [(1, 300), (2, 150)])
@pytest.mark.parametrize("pause_every", [0, 100])
async def test_swaps_under_load_lose_double_and_reorder_nothing(
    tmp_path: Path, version: Any, qos: Any, rate: int, pause_every: int
) -> None:
    tally = Tally(pause_every=pause_every)
    with broker(tmp_path) as server:
        async with agent(settings(server, mqtt_version=version, qos=qos)) as alpha:
            alpha.current.on(FACT, tally)
            with publisher(server, rate, qos) as published:
                for _ in range(12):
                    report = await alpha.swap_whole()
                    assert "degraded" not in report
                    await tally.more()
            await tally.reach(sum(published.sent))
            assert tally.verdict(published.sent) == NOTHING
            assert alpha.current.metrics()["duplicates"] == 0
            assert alpha.current.metrics()["gaps"] == 0
            assert alpha.current._known.counts.swaps == 12


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize(("qos", "rate"), [(1, 400), (2, 150)])
@pytest.mark.parametrize("after", [False, True])
async def test_where_the_cut_fails_the_session_is_resumed_with_nothing_lost(
    tmp_path: Path, version: Any, qos: Any, rate: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing_cut(*arguments: Any) -> None:
        if after:  # both have stopped at the token already
            await cut(*arguments)
        raise BarrierError("a fault of this test")

    monkeypatch.setattr("segue.worker.backend.hsp.holder.cut", failing_cut)
    tally = Tally()
    with broker(tmp_path) as server:
        async with agent(settings(server, mqtt_version=version, qos=qos), tally) as alpha:
            with publisher(server, rate, qos) as published:
                for _ in range(12):
                    await alpha.swap()
                    await tally.more()
            await tally.reach(sum(published.sent))
            assert tally.verdict(published.sent) == NOTHING
            assert alpha.current.metrics()["gaps"] == 0


async def test_a_swap_with_nothing_changed_keeps_broker_identity_and_filters(tmp_path: Path) -> None:
    with broker(tmp_path) as server:
        wanted = settings(server, filters=("sensors/+/now", "hsp/knowledge/facts/#"), ai_id="gamma")
        async with agent(wanted) as alpha:
            tally = Tally()
            alpha.current.on(FACT, tally)
            await alpha.swap()
            assert alpha.current.settings == wanted
            assert alpha.current.ai_id == "gamma"
            await publish(server, ("sensors/7/now", fact(0)))
            await tally.reach(1)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_retained_messages_are_taken_once_over_swaps_and_new_filters_get_theirs(
    tmp_path: Path, version: Any
) -> None:
    tally = Tally()
    with broker(tmp_path) as server:
        await publish(server, (f"{FACTS}/0", fact(0)), retain=True)
        await publish(server, ("sensors/now", fact(1)), retain=True)
        async with agent(settings(server, mqtt_version=version), tally) as alpha:
            for _ in range(3):
                await alpha.swap()
            await publish(server, (f"{FACTS}/0", fact(2)))
            await tally.has(2)
            assert tally.seen[0] == [0, 2]
            filters = ("hsp/knowledge/facts/#", "sensors/#")
            await alpha.swap(settings(server, mqtt_version=version, filters=filters))
            await tally.has(1)
            await alpha.swap()
            await publish(server, (f"{FACTS}/0", fact(3)))
            await tally.has(3)
            assert tally.seen[0] == [0, 2, 1, 3]


async def test_publishes_in_flight_are_finished_before_the_old_connector_leaves(tmp_path: Path) -> None:
    arrived = Tally()
    with broker(tmp_path) as server:
        async with agent(settings(server, ai_id="beta")) as beta, agent(settings(server)) as alpha:
            beta.current.on(FACT, arrived)
            sent = 0
            done = asyncio.Event()

            async def speak() -> None:
                nonlocal sent
                while not done.is_set():
                    with alpha.service.lease() as leased:
                        await leased.publish_fact("bench/0", {"topic": 0, "number": sent})
                    sent += 1

            speaking = asyncio.create_task(speak())
            for _ in range(20):
                await alpha.swap()
            done.set()
            await speaking
            await arrived.reach(sent)
            assert arrived.verdict([sent]) == NOTHING


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_the_broker_can_be_changed_and_taken_away_with_nothing_lost(
    tmp_path: Path, version: Any
) -> None:
    tally = Tally()
    with broker(tmp_path / "one") as one, broker(tmp_path / "two") as two:
        async with agent(settings(one, mqtt_version=version)) as alpha:
            alpha.current.on(FACT, tally)
            with publisher(one, 200) as published:
                await tally.reach(21)
            await alpha.swap(settings(two, mqtt_version=version))
            await tally.reach(sum(published.sent))
            assert tally.verdict(published.sent) == NOTHING
            await publish(two, (f"{FACTS}/0", fact(100_000)))
            await tally.has(100_000)
            await alpha.swap_whole(settings(None))
            assert alpha.current.health()["kind"].startswith("embedded fallback")
            await publish(two, (f"{FACTS}/0", fact(100_001)))
            await alpha.current.publish_fact("bench/0", {"topic": 0, "number": 100_002})
            await tally.has(100_002)
            assert 100_001 not in tally.seen[0]


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_members_of_a_group_share_the_work_and_swap_with_nothing_lost_or_doubled(
    tmp_path: Path, version: Any
) -> None:
    tallies = [Tally(), Tally()]
    with broker(tmp_path) as server:
        wanted = [
            settings(server, ai_id=name, shared_group="all", mqtt_version=version) for name in ("one", "two")
        ]
        async with agent(wanted[0]) as one, agent(wanted[1]) as two:
            for each, tally in zip((one, two), tallies, strict=True):
                each.current.on(FACT, tally)
            with publisher(server, 200) as published:
                for each in (one, two) * 4:
                    await each.swap()
                    for tally in tallies:
                        await tally.more()
            await until(lambda: sum(tally.count for tally in tallies) >= sum(published.sent))
            both = Tally()
            for tally in tallies:
                assert tally.count > 0
                for topic, numbers in tally.seen.items():
                    both.seen.setdefault(topic, []).extend(numbers)
            verdict = both.verdict(published.sent)
            assert (verdict["lost"], verdict["doubled"]) == (0, 0)


async def test_a_task_that_runs_goes_on_over_swaps_and_its_result_arrives(tmp_path: Path) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def work(parameters: dict[str, Any]) -> dict[str, Any]:
        begun.set()
        await go.wait()
        return {"twice": parameters["number"] * 2}

    with broker(tmp_path) as server:
        # a swap that waited for the task would never come to an end
        lasting = settings(server, ai_id="beta", drain_timeout_s=3600.0)
        async with agent(settings(server)) as alpha, agent(lasting) as beta:
            beta.current.serve("double", work)
            asking = alpha.current.request_task("double", {"number": 21}, "beta", timeout_s=100)
            asked = asyncio.create_task(asking)
            await begun.wait()
            for _ in range(3):
                await beta.swap_whole()
            go.set()
            assert await asked == {"twice": 42}


async def test_what_is_not_acknowledged_is_asked_for_again_by_the_new_connector(tmp_path: Path) -> None:
    with broker(tmp_path) as server:
        retrying = settings(server, ack_timeout_s=0.5, ack_retries=20, breaker_failures=1000)
        async with agent(retrying) as alpha:
            old = alpha.current
            wants = old._letters.wants(True)
            letter = old._letters.letter(
                "hsp/elsewhere", envelope(FACT, {"number": 1}, sender="alpha", qos=wants)
            )
            await old._letters.outbox.post(letter)
            await alpha.swap_whole()  # until it is closed, the old one asks
            sent = await heard(server, "hsp/elsewhere", lambda: asyncio.sleep(0))
            assert sent["message_id"] == letter.id
            address = sent["qos_parameters"]["ack_address"]
            assert address != wants.ack_address
            payload = {"target_message_id": letter.id}
            ack = fact(0, message_type=ACKNOWLEDGEMENT, payload=payload, recipient_ai_id="alpha")
            await publish(server, (address, ack))
            await until(lambda: alpha.current.metrics()["pending_acks_count"] == 0)

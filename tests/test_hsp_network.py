"""Between the connector and the broker: slow, uneven, silent, reset. Whatever is going on, each message is handled once, in order."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from hsp_harness import (
    FACTS,
    MARKS,
    NOTHING,
    Proxy,
    Tally,
    agent,
    broker,
    fact,
    publish,
    publisher,
    settings,
    until,
)

import segue
from segue.worker.backend.hsp.barrier import cut
from segue.worker.backend.hsp.envelope import FACT, Envelope
from segue.worker.backend.hsp.errors import BarrierError
from segue.worker.backend.hsp.subscription import Subscription

pytestmark = [
    *MARKS,
    pytest.mark.parametrize("version", ["5", "3.1.1"]),
]


async def test_swaps_over_a_slow_and_uneven_network_keep_everything_in_order(
    tmp_path: Path, version: Any
) -> None:
    chance = random.Random(11)
    tally = Tally(pause_every=50)
    with broker(tmp_path) as server:
        async with (
            Proxy(server, lambda: chance.choice((0.0, 0.0, 0.002, 0.03))) as proxy,
            agent(
                settings(server, port=proxy.port, mqtt_version=version, connect_timeout_s=20.0), tally
            ) as alpha,
        ):
            with publisher(server, 200) as published:
                for _ in range(8):
                    await alpha.swap()
                    await tally.more()
            await tally.reach(sum(published.sent))
            assert tally.verdict(published.sent) == NOTHING
            assert alpha.current.metrics()["gaps"] == 0


async def test_connections_that_are_reset_at_any_moment_of_swaps_lose_double_and_reorder_nothing(
    tmp_path: Path, version: Any
) -> None:
    chance = random.Random(5)
    tally = Tally(pause_every=50)
    with broker(tmp_path) as server:
        async with (
            Proxy(server) as proxy,
            # one that is reset while it is made is waited for in vain; that it is refused then is a part of this
            agent(
                settings(server, port=proxy.port, mqtt_version=version, connect_timeout_s=3.0), tally
            ) as alpha,
        ):
            with publisher(server, 200) as published:
                refused = 0
                for number in range(60):
                    if refused and number >= 12:
                        break
                    swapping = asyncio.create_task(alpha.swap())
                    await proxy.another()
                    await asyncio.sleep(chance.uniform(0, 0.04))
                    proxy.reset()
                    try:
                        await swapping
                    except segue.SwapRefusedError:
                        refused += 1
                    await until(lambda: alpha.current.metrics()["is_connected"])
                    await tally.more()
            assert refused, "no swap was broken"
            await tally.reach(sum(published.sent))
            assert tally.verdict(published.sent) == NOTHING
            assert alpha.current.metrics()["gaps"] == 0


async def test_a_connector_with_a_backlog_can_be_swapped_again_and_again(
    tmp_path: Path, version: Any
) -> None:
    """What one has kept and not handled yet is before the token at which the next one begins."""
    tally = Tally(pause_every=1)
    sent = 0
    swapped = asyncio.Event()
    with broker(tmp_path) as server:

        async def keep_ahead() -> None:
            """By so many, however fast they are handled: each swap waits twice for all of them."""
            nonlocal sent
            async with aiomqtt.Client("127.0.0.1", server.port) as client:
                while not swapped.is_set():
                    if sent < tally.count + 60:
                        await client.publish(f"{FACTS}/0", fact(sent), 1)
                        sent += 1
                    else:
                        await asyncio.sleep(0.005)

        async with agent(settings(server, mqtt_version=version), tally) as alpha:
            publishing = asyncio.create_task(keep_ahead())
            for _ in range(5):
                await alpha.swap()
                await tally.more()
            swapped.set()
            await publishing
            await tally.reach(sent)
            assert tally.verdict([sent]) == NOTHING
            assert alpha.current.metrics()["gaps"] == 0


async def test_one_that_is_replaced_before_it_came_to_work_passes_on_what_waits_for_it(
    tmp_path: Path, version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()

    async def slow_cut(*arguments: Any) -> None:
        await go.wait()
        await cut(*arguments)

    monkeypatch.setattr("segue.worker.backend.hsp.holder.cut", slow_cut)
    tally = Tally()
    with broker(tmp_path) as server:
        async with agent(settings(server, mqtt_version=version), tally) as alpha:
            with publisher(server, 200) as published:
                for _ in range(3):  # the answer comes before the first one has left
                    await alpha.swap()
                await tally.more()
                go.set()
                holder = alpha.current._holder
                assert holder is not None
                await until(lambda: holder.subscription is not None)
                for _ in range(2):
                    await tally.more()
                    await alpha.swap()
            await tally.reach(sum(published.sent))
            assert tally.verdict(published.sent) == NOTHING
            assert alpha.current.metrics()["gaps"] == 0


async def test_a_connection_that_was_given_up_and_comes_to_be_all_the_same_takes_nothing_with_it(
    tmp_path: Path, version: Any
) -> None:
    tally = Tally()
    with broker(tmp_path) as server:
        async with Proxy(server) as proxy:
            async with agent(settings(server, port=proxy.port, mqtt_version=version), tally) as alpha:
                await publish(server, (f"{FACTS}/0", fact(0)))
                await tally.has(0)
                # its subscription connects again, but hears nothing, and it ends meanwhile
                holder = alpha.current._holder
                assert holder is not None
                subscription = holder.subscription
                assert subscription is not None
                proxy.silence()
                subscription._link._client._client._sock_close()  # type: ignore[union-attr]
                subscription._link._end("a fault of this test")
                await proxy.another()
                await publish(server, *((f"{FACTS}/0", fact(number)) for number in range(1, 6)))
                holder._keeping.cancel()  # type: ignore[union-attr]
                await asyncio.sleep(0)
                proxy.speak()
            async with agent(settings(server, mqtt_version=version), tally) as alpha:
                await publish(server, (f"{FACTS}/0", fact(6)))
                await tally.has(6)
                assert tally.seen[0] == list(range(7))
                assert alpha.current.metrics()["gaps"] == 0


async def test_a_handler_that_waits_keeps_its_order_when_its_connection_is_lost(
    tmp_path: Path, version: Any
) -> None:
    """What has arrived is handled to its end before the next connection begins."""
    seen: list[int] = []

    async def slow(message: Envelope) -> None:
        if "number" in message.payload:
            await asyncio.sleep(0.005)
            seen.append(message.payload["number"])

    with broker(tmp_path) as server:
        async with (
            Proxy(server) as proxy,
            agent(settings(server, port=proxy.port, mqtt_version=version)) as alpha,
        ):
            alpha.current.on(FACT, slow)
            count = 0
            for _ in range(5):
                messages = [(f"{FACTS}/0", fact(number)) for number in range(count, count + 30)]
                count += 30
                publishing = asyncio.create_task(publish(server, *messages))
                await alpha.swap()
                proxy.reset()
                await publishing
                await until(lambda: alpha.current.metrics()["is_connected"])
            await until(lambda: len(seen) >= count)
            assert seen == list(range(count))


async def test_a_swap_that_is_given_up_in_a_backlog_leaves_the_order_of_what_waits_alone(
    tmp_path: Path, version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mosquitto lets a message pass those that wait when one far behind is acknowledged before its turn."""
    seen: list[int] = []
    gate, left = asyncio.Semaphore(0), asyncio.Event()

    async def handle(message: Envelope) -> None:
        if "number" in message.payload:
            await gate.acquire()
            seen.append(message.payload["number"])

    with broker(tmp_path) as server:

        async def send(first: int, last: int) -> None:
            await publish(server, *((f"{FACTS}/0", fact(number)) for number in range(first, last)))

        async def cut_too_late(old: Any, _new: Any, topics: Any, mark: Any, _timeout_s: Any) -> None:
            await send(0, 100)
            await mark(topics.marker, b"too late")
            await send(100, 300)
            for _ in range(6):  # after which the broker has passed the token on
                gate.release()
            await until(lambda: len(seen) == 6)
            raise BarrierError("a fault of this test")

        async def stop_in_the_middle(subscription: Subscription) -> None:
            stopping = asyncio.create_task(stop(subscription))
            await asyncio.sleep(0)
            gate.release()  # the seventh, which was begun
            await stopping

        async def leave_later(subscription: Subscription) -> None:
            await send(300, 305)
            await leave(subscription)
            left.set()

        monkeypatch.setattr("segue.worker.backend.hsp.holder.cut", cut_too_late)
        stop, leave = Subscription.stop, Subscription.leave
        monkeypatch.setattr(Subscription, "stop", stop_in_the_middle)
        monkeypatch.setattr(Subscription, "leave", leave_later)
        async with agent(settings(server, mqtt_version=version), handle) as alpha:
            await alpha.swap()
            await left.wait()  # which takes longer than the answer waits
            for _ in range(400):
                gate.release()
            await until(lambda: len(seen) >= 305)
            assert seen == list(range(305))
            monkeypatch.undo()
            assert alpha.current.metrics()["gaps"] == 0

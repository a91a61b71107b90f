"""What can be wrong with a broker: the old connector goes on, whoever asked gets the reason, nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from hsp_harness import (
    FACTS,
    MARKS,
    NOTHING,
    Agent,
    Proxy,
    Tally,
    agent,
    broker,
    dynamic_security,
    fact,
    persistent,
    publish,
    publisher,
    rights,
    settings,
    until,
)
from paho.mqtt import MQTTException
from paho.mqtt.publish import single

import segue
from bench.broker import Broker
from bench.ports import free_port
from segue.worker.backend.hsp.envelope import FACT
from segue.worker.backend.hsp.errors import HSPError
from segue.worker.backend.hsp.settings import HSPSettings

pytestmark = MARKS


async def refused_under_load(server: Broker, good: HSPSettings, bad: HSPSettings, reason: str) -> str:
    """Swap to `bad`, which must be refused; the old one takes every message, and can be swapped afterwards."""
    tally = Tally()
    async with agent(good) as alpha:
        old = alpha.current
        old.on(FACT, tally)
        with publisher_as(server, good) as published:
            await tally.reach(1)
            with pytest.raises(segue.SwapRefusedError, match=reason) as refused:
                await alpha.swap(bad)
            assert alpha.current is old
            assert alpha.current.metrics()["is_connected"]
            await tally.more()
            await alpha.swap()
        await tally.reach(sum(published.sent))
        assert tally.verdict(published.sent) == NOTHING
    return str(refused.value)


@contextlib.contextmanager
def publisher_as(server: Broker, good: HSPSettings) -> Iterator[Any]:
    with publisher(server, 100, good.qos, user=good.username, password=good.password.reveal()) as published:
        yield published


# ---------------------------------------------------------------------------------------------- it can't be reached


@contextlib.contextmanager
def listening(behaviour: str) -> Iterator[int]:
    """A port behind which there is no broker: it is closed, closes, or says nothing."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if behaviour != "closed":
            listener.listen()
        if behaviour == "closing":
            import threading

            def close_all() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        listener.accept()[0].close()

            thread = threading.Thread(target=close_all, daemon=True)
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
        yield port


@pytest.mark.parametrize("behaviour", ["closed", "closing", "silent"])
async def test_a_swap_to_a_broker_that_does_not_answer_is_refused(tmp_path: Path, behaviour: str) -> None:
    with broker(tmp_path) as server, listening(behaviour) as port:
        good = settings(server)
        bad = settings(None, host="127.0.0.1", port=port, connect_timeout_s=0.5)
        await refused_under_load(server, good, bad, f"127.0.0.1:{port}")


# ------------------------------------------------------------------------------------------------------- it refuses


async def test_a_swap_with_a_wrong_password_is_refused_without_showing_it(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    passwords.touch()
    subprocess.run(["mosquitto_passwd", "-b", str(passwords), "ann", "right"], check=True)
    with broker(tmp_path, f"password_file {passwords}", "allow_anonymous false") as server:
        for version in ("5", "3.1.1"):
            more = {"username": "ann", "mqtt_version": version}
            good = settings(server, password=segue.Secret("right"), **more)
            bad = settings(server, password=segue.Secret("not-the-one"), **more)
            said = await refused_under_load(server, good, bad, "refuses the connection")
            assert "not-the-one" not in said


async def test_a_certificate_that_is_not_trusted_is_refused_and_a_trusted_one_serves(tmp_path: Path) -> None:
    ours, theirs = trustme.CA(), trustme.CA()
    certificate = ours.issue_cert("127.0.0.1")
    for name, blob in (
        ("ca", ours.cert_pem),
        ("other", theirs.cert_pem),
        ("key", certificate.private_key_pem),
    ):
        blob.write_to_path(str(tmp_path / name))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
    lines = [f"certfile {tmp_path / 'cert'}", f"keyfile {tmp_path / 'key'}"]
    with broker(tmp_path, *lines) as server:
        good = settings(server, tls=True, tls_ca=str(tmp_path / "ca"))
        tally = Tally()
        async with agent(good) as alpha:
            alpha.current.on(FACT, tally)
            old = alpha.current
            with publisher(server, 100, ca=str(tmp_path / "ca")) as published:
                for ca in (str(tmp_path / "other"), "", str(tmp_path / "missing")):
                    with pytest.raises(segue.SwapRefusedError, match=r"[Cc]ertificate"):
                        await alpha.swap(settings(server, tls=True, tls_ca=ca))
                    assert alpha.current is old
                await alpha.swap()
            await tally.reach(sum(published.sent))
            assert tally.verdict(published.sent) == NOTHING


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_subscription_that_the_broker_refuses_refuses_the_swap(tmp_path: Path, version: Any) -> None:
    with broker(tmp_path, *dynamic_security(tmp_path / "rights.json")) as server:
        more = {"username": "ann", "password": segue.Secret("right"), "mqtt_version": version}
        good = settings(server, **more)
        bad = settings(server, filters=("hsp/knowledge/facts/#", "secret/#"), **more)
        said = await refused_under_load(server, good, bad, "refuses the subscription to secret/#")
        assert "knowledge" not in said


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("name", ["mute", "deaf"])
async def test_a_subscription_that_is_granted_and_never_served_refuses_the_swap(
    tmp_path: Path, version: Any, qos: Any, name: str
) -> None:
    with broker(tmp_path, rights(tmp_path / "rights")) as server:
        good = settings(server, username="ann", mqtt_version=version, qos=qos)
        bad = settings(server, username=name, mqtt_version=version, qos=qos)
        await refused_under_load(
            server, good, bad, "grants the subscription to hsp/knowledge/facts/#, but does not serve it"
        )


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("what", ["filter", "broker"])
async def test_what_is_new_is_refused_if_it_is_granted_and_never_served(
    tmp_path: Path, version: Any, qos: Any, what: str
) -> None:
    """The old connector can't have been given it: what the broker has taken says so."""
    acl = rights(tmp_path / "rights")
    who: dict[str, Any] = {"username": "ann", "mqtt_version": version, "qos": qos}
    with broker(tmp_path, acl) as server, broker(tmp_path / "other", acl) as other:
        if what == "filter":
            bad = settings(server, filters=("hsp/knowledge/facts/#", "hsp/secret/#"), **who)
            denied = "hsp/secret/#"
        else:
            bad, denied = settings(other, **who | {"username": "deaf"}), "hsp/knowledge/facts/#"
        reason = f"grants the subscription to {denied}, but does not serve it"
        await refused_under_load(server, settings(server, **who), bad, reason)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_new_filter_and_another_broker_that_are_served_are_swapped_to(
    tmp_path: Path, version: Any, qos: Any
) -> None:
    acl, tally = rights(tmp_path / "rights"), Tally()
    who: dict[str, Any] = {"username": "ann", "mqtt_version": version, "qos": qos}
    with broker(tmp_path, acl) as server, broker(tmp_path / "other", acl) as other:
        good = settings(server, **who)
        async with agent(good, tally) as alpha:
            with publisher_as(server, good) as published:
                await tally.more()
                await alpha.swap(settings(server, filters=("hsp/knowledge/#",), **who))
            await alpha.swap(settings(other, **who))
            await tally.reach(sum(published.sent))
            assert tally.verdict(published.sent) == NOTHING


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_message_that_the_broker_refuses_is_told_to_who_publishes_it(
    tmp_path: Path, qos: Any
) -> None:
    with broker(tmp_path, rights(tmp_path / "rights")) as server:
        async with agent(settings(server, username="mute", qos=qos)) as alpha:
            with pytest.raises(HSPError, match="refuses the message: Not authorized"):
                await alpha.current.publish_fact("bench/0", {"number": 1})
            assert alpha.current.metrics()["unsent"] == 0


# ------------------------------------------------------------------------------------------------- it goes and comes


async def test_without_a_broker_messages_go_round_in_the_process_until_it_comes(tmp_path: Path) -> None:
    server, port = Broker(tmp_path / "broker"), free_port()
    own, others = Tally(), Tally()
    async with agent(settings(server, port=port)) as alpha:
        alpha.current.on(FACT, own)
        metrics = alpha.current.metrics()
        assert (metrics["is_connected"], metrics["fallback_enabled"]) == (False, True)
        assert alpha.current.health()["kind"].startswith("embedded fallback")
        assert str(port) in alpha.current.health()["reason"]
        for number in range(3):
            await alpha.current.publish_fact("bench/0", {"topic": 0, "number": number})
        await own.reach(3)
        # a swap changes nothing about it, and what waits goes on waiting
        await alpha.swap_whole()
        assert alpha.current.metrics()["unsent"] == 3
        with server:
            async with agent(settings(server, ai_id="beta"), others), Proxy(server, port=port):
                await others.reach(3)
                await until(lambda: alpha.current.metrics()["is_connected"])
                assert others.seen[0] == own.seen[0] == [0, 1, 2]
                assert alpha.current.metrics()["fallback_enabled"] is False
                await publish(server, (f"{FACTS}/0", fact(3)))
                await own.has(3)
                assert own.seen[0] == [0, 1, 2, 3]


async def insist(server: Broker, number: int) -> None:
    """Publish until the broker has acknowledged it, however often it goes away."""

    def publish_it() -> None:
        while True:
            with contextlib.suppress(OSError, MQTTException):
                single(f"{FACTS}/0", fact(number), 1, hostname="127.0.0.1", port=server.port)
                return

    await asyncio.to_thread(publish_it)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_broker_killed_at_any_moment_of_a_swap_loses_nothing(tmp_path: Path, version: Any) -> None:
    tally = Tally()
    server = persistent(tmp_path / "broker").start()
    chance = random.Random(7)
    try:
        # one whose broker dies while it is made is waited for in vain
        impatient = settings(server, mqtt_version=version, connect_timeout_s=3.0)
        async with agent(impatient, tally) as alpha:
            outcomes = []
            for number in range(0, 24, 4):
                await insist(server, number)
                swapping = asyncio.create_task(outcome_of(alpha))
                publishing = asyncio.create_task(insist(server, number + 1))
                await asyncio.sleep(chance.uniform(0, 0.03))
                server.kill()
                await insist_later(server, number + 2)
                await publishing
                outcomes.append(await swapping)
                await insist(server, number + 3)
                await until(lambda: alpha.current.metrics()["is_connected"])
                assert alpha.current.metrics()["gaps"] == 0
            await tally.reach(24)
            assert tally.verdict([24])["lost"] == tally.verdict([24])["doubled"] == 0
            assert any(outcomes), "no swap was refused: the broker was never killed in the middle"
    finally:
        server.kill()


async def outcome_of(alpha: Agent) -> str:
    old = alpha.current
    try:
        await alpha.swap()
    except segue.SwapRefusedError as refused:
        assert alpha.current is old
        return str(refused)
    return ""


async def insist_later(server: Broker, number: int) -> None:
    publishing = asyncio.create_task(insist(server, number))
    await asyncio.to_thread(server.start)
    await publishing


async def test_a_session_that_the_broker_has_lost_is_said_and_subscribed_to_anew(tmp_path: Path) -> None:
    tally = Tally()
    server = Broker(tmp_path / "broker").start()
    try:
        async with agent(settings(server)) as alpha:
            alpha.current.on(FACT, tally)
            server.kill()
            await until(lambda: not alpha.current.metrics()["is_connected"])
            assert "lost" in alpha.current.health()["reason"] or "refused" in alpha.current.health()["reason"]
            server.start()
            await until(lambda: alpha.current.metrics()["is_connected"])
            await publish(server, (f"{FACTS}/0", fact(1)))
            await tally.reach(1)
    finally:
        server.kill()


async def test_rubbish_is_counted_and_reported_and_harms_nothing(tmp_path: Path) -> None:
    tally = Tally()
    rubbish = [b"", b"\xff\xfe", b"[]", b"{", b"null", b"1" * 100, b"[" * 100_000, fact(0)[:-1]]
    rubbish += [fact(0, hsp_envelope_version="1.0"), fact(0, message_type="Fact"), fact(0, payload=[])]
    rubbish += [fact(0, timestamp_sent="yesterday"), fact(0, communication_pattern="shout")]
    rubbish += [fact(0, message_id=""), fact(0, sender_ai_id=None), fact(0, payload={"x": "y" * 300_000})]
    with broker(tmp_path) as server:
        async with agent(settings(server, max_message_bytes=200_000)) as alpha:
            alpha.current.on(FACT, tally)

            def fails(_: Any) -> None:
                raise RuntimeError("a handler that fails")

            alpha.current.on(FACT, fails)
            await publish(server, *((f"{FACTS}/0", each) for each in rubbish))
            await publish(server, (f"{FACTS}/0", fact(7)))
            await tally.reach(1)
            metrics = alpha.current.metrics()
            assert metrics["invalid"] == len(rubbish)
            assert metrics["handler_errors"] == 1
            problems = alpha.current.health()["problems"]
            assert f"{FACTS}/0" in {each["where"] for each in problems}
            assert "a handler that fails" in problems[-1]["reason"]
            await alpha.swap()
            assert alpha.current.metrics()["invalid"] == len(rubbish)


async def test_two_agents_of_one_name_do_not_take_the_subscription_from_each_other_for_ever(
    tmp_path: Path,
) -> None:
    with broker(tmp_path) as server:
        async with agent(settings(server)) as one, agent(settings(server)) as two:
            both = [one.current, two.current]
            await until(lambda: any("ai_id" in str(each.health()["reason"]) for each in both))
            await until(lambda: sorted(each.health()["ok"] for each in both) == [False, True])

"""The parts of HSP that need no broker: envelopes, topics, what is sent again, what is known already."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as paho
import pytest
from hsp_harness import fact
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion

from segue.worker.backend.hsp import envelope as envelopes
from segue.worker.backend.hsp import payloads
from segue.worker.backend.hsp.begun import Begun
from segue.worker.backend.hsp.breaker import Breakers
from segue.worker.backend.hsp.envelope import QoSParameters
from segue.worker.backend.hsp.errors import HSPError, InvalidMessageError, LinkError, RefusedError
from segue.worker.backend.hsp.outbox import Letter, Outbox
from segue.worker.backend.hsp.payloads import Advertisement, Capability, TaskRequest
from segue.worker.backend.hsp.peers import Peers
from segue.worker.backend.hsp.records import Records
from segue.worker.backend.hsp.seen import Seen
from segue.worker.backend.hsp.settings import HSPSettings
from segue.worker.backend.hsp.topics import Topics, matches

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --------------------------------------------------------------------------------------------------------- envelopes


def test_an_envelope_has_all_members_of_the_protocol_and_survives_the_way() -> None:
    message = envelopes.envelope(
        envelopes.FACT, {"it": "rains"}, sender="alpha", recipient="all", qos=QoSParameters(requires_ack=True)
    )
    document = json.loads(envelopes.encode(message))
    assert document.keys() == {
        "hsp_envelope_version",
        "message_id",
        "correlation_id",
        "sender_ai_id",
        "recipient_ai_id",
        "timestamp_sent",
        "message_type",
        "protocol_version",
        "communication_pattern",
        "qos_parameters",
        "payload_schema_uri",
        "payload",
    }
    assert envelopes.decode(envelopes.encode(message)) == message


def test_unknown_members_are_ignored_and_every_known_one_is_checked() -> None:
    assert envelopes.decode(fact(1, something="new")).message_id == "beta-1"
    good = json.loads(fact(1))
    for member, wrong in {
        "hsp_envelope_version": "1.0",
        "message_id": "",
        "sender_ai_id": "x" * 129,
        "timestamp_sent": "2026-01-01T00:00:00",  # of which zone?
        "message_type": "Fact_v0.1",
        "protocol_version": "2.0",
        "communication_pattern": "shout",
        "qos_parameters": {"priority": "highest"},
        "payload_schema_uri": 1,
        "payload": "text",
        "recipient_ai_id": 7,
        "correlation_id": "",
    }.items():
        with pytest.raises(InvalidMessageError, match=member):
            envelopes.decode(json.dumps(good | {member: wrong}).encode())
    for member in ("message_id", "sender_ai_id", "timestamp_sent", "message_type", "payload"):
        with pytest.raises(InvalidMessageError, match=member):
            envelopes.decode(json.dumps({key: good[key] for key in good if key != member}).encode())


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps).map(str.encode)
)
def test_whatever_comes_is_a_message_or_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(InvalidMessageError, match=r"\w"):
        envelopes.decode(data)


def test_what_no_receiver_would_take_is_not_sent() -> None:
    for payload in ({"x": object()}, {"x": float("nan"), "y": {1, 2}}, {"x": "y" * 300}):
        message = envelopes.envelope(envelopes.FACT, payload, sender="alpha")
        if payload.get("x") == "y" * 300:
            with pytest.raises(InvalidMessageError, match="more than 200"):
                envelopes.encode(message, 200)
        elif "y" not in payload:
            with pytest.raises(InvalidMessageError):
                envelopes.encode(message)
    with pytest.raises(InvalidMessageError, match="sender_ai_id"):
        envelopes.encode(envelopes.envelope(envelopes.FACT, {}, sender=""))


def test_payloads_that_an_agent_acts_on_are_checked() -> None:
    request = TaskRequest("1", "alpha", "add", {"a": 1}, "hsp/results")
    assert payloads.read(TaskRequest, payloads.written(request)) == request
    for wrong in ({}, payloads.written(request) | {"callback_address": "a/#"}, {"request_id": 1}):
        with pytest.raises(InvalidMessageError, match="payload"):
            payloads.read(TaskRequest, wrong)


def test_paho_has_what_is_reached_into() -> None:
    client = paho.Client(CallbackAPIVersion.VERSION2)
    names = ("_send_pubrec", "_handle_publish", "_handle_pubrel", "_handle_on_message", "_sock_close")
    for name in (*names, "_handle_pubrec", "_do_on_publish"):
        assert callable(getattr(client, name)), (
            f"paho has no {name} any more; see worker/backend/hsp/client.py"
        )
    assert isinstance(client._in_messages, dict)
    assert isinstance(client._out_messages, dict)
    assert isinstance(client._in_packet["packet"], bytearray)
    assert client._out_message_mutex


# ------------------------------------------------------------------------------------------------------------ topics


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+/c", "a/b/c", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("+", "a", True),
        ("a/b/c", "a/b", False),
    ],
)
def test_a_filter_takes_what_mqtt_says(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


def test_a_fact_is_published_below_its_place_and_nowhere_else() -> None:
    topics = Topics.of(HSPSettings(ai_id="alpha"), "i")
    assert topics.fact("weather/berlin") == "hsp/knowledge/facts/weather/berlin"
    for wrong in ("", "/x", "x/", "a//b", "a/+", "#", "$SYS", "a\0b", "x" * 201):
        with pytest.raises(ValueError, match="no topic"):
            topics.fact(wrong)


def test_settings_that_can_not_work_are_refused_with_what_is_wrong() -> None:
    for wrong, reason in (
        ({"ai_id": "a/b"}, "ai_id"),
        ({"topic_prefix": "a/#"}, "topic_prefix"),
        ({"topic_prefix": "$SYS"}, "topic_prefix"),
        ({"shared_group": "a/b"}, "shared_group"),
        ({"filters": ["a/#/b"]}, "filter"),
        ({"filters": ["a+"]}, "filter"),
        ({"tls_ca": "x"}, "tls"),
        ({"tls": True, "tls_key": "x"}, "tls_cert"),
        ({"qos": 0}, "0"),
        ({"mqtt_version": "4"}, "4"),
        ({"hosst": "x"}, "hosst"),
    ):
        with pytest.raises(msgspec.ValidationError, match=reason):
            msgspec.convert(wrong, HSPSettings)
    assert HSPSettings(host="h", tls=True).broker == "h:8883"
    assert HSPSettings(host="h").broker == "h:1883"


# --------------------------------------------------------------------------------------------------- what is sent again


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Line:
    """A broker for an outbox: there or not, and what it was given."""

    def __init__(self, **more: Any) -> None:
        self.up = True
        self.error: LinkError | None = None
        self.sent: list[str] = []
        self.local: list[str] = []
        self.clock = Clock()
        settings: dict[str, Any] = {
            "host": "h",
            "ack_timeout_s": 1.0,
            "ack_retries": 3,
            "outbox_limit": 5,
        } | more
        self.outbox = Outbox(
            HSPSettings(**settings),
            self.send,
            lambda: self.up,
            lambda letter: self.local.append(letter.id),
            self.clock,
        )

    async def send(self, letter: Letter) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append(letter.id)


def letter(topic: str = "t", requires_ack: bool = False) -> Letter:
    qos = QoSParameters(requires_ack=requires_ack)
    message = envelopes.envelope(envelopes.FACT, {}, sender="alpha", qos=qos)
    return Letter(topic, message, envelopes.encode(message))


async def test_what_is_not_acknowledged_is_sent_again_with_back_off_and_given_up_in_the_end() -> None:
    line, one = Line(), letter(requires_ack=True)
    reasons: list[str] = []
    times: list[float] = []
    one.given_up = reasons.append
    await line.outbox.post(one)
    for tick in range(1, 400):
        line.clock.now = tick / 10
        before = len(line.sent)
        await line.outbox.retry_once()
        if len(line.sent) > before:
            times.append(line.clock.now)
    assert times == [1.0, 3.0, 7.0]
    assert line.outbox.pending == 0
    assert line.outbox.unacknowledged == 1
    assert "sent 4 times" in reasons[0]


async def test_an_acknowledgement_ends_that() -> None:
    line, one = Line(), letter(requires_ack=True)
    await line.outbox.post(one)
    assert (line.outbox.pending, line.outbox.retrying) == (1, 0)
    line.clock.now = 1.5
    await line.outbox.retry_once()
    assert (line.outbox.pending, line.outbox.retrying) == (1, 1)
    assert line.outbox.acknowledged(one.id)
    assert not line.outbox.acknowledged(one.id)
    line.clock.now = 100
    await line.outbox.retry_once()
    assert line.sent == [one.id] * 2


async def test_who_never_acknowledges_is_left_alone_for_a_while_and_others_are_not() -> None:
    line = Line(breaker_failures=3, breaker_open_s=60.0, ack_retries=0)
    for _ in range(3):
        await line.outbox.post(letter("deaf", requires_ack=True))
        line.clock.now += 2
        await line.outbox.retry_once()
    with pytest.raises(HSPError, match="deaf does not acknowledge") as refused:
        await line.outbox.post(letter("deaf", requires_ack=True))
    assert refused.value.status == 503
    assert line.outbox.breakers.open == 1
    await line.outbox.post(letter("another", requires_ack=True))
    await line.outbox.post(letter("deaf"))  # nothing is owed for this one
    line.clock.now += 60
    one = letter("deaf", requires_ack=True)
    await line.outbox.post(one)
    line.outbox.acknowledged(one.id)
    assert line.outbox.breakers.open == 0


def test_a_breaker_lets_one_message_through_after_a_while() -> None:
    clock = Clock()
    breakers = Breakers(2, 10.0, clock)
    breakers.failed("a")
    assert breakers.allows("a")
    breakers.failed("a")
    assert not breakers.allows("a")
    clock.now = 10
    assert breakers.allows("a")
    assert not breakers.allows("a")
    breakers.succeeded("a")
    assert breakers.allows("a")


async def test_while_the_broker_is_away_messages_wait_in_order_and_are_delivered_here() -> None:
    line = Line()
    line.up = False
    letters = [letter() for _ in range(5)]
    for each in letters:
        await line.outbox.post(each)
    assert line.sent == []
    assert line.local == [each.id for each in letters]
    with pytest.raises(HSPError, match="5 messages wait") as full:
        await line.outbox.post(letter())
    assert full.value.status == 503
    line.up = True
    last = letter()
    line.outbox._unsent.popleft()
    await line.outbox.post(last)
    assert line.sent == [each.id for each in (*letters[1:], last)]


async def test_a_message_that_the_broker_refuses_is_told_and_keeps_no_other_waiting() -> None:
    line = Line()
    line.error = RefusedError("not authorized")
    with pytest.raises(HSPError, match="not authorized") as refused:
        await line.outbox.post(letter(requires_ack=True))
    assert refused.value.status == 502
    assert line.outbox.pending == 0
    line.up = False
    await line.outbox.post(letter())
    line.up = True
    await line.outbox.flush()
    assert (line.outbox.unsent, line.outbox.dropped) == (0, 1)


async def test_a_connection_lost_while_sending_keeps_the_message() -> None:
    line, one = Line(), letter()
    line.error = LinkError("lost")
    line.up = True
    posting = asyncio.create_task(line.outbox.post(one))
    await posting
    assert line.outbox.unsent == 1
    line.error = None
    await line.outbox.flush()
    assert line.sent == [one.id]


# -------------------------------------------------------------------------------------------------- what is known already


def test_the_window_of_known_messages_is_found_again_by_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "hsp" / "window"
    seen = Seen(3)
    seen.attach(path, 3)
    keys = [seen.key("beta", str(number)) for number in range(5)]
    for key in keys[:4]:
        assert seen.claim(key)
        seen.done(key)
    assert seen.claim(keys[4])  # begun, and not done
    assert not seen.claim(keys[3])
    after = Seen(3)  # as a process that was started after a kill -9: nobody has closed anything
    after.attach(path, 3)
    assert [after.claim(key) for key in keys[1:]] == [False, False, False, True]
    seen.detach()
    after.detach()


@pytest.mark.parametrize("content", [b"", b"rubbish", b"segueHSP" + b"\xff" * 100])
def test_a_window_that_can_not_be_read_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "window"
    path.write_bytes(content)
    seen = Seen(10)
    seen.attach(path, 10)
    key = seen.key("a", "b")
    assert seen.claim(key)
    seen.done(key)
    seen.detach()
    again = Seen(10)
    again.attach(path, 10)
    assert not again.claim(key)
    again.detach()


def test_without_a_place_for_its_file_the_window_works_in_this_process(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    seen = Seen(10)
    seen.attach(tmp_path / "file" / "window", 10)
    key = seen.key("a", "b")
    assert [seen.claim(key), seen.claim(key)] == [True, False]
    seen.release(key)
    assert seen.claim(key)


def test_the_best_of_the_agents_that_can_is_asked() -> None:
    peers = Peers(lambda: 1.0)
    add = (Capability("add"),)
    for name in ("slow", "failing", "fast", "gone"):
        peers.heard(Advertisement(name, add))
    peers.heard(Advertisement("other", (Capability("else"),)))
    peers.heard(Advertisement("gone", (), "offline"))
    peers.answered("slow", True, 2.0)
    peers.answered("fast", True, 0.1)
    peers.answered("failing", True, 0.01)
    peers.answered("failing", False, 0.01)
    peers.answered("nobody", True, 1.0)
    assert peers.able("add") == "fast"
    assert peers.able("nothing") is None
    assert [peer.ai_id for peer in peers.all()] == ["failing", "fast", "gone", "other", "slow"]
    assert peers.all()[2].capabilities == add


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def records(name: str) -> Records:
    return Records(HSPSettings(host="broker", ai_id=name), "worker")


@pytest.mark.usefixtures("state")
def test_who_comes_after_another_agent_of_the_service_is_told_what_that_one_has_handled() -> None:
    one = records("one")
    assert one.begin() is None
    one.end()
    one.close()
    two = records("two")
    assert two.begin() == one.window
    two.end()
    two.close()
    again = records("one")
    assert again.begin() == two.window
    assert again.begin() is None  # nobody was there since
    again.close()


@pytest.mark.usefixtures("state")
def test_two_agents_of_one_service_are_not_taken_for_one_after_the_other() -> None:
    for _ in range(2):
        one, two = records("one"), records("two")
        assert (one.begin(), two.begin()) == (None, None)
        for each in (one, two):
            each.end()
            each.close()


def test_what_another_agent_has_handled_is_known_and_known_to_the_next_process(tmp_path: Path) -> None:
    first, second, third = Seen(10), Seen(10), Seen(10)
    first.attach(tmp_path / "first", 10)
    key = Seen.key("beta", "1")
    first.claim(key)
    first.done(key)
    first.detach()
    second.attach(tmp_path / "second", 10)
    assert second.claim(Seen.key("beta", "2"))
    second.learn(tmp_path / "first")
    second.learn(tmp_path / "missing")
    assert not second.claim(key)
    second.detach()
    third.attach(tmp_path / "second", 10)
    assert not third.claim(key)
    third.detach()


# ------------------------------------------------------------------------------------------- what was begun


async def test_what_is_written_down_goes_with_the_end_of_the_work_and_else_is_there_for_the_next_process(
    tmp_path: Path,
) -> None:
    problems: list[str] = []
    begun, loop = Begun(lambda *said: problems.append(": ".join(said))), asyncio.get_running_loop()
    path = tmp_path / "hsp" / "agent"
    done, cancelled, unfinished = (loop.create_future() for _ in range(3))
    with pytest.raises(OSError, match="no place"):
        await begun.write(done, "one", b"1")
    assert begun.attach(path) == []
    for topic, work in (("one", done), ("two", cancelled), ("three", unfinished), ("one", done)):
        await begun.write(work, topic, b"\xff" + topic.encode())
    assert len(begun) == 3
    done.set_result(None)
    cancelled.cancel()
    await asyncio.sleep(0)
    (tmp_path / "hsp" / "agent.2.torn").touch()
    (tmp_path / "hsp" / "agent.1.task").write_bytes(b"rubbish")
    (tmp_path / "hsp" / "another.1.task").touch()
    left = Begun(print).attach(path)
    assert [(each.topic, each.payload) for each in left] == [("two", b"\xfftwo"), ("three", b"\xffthree")]
    assert [each.topic for each in begun.attach(path)] == ["two"], "the other one is its own"
    begun.until_done(left[0].path, None)
    unfinished.set_result(None)
    await asyncio.sleep(0)
    assert sorted(each.name for each in path.parent.iterdir()) == ["agent.1.task", "another.1.task"]
    assert problems == []

"""What processes say to each other is checked: whatever comes, it is dropped and logged, and nobody is harmed by it."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario import ROOT, Segue, environment, made_directory, supervised
from worker_harness import Bench

from segue.handoff import adoption, relay
from segue.handoff.messages import NotifyKey, WorkerMode
from segue.handoff.notify import Notifier, NotifySocket
from segue.supervisor import journal, memory
from segue.supervisor.instance import read_owner
from segue.supervisor.notices import malformed

anything = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20),
        st.sampled_from([2**63, -(2**63), 10**400, "1", 1e308]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=12), inner, max_size=6)
    ),
    max_leaves=12,
)  # fmt: skip
DEEP = b'{"set":' + b"[" * 100_000


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -------------------------------------------------------------------------------------------------------- datagrams


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*map(str, NotifyKey), "", "X"]),
        st.one_of(
            st.text(max_size=30),
            st.sampled_from(["nan", "inf", "-1", "1e999", "3", "ready", "parked", "import", "\x1b[31m"]),
        ),
    )
)
def test_a_notice_is_believed_only_if_it_can_be_so(fields: dict[str, str]) -> None:
    if malformed(fields):
        return
    assert 0 <= float(fields.get(NotifyKey.HANDOVER, "0")) < float("inf")
    assert fields.get(NotifyKey.STATE, "ready") in set(WorkerMode)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=200), min_size=1, max_size=8))
def test_each_datagram_is_received_whatever_is_in_it(messages: list[bytes]) -> None:
    path = os.path.join(made_directory("segue-m-"), "n")
    receiver = NotifySocket(path)
    before = descriptors()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            for message in messages:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sender.fileno()]))]
                sender.sendmsg([message], rights, 0, path)
        received = receiver.receive()
        assert [each.pid for each in received] == [os.getpid()] * len(messages)
        assert descriptors() == before
    finally:
        receiver.close()
        os.rmdir(os.path.dirname(path))


@pytest.mark.parametrize(
    "said", ["x" * 5_000_000, "€" * 9000, "a lone \ud800 surrogate", "\U0001f600" * 3000]
)
def test_a_reason_arrives_whatever_is_in_it_and_however_long_it_is(said: str) -> None:
    receiver = NotifySocket(os.path.join(made_directory("segue-f-"), "n"))
    sender = Notifier(receiver.path)
    try:
        assert sender.send({"X_SEGUE_FAILED": said, "STATUS": f"import: {said}"})
        (told,) = receiver.receive()
        assert told.fields["X_SEGUE_FAILED"].startswith(said[:7])
        assert told.fields["STATUS"].startswith("import: ")
    finally:
        sender.close()
        receiver.close()


def test_a_datagram_that_is_too_long_is_not_read_in_part() -> None:
    path = os.path.join(made_directory("segue-m-"), "n")
    receiver = NotifySocket(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"READY=1\n" + b"X" * 9000, path)
    assert [each.fields for each in receiver.receive()] == [{}]
    receiver.close()


NONSENSE = """
import os, socket

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    path = os.path.join(os.environ["NONSENSE"], "notify.sock")
    texts = [b"READY=1\\nX_SEGUE_HANDOVER=nan", b"X_SEGUE_STATE=" + b"x" * 5000, b"\\xff\\xfe=1", b"=", b"WATCHDOG",
             b"X_SEGUE_HANDOVER=1e999\\nREADY=1", b"X_SEGUE_PHASE=\\x1b[31m", b"READY=1\\n" + b"x" * 60000]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        for text in texts:
            sock.sendto(text, path)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"sent"})
"""


def test_a_worker_that_talks_nonsense_is_not_believed_and_the_master_says_so(application) -> None:
    runtime = made_directory("segue-m-")
    with supervised(
        "shop:app", "--lifespan", "off", cwd=application(code=NONSENSE), runtime_dir=runtime,
        env={"NONSENSE": os.path.join(runtime, "default")},
    ) as master:  # fmt: skip
        with socket.create_connection(("127.0.0.1", master.port), 60) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while client.recv(1000):
                pass
        master.output.wait_for("notification-malformed", count=3)
        assert "\x1b[31m" not in master.output.text
        master.reload()
        assert "Traceback" not in master.output.text
        master.stop()


# -------------------------------------------------------------------------------------------------------- the relay

headers = st.one_of(
    st.binary(max_size=300),
    st.just(DEEP[:15_000]),
    st.fixed_dictionaries(
        {
            "version": st.one_of(st.just(relay.VERSION), anything),
            "listener": st.one_of(st.text(max_size=20), anything),
            "keep_alive_ms": st.one_of(
                st.lists(
                    st.one_of(st.integers(), st.just(-1), st.just(5000), st.just(10**30)), max_size=4
                ),
                anything,
            ),
        }
    ).map(lambda value: json.dumps(value).encode()),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(headers, st.integers(0, 4))
def test_a_parcel_is_taken_whole_and_sound_or_dropped_with_its_descriptors(data: bytes, count: int) -> None:
    read, write = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = descriptors()
    try:
        fds = array.array("i", [read.fileno()] * count)
        write.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if count else [])
        assert 0 <= relay.needed_room(read, 10) <= relay.SCM_MAX_FD
        with contextlib.suppress(relay.MalformedParcelError, relay.RelayClosedError):
            parcel = relay.receive(read)
            assert parcel is not None
            assert len(parcel.fds) == len(parcel.header.keep_alive_ms) == count
            assert all(relay.NO_TIMER <= each < 2**40 for each in parcel.header.keep_alive_ms)
            relay.close_all(parcel.fds)
        assert descriptors() == before
    finally:
        read.close()
        write.close()


APP = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
"""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_worker_adopts_no_nonsense_and_goes_on_adopting(tmp_path: Path, loop: str) -> None:
    with Bench(tmp_path, APP) as bench:
        worker = bench.spawn(loop=loop).wait_ready().activate()
        pipe = os.pipe()
        datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        for data, fds in (
            (b"", [pipe[0]]),
            (b"no json", [pipe[0]]),
            (DEEP[:10_000], []),
            (relay_header("nobody", [-1]), [pipe[0]]),
            (relay_header("web", [-1, 5000]), [pipe[0], datagram.fileno()]),
            (relay_header("web", [10**30]), [pipe[0]]),
            (relay_header("web", [-1] * 1000), [pipe[0]]),
        ):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            bench.relay_write.sendmsg([data], rights)
        old = bench.client()
        assert old.ask("/").status == 200
        other = bench.spawn(loop=loop).wait_ready().activate()
        worker.hand_over()
        assert old.ask("/").status == 200
        assert other.status().adopted == 1
        assert other.stop() == 0
        assert worker.stop() == 0
        assert "Traceback" not in worker.output
        datagram.close()
        os.close(pipe[0])
        os.close(pipe[1])


def relay_header(listener: str, timers: list[int]) -> bytes:
    return json.dumps(
        {"version": relay.VERSION, "listener": listener, "keep_alive_ms": timers}
    ).encode()  # fmt: skip


# --------------------------------------------------------------------------------------------------------- adoption

members = dict.fromkeys(("pid", "start_time", "identity", "generation", "worker", "mode", "fingerprint", "listeners", "handover_s", "services_active", "lead", "versions", "operator_drain", "error", "epoch", "version"), anything)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.just(DEEP[:50_000]),
        st.fixed_dictionaries({}, optional=members).map(lambda value: json.dumps(value).encode()),
    ),
    st.integers(0, 3),
    st.booleans(),
)
def test_what_is_said_of_an_adoption_is_sound_or_dropped_with_its_descriptors(
    data: bytes, count: int, offer: bool
) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = descriptors()
    try:
        fds = array.array("i", [here.fileno()] * count)
        there.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if count else [])
        with contextlib.suppress(adoption.MalformedError, OSError):
            received = (adoption.receive_offer if offer else adoption.receive_acceptance)(here)
            if received is not None:
                adoption.close_all(received[1])
        assert descriptors() == before
    finally:
        here.close()
        there.close()


IMPOSTOR = """
import array, os, socket, sys
sys.path.insert(0, {root!r})
from segue.handoff import adoption
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.bind({path!r})
sock.listen()
print("listening", flush=True)
connection, _ = sock.accept()
connection.recvmsg(65536, 1000)
pipe = os.pipe()
connection.sendmsg([{data}], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pipe[0]] * {count}))])
sys.stdin.read()
"""
ACCEPTANCE = """adoption.msgspec.json.encode(adoption.Acceptance(
    version=1, pid=os.getpid(), start_time=adoption.start_time(os.getpid()), identity="", generation=1, worker=1,
    mode="active", fingerprint="", listeners=(adoption.ListenerInfo("x", "127.0.0.1:1", "inet", "127.0.0.1:1"),)))"""


@pytest.mark.parametrize(
    ("data", "count"), [("b'no json'", 3), ("b'[' * 50000", 1), (ACCEPTANCE, 3), (ACCEPTANCE, 1)]
)
def test_a_master_starts_beside_something_that_claims_to_be_a_worker(
    application, data: str, count: int
) -> None:
    runtime = made_directory("segue-m-")
    directory = Path(runtime, "default")
    directory.mkdir(mode=0o700)
    path = str(directory / "g1w1.adopt")
    script = IMPOSTOR.format(root=str(ROOT), path=path, data=data, count=count)
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
    ) as impostor:  # fmt: skip
        assert impostor.stdout is not None
        assert impostor.stdout.readline() == b"listening\n"
        with supervised("shop:app", cwd=application("1"), runtime_dir=runtime) as master:
            master.output.wait_for("not-adopted")
            assert "Traceback" not in master.output.text
            assert master.status()["ready"]
            master.stop()
        assert impostor.poll() is None
        impostor.communicate()


def test_a_worker_outlives_what_strangers_say_to_its_adoption_socket(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        path = os.path.join(master.directory, "g1w1.adopt")
        with contextlib.ExitStack() as stack:
            for _ in range(100):  # and say nothing
                stack.enter_context(dial(path))
            for data in (b"no json", DEEP[:50_000], offer(2**62, "another"), offer(7, "")):
                with dial(path) as sock, tempfile.TemporaryFile() as file:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
                    sock.sendmsg([data], rights)
                    sock.settimeout(60)
                    sock.recv(65536)  # it hangs up, or says why not
        pids = master.worker_pids()
        master.process.kill()
        master.process.wait()
        again = Segue(
            "shop:app", cwd=application("1"), runtime_dir=master.runtime_dir, name=master.name
        ).wait_ready()
        try:
            assert again.worker_pids() == pids
            assert len(os.listdir(f"/proc/{pids[0]}/fd")) < 60
            again.stop()
        finally:
            again.close()


def dial(path: str) -> socket.socket:
    """Wait until there is room in the queue."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)  # with a timeout it would not wait
    sock.settimeout(60)
    return sock


def offer(epoch: int, identity: str) -> bytes:
    return msgspec.json.encode(adoption.Offer(adoption.VERSION, identity, epoch))


# ----------------------------------------------------------------------------------------------- the spec, the journal


@pytest.mark.parametrize("data", [b"", b"no json", b"{}", DEEP, b'{"instance": 1}'])
def test_a_worker_without_a_sound_spec_says_so(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "spec").write_bytes(data)
    script = textwrap.dedent("""
        import os, sys
        fd = os.open(sys.argv[1], os.O_RDONLY)
        os.set_inheritable(fd, True)
        environ = os.environ | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "segue-spec", "SEGUE_FDS": str(fd)}
        os.execve(sys.executable, [sys.executable, "-m", "segue.worker"], environ)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "spec")],
        env=environment(PYTHONPATH=str(ROOT)), cwd="/", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "started by hand?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("numbers", ["", "x", "-1", "99999999999999999999", "3,3", "900"])
def test_a_worker_without_its_descriptors_says_so(numbers: str) -> None:
    names = {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "segue-spec", "SEGUE_FDS": numbers}
    done = subprocess.run(
        [sys.executable, "-m", "segue.worker"],
        env=environment(PYTHONPATH=str(ROOT)) | names, cwd="/", capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


values = st.dictionaries(
    st.sampled_from(
        ["instance", "numbers", "promote", "swap", "services", "current", "drain_mode", "generation/1", "operation/1"]
    ),
    anything,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(values, max_size=3), st.binary(max_size=60), st.integers(0, 400))
def test_whatever_is_in_the_journal_a_master_can_begin_with_it(
    records: list[dict[str, object]], junk: bytes, cut: int
) -> None:
    lines = b"".join(
        journal.encode({key: msgspec.json.encode(value) for key, value in record.items()})
        for record in records
    )
    with tempfile.NamedTemporaryFile() as file:
        file.write(lines[: len(lines) - cut % (len(lines) + 1)] + junk)
        file.flush()
        memory.recall(journal.read(file.name))
        read_owner(file.fileno())


def test_a_journal_that_is_nested_without_end_is_an_empty_one() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(journal.encode({"instance": DEEP, "generation/1": DEEP}))
        file.flush()
        recalled = memory.recall(journal.read(file.name))
        assert msgspec.structs.replace(recalled, wall=0.0) == memory.Memory()
        file.seek(0)
        file.write(DEEP)
        file.flush()
        assert read_owner(file.fileno()) is None

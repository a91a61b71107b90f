"""What a person or a script sees of an instance: events, logs, top on a real terminal, completion, progress."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from scenario import DEADLINE_S, HOT, ROOT, Client, Segue, environment, segue, supervised, unix_call

from segue.supervisor import client, top
from segue.supervisor.instance import Instance
from segue.supervisor.table import status_table
from segue.supervisor.terminal import seconds_of

ALTERNATE_SCREEN, BACK = "\x1b[?1049h", "\x1b[?1049l"
END = "that was all"


class Terminal:
    """A real terminal with a program of segue on it."""

    def __init__(
        self, master: Segue, *arguments: str, columns: int = 140, rows: int = 40, **env: str
    ) -> None:
        self._fd, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(child)
        where = ("--runtime-dir", master.runtime_dir, "--name", master.name)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "segue.supervisor.cli", *arguments, *where],
            stdin=child,
            stdout=child,
            stderr=child,
            env=environment(**{"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"} | env),
            start_new_session=True,
        )
        self._child = child
        self.raw = ""
        self.text = ""
        """Without escape sequences and the blanks that fill lines."""

    def read(self, timeout: float) -> bool:
        if not select.select([self._fd], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:
            return False
        piece = data.decode(errors="replace")
        self.raw += piece
        self.text += re.sub(r" *\r?\n[ \r\n]*", "\n", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", piece))
        return bool(data)

    def wait_for(self, pattern: str, since: int = 0) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not re.search(pattern, self.text[since:]):
            assert time.monotonic() < deadline, f"{pattern!r} did not come:\n{self.text[since:]}"
            self.read(0.5)

    def type(self, keys: str) -> int:
        """Press keys; where in the text what follows on them begins."""
        at = len(self.text)
        os.write(self._fd, keys.encode())
        return at

    def settings(self) -> list[Any]:
        return termios.tcgetattr(self._child)

    def wait_exit(self) -> int:
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            self.read(0.1)
        while self.read(0.0):
            pass
        os.write(self._child, END.encode())  # what it has printed comes before this, a moment later perhaps
        while END not in self.raw:
            assert time.monotonic() < deadline, self.text
            self.read(0.1)
        self.raw, self.text = self.raw.replace(END, ""), self.text.replace(END, "")
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._fd)
        os.close(self._child)


@contextlib.contextmanager
def terminal(master: Segue, *arguments: str, **options: Any) -> Iterator[Terminal]:
    on = Terminal(master, *arguments, **options)
    try:
        yield on
    finally:
        on.close()


@pytest.fixture
def master(application: Callable[..., Any]) -> Iterator[Segue]:
    with supervised("shop:app", cwd=application("1")) as running:
        yield running


def names(lines: str) -> list[str]:
    return [json.loads(line)["event"] for line in lines.splitlines()]


# -------------------------------------------------------------------------------------------------------- events


def test_events_are_the_lines_of_the_log_with_a_number(master: Segue) -> None:
    shown = master.command("events", "--json").stdout
    assert names(shown)[-2:] == ["listening", "promoted"] or "promoted" in names(shown)
    events = [json.loads(line) for line in shown.splitlines()]
    assert [event["id"] for event in events] == [f"1-{n}" for n in range(1, len(events) + 1)]
    spawned = next(event for event in events if event["event"] == "worker-spawned")
    assert spawned["fields"] == {"generation": 1, "worker": 1, "pid": master.worker_pids()[0]}
    assert abs(spawned["time"] - time.time()) < 600
    later = master.command("events", "--json", "--after", spawned["id"]).stdout
    assert len(later.splitlines()) == len(events) - events.index(spawned) - 1
    assert len(master.command("events", "-n", "2").stdout.splitlines()) == 2
    assert f"pid={master.worker_pids()[0]}" in master.command("events").stdout
    assert master.command("events", "--after", "yesterday").returncode == 1


def test_events_are_kept_whatever_the_log_level(application: Any) -> None:
    with supervised("shop:app", "--log-level", "error", cwd=application("1")) as quiet:
        quiet.reload()
        assert "promoted" in names(quiet.command("events", "--json").stdout)
        quiet.stop()


def test_who_follows_events_hears_of_everything_until_the_end(master: Segue) -> None:
    where = ("--runtime-dir", master.runtime_dir, "--name", master.name)
    command = [
        sys.executable,
        "-m",
        "segue.supervisor.cli",
        "events",
        "--follow",
        "--json",
        "-n",
        "0",
        *where,
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    wait_for_followers(master, 1)
    master.reload("--wait", "drained")
    assert master.command("upgrade").returncode == 0
    master.reload()
    master.stop()
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    events = [json.loads(line) for line in output.splitlines()]
    told = [event["event"] for event in events]
    for expected in ("worker-spawned", "promoted", "drained", "upgrade", "adopted", "stopping", "exit"):
        assert expected in told, told
    numbers = [tuple(map(int, event["id"].split("-"))) for event in events]
    assert numbers == sorted(set(numbers))  # in order, and nothing twice
    assert {epoch for epoch, _ in numbers} == {1, 2}


def wait_for_followers(master: Segue, count: int) -> None:
    """Nobody tells who follows: the connections of the control socket do."""
    deadline = time.monotonic() + DEADLINE_S
    while followed(master) < count:
        assert time.monotonic() < deadline
        select.select([], [], [], 0.05)


def test_events_outlive_an_upgrade(master: Segue) -> None:
    before = master.command("events", "--json").stdout.splitlines()
    assert master.command("upgrade").returncode == 0
    after = master.command("events", "--json").stdout.splitlines()
    assert after[: len(before)] == before
    assert any(json.loads(line)["id"].startswith("2-") for line in after)


def test_events_are_server_sent_for_a_browser(master: Segue) -> None:
    import http.client
    import socket

    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(DEADLINE_S)
    connection.sock.connect(master.control)
    connection.request(
        "GET", f"{HOT}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": "1-2"}
    )
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["content-type"] == "text/event-stream"
    assert response.readline() == b"id: 1-3\n"
    assert json.loads(response.readline().removeprefix(b"data: "))["id"] == "1-3"
    response.close()
    connection.close()
    wait_until_gone(master)
    status, document = unix_call(master.control, "GET", f"{HOT}/events?after=nonsense")
    assert status == 400
    assert "nonsense" in document["detail"]


def test_a_head_request_is_answered_without_a_body_and_keeps_its_connection(master: Segue) -> None:
    import http.client
    import socket

    connection = http.client.HTTPConnection("localhost")
    connection.sock = kept = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    kept.settimeout(DEADLINE_S)
    kept.connect(master.control)
    for path in ("/livez", f"{HOT}/events", "/livez"):
        connection.request("HEAD", path, headers={"Accept": "text/event-stream"})
        response = connection.getresponse()
        assert response.status == 200
        assert response.read() == b""
        assert connection.sock is kept
    connection.close()
    assert "Traceback" not in master.output.text


def wait_until_gone(master: Segue) -> None:
    """The master notices at once that who followed has left."""
    deadline = time.monotonic() + DEADLINE_S
    while followed(master):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.05)


def followed(master: Segue) -> int:
    """How many connections to the control socket are open (state 03, connected, in proc(5)'s table)."""
    with open("/proc/net/unix") as table:
        return sum(line.split()[-1] == master.control and line.split()[5] == "03" for line in table)


# ---------------------------------------------------------------------------------------------------------- logs


def test_logs_are_what_workers_printed_while_they_started(application: Any) -> None:
    with supervised("shop:app", cwd=application("1", prelude="print('hello from the start')\n")) as master:
        shown = master.command("logs")
        assert shown.returncode == 0
        assert "generation 1, worker 1" in shown.stdout
        assert "hello from the start" in shown.stdout
        application("2", prelude="print('before it broke')\nimport nosuchmodule\n")
        assert master.command("reload").returncode == 1
        for which in ("2", "2/1", "g2w1"):
            failed = master.command("logs", which).stdout
            assert "before it broke" in failed
            assert "nosuchmodule" in failed
            assert "hello" not in failed
        (document,) = json.loads(master.command("logs", "2", "--json").stdout)
        assert document["state"] == "failed"
        assert "nosuchmodule" in document["reason"]
        missing = master.command("logs", "9")
        assert missing.returncode == 1
        assert "1/1, 2/1" in missing.stderr
        as_json = master.command("logs", "9", "--json")
        assert (as_json.returncode, as_json.stdout) == (1, "[]\n")
        assert master.command("logs", "nonsense").returncode == 2
        follow = master.command("logs", "--follow")
        assert follow.returncode == 1
        assert str(master.process.pid) in follow.stderr
        master.stop()


def test_what_is_kept_of_failed_starts_is_bounded(application: Any) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        application("2", prelude="print('x' * 3_000_000)\nimport nosuchmodule\n")
        for _ in range(3):
            assert master.command("reload").returncode == 1
        documents = json.loads(master.command("logs", "--json").stdout)
        assert [document["generation"] for document in documents] == [1, 2, 3, 4]
        assert all(len(document["output"]) <= 64 * 1024 for document in documents)
        assert all("nosuchmodule" in document["output"] for document in documents[1:])
        master.stop()


# ----------------------------------------------------------------------------------------------------------- top


def test_top_shows_what_is_and_obeys_keys(master: Segue, application: Any) -> None:
    with terminal(master, "top", "--interval", "0.2") as screen:
        screen.wait_for(r"segue default ready")
        screen.wait_for(rf"1\s+active.*{master.worker_pids()[0]}\s+active")
        assert ALTERNATE_SCREEN in screen.raw
        application("2")
        at = screen.type("r")
        screen.wait_for(r"reload: done", at)
        screen.wait_for(r"2\s+active", at)
        at = screen.type("+")
        screen.wait_for(r"scale up: done", at)
        assert len(master.worker_pids()) == 2
        at = screen.type("d")
        screen.wait_for(r"drain\? \[y\]", at)
        at = screen.type("n")
        screen.wait_for(r"\[q\] quit", at)
        assert master.status()["draining"] is False
        screen.type("d")
        at = screen.type("y")
        screen.wait_for(r"draining \(reject\)", at)
        application("3", prelude="import nosuchmodule\n")
        at = screen.type("r")
        screen.wait_for(r"reload: refused: .*nosuchmodule", at)
        screen.type("q")
        assert screen.wait_exit() == 0
        assert screen.raw.rstrip().endswith(("\x1b[?25h", BACK)) or BACK in screen.raw
        assert screen.settings() == screen.before


def test_who_reads_in_top_that_something_is_done_may_ask_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "post", lambda *_: {"outcome": "ok"})
    monkeypatch.setattr(client, "follow", lambda _, operation, *__: operation)
    reload, drain = top.ACTIONS[0], top.ACTIONS[-1]
    done = threading.Event()

    def drawn() -> None:
        """What was asked for in a thread of its own is told there; that still runs now."""
        assert asked.message == "reload: done"
        asked.press(drain, {"draining": False, "generations": []})
        done.set()

    asked = top.Asked(Instance("/nowhere"), drawn)
    asked.press(reload, {"generations": []})
    assert done.wait(DEADLINE_S)
    assert asked.waiting is not None, asked.message
    assert asked.waiting[0] is drain


def test_top_stages_promotes_and_rolls_back(application: Any) -> None:
    with (
        supervised("shop:app", "--park-for", "600", cwd=application("1")) as master,
        terminal(master, "top", "--interval", "0.2") as screen,
    ):
        screen.wait_for(r"\[b\] rollback")
        application("2")
        at = screen.type("s")
        screen.wait_for(r"stage: done", at)
        screen.wait_for(r"2\s+staged", at)
        assert master.status()["current"] == 1
        screen.type("p")
        at = screen.type("y")
        screen.wait_for(r"promote: done", at)
        assert master.status()["current"] == 2
        screen.type("b")
        at = screen.type("y")
        screen.wait_for(r"rollback: done", at)
        assert master.status()["current"] == 1
        screen.type("x")
        at = screen.type("y")
        screen.wait_for(r"discard: (done|refused)", at)
        screen.type("q")
        assert screen.wait_exit() == 0
        master.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_top_gives_the_terminal_back_whatever_ends_it(master: Segue, number: signal.Signals) -> None:
    with terminal(master, "top") as screen:
        screen.wait_for(r"segue default ready")
        assert screen.settings() != screen.before
        screen.process.send_signal(number)
        assert screen.wait_exit() == 128 + number
        assert BACK in screen.raw
        assert "\x1b[?25h" in screen.raw  # the cursor
        assert screen.settings() == screen.before


def test_top_gives_the_terminal_back_while_it_is_stopped(master: Segue) -> None:
    with terminal(master, "top") as screen:
        screen.wait_for(r"segue default ready")
        screen.process.send_signal(signal.SIGTSTP)
        pid, status = os.waitpid(screen.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert screen.settings() == screen.before
        os.kill(pid, signal.SIGCONT)
        while screen.read(0.0):
            pass
        at = len(screen.text)
        screen.wait_for(r"segue default ready", at)
        screen.type("q")
        assert screen.wait_exit() == 0
        assert screen.settings() == screen.before


def test_top_lives_through_a_master_that_ends_and_comes_again(application: Any) -> None:
    directory = application("1")
    with (
        supervised("shop:app", cwd=directory) as master,
        terminal(master, "top", "--interval", "0.2") as screen,
    ):
        screen.wait_for(r"segue default ready")
        os.kill(master.process.pid, signal.SIGKILL)
        master.process.wait()
        screen.wait_for(r"has no master")
        again = Segue("shop:app", cwd=directory, runtime_dir=master.runtime_dir)
        try:
            again.wait_ready()
            at = len(screen.text)
            screen.wait_for(rf"ready.*master pid {again.process.pid}", at)
            screen.type("q")
            assert screen.wait_exit() == 0
            again.stop()
        finally:
            again.close()


def test_top_without_a_terminal_prints_once(master: Segue) -> None:
    done = master.command("top", "--interval", "0.2")
    assert done.returncode == 0, done.stderr
    assert "segue default ready" in done.stdout
    assert "\x1b" not in done.stdout
    document = json.loads(master.command("top", "--json", "--interval", "0.2").stdout)
    assert document["generations"][0]["workers"][0]["requests_per_second"] == 0
    master.stop()
    assert master.command("top").returncode == 5


def test_top_on_a_terminal_that_can_only_write_prints_once(master: Segue) -> None:
    with terminal(master, "top", "--interval", "0.2", TERM="dumb") as screen:
        assert screen.wait_exit() == 0
        assert "segue default ready" in screen.raw
        assert "\x1b" not in screen.raw


def test_top_shows_services_with_their_versions_and_health(application: Any) -> None:
    code = """
    import segue
    from starlette.applications import Starlette

    class Prices:
        def health(self):
            return True

    services = segue.Services()
    services.declare("prices", Prices)
    app = Starlette(lifespan=services.lifespan)
    """
    with supervised("shop:app", cwd=application(code=code)) as master:
        shown = master.command("top", "--once", "--interval", "0.2").stdout
        assert re.search(r"SERVICE +VERSION +HEALTH", shown)
        assert re.search(r"prices +1 +healthy +0 +0", shown), shown
        table = master.command("status").stdout
        assert re.search(r"^SERVICE +VERSION +HEALTH +LEASES\nprices +1 +healthy +0$", table, re.M), table
        assert master.command("reload", "prices").returncode == 0
        assert re.search(r"prices +2 +healthy", master.command("top", "--once", "--interval", "0.2").stdout)
        master.stop()


def test_top_shows_how_slow_workers_are_where_there_is_room(master: Segue) -> None:
    with terminal(master, "top", "--interval", "0.2", columns=140) as screen, Client(master.port) as client:
        screen.wait_for(r"REQ/S +P50 +P99 +LAG +CPU")
        for _ in range(5):
            client.get("/")
        screen.wait_for(r"active .* ≤\S+ m?s +≤\S+ m?s +\S+ m?s +\d+%")


def test_a_narrow_terminal_is_enough(master: Segue) -> None:
    with terminal(master, "top", columns=40, rows=10) as screen:
        screen.wait_for(r"segue default ready")
        at = screen.type("b")  # a question is seen wherever there is hardly room for it
        screen.wait_for(r"rollback\? \[y\] to do it", at)
        at = screen.type("n")
        screen.wait_for(r"\[q\]\s+quit", at)
        screen.type("q")
        assert screen.wait_exit() == 0


# ------------------------------------------------------------------------------------------- colours and progress


def test_colours_are_for_terminals(master: Segue) -> None:
    assert "\x1b" not in master.command("status").stdout
    where = ("--runtime-dir", master.runtime_dir, "--name", master.name)
    assert "\x1b[32m" in segue("status", *where, FORCE_COLOR="1").stdout
    with terminal(master, "status") as screen:
        assert screen.wait_exit() == 0
        assert "\x1b[32m" in screen.raw
    with terminal(master, "status", NO_COLOR="1") as screen:
        assert screen.wait_exit() == 0
        assert "\x1b" not in screen.raw
        assert "active" in screen.raw


def test_a_service_that_does_not_exist_is_refused_and_leaves_no_warning(master: Segue) -> None:
    refused = master.command("reload", "nosuch")
    assert refused.returncode == 1
    assert "there is no service 'nosuch': this application declares none" in refused.stderr
    told = [json.loads(line) for line in master.command("events", "--json").stdout.splitlines()]
    assert [each["event"] for each in told if each["level"] in {"warning", "error"}] == ["swap"]


def test_what_a_reload_took_does_not_grow_with_what_is_left_to_finish_in_the_old_generation(
    master: Segue,
) -> None:
    said = re.search(r"\(([\d.]+) s\)", master.reload("--wait", "drained").stdout)
    document = master.status()
    assert document["reloads"][-1]["phases"]["drain"] > 0
    document["reloads"][-1]["phases"]["drain"] = 600.0
    assert said is not None
    assert f"ok       {said[1]}" in click.unstyle(status_table(document))


def test_a_clock_that_was_set_back_makes_no_age_negative(master: Segue) -> None:
    document = master.status()
    document["master"]["started"] = time.time() + 3600
    assert ", up 0 s," in click.unstyle(status_table(document))


def until_there_is(gate: Path) -> str:
    """What lets the import of an application last until then."""
    return f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"


def test_who_interrupts_a_command_ends_the_waiting_and_not_what_was_asked_for(
    master: Segue, application: Any, tmp_path: Path
) -> None:
    application("2", prelude=until_there_is(tmp_path / "gate"))
    with terminal(master, "reload") as screen:
        screen.wait_for(r"boot … \d+ s")
        screen.process.send_signal(signal.SIGINT)
        assert screen.wait_exit() == 130
        assert "interrupted; reload goes on (operation 2): 'segue status' tells how it ends" in screen.raw
        assert "Aborted" not in screen.raw
    (tmp_path / "gate").touch()
    master.wait_status(lambda status: status["current"] == 2)
    with terminal(master, "events", "--follow") as screen:
        screen.wait_for(r"promoted")
        screen.process.send_signal(signal.SIGINT)
        assert screen.wait_exit() == 130
        assert "Traceback" not in screen.raw


def test_what_cannot_be_printed_is_told_without_a_traceback(master: Segue) -> None:
    where = ("--runtime-dir", master.runtime_dir, "--name", master.name)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "segue.supervisor.cli", "status", "--json", *where],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(PYTHONPATH=str(ROOT)),
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "segue: this can't be printed: No space left on device\n"


def test_what_takes_long_says_so_on_a_terminal_and_leaves_nothing_behind(
    master: Segue, application: Any, tmp_path: Path
) -> None:
    application("2", prelude=until_there_is(tmp_path / "gate"))
    with terminal(master, "reload") as screen:
        screen.wait_for(r"boot … \d+ s")
        (tmp_path / "gate").touch()
        assert screen.wait_exit() == 0
        assert screen.raw.rpartition("\x1b[K")[2].strip().startswith("generation 2 serves")
    quiet = master.command("reload")
    assert "…" not in quiet.stderr


def test_a_master_that_keeps_a_terminal_waiting_is_named(master: Segue) -> None:
    master.signal(signal.SIGSTOP)
    with terminal(master, "status") as screen:
        screen.wait_for(r"asking the master … \d+ s")
        master.signal(signal.SIGCONT)
        assert screen.wait_exit() == 0
        assert screen.raw.rpartition("\x1b[K")[2].startswith("instance default: ")


# ------------------------------------------------------------------------------------------------------- for all


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_each_shell(shell: str) -> None:
    done = segue("completion", shell)
    assert done.returncode == 0
    assert "_SEGUE_COMPLETE" in done.stdout
    document = json.loads(segue("completion", shell, "--json").stdout)
    assert document == {"shell": shell, "source": done.stdout.removesuffix("\n")}


IN_SHELLS = {
    "bash": """
        eval "$(segue completion bash)"
        COMP_WORDS=(segue rel) COMP_CWORD=1
        _segue_completion segue
        echo "${COMPREPLY[@]}"
    """,
    "zsh": """
        autoload -U compinit && compinit -u -d "$ZDOTDIR/dump"
        eval "$(segue completion zsh)"
        compadd() { print -r -- "${completions[@]}" } # what there is to choose from, outside of the line editor
        _describe() { print -r -- "${completions_with_descriptions[@]%%:*}" }
        words=(segue rel) CURRENT=2
        ${_comps[segue]}
    """,
    "fish": """
        segue completion fish | source
        complete -C 'segue rel' | string split -f1 \\t
    """,
}


@pytest.mark.parametrize("shell", IN_SHELLS)
def test_completion_completes_in_a_real_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "segue"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m segue.supervisor.cli "$@"\n')
    program.chmod(0o755)
    env = environment(PYTHONPATH=str(ROOT), HOME=str(tmp_path), ZDOTDIR=str(tmp_path))
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    done = subprocess.run(
        [shell, "-c", IN_SHELLS[shell]], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == ["reload"], done.stderr


def test_every_command_that_prints_has_json(master: Segue) -> None:
    def document(*arguments: str) -> Any:
        done = master.command(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert document("status")["current"] == 1
    assert document("reload")["generation"] == 2
    assert document("scale", "2")["outcome"] == "ok"
    assert document("drain", "start")["outcome"] == "ok"
    assert document("drain", "stop")["outcome"] == "ok"
    assert document("upgrade")["outcome"] == "ok"
    assert document("logs") is not None
    assert document("config", "--running")["app"]["value"] == "shop:app"
    assert document("stop")["outcome"] == "ok"


def test_a_unit_as_json(application: Any) -> None:
    done = segue("unit", "shop:app", "--user", "www-data", "--json", cwd=application("1"))
    assert done.returncode == 0, done.stderr
    assert "shop:app" in json.loads(done.stdout)["unit"]


def test_the_verdict_of_check_as_json(application: Any) -> None:
    directory = application("1")
    good = segue("check", "shop:app", "--json", cwd=directory)
    assert good.returncode == 0
    assert json.loads(good.stdout)["ok"] is True
    application("2", prelude="import nosuchmodule\n")
    bad = segue("check", "shop:app", "--json", cwd=directory)
    assert bad.returncode == 3
    assert "nosuchmodule" in json.loads(bad.stdout)["reason"]


def test_what_runs_is_shown_with_the_time_since_it_was_asked_for() -> None:
    phases = {"prepare": 0.5, "boot": 1.5, "drain": 60.0}
    assert seconds_of({"outcome": "ok", "started": 0.0, "phases": phases}) == 2.0
    assert (
        100 <= seconds_of({"outcome": None, "started": time.time() - 100, "phases": {"prepare": 0.5}}) < 160
    )

"""The log: one line per event with its fields, for a person or for a machine; the access log; priorities of the journal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from typing import Any

import pytest
from scenario import ROOT, Client, environment, made_directory, supervised
from worker_harness import Bench

from segue.handoff import lines
from segue.supervisor.log import Log

APP = """
import logging, sys
log = logging.getLogger("shop.orders")
{prelude}
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({{"type": kind + ".complete"}})
            if kind == "lifespan.shutdown":
                return
    if scope["path"] == "/raise":
        raise RuntimeError("as asked")
    if scope["path"] == "/warn":
        log.warning("only %d left", 3, extra={{"item": "tea", "worker": "bee"}})
    await send({{"type": "http.response.start", "status": 200, "headers": []}})
    if scope["path"] == "/stream":
        await send({{"type": "http.response.body", "body": b"first", "more_body": True}})
        while (await receive())["type"] != "http.disconnect":
            pass
    await send({{"type": "http.response.body", "body": b"done"}})
"""


def app(prelude: str = "") -> str:
    return APP.format(prelude=prelude)


def parsed(text: str) -> list[dict[str, Any]]:
    """Every line, which must be JSON."""
    return [json.loads(line) for line in text.splitlines()]


def test_elsewhere_than_on_a_terminal_every_line_is_json_with_where_it_comes_from(application) -> None:
    with supervised("shop:app", cwd=application(code=app()), env={"SEGUE_LOG_FORMAT": "auto"}) as master:
        with Client(master.port) as client:
            client.get("/warn?a=b")
        with Client(master.port) as client:  # uvicorn answers 500 and closes the connection
            client.connection.request("GET", "/raise")
            assert client.connection.getresponse().status == 500
        master.reload()
        master.stop()
        found = parsed(master.output.text)
    for line in found:
        assert {"time", "level", "logger"} <= line.keys(), line
        assert "event" in line or "message" in line or "method" in line, line
    spawned = next(line for line in found if line.get("event") == "worker-spawned")
    assert (spawned["logger"], spawned["level"]) == ("segue", "info")
    assert (spawned["generation"], spawned["worker"]) == (1, 1)
    ready = [line for line in found if line.get("message") == "Application startup complete."]
    assert [(line["generation"], line["worker"], line["logger"]) for line in ready] == [
        (1, 1, "uvicorn.error"),
        (2, 1, "uvicorn.error"),
    ]
    warned = next(line for line in found if line["logger"] == "shop.orders")
    assert (warned["message"], warned["level"], warned["item"]) == ("only 3 left", "warning", "tea")
    assert (warned["generation"], warned["worker"], warned["extra_worker"]) == (1, 1, "bee")
    raised = next(line for line in found if "exception" in line)
    assert raised["exception"].splitlines()[-1] == "RuntimeError: as asked"
    access = [line for line in found if line["logger"] == "segue.access"]
    assert [(line["path"], line["status"]) for line in access] == [("/warn?a=b", 200), ("/raise", 500)]
    assert access[0]["seconds"] > 0
    assert (access[0]["bytes"], access[0]["generation"], access[0]["worker"]) == (4, 1, 1)


def test_a_terminal_gets_text() -> None:
    shown, terminal = pty.openpty()
    read, pipe = os.pipe()
    try:
        assert lines.chosen("auto", terminal) == lines.TEXT
        assert lines.chosen("auto", pipe) == lines.JSON
        assert lines.chosen("json", terminal) == lines.JSON
        log = Log(terminal)
        log.set_format("auto")
        log("info", "promoted", generation=8, reason="as asked")
        assert b'segue: promoted generation=8 reason="as asked"' in os.read(shown, 1000)
    finally:
        for fd in (shown, terminal, read, pipe):
            os.close(fd)


def test_in_text_uvicorns_lines_and_the_applications_carry_generation_and_worker(application) -> None:
    prelude = "logging.basicConfig(level=logging.INFO, format='%(levelname)s from %(name)s: %(message)s')\n"
    with supervised("shop:app", cwd=application(code=app(prelude))) as master:
        with Client(master.port) as client:
            client.get("/warn")
        master.stop()
        text = master.output.text
    assert "[1.1] Application startup complete." in text
    assert "[1.1] WARNING from shop.orders: only 3 left" in text
    assert re.search(r'INFO: +\[1\.1\] 127\.0\.0\.1:\d+ - "GET /warn HTTP/1\.1" 200 OK', text)


def test_an_applications_own_formatter_stays(application) -> None:
    prelude = (
        "class Mine(logging.Formatter):\n"
        "    def format(self, record):\n"
        "        return '{\"mine\": \"' + record.getMessage() + '\"}'\n"
        "handler = logging.StreamHandler()\n"
        "handler.setFormatter(Mine())\n"
        "logging.getLogger().addHandler(handler)\n"
    )
    code = application(code=app(prelude))
    with supervised("shop:app", "--log-format", "json", cwd=code) as master:
        with Client(master.port) as client:
            client.get("/warn")
        master.stop()
        assert {"mine": "only 3 left"} in parsed(master.output.text)


def test_a_log_configuration_of_ones_own_decides_and_can_name_generation_and_worker(
    application, tmp_path
) -> None:
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"mine": {"format": "mine g%(generation)s w%(worker)s %(message)s"}},
        "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "mine"}},
        "root": {"handlers": ["out"], "level": "INFO"},
    }
    (tmp_path / "log.json").write_text(json.dumps(config))
    arguments = ("--log-config", str(tmp_path / "log.json"), "--log-format", "json")
    with supervised("shop:app", *arguments, cwd=application(code=app())) as master:
        with Client(master.port) as client:
            client.get("/warn")
        master.stop()
        text = master.output.text
    assert "mine g1 w1 Application startup complete." in text
    assert "mine g1 wbee only 3 left" in text
    assert re.search(r'mine g1 w1 127\.0\.0\.1:\d+ - "GET /warn HTTP/1\.1" 200', text)


COMBINED = re.compile(
    r'127\.0\.0\.1 - - \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "(?P<request>[^"]*)" (?P<status>\d+) '
    r'(?P<bytes>\d+) "(?P<referer>[^"]*)" "(?P<agent>[^"]*)" (?P<seconds>[\d.e-]+) 1\.1'
)


@pytest.mark.parametrize("metrics", ["--request-metrics", "--no-request-metrics"])
@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_the_combined_access_log_has_size_duration_generation_and_worker(application, http, metrics) -> None:
    arguments = ("--access-log-format", "combined", "--http", http, metrics)
    with supervised("shop:app", *arguments, cwd=application(code=app())) as master:
        port = master.port
        with Client(port) as client:
            headers = {"User-Agent": 'evil"agent\\\x9b2J', "Referer": "http://else/where"}
            client.connection.request("GET", "/?q=1", headers=headers)
            client.connection.getresponse().read()
        with Client(port) as client:
            client.connection.request("GET", "/stream")
            client.connection.sock.recv(10)
        master.output.wait_for("/stream")
        master.stop()
        found = [match for line in master.output.text.splitlines() if (match := COMBINED.fullmatch(line))]
    assert [match["request"] for match in found] == ["GET /?q=1 HTTP/1.1", "GET /stream HTTP/1.1"]
    assert found[0]["agent"] == r"evil\x22agent\x5C\x9B2J"
    assert found[0]["referer"] == "http://else/where"
    assert (found[0]["status"], found[0]["bytes"]) == ("200", "4")
    assert 0 < float(found[0]["seconds"]) < 20
    assert (found[1]["status"], found[1]["bytes"]) == ("200", "5")


@pytest.mark.parametrize("form", ["uvicorn", "combined", "json"])
def test_without_an_access_log_there_is_none(application, form) -> None:
    arguments = ("--no-access-log", "--access-log-format", form)
    with supervised("shop:app", *arguments, cwd=application(code=app())) as master:
        with Client(master.port) as client:
            client.get("/nothing-is-said-of-this")
        master.stop()
        assert "/nothing-is-said-of-this" not in master.output.text


def test_a_refused_reload_is_told_to_people_in_words_though_the_log_is_json(application) -> None:
    code = application(code=app())
    with supervised("shop:app", "--log-format", "json", cwd=code) as master:
        application(code=app("raise RuntimeError('broken on purpose')"))
        refused = master.command("reload")
        assert refused.returncode != 0
        assert "RuntimeError: broken on purpose" in refused.stderr
        application(
            code="async def app(scope, receive, send):\n    await receive()\n    raise ValueError('no such base')\n"
        )
        refused = master.command("reload")
        assert refused.returncode != 0
        assert "ValueError: no such base" in refused.stderr
        assert '{"time"' not in refused.stderr


def test_a_worker_tells_the_journal_the_priority_of_each_line(tmp_path) -> None:
    with Bench(tmp_path, app()) as bench:
        found = os.fstat(bench.stdout)
        stream = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        for form in ("text", "json"):
            worker = bench.spawn(environ=stream, dev=False, spec={"log_format": form}).wait_ready().activate()
            client = bench.client()
            client.ask("/warn")
            client.send(b"GET /raise HTTP/1.1\r\nHost: t\r\n\r\n")
            client.read()
            assert worker.stop() == 0
            written = os.pread(bench.stdout, 1 << 20, 0).decode()
            os.ftruncate(bench.stdout, 0)
            os.lseek(bench.stdout, 0, os.SEEK_SET)
            priorities = dict.fromkeys(line[:3] for line in written.splitlines())
            assert priorities.keys() == {"<6>", "<4>", "<3>"}, written
            assert any(line.startswith("<4>") and "only 3 left" in line for line in written.splitlines())


def test_the_master_tells_the_journal_priorities(monkeypatch) -> None:
    read, write = os.pipe()
    try:
        found = os.fstat(write)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        log = Log(write)
        log("error", "worker-died", output="line one\nline two")
        assert [line[:3] for line in os.read(read, 4096).decode().splitlines()] == ["<3>"] * 3
        log.set_format("json")
        log("warning", "worker-silent")
        assert os.read(read, 4096).startswith(b'<4>{"time":')
    finally:
        os.close(read)
        os.close(write)


def test_the_journal_files_the_reason_of_a_start_that_fails_as_an_error() -> None:
    read, write = os.pipe()
    found = os.fstat(write)
    with open(read) as reader:
        done = subprocess.run(
            [sys.executable, "-m", "segue.supervisor.cli", "serve", "shop:app", "--admin", "nonsense"],
            stderr=write,
            env=environment(PYTHONPATH=str(ROOT), JOURNAL_STREAM=f"{found.st_dev}:{found.st_ino}"),
            check=False,
        )
        os.close(write)
        assert done.returncode == 2
        assert reader.read().startswith("<3>segue: admin = 'nonsense'")


def test_a_line_of_json_is_never_cut(tmp_path) -> None:
    with (tmp_path / "log").open("w+b") as file:
        log = Log(file.fileno())
        log.set_format("json")
        log("error", "worker-died", generation=1, output="é\n" * 5000 + "the reason", reason="x" * 6000)
        file.seek(0)
        [line] = parsed(file.read().decode())
    assert line["event"] == "worker-died"
    assert line["output"].endswith("the reason")


def test_nothing_in_a_line_of_json_steers_a_terminal_or_begins_a_line() -> None:
    odd = "\x1b[2J\x9b2J\x7f\r\n\x85\u2028\u202e\U000e0001"
    line = lines.json_line(0.0, "info", "segue", {"reason": f"café 漢😀 {odd}", odd: 1})
    assert line.isprintable()
    assert "café 漢😀" in line
    assert json.loads(line)["reason"].endswith(odd)
    assert json.loads(line)[odd] == 1


@pytest.mark.parametrize("lost", [1, 3])
def test_as_many_lines_as_were_lost_are_told_once_there_is_room(lost) -> None:
    read, write = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)
    kept = os.dup(write)
    try:
        log = Log(write)
        os.dup2(full, write)  # no space left on the disk
        for _ in range(lost):
            log("info", "lost")
        os.dup2(kept, write)
        log("info", "first")
        os.set_blocking(kept, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(kept, b".")  # nobody reads
        for _ in range(lost):
            log("info", "lost")
        filled = os.read(read, 1024 * 1024).decode()
        log("info", "second")
        told = (filled + os.read(read, 4096).decode()).replace(".", "")
    finally:
        for fd in (read, write, full, kept):
            os.close(fd)
    assert re.findall(r"(\d+) lines were lost|segue: (first|second|lost)", told) == [
        (str(lost), ""),
        ("", "first"),
        (str(lost), ""),
        ("", "second"),
    ]


def test_what_is_no_text_is_a_line_of_json_all_the_same(application) -> None:
    itself: list[Any] = []
    itself.append(itself)
    for odd, shown in ((os.fsdecode(b"caf\xe9"), "caf\\udce9"), (itself, "[[...]]")):
        line = json.loads(lines.json_line(0.0, "info", "shop", {"message": "saved", "name": odd}))
        assert (line["message"], line["name"]) == ("saved", shown)
    prelude = "import os; log.warning('saved %s', os.fsdecode(bytes([99, 0xE9])))"
    with supervised("shop:app", "--log-format", "json", cwd=application(code=app(prelude=prelude))) as master:
        [line] = master.output.wait_for(r".*shop\.orders.*\n")
        event = json.loads(line)
        assert event["message"] == "saved c\\udce9"


def test_text_for_people_is_found_in_lines_of_json() -> None:
    out = io.StringIO("printed\n")
    text = (
        out.getvalue()
        + "<3>"
        + lines.json_line(time.time(), "error", "uvicorn.error", {"message": "it failed"})
    )
    assert lines.readable(text) == "printed\nERROR: it failed"


def test_no_color_is_honoured(tmp_path) -> None:
    (tmp_path / "shop.py").write_text(app())
    seen = {}
    for name, extra in {"colours": {}, "none": {"NO_COLOR": "1"}}.items():
        shown, terminal = pty.openpty()
        command = [sys.executable, "-m", "segue.supervisor.cli", "serve", "shop:app", "--port", "0"]
        command += ["--runtime-dir", made_directory("segue-c-")]
        env = environment(PYTHONPATH=str(ROOT), **extra)
        env["SEGUE_LOG_FORMAT"] = "auto"
        process = subprocess.Popen(
            command, cwd=tmp_path, stdin=terminal, stdout=terminal, stderr=terminal, env=env
        )
        os.close(terminal)
        text = ""
        while "promoted" not in text:
            assert select.select([shown], [], [], 60)[0], text
            text += os.read(shown, 4096).decode()
        process.terminate()
        with contextlib.suppress(OSError):
            while data := os.read(shown, 4096):
                text += data.decode()
        assert process.wait(60) == 0
        os.close(shown)
        seen[name] = text
    assert "Application startup complete." in seen["colours"]
    assert "\x1b[32mINFO" in seen["colours"]
    assert "\x1b[" not in seen["none"]

"""Development mode: a save is a reload that no client sees; what breaks leaves the last good code serving."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from browser import browser
from scenario import DEADLINE_S, HOT, Client, Load, Segue, environment, segue, supervised, tcp_call

from segue.supervisor.watcher import Filter, Order, directories_of, forget_compiled

DEVELOP = ("--reload", "--reload-delay", "0.05")
HANGS = "import time\ntime.sleep(600)\n"


def watched(master: Segue) -> None:
    """From now on no save is missed."""
    master.output.wait_for(r"segue: watching ")


def save(application: Any, *arguments: Any, **options: Any) -> None:
    """Write the file again."""
    application(*arguments, **options)


def until_served(master: Segue, version: str) -> None:
    """Wait until new connections get that version. The kernel may tell of one save in two parts, so generations aren't counted."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with Client(master.port) as client:
            if client.get("/")[2].decode() == version:
                return
        assert time.monotonic() < deadline, master.output.text
        select.select([], [], [], 0.02)


# ------------------------------------------------------------------------------------------------- what counts


def order(root: Path, includes: tuple[str, ...] = (), excludes: tuple[str, ...] = ()) -> Order:
    return Order((str(root),), includes, excludes, 0.0)


COUNTS = {
    "app.py": True,
    "deep/down/models.py": True,
    "README.md": False,
    "app.pyc": False,
    ".hidden.py": False,
    ".app.py.swp": False,
    "~app.py": False,
    ".git/hooks/x.py": False,
    ".venv/lib/x.py": False,
    "venv/lib/python3.11/x.py": False,
    "__pycache__/app.py": False,
    "node_modules/tool/setup.py": False,
    "env/lib/site-packages/x.py": False,
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_uvicorn_ignores_is_ignored_and_so_are_environments(tmp_path: Path, name: str) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    assert Filter(order(tmp_path))(tmp_path / name) is COUNTS[name]


@pytest.mark.parametrize(
    ("includes", "excludes", "name", "counts"),
    [
        (("*.html",), (), "templates/page.html", True),
        (("*.html",), (), "app.py", True),
        ((".env",), (), ".env", True),  # the very end of a path counts, whatever excludes it
        (("*",), (), "notes.txt", True),
        (("*",), (), ".hidden", False),
        ((".*",), (), ".hidden", True),
        ((), ("*.py",), "app.py", False),
        (("*.toml",), ("*.py",), "conf.toml", True),
        ((), ("test_*.py",), "tests/test_app.py", False),
        ((), ("tests/*",), "tests/test_app.py", False),
        ((), ("tests/*",), "shop/app.py", True),
        ((), ("build",), "build/lib/app.py", False),
    ],
)
def test_includes_and_excludes_are_uvicorns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    includes: tuple[str, ...],
    excludes: tuple[str, ...],
    name: str,
    counts: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build" / "lib").mkdir(parents=True)
    path = tmp_path / name
    assert Filter(order(tmp_path, includes, excludes))(path) is counts


def test_uvicorn_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On everything but whole directories that it does not pass over."""
    import uvicorn
    from uvicorn.supervisors.watchfilesreload import FileFilter

    monkeypatch.chdir(tmp_path)
    names = ["a.py", ".a.py", "a.txt", "~a.py", "b/c.py", "b/c.html", ".env", "a.pyc", ".a.swp", "x.pyd"]
    patterns: list[tuple[str, ...]] = [
        (),
        ("*.html",),
        (".env",),
        ("*",),
        (".*",),
        ("b/*",),
        ("a.*",),
        ("*.py",),
    ]
    for includes in patterns:
        for excludes in patterns:
            config = uvicorn.Config(
                "x:y",
                reload=True,
                reload_includes=list(includes),
                reload_excludes=list(excludes),
                log_config=None,
            )
            theirs = FileFilter(config)
            ours = Filter(order(tmp_path, includes, excludes))
            for name in names:
                assert ours(tmp_path / name) is theirs(tmp_path / name), (includes, excludes, name)


def test_a_directory_among_the_includes_is_watched_and_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shared = tmp_path / "code", tmp_path / "shared"
    (code / "below").mkdir(parents=True)
    shared.mkdir()
    monkeypatch.chdir(code)
    assert directories_of(order(code, ("../shared", "below", "*.html"))) == [str(code), str(shared)]


def test_what_python_has_cached_of_a_file_that_was_saved_is_forgotten(tmp_path: Path) -> None:
    """It tells sources apart by second and size: another save in the same second would not be seen."""
    source = tmp_path / "value.py"
    source.write_text("print(1)")
    os.utime(source, (1_000_000, 1_000_000))
    clean = environment()
    clean.pop("PYTHONDONTWRITEBYTECODE")

    def value() -> str:
        command = [sys.executable, "-c", "import value"]
        done = subprocess.run(command, check=True, env=clean, cwd=tmp_path, capture_output=True, text=True)
        return done.stdout

    assert value() == "1\n"
    source.write_text("print(2)")
    os.utime(source, (1_000_000, 1_000_000))
    assert value() == "1\n"  # this is what Python does
    forget_compiled([str(source)])
    assert value() == "2\n"


# ------------------------------------------------------------------------------------------------------ settings


def test_development_mode_is_off_unless_asked_for(tmp_path: Path) -> None:
    def reload_of(*arguments: str, **env: str) -> Any:
        done = segue("config", "x:y", "--json", *arguments, cwd=tmp_path, **env)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["reload"]

    assert reload_of() == {"value": False, "source": "default"}
    assert reload_of("--reload")["value"] is True
    assert reload_of("--watch") == {"value": True, "source": "flag --reload"}
    assert reload_of(UVICORN_RELOAD="1")["value"] is True
    assert reload_of(SEGUE_RELOAD="yes")["value"] is True


def test_a_directory_to_watch_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    done = segue("serve", "x:y", "--reload", "--reload-dir", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "reload-dir" in done.stderr
    assert f"{tmp_path}/nowhere" in done.stderr


def test_a_master_that_does_not_watch_has_not_imported_what_does() -> None:
    code = "import segue.supervisor.serve, segue.supervisor.cli, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"watchfiles", "rich", "segue.supervisor.development"} & set(modules.split())


# ------------------------------------------------------------------------------------------------------ reloads


def test_what_to_watch_is_said_to_have_no_effect_without_development_mode(application) -> None:
    flags = ("--reload-include", "*.html", "--reload-delay", "1")
    with supervised("shop:app", *flags, cwd=application("1")) as master:
        master.output.wait_for(
            'not-watching reason="reload-include, reload-delay: no effect without --reload"'
        )
        master.stop()


def test_a_save_is_served_at_once_and_loses_nothing_under_load(application) -> None:
    with supervised("shop:app", *DEVELOP, "--no-access-log", cwd=application("1")) as master:
        watched(master)
        with Load(master.port, "--keepalive", "20", "--post", "5", "--newconn", "4", "--sse", "2") as load:
            for version in range(2, 7):
                save(application, str(version))
                until_served(master, str(version))
            master.wait_status(lambda s: len(s["generations"]) == 1)
            tally = load.nothing_lost()
        assert set(tally["versions"]) == {"1", "2", "3", "4", "5", "6"}
        reloads = master.status()["reloads"]
        assert reloads[-1]["asked_by"] == "save of shop.py"
        master.stop()


def test_a_save_that_breaks_leaves_the_last_good_code_serving_and_shows_the_traceback(application) -> None:
    flags = (*DEVELOP, "--admin", "127.0.0.1:0")
    with supervised("shop:app", *flags, cwd=application("1")) as master, Client(master.port) as client:
        watched(master)
        save(application, "2", prelude="import nosuchmodule\n")
        master.output.wait_for(r"reload outcome=refused")
        master.output.wait_for(r"    \| ModuleNotFoundError: No module named 'nosuchmodule'")
        assert client.get("/")[2] == b"1"
        status = master.status()
        # what is written in two steps may be found half written first
        refused = next(r for r in status["reloads"] if "nosuchmodule" in r["output"])
        assert refused["outcome"] == "refused"
        assert 'shop.py", line 1' in refused["output"]
        admin = int(status["admin"][0].rpartition(":")[2])
        shown = tcp_call(admin, "GET", f"{HOT}/status")[2]["reloads"]
        assert (refused["number"], refused["output"]) in [(r["number"], r["output"]) for r in shown], (
            "the dashboard needs no token"
        )
        save(application, "3")
        until_served(master, "3")
        master.wait_status(lambda s: len(s["generations"]) == 1)
        assert client.get("/")[2] == b"3"  # on the connection of before
        master.stop()


def test_a_save_overtakes_a_start_that_hangs(application) -> None:
    with supervised("shop:app", *DEVELOP, cwd=application("1")) as master:
        watched(master)
        save(application, "2", prelude=HANGS)
        master.output.wait_for(r"worker-spawned generation=[2-9]")
        save(application, "3")
        master.output.wait_for(r"overtaken generation=[2-9]")
        until_served(master, "3")
        reloads = master.wait_status(lambda s: all(r["outcome"] for r in s["reloads"]))["reloads"]
        assert {r["outcome"] for r in reloads} == {"ok"}  # whoever asked for the older has the newer
        assert reloads[1]["generation"] > 2
        master.stop()


def test_a_first_start_that_fails_waits_for_the_save_that_mends_it(application) -> None:
    master = Segue("shop:app", *DEVELOP, cwd=application("1", prelude="def broken(:\n"))
    try:
        master.output.wait_for(r"start outcome=refused")
        master.output.wait_for(r"SyntaxError")
        watched(master)
        save(application, "2")
        master.wait_ready()
        with Client(master.port) as client:
            assert client.get("/")[2] == b"2"
        master.stop()
    finally:
        master.close()


def test_without_development_mode_it_ends_with_status_3(application) -> None:
    master = Segue("shop:app", cwd=application("1", prelude="def broken(:\n"))
    try:
        assert master.wait_exit() == 3
    finally:
        master.close()


def test_a_stop_while_nothing_serves_is_no_success(application) -> None:
    master = Segue("shop:app", *DEVELOP, cwd=application("1", prelude="def broken(:\n"))
    try:
        master.output.wait_for(r"start outcome=refused")
        master.signal(signal.SIGINT)
        assert master.wait_exit() == 1
    finally:
        master.close()


def test_saves_that_follow_quickly_on_one_another_are_one_reload(application) -> None:
    directory = application("1")
    with supervised("shop:app", "--reload", "--reload-delay", "1", cwd=directory) as master:
        watched(master)
        save(application, "2")
        master.output.wait_for(r"segue: saved ")
        (watcher,) = watchers(master)
        os.kill(watcher, signal.SIGSTOP)
        for number in range(30):  # however long it takes, within the delay after the first report
            (directory / f"part{number}.py").write_text("x = 1\n")
        os.kill(watcher, signal.SIGCONT)
        # of which the first save's second part may be one, if the kernel has told of it so
        master.wait_status(lambda s: any(re.search("and 2[78] more", r["asked_by"]) for r in s["reloads"]))
        master.stop()


def test_several_workers_are_reloaded_together(application) -> None:
    """uvicorn ignores --workers with --reload."""
    with supervised("shop:app", *DEVELOP, "--workers", "2", cwd=application("1")) as master:
        watched(master)
        save(application, "2")
        until_served(master, "2")
        assert len(master.worker_pids()) == 2
        master.stop()


def test_includes_excludes_and_directories_are_watched_as_asked(application, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    directory = application("1")
    (directory / "generated").mkdir()
    options = ["--reload-include", "*.html", "--reload-exclude", "generated"]
    options += ["--reload-dir", str(shared), "--reload-dir", "."]
    with supervised("shop:app", *DEVELOP, *options, cwd=directory) as master:
        watched(master)
        (directory / "generated" / "code.py").write_text("")
        (directory / "notes.txt").write_text("")
        (directory / "page.html").write_text("")
        master.output.wait_for(r"saved files=page.html")
        (shared / "lib.py").write_text("")
        master.output.wait_for(rf"saved files={shared}/lib.py")
        assert not [
            line for line in master.output.wait_for(r"saved files=.*") if "code.py" in line or "txt" in line
        ]
        master.stop()


def test_a_watcher_that_dies_is_followed_by_another_and_nothing_is_missed(application) -> None:
    with supervised("shop:app", *DEVELOP, cwd=application("1")) as master:
        watched(master)
        for pid in watchers(master):
            os.kill(pid, signal.SIGKILL)
        master.output.wait_for(r"not-watching")
        save(application, "2")  # while nobody watches
        until_served(master, "2")
        assert len(watchers(master)) == 1
        master.stop()


def test_an_upgrade_of_the_master_goes_on_watching(application) -> None:
    with supervised("shop:app", *DEVELOP, cwd=application("1")) as master:
        watched(master)
        assert master.command("upgrade").returncode == 0
        master.output.wait_for(r"segue: watching ", count=2)
        save(application, "2")
        until_served(master, "2")
        assert len(watchers(master)) == 1
        # that of the old generation's worker is one for a moment, too
        master.wait_status(lambda _: not zombies(master.process.pid))
        master.stop()


def test_the_watcher_ends_with_a_master_that_is_killed(application) -> None:
    with supervised("shop:app", *DEVELOP, cwd=application("1")) as master:
        watched(master)
        (watcher,) = watchers(master)
        pidfd = os.pidfd_open(watcher)
        os.kill(master.process.pid, signal.SIGKILL)
        master.process.wait()
        assert select.select([pidfd], [], [], 30)[0]
        os.close(pidfd)
        assert master.command("stop").returncode == 0


def children(pid: int) -> list[tuple[int, str, str]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append((int(entry.name), fields[0], command))
    return found


def watchers(master: Segue) -> list[int]:
    return [
        pid
        for pid, state, command in children(master.process.pid)
        if "supervisor.watcher" in command and state != "Z"
    ]


def zombies(pid: int) -> list[int]:
    return [child for child, state, _ in children(pid) if state == "Z"]


# -------------------------------------------------------------------------------------------------------- open pages

PAGES = """
VERSION = "{version}"

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    kind, extra = b"text/html; charset=utf-8", []
    body = b"<!doctype html><title>shop</title><p id=version>" + VERSION.encode() + b"</p>"
    if scope["path"] == "/plain":
        kind = b"text/plain"
    if scope["path"] == "/compressed":
        extra = [(b"content-encoding", b"gzip")]
    if scope["path"] == "/chunked":
        await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}})
        for part in (body[:20], body[20:]):
            await send({{"type": "http.response.body", "body": part, "more_body": True}})
        await send({{"type": "http.response.body", "body": b""}})
        return
    length = (b"content-length", str(len(body)).encode())
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind), length, *extra]}})
    await send({{"type": "http.response.body", "body": body}})
"""


def test_only_pages_get_a_line_more_and_only_in_development_mode(application) -> None:
    directory = application(code=PAGES.format(version="1"))
    with supervised("shop:app", *DEVELOP, cwd=directory) as master, Client(master.port) as client:
        for path in ("/", "/chunked"):
            _, headers, body = client.get(path)
            assert body.endswith(b'<script src="/.segue/refresh.js" data-generation="1" defer></script>\n')
            assert headers.get("content-length", str(len(body))) == str(len(body))
        for path in ("/plain", "/compressed"):
            assert b"segue" not in client.get(path)[2]
        _, headers, body = client.get("/", method="HEAD")
        assert body == b""
        assert b"EventSource" in client.get("/.segue/refresh.js")[2]
        master.stop()
    for options in ((), (*DEVELOP, "--no-reload-pages")):
        with supervised("shop:app", *options, cwd=directory) as master, Client(master.port) as client:
            assert b"segue" not in client.get("/")[2]
            assert b"EventSource" not in client.get("/.segue/refresh.js")[2]
            master.stop()


def test_an_open_page_shows_what_was_saved(application) -> None:
    directory = application(code=PAGES.format(version="1"))
    with supervised("shop:app", *DEVELOP, cwd=directory) as master, browser() as page:
        watched(master)
        page.open(f"http://127.0.0.1:{master.port}/")
        assert page.run("document.getElementById('version').textContent") == "1"
        for version in ("2", "3"):
            application(code=PAGES.format(version=version))
            page.wait(f"document.getElementById('version')?.textContent === '{version}'")
        master.wait_status(lambda s: len(s["generations"]) == 1)  # no page that is open holds the old one up
        assert not page.errors
        master.stop()

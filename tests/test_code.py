"""Which code a generation runs, told to people: the commit or a digest, the interpreter, what is installed, what changed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scenario import DEADLINE_S, ROOT, Segue, supervised

from segue.supervisor import code
from segue.supervisor.code import Code, Git, compare


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", *identity, "-C", str(directory), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(directory: Path, text: str) -> str:
    """All that is there; the commit's name."""
    git(directory, "add", "-A")
    git(directory, "commit", "-q", "--allow-empty", "-m", text)
    return git(directory, "rev-parse", "HEAD")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, git is waited for."""
    monkeypatch.setattr(code, "_DEADLINE_S", DEADLINE_S)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "app.py").write_text("a = 1\n")
    commit(tmp_path, "first")
    return tmp_path


def test_a_repository_is_told_by_its_commit_its_branch_and_whether_it_was_changed(repository) -> None:
    where = str(repository / "shop")
    head = git(repository, "rev-parse", "HEAD")
    assert code.read(where, sys.executable).git == Git(head, "main", dirty=False)
    assert code.read(where, sys.executable).title == f"git {head[:10]} (main)"
    (repository / "elsewhere.txt").write_text("not of this application")
    assert code.read(where, sys.executable).git == Git(head, "main", dirty=False)
    (repository / "shop" / "new.py").write_text("")
    assert code.read(where, sys.executable).git == Git(head, "main", dirty=True)
    assert code.read(where, sys.executable).title == f"git {head[:10]} (main), modified"
    git(repository, "checkout", "-q", "--detach")
    assert code.read(where, sys.executable).git == Git(head, None, dirty=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["itself", "worktree"])
def test_without_git_the_commit_is_read_from_its_files(repository, monkeypatch, packed, place) -> None:
    head = git(repository, "rev-parse", "HEAD")
    branch, directory = "main", repository
    if place == "worktree":
        branch, directory = "other", repository / "tree"
        git(repository, "worktree", "add", "-q", "-b", branch, str(directory))
    if packed:
        git(repository, "pack-refs", "--all")
    monkeypatch.setenv("PATH", "")
    assert code.read(str(directory / "shop"), sys.executable).git == Git(head, branch, dirty=None)


def test_a_directory_without_a_repository_is_told_by_its_content(tmp_path) -> None:
    (tmp_path / "app.py").write_text("a = 1\n")
    first = code.read(str(tmp_path), sys.executable)
    assert first.git is None
    assert first.title == f"content {first.content}"
    shutil.copytree(tmp_path, tmp_path / ".copy")
    assert code.read(str(tmp_path / ".copy"), sys.executable).content == first.content
    (tmp_path / "app.py").write_text("a = 2\n")
    assert code.read(str(tmp_path), sys.executable).content != first.content


def test_a_repository_without_a_commit_is_no_failure(tmp_path) -> None:
    git(tmp_path, "init", "-q")
    assert code.read(str(tmp_path), sys.executable).git is None


def test_a_git_that_hangs_does_not_take_long(repository, tmp_path, monkeypatch) -> None:
    head = git(repository, "rev-parse", "HEAD")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "git").write_text("#!/bin/sh\nexec sleep infinity\n")
    (programs / "git").chmod(0o755)
    monkeypatch.setattr(code, "_DEADLINE_S", 0.2)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert code.read(str(repository / "shop"), sys.executable).git == Git(head, "main", dirty=None)


def test_the_interpreter_and_what_is_installed_are_told(tmp_path) -> None:
    found = code.read(str(tmp_path), sys.executable)
    assert found.python == platform.python_version()
    assert found.distributions["msgspec"]
    environment = tmp_path / "venv"
    packages = environment / "lib" / "python3.99" / "site-packages"
    (packages / "Some_Thing-1.2.dist-info").mkdir(parents=True)
    (environment / "bin").mkdir()
    (environment / "pyvenv.cfg").write_text("home = /usr/bin\nversion_info = 3.99.1.final.0\n")
    other = code.read(str(tmp_path), str(environment / "bin" / "python"))
    assert (other.python, other.distributions) == ("3.99.1", {"some-thing": "1.2"})
    missing = tmp_path / "bin" / "python"
    assert code.read(str(tmp_path), str(missing)).python is None


def test_what_differs_is_told_in_words_and_as_data() -> None:
    old = Code(
        content="1" * 12,
        python="3.11.7",
        distributions={"fastapi": "1.0", "gone": "2"},
        git=Git("a" * 40, "main"),
        files={"app.py": "1", "old.py": "2", "same.py": "3"},
    )
    new = Code(
        content="2" * 12,
        python="3.12.0",
        distributions={"fastapi": "1.1", "new": "3"},
        git=Git("b" * 40, "main"),
        files={"app.py": "9", "new.py": "2", "same.py": "3"},
    )
    found = compare(old, new, ["log-level"])
    assert found.summary == (
        "git aaaaaaaaaa → bbbbbbbbbb; added: new.py; removed: old.py; modified: app.py; Python 3.11.7 → 3.12.0; "
        "fastapi 1.0 → 1.1; gone 2 removed; new 3 installed; settings: log-level"
    )
    assert found.commits == ("a" * 40, "b" * 40)
    assert found.files == {"added": ["new.py"], "removed": ["old.py"], "changed": ["app.py"]}
    assert found.distributions == {"fastapi": ("1.0", "1.1"), "gone": ("2", None), "new": (None, "3")}
    assert compare(old, old, []).summary == "nothing"


def told(master: Segue) -> Any:
    """The current generation's, once it has been read."""
    status = master.wait_status(lambda status: next(g for g in status["generations"] if g["current"])["code"])
    return next(g for g in status["generations"] if g["current"])


WAITING = """
import pathlib, time
while not pathlib.Path({gate!r}).exists():
    time.sleep(0.01)
"""
"""An application that starts once there is such a file."""


def reloaded(master: Segue, gate: Path) -> str:
    """What a reload says whose generation is ready only when its code has been read, for which no reload waits."""
    gate.unlink()
    reload = master.popen("reload")
    master.wait_status(lambda status: status["reloads"][-1].get("changes"))
    gate.touch()
    said, complaint = reload.communicate(timeout=DEADLINE_S)
    assert reload.returncode == 0, complaint
    return said


def test_a_reload_tells_which_code_serves_now_and_what_has_changed(application, tmp_path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    prelude = WAITING.format(gate=str(gate))
    where = application("1", prelude)
    git(where, "init", "-q")
    first = commit(where, "first")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "sitecustomize.py").write_text(
        f"from segue.supervisor import code\ncode._DEADLINE_S = {DEADLINE_S}\n"
    )
    with supervised("shop:app", cwd=where, env={"PYTHONPATH": f"{elsewhere}:{ROOT}"}) as master:
        before = told(master)
        assert before["code"]["git"] == {"commit": first, "branch": "main", "dirty": False}
        assert before["code"]["python"] == platform.python_version()
        assert before["changes"] is None
        application("2", prelude)
        second = commit(where, "second")
        said = reloaded(master, gate)
        assert f"changed: git {first[:10]} → {second[:10]}; modified: shop.py" in said
        after = told(master)
        assert after["code"]["git"]["commit"] == second
        assert after["changes"]["commits"] == [first, second]
        assert after["changes"]["files"] == {"changed": ["shop.py"]}
        assert after["fingerprint"] != before["fingerprint"]
        [reload] = master.status()["reloads"][1:]
        assert reload["code"]["git"]["commit"] == second
        assert reload["changes"]["files"] == {"changed": ["shop.py"]}
        shown = master.command("status").stdout
        assert f"code     2: git {second[:10]} (main), Python {platform.python_version()}, " in shown
        assert "; changed: git " in shown


def test_a_refused_reload_tells_which_code_it_was(application) -> None:
    where = application(version="1")
    with supervised("shop:app", cwd=where) as master:
        told(master)
        application(version="2", prelude="raise RuntimeError('broken')\n")
        assert master.command("reload").returncode != 0
        refused = master.status()["reloads"][-1]
        assert refused["outcome"] == "refused"
        assert told(master)["changes"] is None


def test_the_code_is_known_after_an_upgrade_of_the_master(application) -> None:
    with supervised("shop:app", cwd=application()) as master:
        before = told(master)["code"]
        assert master.command("upgrade").returncode == 0
        master.wait_status(lambda status: status["master"]["epoch"] == 2)
        assert told(master)["code"] == before


def test_a_file_whose_name_is_no_utf8_is_code_like_any_other(application, tmp_path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    where = application("1", WAITING.format(gate=str(gate)))
    odd = os.path.join(os.fsencode(where), b"caf\xe9.py")
    with open(odd, "w") as file:
        file.write("x = 1\n")
    with supervised("shop:app", cwd=where) as master:
        before = told(master)
        with open(odd, "w") as file:
            file.write("x = 2\n")
        assert "changed: modified: caf\\udce9.py" in reloaded(master, gate)
        assert told(master)["fingerprint"] != before["fingerprint"]
        assert master.command("upgrade").returncode == 0
        assert master.status()["current"] == 2

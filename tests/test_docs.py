"""What the pages say is so: their commands run and print what stands there, in the order of the page."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import COMMAND_TIMEOUT_S, Terminal, blocks
from scenario import DEADLINE_S, MARK, ROOT, Segue, environment, free_port, made_directory, supervised

from segue.supervisor.setting_reference import page

pytestmark = pytest.mark.timeout(2 * COMMAND_TIMEOUT_S)


def test_every_snippet_of_the_page_on_services_runs(tmp_path: Path) -> None:
    code = [block.text for block in blocks("services") if block.language == "python"]
    (tmp_path / "app.py").write_text("\n\n".join(code))
    (tmp_path / "key.txt").write_text("hush\n")
    (tmp_path / "segue.toml").write_text("")
    with supervised("app:app", "--workers", "2", cwd=tmp_path) as master:
        terminal = Terminal(
            tmp_path, commands_of(master, tmp_path), {"localhost:8000": f"127.0.0.1:{master.port}"}
        )
        assert terminal.follow("services") >= 4
        master.stop()


def test_a_new_user_gets_through_the_quick_start_from_an_empty_directory(tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    directory.mkdir()
    port = free_port()
    source = tmp_path / "source"  # pip builds in the directory that it is given
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    )
    environ = {key: value for key, value in os.environ.items() if key.startswith("PIP_")} | {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TMPDIR": made_directory("segue-q-"),
        "PYTHONDONTWRITEBYTECODE": "1",  # the code changes faster than a time stamp
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "SEGUE_PORT": str(port),
        MARK: os.environ[MARK],
    }
    replaced = {
        "install --quiet segue": f"install --quiet {source}",
        "127.0.0.1:8000": f"127.0.0.1:{port}",
        "segue reload": "segue reload --wait drained",  # else the old code may answer for a moment more
    }
    terminal = Terminal(directory, environ, replaced)
    try:
        assert terminal.follow("quick-start") >= 10
        assert terminal.background[0].wait(DEADLINE_S) == 0
    finally:
        terminal.close()


def test_the_page_on_draining_is_true(tmp_path: Path, application: Callable[..., Path]) -> None:
    admin = f"127.0.0.1:{free_port()}"
    with supervised("shop:app", "--admin", admin, cwd=application()) as master:
        terminal = Terminal(tmp_path, commands_of(master, tmp_path), {"127.0.0.1:9000": admin})
        assert terminal.follow("draining") == 4
        master.stop()


def test_the_reference_of_settings_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == page(), "run: make docs"


def test_no_link_between_pages_is_dead() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            to = (path.parent / name).resolve() if name else path
            assert to.exists(), f"{path.name}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", to.read_text(), re.M)
                assert anchor in {slug(head) for head in heads}, f"{path.name}: {target}"


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def commands_of(master: Segue, directory: Path) -> dict[str, str]:
    """An environment in which ``segue`` is the one under test, and finds this instance."""
    scripts = directory / "bin"
    scripts.mkdir()
    (scripts / "segue").write_text(f'#!/bin/sh\nexec {sys.executable} -m segue.supervisor.cli "$@"\n')
    (scripts / "segue").chmod(0o755)
    env = environment(PYTHONPATH=str(ROOT), SEGUE_RUNTIME_DIR=master.runtime_dir)
    return env | {"PATH": f"{scripts}:{env['PATH']}"}

"""Every command on every page runs: beside a live instance here, or in the test that is named here."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import httpx2
import pytest
import yaml  # type: ignore[import-untyped]
from hsp_harness import broker
from openai_server import openai_server
from pages import COMMAND_TIMEOUT_S, Terminal, blocks, pages
from scenario import DEADLINE_S, ROOT, free_port, segue, supervised
from test_docs import commands_of
from test_hsp_agents import connected, written

from segue.supervisor.cli import cli

pytestmark = pytest.mark.timeout(2 * COMMAND_TIMEOUT_S)
SHOP = """
from typing import Annotated

import msgspec
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import segue

services = segue.Services()


class Model(msgspec.Struct):
    model: str = "small"


class LLM:
    def __init__(self, settings: Model) -> None:
        self.model = settings.model


services.declare("llm", LLM, settings=Model)


async def order(request):
    return PlainTextResponse("an order")


app = Starlette(routes=[Route("/{path:path}", order)], lifespan=services.lifespan)
"""
DEVELOPING = {"segue serve shop.app:app --reload": "segue serve shop.app:app --reload --name dev"}
LIVE: dict[str, dict[str, str]] = {
    "README": {
        **DEVELOPING,
        "segue serve shop.app:app --workers 2": "segue serve shop.app:app --workers 2 --name two",
        "segue stop": "segue stop --name two",
    },
    "control-api": {},
    "dashboard": {"segue serve shop.app:app": "segue serve shop.app:app --name seen"},
    "deploys": {"g8w1": "g3w1", "generation=8": "generation=6", "--canary-for 300": "--canary-for 1"},
    "development": DEVELOPING,
    "metrics": {},
    "takeover": {},
}
"""Pages whose commands are typed beside an instance of ``shop.app:app``, and what is meant there by what stands on them."""
FOLLOWED = {*LIVE, "backend", "draining", "quick-start", "services", "systemd"}
"""These by tests/test_docs.py, and the last by tests/test_systemd.py on a machine of its own."""
ELSEWHERE = {
    "make bench": "tests/test_bench.py::test_a_group_of_figures_is_measured_and_judged",
    "make compare": "tests/test_compare.py::test_one_server_goes_through_scenarios_and_a_page_is_written",
    "make chaos": "tests/test_chaos.py::test_whatever_goes_wrong_only_what_a_killed_worker_held_is_lost",
    "make run": "tests/test_docs_commands.py::test_the_commands_of_the_page_on_the_backend_do_what_it_says",
    "make test": "tests/test_docs_commands.py::test_ci_runs_what_the_readme_says",
    "pip install .": "tests/test_docs.py::test_a_new_user_gets_through_the_quick_start_from_an_empty_directory",
    "ssh -L 9000:/run/segue/default/control.sock server.example": (
        "tests/test_dashboard.py::test_the_same_page_stands_on_the_control_socket"
    ),
    "docker stop --time 45 CONTAINER": "tests/test_first_process.py::test_signals_do_what_they_do_elsewhere",
    "segue serve shop.app:app --bind unix:/run/shop/http.sock --forwarded-allow-ips '*' --health-path /healthz": (
        "tests/test_proxies.py::test_behind_a_proxy_nobody_sees_a_reload"
    ),
}
"""What needs more than an instance, and the test that does the same."""
GIVEN = re.compile(r'make (bench|chaos|compare) ARGS="(.*)"')
"""What is done with these arguments is too long for a test; that they are understood is not."""


def test_no_command_on_any_page_is_left_out() -> None:
    """Who writes another one has to let it run."""
    for page in pages():
        for block in blocks(page):
            assert block.commands or not re.search(r"^\$ ", block.text, re.M), (
                f"{page}: not a console:\n{block.text}"
            )
            for command, _ in block.commands:
                where = "" if GIVEN.fullmatch(command) else ELSEWHERE.get(command)
                assert where is not None or page in FOLLOWED, f"{page}: nobody runs {command!r}"
                if where:
                    path, _, name = where.partition("::")
                    assert f"def {name}(" in (ROOT / path).read_text(), where


@pytest.mark.parametrize("page", LIVE)
def test_the_commands_of_a_page_do_what_it_says(page: str, tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "app.py").write_text(SHOP)
    (tmp_path / ".curlrc").write_text("fail\n")
    (tmp_path / "token").write_text("a-token-of-many-letters-0123456789\n")
    (tmp_path / "token").chmod(0o600)
    with supervised("shop.app:app", "--probation", "1", "--park-for", "600", cwd=tmp_path) as master:
        environ = commands_of(master, tmp_path)
        environ |= {"HOME": str(tmp_path), "MASTER": str(master.process.pid)}
        environ |= {"SEGUE_NAME": "default", "SEGUE_BIND": "127.0.0.1:0"}
        replaced = {
            "/run/segue/default": master.directory,
            "127.0.0.1:9000": f"127.0.0.1:{free_port()}",
            "/etc/shop/token": str(tmp_path / "token"),
        }
        if page == "deploys":
            master.reload("--wait", "probation")
        terminal = Terminal(tmp_path, environ, LIVE[page] | replaced, ELSEWHERE)
        try:
            assert terminal.follow(page) >= 1
        finally:
            terminal.close()
            if page == "takeover":  # another one is the master since
                master.process.wait()
            elif master.process.poll() is None:
                master.stop()


def test_the_commands_of_the_page_on_the_backend_do_what_it_says(tmp_path: Path) -> None:
    """With a model server, a broker, and another agent there."""
    sales = tmp_path / "sales"
    sales.mkdir()
    (tmp_path / ".curlrc").write_text("fail\n")
    port = free_port()
    with broker(tmp_path) as mqtt, openai_server() as model:
        (sales / "segue.toml").write_text(written(mqtt, "sales"))
        (tmp_path / "segue.toml").write_text(written(mqtt, "billing"))
        env = {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}
        with supervised(cwd=sales, env=env, name="sales") as master:
            environ = commands_of(master, tmp_path) | env
            environ |= {"SEGUE_NAME": "default", "SEGUE_BIND": f"127.0.0.1:{port}"}
            replaced = {
                "http://127.0.0.1:11434/v1": model.url(),
                "localhost:8000": f"127.0.0.1:{port}",
                "other.example.com": "127.0.0.1",
            }
            terminal = Terminal(tmp_path, environ, replaced)
            try:
                first, last = (block for block in blocks("backend") if block.is_listing)
                terminal.do(first)
                master.wait_status(connected)
                with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S) as http:
                    master.wait_status(lambda _: [each["ai_id"] for each in http.get("/api/v1/peers").json()
                                                  if each["capabilities"]] == ["sales"])  # fmt: skip
                terminal.do(last)
            finally:
                terminal.close()
            master.stop(None)


def test_ci_runs_what_the_readme_says() -> None:
    assert re.search("^make test", (ROOT / ".ci" / "run").read_text(), re.M)


@pytest.mark.parametrize(
    ("target", "module"), [("bench", "bench"), ("chaos", "bench.chaos"), ("compare", "bench.compare")]
)
def test_what_make_is_given_is_understood(target: str, module: str) -> None:
    """Without doing it: a wrong argument behind those of the page is the only one that is complained of."""
    makefile = (ROOT / "Makefile").read_text()
    assert f"$(BIN)/python -m {module} $(ARGS)" in makefile
    commands = [command for page in pages() for block in blocks(page) for command, _ in block.commands]
    given = [found[2] for command in commands if (found := GIVEN.fullmatch(command)) and found[1] == target]
    assert given
    for arguments in given:
        done = subprocess.run(
            [sys.executable, "-m", module, *shlex.split(arguments), "--no-such-option"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].endswith("unrecognized arguments: --no-such-option"), done.stderr


# ------------------------------------------------------------------------------- what stands in the text of the pages


def spans(page: str) -> list[str]:
    """Each `segue …` in the running text."""
    text = (ROOT / ("README.md" if page == "README" else f"docs/{page}.md")).read_text()
    return [each.replace("\\|", "|") for each in re.findall(r"`(segue [^`]*)`", text.replace("\n", " "))]


@pytest.mark.parametrize("page", pages())
def test_commands_in_the_text_exist_with_these_options(page: str) -> None:
    for span in spans(page):
        words = [word.strip("[]…,") for word in span.replace("|", " ").split()[1:]]
        command: Any = cli
        known = {name for parameter in cli.params for name in parameter.opts}
        for word in words:
            if isinstance(command, click.Group) and not word.startswith("-") and word:
                found = command.get_command(click.Context(command), word)
                assert found is not None, f"{page}: {span}"
                command = found
                known |= {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
            elif word.startswith("-") and word != "-":
                assert word.partition("=")[0] in known | {"--help", "--version"}, f"{page}: {span}: {word}"


def options(command: click.Command) -> set[str]:
    """Of a command and all below it."""
    found = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    if isinstance(command, click.Group):
        found = found.union(*map(options, command.commands.values()))
    return found


@pytest.mark.parametrize("page", sorted({*pages()} - {"benchmarks"}))  # which are of its own programs
def test_options_in_the_text_exist(page: str) -> None:
    text = (ROOT / ("README.md" if page == "README" else f"docs/{page}.md")).read_text()
    if page == "migrating":  # the first column of its tables is somebody else's
        text = re.sub(r"^\|[^|]*\|", "", text, flags=re.M)
    for span in re.findall(r"`(-[^`]*)`", text.replace("\n", " ")):
        for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
            assert name in options(cli), f"{page}: {span}"


def test_settings_on_the_pages_are_taken(tmp_path: Path) -> None:
    count = 0
    for page in pages():
        for block in blocks(page):
            is_toml = block.language == "toml" or (
                not block.language and re.match(r"\[+services\.", block.text)
            )
            if is_toml:
                count += 1
                assert tomllib.loads(block.text), page
                (tmp_path / "segue.toml").write_text(block.text)
                done = segue("config", cwd=tmp_path)
                assert done.returncode == 0, f"{page}: {done.stderr}"
    assert count >= 5


def test_python_on_the_pages_is_python() -> None:
    snippets = [
        (page, block.text) for page in pages() for block in blocks(page) if block.language == "python"
    ]
    assert len(snippets) >= 5
    for page, text in snippets:
        compile(text, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_what_containers_run_is_taken(tmp_path: Path) -> None:
    """The commands of the Dockerfile and of the pod: their options exist, with these values."""
    docker, pod = [block.text for block in blocks("containers") if not block.is_listing]
    command = re.findall(r"CMD (\[.*\])", docker)[0]
    [container] = yaml.safe_load(pod)["spec"]["containers"]
    for arguments in (yaml.safe_load(command), container["args"]):
        assert arguments[:2] == ["segue", "serve"]
        done = segue("config", *arguments[2:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert container["readinessProbe"]["httpGet"]["path"] in done.stdout

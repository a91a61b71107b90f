"""Settings: what is taken, what counts where several places speak, and what an error says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import uvicorn
import uvicorn.config
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from segue.supervisor import addresses, settings
from segue.supervisor.options import ServeCommand, serve_options
from segue.supervisor.setting_schema import SUPERVISED, Kind
from segue.supervisor.setting_table import BY_KEY, REFUSED, TABLE
from segue.supervisor.settings import Effective, SettingsError

UVICORN_COMMAND: click.Command = uvicorn.main


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path


def load(base: Path, environ: dict[str, str] | None = None, /, **flags: Any) -> Effective:
    return settings.load(flags, environ or {}, str(base))


def refusal(base: Path, environ: dict[str, str] | None = None, /, **flags: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load(base, environ, **flags)
    return str(caught.value)


def invoke(*arguments: str) -> tuple[dict[str, Any], Any]:
    """What a command with our options is called with."""
    seen: dict[str, Any] = {}

    @click.command(cls=ServeCommand)
    @click.option("--running", is_flag=True)
    @serve_options
    def command(running: bool, **flags: Any) -> None:
        seen.update(flags, running=running)

    return seen, CliRunner().invoke(command, arguments)


def flags_of(*arguments: str) -> dict[str, Any]:
    seen, result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    del seen["running"]
    return seen


# ------------------------------------------------------------------------------------- everything that uvicorn has


def uvicorn_options() -> list[click.Parameter]:
    return list(UVICORN_COMMAND.params)


OURS = {setting.uvicorn: setting for setting in TABLE if setting.uvicorn}
REFUSED_NAMES = {refused.uvicorn for refused in REFUSED.values()}
OWN_DEFAULTS = {"timeout_keep_alive": 75, "timeout_graceful_shutdown": 30.0, "workers": 1}


@pytest.mark.parametrize("option", uvicorn_options(), ids=lambda option: str(option.name))
def test_every_option_of_uvicorn_is_taken_or_refused_with_a_reason(
    option: click.Parameter, base: Path
) -> None:
    name = str(option.name)
    assert (name in OURS) != (name in REFUSED_NAMES), (
        f"uvicorn's {option.opts} is neither taken nor refused, or both"
    )
    if name in REFUSED_NAMES:
        arguments = [option.opts[0]] if getattr(option, "is_flag", False) else [option.opts[0], "1"]
        key = option.opts[0].removeprefix("--")
        message = refusal(base, **flags_of(*arguments))
        assert key in message
        assert f"flag --{key}" in message
        assert REFUSED[key].reason in message


@pytest.mark.parametrize(
    "option", [o for o in uvicorn_options() if o.name in OURS], ids=lambda option: str(option.name)
)
def test_what_is_taken_has_uvicorns_flag_type_and_default(option: click.Parameter) -> None:
    setting = OURS[option.name]
    if isinstance(option, click.Option):
        assert [setting.flag] == option.opts
        assert [f"--no-{setting.key}"] * (setting.form.value == "--key/--no-key") == option.secondary_opts
        assert option.is_flag == (setting.kind is Kind.SWITCH and setting.form.value != "--key true")
        assert option.multiple == (setting.kind is Kind.LIST)
    if isinstance(option.type, click.Choice):
        assert tuple(option.type.choices) == setting.choices
        assert not setting.importable
    kinds = {"integer": Kind.INTEGER, "float": Kind.NUMBER, "boolean": Kind.SWITCH}
    if setting.key != "timeout-graceful-shutdown":  # fractions are taken, too
        assert kinds.get(option.type.name, setting.kind) is setting.kind
    assert setting.kind not in {Kind.INTEGER, Kind.SWITCH} or option.type.name in kinds
    default = UVICORN_COMMAND.make_context("uvicorn", ["x:y"], resilient_parsing=True).params[
        str(option.name)
    ]
    if option.name in OWN_DEFAULTS:
        assert setting.default == OWN_DEFAULTS[str(option.name)]
    elif setting.default is None:
        # left to uvicorn: an ssl default would have the master import ssl
        assert default in {None, "", "x:y"} or setting.key in {"ssl-version", "ssl-cert-reqs"}
    else:
        assert tuple(default) == () if setting.kind is Kind.LIST else default == setting.default


def test_import_string_choices_are_those_of_uvicorn() -> None:
    import typing

    for key, kind in (
        ("http", uvicorn.config.HTTPProtocolType),
        ("ws", uvicorn.config.WSProtocolType),
        ("loop", uvicorn.config.LoopFactoryType),
    ):
        assert BY_KEY[key].choices == typing.get_args(kind)


UVICORN_COMMAND_LINES: list[list[str]] = [
    ["x:y"],
    [
        "x:y",
        "--http",
        "h11",
        "--ws",
        "none",
        "--loop",
        "asyncio",
        "--lifespan",
        "off",
        "--interface",
        "asgi3",
    ],
    ["x:y", "--factory", "--no-access-log", "--no-server-header", "--no-date-header", "--no-proxy-headers"],
    ["x:y", "--use-colors", "--log-level", "warning", "--root-path", "/api", "--forwarded-allow-ips", "*"],
    ["x:y", "--ws-per-message-deflate", "false", "--ws-max-size", "9", "--ws-max-queue", "3"],
    ["x:y", "--ws-ping-interval", "1.5", "--ws-ping-timeout", "2", "--reset-contextvars", "--backlog", "7"],
    ["x:y", "--limit-concurrency", "5", "--limit-max-requests", "6", "--limit-max-requests-jitter", "2"],
    ["x:y", "--header", "X-A:1", "--header", "X-B:2:3", "--timeout-keep-alive", "0"],
    ["x:y", "--timeout-graceful-shutdown", "9", "--h11-max-incomplete-event-size", "4096"],
    ["x:y", "--http", "shop.protocols:Http", "--ws", "shop.protocols:Ws", "--loop", "shop.loops:factory"],
    ["x:y", "--env-file", "FILE", "--log-config", "FILE", "--ssl-keyfile", "FILE", "--ssl-certfile", "FILE"],
    [
        "x:y",
        "--ssl-certfile",
        "FILE",
        "--ssl-version",
        "17",
        "--ssl-cert-reqs",
        "2",
        "--ssl-ca-certs",
        "FILE",
    ],
    ["x:y", "--ssl-certfile", "FILE", "--ssl-ciphers", "HIGH", "--ssl-keyfile-password", "hush"],
]


@pytest.mark.parametrize("line", UVICORN_COMMAND_LINES, ids=lambda line: " ".join(line)[:60])
def test_a_uvicorn_command_line_gives_the_worker_what_uvicorn_would_get(
    line: list[str], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn.config as config_module

    (base / "file").write_text("")
    line = [str(base / "file") if word == "FILE" else word for word in line]
    theirs: dict[str, Any] = {}
    callback = UVICORN_COMMAND.callback
    assert callback is not None
    monkeypatch.setitem(callback.__globals__, "run", lambda app, **arguments: theirs.update(arguments))
    UVICORN_COMMAND.main(line, standalone_mode=False)
    for name in (*SUPERVISED, "timeout_worker_healthcheck", *(n for n in theirs if n.startswith("reload"))):
        theirs.pop(name, None)
    effective = load(base, **flags_of(*line))
    ours = effective.settings.uvicorn
    defaults = {
        "log_config": config_module.LOGGING_CONFIG,
        "ssl_version": config_module.SSL_PROTOCOL_VERSION,
        "ssl_cert_reqs": 0,
    }
    for name, own in OWN_DEFAULTS.items():
        if name in theirs and f"--{name.replace('_', '-')}" not in line:
            theirs[name] = own
    assert {name: ours.get(name, defaults.get(name)) for name in theirs} == theirs
    assert set(ours) <= set(theirs)
    assert None not in ours.values()
    if "FILE" not in str(line) and not any(str(base) in word for word in line):
        uvicorn.Config("x:y", **{**ours, "log_config": None})  # it takes all of them


def test_the_master_imports_neither_uvicorn_nor_ssl() -> None:
    code = "import segue.supervisor.settings, segue.supervisor.options, sys; print([m for m in sys.modules])"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("uvicorn", "ssl", "asyncio", "starlette", "h11") if f"'{name}'" in modules]


# --------------------------------------------------------------------------------------------------- command line


def test_only_flags_that_were_given_are_passed_on() -> None:
    assert flags_of() == {}
    assert flags_of("shop:app", "--port", "8000", "--bind", "a:1", "--bind", "b:2", "--no-access-log") == {
        "app": "shop:app",
        "port": 8000,  # although it is the default
        "bind": ("a:1", "b:2"),
        "access_log": False,
    }
    assert flags_of("--config", "x.toml") == {"config": "x.toml"}


def test_a_commands_own_options_are_always_passed_on() -> None:
    assert invoke()[0] == {"running": False}
    assert invoke("--running")[0] == {"running": True}


def test_the_environment_is_not_read_by_click(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_PORT", "1")
    monkeypatch.setenv("UVICORN_PORT", "2")
    assert flags_of() == {}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["--port", "x"], "--port"), (["--log-level", "loud"], "--log-level"), (["--nonsense"], "--nonsense")],
)
def test_a_flag_of_the_wrong_type_is_a_usage_error(arguments: list[str], part: str) -> None:
    _, result = invoke(*arguments)
    assert result.exit_code == 2
    assert part in result.output


def test_help_has_every_setting_with_its_default_under_its_group() -> None:
    _, result = invoke("--help")
    text = " ".join(result.output.split())
    for setting in TABLE:
        assert setting.key == "app" or f"--{setting.key} " in text or f"--{setting.key}, " in text, (
            setting.key
        )
        assert f"{setting.group.value}:" in text
    for key in REFUSED:
        assert f"--{key} " not in text
    for default in (
        "127.0.0.1]",
        "8000]",
        "75 seconds]",
        "300 seconds]",
        "60 seconds]",
        "access-log]",
        "info]",
    ):
        assert f"[default: {default}" in text


# ------------------------------------------------------------------------------------------------------- defaults


def test_defaults(base: Path) -> None:
    effective = load(base)
    found = effective.settings
    assert effective.file is None
    assert set(effective.sources.values()) == {"default"}
    assert found.app is None
    assert found.binds == ("127.0.0.1:8000",)
    assert (found.app_dir, found.base_dir, found.python) == (str(base), str(base), sys.executable)
    assert (found.workers, found.name, found.runtime_dir, found.backlog) == (1, "default", None, 2048)
    assert (found.ready_timeout, found.drain_timeout, found.timeout_graceful_shutdown) == (60, 300, 30)
    assert (found.idle_grace, found.timeout_keep_alive, found.heartbeat_timeout, found.stop_delay) == (
        30,
        75,
        30,
        0,
    )
    assert (found.warm_up, found.health_path, found.admin, found.token_file) == ((), None, None, None)
    assert not {"app", "host", "port", "uds", "fd", "workers", "app_dir", "ssl_version"} & set(found.uvicorn)
    assert found.uvicorn["timeout_keep_alive"] == 75
    msgspec.json.encode(found)  # it travels to the workers


# ----------------------------------------------------------------------------------------------------- precedence


def test_precedence_is_flag_then_our_variable_then_uvicorns_then_file_then_default(base: Path) -> None:
    (base / "segue.toml").write_text("workers = 2\n")
    environ = {"SEGUE_WORKERS": "5", "UVICORN_WORKERS": "4", "WEB_CONCURRENCY": "3"}
    expected = [
        (6, "flag --workers"),
        (5, "environment SEGUE_WORKERS"),
        (4, "environment UVICORN_WORKERS"),
        (3, "environment WEB_CONCURRENCY"),
        (2, f"{base}/segue.toml"),
        (1, "default"),
    ]
    flags = {"workers": 6}
    for workers, source in expected:
        effective = load(base, environ, **flags)
        assert (effective.settings.workers, effective.sources["workers"]) == (workers, source)
        if flags:
            flags = {}
        elif environ:
            del environ[next(iter(environ))]
        else:
            (base / "segue.toml").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("variable", "value", "attribute", "expected"),
    [
        ("SEGUE_APP", "a:b", "app", "a:b"),
        ("UVICORN_APP", "a:b", "app", "a:b"),
        ("SEGUE_BIND", "a:1,b:2 unix:/s", "binds", ("a:1", "b:2", "unix:/s")),
        ("UVICORN_PORT", "81", "binds", ("127.0.0.1:81",)),
        ("UVICORN_HOST", "::", "binds", ("[::]:8000",)),
        ("UVICORN_UDS", "s", "binds", ("unix:{base}/s",)),
        ("UVICORN_FD", "3", "binds", ("fd:3",)),
        ("SEGUE_READY_TIMEOUT", "1.5", "ready_timeout", 1.5),
        ("SEGUE_WARM_UP", "/a,/b", "warm_up", ("/a", "/b")),
        ("SEGUE_WARM_UP", "/a /b", "warm_up", ("/a", "/b")),
        ("SEGUE_NAME", "shop", "name", "shop"),
        ("SEGUE_RUNTIME_DIR", "/run/x", "runtime_dir", "/run/x"),
        ("SEGUE_ADMIN", ":9000", "admin", ":9000"),
        ("WEB_CONCURRENCY", "", "workers", 1),
        ("SEGUE_WORKERS", "", "workers", 1),
    ],
)
def test_a_variable_sets(variable: str, value: str, attribute: str, expected: Any, base: Path) -> None:
    found = getattr(load(base, {variable: value}).settings, attribute)
    if isinstance(expected, tuple):
        expected = tuple(item.format(base=base) for item in expected)
    assert found == expected


@pytest.mark.parametrize(
    ("variable", "value", "name", "expected"),
    [
        ("UVICORN_ACCESS_LOG", "off", "access_log", False),
        ("UVICORN_ACCESS_LOG", " No ", "access_log", False),
        ("SEGUE_ACCESS_LOG", "0", "access_log", False),
        ("SEGUE_RESET_CONTEXTVARS", "YES", "reset_contextvars", True),
        ("UVICORN_WS_PER_MESSAGE_DEFLATE", "f", "ws_per_message_deflate", False),
        ("UVICORN_HEADERS", "X-A:1 X-B:2", "headers", [["X-A", "1"], ["X-B", "2"]]),
        ("SEGUE_HEADER", "Cache-Control: no-cache, no-store\nX-B: 2\n", "headers",
         [["Cache-Control", "no-cache, no-store"], ["X-B", "2"]]),
        ("FORWARDED_ALLOW_IPS", "10.0.0.1", "forwarded_allow_ips", "10.0.0.1"),
        ("FORWARDED_ALLOW_IPS", "", "forwarded_allow_ips", ""),
        ("UVICORN_FORWARDED_ALLOW_IPS", "*", "forwarded_allow_ips", "*"),
        ("UVICORN_LOG_LEVEL", "debug", "log_level", "debug"),
        ("UVICORN_WS_PING_INTERVAL", "3", "ws_ping_interval", 3.0),
        ("UVICORN_HEADER", "X:1", "headers", []),  # click names it after the parameter
        ("UVICORN_NONSENSE", "1", "headers", []),
    ],
)  # fmt: skip
def test_a_variable_reaches_uvicorn(variable: str, value: str, name: str, expected: Any, base: Path) -> None:
    assert load(base, {variable: value}).settings.uvicorn[name] == expected


def test_a_flag_mends_a_wrong_variable(base: Path) -> None:
    assert load(base, {"SEGUE_WORKERS": "x", "UVICORN_PORT": "x"}, workers=2, port=1).settings.workers == 2


def test_an_empty_text_turns_off_what_the_file_says(base: Path) -> None:
    (base / "segue.toml").write_text('health-path = "/up"\nadmin = ":9000"\nroot-path = "/x"\n')
    found = load(base, health_path="", admin="", root_path="").settings
    assert (found.health_path, found.admin, found.uvicorn["root_path"]) == (None, None, "")


# ------------------------------------------------------------------------------------------------------------ file


@pytest.mark.parametrize(
    ("text", "attribute", "expected"),
    [
        ('bind = "a:1"', "binds", ("a:1",)),
        ('bind = ["a:1", "[::1]:2"]', "binds", ("a:1", "[::1]:2")),
        ("ready-timeout = 5", "ready_timeout", 5.0),
        ("ready_timeout = 5.5", "ready_timeout", 5.5),
        ('warm-up = ["/a?b=1,2"]', "warm_up", ("/a?b=1,2",)),
        ('app = "a:b"\nfactory = true', "factory", True),
        ("reload = false", "workers", 1),
    ],
)
def test_the_file_sets(text: str, attribute: str, expected: Any, base: Path) -> None:
    (base / "segue.toml").write_text(text)
    effective = load(base)
    assert getattr(effective.settings, attribute) == expected
    assert effective.file == f"{base}/segue.toml"


def test_segue_toml_comes_before_pyproject_and_a_named_file_before_both(base: Path) -> None:
    (base / "pyproject.toml").write_text("[tool.other]\nx = 1\n")
    assert load(base).file is None
    (base / "pyproject.toml").write_text("[tool.segue]\nworkers = 2\n")
    effective = load(base)
    assert (effective.settings.workers, effective.file) == (2, f"{base}/pyproject.toml")
    assert effective.sources["workers"] == f"{base}/pyproject.toml [tool.segue]"
    (base / "segue.toml").write_text("workers = 3\n")
    assert load(base).settings.workers == 3
    (base / "other.toml").write_text("workers = 4\n")
    effective = load(base, {"SEGUE_CONFIG": "other.toml"})
    assert (effective.settings.workers, effective.sources["config"]) == (4, "environment SEGUE_CONFIG")
    effective = load(base, {"SEGUE_CONFIG": "nowhere.toml"}, config="pyproject.toml")
    assert (effective.settings.workers, effective.sources["config"]) == (2, "flag --config")


def test_files_are_read_anew_through_a_link_that_has_moved(base: Path) -> None:
    for number in (1, 2):
        (base / f"r{number}").mkdir()
        (base / f"r{number}" / "segue.toml").write_text(f"workers = {number}\n")
    current = base / "current"
    current.symlink_to("r1")
    assert load(current).settings.workers == 1
    current.unlink()
    current.symlink_to("r2")
    effective = load(current)
    assert effective.settings.workers == 2
    assert effective.settings.app_dir == str(current)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("worker = 2", ["worker (", "did you mean workers?"]),
        ("headers = []", ["headers", "did you mean header?"]),
        ("[tool.segue]\nworkers = 2", ["tool (", "without [tool.segue]"]),
        ("ready-timeout = 1\nready_timeout = 2", ["ready-timeout", "twice"]),
        ('workers = "2"', ["workers = '2'", "a whole number from 1 up to 1024", "default (1)"]),
        ("workers = 2.0", ["workers = 2.0", "whole number"]),
        ("workers = true", ["workers = True", "whole number"]),
        ("workers = 0", ["workers = 0", "from 1"]),
        ("factory = 1", ["factory = 1", "true or false"]),
        ("app = 1", ["app = 1", "a text"]),
        ("bind = 8000", ["bind = 8000", "a list of texts or one text"]),
        ("bind = [1]", ["bind = [1]", "a list of texts"]),
        ("bind = []", ["bind = []", "at least one"]),
        ('warm-up = "/a"', ["warm-up = '/a'", "a list"]),
        ("ready-timeout = nan", ["ready-timeout = nan", "a number of seconds above 0"]),
        ("ready-timeout = inf", ["ready-timeout = inf", "above 0"]),
        ("ready-timeout = 0", ["ready-timeout = 0", "above 0"]),
        ("drain-timeout = -1", ["drain-timeout = -1", "above 0"]),
        ("idle-grace = -0.1", ["idle-grace = -0.1", "from 0"]),
        ("stop-delay = -1", ["stop-delay", "from 0"]),
        ("timeout-graceful-shutdown = 0", ["timeout-graceful-shutdown = 0", "above 0"]),
        ("timeout-keep-alive = -1", ["timeout-keep-alive", "from 0"]),
        ("timeout-keep-alive = 1.5", ["timeout-keep-alive", "whole number"]),
        ("heartbeat-timeout = 0", ["heartbeat-timeout", "above 0"]),
        ("port = 65536", ["port = 65536", "up to 65535"]),
        ('log-level = "loud"', ["log-level = 'loud'", "'debug'"]),
        ('http = "h12"', ["http = 'h12'", "'httptools'", "import string"]),
        ("ssl-keyfile-password = 123", ["ssl-keyfile-password (", "a text"]),
        ("reload = 1", ["reload = 1", "true or false"]),
        ("reload-delay = -1", ["reload-delay = -1", "from 0"]),
        ('reload = true\nreload-dir = "nowhere"', ["reload-dir", "a list"]),
        ('reload = true\nreload-dir = ["nowhere"]', ["reload-dir = 'nowhere'", "/nowhere is none"]),
        ("timeout-worker-healthcheck = 5", ["timeout-worker-healthcheck", "--heartbeat-timeout"]),
        ('config = "x"', ["config (", "not a setting"]),
        ("workers = \n", ["line 1", "not TOML"]),
        ("a = 1\nb = \x07", ["line 2", "not TOML"]),
        ("a = 1\nb = [", ["line 2", "not TOML"]),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_named_with_key_and_file(text: str, parts: list[str], base: Path) -> None:
    (base / "segue.toml").write_text(text)
    message = refusal(base)
    for part in (*parts, f"{base}/segue.toml"):
        assert part in message
    assert "123" not in message.replace(str(base), "")


def test_a_mistake_in_the_file_is_found_also_where_a_flag_overrides_it(base: Path) -> None:
    (base / "segue.toml").write_text('workers = "x"')
    assert "workers = 'x'" in refusal(base, workers=1)


def test_files_that_cannot_be_used_are_named(base: Path) -> None:
    assert "flag --config" in refusal(base, config="no.toml")
    assert f"{base}/no.toml" in refusal(base, {"SEGUE_CONFIG": "no.toml"})
    (base / "pyproject.toml").write_text("")
    message = refusal(base, config="pyproject.toml")
    assert "[tool.segue]" in message
    assert "pyproject.toml" in message
    (base / "pyproject.toml").write_text("[tool]\nsegue = 1\n")
    assert "tool.segue = 1" in refusal(base)
    (base / "segue.toml").write_bytes(b"workers = 1\nname = '\xff'\n")
    assert f"{base}/segue.toml, line 2: is not UTF-8" in refusal(base)
    (base / "segue.toml").unlink()
    (base / "segue.toml").mkdir()
    message = refusal(base)
    assert f"{base}/segue.toml" in message
    assert "Is a directory" in message


# ------------------------------------------------------------------------------------------------------ environment


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"SEGUE_WORKER": "1"}, ["SEGUE_WORKER ", "did you mean SEGUE_WORKERS?"]),
        ({"SEGUE_HEADERS": "x:1"}, ["SEGUE_HEADERS", "SEGUE_HEADER?"]),
        ({"SEGUE_XYZZY": ""}, ["SEGUE_XYZZY", "unset it"]),
        ({"SEGUE_RELOAD": "often"}, ["reload = 'often'", "SEGUE_RELOAD", "true or false"]),
        ({"UVICORN_RELOAD": "1", "UVICORN_RELOAD_DIRS": "src"}, ["reload-dir = 'src'", "UVICORN_RELOAD_DIRS"]),
        ({"UVICORN_TIMEOUT_WORKER_HEALTHCHECK": "9"}, ["UVICORN_TIMEOUT_WORKER_HEALTHCHECK", "--heartbeat-timeout"]),
        ({"WEB_CONCURRENCY": "four"}, ["workers = 'four'", "WEB_CONCURRENCY", "whole number"]),
        ({"UVICORN_WORKERS": "0"}, ["workers = '0'", "UVICORN_WORKERS", "from 1"]),
        ({"SEGUE_ACCESS_LOG": "maybe"}, ["access-log = 'maybe'", "SEGUE_ACCESS_LOG", "true or false"]),
        ({"SEGUE_READY_TIMEOUT": "nan"}, ["ready-timeout = 'nan'", "SEGUE_READY_TIMEOUT", "above 0"]),
        ({"SEGUE_READY_TIMEOUT": "1e999"}, ["ready-timeout", "SEGUE_READY_TIMEOUT"]),
        ({"SEGUE_WORKERS": "9" * 5000}, ["workers", "SEGUE_WORKERS"]),
        ({"UVICORN_LOG_LEVEL": "INFO"}, ["log-level = 'INFO'", "UVICORN_LOG_LEVEL", "'info'"]),
        ({"UVICORN_HEADERS": "nocolon"}, ["header = 'nocolon'", "UVICORN_HEADERS", "Name: value"]),
        ({"SEGUE_PORT": "http"}, ["port = 'http'", "SEGUE_PORT"]),
    ],
)  # fmt: skip
def test_a_mistake_in_the_environment_is_named_with_key_and_variable(
    environ: dict[str, str], parts: list[str], base: Path
) -> None:
    message = refusal(base, environ)
    for part in parts:
        assert part in message
    assert "environment" in message


def test_variables_of_others_are_left_alone(base: Path) -> None:
    environ = {
        "SEGUE_FDS": "3,4",
        "SEGUE_SERVICE_HOST": "10.0.0.1",  # Kubernetes, for a Service called segue
        "SEGUE_SERVICE_PORT": "80",
        "SEGUE_SERVICE_PORT_HTTP": "80",
        "SEGUE_PORT": "tcp://10.0.0.1:80",
        "SEGUE_PORT_80_TCP": "tcp://10.0.0.1:80",
        "SEGUE_PORT_80_TCP_ADDR": "10.0.0.1",
        "UVICORN_VERSION": "0.54",
        "SEGUEX": "1",
    }
    assert set(load(base, environ).sources.values()) == {"default"}


# ---------------------------------------------------------------------------------------------------- combinations


@pytest.fixture
def files(base: Path) -> Path:
    for name in ("key", "cert", "a.env"):
        (base / name).write_text("x")
    return base


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"bind": ("a:1",), "port": 1}, ["bind (flag --bind)", "port (flag --port)"]),
        ({"bind": ("a:1",), "host": "x"}, ["bind (", "host ("]),
        ({"bind": ("a:1",), "uds": "x"}, ["bind (", "uds ("]),
        ({"bind": ("a:1",), "fd": 3}, ["bind (", "fd ("]),
        ({"uds": "x", "fd": 3}, ["uds (", "fd ("]),
        ({"uds": "x", "port": 3}, ["uds (", "port ("]),
        ({"uds": ""}, ["uds = ''", "flag --uds", "empty path"]),
        ({"bind": ("a:1", "A:1")}, ["bind = 'A:1'", "bind = 'a:1'", "flag --bind", "same"]),
        ({"bind": ("unix:x", "unix:./x")}, ["'unix:./x'", "'unix:x'", "same"]),
        ({"admin": "127.0.0.1:8000"}, ["admin = '127.0.0.1:8000'", "bind"]),
        ({"admin": "9000"}, ["admin = '9000'", "flag --admin", "127.0.0.1:9000"]),
        ({"admin": "fd:3"}, ["admin = 'fd:3'", "HOST:PORT"]),
        ({"ssl_keyfile": "key"}, ["ssl-keyfile (flag --ssl-keyfile)", "ssl-certfile"]),
        ({"ssl_ca_certs": "cert"}, ["ssl-ca-certs (", "ssl-certfile"]),
        ({"ssl_keyfile_password": "hush"}, ["ssl-keyfile-password (", "ssl-certfile"]),
        ({"http2": True}, ["http2 (flag --http2)", "http = 'zttp'"]),
        ({"http2": True, "http": "h11"}, ["http2 (", "'h11' (flag --http)"]),
        ({"limit_max_requests_jitter": 3}, ["limit-max-requests-jitter (", "limit-max-requests,"]),
        ({"max_worker_rss_jitter": "1M"}, ["max-worker-rss-jitter (", "max-worker-rss,"]),
        ({"max_worker_age_jitter": 1.0}, ["max-worker-age-jitter (", "max-worker-age,"]),
        ({"max_worker_rss": "1X"}, ["max-worker-rss = '1X' (flag --max-worker-rss)", "'512M'", "above 0"]),
        ({"max_worker_rss": "0"}, ["max-worker-rss = '0'", "above 0"]),
        ({"max_worker_rss": "-1M"}, ["max-worker-rss = '-1M'"]),
        ({"canary": 2}, ["canary = 2 (flag --canary)", "workers = 1 (default)"]),
        ({"canary": 1, "strategy": "rolling"}, ["canary (flag --canary)", "'rolling' (flag --strategy)"]),
        ({"strategy": "replace", "park_for": 5.0}, ["park-for (flag --park-for)", "'replace' (flag --strategy)"]),
        ({"strategy": "blue"}, ["strategy = 'blue'", "'surge', 'rolling', 'replace'"]),
        ({"probation_5xx": 1.5}, ["probation-5xx = 1.5", "up to 1"]),
        ({"factory": True}, ["factory (flag --factory)", "APP"]),
        ({"app": "shop"}, ["app = 'shop' (argument APP)", "shop:app"]),
        ({"app": "shop/app.py"}, ["app = 'shop/app.py'", "shop.app:app"]),
        ({"app": "shop:"}, ["app = 'shop:'", "module:attribute"]),
        ({"health_path": "up"}, ["health-path = 'up'", "starts with '/'"]),
        ({"health_path": "/up?x"}, ["health-path", "without '?'"]),
        ({"health_path": "/api/v1/hot/up"}, ["health-path", "/api/v1/hot"]),
        ({"warm_up": ("/a", "b")}, ["warm-up = 'b'", "starts with '/'"]),
        ({"warm_up": ("/a b",)}, ["warm-up = '/a b'", "percent-encode"]),
        ({"name": "a/b"}, ["name = 'a/b'", "flag --name"]),
        ({"name": ""}, ["name = ''", "1 to 64"]),
        ({"name": ".."}, ["name = '..'", "the first not"]),
        ({"name": "-x"}, ["name = '-x'"]),
        ({"name": "a\n"}, ["name = 'a\\n'"]),
        ({"name": "x" * 65}, ["name = ", "1 to 64"]),
        ({"header": ("X",)}, ["header = 'X'", "flag --header"]),
        ({"header": ("X Y: 1",)}, ["header = 'X Y: 1'"]),
        ({"header": ("X: a\r\nSet-Cookie: b",)}, ["header = ", "one line"]),
        ({"header": ("X: \u20ac",)}, ["header = ", "Latin-1"]),
        ({"env_file": "no.env"}, ["env-file = 'no.env'", "flag --env-file", "no.env: No such file"]),
        ({"log_config": "no.ini"}, ["log-config = 'no.ini'", "No such file"]),
        ({"ssl_certfile": "no.pem"}, ["ssl-certfile = 'no.pem'", "No such file"]),
        ({"token_file": "no"}, ["token-file = 'no'", "No such file"]),
        ({"token_file": "."}, ["token-file = '.'", "it is a directory"]),
        ({"app_dir": "key"}, ["app-dir = 'key'", "it is not a directory"]),
        ({"app_dir": "no"}, ["app-dir = 'no'", "No such file"]),
        ({"python": "no/python"}, ["python = 'no/python'", "/no/python"]),
        ({"python": "no-such-python"}, ["python = 'no-such-python'"]),
    ],
)  # fmt: skip
def test_what_is_impossible_is_refused_naming_keys_and_places(
    flags: dict[str, Any], parts: list[str], files: Path
) -> None:
    message = refusal(files, **flags)
    for part in parts:
        assert part in message
    assert "hush" not in message


@pytest.mark.parametrize(
    ("written", "size", "shown"),
    [
        ("512M", 512 << 20, "512M"),
        ("2G", 2 << 30, "2G"),
        ("1.5GiB", 1536 << 20, "1536M"),
        ("1000", 1000, "1000"),
        ("10 kb", 10 << 10, "10K"),
        (4096, 4096, "4K"),
    ],
)
def test_a_size_is_written_in_bytes_or_with_a_letter(written: Any, size: int, shown: str, base: Path) -> None:
    effective = load(base, max_worker_rss=written)
    assert effective.settings.max_worker_rss == size
    line = next(
        line for line in settings.show(effective, False).splitlines() if line.startswith("max-worker-rss ")
    )
    assert line.split()[1] == shown
    assert load(base, {"SEGUE_MAX_WORKER_RSS": str(written)}).settings.max_worker_rss == size
    value = written if isinstance(written, int) else f'"{written}"'
    (base / "segue.toml").write_text(f"max-worker-rss = {value}\n")
    assert load(base).settings.max_worker_rss == size


def test_http_zttp_is_refused_where_it_is_not_installed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zttp", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(base, http="zttp", http2=True)
    for part in ("http = 'zttp' (flag --http)", "http2 (flag --http2)", "not installed", "pip install zttp"):
        assert part in message
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert load(base, http="zttp", http2=True).settings.uvicorn["http2"] is True
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (base / "python").write_text("#!/bin/sh\n")
    (base / "python").chmod(0o755)
    assert load(base, http="zttp", python="./python").settings.python == f"{base}/python"


def test_possible_combinations_are_taken(files: Path) -> None:
    found = load(files, ssl_certfile="cert", ssl_keyfile="key", ssl_cert_reqs=0, env_file="a.env").settings
    assert found.uvicorn["ssl_certfile"] == f"{files}/cert"
    assert found.uvicorn["ssl_cert_reqs"] == 0
    assert found.uvicorn["env_file"] == f"{files}/a.env"
    assert load(files, bind=("127.0.0.1:0",), admin="127.0.0.1:0").settings.admin == "127.0.0.1:0"


def test_a_file_that_went_missing_refuses_the_reload(files: Path) -> None:
    load(files, env_file="a.env")
    (files / "a.env").unlink()
    assert f"{files}/a.env: No such file" in refusal(files, env_file="a.env")


def test_paths_are_absolute_and_never_resolved(files: Path) -> None:
    (files / "releases").mkdir()
    (files / "current").symlink_to("releases")
    (files / "venv-python").symlink_to(sys.executable)
    found = load(files, app_dir="./current", python="./venv-python", token_file="current/../key").settings
    assert found.app_dir == f"{files}/current"
    assert found.python == f"{files}/venv-python"
    assert found.token_file == f"{files}/current/../key"
    path = str(Path(sys.executable).parent)
    assert load(files, {"PATH": path}, python="python3").settings.python == f"{path}/python3"


# ------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("environ", "file", "flags", "binds", "source"),
    [
        ({}, "", {"host": "0.0.0.0"}, ("0.0.0.0:8000",), "flag --host"),
        ({}, "", {"host": ""}, (":8000",), "flag --host"),
        ({}, "", {"host": "localhost", "port": 0}, ("localhost:0",), "flag --host, flag --port"),
        ({}, "", {"host": "::1"}, ("[::1]:8000",), "flag --host"),
        ({}, "port = 1", {"host": "x"}, ("x:1",), "flag --host, {base}/segue.toml"),
        ({}, 'bind = "a:1"', {"port": 2}, ("127.0.0.1:2",), "flag --port"),
        ({"SEGUE_BIND": "b:3"}, 'host = "a"\nport = 1', {}, ("b:3",), "environment SEGUE_BIND"),
        ({"SEGUE_BIND": "b:3", "UVICORN_PORT": "4"}, "", {}, ("b:3",), "environment SEGUE_BIND"),
        ({"UVICORN_PORT": "4"}, 'uds = "s"', {}, ("127.0.0.1:4",), "environment UVICORN_PORT"),
        ({"UVICORN_HOST": "b"}, "", {"uds": "s"}, ("unix:{base}/s",), "flag --uds"),
        ({}, "", {"fd": 0}, ("fd:0",), "flag --fd"),
    ],
)  # fmt: skip
def test_the_highest_place_that_says_where_to_listen_decides(
    environ: dict[str, str], file: str, flags: dict[str, Any], binds: tuple[str, ...], source: str, base: Path
) -> None:
    (base / "segue.toml").write_text(file)
    effective = load(base, environ, **flags)
    assert effective.settings.binds == tuple(bind.format(base=base) for bind in binds)
    assert effective.sources["bind"] == source.format(base=base)
    assert not {"host", "port", "uds", "fd"} & set(effective.sources)


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("Example.ORG:80", "example.org:80"),
        ("[::1]:8000", "[::1]:8000"),
        ("[0:0:0:0:0:0:0:1]:08000", "[::1]:8000"),
        ("[FE80::1%eth0]:80", "[fe80::1%eth0]:80"),
        (":80", ":80"),
        ("unix:/run/x.sock", "unix:/run/x.sock"),
        ("unix:run//x.sock", "unix:/base/run/x.sock"),
        ("unix:../x.sock", "unix:/base/../x.sock"),
        ("unix:/a b,c:d", "unix:/a b,c:d"),
        ("fd:3", "fd:3"),
        ("fd:03", "fd:3"),
    ],
)
def test_an_address_has_one_normal_form(written: str, normal: str) -> None:
    assert addresses.normalize(written, "/base") == normal
    assert addresses.normalize(normal, "/elsewhere") == normal


@pytest.mark.parametrize(
    ("written", "part"),
    [
        ("", "not an address"),
        ("8000", ":8000 (all interfaces)"),
        ("localhost", "localhost:8000"),
        ("[::1]", "[::1]:8000"),
        ("::1", "in brackets"),
        ("::1:8000", "in brackets"),
        ("host:", "port ''"),
        ("host:http", "port 'http'"),
        ("host:-1", "port '-1'"),
        ("host:65536", "port 65536"),
        ("host:\u0663", "port"),
        ("host:9999999999", "port"),
        ("*:80", ":80 for all"),
        ("127.0.0.300:80", "IPv4"),
        ("127.1:80", "IPv4"),
        ("[::g]:80", "IPv6"),
        ("[]:80", "IPv6"),
        ("[::1\u00e9]:80", "IPv6"),
        ("[fe80::1%]:80", "interface"),
        ("ho st:80", "host name"),
        ("-x:80", "host name"),
        ("a..b:80", "host name"),
        ("http://localhost:80", "URL"),
        ("fd://3", "fd:NUMBER"),
        ("unix:///run/x", "unix:/run/x"),
        ("unix:", "empty path"),
        ("unix:@name", "abstract"),
        ("unix:/run/", "directory"),
        ("unix:/a\x00b", "control character"),
        ("unix:/" + "x" * 107, "longer than 107"),
        ("fd:x", "fd:NUMBER"),
        ("fd:-1", "fd:NUMBER"),
    ],
)
def test_what_is_no_address_is_refused_with_what_to_write_instead(
    written: str, part: str, base: Path
) -> None:
    with pytest.raises(addresses.AddressError) as caught:
        addresses.normalize(written, "/base")
    assert part in str(caught.value)
    assert "; expected " in str(caught.value)
    message = refusal(base, bind=(written,))
    assert f"bind = {written!r} (flag --bind)" in message


PORTS = st.integers(0, 65535)
NAMES = st.from_regex(r"[a-z]([a-z0-9-]{0,10}[a-z0-9])?(\.[a-z]{1,8}){0,3}", fullmatch=True)


@given(host=st.one_of(st.ip_addresses(v=4).map(str), NAMES), port=PORTS)
def test_host_and_port_survive_a_round_trip(host: str, port: int) -> None:
    bind = addresses.normalize(f"{host}:{port}", "/")
    assert bind == f"{host}:{port}" == addresses.tcp(host, port)


@given(host=st.ip_addresses(v=6), port=PORTS, long=st.booleans())
def test_ipv6_survives_a_round_trip(host: Any, port: int, long: bool) -> None:
    import ipaddress

    bind = addresses.normalize(f"[{host.exploded if long else host}]:{port}", "/")
    assert addresses.normalize(bind, "/") == bind == addresses.tcp(str(host), port)
    assert ipaddress.IPv6Address(bind[1 : bind.rindex("]")]) == host


@given(st.text(max_size=60))
def test_any_text_is_an_address_in_normal_form_or_an_address_error(text: str) -> None:
    for prefix in ("", "unix:", "fd:", "[", ":"):
        try:
            bind = addresses.normalize(prefix + text, "/base")
        except addresses.AddressError:
            continue
        assert addresses.normalize(bind, "/other") == bind


# ------------------------------------------------------------------------------------------ token, show, restart, cwd

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
def test_a_token_is_read_without_the_white_space_around_it(mode: int, base: Path) -> None:
    (base / "token").write_text(f"{TOKEN}\n")
    (base / "token").chmod(mode)
    assert settings.read_token(str(base / "token")) == TOKEN


@pytest.mark.parametrize(
    ("content", "mode", "part"),
    [
        (TOKEN, 0o644, "mode 0644"),
        (TOKEN, 0o604, "mode 0604"),
        (TOKEN, 0o660, "mode 0660"),
        ("", 0o600, "is empty"),
        (" \n", 0o600, "is empty"),
        (TOKEN[:-1], 0o600, "15 characters"),
        ("x" * 2000, 0o600, "expected 16 to 1024"),
        (f"{TOKEN}\n{TOKEN}", 0o600, "one word"),
        (f"{TOKEN}\u00e9", 0o600, "ASCII"),
    ],
)
def test_a_bad_token_file_is_refused_without_showing_the_token(
    content: str, mode: int, part: str, base: Path
) -> None:
    path = base / "token"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(SettingsError) as caught:
        settings.read_token(str(path))
    assert part in str(caught.value)
    assert str(path) in str(caught.value)
    assert TOKEN[:-1] not in str(caught.value)


def test_a_token_file_that_is_no_file_is_refused_at_once(base: Path) -> None:
    os.mkfifo(base / "fifo", 0o600)
    for name, part in (("fifo", "not a regular file"), ("no", "No such file"), (".", "directory")):
        with pytest.raises(SettingsError, match=part):
            settings.read_token(str(base / name))


def test_show_has_every_value_with_its_source_and_no_secret(files: Path) -> None:
    (files / "segue.toml").write_text('ssl-certfile = "cert"\nheader = ["X-A: 1"]\n')
    effective = load(files, {"SEGUE_SSL_KEYFILE_PASSWORD": "hush"}, port=81, app="a:b")
    text = settings.show(effective, as_json=False)
    document = json.loads(settings.show(effective, as_json=True))
    for shown in (text, json.dumps(document), repr(effective)):
        assert "hush" not in shown
        assert "****" in shown
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines()}
    assert rows["KEY"] == "VALUE FROM"
    assert rows["config"] == f"{files}/segue.toml default"
    assert rows["bind"] == "127.0.0.1:81 flag --port"
    assert rows["app"] == "a:b argument APP"
    assert rows["header"] == f"X-A: 1 {files}/segue.toml"
    assert rows["access-log"] == "true default"
    assert rows["ready-timeout"] == "60 default"
    assert document["bind"] == {"value": ["127.0.0.1:81"], "source": "flag --port"}
    assert document["config"]["value"] == f"{files}/segue.toml"
    assert document["workers"] == {"value": 1, "source": "default"}
    inputs = {"host", "port", "uds", "fd"}
    assert set(document) == ({setting.key for setting in TABLE} - inputs) | {"config"} == set(rows) - {"KEY"}


def test_what_only_a_restart_applies_is_named(base: Path) -> None:
    old = load(base, workers=1).settings
    assert settings.restart_only(old, old) == []
    (base / "segue.toml").write_text(
        'name = "x"\nruntime-dir = "/run/x"\nadmin = ":1"\nworkers = 2\nport = 3\n'
    )
    assert settings.restart_only(old, load(base).settings) == ["name", "runtime-dir", "admin"]


def test_the_working_directory_keeps_the_name_by_which_it_was_entered(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "releases").mkdir()
    (base / "current").symlink_to("releases")
    monkeypatch.chdir(base / "current")
    real, logical = str(base / "releases"), str(base / "current")
    assert settings.logical_cwd({"PWD": logical}) == logical
    for other in ("", str(base), "current", f"{base}/nowhere", f"{base}/current/../current", "/\0"):
        assert settings.logical_cwd({"PWD": other}) == real
    assert settings.logical_cwd({}) == real
    monkeypatch.chdir("/")
    gone = {"PWD": f"{base}/nowhere"}
    assert settings.logical_cwd(gone) == "/"
    assert settings.logical_cwd(gone | {"SYSTEMD_EXEC_PID": str(os.getpid())}) == f"{base}/nowhere"


def test_a_working_directory_that_is_gone_is_an_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "gone").mkdir()
    monkeypatch.chdir(base / "gone")
    (base / "gone").rmdir()
    with pytest.raises(SettingsError, match="working directory"):
        settings.logical_cwd({"PWD": str(base / "gone")})


def test_names_that_are_no_utf8_are_refused_with_what_to_do(base: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    with pytest.raises(SettingsError, match=r"/caf\\udce9 has a name that is not UTF-8; rename it"):
        settings.load({}, {}, str(base / odd))
    assert "root-path = 'caf\\udce9' (flag --root-path): expected text in UTF-8" in refusal(
        base, root_path=odd
    )
    assert "warm-up = 'caf\\udce9' (flag --warm-up): expected text in UTF-8" in refusal(
        base, warm_up=("/up", odd)
    )

"""``segue unit``: what is printed, without a systemd."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest
from scenario import ROOT, segue

from segue.supervisor import place, unit

VARIANTS = {
    "segue.service": unit.service(place.EXAMPLE),
    "segue-systemd252.service": unit.service(msgspec.structs.replace(place.EXAMPLE, type=place.NOTIFY)),
    "segue.socket": unit.socket(place.EXAMPLE),
    "segue@.service": unit.service(place.EXAMPLE_TEMPLATE),
    "segue@.socket": unit.socket(place.EXAMPLE_TEMPLATE),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_units_in_the_repository_are_those_that_are_printed(name) -> None:
    assert (ROOT / "systemd" / name).read_text() == VARIANTS[name]
    assert {path.name for path in (ROOT / "systemd").iterdir()} == set(VARIANTS)


def printed(*arguments: str, cwd: Path) -> str:
    done = segue("unit", *arguments, cwd=cwd, PWD=str(cwd))
    assert done.returncode == 0, done.stderr
    return done.stdout


def line(text: str, key: str) -> str:
    (found,) = [each.partition("=")[2] for each in text.splitlines() if each.startswith(f"{key}=")]
    return found


def test_paths_and_options_are_those_of_this_place(application) -> None:
    directory = application("1")
    (directory / "log.json").write_text("{}")
    text = printed(
        *("shop:app", "--workers", "3", "--no-access-log", "--log-config", "log.json", "--uds", "s.sock"),
        *("--header", "X-A:b c", "--user", "nobody", "--type", "notify-reload"),
        cwd=directory,
    )
    start = line(text, "ExecStart")
    assert start.startswith(str(Path(sys.executable).parent))
    assert f"--log-config {directory}/log.json" in start
    assert f"--bind unix:{directory}/s.sock" in start
    assert '--header "X-A:b c"' in start
    assert "shop:app" in start
    assert "--workers 3" in start
    assert "--no-access-log" in start
    assert line(text, "WorkingDirectory") == f"-{directory}"
    assert line(text, "User") == "nobody"
    assert f"ReadWritePaths=-{directory}\n" in text  # where the socket is made


def test_timeouts_are_more_than_the_sum_of_ours(application) -> None:
    text = printed(
        *("shop:app", "--ready-timeout", "600", "--stop-delay", "20", "--timeout-graceful-shutdown", "100"),
        cwd=application("1"),
    )
    assert int(line(text, "TimeoutStartSec")) >= 600 + 60 + 15 + 12
    assert int(line(text, "TimeoutStopSec")) >= 20 + 100 + 15


def test_what_is_special_in_a_unit_is_quoted(tmp_path) -> None:
    directory = tmp_path / "100% of $it"
    directory.mkdir()
    (directory / "segue.toml").write_text("workers = 1\n")
    text = printed("shop:app", "--config", str(directory / "segue.toml"), "--uds", "a.sock", cwd=directory)
    assert f'--config "{tmp_path}/100%% of $$it/segue.toml"' in line(text, "ExecStart")
    assert line(text, "WorkingDirectory") == f"-{tmp_path}/100%% of $it"
    assert line(text, "Environment") == f'"PWD={tmp_path}/100%% of $it"'
    assert f'ReadWritePaths="-{tmp_path}/100%% of $it"\n' in text
    assert line(printed("--socket", "--uds", "a.sock", cwd=directory), "ListenStream").endswith(
        "/100%% of $it/a.sock"
    )


def test_what_can_be_in_no_unit_is_refused(tmp_path) -> None:
    for name, place_of in (("ends\\", {}), ("two\nlines", {}), ("a", {"command": ("/srv/it's/segue",)})):
        there = msgspec.structs.replace(place.EXAMPLE, directory=f"/srv/{name}", **place_of)
        with pytest.raises(place.UnitError, match="srv"):
            unit.service(there)
    there = msgspec.structs.replace(place.EXAMPLE, command=("/srv/a $b/segue",))
    assert line(unit.service(there), "ExecStart").startswith('"/srv/a $b/segue" serve ')


def test_directories_that_are_missing_are_told_of(tmp_path) -> None:
    arguments = ("shop:app", "--bind", "unix:run/a.sock", "--bind", "unix:/run/b.sock", "--user", "nobody")
    said = segue("unit", *arguments, cwd=tmp_path).stderr
    assert f"there is no directory {tmp_path}/run: sudo install -d -o nobody {tmp_path}/run\n" in said
    assert "nobody can't make a socket in /run" in said
    assert "/run" not in segue("unit", "--socket", *arguments, cwd=tmp_path).stderr


def test_the_description_names_the_application(tmp_path) -> None:
    (tmp_path / "segue.toml").write_text('app = "shop.app:app"\n')
    assert line(printed(cwd=tmp_path), "Description") == "segue: shop.app:app"


def test_a_low_port_brings_the_one_privilege_that_it_needs(tmp_path) -> None:
    text = printed("shop:app", "--bind", ":80", cwd=tmp_path)
    assert line(text, "AmbientCapabilities") == line(text, "CapabilityBoundingSet") == "CAP_NET_BIND_SERVICE"
    assert "AmbientCapabilities" not in printed("shop:app", cwd=tmp_path)


def test_socket_units_listen_where_the_service_would(tmp_path) -> None:
    text = printed(
        "--socket", "--bind", ":8000", "--bind", "[::1]:81", "--bind", "unix:/run/x.sock", cwd=tmp_path
    )
    assert "ListenStream=8000\nListenStream=[::1]:81\nListenStream=/run/x.sock\n" in text
    for bind, reason in (
        ("fd:3", "fd:3"),
        ("127.0.0.1:0", "name an address"),
        ("example.org:80", "host name"),
    ):
        done = segue("unit", "--socket", "--bind", bind, cwd=tmp_path)
        assert done.returncode == 2
        assert reason in done.stderr


def test_what_will_not_work_is_said(tmp_path) -> None:
    done = segue("unit", "shop:app", "--user", "no-such-user", cwd=tmp_path, SEGUE_WORKERS="2")
    assert done.returncode == 0
    assert "there is no user no-such-user" in done.stderr
    assert "workers" in done.stderr
    assert "SEGUE_WORKERS" in done.stderr
    assert segue("unit", "shop:app", "--workers", "0", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("user", ["no such", "me\nExecStart=/bin/sh", "", "%i", "-x"])
def test_what_is_no_user_gets_into_no_unit(tmp_path, user) -> None:
    done = segue("unit", "shop:app", f"--user={user}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected the name or the number of a user" in done.stderr


def test_users_and_groups_may_be_numbers(tmp_path) -> None:
    done = segue("unit", "shop:app", "--user", "0", "--control-group", "0", cwd=tmp_path)
    assert done.returncode == 0
    assert "there is no" not in done.stderr
    done = segue("unit", "shop:app", "--user", "0", "--control-group", "no-such-group", cwd=tmp_path)
    assert "there is no group no-such-group" in done.stderr


def test_a_secret_in_the_unit_is_told_of(tmp_path) -> None:
    (tmp_path / "key.pem").touch()
    tls = ("--ssl-keyfile", "key.pem", "--ssl-certfile", "key.pem", "--ssl-keyfile-password", "secret")
    assert "the key's password" in segue("unit", "shop:app", *tls, cwd=tmp_path).stderr


def test_a_template_is_for_any_name(tmp_path) -> None:
    assert segue("unit", "--template", "shop:app", "--name", "x", cwd=tmp_path).returncode == 2
    text = printed("--template", "shop:app", cwd=tmp_path)
    assert "--config /etc/segue/%i.toml --name %i" in line(text, "ExecStart")
    assert line(text, "RuntimeDirectory") == "segue-%i"


def test_the_hook_of_a_unit_ends_nothing_outside_of_it(tmp_path) -> None:
    """By hand it would be in the control group of whoever runs it, with all that runs there."""
    done = segue(
        "stop",
        "--unit",
        "segue.service",
        "--runtime-dir",
        str(tmp_path),
        cwd=tmp_path,
        SERVICE_RESULT="success",
    )
    assert done.returncode == 1
    assert "nothing was ended" in done.stderr

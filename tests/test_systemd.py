"""The units under a real systemd: Debian 12's 252, and one that has notify-reload."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
from machine import NEW, OLD, USER, Machine, Service, start_machine
from pages import blocks
from scenario import DEADLINE_S, Load

pytestmark = pytest.mark.timeout(300)  # a machine has to be made first
UNIT = "segue.service"
KEEP = ("--keepalive", "10", "--newconn", "3", "--sse", "2")


@pytest.fixture(scope="module", params=[OLD, NEW])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = start_machine(request.param)
    yield machine
    machine.close()


@pytest.fixture
def new(machine: Machine) -> bool:
    """Whether this systemd has notify-reload."""
    return "254" in machine.run("systemctl", "--version").stdout


@pytest.fixture
def service(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Service]:
    """An installed unit of two workers, not started; nothing is left of it after the test."""
    service = Service(machine, machine.place / request.node.name.split("[")[0] / "code")
    service.write("1")
    service.directory.parent.chmod(0o755)
    machine.install(
        UNIT, machine.unit("shop:app", "--workers", "2", "--no-access-log", cwd=service.directory)
    )
    yield service
    if os.environ.get("SHOW"):
        print(machine.journal())
    machine.systemctl("stop", UNIT)
    assert machine.processes() == []
    machine.systemctl("reset-failed")
    machine.run(
        "rm", "-rf", "/run/systemd/system/segue.service", "/run/systemd/system/segue.service.d", "/run/segue"
    )


def started(service: Service) -> Service:
    service.machine.systemctl("start", service.unit)
    return service


def load(service: Service, *arguments: str) -> Load:
    return Load(
        service.port, *(arguments or KEEP), prefix=("nsenter", f"--net=/proc/{service.machine.pid}/ns/net")
    )


def restart_to(machine: Machine, service: Service, version: str) -> None:
    """Restart the unit with code that starts once it has been seen that nobody has to wait for it."""
    before, gate = service.get(), service.directory / f"go-{version}"
    waits = f"while not os.path.exists({str(gate)!r}): await asyncio.sleep(0.01)"
    service.write(version, prelude="import os\n", startup=waits)
    machine.systemctl("restart", "--no-block", UNIT)
    machine.wait(UNIT, ActiveState="activating")
    assert service.get() == before
    gate.touch()
    machine.wait(UNIT, ActiveState="active")
    assert service.get() == version


def test_start_returns_when_it_serves_and_stop_leaves_nothing(machine: Machine, service: Service) -> None:
    machine.systemctl("start", UNIT)
    assert service.get() == "1"
    shown = machine.show(UNIT, "ActiveState", "StatusText", "Type")
    assert shown["ActiveState"] == "active"
    assert "generation 1 serves" in shown["StatusText"]
    assert len(machine.processes()) == 3
    machine.systemctl("stop", UNIT)
    assert machine.processes() == []
    assert machine.show(UNIT, "ActiveState", "Result") == {
        "ActiveState": "inactive",
        "Result": "success",
    }


def test_logs_are_those_of_the_journal_from_the_start_of_a_worker_on(
    machine: Machine, service: Service
) -> None:
    service.write("1", prelude="print('printed at the start', flush=True)\n")
    started(service)
    first, second = service.workers()
    machine.run("journalctl", "--sync")  # what was printed is on its way there
    shown = machine.run(machine.segue, "logs").stdout
    assert shown.count("printed at the start") == 2
    assert f"[{service.master()}]" in shown
    one = machine.run(machine.segue, "logs", "1/1").stdout
    assert one.count("printed at the start") == 1
    assert f"[{first}]" in one
    assert f"[{second}]" not in one
    service.write("2", prelude="print('before it broke', flush=True)\nimport nosuchmodule\n")
    assert machine.run(machine.segue, "reload", check=False).returncode == 1
    failed = machine.run(machine.segue, "logs", "2").stdout
    assert "before it broke" in failed
    assert "nosuchmodule" in failed


def test_a_crash_of_the_master_costs_nothing(machine: Machine, service: Service) -> None:
    started(service)
    workers, master = service.workers(), service.master()
    with load(service) as clients:
        machine.kill(master)
        machine.wait(UNIT, ActiveState="active", NRestarts="1")
        assert service.master() != master
        assert service.workers() == workers
        clients.nothing_lost()


def test_a_restart_runs_the_code_from_the_disk_and_costs_nothing(machine: Machine, service: Service) -> None:
    started(service)
    workers, master = service.workers(), service.master()
    with contextlib.ExitStack() as stack, load(service) as clients:
        idle = [stack.enter_context(service.connect()) for _ in range(5)]
        assert {service.get("/", sock) for sock in idle} == {"1"}
        restart_to(machine, service, "2")
        assert service.master() != master
        assert not set(service.workers()) & set(workers)
        clients.nothing_lost()
        for sock in idle:
            service.wait_answer("2", sock)


def test_reload_waits_for_the_new_code_and_tells_of_a_refusal(
    machine: Machine, service: Service, new: bool
) -> None:
    started(service)
    service.write("2")
    machine.systemctl("reload", UNIT)
    assert service.get() == "2"
    service.write("3", prelude="import no_such_module\n")
    done = machine.systemctl("reload", UNIT, check=False)
    assert (done.returncode == 0) == new  # notify-reload can't say it
    shown = machine.show(UNIT, "ActiveState", "StatusText")
    assert shown["ActiveState"] == "active"
    assert "generation 2 serves" in shown["StatusText"]
    assert "refused" in shown["StatusText"]
    assert "no_such_module" in shown["StatusText"]
    assert service.get() == "2"
    done = service.command("reload", check=False)
    assert done.returncode == 1
    assert "no_such_module" in done.stderr
    service.write("4")
    machine.systemctl("reload", UNIT)
    assert service.get() == "4"
    assert machine.show(UNIT, "StatusText") == {"StatusText": "generation 5 serves"}


def test_reloads_that_overlap_are_done_when_the_last_is(machine: Machine, service: Service) -> None:
    """One that `systemctl reload` asks for while another runs is not told as done with that one's end."""
    started(service)
    service.write("2", prelude="import time; time.sleep(2)\n")
    service.command("reload", "--no-wait")
    service.write("3", prelude="import time; time.sleep(2)\n")
    machine.systemctl("reload", UNIT)
    assert service.get() == "3"


def test_a_first_start_that_fails_is_a_failed_start(machine: Machine, service: Service) -> None:
    service.write("1", prelude="import no_such_module\n")
    done = machine.systemctl("start", UNIT, check=False)
    assert done.returncode != 0
    machine.wait_journal("refused.*no_such_module")
    # it is tried again, with a pause: so it may be on its way to or from any try
    assert machine.show(UNIT, "ActiveState")["ActiveState"] != "active"
    service.write("1")
    machine.wait(UNIT, ActiveState="active")
    assert service.get() == "1"


def test_a_restart_with_code_that_does_not_start_fails_and_costs_nothing(
    machine: Machine, service: Service
) -> None:
    """The command fails; whoever is connected, or connects, is served by the code of before."""
    started(service)
    workers = service.workers()
    service.write("2", prelude="import no_such_module\n")
    with load(service) as clients:
        done = machine.systemctl("restart", UNIT, check=False)
        assert done.returncode != 0, machine.journal()
        machine.wait(UNIT, ActiveState="active")
        status = machine.show(UNIT, "StatusText")["StatusText"]
        assert "the last restart was refused" in status
        assert "no_such_module" in status
        assert service.workers() == workers
        clients.nothing_lost()
    service.write("3")
    machine.systemctl("restart", UNIT)
    assert service.get() == "3"


def test_a_restart_during_a_reload_costs_nothing(machine: Machine, service: Service) -> None:
    """systemd runs no ExecStop= then: the SIGTERM is all that the master gets to hear."""
    started(service)
    gate = service.directory / "gate"
    service.write("2", startup=f"open({str(gate)!r}).read()")
    machine.run("mkfifo", gate)
    with load(service) as clients:
        service.command("reload", "--no-wait")
        machine.wait(UNIT, ActiveState="reloading")
        restart_to(machine, service, "3")
        clients.nothing_lost()
    assert machine.show(UNIT, "StatusText") == {"StatusText": "generation 3 serves"}


def test_a_stop_during_a_reload_finishes_what_runs_and_leaves_nothing(
    machine: Machine, service: Service
) -> None:
    started(service)
    gate = service.directory / "gate"
    service.write("2", startup=f"open({str(gate)!r}).read()")
    machine.run("mkfifo", gate)
    service.command("reload", "--no-wait")
    machine.wait(UNIT, ActiveState="reloading")
    with service.connect() as busy:
        busy.sendall(f"GET /work?until={service.directory}/enough HTTP/1.1\r\nHost: shop\r\n\r\n".encode())
        service.wait_status(lambda s: any(w["in_flight"] for w in s["generations"][0]["workers"]))
        machine.systemctl("stop", "--no-block", UNIT)
        machine.wait(UNIT, ActiveState="deactivating")
        (service.directory / "enough").touch()
        assert b" 200 " in busy.recv(65536)
    machine.wait(UNIT, ActiveState="inactive")
    assert machine.processes() == []


def test_a_restart_with_a_link_that_leads_nowhere_fails_and_costs_nothing(
    machine: Machine, service: Service
) -> None:
    current = service.directory.parent / "current"
    current.symlink_to("code")
    machine.install(UNIT, machine.unit("shop:app", "--no-access-log", cwd=current))
    started(service)
    workers = service.workers()
    current.unlink()
    current.symlink_to("nowhere")
    with load(service) as clients:
        assert machine.systemctl("restart", UNIT, check=False).returncode != 0
        machine.wait(UNIT, ActiveState="active")
        assert service.workers() == workers
        status = machine.show(UNIT, "StatusText")["StatusText"]
        assert "the last restart was refused: the working directory" in status
        clients.nothing_lost()
    machine.systemctl("stop", UNIT)
    assert machine.systemctl("start", UNIT, check=False).returncode != 0
    machine.wait_journal(f"segue: the working directory {current} is not there")
    assert machine.show(UNIT, "ActiveState", "NRestarts") == {"ActiveState": "failed", "NRestarts": "0"}


def test_what_systemd_cannot_start_is_not_tried_without_end(machine: Machine, service: Service) -> None:
    """Neither the master nor the hook that makes the pause can be run."""
    for drop_in, status in (({"User": "no-such-user"}, "217"), ({"ReadWritePaths": "/nowhere"}, "226")):
        machine.drop_in(UNIT, **drop_in)
        assert machine.systemctl("start", UNIT, check=False).returncode != 0
        shown = machine.show(UNIT, "ActiveState", "NRestarts", "ExecMainStatus")
        assert shown == {"ActiveState": "failed", "NRestarts": "0", "ExecMainStatus": status}


def test_a_signal_to_all_is_for_the_master(machine: Machine, service: Service) -> None:
    """What `systemctl kill -s` does if it isn't told otherwise."""
    started(service)
    workers = service.workers()
    with load(service) as clients:
        machine.systemctl("kill", "--signal=USR1", UNIT)
        assert service.workers() == workers
        service.write("2")
        machine.systemctl("kill", "--signal=HUP", UNIT)
        machine.wait(UNIT, ActiveState="active", StatusText="generation 2 serves")
        assert service.get() == "2"
        workers = service.workers()
        machine.systemctl("kill", "--signal=USR2", UNIT)
        service.wait_status(lambda status: status["master"]["epoch"] == 2)
        assert service.workers() == workers
        machine.systemctl("kill", "--signal=TTIN", UNIT)
        service.wait_status(lambda _: len(service.workers()) == 3)
        machine.systemctl("kill", "--signal=TTOU", UNIT)
        service.wait_status(lambda _: len(service.workers()) == 2)
        clients.nothing_lost()


@pytest.mark.parametrize("delay_ms", [0, 100, 300, 600, 1200])
def test_stop_leaves_nothing_also_when_the_master_was_killed_just_before(
    machine: Machine, service: Service, delay_ms: int
) -> None:
    started(service)
    machine.run("sh", "-c", f"kill -9 {service.master()}; sleep {delay_ms / 1000}; systemctl stop {UNIT}")
    service.wait_processes(0)  # the last of these may come when no hook is run any more


def test_a_stop_while_systemd_waits_before_it_restarts_leaves_nothing(
    machine: Machine, service: Service
) -> None:
    """It runs no hook then."""
    machine.drop_in(UNIT, RestartSec="9")  # the guard that the hook leaves behind stays for 10
    started(service)
    machine.kill(service.master())
    machine.wait(UNIT, SubState="auto-restart")
    assert len(service.workers_by_socket()) == 2
    machine.systemctl("stop", UNIT)
    service.wait_processes(0)
    assert machine.show(UNIT, "ActiveState") == {"ActiveState": "inactive"}


@pytest.mark.parametrize("restart", [False, True])
def test_a_stop_right_after_the_hook_has_asked_leaves_nothing(
    machine: Machine, service: Service, restart: bool
) -> None:
    """The hook has heard that there is no job, or that it is a restart, and hasn't ended yet."""
    asked = service.directory / f"asked-{restart}"
    client = service.directory / "bin" / "systemctl"
    client.parent.mkdir(exist_ok=True)
    client.write_text(
        f"""#!/bin/sh
/usr/bin/systemctl "$@" || exit
case "$MAINPID$1 $2" in "--no-pager list-jobs")
    # asked twice after a crash: the second time it goes by it
    mkdir {asked}.1 2>/dev/null || {{ mkdir {asked} && while [ -e {asked} ]; do sleep 0.05; done; }}
esac
"""
    )
    client.chmod(0o755)
    machine.run("chown", "-R", USER, service.directory)
    machine.drop_in(
        UNIT, Environment=f"PATH={client.parent}:/usr/bin:/bin", ReadWritePaths=str(service.directory)
    )
    started(service)
    if restart:
        machine.run("mkdir", f"{asked}.1")
        machine.systemctl("restart", "--no-block", UNIT)
    else:
        machine.kill(service.master())
    machine.run("sh", "-c", f"while [ ! -e {asked} ]; do sleep 0.05; done")
    machine.systemctl("stop", "--no-block", UNIT)
    machine.run("rmdir", asked)
    service.wait_processes(0)
    assert machine.show(UNIT, "ActiveState") == {"ActiveState": "inactive" if restart else "failed"}


def test_stop_leaves_nothing_when_the_master_hangs(machine: Machine, service: Service) -> None:
    flags = (
        "--workers",
        "2",
        "--timeout-graceful-shutdown",
        "5",
    )  # systemd wakes the master, which waits for its workers
    machine.install(UNIT, machine.unit("shop:app", *flags, cwd=service.directory))
    machine.drop_in(UNIT, TimeoutStopSec="8")  # for the hook, too, that ends the workers
    started(service)
    machine.kill(service.master(), signal.SIGSTOP)
    machine.kill(service.workers_by_socket()[0], signal.SIGSTOP)
    machine.systemctl("stop", UNIT, timeout=2 * DEADLINE_S)
    assert machine.processes() == [], machine.journal()


def test_stop_leaves_no_child_of_the_application(machine: Machine, service: Service) -> None:
    """As systemd itself sees to it with the usual KillMode."""
    service.write(
        "1", prelude="import subprocess\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
    )
    started(service)
    assert len(machine.processes()) == 5
    machine.systemctl("stop", UNIT)
    assert machine.processes() == []


def test_workers_that_have_lost_their_master_go_on_writing_temporary_files(
    machine: Machine, service: Service
) -> None:
    service.write("1", prelude="import tempfile\n", body="tempfile.NamedTemporaryFile().name")
    started(service)
    assert service.get().startswith("/tmp/")
    machine.kill(service.master())
    machine.wait(UNIT, ActiveState="active", NRestarts="1")
    for _ in range(10):
        assert service.get().startswith("/tmp/")


def test_a_master_that_hangs_is_replaced_and_nobody_notices(machine: Machine, service: Service) -> None:
    machine.drop_in(UNIT, WatchdogSec="10")
    started(service)
    workers, master = service.workers(), service.master()
    with load(service) as clients:
        machine.kill(master, signal.SIGSTOP)
        machine.wait(UNIT, ActiveState="active", NRestarts="1")
        assert service.master() != master
        assert service.workers() == workers
        clients.nothing_lost()


def test_a_slow_start_that_makes_progress_is_given_time(machine: Machine, service: Service) -> None:
    """Longer than TimeoutStartSec= and than what one sign of progress is worth."""
    machine.drop_in(UNIT, TimeoutStartSec="15")  # until it first shows progress it has no more than that
    service.write("1", startup="await asyncio.sleep(18)")
    started(service)
    assert service.get() == "1"


def test_a_start_that_hangs_is_given_none(machine: Machine, service: Service) -> None:
    machine.drop_in(UNIT, TimeoutStartSec="2", Restart="no")
    service.write("1", prelude="import time; time.sleep(1000)\n")
    done = machine.systemctl("start", UNIT, check=False)
    assert done.returncode != 0
    assert machine.show(UNIT, "Result") == {"Result": "timeout"}


def test_who_waits_and_who_is_connected_outlives_every_process(machine: Machine, service: Service) -> None:
    """Master and workers are killed at once: listener and relay are in the store."""
    started(service)
    machine.run("sh", "-c", f"kill -9 {service.master()} $(pgrep -u {USER} -f segue.worker)")
    assert service.get() == "1"  # refused by nobody
    machine.wait(UNIT, ActiveState="active", NRestarts="1")
    shown = machine.show(UNIT, "NFileDescriptorStore")
    assert shown == {"NFileDescriptorStore": "3"}
    machine.systemctl("restart", UNIT)
    assert machine.show(UNIT, "NFileDescriptorStore") == shown


def test_after_a_change_of_name_no_worker_of_the_old_one_is_left(machine: Machine, service: Service) -> None:
    """The new master does not know them: they were left by one of another instance, in the same unit."""
    settings = service.directory / "segue.toml"
    settings.write_text('name = "one"\n')
    started(service)
    workers = service.workers()
    settings.write_text('name = "two"\n')
    machine.systemctl("restart", UNIT)
    machine.wait_journal("stray-worker-ended", count=2)
    assert service.get() == "1"
    service.wait_processes(3)
    assert not set(machine.processes()) & set(workers)


def test_members_of_the_control_group_control_the_instance(machine: Machine, service: Service) -> None:
    machine.install(
        UNIT,
        machine.unit("shop:app", "--control-group", "games", "--no-access-log", cwd=service.directory),
    )
    started(service)
    stranger = ("setpriv", "--reuid=nobody", "--regid=nogroup")
    service.write("2")
    done = machine.run(*stranger, "--groups=games", machine.segue, "reload")
    assert "generation 2 serves" in done.stdout
    service.wait_answer("2")
    done = machine.run(*stranger, "--clear-groups", machine.segue, "reload", check=False)
    assert done.returncode == 5
    assert "permission denied" in done.stderr


def test_a_release_is_deployed_by_a_link_and_a_reload(machine: Machine, service: Service) -> None:
    """The unit's working directory is a symbolic link, looked up anew by each reload, restart and upgrade."""
    place = service.directory.parent
    for version in ("1", "2", "3"):
        service.directory = place / "releases" / version
        service.write(version)
    current = place / "current"
    current.symlink_to("releases/1")
    machine.install(UNIT, machine.unit("shop:app", cwd=current))
    started(service)
    assert service.get() == "1"
    for version in ("2", "3"):
        (place / "next").symlink_to(f"releases/{version}")
        (place / "next").rename(current)
        if version == "2":
            machine.systemctl("reload", UNIT)
        else:
            assert service.command("upgrade").returncode == 0
            machine.systemctl("restart", UNIT)
        assert service.get() == version


def test_socket_activation_with_several_named_sockets(machine: Machine, service: Service) -> None:
    """Two socket units, one of them with two addresses: who connects starts the service, and is answered."""
    path = "/run/segue-test.sock"
    machine.install(
        "segue.socket", machine.unit("--socket", "--bind", "127.0.0.1:8000", cwd=service.directory)
    )
    machine.install(
        "segue-more.socket",
        "[Socket]\nListenStream=127.0.0.1:8001\nListenStream=" + path + "\n"
        "FileDescriptorName=more\nService=segue.service\n",
    )
    machine.drop_in(UNIT, Sockets="segue.socket segue-more.socket")
    try:
        machine.systemctl("start", "segue.socket", "segue-more.socket")
        assert machine.show(UNIT, "ActiveState") == {"ActiveState": "inactive"}
        with service.connect() as idle:
            assert service.get("/", idle) == "1"
            machine.wait(UNIT, ActiveState="active")
            assert {each["address"] for each in service.status()["listeners"]} == {
                "127.0.0.1:8000",
                "127.0.0.1:8001",
                f"unix:{path}",
            }
            service.write("2")
            machine.systemctl("restart", UNIT)
            service.wait_answer("2", idle)
        for port in (8000, 8001):
            service.port = port
            assert service.get() == "2"
        curl = machine.run("curl", "-s", "--unix-socket", path, "http://shop/")
        assert curl.stdout == "2"
        machine.systemctl("stop", UNIT)
        assert machine.run("test", "-S", path, check=False).returncode == 0  # it is systemd's
        assert service.get() == "2"  # started again by this
    finally:
        machine.systemctl("stop", "segue.socket", "segue-more.socket", UNIT)


def test_a_socket_unit_that_accepts_itself_is_refused_with_the_reason(
    machine: Machine, service: Service
) -> None:
    machine.install("segue@.service", machine.unit("--template", "shop:app", cwd=service.directory))
    machine.install("segue.socket", "[Socket]\nListenStream=127.0.0.1:8000\nAccept=yes\n")
    try:
        machine.systemctl("start", "segue.socket")
        with service.connect():
            machine.wait_journal("Accept=no")
    finally:
        machine.systemctl("stop", "segue.socket")
        machine.systemctl("stop", "segue@*.service")


def test_one_instance_for_each_configuration(machine: Machine, service: Service) -> None:
    """Of a template: started, reloaded, killed and stopped each by itself."""
    config = service.directory.parent
    for name, port in (("blue", 8001), ("green", 8002)):
        (config / f"{name}.toml").write_text(
            f'app = "shop:app"\nbind = ["127.0.0.1:{port}"]\nprobation = 0\n'
        )
    text = machine.unit("--template", "--config", f"{config}/%i.toml", cwd=service.directory)
    machine.install("segue@.service", text)
    blue = Service(machine, service.directory, "segue@blue.service", 8001)
    green = Service(machine, service.directory, "segue@green.service", 8002)
    try:
        machine.systemctl("start", blue.unit, green.unit)
        assert [blue.get(), green.get()] == ["1", "1"]
        service.write("2")
        machine.systemctl("reload", blue.unit)
        assert [blue.get(), green.get()] == ["2", "1"]
        assert green.command("reload", "--name", "green").returncode == 0
        green.wait_answer("2")
        machine.kill(blue.master())
        machine.wait(blue.unit, ActiveState="active", NRestarts="1")
        machine.systemctl("stop", blue.unit)
        assert green.get() == "2"
        green.wait_processes(2)  # once the worker that its reload has replaced is gone, too
    finally:
        machine.systemctl("stop", "segue@*.service")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--template",),
        ("--name", "shop"),
        ("--bind", ":80"),
        ("--type", "notify"),
        ("--control-group", "games"),
    ],
)
def test_printed_units_are_valid_and_hardened(
    machine: Machine, service: Service, new: bool, arguments: tuple[str, ...]
) -> None:
    place = machine.place / f"units-{len(arguments)}-{arguments[-1:] and arguments[-1].strip('-:')}"
    place.mkdir(exist_ok=True)
    name = "segue@" if "--template" in arguments else "segue-shop" if "shop" in arguments else "segue"
    (place / f"{name}.service").write_text(machine.unit("shop:app", *arguments, cwd=service.directory))
    (place / f"{name}.socket").write_text(
        machine.unit("--socket", "shop:app", *arguments, cwd=service.directory)
    )
    for kind in ("service", "socket"):
        file = place / f"{name}.{kind}"
        done = machine.run("systemd-analyze", "verify", file)
        assert str(place) not in done.stderr + done.stdout, done.stderr
    machine.run("systemd-analyze", "security", "--offline=yes", "--threshold=20", place / f"{name}.service")


def test_a_unit_serves_from_a_directory_of_any_name(machine: Machine, service: Service) -> None:
    odd = machine.place / "my 50% of $HOME; \"q\" 'a' \\ #b"
    odd.mkdir()
    (odd / "shop.py").write_text((service.directory / "shop.py").read_text())
    machine.run("chown", "-R", USER, odd)
    machine.install(UNIT, machine.unit("shop:app", "--uds", "s.sock", cwd=odd))
    machine.systemctl("start", UNIT)
    curl = machine.run("curl", "-s", "--unix-socket", odd / "s.sock", "http://shop/")
    assert curl.stdout == "1"


SUDO = """#!/bin/sh
[ "$1" = -u ] || exec "$@"
user=$2; shift 2
exec setpriv --reuid="$user" --regid="$user" --init-groups "$@"
"""


def test_a_new_user_gets_through_the_page(machine: Machine, request: pytest.FixtureRequest) -> None:
    """All of docs/systemd.md, typed in its order on a machine that has nothing of it."""
    place = machine.place / request.node.name.partition("[")[0]
    service = Service(machine, place / "shop")
    service.write("1")
    here = {
        # there is no network: pip would put the same two programs there
        "sudo python3 -m venv /srv/segue/venv": "sudo mkdir -p /srv/segue/venv/bin",
        "sudo /srv/segue/venv/bin/pip install segue": f"sudo ln -s {machine.segue} /srv/segue/venv/bin/segue",
        "journalctl -u segue -f": "journalctl -u segue --no-pager",
        "shop.app:app": "shop.shop:app",
    }

    def put(path: str, text: str) -> None:
        machine.run("sh", "-c", f"mkdir -p {os.path.dirname(path)} && cat > {path} <<'END'\n{text}END")

    machine.run("userdel", USER)
    put("/usr/local/bin/sudo", SUDO)
    machine.run("chmod", "755", "/usr/local/bin/sudo")
    try:
        for block in blocks("systemd"):
            if block.title is not None:
                put(block.title, block.text)
                put(block.title.replace("blue", "green"), block.text.replace("8001", "8002"))
            script = "\n".join(["set -e", *(command for command, _ in block.commands)])
            if "releases/2" in script:
                service.write("2")
            for said, meant in here.items():
                script = script.replace(said, meant)
            machine.run("sh", "-c", script, cwd=place)
            if "enable --now segue.service" in script:
                assert service.get() == "1"
            if "releases/2" in script:
                service.wait_answer("2")
            if "enable --now segue.socket" in script:
                assert machine.show("segue.service", "ActiveState") == {"ActiveState": "inactive"}
                assert service.get() == "2"
        for port in (8001, 8002):
            assert Service(machine, place, port=port).get() == "2"
    finally:
        machine.systemctl("stop", "segue.socket", "segue*.service", check=False)
        machine.systemctl(
            "disable", "segue.service", "segue.socket", "segue@blue", "segue@green", check=False
        )
        machine.run("sh", "-c", "rm -rf /etc/systemd/system/segue* /etc/segue /srv/segue /run/segue*")
        machine.systemctl("daemon-reload")
        machine.run("useradd", "--system", "--no-create-home", USER, check=False)  # if it came only so far

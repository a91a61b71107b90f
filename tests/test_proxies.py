"""The configurations of docs/proxies.md, on the real proxies: behind each a reload is as invisible as without one."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pages import blocks
from scenario import DEADLINE_S, Load, environment, free_port, made_directory, supervised

SAID = "127.0.0.1:8080"
SOCKET = "/run/shop/http.sock"


def nginx(directory: Path, site: str) -> list[str]:
    config = directory / "nginx.conf"
    config.write_text(
        f"daemon off; user root; pid {directory}/pid; error_log {directory}/error.log;\n"
        "events { worker_connections 512; }\n"
        f"http {{ access_log off; client_body_temp_path {directory}/b; proxy_temp_path {directory}/p;\n"
        f"fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;\n{site}}}\n"
    )
    return ["nginx", "-c", str(config), "-e", str(directory / "error.log")]


def haproxy(directory: Path, config: str) -> list[str]:
    path = directory / "haproxy.cfg"
    path.write_text(config)
    return ["haproxy", "-db", "-f", str(path)]


def caddy(directory: Path, config: str) -> list[str]:
    path = directory / "Caddyfile"
    # a whole machine may stand still for the 5 s that a check has else
    config = config.replace("health_interval 1s", f"health_interval 1s\n health_timeout {DEADLINE_S:.0f}s")
    path.write_text("{\n    admin off\n}\n" + config)
    return ["caddy", "run", "--config", str(path), "--adapter", "caddyfile"]


@contextmanager
def proxy(command: list[str], directory: Path, port: int) -> Iterator[None]:
    """A proxy that listens."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment(HOME=str(directory)), stdin=subprocess.DEVNULL
        )
    try:
        wait_until(lambda: process.poll() is not None or reachable(port), "the proxy listens")
        assert process.poll() is None, (directory / "log").read_text()
        yield
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """For what no message tells: proxies don't say when they listen."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        select.select([], [], [], 0.02)


def reachable(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("start", [nginx, haproxy, caddy])
def test_behind_a_proxy_nobody_sees_a_reload(
    start: Callable[[Path, str], list[str]], application: Callable[..., Path], tmp_path: Path
) -> None:
    [config] = [block.text for block in blocks("proxies") if block.language == start.__name__]
    path, port = os.path.join(made_directory("segue-p-"), "http.sock"), free_port()
    config = config.replace(SOCKET, path).replace(SAID, f"127.0.0.1:{port}")
    flags = ("--forwarded-allow-ips", "*", "--health-path", "/healthz", "--workers", "2")
    with supervised("shop:app", "--bind", f"unix:{path}", *flags, cwd=application(), bind=False) as master:
        with proxy(start(tmp_path, config), tmp_path, port):
            wait_until(lambda: answers(port), "the proxy has found the server")
            with Load(port, "--sse", "3") as load:
                for version in ("2", "3", "4"):
                    application(version)
                    master.reload()
                tally = load.finish()
            assert tally["failed_total"] == 0, tally["failures_detail"]
            assert tally["ok_total"] > 0
        master.stop()


def answers(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return sock.recv(64).startswith(b"HTTP/1.1 200")

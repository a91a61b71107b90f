"""The description of the control API is of what is served."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenario import HOT, supervised
from test_control import TOKEN, free_port, tcp_call


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


def test_the_description_is_of_what_is_served(application, token_file) -> None:
    port = free_port()
    arguments = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    with supervised("shop:app", *arguments, cwd=application("1")) as master:
        code, document = master.call("GET", f"{HOT}/openapi.json")
        assert (code, document["openapi"]) == (200, "3.1.0")
        assert tcp_call(port, "GET", f"{HOT}/openapi.json")[2] == document, "it needs no token"
        served = set(master.call("GET", "/nothing")[1]["known"])
        described = {path.replace("{id}", "*").replace("{service}", "*") for path in document["paths"]}
        assert described == {
            path for path in served if path.startswith((HOT, "/livez", "/readyz", "/metrics"))
        }
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                target = path.replace("{id}", "1").replace("{service}", "nothing")
                if operation["security"]:
                    code, _, answer = tcp_call(port, method.upper(), target)
                    assert (code, answer["status"]) == (401, 401), path
        master.stop()

"""The description of the control API is of what is served, and a machine tries all that it says, and what it doesn't."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from scenario import HOT, ROOT, TOKEN, Segue, environment, free_port, supervised, tcp_call
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import negative_data_rejection

ENDING = ("stop", "upgrade")
"""What ends the master, or begins it anew."""
SCHEMATHESIS = """
request-timeout = 60
max-stream-events = 1

[generation]
max-examples = 5
deterministic = true
database = "none"

[phases.stateful]
max-steps = 4

# with all checks on; 423 (something else changes), 503 (not ready) and 504 (the wait is over) are meant
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 401, 403, 404, 409, 423, 503, 504]
"""


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


@pytest.mark.timeout(300)
def test_schemathesis_finds_nothing_wrong(application, token_file, tmp_path: Path) -> None:
    port = free_port()
    configuration, description = tmp_path / "schemathesis.toml", tmp_path / "openapi.json"
    configuration.write_text(SCHEMATHESIS)
    arguments = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    with supervised("shop:app", *arguments, cwd=application("1")) as master:
        document = master.call("GET", f"{HOT}/openapi.json")[1]
        description.write_text(json.dumps(document))  # what it has asked for itself, it doesn't try
        done = subprocess.run(
            [
                Path(sys.executable).parent / "schemathesis",
                f"--config-file={configuration}",
                "run",
                str(description),
                f"--url=http://127.0.0.1:{port}",
                f"--header=Authorization: Bearer {TOKEN}",
                *(f"--exclude-path={HOT}/{name}" for name in ENDING),
                "--no-color",
            ],
            cwd=tmp_path,
            env=environment(SCHEMATHESIS_HOOKS="moderation", PYTHONPATH=str(ROOT / "tests")),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{master.output.text}"
        tried = sum(map(len, document["paths"].values())) - len(ENDING)
        assert f"Tested: {tried}\n" in done.stdout, done.stdout
        assert not re.search("workers=([3-9]|[12][0-9])", master.output.text), (
            "more than this machine can bear"
        )
        assert master.call("GET", "/livez")[0] == 200
        master.stop()
        assert "Traceback" not in master.output.text, master.output.text


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.timeout(300)
def test_schemathesis_tries_what_ends_the_master(name: str, application, token_file) -> None:
    """One instance after the other, or one that is renewed again and again."""
    port, directory = free_port(), application("1")
    with contextlib.ExitStack() as stack:

        def start() -> Segue:
            arguments = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
            return stack.enter_context(supervised("shop:app", *arguments, cwd=directory))

        masters = [start()]
        upgrades = 0
        document = masters[0].call("GET", f"{HOT}/openapi.json")[1]
        operation = schemathesis.openapi.from_dict(document)[f"{HOT}/{name}"]["POST"]
        cases = hypothesis.strategies.one_of(*map(operation.as_strategy, GenerationMode))

        @hypothesis.settings(max_examples=8, derandomize=True, database=None, deadline=None)
        @hypothesis.given(cases)
        def tried(case: schemathesis.Case[Any]) -> None:
            nonlocal upgrades
            headers = {"Authorization": f"Bearer {TOKEN}"}
            answer = case.call(f"http://127.0.0.1:{port}", headers=headers, timeout=60)
            if name == "stop" and answer.status_code in {200, 202, 504}:
                assert masters[-1].wait_exit() == 0
                masters.append(start())
            elif answer.status_code == 202:
                upgrades += 1
                masters[-1].output.wait_for(" adopted ", count=upgrades)
            assert answer.status_code < 500 or answer.status_code == 504  # the wait is over
            # the token that a case has left out is sent, and a parameter that nobody knows is let pass
            case.validate_response(
                answer, headers=headers, excluded_checks=[not_a_server_error, negative_data_rejection]
            )

        tried()
        assert len(masters) > 2 or upgrades > 2
        masters[-1].stop()
        for master in masters:
            assert "Traceback" not in master.output.text, master.output.text

"""Every snippet of docs/services.md runs, in the order of the page, and prints what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from scenario import ROOT, environment, supervised

_BLOCK = re.compile(r"^```(python|toml|console)\n(.*?)^```$", re.M | re.S)


def test_every_snippet_of_the_page_on_services_runs(tmp_path: Path) -> None:
    blocks = _BLOCK.findall((ROOT / "docs" / "services.md").read_text())
    assert [kind for kind, _ in blocks].count("console") >= 4
    (tmp_path / "app.py").write_text("\n\n".join(text for kind, text in blocks if kind == "python"))
    (tmp_path / "key.txt").write_text("hush\n")
    (tmp_path / "segue.toml").write_text("")
    with supervised("app:app", "--workers", "2", cwd=tmp_path) as master:
        scripts = tmp_path / "bin"
        scripts.mkdir()
        (scripts / "segue").write_text(f'#!/bin/sh\nexec {sys.executable} -m segue.supervisor.cli "$@"\n')
        (scripts / "segue").chmod(0o755)
        port = str(master.port)
        env = environment(PYTHONPATH=str(ROOT), SEGUE_RUNTIME_DIR=master.runtime_dir)
        env["PATH"] = f"{scripts}:{env['PATH']}"
        for kind, text in blocks:
            if kind == "toml":
                (tmp_path / "segue.toml").write_text(text)
            for command, expected in (
                re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.M) if kind == "console" else ()
            ):
                done = subprocess.run(
                    ["sh", "-c", command.replace("localhost:8000", f"127.0.0.1:{port}") + " 2>&1"],
                    env=env,
                    cwd=tmp_path,
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
                pattern = ".*".join(map(re.escape, expected.strip().split("…")))
                assert re.fullmatch(pattern, done.stdout.strip(), re.S), f"$ {command}\n{done.stdout}"
        master.stop()

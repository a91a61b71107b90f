"""Pages of docs/ as they run: their files are written, their commands typed, and what they print is compared.

A fenced block says what it is: ``console`` (each ``$ command`` is typed, and prints what stands below it, where "…" is
anything), ``console until=WORD`` (goes on while the page goes on, which waits for that word), and any language with ``title=FILE``: a file.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from scenario import ROOT, Output

_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.M | re.S)
_COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.M)
COMMAND_TIMEOUT_S = 300


class Block(NamedTuple):
    """One fenced block."""

    language: str
    attributes: tuple[str, ...]
    text: str

    @property
    def title(self) -> str | None:
        """The file that it is."""
        return self._attribute("title")

    @property
    def until(self) -> str | None:
        """A command that does not end by itself prints this when it is ready."""
        return self._attribute("until")

    def _attribute(self, name: str) -> str | None:
        return next((each.partition("=")[2] for each in self.attributes if each.startswith(f"{name}=")), None)

    @property
    def commands(self) -> list[tuple[str, str]]:
        """What is typed, and what that prints."""
        return _COMMAND.findall(self.text) if self.language == "console" else []


def blocks(page: str) -> list[Block]:
    """Those of docs/PAGE.md."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return [Block(language, tuple(more.split()), body) for language, more, body in _FENCE.findall(text)]


class Terminal:
    """Where a reader of a page types."""

    def __init__(self, directory: Path, environ: Mapping[str, str], replaced: Mapping[str, str]) -> None:
        """`replaced`: what stands in the page → what is meant here, such as another port."""
        self.directory = directory
        self.background: list[subprocess.Popen[bytes]] = []
        self._environ = dict(environ)
        self._replaced = dict(replaced)

    def follow(self, page: str) -> int:
        """Do all that a page says, in its order; returns how many commands that were."""
        count = 0
        for block in blocks(page):
            if block.title is not None:
                (self.directory / block.title).write_text(block.text)
            for command, expected in block.commands:
                count += 1
                if block.until is not None:
                    self._start(command, block.until)
                else:
                    self.type(command, expected)
        return count

    def type(self, command: str, expected: str) -> None:
        """One command, which prints what is expected."""
        done = subprocess.run(
            ["sh", "-c", f"{self._here(command)} 2>&1"],
            env=self._environ,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        pattern = ".*".join(map(re.escape, self._here(expected).strip().split("…")))
        assert re.fullmatch(pattern, done.stdout.strip(), re.S), f"$ {command}\n{done.stdout}"

    def _start(self, command: str, until: str) -> None:
        read, write = os.pipe()
        process = subprocess.Popen(
            ["sh", "-c", f"exec {self._here(command)}"],
            env=self._environ,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=write,
        )
        os.close(write)
        output = Output(read)
        self.background.append(process)
        output.wait_for(until)

    def close(self) -> None:
        """End what goes on."""
        for process in self.background:
            if process.poll() is None:
                process.terminate()
            process.wait(COMMAND_TIMEOUT_S)

    def _here(self, text: str) -> str:
        for said, meant in self._replaced.items():
            text = text.replace(said, meant)
        return text

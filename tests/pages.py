"""Pages of docs/ as they run: their files are written, their commands typed, and what they print is compared.

A fenced block says what it is: ``console`` (each ``$ command`` is typed, and prints what stands below it, where "…" is
anything), ``console until=WORD`` (goes on while the page goes on, which waits for that word), and any language with ``title=FILE``: a file.

An indented block whose first word is a program's (or ``$``) is commands, too, one a line, of which each must succeed.
What is said of one behind two blanks and a ``#`` isn't typed; what it prints, if the page shows that, is for the reader.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from scenario import ROOT, Output

_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)
_BLOCK = re.compile(rf"{_FENCE.pattern}|(?<=\n\n)((?:(?: {{4}}[^\n]*)?\n)+)", re.M | re.S)
_PROGRAMS = frozenset(
    [
        "cd",
        "curl",
        "docker",
        "journalctl",
        "kill",
        "make",
        "pip",
        "segue",
        "ssh",
        "sudo",
        "systemctl",
        "systemd-analyze",
    ]
)
_REMARK = re.compile(r"\s{2,}#.*$")
_SERVING = re.compile(r"[\w./-]*segue serve\b")
_IS_THERE = r" (promoted|adopted) "
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
    def is_listing(self) -> bool:
        """Whether it is an indented one with commands."""
        return not self.language and self.text.split(maxsplit=1)[0] in _PROGRAMS | {"$"}

    @property
    def commands(self) -> list[tuple[str, str | None]]:
        """What is typed, and what that prints; None: that doesn't matter, but it must succeed."""
        if self.language == "console":
            return _COMMAND.findall(self.text)
        if not self.is_listing:
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [(_REMARK.sub("", line), None) for line in lines if line]


def blocks(page: str) -> list[Block]:
    """Those of docs/PAGE.md, or of the README."""
    path = ROOT / "README.md" if page == "README" else ROOT / "docs" / f"{page}.md"
    found = []
    for match in _BLOCK.finditer(path.read_text()):
        language, more, body, indented = match.groups()
        if body is not None:
            found.append(Block(language or "text", tuple(more.split()), body))
        elif indented.strip():
            found.append(Block("", (), re.sub(r"^ {4}", "", indented, flags=re.M).strip("\n") + "\n"))
    return found


def pages() -> list[str]:
    """All that there are."""
    return ["README", *sorted(path.stem for path in (ROOT / "docs").glob("*.md"))]


class Terminal:
    """Where a reader of a page types."""

    def __init__(
        self,
        directory: Path,
        environ: Mapping[str, str],
        replaced: Mapping[str, str],
        elsewhere: Collection[str] = (),
    ) -> None:
        """`replaced`: what stands in the page → what is meant here, such as another port. `elsewhere`: isn't typed."""
        self.directory = directory
        self._elsewhere = elsewhere
        self.background: list[subprocess.Popen[bytes]] = []
        self._environ = dict(environ)
        self._replaced = dict(replaced)

    def follow(self, page: str) -> int:
        """Do all that a page says, in its order; returns how many commands that were."""
        return sum(self.do(block) for block in blocks(page))

    def do(self, block: Block) -> int:
        """Do what one block says; returns how many commands that were."""
        if block.title is not None:
            (self.directory / block.title).write_text(block.text)
        commands = [each for each in block.commands if each[0] not in self._elsewhere]
        for command, expected in commands:
            meant = self._here(command)
            if block.until is not None:
                self._start(meant, block.until)
            elif expected is None and _SERVING.search(meant):
                self._start(meant, _IS_THERE)
            else:
                self.type(command, expected)
        return len(commands)

    def type(self, command: str, expected: str | None) -> None:
        """One command, which prints what is expected; None: which succeeds."""
        done = subprocess.run(
            ["sh", "-c", f"{self._here(command)} 2>&1"],
            env=self._environ,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if expected is None:
            assert done.returncode == 0, f"$ {command}\n{done.stdout}"
            return
        pattern = ".*".join(map(re.escape, self._here(expected).strip().split("…")))
        assert re.fullmatch(pattern, done.stdout.strip(), re.S), f"$ {command}\n{done.stdout}"

    def _start(self, command: str, until: str) -> None:
        read, write = os.pipe()
        process = subprocess.Popen(
            ["sh", "-c", _SERVING.sub(r"exec \g<0>", command)],
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

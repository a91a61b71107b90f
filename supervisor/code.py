"""Which code a generation runs, for people: where it comes from, what is installed, what is different from before.

`segue.supervisor.fingerprint` says in twelve digits whether two codes are the same; this says what they are. It is read
while the workers of a generation start, in a thread and within a deadline, so that no reload waits for it.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from sys import intern
from typing import Any

import msgspec

from segue.handoff.lines import sayable
from segue.supervisor import fingerprint

_DEADLINE_S = 2.0
_FILES_COMPARED = 2000
"""An application with more is compared as a whole."""
_SAID = {"changed": "modified"}
"""How a kind of difference between files is told to people, if not by its key."""
_NAMES_SHOWN = 20


class Git(msgspec.Struct, frozen=True):
    """What of a repository the application directory is."""

    commit: str
    branch: str | None = None
    dirty: bool | None = None
    """Something in the application directory differs from the commit; None: that could not be found out."""


class Code(msgspec.Struct, frozen=True, kw_only=True):
    """What a generation runs."""

    content: str
    """Twelve digits: of the code files of the application directory alone, wherever that lies."""
    python: str | None
    """Version of the interpreter."""
    distributions: dict[str, str]
    """What is installed beside it: name and version."""
    git: Git | None = None
    files: dict[str, str] = {}
    """Digest of each code file; empty for a code with very many, or of which an earlier master has told."""

    @property
    def title(self) -> str:
        """In a few words."""
        if self.git is None:
            return f"content {self.content}"
        branch = f" ({self.git.branch})" if self.git.branch else ""
        return f"git {self.git.commit[:10]}{branch}" + (", modified" if self.git.dirty else "")

    def document(self) -> dict[str, Any]:
        """As JSON."""
        document: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(self, files={}))
        del document["files"]
        return {"title": self.title} | document


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What one code has that another had not, and the other way round."""

    summary: str
    commits: tuple[str, str] | None = None
    python: tuple[str | None, str | None] | None = None
    files: dict[str, list[str]] = {}
    """``added``, ``removed``, ``changed``: the first twenty of each."""
    distributions: dict[str, tuple[str | None, str | None]] = {}
    """Old and new version; None: not installed."""
    settings: list[str] = []
    """Keys whose values differ."""


def read(app_dir: str, python: str) -> Code:
    """What is there now. Reads files and asks git: not for the event loop. Never raises `OSError`."""
    digests = fingerprint.files(app_dir)
    whole = sha256()
    for path, digest in digests.items():
        whole.update(os.fsencode(path) + b"\0" + digest)
    names = [name.removesuffix(".dist-info").rpartition("-") for name in fingerprint.distributions(python)]
    return Code(
        content=whole.hexdigest()[:12],
        python=_version(python),
        # interned: the history keeps a hundred codes, and nearly all of them have the same installed
        distributions={intern(name.replace("_", "-").lower()): intern(version) for name, _, version in names},
        git=_git(app_dir),
        files={sayable(path): digest.hex()[:12] for path, digest in digests.items()}
        if len(digests) <= _FILES_COMPARED
        else {},
    )


def compare(old: Code, new: Code, settings: list[str]) -> Changes:
    """From `old` to `new`; `settings` are the keys that differ."""
    files: dict[str, list[str]] = {}
    if old.files and new.files:
        files = {
            "added": sorted(new.files.keys() - old.files.keys()),
            "removed": sorted(old.files.keys() - new.files.keys()),
            "changed": sorted(
                path for path in new.files.keys() & old.files.keys() if new.files[path] != old.files[path]
            ),
        }
    versions = {
        name: (old.distributions.get(name), new.distributions.get(name))
        for name in sorted(old.distributions.keys() | new.distributions.keys())
        if old.distributions.get(name) != new.distributions.get(name)
    }
    commits = (old.git.commit, new.git.commit) if old.git and new.git else None
    if commits is not None and commits[0] == commits[1]:
        commits = None
    python = (old.python, new.python) if old.python != new.python else None
    words = [f"git {commits[0][:10]} → {commits[1][:10]}"] if commits else []
    words += [f"{_SAID.get(what, what)}: {_names(names)}" for what, names in files.items() if names]
    if not files and old.content != new.content:
        words.append(f"content {old.content} → {new.content}")
    words += [f"Python {python[0]} → {python[1]}"] if python else []
    words += [_installed(name, *pair) for name, pair in list(versions.items())[:_NAMES_SHOWN]]
    words += (
        [f"and {len(versions) - _NAMES_SHOWN} more distributions"] if len(versions) > _NAMES_SHOWN else []
    )
    words += [f"settings: {_names(settings)}"] if settings else []
    return Changes(
        summary="; ".join(words) or "nothing",
        commits=commits,
        python=python,
        files={what: names[:_NAMES_SHOWN] for what, names in files.items() if names},
        distributions=versions,
        settings=settings,
    )


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _installed(name: str, old: str | None, new: str | None) -> str:
    if old is None:
        return f"{name} {new} installed"
    return f"{name} {old} removed" if new is None else f"{name} {old} → {new}"


def _version(python: str) -> str | None:
    """From what the environment says of itself; an interpreter without one is asked."""
    try:
        settings = (Path(python).parent.parent / "pyvenv.cfg").read_text()
    except (OSError, ValueError):
        settings = ""
    for line in settings.splitlines():
        key, _, value = line.partition("=")
        if key.strip() in {"version", "version_info"}:
            return ".".join(value.strip().split(".")[:3])
    if os.path.realpath(python) == os.path.realpath(sys.executable):
        return platform.python_version()
    said = _run([python, "-I", "-c", "import platform; print(platform.python_version())"])
    return said.strip() if said else None


def _git(app_dir: str) -> Git | None:
    for directory in (Path(app_dir), *Path(app_dir).parents):
        if (directory / ".git").exists():
            # not of the whole repository: an application may be one directory of many
            status = [
                "git",
                "-c",
                "core.fsmonitor=false",
                "-C",
                app_dir,
                "status",
                "--porcelain=v2",
                "--branch",
            ]
            said = _run([*status, "--untracked-files=normal", "--", "."])
            return _head(directory / ".git") if said is None else _parse(said)
    return None


def _parse(said: str) -> Git | None:
    lines = said.splitlines()
    head = {words[1]: words[2] for line in lines if line[:1] == "#" and len(words := line.split(" ", 2)) == 3}
    commit, branch = head.get("branch.oid", ""), head.get("branch.head")
    if not commit or commit.startswith("("):  # a repository without a commit
        return None
    return Git(commit, None if branch == "(detached)" else branch, any(line[:1] != "#" for line in lines))


def _head(git: Path) -> Git | None:
    """The commit, as git's own files say it, where git itself isn't installed or refuses."""
    try:
        if git.is_file():  # a work tree or a submodule
            git = git.parent / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return Git(head)
        reference, common = head.removeprefix("ref: "), git
        if (git / "commondir").exists():
            common = git / (git / "commondir").read_text().strip()
        branch = reference.removeprefix("refs/heads/")
        if (common / reference).exists():
            return Git((common / reference).read_text().strip(), branch)
        for line in (common / "packed-refs").read_text().splitlines():
            if line.endswith(f" {reference}"):
                return Git(line.split(" ")[0], branch)
    except (OSError, ValueError):
        return None
    return None


def _run(command: list[str]) -> str | None:
    """What it prints; None if it fails or takes too long."""
    environ: Mapping[str, str] = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
            timeout=_DEADLINE_S,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    # it says something; as the first process of a container another part of this one may have learnt how it ended
    return done.stdout.decode(errors="replace") or None if done.returncode == 0 else None

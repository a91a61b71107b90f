"""Running a server as an unprivileged user.

The interpreter that runs the bench may lie where that user can't go (pyenv under /root, a checkout in somebody's home).
Then an environment is made in the bench's temporary directory: of the system's Python of the same minor version, or of
a copy of this one, with this environment's packages. What works is tried, not guessed.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_MINOR = f"python{sys.version_info.major}.{sys.version_info.minor}"
_TRY = "import segue.supervisor.cli, segue.handoff.http_client, uvicorn, uvloop, httptools, msgspec"
_ROOMS = ("segue", "supervisor", "worker", "handoff")
_NOT_COPIED = shutil.ignore_patterns(
    "__pycache__", "mypy*", "ruff*", "hypothesis*", "pip*", "test", "tests", "idlelib"
)


class NoInterpreterError(Exception):
    """No interpreter here can be run by that user; the message says what was tried."""


@dataclass(frozen=True)
class Interpreter:
    """A Python with segue and uvicorn, and who runs it."""

    executable: str
    user: str | None = None
    """None: who runs the bench."""
    environ: dict[str, str] = field(default_factory=dict)

    def popen_options(self) -> dict[str, Any]:
        """For `subprocess.Popen`: become that user."""
        if self.user is None:
            return {}
        entry = pwd.getpwnam(self.user)
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def own() -> Interpreter:
    """The one that runs the bench."""
    return Interpreter(sys.executable)


def unprivileged(directory: Path, user: str = "nobody") -> Interpreter:
    """One that `user` can run; what has to be made for it is put into `directory`."""
    failures = []
    for way in (_as_it_is, _from_the_system, _from_a_copy):
        try:
            candidate = way(directory, user)
            _try(candidate)
        except (OSError, subprocess.SubprocessError, NoInterpreterError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            failures.append(f"{way.__name__.strip('_').replace('_', ' ')}: {said[-1] if said else error!r}")
        else:
            return candidate
    raise NoInterpreterError(f"no {_MINOR} here can be run by {user} ({'; '.join(failures)})")


def _as_it_is(_: Path, user: str) -> Interpreter:
    return Interpreter(sys.executable, user)


def _from_the_system(directory: Path, user: str) -> Interpreter:
    base = shutil.which(_MINOR, path="/usr/bin:/usr/local/bin")
    if base is None:
        raise NoInterpreterError(f"there is no {_MINOR} in /usr/bin or /usr/local/bin")
    return _environment(directory / "system", base, user)


def _from_a_copy(directory: Path, user: str) -> Interpreter:
    home = directory / "copy-of-python"
    base = Path(sys.base_prefix)
    (home / "bin").mkdir(parents=True)
    shutil.copy2(base / "bin" / _MINOR, home / "bin" / _MINOR)
    shutil.copytree(
        sysconfig.get_path("stdlib"),
        home / "lib" / _MINOR,
        ignore=shutil.ignore_patterns("site-packages", "test", "idlelib", "config-*"),
    )
    for library in (base / "lib").glob("libpython*.so*"):
        shutil.copy2(library, home / "lib" / library.name)
    os.chmod(home, 0o755)
    return _environment(
        directory / "copied", str(home / "bin" / _MINOR), user, {"LD_LIBRARY_PATH": str(home / "lib")}
    )


def _environment(place: Path, base: str, user: str, environ: dict[str, str] | None = None) -> Interpreter:
    """A virtual environment of `base` with the packages of this one."""
    if place.exists():
        shutil.rmtree(place)
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "python").symlink_to(base)
    (place / "pyvenv.cfg").write_text(
        f"home = {os.path.dirname(base)}\ninclude-system-site-packages = false\n"
    )
    packages = place / "lib" / _MINOR / "site-packages"
    packages.mkdir(parents=True, exist_ok=True)
    shared = [
        ROOT,
        *(Path(entry) for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}),
    ]
    if not all(_readable(path, user) for path in shared):
        shared = [_copied(path, place) for path in shared]
    (packages / "bench.pth").write_text("".join(f"{path}\n" for path in shared))
    return Interpreter(str(place / "bin" / "python"), user, environ or {})


def _copied(path: Path, place: Path) -> Path:
    target = place / "copied" / path.name
    if path == ROOT:
        for room in _ROOMS:
            if not (path / room).is_symlink():
                shutil.copytree(path / room, target / room, symlinks=True, ignore=_NOT_COPIED)
    else:
        shutil.copytree(path, target, symlinks=True, ignore=_NOT_COPIED)
    return target


def _readable(path: Path, user: str) -> bool:
    options = Interpreter("", user).popen_options()
    return subprocess.run(["/bin/ls", path], capture_output=True, check=False, **options).returncode == 0


def _try(candidate: Interpreter) -> None:
    subprocess.run(
        [candidate.executable, "-c", _TRY],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": os.defpath, **candidate.environ},
        timeout=60,
        **candidate.popen_options(),
    )

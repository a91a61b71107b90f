"""``python -m segue.supervisor.watcher ORDER``: the process that watches files for a master in development mode.

A process of its own: the library, its threads and its polling are none of the master's, which stays as small as it is
and has one loop only. It says one JSON line when it has begun to watch, and one for all files that were saved at about
the same time. It ends when its standard input does, which its master holds open.

Which files count is what uvicorn's reloader with watchfiles says: a path that matches ``*.py`` or an include and no
exclude, by `pathlib.PurePath.match`; an include that is the very end of a path counts whatever excludes it. Beyond
that, whole directories are passed over: hidden ones, caches, virtual environments and installed packages, of which
uvicorn looks at the last component only. A directory may be excluded by its name.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

INCLUDES = ("*.py",)
EXCLUDES = (".*", ".py[cod]", ".sw.*", "~*")
PASSED_OVER = frozenset({"__pycache__", "node_modules", "site-packages"})
ENVIRONMENT = "pyvenv.cfg"
"""What makes a directory a virtual environment."""
STEP_MS = 15
"""Saves follow on one another if no such step without one lies between them."""
DEBOUNCE_MS = 1000
"""So long at most."""
_TURN_MS = 200
"""How soon it says that it has begun."""


class Order(msgspec.Struct, frozen=True):
    """What to watch."""

    directories: tuple[str, ...]
    includes: tuple[str, ...]
    excludes: tuple[str, ...]
    delay_s: float
    """How long to wait after one report before the next."""


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of what it says."""

    watching: bool = False
    """It has begun: what is saved from now on is reported."""
    saved: tuple[str, ...] = ()
    """Absolute paths."""
    failed: str = ""
    """It can't watch, and why."""


class Filter:
    """Which files count."""

    def __init__(self, order: Order) -> None:
        includes = [pattern for pattern in order.includes if pattern not in order.excludes]
        self._includes = [*(default for default in INCLUDES if default not in order.excludes), *includes]
        self._excludes = [default for default in EXCLUDES if default not in includes]
        self._directories: set[Path] = set()
        for pattern in order.excludes:
            if os.path.isdir(pattern):
                self._directories.add(Path(pattern).resolve())
            else:
                self._excludes.append(pattern)
        self._roots = [Path(directory).resolve() for directory in order.directories]

    def __call__(self, path: Path) -> bool:
        """Whether a change of `path` is one of the code."""
        for pattern in self._includes:
            if path.match(pattern):
                if str(path).endswith(pattern):
                    return True
                return not self._is_excluded(path)
        return False

    def _is_excluded(self, path: Path) -> bool:
        if any(path.match(pattern) for pattern in self._excludes):
            return True
        if not self._directories.isdisjoint(path.parents):
            return True
        root = max((root for root in self._roots if root in path.parents), key=_depth, default=None)
        between = [] if root is None else list(path.parents)[: len(path.parts) - len(root.parts) - 1]
        return any(_is_passed_over(directory) for directory in between)


def _depth(path: Path) -> int:
    return len(path.parts)


def _is_passed_over(directory: Path) -> bool:
    name = directory.name
    return name.startswith(".") or name in PASSED_OVER or (directory / ENVIRONMENT).exists()


class Known:
    """How files were when they were reported last: the kernel may tell of one save twice."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int, int] | None] = {}

    def differs(self, path: str) -> bool:
        """Whether it is another file by now, or of another time or size; or is gone."""
        try:
            found = os.stat(path)
            now = (found.st_ino, found.st_mtime_ns, found.st_size)
        except OSError:
            now = None
        if path in self._seen and self._seen[path] == now:
            return False
        self._seen[path] = now
        return True


def directories_of(order: Order) -> list[str]:
    """What is watched: the directories, and those among the includes; none below another."""
    named = [
        *order.directories,
        *(pattern for pattern in order.includes if pattern != ".*" and os.path.isdir(pattern)),
        *(
            found
            for pattern in order.includes
            if pattern != ".*"
            for found in glob.glob(pattern)
            if os.path.isdir(found)
        ),
    ]
    found = {Path(directory).resolve() for directory in named if os.path.isdir(directory)}
    return sorted(str(path) for path in found if found.isdisjoint(path.parents))


def forget_compiled(paths: Sequence[str]) -> None:
    """Remove what Python has cached of these files: it takes another save in the same second, of the same size, for none."""
    for path in paths:
        directory, name = os.path.split(path)
        cached = glob.glob(
            os.path.join(glob.escape(directory), "__pycache__", f"{glob.escape(Path(name).stem)}.*.pyc")
        )
        with contextlib.suppress(NotImplementedError):
            cached.append(importlib.util.cache_from_source(path))
        for each in cached:
            with contextlib.suppress(OSError):
                os.unlink(each)


def watch(order: Order, ended: threading.Event, say: Callable[[Report], None]) -> None:
    """Report what is saved until `ended`. Raises OSError and RuntimeError of the library."""
    from watchfiles import watch as changes_of

    counts, differs, begun = Filter(order), Known().differs, False
    for changes in changes_of(
        *directories_of(order),
        watch_filter=None,
        step=STEP_MS,
        debounce=DEBOUNCE_MS,
        stop_event=ended,
        rust_timeout=_TURN_MS,
        yield_on_timeout=True,
        ignore_permission_denied=True,
    ):
        if not begun:
            begun = True
            say(Report(watching=True))
        saved = tuple(sorted({path for _, path in changes if counts(Path(path)) and differs(path)}))
        if saved:
            forget_compiled(saved)
            say(Report(saved=saved))
            ended.wait(order.delay_s)  # what is saved meanwhile is the next report's


def main() -> int:
    """Watch until standard input ends; returns the exit status."""
    order = msgspec.json.decode(sys.argv[1], type=Order)
    ended = threading.Event()

    def wait_for_end() -> None:
        while os.read(0, 1):
            pass
        ended.set()

    def say(report: Report) -> None:
        os.write(1, msgspec.json.encode(report) + b"\n")

    threading.Thread(target=wait_for_end, daemon=True).start()
    try:
        watch(order, ended, say)
    except (OSError, RuntimeError) as error:
        say(Report(failed=str(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""From a directory of Python files to tools that can be called.

What is loaded is a version of a file: it lives in a module of a name of its own, so that calls which began on it end on it
while the next version is there already; the module goes with the last of them. Files are compiled from what was read, never
from a cache, and only those that have changed are loaded again. A file that can't be loaded leaves the version before it in
its place, and a reason among the problems.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import os
import re
import stat
import sys
import traceback
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from segue.worker.backend.tools.schema import Signature, SignatureError
from segue.worker.backend.tools.threads import DeadlineError, Threads

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What the interfaces of models take as the name of a function."""
_MAX_BYTES = 1 << 20
_MAX_TRACEBACK = 4000
_versions = itertools.count(1)


class LoadError(Exception):
    """A file isn't a tool file; the message has all there is to say, a traceback too where there is one."""


@dataclass(eq=False)
class LoadedTool:
    """One function of one version of a file."""

    name: str
    function: Callable[..., Any]
    signature: Signature
    asynchronous: bool
    hanging: int = 0
    """How many of its calls go on after their deadline."""
    home: LoadedFile | None = field(default=None, repr=False)
    """What keeps the module for as long as the tool is in use."""


@dataclass(eq=False)
class LoadedFile:
    """One version of a file."""

    key: str
    digest: str
    tools: tuple[LoadedTool, ...]


@dataclass(frozen=True)
class Source:
    """What a file says at the moment."""

    key: str
    path: str
    code: bytes

    @property
    def digest(self) -> str:
        """The same if, and only if, the code is."""
        return hashlib.sha256(self.code).hexdigest()


@dataclass
class Library:
    """The tools of a directory."""

    directory: str
    files: dict[str, LoadedFile] = field(default_factory=dict)
    """By key."""
    problems: dict[str, str] = field(default_factory=dict)
    """By key (of a file that can't have one: its name), why the file as it is now isn't loaded."""

    @property
    def tools(self) -> dict[str, LoadedTool]:
        """By name."""
        return {tool.name: tool for key in sorted(self.files) for tool in self.files[key].tools}

    @property
    def known(self) -> list[str]:
        """What a reload of one tool may name: keys of files and names of tools."""
        return sorted({*self.files, *self.tools, *(key for key in self.problems if is_key(key))})

    def key_of(self, name: str) -> str | None:
        """The key that `name` is, or in whose file the tool of that name is."""
        if name in self.files or (name in self.problems and is_key(name)):
            return name
        return next(
            (file.key for file in self.files.values() if name in {tool.name for tool in file.tools}), None
        )


def is_key(text: str) -> bool:
    """Whether it can name a file in the directory, and nothing outside of it."""
    return _KEY.fullmatch(text) is not None


# ---------------------------------------------------------------------------------------------------------- reading


def read_all(directory: str) -> tuple[dict[str, Source], dict[str, str]]:
    """The tool files of a directory by key, and why those that can't be read can't be. Raises OSError."""
    root = os.path.realpath(directory)
    sources: dict[str, Source] = {}
    problems: dict[str, str] = {}
    with os.scandir(root) as entries:
        names = sorted(
            entry.name for entry in entries if entry.name.endswith(".py") and entry.name[0] not in "._"
        )
    for name in names:
        key = name.removesuffix(".py")
        try:
            if not is_key(key):
                raise LoadError("the name of a tool file is made of letters, digits, _ and -, and .py")
            path = os.path.join(root, name)
            sources[key] = Source(key, path, _read(path, root))
        except (LoadError, OSError) as error:
            problems[key if is_key(key) else name] = f"{name}: {_why(error)}"
    return sources, problems


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _read(path: str, root: str) -> bytes:
    real = os.path.realpath(path)
    if os.path.commonpath([real, root]) != root:
        raise LoadError("it is a link that leads out of the directory")
    # a link put there meanwhile isn't followed, and a FIFO isn't waited for
    with open(os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise LoadError("it is no regular file")
        code = stream.read(_MAX_BYTES + 1)
    if len(code) > _MAX_BYTES:
        raise LoadError(f"it is larger than {_MAX_BYTES} bytes")
    return code


# ---------------------------------------------------------------------------------------------------------- loading


def load(source: Source) -> LoadedFile:
    """Run the file as a module of its own. Raises `LoadError`."""
    name = f"segue_tools.{source.key}__{next(_versions)}"
    module = types.ModuleType(name)
    module.__file__ = source.path
    # while it is in use its classes are looked up there, by whoever reads their annotations for one
    sys.modules[name] = module
    try:
        exec(compile(source.code, source.path, "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - it is what tools are
        tools = tuple(_tools(module))
    except LoadError:
        del sys.modules[name]
        raise
    except BaseException as error:  # noqa: BLE001 - sys.exit() in a file is a mistake in that file
        del sys.modules[name]
        raise LoadError(_told(error, source.path)) from None
    if not tools:
        del sys.modules[name]
        raise LoadError("it has no tools: a tool is a public function with a docstring")
    loaded = LoadedFile(source.key, source.digest, tools)
    for tool in tools:
        tool.home = loaded
    weakref.finalize(loaded, sys.modules.pop, name, None)
    return loaded


def _tools(module: types.ModuleType) -> Iterator[LoadedTool]:
    listed: Iterable[str] | None = getattr(module, "__all__", None)
    for name in [*vars(module)] if listed is None else listed:
        function = getattr(module, name, None)
        if listed is None and not _is_offered(name, function, module):
            continue
        if not inspect.isfunction(function):
            raise LoadError(f"{name} in __all__ is no function")
        if not (function.__doc__ or "").strip():
            raise LoadError(f"{name} in __all__ has no docstring, which is what a model is told of it")
        if _NAME.fullmatch(name) is None:
            raise LoadError(f"{name}: the name of a tool is made of at most 64 ASCII letters, digits and _")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise LoadError(f"{name} is a generator; a tool returns one result")
        try:
            signature = Signature(function)
        except SignatureError as error:
            raise LoadError(f"{name} can't be a tool: {error}") from error
        yield LoadedTool(name, function, signature, inspect.iscoroutinefunction(function))


def _is_offered(name: str, value: object, module: types.ModuleType) -> bool:
    return (
        not name.startswith("_")
        and inspect.isfunction(value)
        and value.__module__ == module.__name__
        and bool((value.__doc__ or "").strip())
    )


def _told(error: BaseException, path: str) -> str:
    """The traceback as the author of the file would see it: from the file on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != path:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace)).strip()
    return text if len(text) <= _MAX_TRACEBACK else f"…{text[-_MAX_TRACEBACK:]}"


# ------------------------------------------------------------------------------------------------------- the library


class _Loading:
    hanging = 0


async def build(
    directory: str, before: Library | None, only: str | None, threads: Threads, deadline_s: float
) -> Library:
    """The library of `directory` as it is now; what hasn't changed is taken over from `before`.

    With `only`, the key of a file, everything else stays as it was. Raises `LoadError` if the directory can't be read
    or if that one file can't be loaded.
    """
    owner = _Loading()
    sources, problems = await _read_all(directory, threads, deadline_s, owner)
    old = before.files if before is not None else {}
    if only is not None:
        kept = before.problems if before is not None else {}
        problems = {key: why for key, why in kept.items() if key != only} | {
            key: why for key, why in problems.items() if key == only
        }
        sources = {key: source for key, source in sources.items() if key == only}
    stay = {
        key: file
        for key, file in old.items()
        if (only is not None and key != only)
        or key in problems
        or (key in sources and sources[key].digest == file.digest)
    }
    fresh: dict[str, LoadedFile] = {}
    for key, source in sources.items():
        if key in stay:
            continue
        try:
            fresh[key] = await threads.run(functools.partial(load, source), deadline_s, owner)
        except (LoadError, DeadlineError) as error:
            problems[key] = f"{key}.py: {error}"
            if key in old:
                stay[key] = old[key]
    library = Library(directory, *_without_doubles(stay, fresh, old, problems))
    if only is not None and only in library.problems:
        raise LoadError(f"tool file {library.problems[only]}")
    return library


async def look(directory: str, threads: Threads, deadline_s: float) -> list[str]:
    """The keys of the files that are there now. Raises `LoadError`."""
    sources, problems = await _read_all(directory, threads, deadline_s, _Loading())
    return sorted({*sources, *filter(is_key, problems)})


async def _read_all(
    directory: str, threads: Threads, deadline_s: float, owner: _Loading
) -> tuple[dict[str, Source], dict[str, str]]:
    try:
        return await threads.run(lambda: read_all(directory), deadline_s, owner)
    except (OSError, DeadlineError) as error:
        raise LoadError(f"the directory of tools {directory} can't be read: {_why(error)}") from error


def _without_doubles(
    stay: Mapping[str, LoadedFile],
    fresh: Mapping[str, LoadedFile],
    old: Mapping[str, LoadedFile],
    problems: Mapping[str, str],
) -> tuple[dict[str, LoadedFile], dict[str, str]]:
    """Files of which no two have a tool of the same name: what is there already goes first."""
    files: dict[str, LoadedFile] = {}
    reasons = dict(problems)
    taken: dict[str, str] = {}
    for key, file in [*sorted(stay.items()), *sorted(fresh.items())]:
        double = next((tool.name for tool in file.tools if tool.name in taken), None)
        if double is not None:
            reasons[key] = f"{key}.py: there is a tool {double} in {taken[double]}.py already"
            before = old.get(key)
            if before is None or any(tool.name in taken for tool in before.tools):
                continue
            file = before  # noqa: PLW2901 - what is meant
        files[key] = file
        taken |= {tool.name: key for tool in file.tools}
    return files, reasons


def bundled() -> str:
    """The directory of the tools that come with the program."""
    with contextlib.suppress(ImportError):
        from segue.worker.backend import example_tools

        return os.path.dirname(os.path.abspath(example_tools.__file__))
    raise LoadError("the bundled tools are missing from this installation")

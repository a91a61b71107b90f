"""From a fresh interpreter to a running worker."""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from segue.handoff import signals
from segue.handoff.descriptors import InheritanceError, raise_limit, take_inherited
from segue.handoff.messages import FdName, WorkerPhase, WorkerSpec
from segue.worker import logs
from segue.worker.adoption import Adoption
from segue.worker.output import BootOutput
from segue.worker.priority import BootPriority
from segue.worker.telling import Telling

_BUILTIN = "segue.worker.backend.assembly:app"
_EXIT_NOT_A_WORKER = 2
_EXIT_FAILED_START = 3
_MAX_EXIT_S = 10.0


def main() -> int:
    """Run a worker on what was inherited; returns its exit status."""
    raise_limit()
    try:
        fds = take_inherited(os.environ)
        spec = _read_spec(fds)
    except (InheritanceError, msgspec.MsgspecError, RecursionError, KeyError, OSError) as error:
        print(f"segue.worker: started by hand? {type(error).__name__}: {error}", file=sys.stderr)
        return _EXIT_NOT_A_WORKER
    priority = None if spec.in_haste else BootPriority()
    for number in signals.OF_THE_MASTER:
        signal.signal(number, _leave_to_master)
    signals.let_through()
    os.register_at_fork(after_in_child=_forget_signals)
    telling = Telling(spec.notify_socket, spec.heartbeat_s)

    async def ready() -> None:
        if priority is not None:
            priority.restore(asyncio.get_running_loop())
        await output.finish()

    from segue.worker.lifespan import StartFailed

    try:
        output = BootOutput(fds[FdName.STDOUT], fds[FdName.STDERR])
        adoption = Adoption(spec)
        telling.phase(WorkerPhase.IMPORT)
        # before the application's directory is looked in: a file in it may be called like a package that we need
        importlib.import_module("segue.worker.worker")
        sys.path.insert(0, spec.app_dir)
        return _run(spec, fds, telling, adoption, ready, output.on_terminal)
    except StartFailed as failed:
        reason = str(failed)
    except Exception as error:  # noqa: BLE001 - whatever it is, the master gets the reason
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    print(
        f"worker {spec.worker} of generation {spec.generation} can't start: {reason}",
        file=sys.stderr,
        flush=True,
    )
    telling.failed(reason)
    # a thread that the application's import has left behind must not keep the process
    faulthandler.dump_traceback_later(_MAX_EXIT_S, exit=True, file=2)
    return _EXIT_FAILED_START


def _leave_to_master(number: int, frame: object) -> None:
    """Nothing. Unlike SIG_IGN it isn't passed on to the programs that the application runs."""


def _forget_signals() -> None:
    """In a child that the application forks: a SIGTERM for it ends it, instead of telling this worker's loop to stop."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in signals.OF_THE_MASTER:
        if signal.getsignal(number) is _leave_to_master:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _read_spec(fds: Mapping[str, int]) -> WorkerSpec:
    fd = fds[FdName.SPEC]
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    return msgspec.json.decode(data, type=WorkerSpec)


def _run(
    spec: WorkerSpec,
    fds: Mapping[str, int],
    telling: Telling,
    adoption: Adoption,
    ready: Callable[[], Awaitable[None]],
    on_terminal: bool,
) -> int:
    from segue.worker.services.host import Host, enter
    from segue.worker.services.hosted import Hosted
    from segue.worker.services.options import Place
    from segue.worker.worker import Worker

    # carried out by `segue.worker.recycling`
    options = {key: value for key, value in spec.uvicorn.items() if not key.startswith("limit_max_requests")}
    if options.get("use_colors") is None:
        options["use_colors"] = on_terminal and not os.environ.get("NO_COLOR")
    if spec.access_log_format is not None:
        options["access_log"] = False  # `segue.worker.access` writes it
    logs.begin(spec.log_format, spec.generation, spec.worker, fds[FdName.STDOUT], fds[FdName.STDERR])
    # where the built-in application keeps what must last: one place for each instance
    os.environ["SEGUE_INSTANCE_NAME"] = spec.instance
    host = Host(
        Place(spec.settings_file, spec.env_file),
        spec.services,
        master_socket=spec.master_socket,
        generation=spec.generation,
        worker=spec.worker,
    )
    enter(host)
    services = Hosted(host)
    config = _configure(spec.app or _BUILTIN, options)
    if spec.import_only:
        return 0
    loop_factory = _explained("the event loop can't be made", config.get_loop_factory)

    async def run() -> int:
        return await Worker(spec, config, fds, telling, adoption, ready, services).run()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(run())


def _configure(app: str, options: dict[str, Any]) -> Any:
    """A loaded `uvicorn.Config` for `app`. Raises `StartFailed` with the reason in one line."""
    import uvicorn

    # uvicorn reads the application's name only to log it; what is imported is what is given it below
    log_config = options.get("log_config")
    culprit = f"log-config {log_config}" if log_config else "the configuration"
    if not log_config:
        options = options | {"log_config": logs.configuration()}
    config = _explained(f"{culprit} can't be used", lambda: uvicorn.Config(app, **options))
    if log_config:
        logs.number_all()
    else:
        logs.dress_last_resort()
    _log_like_uvicorn()
    module = app.partition(":")[0]
    config.app = _explained(f"import of {module} failed", lambda: _import(app))
    if config.factory:
        config.app = _strict_factory(config.app)
    _explained(f"loading {app} failed", config.load)
    if not log_config:
        logs.dress_application()
    return config


def _import(app: str) -> Any:
    module_name, _, attributes = app.partition(":")
    if not module_name or not attributes:
        raise ImportError(f"{app!r} isn't of the form MODULE:ATTRIBUTE")
    found: Any = importlib.import_module(module_name)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def _strict_factory(factory: Any) -> Callable[[], Any]:
    def create() -> Any:
        try:
            return factory()
        except TypeError as error:
            # uvicorn logs a TypeError in one line and exits; the reason must get through
            raise RuntimeError(f"the factory failed: TypeError: {error}") from error

    return create


def _explained(what: str, do: Callable[[], Any]) -> Any:
    """Do it, and turn whatever goes wrong, SystemExit too, into a reason; the traceback goes to the output."""
    from segue.worker.lifespan import StartFailed, describe

    errors = _LastError()
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(errors)
    try:
        return do()
    except SystemExit as error:
        said = errors.message or f"it called sys.exit({error.code!r})"
        traceback.print_exc()
        raise StartFailed(f"{what}: {said}") from error
    except Exception as error:
        traceback.print_exc()
        raise StartFailed(f"{what}: {describe(error)}") from error
    finally:
        logger.removeHandler(errors)


class _LastError(logging.Handler):
    """Remembers what uvicorn logged before it called sys.exit."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.message = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.message = record.getMessage()


def _log_like_uvicorn() -> None:
    """Let segue's own few lines go where uvicorn's go, if the log configuration doesn't name a place for them."""
    logger = logging.getLogger("segue")
    if not logger.handlers and logger.level == logging.NOTSET:
        logger.parent = logging.getLogger("uvicorn.error")

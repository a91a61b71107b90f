"""Starting a worker: a fresh interpreter in its own session, with its sockets and its spec as descriptors.

Nothing secret is in argv or the environment: the spec travels in a memory file. Output goes to another memory file
until the worker is ready; a memory file needs no room on a disk that may be full, and the master can still read it
when the process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
from collections.abc import Mapping

import msgspec

from segue.handoff import lines, signals
from segue.handoff.adoption import start_time
from segue.handoff.messages import FdName, WorkerSpec
from segue.handoff.occupant import INSTANCE

OUTPUT_TAIL_BYTES = 32 * 1024
OUTPUT_TAIL_LINES = 30
PRINTED_BYTES = 64 * 1024
_STRIPPED = (
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "SEGUE_FDS",
)


class SpawnError(Exception):
    """The process could not be started; the message says why."""


class Relay(msgspec.Struct, frozen=True):
    """Both ends of the socket pair through which connections move from generation to generation."""

    read: socket.socket
    write: socket.socket

    @classmethod
    def create(cls) -> Relay:
        """A new pair."""
        read, write = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        read.setblocking(False)
        write.setblocking(False)
        return cls(read, write)

    @property
    def names(self) -> dict[str, int]:
        """Its descriptors, by the names under which they are passed on."""
        return {FdName.RELAY_READ: self.read.fileno(), FdName.RELAY_WRITE: self.write.fileno()}

    def close(self) -> None:
        """Give both ends back."""
        self.read.close()
        self.write.close()


class Lifeline(msgspec.Struct, frozen=True):
    """A pipe that nobody writes to: workers hold its read end, and see its end when their master ends."""

    read: int
    write: int

    @classmethod
    def create(cls) -> Lifeline:
        """A new one."""
        return cls(*os.pipe2(os.O_CLOEXEC))

    def close(self) -> None:
        """Give both ends back."""
        os.close(self.read)
        os.close(self.write)


class Process(msgspec.Struct):
    """A worker: its pid, a pidfd that becomes readable when it ends, and what it printed before it was ready."""

    pid: int
    pidfd: int
    output: int | None
    """None for an adopted one that was ready already."""
    control_path: str
    start_time: int = 0
    """As `segue.handoff.adoption.start_time` tells it."""

    def tail(self) -> str:
        """The last lines of what it printed before it was ready."""
        if self.output is None:
            return ""
        size = os.fstat(self.output).st_size
        data = os.pread(self.output, OUTPUT_TAIL_BYTES, max(0, size - OUTPUT_TAIL_BYTES))
        text = lines.readable(data.decode(errors="replace"))
        return "\n".join(text.splitlines()[-OUTPUT_TAIL_LINES:])

    def printed(self) -> str:
        """What it printed before it was ready, as far as it is kept."""
        if self.output is None:
            return ""
        size = os.fstat(self.output).st_size
        data = os.pread(self.output, PRINTED_BYTES, max(0, size - PRINTED_BYTES))
        return data.lstrip(b"\0").decode(
            errors="replace"
        )  # zeros: of an old part, whose memory was given back

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now, with every process of its session's first process group."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> int | None:
        """Its exit status (negative: the signal), or None if it still runs or isn't ours to wait for."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            return None
        return os.waitstatus_to_exitcode(status) if pid else None

    def close(self) -> None:
        """Give its descriptors back."""
        os.close(self.pidfd)
        if self.output is not None:
            os.close(self.output)


_BOOT_OUTPUT = "segue-output"


def boot_output(pid: int) -> int | None:
    """What a worker that was started by an earlier master prints until it is ready; None if it is ready."""
    path = f"/proc/{pid}/fd/1"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_BOOT_OUTPUT}"):
            return None
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def resolve_interpreter(python: str) -> str:
    """The interpreter with its directory resolved, never its last component: that would leave the environment."""
    return os.path.join(os.path.realpath(os.path.dirname(python)), os.path.basename(python))


def spawn(
    python: str,
    spec: WorkerSpec,
    listeners: Mapping[str, socket.socket],
    relay: Relay,
    lifeline: Lifeline,
    environ: Mapping[str, str],
) -> Process:
    """Start a worker for `spec`. Raises `SpawnError`."""
    opened: list[int] = []
    try:
        spec_fd = os.memfd_create("segue-spec", os.MFD_CLOEXEC)
        opened.append(spec_fd)
        os.write(spec_fd, msgspec.json.encode(spec))
        output = os.memfd_create(_BOOT_OUTPUT, os.MFD_CLOEXEC)
        opened.append(output)
        fcntl.fcntl(output, fcntl.F_SETFL, os.O_APPEND)
        if not os.path.exists(spec.notify_socket):  # nobody would hear that it is ready
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), spec.notify_socket)
        control = _control_socket(spec.control_path)
        opened.append(control)
        named = {name: sock.fileno() for name, sock in listeners.items()} | {
            FdName.SPEC: spec_fd,
            FdName.CONTROL: control,
            FdName.RELAY_READ: relay.read.fileno(),
            FdName.RELAY_WRITE: relay.write.fileno(),
            FdName.LIFELINE: lifeline.read,
        }
        # 1 and 2 are the memory file in the child: the real ones travel under other numbers
        for name, fd in ((FdName.STDOUT, 1), (FdName.STDERR, 2)):
            named[name] = os.dup(fd)
            opened.append(named[name])
        environment = {key: value for key, value in environ.items() if key not in _STRIPPED}
        environment[INSTANCE] = spec.instance
        environment["LISTEN_FDS"] = str(len(named))
        environment["LISTEN_FDNAMES"] = ":".join(named)
        environment["SEGUE_FDS"] = ",".join(map(str, named.values()))
        with signals.held_back():
            process = subprocess.Popen(
                [python, *subprocess._args_from_interpreter_flags(), "-P", "-m", "segue.worker"],  # type: ignore[attr-defined]
                cwd=spec.working_dir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=tuple(named.values()),
                start_new_session=True,
            )
        process.returncode = 0  # it is ours to wait for, through its pidfd
        pidfd = os.pidfd_open(process.pid)
    except (OSError, ValueError) as error:
        for fd in opened:
            os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(spec.control_path)
        raise SpawnError(_explain(python, spec, error)) from error
    for fd in opened:
        if fd != output:
            os.close(fd)
    return Process(process.pid, pidfd, output, spec.control_path, start_time(process.pid) or 0)


def _control_socket(path: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(64)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, error.strerror, path) from None
    return sock.detach()


def _explain(python: str, spec: WorkerSpec, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError) and error.filename == python:
        return f"could not be started: there is no interpreter {python} (see --python)"
    if isinstance(error, OSError) and error.filename == spec.working_dir:
        return f"could not be started: cannot enter {spec.working_dir}: {error.strerror}"
    if isinstance(error, FileNotFoundError) and error.filename in {spec.control_path, spec.notify_socket}:
        return (
            f"could not be started: {error.strerror}: {error.filename}: somebody has removed what this instance needs; "
            f"'mkdir -pm 0700 {os.path.dirname(error.filename)}', then 'kill -USR2 {os.getpid()}' makes its sockets anew"
        )
    if isinstance(error, OSError):
        return f"could not be started: {error.strerror}" + (f": {error.filename}" if error.filename else "")
    return f"could not be started: {error}"


def describe_exit(status: int | None, reason: str) -> str:
    """How a process ended, for a person: `reason` is what it said of itself, if it did."""
    if reason:
        return f"failed: {reason}"
    if status is None:
        return "ended (nobody can tell how: it was not this master's child)"
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    return f"exited with {status}"

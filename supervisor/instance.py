"""An instance's place in the file system: its directory, its lock, and how commands find it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import re
import stat
import tempfile
import time
from collections.abc import Mapping

import msgspec

from segue.handoff import adoption, figures

CONTROL = "control.sock"
NOTIFY = "notify.sock"
LOCK = "master.lock"
JOURNAL = "journal"
RESTART = "restart"
"""A file that is there while the unit is being restarted: the end of one master, and what the next begins with."""
_MAX_SOCKET_PATH = 107
"""Bytes in ``sun_path`` less the closing zero, unix(7)."""
_LONGEST_NAME = len("g99999w9999.adopt")
_LOOK_S = 5.0
"""How long those who look whether the lock is taken may have it in a starting master's way."""
_RETRY_S = 0.001
_FIGURES = re.compile(r"g([0-9]+)w([0-9]+)\.figures")
_WORKER_SOCKET = re.compile(r"g([0-9]+)w([0-9]+)\.(?:sock|adopt)")


class InstanceError(Exception):
    """The instance can't be had; the message says why and what to do."""


class LockedError(InstanceError):
    """Another master runs under this name."""


class Owner(msgspec.Struct, frozen=True):
    """Who holds the lock, as written into it."""

    pid: int
    binds: list[str] = []


class Instance:
    """The directory of one instance: ``RUNTIME_DIR/NAME``, mode 0700, its sockets and its lock."""

    def __init__(self, directory: str, group: int | None = None) -> None:
        self.directory = directory
        self.group = group
        """Whose members may control it, beside its user and root."""
        self._lock: int | None = None

    @property
    def name(self) -> str:
        """Its last component."""
        return os.path.basename(self.directory)

    @property
    def without_master(self) -> str:
        """What whoever wants something of its master is told if there is none."""
        return (
            f"instance {self.name!r} has no master ({self.directory}); workers that it has left serve on: "
            "the same 'segue serve' again takes them over, 'segue stop' ends them"
        )

    @property
    def control(self) -> str:
        """The master's control socket."""
        return os.path.join(self.directory, CONTROL)

    @property
    def notify(self) -> str:
        """The socket to which workers report."""
        return os.path.join(self.directory, NOTIFY)

    @property
    def journal(self) -> str:
        """What a master writes down for the next one."""
        return os.path.join(self.directory, JOURNAL)

    def worker_socket(self, generation: int, worker: int) -> str:
        """The private socket of a worker."""
        return os.path.join(self.directory, f"g{generation}w{worker}.sock")

    def adoption_socket(self, generation: int, worker: int) -> str:
        """Where a later master finds a worker."""
        return os.path.join(self.directory, f"g{generation}w{worker}{adoption.SUFFIX}")

    def probe_socket(self, generation: int, worker: int) -> str:
        """Where the application of a worker can be asked in private."""
        return os.path.join(self.directory, f"g{generation}w{worker}.http")

    def worker_figures(self, generation: int, worker: int) -> str:
        """Where a worker writes its figures down; it outlives the worker."""
        return os.path.join(self.directory, f"g{generation}w{worker}{figures.SUFFIX}")

    def figures_keys(self) -> list[tuple[int, int]]:
        """Generation and worker of those whose figures are there, whether they live or not."""
        found = filter(None, map(_FIGURES.fullmatch, os.listdir(self.directory)))
        return sorted((int(match[1]), int(match[2])) for match in found)

    def worker_keys(self) -> list[tuple[int, int]]:
        """Generation and worker of those whose sockets are there, whether they live or not."""
        found = filter(None, map(_WORKER_SOCKET.fullmatch, os.listdir(self.directory)))
        return sorted({(int(match[1]), int(match[2])) for match in found})

    def forget_worker(self, generation: int, worker: int) -> None:
        """Remove what a worker that has ended may have left behind, as far as that can be removed."""
        key = (generation, worker)
        for path in (self.worker_socket(*key), self.adoption_socket(*key), self.probe_socket(*key)):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def worker_sockets(self) -> list[str]:
        """Those that exist, of workers that run and of ones that were killed."""
        return sorted(glob.glob(os.path.join(glob.escape(self.directory), "g*w*.sock")))

    def create(self) -> None:
        """Make the directory and everything above it. Raises `InstanceError` if it isn't private."""
        parent = os.path.dirname(self.directory)
        if len(os.fsencode(self.directory)) + 1 + _LONGEST_NAME > _MAX_SOCKET_PATH:
            raise InstanceError(
                f"the runtime directory {self.directory} is too long for Unix sockets "
                f"({_MAX_SOCKET_PATH} bytes with their names): choose a shorter --runtime-dir"
            )
        try:
            if not os.path.isdir(parent):
                os.makedirs(parent, mode=0o700)
                self.share(parent, 0o700, 0o750)
            check_private(parent)
            if not os.path.isdir(self.directory):
                os.mkdir(self.directory, 0o700)
            check_private(self.directory)
            if os.stat(self.directory).st_uid == os.geteuid():
                self.share(self.directory, 0o700, 0o750)
        except OSError as error:
            raise InstanceError(
                f"cannot use the runtime directory {self.directory}: {error.strerror}: {error.filename}; "
                "choose another with --runtime-dir"
            ) from error

    def share(self, path: str, mode: int, shared: int) -> None:
        """Give `path` the mode `mode`, or `shared` for the members of the group, if there is one.

        Raises OSError, and `InstanceError` if it is not ours to give to that group.
        """
        if self.group is not None:
            try:
                os.chown(path, -1, self.group)
            except PermissionError as error:
                raise InstanceError(
                    f"user {os.geteuid()} cannot give {path} to group {self.group} (control-group): "
                    "let it be a member of that group, or leave the group out"
                ) from error
        os.chmod(path, mode if self.group is None else shared)

    def lock(self, binds: list[str], inherited: int | None = None) -> None:
        """Become the master of this instance, for as long as this process lives (flock(2)).

        `inherited` is the descriptor of the lock that this very process took before it began anew. Raises
        `LockedError` that names who is master.
        """
        path = os.path.join(self.directory, LOCK)
        if inherited is not None:
            self._lock = inherited
            if self.is_ours:
                self._sign(binds)
                return
            self._lock = None
            os.close(inherited)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InstanceError(
                f"cannot open {path}: {error.strerror}; remove it, or choose another --runtime-dir"
            ) from error
        try:
            _flock(fd)
        except OSError as error:
            owner = read_owner(fd)
            os.close(fd)
            if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
                raise InstanceError(f"cannot lock {path}: {error.strerror}") from error
            who = f"pid {owner.pid}, listening on {', '.join(owner.binds)}" if owner else "another process"
            raise LockedError(
                f"instance {self.name!r} runs already ({who}; {self.directory}): "
                "use 'segue reload' to renew it, 'segue stop' to end it, or another --name"
            ) from None
        self._lock = fd
        self.share(path, 0o600, 0o640)  # who may control it must see who is master
        self._sign(binds)

    def _sign(self, binds: list[str]) -> None:
        assert self._lock is not None
        os.ftruncate(self._lock, 0)
        with contextlib.suppress(OSError):  # on a full disk it is a lock without a name
            os.pwrite(self._lock, msgspec.json.encode(Owner(os.getpid(), binds)), 0)

    @property
    def lock_fd(self) -> int | None:
        """The descriptor that holds the lock."""
        return self._lock

    @property
    def is_ours(self) -> bool:
        """Whether the lock that we hold is still the one by this name: who removes it lets another master in."""
        if self._lock is None:
            return False
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._lock), os.stat(os.path.join(self.directory, LOCK)))
        return False

    @property
    def usurped(self) -> bool:
        """Whether there is another lock by this name now: somebody has removed ours, and another master may have begun."""
        return os.path.exists(os.path.join(self.directory, LOCK)) and not self.is_ours

    def locked_by(self) -> Owner | None:
        """Who is master now; None if nobody is. Raises `PermissionError` if it isn't ours to know."""
        try:
            fd = os.open(os.path.join(self.directory, LOCK), os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            raise
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return read_owner(fd) or Owner(0)
        finally:
            os.close(fd)
        return None

    def mark_restart(self) -> None:
        """Let the master end without its workers, and the next one start the code on the disk. Raises OSError."""
        os.close(
            os.open(os.path.join(self.directory, RESTART), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        )

    @property
    def restart_is_marked(self) -> bool:
        """Whether `mark_restart` was called, and no master has begun since."""
        return os.path.exists(os.path.join(self.directory, RESTART))

    def take_restart_mark(self) -> bool:
        """Remove the mark; returns whether there was one."""
        try:
            os.unlink(os.path.join(self.directory, RESTART))
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Remove what a clean stop leaves behind. The lock file stays: removing it would split the lock."""
        for path in (self.control, self.notify, self.journal):
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _flock(fd: int) -> None:
    """Take the lock for this process alone. Raises OSError, `BlockingIOError` if another has it so.

    Whoever looks whether it is taken has it for a moment together with others who look: that is waited for.
    """
    deadline = time.monotonic() + _LOOK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(fd, fcntl.LOCK_UN)  # else two that start would keep each other out
        time.sleep(_RETRY_S)


def read_owner(fd: int) -> Owner | None:
    """What the holder of the lock wrote into it."""
    try:
        return msgspec.json.decode(os.pread(fd, 65536, 0), type=Owner)
    except (OSError, msgspec.MsgspecError, RecursionError):
        return None


def check_private(path: str) -> None:
    """Raise `InstanceError` unless `path` is a directory of this user (or root's) that nobody else can write to."""
    found, link = os.stat(path), os.lstat(path)
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in {os.geteuid(), 0}:
        raise InstanceError(
            f"{path} is a symbolic link of user {link.st_uid}, who can make it lead elsewhere: "
            "choose another --runtime-dir"
        )
    if not stat.S_ISDIR(found.st_mode):
        raise InstanceError(f"{path} is not a directory: choose another --runtime-dir")
    if found.st_uid not in {os.geteuid(), 0}:
        raise InstanceError(
            f"{path} belongs to user {found.st_uid}: choose another --runtime-dir, or be that user"
        )
    if found.st_mode & 0o022:
        shared = found.st_mode & stat.S_ISVTX  # meant for all, like /tmp
        advice = f"'chmod go-w {path}', or choose another --runtime-dir"
        raise InstanceError(
            f"{path} can be written to by others (mode {stat.S_IMODE(found.st_mode):04o}): "
            + (f"choose a directory of your own in it, --runtime-dir {path}/NAME" if shared else advice)
        )


def default_runtime_dir(environ: Mapping[str, str]) -> str:
    """Where a master puts its instances when nobody says."""
    if environ.get("RUNTIME_DIRECTORY"):
        return environ["RUNTIME_DIRECTORY"].split(":")[0]
    if environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(environ["XDG_RUNTIME_DIR"], "segue")
    return _temporary()


def _temporary() -> str:
    return os.path.join(tempfile.gettempdir(), f"segue-{os.geteuid()}")


def search_path(runtime_dir: str | None, environ: Mapping[str, str]) -> list[str]:
    """Where commands look for instances, in order. What was named explicitly is the only place."""
    explicit = runtime_dir or environ.get("SEGUE_RUNTIME_DIR")
    if explicit:
        return [os.path.abspath(explicit)]
    places = [
        environ.get("RUNTIME_DIRECTORY", "").split(":")[0],
        "/run/segue",
        *sorted(glob.glob("/run/segue-*")),
    ]
    if environ.get("XDG_RUNTIME_DIR"):
        places.append(os.path.join(environ["XDG_RUNTIME_DIR"], "segue"))
    places.append(_temporary())
    return [place for place in dict.fromkeys(places) if place]


def find(runtime_dir: str | None, name: str | None, environ: Mapping[str, str]) -> Instance:
    """The one instance that fits: running, or with workers that have lost their master.

    Those of other users are passed over, as long as there is one of our own; so is our place in the temporary directory,
    if it was somebody else who made it.

    Raises `InstanceError`: none, several (it lists them), or not ours to read (it says who may).
    """
    places = search_path(runtime_dir, environ)
    found: list[Instance] = []
    running: list[Instance] = []
    denied: list[str] = []
    strange = ""
    for place in places:
        try:
            if place == _temporary():
                check_private(place)
            entries = sorted(os.listdir(place))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            denied.append(place)
            continue
        except InstanceError as error:
            strange = str(error)
            continue
        for entry in entries:
            if name is not None and entry != name:
                continue
            instance = Instance(os.path.join(place, entry))
            try:
                if CONTROL in os.listdir(instance.directory) or instance.worker_sockets():
                    (found if instance.locked_by() is None else running).append(instance)
            except NotADirectoryError:
                continue
            except PermissionError:
                denied.append(instance.directory)
    live = running or found
    if len(live) == 1:
        return live[0]
    wanted = f"instance {name!r}" if name else "instance"
    if not live and (denied or strange):
        raise InstanceError(_denied(denied[0]) if denied else strange)
    if not live:
        raise InstanceError(
            f"no {wanted} of segue runs here (looked in {', '.join(places)}); see --runtime-dir"
        )
    listing = "".join(f"\n  --runtime-dir {os.path.dirname(i.directory)} --name {i.name}" for i in live)
    raise InstanceError(f"several instances fit; say which:{listing}")


def _denied(path: str) -> str:
    try:
        uid = os.stat(path).st_uid
    except OSError:
        return f"{path}: permission denied; be root"
    import pwd

    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    if uid == 0:
        return f"{path}: permission denied; be root (try: sudo segue …)"
    return f"{path}: permission denied; be user {user} (try: sudo -u {user} segue …) or root"

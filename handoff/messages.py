"""What supervisor and worker tell each other: the types, and the names on the wire.

The two never import each other. They share this module, the descriptors that a worker inherits
(`segue.handoff.descriptors`), HTTP on Unix sockets (`segue.handoff.http`) and sd_notify datagrams
(`segue.handoff.notify`).
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

HOT = "/api/v1/hot"
"""Where the control endpoints stand, on the master's control socket, a worker's private socket and,
with a token file, on the public listener."""

EPOCH_HEADER = "X-Segue-Epoch"
"""On every command of a master to a worker: how many masters the instance has had, this one included. A worker refuses
one that is lower than the highest that it knows, with `EPOCH_MEMBER` in its problem document."""
EPOCH_MEMBER = "epoch"

DRAIN_MODES = ("reject", "queue")
"""What may become of new work in an operator's drain: refused, or held until it ends."""
BEFORE_STOP = "stop"
"""One that a master alone gives, while a stop waits (`stop_delay`): readiness is off, and all work is taken as before."""
MAX_WORKERS = 1024
"""How many an instance can be asked to run."""
MAX_COUNT = 10**9
"""The highest number of a generation, a worker, an operation or events that is looked for."""
MAX_WAIT_S = 24 * 3600.0
"""The longest time that a request can name."""

LATENCY_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets in which a worker counts how long responses took."""

PAGE_HEADER = "x-segue-page"
"""What the dashboard's own requests carry beside their ``Origin``: no page of another origin can, without asking first."""


class FdName(enum.StrEnum):
    """Names in a worker's ``LISTEN_FDNAMES`` that aren't those of a public listener."""

    SPEC = "segue-spec"
    """The `WorkerSpec` as JSON, in a sealed memory file: what is secret is neither in argv nor in the environment."""
    CONTROL = "segue-control"
    """The worker's private Unix socket, bound and listening."""
    RELAY_READ = "segue-relay-read"
    RELAY_WRITE = "segue-relay-write"
    """The two ends of the relay: a worker adopts from the one and hands over into the other."""
    LIFELINE = "segue-lifeline"
    """The read end of a pipe that the master never writes to: end of file says that the master is gone."""
    STDOUT = "segue-stdout"
    STDERR = "segue-stderr"
    """Where the worker's output goes once it is ready. Until then its descriptors 1 and 2 are a bounded
    memory file, opened for appending, which the master reads to tell why a start failed."""


class WorkerPhase(enum.StrEnum):
    """What a booting worker is doing, told by ``X_SEGUE_PHASE``: it names the place of a failed start."""

    BOOT = "boot"
    IMPORT = "import"
    STARTUP = "startup"
    WARM_UP = "warm-up"


class WorkerMode(enum.StrEnum):
    """What a worker does with connections, told by ``X_SEGUE_STATE`` and by its status."""

    BOOTING = "booting"
    READY = "ready"
    """Started and warmed up; accepts nothing yet."""
    ACTIVE = "active"
    """Accepts from its listeners and adopts from the relay."""
    QUIET = "quiet"
    """Accepts and adopts nothing, serves what it has, sends nothing away (first phase of a handover)."""
    DRAINING = "draining"
    """Hands its connections over as they become idle."""
    DRAINED = "drained"
    """No connection and no task is left; can be activated again."""
    PARKED = "parked"
    """Drained, and told to stay for a while: its generation may be taken back."""
    STOPPING = "stopping"


class NotifyKey(enum.StrEnum):
    """Keys of the datagrams from worker to master, beside systemd's own (sd_notify(3))."""

    READY = "READY"
    WATCHDOG = "WATCHDOG"
    STATUS = "STATUS"
    """On a failed start: ``phase: reason`` for a person."""
    STATE = "X_SEGUE_STATE"
    PHASE = "X_SEGUE_PHASE"
    FAILED = "X_SEGUE_FAILED"
    """Set on a failed start, one line: what failed and why."""
    RECYCLE = "X_SEGUE_RECYCLE"
    """The worker asks to be replaced; the value says why."""
    RESPONSES = "X_SEGUE_RESPONSES"
    """How many responses the worker has sent since its start, and how many of them were 5xx of the application:
    ``TOTAL ERRORS``. With each heartbeat, and often while it is watched."""
    HANDOVER = "X_SEGUE_HANDOVER"
    """The worker has services; the value says how many seconds they may take to hand over."""


class ListenerInfo(msgspec.Struct, frozen=True):
    """A public listening socket. Its descriptor travels under `name`."""

    name: str
    """Unique in an instance and stable over reloads: derived from the address."""
    address: str
    """``127.0.0.1:8000``, ``[::1]:8000`` or ``unix:/path``, as it is bound (a port 0 replaced by the real one)."""
    family: str
    """``inet``, ``inet6`` or ``unix``."""
    bind: str = ""
    """What asked for it, as the settings write it."""


class ServiceRecord(msgspec.Struct, frozen=True):
    """What was decided of a service while the instance runs: every worker that starts later begins with it."""

    version: int = 1
    choices: dict[str, str] = {}
    """Settings that were chosen at run time. They may be secret."""


class SwapOrder(msgspec.Struct, frozen=True):
    """The body of ``POST /api/v1/hot/swap/prepare``, ``commit`` and ``abort`` on a worker's private socket."""

    swap: int
    """The number by which the worker knows it again."""
    service: str = ""
    query: dict[str, str] = {}
    version: int = 0
    """What the new instance's version will be."""
    choices: dict[str, str] = {}
    """What is remembered of earlier choices."""


class RecycleLimits(msgspec.Struct, frozen=True):
    """When a worker asks to be replaced; of each jitter it adds a random part. None: never."""

    requests: int | None = None
    requests_jitter: int = 0
    rss_bytes: int | None = None
    rss_jitter_bytes: int = 0
    age_s: float | None = None
    age_jitter_s: float = 0.0


class WorkerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a worker needs to know to start. Times in seconds."""

    instance: str
    generation: int
    worker: int
    """Unique within its generation, from 1; a respawned worker has a new one."""
    app: str | None
    """``module:attribute``; None for the built-in application."""
    working_dir: str
    """The real path of the directory in which the application runs."""
    app_dir: str
    """The real path that is put first on ``sys.path``."""
    uvicorn: dict[str, Any]
    """Keyword arguments of ``uvicorn.Config``, without those that the supervisor itself carries out
    (app, host, port, uds, fd, reload…, workers)."""
    listeners: tuple[ListenerInfo, ...]
    notify_socket: str
    master_socket: str
    """The master's control socket, to which the public listener passes hot requests on."""
    control_path: str
    """Path of the worker's own private socket (already bound; unlinked by the worker when it ends)."""
    heartbeat_s: float
    """Interval between two ``WATCHDOG=1``."""
    idle_grace_s: float
    stop_timeout_s: float
    """How long a stop may take when the master is gone and nobody says."""
    warm_up: tuple[str, ...] = ()
    health_path: str | None = None
    token: str | None = None
    """Bearer token; with one the public listener has the hot endpoints."""
    operator_drain: str | None = None
    """``reject`` or ``queue`` if the operator's drain is on when this worker starts."""
    check_only: bool = False
    """Start up, warm up, shut down, exit 0: `segue check`."""
    import_only: bool = False
    """And of that only the import."""
    settings_file: str | None = None
    """Where the settings of services are read, anew with each swap."""
    env_file: str | None = None
    services: dict[str, ServiceRecord] = {}
    queue_limit: int = 1000
    """How many requests an operator's drain in the mode ``queue`` holds at most."""
    queue_timeout_s: float = 30.0
    adoption_path: str | None = None
    """Where a later master finds this worker (`segue.handoff.adoption`); bound by the worker."""
    identity: str = ""
    """The instance's own random name: another instance in a directory of the same name is not its master."""
    epoch: int = 0
    """Of the master that starts it."""
    fingerprint: str = ""
    """That of its generation's code."""
    probe_path: str | None = None
    """Where its application can be asked in private, from ready on; bound by the worker."""
    recycle: RecycleLimits = RecycleLimits()
    figures_path: str | None = None
    """Where the worker writes its `Figures` (`segue.handoff.figures`). Removed by the master."""
    log_format: str = "text"
    """``text`` or ``json``."""
    access_log_format: str | None = None
    """``combined`` or ``json``; None: uvicorn's own, if any."""
    request_metrics: bool = True
    """Count responses by status class, and how long they took."""
    in_haste: bool = False
    """Somebody waits for it, and what serves meanwhile has little to do: it starts at full priority."""
    refresh: bool = False
    """Open pages reload themselves when another generation serves (`segue.worker.refresh`)."""


class Counts(msgspec.Struct, frozen=True):
    """What a worker has counted since its start. None of these numbers ever goes back."""

    requests: int = 0
    """Public responses, as uvicorn counts them; also without request metrics."""
    responses: dict[str, int] = {}
    """Complete responses of the application by status class, ``1xx`` to ``5xx``; empty without request metrics. Counted
    when a response is out whole. Among the ``4xx`` are what was no HTTP; what was asked on the private socket doesn't count, nor do WebSockets."""
    rejected: int = 0
    """Responses with 5xx that segue itself gave (what is marked, while an operator drains or the worker stops; a health
    path that says no), which are not in `responses`."""
    aborted: int = 0
    """Requests that were not answered whole: the client left, or the application broke off."""
    latency: tuple[int, ...] = ()
    """How many responses took at most as long as each of `LATENCY_BOUNDS_S`, each counted once; last those that took longer."""
    latency_s: float = 0.0
    """The sum of their times: from the request's last header to the last byte given to the kernel's side."""
    websockets: int = 0
    """Connections that became a WebSocket, accepted by the application or not."""
    accepted: int = 0
    """Connections accepted from listeners."""
    adopted: int = 0
    """Connections taken over from other workers."""
    handed_over: int = 0
    closed: int = 0
    """Connections that a drain had to close."""
    held: int = 0
    """Requests that an operator's drain made wait, whatever became of them."""
    held_timed_out: int = 0
    held_left: int = 0
    """Those of `held` whose client did not wait."""
    refused: int = 0
    """Requests that an operator's drain or a stop refused without letting them wait, or while they waited."""


class Figures(msgspec.Struct, frozen=True):
    """What a worker writes down twice a second (`segue.handoff.figures`)."""

    pid: int
    time: float
    """Unix time at which it was written."""
    since: float
    """Unix time of its start."""
    mode: WorkerMode
    counts: Counts
    connections: int
    websockets: int
    in_flight: int
    tasks: int
    waiting: int
    """Requests that an operator's drain holds."""
    loop_lag_s: float
    """The longest that the event loop kept a timer waiting, of the last ten seconds or so."""
    rss_bytes: int
    cpu_s: float
    """CPU time since its start."""
    descriptors: int
    leases: dict[str, int] = {}
    """Of each service, those of retiring instances included."""


class WorkerStatus(msgspec.Struct):
    """``GET /api/v1/hot/status`` on a worker's private socket."""

    pid: int
    generation: int
    worker: int
    mode: WorkerMode
    draining: bool
    """The operator's drain is on."""
    connections: int
    requests_total: int
    in_flight: int
    tasks: int
    handed_over: int
    adopted: int
    closed: int
    """Connections that a drain had to close (TLS and unmovable ones after their grace, WebSockets with 1012)."""
    sending_s: float | None
    """From the start of the last handover until its last idle connection was sent; None while there is none."""
    max_stall_s: float
    """The longest that one turn of sending or adopting held this worker's event loop."""
    handover_cpu_s: float
    """CPU time that this worker spent on sending connections."""
    rss_bytes: int
    cpu_percent: float
    since: float
    """Unix time of its start."""
    listeners: list[str] = []
    """Addresses that it accepts on now."""
    probe: str | None = None
    """The private Unix socket on which its application can be asked."""
    queue: dict[str, int] = {}
    """What an operator's drain holds (``waiting``) and has held, and what it has rejected."""
    services: dict[str, dict[str, Any]] = {}
    """By name; see `segue.worker.services.report`."""
    responses: dict[str, int] = {}
    """As in `Counts`."""
    rejected: int = 0
    """As in `Counts`."""
    websockets: int = 0
    """Open ones."""
    loop_lag_s: float = 0.0
    """The longest that the event loop kept a timer waiting, of the last ten seconds or so."""
    counts: Counts | None = None
    """Everything that is counted since the worker's start."""

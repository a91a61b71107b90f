"""What one generation is made from: settings read anew, directories resolved anew, its fingerprint."""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from segue.handoff import lines
from segue.handoff.listeners import Listener
from segue.handoff.messages import RecycleLimits, ServiceRecord, WorkerSpec
from segue.supervisor import settings as config
from segue.supervisor.fingerprint import fingerprint
from segue.supervisor.instance import Instance
from segue.supervisor.model import Limits, Strategy
from segue.supervisor.spawning import resolve_interpreter

STDERR = 2
"""The master's own, which its workers inherit."""
HEARTBEATS_PER_TIMEOUT = 3
"""How many heartbeats a worker sends within the time after which its silence counts as a hang."""
_JITTER = 0.1
"""The share of a limit that is added at random at most, if nobody says."""


class Snapshot(msgspec.Struct, frozen=True):
    """Settings and paths as they were when a generation was started. Paths are real ones."""

    effective: config.Effective
    working_dir: str
    app_dir: str
    python: str
    token: str | None
    fingerprint: str
    listeners: tuple[Listener, ...] = ()
    workers: int = 1

    @property
    def settings(self) -> config.Settings:
        """Its effective settings."""
        return self.effective.settings

    @property
    def limits(self) -> Limits:
        """Its deadlines."""
        settings = self.settings
        return Limits(
            ready_timeout=settings.ready_timeout,
            drain_timeout=settings.drain_timeout,
            stop_timeout=settings.timeout_graceful_shutdown,
            heartbeat_timeout=settings.heartbeat_timeout,
            park_for=self._park_for,
            probation=settings.probation,
            probation_5xx=settings.probation_5xx,
            strategy=Strategy(settings.strategy),
            replace_timeout=settings.replace_timeout,
            canary=settings.canary or 0,
            canary_for=settings.canary_for,
        )

    @property
    def _park_for(self) -> float:
        settings = self.settings
        if settings.strategy == Strategy.REPLACE:
            return 0.0  # what can't run twice can't be kept beside the next one
        return settings.probation if settings.park_for is None else settings.park_for

    def fingerprint_now(self) -> str:
        """The fingerprint of what is on disk at this moment. Reads files: not for the event loop."""
        return _fingerprint(self.settings, self.app_dir, self.python)

    def spec(
        self,
        instance: Instance,
        generation: int,
        worker: int,
        drain_mode: str | None = None,
        services: Mapping[str, ServiceRecord] | None = None,
    ) -> WorkerSpec:
        """What worker number `worker` is told."""
        settings = self.settings
        return WorkerSpec(
            instance=instance.name,
            generation=generation,
            worker=worker,
            app=settings.app,
            working_dir=self.working_dir,
            app_dir=self.app_dir,
            uvicorn=settings.uvicorn,
            listeners=tuple(listener.info for listener in self.listeners),
            notify_socket=instance.notify,
            master_socket=instance.control,
            control_path=instance.worker_socket(generation, worker),
            figures_path=instance.worker_figures(generation, worker),
            heartbeat_s=settings.heartbeat_timeout / HEARTBEATS_PER_TIMEOUT,
            idle_grace_s=settings.idle_grace,
            stop_timeout_s=settings.timeout_graceful_shutdown,
            warm_up=settings.warm_up,
            health_path=settings.health_path,
            token=self.token,
            operator_drain=drain_mode,
            settings_file=self.effective.file,
            env_file=settings.uvicorn.get("env_file"),
            services=dict(services or {}),
            queue_limit=settings.queue_limit,
            queue_timeout_s=settings.queue_timeout,
            probe_path=instance.probe_socket(generation, worker),
            recycle=_recycle_limits(settings),
            request_metrics=settings.request_metrics,
            in_haste=settings.reload,
            log_format=lines.chosen(settings.log_format, STDERR),
            access_log_format=_access_log_format(settings),
            refresh=settings.reload and settings.reload_pages,
        )


def _access_log_format(settings: config.Settings) -> str | None:
    """None: uvicorn writes it, or nobody does."""
    wanted = settings.access_log_format
    if wanted == "auto":  # who gives a log configuration has said how uvicorn's lines look
        is_json = lines.chosen(settings.log_format, STDERR) == lines.JSON
        wanted = lines.JSON if is_json and "log_config" not in settings.uvicorn else "uvicorn"
    return wanted if wanted != "uvicorn" and settings.uvicorn.get("access_log", True) else None


def take(effective: config.Effective) -> Snapshot:
    """Resolve and read everything else that a generation needs.

    Reads files: not for the event loop. Raises `SettingsError`.
    """
    settings = effective.settings
    for key, path in (("the working directory", settings.base_dir), ("app-dir", settings.app_dir)):
        if not os.path.isdir(path):
            raise config.SettingsError(f"{key} {path} is not a directory")
    app_dir = os.path.realpath(settings.app_dir)
    python = resolve_interpreter(settings.python)
    return Snapshot(
        effective=effective,
        working_dir=os.path.realpath(settings.base_dir),
        app_dir=app_dir,
        python=python,
        token=config.read_token(settings.token_file) if settings.token_file else None,
        fingerprint=_fingerprint(settings, app_dir, python),
    )


def _recycle_limits(settings: config.Settings) -> RecycleLimits:
    rss, rss_jitter = settings.max_worker_rss, settings.max_worker_rss_jitter
    age, age_jitter = settings.max_worker_age, settings.max_worker_age_jitter
    return RecycleLimits(
        requests=settings.uvicorn.get("limit_max_requests"),
        requests_jitter=settings.uvicorn.get("limit_max_requests_jitter", 0),
        rss_bytes=rss,
        rss_jitter_bytes=int((rss or 0) * _JITTER) if rss_jitter is None else rss_jitter,
        age_s=age,
        age_jitter_s=(age or 0) * _JITTER if age_jitter is None else age_jitter,
    )


def _fingerprint(settings: config.Settings, app_dir: str, python: str) -> str:
    relevant = msgspec.json.encode([settings.app, settings.factory, settings.uvicorn, settings.warm_up])
    return fingerprint(app_dir, python, relevant)

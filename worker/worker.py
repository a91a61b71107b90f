"""One worker: its modes, and what takes it from one to another.

`booting → ready → active ⇄ quiet ⇄ draining → drained → parked → stopping`, and back to active from every mode between
ready and stopping. A worker decides nothing of this itself, except when its master is gone: then one that waits ends, one
that drains finishes and ends, one that is parked ends when its time is over, and one that serves goes on serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping

import uvicorn

from segue.handoff import descriptors
from segue.handoff.http_server import Server
from segue.handoff.messages import (
    BEFORE_STOP,
    FdName,
    Figures,
    WorkerMode,
    WorkerPhase,
    WorkerSpec,
    WorkerStatus,
)
from segue.worker import public
from segue.worker.access import AccessLog
from segue.worker.accounts import Accounts
from segue.worker.adoption import Adoption
from segue.worker.counting import Counting
from segue.worker.drain import Drain
from segue.worker.ending import Ending
from segue.worker.endpoints import Refused, handler
from segue.worker.events import Stage, WorkerInfo
from segue.worker.gate import gate
from segue.worker.intake import Intake, PublicListener
from segue.worker.lifespan import Lifespan, StartFailed
from segue.worker.probe import Probe
from segue.worker.recycling import Recycling
from segue.worker.services.hosted import Hosted
from segue.worker.telling import Telling
from segue.worker.uvicorn_internals import Http
from segue.worker.warm_up import warm_up

_log = logging.getLogger("segue.worker")

EXIT_OK = 0
EXIT_CUT = 1
"""Something had to be cut at the end of a stop's timeout."""
EXIT_NO_MASTER = 4
"""The master went away before this worker had been activated."""

_TICK_S = 1.0
_HARD_EXTRA_S = 5.0
"""How long after its timeout a stop that hangs is ended by force."""
_SHUTDOWN_S = 5.0
"""What a lifespan shutdown may take at least."""


class Worker:
    """Runs one application in this process (`segue.worker.endpoints.Commands` are its verbs)."""

    def __init__(
        self,
        spec: WorkerSpec,
        config: uvicorn.Config,
        fds: Mapping[str, int],
        telling: Telling,
        adoption: Adoption,
        on_ready: Callable[[], Awaitable[None]],
        services: Hosted,
    ) -> None:
        self.master_socket = spec.master_socket
        self.mode = WorkerMode.BOOTING
        self.services = services
        self.adoption = adoption
        self._spec = spec
        self._config = config
        self._telling = telling
        self._recycling = Recycling(spec.recycle)
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        self._since = time.time()
        self._lifespan = Lifespan(config)
        self._http = Http(config, self._lifespan.state, self._loop)
        self._probe = Probe(Http(config, self._lifespan.state, self._loop), spec.probe_path, self._loop)
        self._lifespan.state["segue"] = WorkerInfo(spec.generation, spec.worker)
        config.loaded_app = public.wrap(
            config.loaded_app,
            config.root_path,
            spec.health_path,
            spec.token,
            spec.master_socket,
            self._unhealthy,
        )
        if spec.refresh:
            from segue.worker.refresh import wrap

            config.loaded_app = wrap(config.loaded_app, config.root_path, spec.generation)
        self._sockets = {
            name: socket.socket(fileno=fds[name]) for name in (FdName.RELAY_READ, FdName.RELAY_WRITE)
        }
        listeners = {
            info.name: PublicListener(info, socket.socket(fileno=fds[info.name]))
            for info in spec.listeners
            if info.name in fds
        }
        for listener in listeners.values():
            listener.sock.setblocking(False)
        self.listeners = {listener.info: listener.sock for listener in listeners.values()}
        self._control = socket.socket(fileno=fds[FdName.CONTROL])
        self._lifeline = fds[FdName.LIFELINE]
        self._intake = Intake(self._http, listeners, self._sockets[FdName.RELAY_READ], self._loop)
        self._drain = Drain(
            self._http, self._intake, self._sockets[FdName.RELAY_WRITE], self._loop, spec.idle_grace_s
        )
        self._counting = Counting(
            config,
            (self._http, self._probe.http),
            self._intake,
            self._drain,
            services,
            spec.request_metrics,
            AccessLog(spec.access_log_format) if spec.access_log_format else None,
        )
        if self._counting.counts_responses:
            self._telling.responses = self._counting.answered
        self._accounts = Accounts(spec.figures_path, self.figures, self._loop)
        self._master_gone = False
        self._parked_until = 0.0
        self._park_end: asyncio.TimerHandle | None = None
        self._stopping = asyncio.Event()
        self._stop_timeout_s = spec.stop_timeout_s
        self._exit = EXIT_OK
        self._ticker: asyncio.TimerHandle | None = None
        gate.configure(spec.queue_limit, spec.queue_timeout_s, spec.health_path)
        self.operator_drain = spec.operator_drain

    @property
    def operator_drain(self) -> str | None:
        """What an operator wants done with new work, if anything: ``reject`` or ``queue``; or `BEFORE_STOP`."""
        return BEFORE_STOP if self._before_stop else gate.mode

    @operator_drain.setter
    def operator_drain(self, mode: str | None) -> None:
        self._before_stop = mode == BEFORE_STOP
        gate.set_mode(None if self._before_stop else mode)

    @property
    def relay(self) -> tuple[socket.socket, socket.socket]:
        """Its read end and its write end."""
        return self._sockets[FdName.RELAY_READ], self._sockets[FdName.RELAY_WRITE]

    # Its life

    async def run(self) -> int:
        """Start, serve until told to stop, and end; returns the exit status. Raises `lifespan.StartFailed`."""
        control = Server(self._control, handler(self))
        self._loop.add_signal_handler(signal.SIGTERM, self.stop, None)
        self.adoption.serve(self)
        self._loop.add_reader(self._lifeline, self._on_lifeline)
        try:
            if not await self._start_unless_stopped():
                return self._exit
            if self._spec.check_only:
                self._arm_hard_end(self._stop_timeout_s)
                await self._lifespan.shutdown(self._stop_timeout_s)
                return EXIT_OK
            await self._stopping.wait()
            return await self._shut_down()
        finally:
            if self._ticker is not None:
                self._ticker.cancel()
            self._accounts.close()
            self._loop.remove_reader(self._lifeline)
            self.adoption.close()
            control.close()
            await asyncio.sleep(0)  # an answer that is being written gets out
            with contextlib.suppress(OSError):
                os.unlink(self._spec.control_path)

    async def _start_unless_stopped(self) -> bool:
        start = self._loop.create_task(self._start())
        stopped = self._loop.create_task(self._stopping.wait())
        await asyncio.wait({start, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        try:
            if not start.done():
                start.cancel()
                await asyncio.wait({start}, timeout=_SHUTDOWN_S)
                return False
            start.result()
        except asyncio.CancelledError:
            return False
        finally:
            if not start.done() or start.cancelled() or start.exception() is not None:
                self._arm_hard_end(_SHUTDOWN_S)
                await self._lifespan.shutdown(_SHUTDOWN_S)
        return True

    async def _start(self) -> None:
        self._tick()
        self._telling.phase(WorkerPhase.STARTUP)
        await self._lifespan.startup()
        if self._spec.warm_up:
            self._telling.phase(WorkerPhase.WARM_UP)
        listener = self._spec.listeners[0] if self._spec.listeners else None
        for path in self._spec.warm_up:
            await warm_up(self._config, path, self._lifespan.state, listener, self._http.state.tasks)
        if descriptors.spare() <= 0:
            raise StartFailed(
                f"no descriptors are left for connections: {descriptors.in_use()} of {descriptors.limit()} "
                "are in use; raise the hard limit ('ulimit -Hn', LimitNOFILE=)"
            )
        if not self._spec.check_only:
            await self._probe.open()
            await self._on_ready()
            self._recycling.begin()
            self._telling.handover_s = self.services.handover_s
            self._accounts.start()
            self._set_mode(WorkerMode.READY)

    def _tick(self) -> None:
        self._ticker = self._loop.call_later(_TICK_S, self._tick)
        self._http.refresh_headers()
        self._probe.http.refresh_headers()
        why = self._recycling.due(self._http.state.total_requests) if self.mode is WorkerMode.ACTIVE else None
        if why is not None:
            self._telling.ask_to_recycle(why)
        if self.mode is WorkerMode.BOOTING:
            self._telling.alive()

    def _set_mode(self, mode: WorkerMode) -> None:
        if mode is not self.mode:
            self.mode = mode
            _log.debug("event=mode mode=%s connections=%d", mode, len(self._http.state.connections))
            self._telling.mode(mode)

    def _unhealthy(self) -> str | None:
        if self.mode is WorkerMode.STOPPING or self._before_stop:
            return "stopping"
        return None if self.operator_drain is None else f"draining ({self.operator_drain})"

    def _on_lifeline(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if os.read(self._lifeline, 1):
                return
        lost = self._lifeline
        self.adoption.poll()
        if self._lifeline != lost:
            return  # the next master is here already
        self._loop.remove_reader(self._lifeline)
        self._master_gone = True
        generation, worker = self._spec.generation, self._spec.worker
        if self.mode in {WorkerMode.BOOTING, WorkerMode.READY}:
            _log.error("event=master-gone generation=%d worker=%d action=exit", generation, worker)
            self._exit = EXIT_NO_MASTER
            self.stop(None)
        elif self.mode is WorkerMode.ACTIVE:
            _log.warning("event=master-gone generation=%d worker=%d action=serve-on", generation, worker)
        elif self.mode is WorkerMode.QUIET:
            self.drain(None, self._stop_timeout_s)
        elif self.mode is WorkerMode.DRAINED:
            self.stop(None)
        elif self.mode is WorkerMode.PARKED:
            left = max(0.0, self._parked_until - self._loop.time())
            self._park_end = self._loop.call_later(left, self.stop, None)

    def take_lifeline(self, fd: int) -> None:
        """Another master's life is watched from now on."""
        self._loop.remove_reader(self._lifeline)
        os.close(self._lifeline)
        self._lifeline, self._master_gone = fd, False
        self._stay()
        self._loop.add_reader(fd, self._on_lifeline)

    # Commands

    def commanded(self) -> None:
        """A command has arrived: the master knows of this worker."""
        self._telling.confirmed()

    def activate(self, alone: bool = False, watch_s: float = 0.0) -> None:
        """Accept and adopt connections, whatever was being drained; `alone`: no other worker will.

        For `watch_s` seconds the master hears often how that goes.
        """
        self._refuse_in(WorkerMode.BOOTING, WorkerMode.STOPPING)
        self._intake.alone = alone
        self._stay()
        self._drain.stop()
        self._intake.open()
        Stage.activate()
        self._set_mode(WorkerMode.ACTIVE)
        if watch_s:
            self._telling.watched(watch_s)

    def quiet(self) -> None:
        """Accept and adopt nothing, and send nothing away."""
        self._refuse_in(WorkerMode.BOOTING, WorkerMode.STOPPING)
        if self.mode in {WorkerMode.DRAINING, WorkerMode.DRAINED, WorkerMode.PARKED}:
            return  # quiet already
        self._intake.close()
        Stage.hand_over()
        self._set_mode(WorkerMode.QUIET)

    def drain(self, listeners: frozenset[str] | None, timeout_s: float | None) -> None:
        """Hand connections over as they become idle; those of other listeners than `listeners` are closed in time."""
        self._refuse_in(WorkerMode.BOOTING, WorkerMode.STOPPING)
        self._intake.close()
        Stage.drain()
        self._set_mode(WorkerMode.DRAINING)
        self._drain.start(listeners, timeout_s, self._drained)

    def park(self, seconds: float) -> None:
        """Stay as it is, with nothing to do: its generation may be taken back. Without a master, for `seconds`."""
        if self.mode not in {WorkerMode.DRAINED, WorkerMode.PARKED}:
            raise self._refusal()
        self._parked_until = self._loop.time() + seconds
        self._set_mode(WorkerMode.PARKED)

    def _stay(self) -> None:
        """There is somebody again who says when it ends."""
        if self._park_end is not None:
            self._park_end.cancel()
            self._park_end = None

    def _drained(self) -> None:
        self._set_mode(WorkerMode.DRAINED)
        if self._master_gone:
            self.stop(None)

    def stop(self, timeout_s: float | None) -> None:
        """End gracefully within `timeout_s` seconds (None: what the settings say)."""
        if self._stopping.is_set():
            return
        if timeout_s is not None:
            self._stop_timeout_s = timeout_s
        self._arm_hard_end(self._stop_timeout_s)
        if self.mode is not WorkerMode.BOOTING:
            self._intake.close()
            self._drain.stop()
        self._stay()
        self._probe.close()
        Stage.drain()
        gate.shut()
        self._set_mode(WorkerMode.STOPPING)
        self._stopping.set()

    def _refuse_in(self, *modes: WorkerMode) -> None:
        if self.mode in modes:
            raise self._refusal()

    def _refusal(self) -> Refused:
        return Refused(f"worker {self._spec.worker} of generation {self._spec.generation} is {self.mode}")

    def figures(self) -> Figures:
        """What can be said in a moment."""
        return self._counting.figures(self.mode, self._since, self._accounts.lag_s)

    def status(self) -> WorkerStatus:
        """Everything that can be said of this worker now."""
        draining = self.operator_drain is not None
        return self._counting.status(self._spec, self.figures(), draining, self._probe.path)

    # Its end

    async def _shut_down(self) -> int:
        deadline = self._loop.time() + self._stop_timeout_s
        ending = Ending(self._http, self._probe, self._intake, self._drain)
        clean = await ending.finish(self._stop_timeout_s)
        remaining = max(_SHUTDOWN_S, deadline - self._loop.time())
        self._arm_hard_end(remaining)
        clean = await self._lifespan.shutdown(remaining) and clean
        return self._exit or (EXIT_OK if clean else EXIT_CUT)

    @staticmethod
    def _arm_hard_end(timeout_s: float) -> None:
        """End the process with status 1 and all its stacks, should it hang: needs neither the loop nor the GIL."""
        faulthandler.dump_traceback_later(timeout_s + _HARD_EXTRA_S, exit=True, file=2)

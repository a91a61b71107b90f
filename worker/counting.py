"""A worker's figures, put together: what its status says, and what it writes down (`segue.worker.accounts`)."""

from __future__ import annotations

import logging
import os
import time

import msgspec
import uvicorn

from segue.handoff import descriptors
from segue.handoff.messages import Counts, Figures, WorkerMode, WorkerSpec, WorkerStatus
from segue.worker import usage
from segue.worker.access import AccessLog
from segue.worker.drain import Drain
from segue.worker.gate import gate
from segue.worker.intake import Intake
from segue.worker.responses import Responses, watch
from segue.worker.services.hosted import Hosted
from segue.worker.uvicorn_internals import Http, in_flight

_log = logging.getLogger("segue.worker")


class Counting:
    """The counters of one worker."""

    def __init__(
        self,
        config: uvicorn.Config,
        https: tuple[Http, ...],
        intake: Intake,
        drain: Drain,
        services: Hosted,
        requests: bool,
        access: AccessLog | None,
    ) -> None:
        """`https`: what is public, and then what is private. `requests`: count responses, too; `access`: write each down.

        That has to be decided before the first connection is made.
        """
        self._https, self._intake, self._drain, self._services = https, intake, drain, services
        self._cpu = usage.CpuMeter()
        self._responses: Responses | None = None
        self._aborted = 0
        if requests or access is not None:
            responses = Responses()
            if watch(config, responses, access):
                self._responses = responses if requests else None
            else:
                reason = f"responses of {config.http_protocol_class.__qualname__} can't be counted"
                _log.warning("event=not-counted reason=%r", reason)

    def figures(self, mode: WorkerMode, since: float, lag_s: float) -> Figures:
        """Everything that can be said in a moment."""
        state, responses = self._https[0].state, self._responses
        counts = self._counts()
        # 10,000 idle connections are not looked at one by one
        is_idle = responses is not None and responses.begun == responses.completed + counts.aborted
        return Figures(
            pid=os.getpid(),
            time=time.time(),
            since=since,
            mode=mode,
            counts=counts,
            connections=len(state.connections) + self._intake.pending,
            websockets=0 if responses is None else responses.websockets - responses.websockets_lost,
            in_flight=0 if is_idle else in_flight(state.connections),
            tasks=len(state.tasks),
            waiting=gate.waiting,
            loop_lag_s=lag_s,
            rss_bytes=usage.rss_bytes(),
            cpu_s=round(time.process_time(), 3),
            descriptors=descriptors.in_use(),
            leases=self._services.leases(),
        )

    def status(self, spec: WorkerSpec, figures: Figures, draining: bool, probe: str | None) -> WorkerStatus:
        """Everything that can be said of this worker now; `probe` is where its application can be asked in private."""
        counts, handover = figures.counts, self._drain.handover
        return WorkerStatus(
            pid=figures.pid,
            generation=spec.generation,
            worker=spec.worker,
            mode=figures.mode,
            draining=draining,
            connections=figures.connections,
            requests_total=counts.requests,
            in_flight=figures.in_flight,
            tasks=figures.tasks,
            handed_over=counts.handed_over,
            adopted=counts.adopted,
            closed=counts.closed,
            sending_s=handover.sending_s,
            max_stall_s=max(handover.max_stall_s, self._intake.max_stall_s),
            handover_cpu_s=handover.cpu_s,
            rss_bytes=figures.rss_bytes,
            cpu_percent=self._cpu.percent(),
            since=figures.since,
            listeners=self._intake.addresses,
            probe=probe,
            queue={
                "waiting": figures.waiting,
                "queued_total": counts.held,
                "rejected_total": counts.refused,
                "timed_out_total": counts.held_timed_out,
                "left_total": counts.held_left,
            },
            responses=counts.responses,
            rejected=counts.rejected,
            websockets=figures.websockets,
            loop_lag_s=figures.loop_lag_s,
            counts=counts,
        )

    def answered(self) -> tuple[int, int]:
        """How many public responses the application has given, and how many of them were 5xx."""
        assert self._responses is not None
        classes = self._responses.classes
        return sum(classes), classes[5]

    @property
    def counts_responses(self) -> bool:
        """Whether responses are counted."""
        return self._responses is not None

    def _counts(self) -> Counts:
        responses = self._responses
        counts = Counts(
            requests=self._https[0].state.total_requests,
            accepted=self._intake.accepted,
            adopted=self._intake.adopted,
            handed_over=self._drain.handover.sent,
            closed=self._drain.closed,
            held=gate.queued_total,
            held_timed_out=gate.timed_out_total,
            held_left=gate.left_total,
            refused=gate.rejected_total,
        )
        if responses is None:
            return counts
        open_or_aborted = responses.begun - responses.completed
        if open_or_aborted > self._aborted:  # it doesn't go back, whatever ends while it is looked at
            being_answered = sum(in_flight(http.state.connections) for http in self._https)
            self._aborted = max(self._aborted, open_or_aborted - being_answered)
        return msgspec.structs.replace(
            counts,
            responses=responses.by_class(),
            rejected=responses.rejected,
            aborted=self._aborted,
            latency=tuple(responses.latency),
            latency_s=round(responses.seconds, 6),
            websockets=responses.websockets,
        )

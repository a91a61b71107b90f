"""``GET /metrics``: what there is to know of an instance, for Prometheus, in its text format or as OpenMetrics.

The families are data (`FAMILIES`); docs/metrics.md, the dashboard and the alert rules are checked against them. Figures
of workers come from the files that they write, so that neither their number nor one that hangs holds a scrape up;
only an application with services has its workers asked, within a deadline. prometheus-client is imported with the first
scrape: most of the memory of a master that nobody scrapes would be its.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from segue import __version__
from segue.handoff.http import Response
from segue.handoff.messages import DRAIN_MODES, LATENCY_BOUNDS_S, Counts, Figures
from segue.supervisor.status import services_of_current
from segue.supervisor.totals import CAUSES, KINDS, OUTCOMES, RELOAD_BOUNDS_S, Durations, Followed, Written
from segue.supervisor.underway import Outcome

if TYPE_CHECKING:
    from prometheus_client import Metric

    from segue.supervisor.master import Master

_STALE_S = 1.0
"""Figures older than this are of a worker whose event loop doesn't turn."""


class Family(msgspec.Struct, frozen=True):
    """One metric, with all its label values."""

    kind: str
    """counter, gauge, histogram or info."""
    help: str
    labels: tuple[str, ...] = ()


_WORKER = ("generation", "worker")
FAMILIES: dict[str, Family] = {
    "segue": Family("info", "The version of segue and the name of the instance.", ("version", "name")),
    "segue_ready": Family("gauge", "1 while /readyz says so: a worker accepts, and nothing drains or stops."),
    "segue_draining": Family("gauge", "1 while an operator drains in this mode.", ("mode",)),
    "segue_master_epoch": Family("gauge", "How many masters this instance has had, this one included."),
    "segue_master_start_time_seconds": Family(
        "gauge", "Unix time at which this master began, which an upgrade does, too."
    ),
    "segue_current_generation": Family("gauge", "The number of the generation that serves; 0: none."),
    "segue_generation_info": Family(
        "gauge", "1 for each generation that lives, with its state.", ("generation", "state", "fingerprint")
    ),
    "segue_generation_age_seconds": Family(
        "gauge", "For how long a generation has been in its state.", ("generation",)
    ),
    "segue_generation_workers": Family("gauge", "Workers of a generation by state.", ("generation", "state")),
    "segue_generation_workers_wanted": Family(
        "gauge", "How many workers a generation shall have.", ("generation",)
    ),
    "segue_http_requests": Family(
        "counter", "Responses, as uvicorn counts them; the only count with --no-request-metrics."
    ),
    "segue_http_responses": Family(
        "counter",
        "Complete responses by status class; origin is segue for 503 of a drain, a stop or a health path.",
        ("status", "origin"),
    ),
    "segue_http_response_duration_seconds": Family(
        "histogram", "From a request's last header to the last byte of its response."
    ),
    "segue_http_requests_aborted": Family(
        "counter", "Requests that were not answered whole: the client left, or the application broke off."
    ),
    "segue_http_requests_in_flight": Family("gauge", "Requests that are being answered."),
    "segue_websockets": Family("gauge", "Open WebSockets."),
    "segue_websockets_opened": Family("counter", "Connections that became a WebSocket."),
    "segue_connections": Family("gauge", "Open connections of clients."),
    "segue_connections_accepted": Family("counter", "Connections accepted from the listeners."),
    "segue_connections_handed_over": Family(
        "counter", "Connections given to another worker, open as they were."
    ),
    "segue_connections_adopted": Family("counter", "Connections taken over from another worker."),
    "segue_connections_closed": Family(
        "counter", "Connections that a drain had to close (TLS, WebSockets, HTTP/2, at their deadline)."
    ),
    "segue_drain_waiting_requests": Family("gauge", "Requests that an operator's drain holds now."),
    "segue_drain_held_requests": Family("counter", "Requests that an operator's drain made wait."),
    "segue_drain_refused_requests": Family(
        "counter",
        "Requests refused by a drain or a stop: at once, after waiting for too long, or left by their client.",
        ("reason",),
    ),
    "segue_reloads": Family("counter", "Reloads and starts by outcome, ok or refused.", ("outcome",)),
    "segue_reload_duration_seconds": Family(
        "histogram", "From the request for a reload to its outcome.", ("outcome",)
    ),
    "segue_probations": Family(
        "counter",
        "Probations by how they ended; rolled back: the previous generation serves again. See deploys.md.",
        ("outcome",),
    ),
    "segue_operations": Family(
        "counter", "Everything that was asked of the master, by outcome.", ("kind", "outcome")
    ),
    "segue_service_swaps": Family(
        "counter",
        "Swaps of a service in all workers, by outcome; those of a name that no worker knows are among the operations only.",
        ("service", "outcome"),
    ),
    "segue_worker_restarts": Family(
        "counter",
        "Workers of the serving generation that were started anew: crash, start (failed), hang, limit, other.",
        ("cause",),
    ),
    "segue_worker_connections": Family("gauge", "Open connections of a worker.", _WORKER),
    "segue_worker_requests_in_flight": Family("gauge", "Requests that a worker is answering.", _WORKER),
    "segue_worker_requests": Family("counter", "Responses of a worker.", _WORKER),
    "segue_worker_event_loop_lag_seconds": Family(
        "gauge",
        "The longest that the event loop was late in the last seconds; grows while it hangs.",
        _WORKER,
    ),
    "segue_worker_resident_memory_bytes": Family("gauge", "Resident memory of a worker.", _WORKER),
    "segue_worker_cpu_seconds": Family("counter", "CPU time of a worker.", _WORKER),
    "segue_worker_open_fds": Family("gauge", "Open descriptors of a worker.", _WORKER),
    "segue_worker_start_time_seconds": Family("gauge", "Unix time at which a worker started.", _WORKER),
    "segue_service_leases": Family("gauge", "Leases of a service that are out.", ("service",)),
    "segue_service_version": Family("gauge", "How often a service was swapped, and one.", ("service",)),
    "segue_service_active": Family("gauge", "1 if it is active wherever it should be.", ("service",)),
    "segue_service_healthy": Family("gauge", "1 if its health() says so in all workers.", ("service",)),
    "segue_hsp_messages": Family(
        "counter", "Messages of the agent protocol, by what became of them.", ("kind",)
    ),
    "segue_service_value": Family(
        "gauge", "A number of a service's metrics(), summed over the workers.", ("service", "name")
    ),
}
"""By name, without what a format appends (``_total``, ``_info``). Beside these there are the ``process_`` metrics of
prometheus-client for the master's own process."""


_HSP = "hsp"
_HSP_MESSAGES = (
    *("received", "handled", "invalid", "duplicates", "handler_errors"),
    *("published", "unacknowledged", "unsent", "dropped"),
)
_UNITS = ("seconds", "bytes")
_SUFFIXES = {"counter": "_total", "info": "_info"}


async def scrape(master: Master, accept: str) -> Response:
    """The answer to a scrape, in the format that `accept`, the header of HTTP, asks for."""
    # in a thread, since the first time takes a moment
    exposition: Any = await asyncio.to_thread(importlib.import_module, "prometheus_client.exposition")
    encode, content_type = exposition.choose_encoder(accept)
    figures = {key: found for key in master.workers.children if (found := master.totals.figures(key))}
    has_services = any(each.leases for each in figures.values())
    services = await services_of_current(master) if has_services else {}
    page = _Page()
    _instance(page, master)
    _generations(page, master)
    _counted(page, master.totals.counts(figures.values()), figures.values())
    _done(page, master.totals.written, services)
    for (generation, worker), each in sorted(figures.items()):
        _worker(page, each, generation=generation, worker=worker)
    for name, service in services.items():
        _service(page, name, service)
    _hsp(page, services.get(_HSP), master.totals.written)
    return Response(200, encode(page), content_type)


def unit_of(name: str) -> str:
    """The unit of a metric, which its name ends with; empty: it counts things."""
    return next((unit for unit in _UNITS if name.endswith(f"_{unit}")), "")


class _Page:
    """What prometheus-client renders: anything that can be asked to `collect`."""

    def __init__(self) -> None:
        from prometheus_client import Metric, ProcessCollector

        self._metrics = {
            name: Metric(name, each.help, each.kind, unit_of(name)) for name, each in FAMILIES.items()
        }
        self._process = ProcessCollector(registry=None)

    def add(self, name: str, value: float, /, **labels: object) -> None:
        """One sample. Its labels are those of its family, else it is a mistake."""
        family = FAMILIES[name]
        texts = {label: str(labels[label]) for label in family.labels}
        self._metrics[name].add_sample(name + _SUFFIXES.get(family.kind, ""), texts, value)

    def histogram(
        self, name: str, bounds: Sequence[float], counts: Sequence[int], seconds: float, **labels: object
    ) -> None:
        """`counts` are those of the buckets, each for itself; the last is what is beyond the `bounds`."""
        metric, texts = self._metrics[name], {key: str(value) for key, value in labels.items()}
        total = 0
        for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
            total += count
            metric.add_sample(f"{name}_bucket", texts | {"le": bound}, total)
        metric.add_sample(f"{name}_count", texts, total)
        metric.add_sample(f"{name}_sum", texts, seconds)

    def collect(self) -> Iterator[Metric]:
        """What there is."""
        yield from (metric for metric in self._metrics.values() if metric.samples)
        yield from self._process.collect()


def _instance(page: _Page, master: Master) -> None:
    state = master.state
    page.add("segue", 1, version=__version__, name=master.instance.name)
    page.add("segue_ready", state.ready)
    for mode in DRAIN_MODES:
        page.add("segue_draining", state.drain_mode == mode, mode=mode)
    page.add("segue_master_epoch", master.epoch)
    page.add("segue_master_start_time_seconds", master.started)
    page.add("segue_current_generation", state.current or 0)


def _generations(page: _Page, master: Master) -> None:
    now = time.monotonic()
    for number, generation in master.state.generations.items():
        taken = master.snapshots.by_generation.get(number)
        page.add(
            "segue_generation_info",
            1,
            generation=number,
            state=generation.state,
            fingerprint=taken.fingerprint if taken else "",
        )
        page.add("segue_generation_age_seconds", now - generation.since, generation=number)
        page.add("segue_generation_workers_wanted", generation.target, generation=number)
        states = [str(worker.state) for worker in generation.workers.values()]
        for state in sorted(set(states)):
            page.add("segue_generation_workers", states.count(state), generation=number, state=state)


def _counted(page: _Page, total: Counts, living: Collection[Figures]) -> None:
    page.add("segue_http_requests", total.requests)
    for status, count in total.responses.items():
        page.add("segue_http_responses", count, status=status, origin="application")
    if total.responses:
        page.add("segue_http_responses", total.rejected, status="5xx", origin="segue")
        page.add("segue_http_requests_aborted", total.aborted)
        page.add("segue_websockets_opened", total.websockets)
        page.add("segue_websockets", sum(each.websockets for each in living))
    if len(total.latency) == len(LATENCY_BOUNDS_S) + 1:
        name = "segue_http_response_duration_seconds"
        page.histogram(name, LATENCY_BOUNDS_S, total.latency, total.latency_s)
    page.add("segue_http_requests_in_flight", sum(each.in_flight for each in living))
    page.add("segue_connections", sum(each.connections for each in living))
    page.add("segue_connections_accepted", total.accepted)
    page.add("segue_connections_handed_over", total.handed_over)
    page.add("segue_connections_adopted", total.adopted)
    page.add("segue_connections_closed", total.closed)
    page.add("segue_drain_waiting_requests", sum(each.waiting for each in living))
    page.add("segue_drain_held_requests", total.held)
    page.add("segue_drain_refused_requests", total.refused, reason="at once")
    page.add("segue_drain_refused_requests", total.held_timed_out, reason="timed out")
    page.add("segue_drain_refused_requests", total.held_left, reason="client left")


def _done(page: _Page, written: Written, services: Collection[str]) -> None:
    """What can be known before it happens is there with 0: an increase from nothing to 1 is none for Prometheus."""
    for outcome in OUTCOMES:
        durations = written.reloads.get(outcome) or Durations.none()
        page.add("segue_reloads", sum(durations.buckets), outcome=outcome)
        name = "segue_reload_duration_seconds"
        page.histogram(name, RELOAD_BOUNDS_S, durations.buckets, durations.seconds, outcome=outcome)
        for kind in KINDS:
            count = written.operations.get(kind, {}).get(outcome, 0)
            page.add("segue_operations", count, kind=kind, outcome=outcome)
        for service in sorted({*services, *written.swaps}):
            count = written.swaps.get(service, {}).get(outcome, 0)
            page.add("segue_service_swaps", count, service=service, outcome=outcome)
    for ended in Outcome:
        page.add("segue_probations", written.probations.get(ended, 0), outcome=ended)
    for cause in CAUSES:
        page.add("segue_worker_restarts", written.restarts.get(cause, 0), cause=cause)


def _worker(page: _Page, figures: Figures, **key: int) -> None:
    late_s = time.time() - figures.time
    lag_s = max(figures.loop_lag_s, late_s) if late_s > _STALE_S else figures.loop_lag_s
    page.add("segue_worker_connections", figures.connections, **key)
    page.add("segue_worker_requests_in_flight", figures.in_flight, **key)
    page.add("segue_worker_requests", figures.counts.requests, **key)
    page.add("segue_worker_event_loop_lag_seconds", lag_s, **key)
    page.add("segue_worker_resident_memory_bytes", figures.rss_bytes, **key)
    page.add("segue_worker_cpu_seconds", figures.cpu_s, **key)
    page.add("segue_worker_open_fds", figures.descriptors, **key)
    page.add("segue_worker_start_time_seconds", figures.since, **key)


def _service(page: _Page, name: str, service: Mapping[str, Any]) -> None:
    page.add("segue_service_leases", service["leases"], service=name)
    page.add("segue_service_version", service["version"], service=name)
    page.add("segue_service_active", service["active"], service=name)
    if service["healthy"] is not None:
        page.add("segue_service_healthy", service["healthy"], service=name)
    for key, value in (service["metrics"] or {}).items():
        if isinstance(value, int | float):
            page.add("segue_service_value", value, service=name, name=key)


def _hsp(page: _Page, service: Mapping[str, Any] | None, written: Written) -> None:
    values = (service and service["metrics"]) or {}
    for kind in _HSP_MESSAGES:
        if isinstance(value := values.get(kind), int | float):
            followed = written.services.setdefault(f"{_HSP}/{kind}", Followed())
            page.add("segue_hsp_messages", followed.now(value), kind=kind)

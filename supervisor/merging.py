"""What the services of all workers of the current generation say, as one: part of ``GET /api/v1/hot/status``.

Booleans are true if they are true on every worker that should have the service; counters are summed; a value of a
store that all share is read once; a rate is weighted with its count. The keys of `fixed` are there for every
application, whether it has such services or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Report = Mapping[str, Any]
"""Of one service in one worker (`segue.worker.services.report`)."""

_INITIALIZED = {
    "llm_interface": "llm",
    "ham_manager": "memory",
    "personality_manager": "personality",
    "hsp_connector": "hsp",
}
"""Key of ``services_initialized`` → name of the service."""
_CONNECTORS = {"hsp": "hsp_available", "mcp": "mcp_available"}
_METRICS: dict[str, dict[str, bool | None]] = {
    "hsp": {"is_connected": False, "pending_acks_count": None, "retry_counts_active": None},
    "mcp": {"is_connected": False, "fallback_initialized": False},
    "learning": {"known_ai_count": None, "tools": None},
    "memory": {"ham_store_size": None},
    "lis": {"incidents_recent": None, "antibodies_recent": None},
}
"""What each section of ``metrics`` has at least, and its value where there is no such service."""


def merge(workers: Iterable[Mapping[str, Report]]) -> dict[str, Any]:
    """The keys of the status that are about services, from what each worker says of its own."""
    reports: dict[str, list[Report]] = {}
    count = 0
    for worker in workers:
        count += 1
        for name, report in worker.items():
            reports.setdefault(name, []).append(report)
    services = {name: _service(each) for name, each in sorted(reports.items())}
    return {
        "services_initialized": {
            key: _initialized(reports.get(name, []), count) for key, name in _INITIALIZED.items()
        }
        | {name: _initialized(each, count) for name, each in reports.items()},
        **{name: _connector(services.get(name), key) for name, key in _CONNECTORS.items()},
        "metrics": {name: values | _metrics(services.get(name)) for name, values in _METRICS.items()}
        | {name: _metrics(service) for name, service in services.items() if name not in _METRICS},
        "services": services,
    }


def _initialized(reports: list[Report], workers: int) -> bool:
    return bool(reports) and len(reports) == workers and all(each["initialized"] for each in reports)


def _connector(service: Mapping[str, Any] | None, available: str) -> dict[str, bool]:
    values = _metrics(service)
    return {
        available: service is not None and bool(values.get(available, True)),
        "is_connected": values.get("is_connected") is True,
        "fallback_enabled": values.get("fallback_enabled") is True,
    }


def _metrics(service: Mapping[str, Any] | None) -> dict[str, Any]:
    return dict(service["metrics"] or {}) if service is not None else {}


def _service(reports: list[Report]) -> dict[str, Any]:
    versions = sorted({each["version"] for each in reports})
    per = reports[0]["per"]
    # what one worker alone may do says nothing where it isn't done
    having = [each for each in reports if per != "generation" or each["expected_active"]]
    degraded = [each["degraded"] for each in reports if each["degraded"]]
    health = [each["health"] for each in having]
    return {
        "per": per,
        "version": versions[-1],
        "versions": versions,
        "active": bool(having) and all(each["active"] for each in having),
        "healthy": None if None in health or not health else all(each["ok"] for each in health),
        "degraded": degraded[0] if degraded else None,
        "leases": sum(each["leases"] for each in reports),
        "retiring": sum(len(each["retiring"]) for each in reports),
        "metrics": _merged([each["metrics"] for each in having]),
    }


def _merged(documents: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    known = [each for each in documents if each is not None]
    if len(known) < len(documents):
        return None  # a sum without one of its parts would be a wrong number
    keys = dict.fromkeys(key for each in known for key in each)
    return {key: _value([each[key] for each in known if key in each]) for key in keys}


def _value(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict) and first.get("kind") == "shared":
        return first["value"]
    if isinstance(first, dict) and first.get("kind") == "rate":
        count = sum(each["count"] for each in values)
        return sum(each["value"] * each["count"] for each in values) / count if count else 0.0
    if all(isinstance(each, bool) for each in values):
        return all(values)
    if all(isinstance(each, int | float) and not isinstance(each, bool) for each in values):
        return sum(values)
    if all(isinstance(each, dict) for each in values):
        return _merged(values)
    return first

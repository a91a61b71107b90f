"""What docs/ says of metrics: each family is in the table, and the dashboard and the alerts name only what exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client import ProcessCollector
from scenario import ROOT

from segue.supervisor.metrics import FAMILIES

DOCS = ROOT / "docs"
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "info": ("_info",),
    "histogram": ("_bucket", "_count", "_sum"),
}
KNOWN = {f"{name}{suffix}": name for name, each in FAMILIES.items() for suffix in SUFFIXES[each.kind]}
KNOWN |= {
    sample.name: family.name
    for family in ProcessCollector(registry=None).collect()
    for sample in family.samples
}
ADDED_BY_PROMETHEUS = {"instance", "job", "le"}


def strings(value: Any, key: str) -> Iterator[str]:
    """Every text under `key`, at any depth."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name == key and isinstance(each, str):
                yield each
            yield from strings(each, key)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each, key)


def dashboard() -> Any:
    return json.loads((DOCS / "grafana.json").read_text())


def alerts() -> Any:
    return yaml.safe_load((DOCS / "alerts.yml").read_text())


def expressions() -> list[str]:
    queries = [
        each["query"]["query"] for each in dashboard()["templating"]["list"] if each["type"] == "query"
    ]
    return [*strings(dashboard(), "expr"), *strings(alerts(), "expr"), *queries]


def test_the_table_has_every_metric_as_it_is() -> None:
    text = (DOCS / "metrics.md").read_text()
    for name, each in FAMILIES.items():
        suffix = {"counter": "_total", "info": "_info"}.get(each.kind, "")
        labels = ", ".join(f"`{label}`" for label in each.labels)
        assert f"| `{name}{suffix}` | {each.kind} | {labels} | {each.help} |" in text
    named = set(re.findall(r"`(segue_\w+)`", text))
    assert named <= {*KNOWN, *FAMILIES}


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_names_only_what_there_is(expression) -> None:
    selected = re.findall(r"\b((?:segue|process)_\w+)(?:\{([^}]*)\})?", expression)
    assert selected or expression.startswith("up{")
    for name, selector in selected:
        assert name in KNOWN, name
        labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", selector))
        family = FAMILIES.get(KNOWN[name])
        assert labels <= ADDED_BY_PROMETHEUS | set(family.labels if family is not None else ()), expression
    grouped = {
        label.strip()
        for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
        for label in labels.split(",")
    }
    of_all = {label for name, _ in selected for label in getattr(FAMILIES.get(KNOWN[name]), "labels", ())}
    assert grouped <= ADDED_BY_PROMETHEUS | of_all, expression
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)


def test_a_legend_names_labels_that_its_expression_keeps() -> None:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                named = [KNOWN[name] for name in re.findall(r"\b(?:segue|process)_\w+", target["expr"])]
                assert any(label in FAMILIES[name].labels for name in named if name in FAMILIES), target


def test_the_dashboard_has_no_panel_twice_nor_two_in_one_place() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_alert_says_what_is_wrong() -> None:
    for group in alerts()["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in {"info", "warning", "critical"}
            assert rule["annotations"]["summary"]

"""The dashboard, the operator's page and the server speak of the same metrics."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "docker" / "grafana"
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")

NAME = re.compile(r"\ba2sf_\w+")


@dataclass(frozen=True)
class Load:
    running: int = 0
    waiting: int = 0
    admitted: int = 0
    capacity: int = 0
    kv_bytes_used: int = 0
    kv_bytes_limit: int = 0


@dataclass(frozen=True)
class Table:
    sha256: str = "00"


@dataclass(frozen=True)
class Catalog:
    tables: dict[str, Table] = field(default_factory=lambda: {"mathqa": Table()})
    refused: tuple[str, ...] = ()
    default: str | None = None


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Names of the series of each metric, by the name that the metric goes by on the page."""
    metrics = Metrics(["StreamGenerate"])
    metrics.serving(model="m", device="cpu", dtype="float32", load=Load, tables=Catalog)
    series: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        if not family.name.startswith("process_"):
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            names = {s.name for s in family.samples if not s.name.endswith("_created")}
            series[family.name + suffix] = names
    return series


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "a2sf.json").read_text())
    return loaded


def expressions(dashboard: dict[str, Any]) -> list[str]:
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = dashboard["templating"]["list"]
    return [*found, *(v["definition"] for v in variables if v["type"] == "query")]


def test_every_series_on_the_dashboard_is_exported(
    dashboard: dict[str, Any], exported: dict[str, set[str]]
) -> None:
    series = set[str]().union(*exported.values())
    for expression in expressions(dashboard):
        used = set(NAME.findall(expression))
        assert used, expression
        assert used <= series, expression


def test_every_metric_is_on_the_dashboard(
    dashboard: dict[str, Any], exported: dict[str, set[str]]
) -> None:
    used = set(NAME.findall(" ".join(expressions(dashboard))))
    missing = {name for name, series in exported.items() if not series & used}
    assert not missing


def test_every_metric_has_its_line_on_the_page(exported: dict[str, set[str]]) -> None:
    lines = re.findall(r"^\| `(a2sf_\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(lines) == sorted(exported)


def test_every_name_on_the_page_is_exported(exported: dict[str, set[str]]) -> None:
    names = set(exported).union(*exported.values())
    assert set(NAME.findall(PAGE)) <= names


def test_every_alert_on_the_page_has_an_expression_that_can_be_copied() -> None:
    section = PAGE.partition("## Useful alerts")[2].partition("\n## ")[0]
    alerts = re.findall(r"^\| ([A-Z][a-z ]+) \|", section, re.MULTILINE)
    block = re.search(r"^```text\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    comments, expressions = block[1].splitlines()[::2], block[1].splitlines()[1::2]
    assert [f"# {alert}" for alert in alerts if alert != "Alert"] == comments
    assert "\\" not in block[1]
    assert len(expressions) == len(comments)


def test_the_service_logs_every_event_on_the_page() -> None:
    events = re.findall(
        r"^\| `([a-z][^`]*)` \| (?:critical|error|warning|info) \|", PAGE, re.MULTILINE
    )
    assert "engine thread died" in events
    source = "".join(path.read_text() for path in (ROOT / "service").rglob("*.py"))
    assert [event for event in events if f'"{event}"' not in source] == []


def test_metrics_have_every_label_on_the_dashboard(dashboard: dict[str, Any]) -> None:
    metrics = Metrics(["StreamGenerate"])
    labels = {
        label
        for family in metrics.registry.collect()
        for sample in family.samples
        for label in sample.labels
    }
    for expression in expressions(dashboard):
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= labels, expression


def test_panels_have_a_meaning_a_place_and_the_chosen_data_source(
    dashboard: dict[str, Any],
) -> None:
    panels = dashboard["panels"]
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
    assert "datasource" in {v["type"] for v in dashboard["templating"]["list"]}


def test_grafana_finds_the_data_source_and_the_dashboards() -> None:
    provisioning = GRAFANA / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())
    (source,) = sources["datasources"]
    assert source["type"] == "prometheus"
    providers = yaml.safe_load((provisioning / "dashboards" / "a2sf.yaml").read_text())
    (provider,) = providers["providers"]
    assert provider["type"] == "file"
    scraped = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]


def test_prometheus_asks_the_service() -> None:
    scraped = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["service:9464"]}]
    # The alerts of the page look for the job by its name.
    assert f'job="{job["job_name"]}"' in PAGE

"""Autoscaling and Prometheus ask for metrics that the service has."""

import re

import pytest
import yaml

from scripts.validate_manifests import MANIFESTS
from service.telemetry.metrics import Metrics
from tests.docker.kubernetes import Rendered, overlay_of, settled
from tests.docker.test_dashboard import PAGE, Catalog, Load


@pytest.fixture(scope="module")
def production() -> Rendered:
    return overlay_of("production")


@pytest.fixture(scope="module")
def gauges() -> set[str]:
    metrics = Metrics(["StreamGenerate"])
    metrics.serving(model="m", device="cpu", dtype="float32", load=Load, tables=Catalog)
    return {family.name for family in metrics.registry.collect() if family.type == "gauge"}


def test_the_number_of_servers_follows_waiting_and_running_requests(
    production: Rendered, gauges: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = settled(production, monkeypatch)
    scaler = production.one("HorizontalPodAutoscaler")["spec"]
    deployment = production.one("Deployment")
    target = scaler["scaleTargetRef"]
    assert target["name"] == deployment["metadata"]["name"]
    assert (target["apiVersion"], target["kind"]) == (deployment["apiVersion"], deployment["kind"])
    assert "replicas" not in deployment["spec"], "applying again would undo the autoscaler's number"
    wanted = {
        metric["pods"]["metric"]["name"]: float(metric["pods"]["target"]["averageValue"])
        for metric in scaler["metrics"]
    }
    assert wanted.keys() == {"a2sf_requests_waiting", "a2sf_requests_running"}
    assert wanted.keys() <= gauges
    # More than that can wait and run, or nothing would ever be asked for.
    assert wanted["a2sf_requests_waiting"] < options.max_waiting
    assert wanted["a2sf_requests_running"] < options.max_batch


def test_the_adapter_provides_the_metrics_of_the_autoscaler(
    production: Rendered, gauges: set[str]
) -> None:
    path = MANIFESTS / "components" / "autoscaling" / "adapter-values.yaml"
    (rule,) = yaml.safe_load(path.read_text())["rules"]["custom"]
    found = re.match(r'\{__name__=~"([^"]+)"', rule["seriesQuery"])
    assert found is not None
    handed = {name for name in gauges if re.search(found[1], name)}
    scaler = production.one("HorizontalPodAutoscaler")["spec"]
    assert handed == {metric["pods"]["metric"]["name"] for metric in scaler["metrics"]}
    assert rule["resources"]["overrides"].keys() == {"namespace", "pod"}
    for placeholder in ("<<.Series>>", "<<.LabelMatchers>>", "<<.GroupBy>>"):
        assert placeholder in rule["metricsQuery"]


def test_prometheus_reads_each_server_once_and_calls_it_as_the_alerts_do(
    production: Rendered,
) -> None:
    monitor = production.one("ServiceMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    (endpoint,) = monitor["endpoints"]
    (service,) = [
        service
        for service in production.all("Service")
        if wanted <= service["metadata"]["labels"].items()
        and endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    ]
    assert f'job="{service["metadata"]["labels"][monitor["jobLabel"]]}"' in PAGE

"""The container files keep their promises: small rights, health, a GPU, signals that arrive."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"

Instruction = tuple[str, str]


def stages() -> dict[str, tuple[str, list[Instruction]]]:
    """Each stage's base and instructions, by name."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    found: dict[str, tuple[str, list[Instruction]]] = {}
    current: list[Instruction] = []
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.split()
            current = []
            found[name] = (base, current)
        elif found:
            current.append((word, " ".join(rest.split())))
    return found


def inherited(name: str) -> list[Instruction]:
    """All instructions of a stage, those of its bases first."""
    base, own = stages()[name]
    return [*(inherited(base) if base in stages() else []), *own]


def last(name: str, word: str) -> str:
    return [rest for found, rest in inherited(name) if found == word][-1]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    return loaded


def test_the_base_is_pinned_by_an_argument() -> None:
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", image)
    assert {base for base, _ in stages().values()} <= {"${PYTHON_IMAGE}", *stages()}


@pytest.mark.parametrize("target", ["service", "tuner"])
def test_an_image_runs_as_a_numeric_user_that_is_not_root(target: str) -> None:
    user, group = last(target, "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0


@pytest.mark.parametrize("target", ["service", "tuner"])
def test_the_entry_point_is_in_exec_form_so_that_signals_reach_it(target: str) -> None:
    command = json.loads(last(target, "ENTRYPOINT"))
    assert command[:3] == ["python", "-m", target]


@pytest.mark.parametrize("target", ["service", "tuner"])
def test_an_image_keeps_models_and_tables_in_volumes(target: str) -> None:
    assert set(json.loads(last(target, "VOLUME"))) == {"/models", "/tables"}
    assert "HF_HOME=/models/" in last(target, "ENV") or any(
        word == "ENV" and "HF_HOME=/models/" in rest for word, rest in inherited(target)
    )


def test_the_service_is_asked_for_its_health_over_grpc() -> None:
    check = last("service", "HEALTHCHECK")
    command = json.loads(check.split("CMD ", 1)[1])
    assert command[:3] == ["python", "-m", "service.health"]


def test_the_service_s_variables_are_settings_that_flags_go_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from service.settings import load, variable

    given = dict(word.split("=", 1) for word in last("service", "ENV").split() if "A2SF" in word)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    loaded = load(["--port", "1"])
    places = {"host": "A2SF_HOST", "insecure_bind": "A2SF_INSECURE_BIND", "port": "--port"}
    assert {name: loaded.places[name] for name in places} == places
    assert set(given) == {variable(name) for name in places}
    assert loaded.options.address == "0.0.0.0:1"


@pytest.mark.parametrize("build", ["service-build", "tuner-build"])
def test_an_image_installs_this_tree_with_its_tested_versions(build: str) -> None:
    assert "pip install --constraint constraints.txt '.[" in last(build, "RUN")


def test_all_that_is_copied_is_let_through_to_the_build() -> None:
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source.rstrip("/")
        for _, own in stages().values()
        for word, rest in own
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("service", ["service", "tuner"])
def test_compose_reserves_a_gpu(compose: dict[str, Any], service: str) -> None:
    (device,) = compose["services"][service]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


@pytest.mark.parametrize("service", ["service", "tuner"])
def test_compose_builds_a_target_that_exists(compose: dict[str, Any], service: str) -> None:
    build = compose["services"][service]["build"]
    assert build["target"] in stages()
    assert (ROOT / "docker" / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE


def test_compose_publishes_plain_text_to_this_machine_alone(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_has_the_metrics_where_prometheus_asks_for_them(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.settings import load

    service = compose["services"]["service"]
    image = dict(word.split("=", 1) for word in last("service", "ENV").split() if "A2SF" in word)
    for name, value in (image | service["environment"]).items():
        monkeypatch.setenv(name, value)
    scraped = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
    (asked,) = scraped["scrape_configs"][0]["static_configs"]
    assert load([]).options.metrics_address == asked["targets"][0].replace("service", "0.0.0.0")
    assert not any("9464" in port for port in service["ports"])


def test_compose_mounts_what_prometheus_and_grafana_read(compose: dict[str, Any]) -> None:
    mounted = {}
    for name in ("prometheus", "grafana"):
        service = compose["services"][name]
        assert service["profiles"] == ["sight"]
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
        for source, *rest in (volume.split(":") for volume in service["volumes"]):
            if source.startswith("."):
                assert (ROOT / "docker" / source).exists()
                assert rest[1:] == ["ro"]
            else:
                assert source in compose["volumes"]
            mounted[source] = rest[0]
    grafana = ROOT / "docker" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((grafana / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((grafana / "dashboards" / "a2sf.yaml").read_text())["providers"]
    port = compose["services"]["prometheus"]["ports"][0].rpartition(":")[2]
    assert source["url"] == f"http://prometheus:{port}"
    assert mounted["./grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./prometheus.yml"] == "/etc/prometheus/prometheus.yml"
    assert mounted["./grafana/provisioning"] == "/etc/grafana/provisioning"


def test_compose_waits_longer_than_the_server_drains(compose: dict[str, Any]) -> None:
    from service.options import ServerOptions

    period = compose["services"]["service"]["stop_grace_period"]
    options = ServerOptions()
    assert float(period.removesuffix("s")) > options.settle_s + options.grace_s


def test_compose_takes_away_every_right_that_is_not_needed(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]

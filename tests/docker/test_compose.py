"""The compose file: legal, with small rights, and in words that our command lines take."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import make_url

import tuner.__main__ as tuner_main
import tuner.cli
import tuner.fit
from service.config.options import ServerOptions
from service.config.settings import load
from tests.docker.test_docker import ACCELERATORS, DOCKERFILE, arguments, stages, variables

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"

OURS = ("service", "tuner")


def interpolated(given: dict[str, str]) -> dict[str, Any]:
    """The file as compose reads it, with variables in place of ${NAME:-DEFAULT}."""
    text = "\n".join(
        line for line in COMPOSE.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: given.get(m[1]) or m[2], text)
    assert "$" not in text
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return interpolated({})


def test_every_variable_is_described_in_one_line() -> None:
    text = COMPOSE.read_text()
    explained = re.findall(r"^# (A2SF_\w+) +\w", text, re.MULTILINE)
    used = re.findall(r"\$\{(\w+):-", text)
    assert sorted(explained) == sorted(set(used))


@pytest.mark.parametrize("service", OURS)
def test_compose_reserves_a_gpu(compose: dict[str, Any], service: str) -> None:
    (device,) = compose["services"][service]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_the_service_for_processors_differs_only_in_its_build_and_its_device(
    compose: dict[str, Any],
) -> None:
    on_gpu, on_cpu = compose["services"]["service"], compose["services"]["service-cpu"]
    assert on_cpu["build"]["args"]["ACCELERATOR"] == "cpu"
    assert on_cpu["build"] | {"args": None} == on_gpu["build"] | {"args": None}
    assert on_cpu["build"]["args"].keys() == on_gpu["build"]["args"].keys()
    assert on_cpu["deploy"] == {}
    # It never starts by itself, and is found under the name that Prometheus reads.
    assert on_cpu["profiles"] == ["cpu"]
    assert on_cpu["networks"]["default"]["aliases"] == ["service"]
    own = {"image", "build", "profiles", "deploy", "networks"}
    assert {k: v for k, v in on_cpu.items() if k not in own} == {
        k: v for k, v in on_gpu.items() if k not in own
    }


@pytest.mark.parametrize("service", OURS)
def test_compose_builds_a_target_that_exists_with_arguments_that_it_has(
    compose: dict[str, Any], service: str
) -> None:
    build = compose["services"][service]["build"]
    assert build["target"] in stages()
    assert (ROOT / "docker" / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE
    assert build["args"].keys() <= arguments().keys()
    assert build["args"]["ACCELERATOR"] in ACCELERATORS


@pytest.mark.parametrize("given", [{}, {"A2SF_MODEL": "owner/model", "A2SF_TABLES": "tables"}])
def test_the_service_accepts_its_command_line_and_variables(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = interpolated(given)["services"]["service"]
    image = {name: value for name, value in variables("service").items() if "A2SF" in name}
    for name, value in (image | service["environment"]).items():
        monkeypatch.setenv(name, value)
    loaded = load(service["command"])
    assert loaded.misspelt == ()
    assert loaded.options.model == given.get("A2SF_MODEL", "reference")
    assert str(loaded.options.tables) == "/tables"
    (mounted,) = [v.split(":")[0] for v in service["volumes"] if v.split(":")[1] == "/tables"]
    assert mounted == given.get("A2SF_TABLES", "../a2sf/reference/tables")
    scraped = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
    (asked,) = scraped["scrape_configs"][0]["static_configs"]
    assert loaded.options.metrics_address == asked["targets"][0].replace("service", "0.0.0.0")
    assert not any("9464" in port for port in service["ports"])


@pytest.mark.parametrize("given", [{}, {"A2SF_TABLE": "mine", "A2SF_DATASET": "recall,state"}])
def test_tuners_share_one_study_in_the_database_that_is_there(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Taken(Exception):
        pass

    def take(settings: tuner.fit.FitSettings) -> None:
        raise Taken(settings)

    services = interpolated(given | {"A2SF_STUDY_PASSWORD": "secret"})["services"]
    monkeypatch.setattr("sys.argv", ["a2sf-tune", *services["tuner"]["command"]])
    monkeypatch.setattr(tuner.cli, "check_writable", lambda out: None)
    monkeypatch.setattr(tuner.fit, "fit", take)
    with pytest.raises(Taken) as taken:
        tuner_main.main()
    (settings,) = taken.value.args
    assert settings.dataset == given.get("A2SF_DATASET", "mathqa")
    assert settings.study == settings.out.stem == given.get("A2SF_TABLE", "mathqa")
    assert f"{settings.out.parent}" in {
        volume.split(":")[1] for volume in services["tuner"]["volumes"]
    }
    url = make_url(settings.storage)
    database = services[url.host]["environment"]
    assert (url.username, url.password) == (database["POSTGRES_USER"], None)
    # The image names the database after its user.
    assert url.database == database["POSTGRES_USER"]
    assert services["tuner"]["environment"] == {"PGPASSWORD": "secret"}
    assert database["POSTGRES_PASSWORD"] == "secret"


def test_the_requested_number_of_tuners_waits_for_a_healthy_database() -> None:
    services = interpolated({"A2SF_WORKERS": "4"})["services"]
    assert services["tuner"]["deploy"]["replicas"] == 4
    assert services["tuner"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    database = services["postgres"]
    assert database["profiles"] == services["tuner"]["profiles"]
    user = database["environment"]["POSTGRES_USER"]
    assert database["healthcheck"]["test"] == [
        *("CMD", "pg_isready", "--host=127.0.0.1", f"--username={user}")
    ]


def test_the_file_contains_no_password(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            assert "PASSWORD" not in name or not value


def test_compose_publishes_plain_text_to_this_machine_alone(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    # Those of `service` twice: service-cpu stands in for it.
    assert len(set(ports)) == 3
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_mounts_only_files_that_exist(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for volume in service["volumes"]:
            source, _, *rights = volume.split(":")
            if not source.startswith("."):
                assert source in compose["volumes"], name
                continue
            assert rights == ["ro"], name
            # Calibration data is the user's own.
            assert source == "../data" or (COMPOSE.parent / source).exists(), name


def test_images_of_others_are_pinned(compose: dict[str, Any]) -> None:
    for name in compose["services"].keys() - {*OURS, "service-cpu"}:
        image = compose["services"][name]["image"]
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+(\.\d+)?", image), image


def test_compose_mounts_the_files_of_prometheus_and_grafana(compose: dict[str, Any]) -> None:
    readers = [compose["services"][name] for name in ("prometheus", "grafana")]
    assert all(service["profiles"] == ["sight"] for service in readers)
    volumes = [volume.split(":") for service in readers for volume in service["volumes"]]
    mounted = {source: place for source, place, *_ in volumes}
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
    period = compose["services"]["service"]["stop_grace_period"]
    options = ServerOptions()
    assert float(period.removesuffix("s")) > options.settle_s + options.grace_s


def test_compose_takes_away_every_right_that_is_not_needed(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("service", OURS)
def test_programs_compiled_below_home_can_run(compose: dict[str, Any], service: str) -> None:
    # Docker mounts a tmpfs without that right, and the kernels' launchers are then not loaded.
    assert compose["services"][service]["tmpfs"] == [f"{variables(service)['HOME']}:exec"]

"""The manifests of the service and the service itself speak of the same things."""

import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from a2sf import __version__
from scripts.validate_manifests import MANIFESTS, kustomizations, problems, render
from service import health
from service.__main__ import main
from service.config.options import ServerOptions
from service.config.settings import ENV_PREFIX, load
from service.server import FLUSH_S, INFERENCE_SERVICES
from tests.docker.kubernetes import (
    Rendered,
    Resource,
    all_containers,
    image,
    overlay_of,
    settled,
)
from tests.docker.test_docker import last

OVERLAYS = ("try", "production")

KEYS = {
    "a2sf-tokens": {"tokens"},
    "a2sf-tls": {"tls.crt", "tls.key", "ca.crt"},
}
"""What the Secrets hold that the page has people make."""


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Rendered:
    return overlay_of(request.param)


@pytest.fixture(scope="module")
def production() -> Rendered:
    return overlay_of("production")


@pytest.fixture
def options(overlay: Rendered, monkeypatch: pytest.MonkeyPatch) -> ServerOptions:
    """What the server makes of the overlay's settings."""
    return settled(overlay, monkeypatch)


@pytest.mark.parametrize("directory", kustomizations(), ids=lambda d: d.name)
def test_kubernetes_takes_the_rendered_directories(directory: Path) -> None:
    for resource in render(directory):
        assert problems(resource) == [], resource["metadata"]["name"]


def test_a_typo_in_a_manifest_is_found(production: Rendered) -> None:
    service = {**production.one("Service"), "spec": {"clusterip": "None"}}
    oldest, newest = problems(service)
    assert "spec" in oldest
    assert "clusterip" in newest
    assert "no Servise" in problems({**service, "kind": "Servise"})[0]


def test_every_component_is_part_of_an_overlay() -> None:
    used = {
        (path.parent / component).resolve()
        for path in (MANIFESTS / "overlays").rglob("kustomization.yaml")
        for component in yaml.safe_load(path.read_text()).get("components", ())
    }
    assert used == set((MANIFESTS / "components").iterdir())


def test_the_server_takes_every_setting(overlay: Rendered, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in overlay.settings.items():
        monkeypatch.setenv(name, value)
    loaded = load([])
    taken = set(loaded.sources.values())
    assert {name for name in overlay.settings if name.startswith(ENV_PREFIX)} == taken
    assert loaded.misspelt == ()
    # Both may be listened on, from everywhere in the pod's network.
    assert loaded.options.address == f"0.0.0.0:{loaded.options.port}"
    assert loaded.options.metrics_address == f"0.0.0.0:{loaded.options.metrics_port}"


def test_no_argument_goes_before_a_setting(
    overlay: Rendered, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in overlay.settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="0"):
        main([*overlay.arguments, "--print-config"])
    printed = tomllib.loads(capsys.readouterr().out)
    assert printed["model"] == overlay.settings["A2SF_MODEL"]
    assert str(printed["port"]) == overlay.settings["A2SF_PORT"]


def test_no_service_s_variables_reach_the_server(overlay: Rendered) -> None:
    # A Service named a2sf would be A2SF_PORT=tcp://10.0.0.1:50051.
    assert all(pod["enableServiceLinks"] is False for pod in overlay.pods)


def test_ports_are_those_that_the_server_listens_on(
    overlay: Rendered, options: ServerOptions
) -> None:
    ports = {port["name"]: port["containerPort"] for port in overlay.container["ports"]}
    assert ports == {"grpc": options.port, "metrics": options.metrics_port}
    for service in overlay.all("Service"):
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]
    (network,) = overlay.all("NetworkPolicy")
    allowed = {p["port"] for rule in network["spec"]["ingress"] for p in rule["ports"]}
    assert allowed == set(ports)


def test_one_service_gives_the_servers_own_addresses_and_one_a_single_one(
    overlay: Rendered,
) -> None:
    addresses = {s["metadata"]["name"]: s["spec"].get("clusterIP") for s in overlay.all("Service")}
    assert addresses == {"a2sf": "None", "a2sf-vip": None}


def test_everything_selects_the_servers(overlay: Rendered) -> None:
    labels = overlay.deployment["template"]["metadata"]["labels"]
    selectors = [
        overlay.deployment["selector"]["matchLabels"],
        *(service["spec"]["selector"] for service in overlay.all("Service")),
        overlay.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        overlay.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(
            spread["labelSelector"]["matchLabels"]
            for spread in overlay.pod["topologySpreadConstraints"]
        ),
    ]
    assert all(selector == labels for selector in selectors)


def probes(overlay: Rendered) -> dict[str, Resource]:
    return {
        kind: overlay.container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")
    }


def asked(probe: Resource) -> tuple[str, str]:
    """Port and service that a probe asks about, of either kind."""
    if "grpc" in probe:
        return str(probe["grpc"]["port"]), probe["grpc"].get("service", "")
    program, *flags = probe["exec"]["command"]
    assert [program, *flags[:2]] == ["python", "-m", "service.health"]
    given = typer.main.get_command(health.app).make_context("health", flags[2:]).params
    assert given["timeout"] < probe["timeoutSeconds"], "the check itself says what is wrong"
    return given["target"].removeprefix("127.0.0.1:"), given["service"]


def test_probes_use_names_that_the_health_service_knows(
    overlay: Rendered, options: ServerOptions
) -> None:
    for probe in probes(overlay).values():
        port, service = asked(probe)
        assert port == str(options.port)
        assert service in ("", *INFERENCE_SERVICES)
        assert ("grpc" in probe) == (options.tls_cert is None), "Kubernetes' own speak no TLS"
        assert probe["timeoutSeconds"] <= probe["periodSeconds"]
    assert asked(probes(overlay)["readiness"])[1] == "a2sf.inference.v1.InferenceService"


def limit(probe: Resource) -> int:
    """Seconds for which a probe may fail."""
    return int(probe["periodSeconds"] * probe["failureThreshold"])


def test_a_drain_ends_within_every_limit(overlay: Rendered, options: ServerOptions) -> None:
    drain = options.settle_s + options.grace_s
    assert options.settle_s > 0, "endpoints take time to go"
    assert limit(probes(overlay)["liveness"]) > drain
    # The ports, the traces and the engine's thread end after it.
    assert overlay.pod["terminationGracePeriodSeconds"] > drain + 4 * FLUSH_S


def test_a_rollout_waits_longer_than_a_server_may_take_to_start(overlay: Rendered) -> None:
    starting = limit(probes(overlay)["startup"])
    assert starting >= 600
    assert overlay.deployment["progressDeadlineSeconds"] > starting


def test_no_server_goes_before_another_serves(overlay: Rendered) -> None:
    assert overlay.deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert overlay.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_a_gpu_is_asked_for_where_the_server_insists_on_one(
    overlay: Rendered, options: ServerOptions
) -> None:
    limits = overlay.container["resources"]["limits"]
    tolerated = [t["key"] for t in overlay.pod.get("tolerations", ())]
    if options.device == "cuda":
        assert limits["nvidia.com/gpu"] == 1
        assert tolerated == ["nvidia.com/gpu"]
    else:
        assert options.device == "cpu"
        assert limits.keys() == {"memory"}
        assert tolerated == []


def mounted(overlay: Rendered) -> dict[Path, Resource]:
    """The volume at each place of the container."""
    volumes = {volume["name"]: volume for volume in overlay.pod["volumes"]}
    mounts = overlay.container["volumeMounts"]
    # What is mounted by subPath stays as it was, whatever becomes of its source.
    assert all(mount.keys() <= {"name", "mountPath", "readOnly"} for mount in mounts)
    assert {mount["name"] for mount in mounts} == volumes.keys()
    return {Path(mount["mountPath"]): volumes[mount["name"]] for mount in mounts}


def test_every_file_of_a_setting_is_a_key_of_a_mounted_secret(
    overlay: Rendered, options: ServerOptions
) -> None:
    volumes = mounted(overlay)
    words = [w for p in probes(overlay).values() for w in p.get("exec", {}).get("command", ())]
    authorities = [word.removeprefix("--tls-ca=") for word in words if word.startswith("--tls-ca=")]
    files = [options.token_file, options.tls_cert, options.tls_key, *map(Path, authorities)]
    for file in files:
        if file is not None:
            secret = volumes[file.parent]["secret"]
            assert file.name in KEYS[secret["secretName"]]
            # For the owner, root, and the pod's group.
            assert secret["defaultMode"] == 0o440
    named = {v["secret"]["secretName"] for v in volumes.values() if "secret" in v}
    assert named == (set() if options.tls_cert is None else KEYS.keys())


def test_tables_are_in_a_config_map_that_may_be_created_later_and_change(
    overlay: Rendered, options: ServerOptions
) -> None:
    assert options.tables is not None
    assert options.watch_tables
    source = mounted(overlay)[options.tables]["configMap"]
    assert source == {"name": "a2sf-tables", "optional": True}
    # No part of the overlay, which would give its name a digest, and every table a rollout.
    (settings,) = overlay.all("ConfigMap")
    assert re.fullmatch(r"a2sf-settings-\w{10}", settings["metadata"]["name"])


def test_the_image_writes_only_to_volumes(overlay: Rendered) -> None:
    volumes = mounted(overlay)
    written = {name: image()[name] for name in ("HF_HOME", "HOME") if name in image()}
    assert "HF_HOME" in written
    for path in map(Path, written.values()):
        (place,) = {path, *path.parents} & volumes.keys()
        assert volumes[place].keys() & {"emptyDir", "persistentVolumeClaim"}
    claims = [v["persistentVolumeClaim"] for v in volumes.values() if "persistentVolumeClaim" in v]
    there = {claim["metadata"]["name"] for claim in overlay.all("PersistentVolumeClaim")}
    assert {claim["claimName"] for claim in claims} == there


@pytest.mark.parametrize("name", ["try", "production", "tuner", "tuner-try"])
def test_pods_have_no_right_that_they_do_not_need(name: str) -> None:
    overlay = overlay_of(name)
    namespace = Rendered(MANIFESTS / "namespace").one("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    accounts = {account["metadata"]["name"] for account in overlay.all("ServiceAccount")}
    assert overlay.pods
    for pod in overlay.pods:
        assert pod["serviceAccountName"] in accounts
        assert pod["automountServiceAccountToken"] is False
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in all_containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]
    for account in overlay.all("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for resource in overlay.resources:
        assert resource["metadata"]["namespace"] == namespace["metadata"]["name"]
        assert resource["kind"] != "Secret"


def test_images_are_of_this_version_and_run_as_their_own_user() -> None:
    for directory in kustomizations():
        for pod in Rendered(directory).pods:
            for container in all_containers(pod):
                found = re.fullmatch(r"(?:.*/)?a2sf-(service|tuner):(.*)", container["image"])
                if found is None:
                    assert re.fullmatch(r"postgres:\d+\.\d+", container["image"])
                    continue
                assert found[2] == __version__
                user = last(found[1], "USER").partition(":")[0]
                assert pod["securityContext"]["runAsUser"] == int(user)

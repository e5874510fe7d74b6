"""The page about containers says what can be typed: targets, arguments, services that exist."""

import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from service import health
from service.config.settings import load
from tests.docker.test_docker import ROOT, arguments, stages, variables
from tuner.cli import app

PAGE = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")

COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


def of(*start: str) -> list[list[str]]:
    found = [words[len(start) :] for words in COMMANDS if words[: len(start)] == list(start)]
    assert found
    return found


def given(words: Sequence[str], option: str) -> list[str]:
    return [after for word, after in pairwise(words) if word == option]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    return loaded


def manifest_images() -> set[str]:
    """Our images, as the manifests for Kubernetes name them before an overlay renames them."""
    files = (ROOT / "docker" / "kubernetes").rglob("*.yaml")
    return set(re.findall(r"image: (a2sf-\S+)", "".join(file.read_text() for file in files)))


def test_builds_name_targets_and_arguments_that_exist() -> None:
    for words in of("docker", "build"):
        (file,), (target,) = given(words, "--file"), given(words, "--target")
        assert (ROOT / file).is_file()
        assert target in stages()
        (tag,) = given(words, "--tag")
        assert tag.partition(":")[0] == f"a2sf-{target}"
        assert tag in manifest_images()
        assert {each.split("=")[0] for each in given(words, "--build-arg")} <= arguments().keys()
        for secret in given(words, "--secret"):
            assert f"--mount=type=secret,{secret.split(',')[0]}," in (ROOT / file).read_text()


def test_the_table_has_every_argument_with_its_default() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \|(.*?)\|", PAGE, re.MULTILINE)
    defaults = {name: cell.strip(" `") for name, cell in rows}
    assert defaults == {
        name: "pip's own index" if name == "TORCH_INDEX_URL" else default or ""
        for name, default in arguments().items()
    }


def test_containers_take_the_arguments_of_their_command_lines() -> None:
    for words in of("docker", "run"):
        (place,) = [at for at, word in enumerate(words) if word.startswith("a2sf-")]
        assert words[place] in manifest_images()
        target, said = words[place].removeprefix("a2sf-").partition(":")[0], words[place + 1 :]
        volumes = {volume.split(":")[1] for volume in given(words, "--volume")}
        assert given(words, "--tmpfs") == [f"{variables(target)['HOME']}:exec"]
        if target == "service":
            options = load(said).options
            assert f"{options.tables}" in volumes
            (published,) = given(words, "--publish")
            assert published.startswith("127.0.0.1:")
            assert published.endswith(f":{variables(target)['A2SF_PORT']}")
        else:
            assert variables(target)["A2SF_DATA_DIR"] in volumes
            fit = get_command(app).commands["fit"].make_context("fit", said)  # type: ignore[attr-defined]
            assert str(fit.params["out"].parent) in volumes


def test_compose_commands_name_profiles_and_services_that_exist(compose: dict[str, Any]) -> None:
    services = compose["services"]
    profiles = {each for service in services.values() for each in service.get("profiles", ())}
    used = set()
    for words in of("docker", "compose"):
        (file,) = given(words, "--file")
        assert (ROOT / file).is_file()
        used |= set(given(words, "--profile"))
        (place,) = [at for at, word in enumerate(words) if word in ("up", "run")]
        after = [word for word in words[place + 1 :] if not word.startswith("--")]
        assert set(after[:1]) <= services.keys()
    assert used == profiles


def test_the_check_for_tls_takes_its_options() -> None:
    (said,) = re.findall(r"`python -m service.health ([^`]*)`", PAGE)
    asked = get_command(health.app).make_context("health", said.split()).params
    assert asked["tls_ca"] == Path("FILE")


def test_variables_on_the_page_are_ones_that_something_reads(compose: dict[str, Any]) -> None:
    from service.config.settings import NAMES, variable

    file = (ROOT / "docker" / "compose.yaml").read_text()
    known = {variable(name) for name in NAMES.values()} | {"A2SF_DATA_DIR"}
    known |= set(re.findall(r"\$\{(A2SF_\w+)", file))
    assert set(re.findall(r"A2SF_\w+", PAGE)) <= known


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link

"""The images keep their promises: small rights, health, versions, signals that arrive.

What only a build can tell, `make image-test` tells; here the Dockerfile is read.
"""

import configparser
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from scripts.image_test import PROGRAMS
from scripts.image_workshop import pip_settings
from service import health
from service.config.settings import load, variable

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TARGETS = ("service", "tuner")
ACCELERATORS = ("cpu", "cuda")

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


def inherited(name: str, accelerator: str = "cuda") -> list[Instruction]:
    """All instructions of a stage, those of its bases first."""
    base, own = stages()[name]
    base = base.replace("${ACCELERATOR}", accelerator)
    if base == "${PYTHON_IMAGE}":
        return own
    return [*inherited(base, accelerator), *own]


def last(name: str, word: str) -> str:
    return [rest for found, rest in inherited(name) if found == word][-1]


def variables(name: str, accelerator: str = "cuda") -> dict[str, str]:
    """The environment that a stage sets, what came before it left as it is written."""
    settings = [rest for word, rest in inherited(name, accelerator) if word == "ENV"]
    return dict(word.split("=", 1) for rest in settings for word in shlex.split(rest))


def runs(name: str, accelerator: str = "cuda") -> list[str]:
    """A stage's commands, those of its bases first, without what is mounted for them."""
    commands = [rest for word, rest in inherited(name, accelerator) if word == "RUN"]
    return [re.sub(r"--mount=\S+ ", "", command) for command in commands]


def arguments() -> dict[str, str | None]:
    """The build arguments and their defaults."""
    found: dict[str, str | None] = {}
    for declared in re.findall(r"^ARG (.*)$", DOCKERFILE.read_text(), re.MULTILINE):
        name, equals, default = declared.partition("=")
        found[name] = default if equals else found.get(name)
    return found


def test_the_base_is_pinned_by_an_argument() -> None:
    image = arguments()["PYTHON_IMAGE"]
    assert image is not None
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", image)
    for accelerator in ACCELERATORS:
        bases = {base.replace("${ACCELERATOR}", accelerator) for base, _ in stages().values()}
        assert bases <= {"${PYTHON_IMAGE}", *stages()}


def test_only_build_arguments_name_other_hosts() -> None:
    assert set(arguments()) == {
        *("PYTHON_IMAGE", "ACCELERATOR", "TORCH_INDEX_URL", "VERSION", "REVISION", "SOURCE")
    }
    assert arguments()["ACCELERATOR"] in ACCELERATORS
    assert arguments()["TORCH_INDEX_URL"] is None
    assert "://" not in DOCKERFILE.read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_numeric_user_that_is_not_root(target: str) -> None:
    user, _ = last(target, "USER").split(":")
    assert int(user) > 0


@pytest.mark.parametrize("target", TARGETS)
def test_unknown_users_can_write_where_the_user_of_the_image_can(target: str) -> None:
    user, group = last(target, "USER").split(":")
    # What an engine gives a user that it does not know.
    assert group == "0"
    assert runs(target)[-1] == (
        f"install --directory --owner={user} --group={group} --mode=2775 /models /tables"
    )
    set_here = variables(target)
    assert set_here["HOME"] == "/tmp"
    # The working directory may be a volume, whose files are no modules.
    assert set_here["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_the_entry_point_is_in_exec_form_so_that_signals_reach_it(target: str) -> None:
    command = json.loads(last(target, "ENTRYPOINT"))
    assert command == ["python", "-m", target]


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_keeps_models_and_tables_in_volumes(target: str) -> None:
    volumes = set(map(Path, json.loads(last(target, "VOLUME"))))
    assert volumes == {Path("/models"), Path("/tables")}
    assert volumes & set(Path(variables(target)["HF_HOME"]).parents)


def test_the_health_check_calls_grpc_where_the_service_listens() -> None:
    shell, flag, script = json.loads(last("service", "HEALTHCHECK").split("CMD ", 1)[1])
    assert (shell, flag) == ("sh", "-c")
    port = variables("service")["A2SF_PORT"]
    words = shlex.split(script.replace("$A2SF_PORT", port))
    assert words[:4] == ["exec", "python", "-m", "service.health"]
    asked = get_command(health.app).make_context("health", words[4:]).params
    assert asked["target"] == f"127.0.0.1:{port}"
    assert last("service", "EXPOSE") == port


def test_the_timeout_of_a_health_check_exceeds_the_deadline_of_its_call() -> None:
    (seconds,) = re.findall(r"--timeout=(\d+)s", last("service", "HEALTHCHECK"))
    asked = get_command(health.app).make_context("health", []).params
    assert float(seconds) > asked["timeout"]


def test_the_service_s_variables_are_settings_that_flags_go_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {name: value for name, value in variables("service").items() if "A2SF" in name}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    loaded = load(["--port", "1"])
    places = {"host": "A2SF_HOST", "insecure_bind": "A2SF_INSECURE_BIND", "port": "--port"}
    assert {name: loaded.sources[name] for name in places} == places
    assert set(given) == {variable(name) for name in places}
    assert loaded.options.address == "0.0.0.0:1"


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("target", TARGETS)
def test_an_image_installs_extras_that_there_are_in_tested_versions(
    target: str, accelerator: str
) -> None:
    stage = f"{target}-libraries"
    installed = [each for each in runs(stage, accelerator) if "pip install" in each]
    assert installed
    assert all("--constraint constraints.txt" in command for command in installed)
    (extras,) = re.findall(r'"\.\[(.*)\]"', installed[-1])
    extra = variables(stage, accelerator)["EXTRA"]
    names = extras.replace("$EXTRA", extra).split(",")
    assert set(names) <= PROJECT["optional-dependencies"].keys()
    assert ("gpu" in names) == (accelerator == "cuda")


def test_only_the_images_for_cuda_have_a_compiler_and_its_headers_are_tried() -> None:
    (command,) = [each for each in runs("runtime-cuda") if "apt-get" in each]
    assert "install --yes --no-install-recommends gcc libc6-dev" in command
    assert "-include Python.h" in command
    assert runs("runtime-cpu", "cpu") == []


@pytest.mark.parametrize("target", TARGETS)
def test_our_code_is_a_separate_layer_after_the_libraries(target: str) -> None:
    copied = [rest for word, rest in stages()[target][1] if word == "COPY"]
    assert copied == [
        f"--from={target}-libraries /opt/venv /opt/venv",
        "--from=package /opt/a2sf /opt/a2sf",
    ]
    assert runs(f"{target}-libraries")[-1].endswith(f"pip uninstall --yes {PROJECT['name']}")


@pytest.mark.parametrize("target", TARGETS)
def test_labels_describe_an_image_and_its_source(target: str) -> None:
    words = [rest for word, rest in inherited(target) if word == "LABEL"]
    labels = dict(each.split("=", 1) for rest in words for each in shlex.split(rest))
    given = arguments()
    assert given["VERSION"] == PROJECT["version"]
    own = {name.rpartition(".")[2]: value for name, value in labels.items()}
    assert own.pop("description")
    assert own == {
        "title": f"a2sf-{target}",
        "version": "$VERSION",
        "revision": "$REVISION",
        "source": "$SOURCE",
        "licenses": PROJECT["license"],
        "name": "$PYTHON_IMAGE",
    }
    declared = [rest.partition("=")[0] for word, rest in inherited(target) if word == "ARG"]
    assert set(declared) == {value[1:] for value in own.values() if value.startswith("$")}


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


def test_the_image_test_names_the_packages_that_it_misses(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.image_test"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"apt-get install {' '.join(PROGRAMS)}" in done.stderr


def test_the_build_of_the_image_test_uses_the_index_of_pip_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels, index = tmp_path / "wheels", tmp_path / "index" / "simple"
    wheels.mkdir()
    index.mkdir(parents=True)
    links = f"{wheels} https://wheels.example.com/"
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", links)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{index}")
    text, places = pip_settings()
    parser = configparser.RawConfigParser()
    parser.read_file(io.StringIO(text))
    assert parser.get("global", "find-links").split() == links.split()
    assert parser.get("global", "extra-index-url") == f"file://{index}"
    # The files of an index stand beside it.
    assert {wheels, index.parent} <= set(places)

"""The client as a separate package holds what it imports, is small, and works alone."""

import asyncio
import json
import os
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.shell import fresh_copy
from tests.service.conftest import StartServer
from tests.test_house import imports, sources

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "clients" / "python"

WHOLE = (ROOT / "service" / "client", ROOT / "service" / "pb")
"""What the package holds as a whole."""

MOST_BYTES = 60_000_000


def project(directory: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((directory / "pyproject.toml").read_text())["project"]
    return project


def module_file(name: str) -> Path | None:
    """The file of a module of ours, or of the module that has an imported name."""
    path = ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py", path.parent / "__init__.py"):
        if file.exists():
            return file
    return path.parent.with_suffix(".py") if path.parent.with_suffix(".py").exists() else None


def files_below(folder: Path) -> Iterator[Path]:
    """All entries of a folder and its folders that are not folders themselves, links included."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from files_below(path)
        else:
            yield path


def imported_by_the_client() -> set[Path]:
    """Files outside of WHOLE that the client imports, all the way."""
    found: set[Path] = set()
    waiting = sources("service/client")
    while waiting:
        for name in imports(waiting.pop()):
            if name.split(".")[0] not in ("a2sf", "service"):
                continue
            file = module_file(name)
            assert file is not None, name
            if file not in found and not any(map(file.is_relative_to, WHOLE)):
                found.add(file)
                waiting.append(file)
    return found


def test_the_package_links_to_exactly_what_the_client_imports() -> None:
    parts = ("a2sf", "service")
    links = {path for part in parts for path in files_below(PACKAGE / part)}
    for link in links:
        assert link.is_symlink()
        assert link.resolve() == ROOT / link.relative_to(PACKAGE)
    needed = imported_by_the_client()
    assert len(needed) > 6
    ours = {ROOT / part / name for part in parts for name in ("__init__.py", "py.typed")}
    packages = {file.parent / "__init__.py" for file in needed}
    assert {link.resolve() for link in links} == {*needed, *WHOLE, *ours, *packages}


def test_the_package_has_the_projects_version_and_ranges() -> None:
    client, whole = project(PACKAGE), project(ROOT)
    for key in ("version", "requires-python", "license"):
        assert client[key] == whole[key]
    declared = {*whole["dependencies"], *whole["optional-dependencies"]["serve"]}
    assert set(client["dependencies"]) <= declared
    assert client["scripts"]["a2sf-client"] == whole["scripts"]["a2sf-client"]


PROGRAM = """
import json, sys
from a2sf.policy import CachePolicy
from service.client import SyncClient

with SyncClient(sys.argv[1]) as client:
    policy = CachePolicy(preset="h2o", budget=16)
    done = client.generate("Hello", max_new_tokens=20, ignore_eos=True, cache_policy=policy)
    print(json.dumps([done.finished.usage.completion_tokens, done.finished.cache.budget]))
assert not {"torch", "numpy"} & sys.modules.keys()
"""


async def output(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        cwd=cwd,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 240)
    assert process.returncode == 0, f"{command}\n{err.decode()}"
    return out.decode()


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_the_package_alone_is_small_and_calls_a_server(
    start_server: StartServer, tmp_path: Path
) -> None:
    _, _, address = await start_server()
    tree = fresh_copy(tmp_path / "tree")
    environment = tmp_path / "alone"
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    install = ("install", "--quiet", "--constraint", "constraints.txt", "./clients/python")
    await output(*pip, *install, cwd=tree)

    listed = json.loads(await output(*pip, "list", "--format", "json", cwd=tree))
    names = {one["name"] for one in listed}
    assert {"a2sf-client", "grpcio", "protobuf", "pydantic"} <= names
    assert not names & {"a2sf-serve", "torch", "numpy", "transformers"}
    (site,) = environment.glob("lib/python*/site-packages")
    # What the disk gives up, as du counts it.
    size = sum(512 * file.lstat().st_blocks for file in site.rglob("*") if file.is_file())
    assert size < MOST_BYTES

    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    assert await output(python, program, address, cwd=tmp_path) == "[20, 16]\n"
    command = environment / "bin" / "a2sf-client"
    arguments = ("Hello", "--target", address, "--max-new-tokens", "8", "--ignore-eos")
    assert "8 tokens (length)" in await output(command, *arguments, cwd=tmp_path)
    version = ("-c", "import a2sf; print(a2sf.__version__)")
    assert (await output(python, *version, cwd=tmp_path)).strip() == project(PACKAGE)["version"]

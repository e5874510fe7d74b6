"""The order of the folders, the owners of libraries, and the contents of the wheel."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# Low to high: the folders and modules of a part import only from those before them.
ORDER = {
    "a2sf": [
        "errors",
        "schema",
        "validation",
        "tablefile",
        "policy",
        "requests",
        "threads",
        "reference",
        "native",
        "cache",
        "model",
        "text",
        "engine",
        "offline",
    ],
    "service": [
        "telemetry",
        "status",
        "policy_messages",
        "client",
        "health",
        "config",
        "backend",
        "rpc",
        "server",
        "process",
        "plan",
        "ray_serve",
    ],
    "tuner": [
        "interrupt",
        "progress",
        "options",
        "settings",
        "data",
        "study",
        "evaluation",
        "search",
        "proof",
        "fit",
        "report",
        "evaluate",
        "budget",
        "harness",
        "measuring",
        "cli",
    ],
}

MOST_MODULES = 12
"""The most modules of a folder, so that it can be read at a glance."""

# Which part alone may import a library.
ALONE = {
    "grpc": "service",
    "grpc_health": "service",
    "grpc_reflection": "service",
    "grpc_status": "service",
    "gguf": "a2sf/model/gguf_file/",
    "google": "service",
    "llvmlite": "a2sf/native/",
    "lm_eval": "tuner/harness",
    "numba": ("a2sf/native/", "a2sf/cache/kernels/"),
    "opentelemetry": "service/telemetry/tracing.py",
    "optuna": "tuner",
    "prometheus_client": "service/telemetry/metrics.py",
    "pydantic_settings": "service/config/settings.py",
    "ray": "service/ray_serve/",
    "structlog": "service",
    "triton": "a2sf/cache/kernels/",
    "transformers": "a2sf/model/",
}


def imports(path: Path, statements: list[ast.stmt] | None = None) -> Iterator[str]:
    """Names that a file imports, anywhere or by some statements of it."""
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if statements is None else statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}"


def sources(part: str) -> list[Path]:
    found = [p for p in sorted((ROOT / part).rglob("*.py")) if "pb" not in p.parts]
    assert found, f"{part} has no sources"
    return found


@pytest.mark.parametrize("part", ORDER)
def test_every_folder_and_module_has_its_place_in_the_order(part: str) -> None:
    found = {p.relative_to(ROOT / part).parts[0].removesuffix(".py") for p in sources(part)}
    assert found - {"__init__", "__main__"} == set(ORDER[part])


@pytest.mark.parametrize(("part", "name"), [(p, name) for p in ORDER for name in ORDER[p]])
def test_a_folder_imports_only_from_below(part: str, name: str) -> None:
    below = ORDER[part][: ORDER[part].index(name)]
    place = ROOT / part / name
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        for imported in imports(path):
            parts = imported.split(".")
            assert parts[0] not in ("training", "benchmarks", "tests")
            if parts[0] == part and parts[1:] and parts[1] in ORDER[part] and parts[1] != name:
                assert parts[1] in below, f"{path} imports {imported}, which stands above it"


def modules_imported(path: Path) -> Iterator[Path]:
    """The files of this project that a file imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name in imports(path, tree.body):
        place = ROOT.joinpath(*name.split("."))
        for file in (place.with_suffix(".py"), place.parent.with_suffix(".py")):
            if file.exists():
                yield file
                break


def test_no_modules_import_each_other_in_a_circle() -> None:
    everything = [path for part in ORDER for path in sources(part)]
    graph = {path: {*modules_imported(path)} - {path} for path in everything}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) >= len(everything)


@pytest.mark.parametrize("part", ORDER)
def test_no_folder_has_more_modules_than_one_can_overlook(part: str) -> None:
    count = Counter(path.parent for path in sources(part) if path.name[:2] != "__")
    assert max(count.values()) <= MOST_MODULES


@pytest.mark.parametrize(
    ("part", "never"),
    [("service", {"tuner", "training"}), ("tuner", {"service", "training"})],
)
def test_the_two_programs_never_import_each_other(part: str, never: set[str]) -> None:
    for path in sources(part):
        found = {name.split(".")[0] for name in imports(path)} & never
        assert not found, f"{path} imports {found}"


@pytest.mark.parametrize(("library", "owner"), ALONE.items())
def test_a_library_is_imported_by_its_owner_alone(
    library: str, owner: str | tuple[str, ...]
) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for part in ("a2sf", "service", "tuner")
        for path in sources(part)
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users, f"nobody imports {library}"
    assert all(user.startswith(owner) for user in users)


# Which extras a part may use, besides those of the parts that hold it.
EXTRAS = {
    "a2sf": set(),
    "a2sf/model/gguf_file": {"gguf"},
    "a2sf/cache/kernels": {"gpu"},
    "service": {"serve"},
    "service/telemetry/tracing.py": {"otel"},
    "service/ray_serve": {"ray"},
    "tuner": {"tune"},
    "tuner/harness/__main__.py": {"eval"},
    "tuner/harness/model.py": {"eval"},
}


def declared(extra: str | None) -> set[str]:
    """The distributions of an extra, or of the core, by their normal names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    found = [Requirement(one) for one in wanted]
    return {canonicalize_name(one.name) for one in found} - {"a2sf-serve"}


@pytest.mark.parametrize("part", ["a2sf", "service", "tuner"])
def test_imports_are_declared_by_the_extras_of_their_part(part: str) -> None:
    """Otherwise a part would work only where something else is installed as well."""
    makers = packages_distributions()
    for path in [*sources(part), *(ROOT / part).rglob("pb/**/*.py")]:
        place = path.relative_to(ROOT)
        extras = {e for at, names in EXTRAS.items() if place.is_relative_to(at) for e in names}
        allowed = set.union(declared(None), *map(declared, extras))
        for name in imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in ("a2sf", "service", "tuner"):
                continue
            made_by = {canonicalize_name(maker) for maker in makers.get(top, [])}
            assert made_by, f"{place} imports {top}, which is not installed"
            assert made_by & allowed, f"{place} imports {top} of {made_by}, which is not declared"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT],
        check=True,
        timeout=280,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"a2sf", "service", "tuner"}
    for needed in (
        "a2sf/py.typed",
        "a2sf/reference/model.safetensors",
        "a2sf/reference/tokenizer.json",
        "a2sf/reference/tables/mathqa.json",
    ):
        assert needed in names

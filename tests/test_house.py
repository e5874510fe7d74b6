"""The house stands as it is drawn: who may import whom, and what the wheel holds."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# Low to high: a module imports only from those before it.
CORE = [
    "errors",
    "schema",
    "tablefile",
    "policy",
    "requests",
    "scoring",
    "layout",
    "cache",
    "attention",
    "kernels",
    "retention",
    "pooled",
    "reference",
    "files",
    "checkpoint",
    "fingerprint",
    "families",
    "gguf_file",
    "linear",
    "dtypes",
    "partial_decoder",
    "threads",
    "ranks",
    "model_spec",
    "models",
    "fused",
    "decoding",
    "prompts",
    "teacher",
    "rng",
    "sampling",
    "text",
    "controls",
    "chat",
    "sequence",
    "admission",
    "staging",
    "capacity",
    "engine",
    "parallel",
]

# Which part alone may import a library.
ALONE = {
    "grpc": "service",
    "grpc_health": "service",
    "grpc_reflection": "service",
    "grpc_status": "service",
    "gguf": "a2sf/gguf_file/",
    "google": "service",
    "llvmlite": "a2sf/kernels/",
    "lm_eval": "tuner/harness",
    "numba": "a2sf/kernels/",
    "opentelemetry": "service/tracing.py",
    "optuna": "tuner",
    "prometheus_client": "service/metrics.py",
    "pydantic_settings": "service/settings.py",
    "ray": "service/ray_serve/",
    "structlog": "service",
    "triton": "a2sf/kernels/",
    "transformers": ("a2sf/models.py", "a2sf/model_spec.py", "a2sf/gguf_file/"),
}


def imports(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


def test_every_core_module_has_its_place_in_the_order() -> None:
    modules = {
        p.relative_to(ROOT / "a2sf").parts[0].removesuffix(".py") for p in sources("a2sf")
    } - {"__init__"}
    assert modules == set(CORE)


@pytest.mark.parametrize("module", CORE)
def test_a_core_module_imports_only_from_below(module: str) -> None:
    below = CORE[: CORE.index(module)]
    place = ROOT / "a2sf" / module
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] not in ("service", "tuner", "training", "benchmarks", "tests")
            if parts[0] == "a2sf" and parts[1:] and parts[1] in CORE and parts[1] != module:
                assert parts[1] in below, f"{path.name} imports {name}, which stands above it"


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
    "a2sf/gguf_file": {"gguf"},
    "a2sf/kernels": {"gpu"},
    "service": {"serve"},
    "service/tracing.py": {"otel"},
    "service/ray_serve": {"ray"},
    "tuner": {"tune"},
    "tuner/harness.py": {"eval"},
    "tuner/harness_model.py": {"eval"},
}


def declared(extra: str | None) -> set[str]:
    """The distributions of an extra, or of the core, by their normal names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    found = [Requirement(one) for one in wanted]
    return {canonicalize_name(one.name) for one in found} - {"a2sf-serve"}


@pytest.mark.parametrize("part", ["a2sf", "service", "tuner"])
def test_whatever_is_imported_is_declared_by_the_extras_of_its_part(part: str) -> None:
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
